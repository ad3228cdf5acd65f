"""How long a kernel takes: CUDA graphs over rotating buffers, contenders replayed in shuffled turns, medians.

A contender is a function from a set of buffers to a call without arguments. Its graph launches one call a set, several
times over, and what a call returns is kept until its set comes round again: otherwise the allocator would hand every
launch the same block, still in the L2 cache. Graph time over launches is the time of one launch, gaps included.

Two cache modes. ``cold``: the sets together fill the L2 cache ``L2_ROOM`` times over, so that nothing is found there.
``warm``: ``WARM_SETS`` sets; with few tokens they stay in the cache, as the output of the previous layer does.

On a machine without a GPU the same functions time the same calls with a host clock.
"""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

Call = Callable[[], Any]
Prepare = Callable[[Any], Call]
Timer = Callable[[], float]  # one measurement, microseconds a launch

L2_ROOM = 2
CPU_L2 = 1 << 16  # a stand-in, bytes: without a GPU the code is exercised and nothing is measured
MAX_SETS = 2048  # capturing more launches than this takes longer than the numbers are worth
WARM_SETS = 20
MIN_SETS = 4
MEMORY = 4 << 30  # bytes that more than MIN_SETS sets may take
LAUNCHES = 100  # a graph of fewer would show its own start
TRAFFIC = 8 << 30  # bytes: large launches are not repeated up to LAUNCHES
CYCLES_PER_SECOND = 2.0e9  # of the GPU at most: a slower clock only sleeps longer


def has_gpu() -> bool:
    """Whether times are those of a GPU."""
    return torch.cuda.is_available()


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if has_gpu():
        torch.cuda.synchronize()


def release_memory() -> None:
    """Give back what the allocator keeps: it cannot do so by itself in the middle of a capture."""
    if has_gpu():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def side_stream() -> contextlib.AbstractContextManager[Any]:
    """The stream everything runs on: the default one cannot be captured, and autograd goes back to the forward's."""
    return torch.cuda.stream(torch.cuda.Stream()) if has_gpu() else contextlib.nullcontext()


def l2_bytes() -> int:
    """Size of the L2 cache."""
    if not has_gpu():
        return CPU_L2
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def rotations(distinct: int, l2: int) -> dict[str, int]:
    """Sets for each cache mode, of sets with ``distinct`` bytes. Without "warm", both modes are the same."""
    cold = -(-L2_ROOM * l2 // distinct)
    if cold > WARM_SETS:
        return {"cold": min(cold, MAX_SETS), "warm": WARM_SETS}
    return {"cold": max(cold, MIN_SETS, min(WARM_SETS, MEMORY // distinct))}


def passes(sets: int, moved: int) -> int:
    """How often a graph goes over its sets, when a launch moves ``moved`` bytes."""
    return max(1, min(LAUNCHES // sets, TRAFFIC // (sets * moved)))


def race(
    contenders: Mapping[str, Prepare], sets: Sequence[Any], passes: int, rounds: int
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """The spread of every contender's time, and why those that failed did.

    Rounds of one measurement each, in a new order every round, so that what drifts (clocks, heat) drifts for all.
    """
    pool = torch.cuda.graph_pool_handle() if has_gpu() else None  # one, so that all outputs land in the same blocks
    timers: dict[str, Timer] = {}
    failures: dict[str, str] = {}
    for name, prepare in contenders.items():
        try:
            timers[name] = _timer(prepare, sets, passes, pool)
        except Exception as error:
            failures[name] = reason(error)
    times: dict[str, list[float]] = {name: [] for name in timers}
    order, shuffle = list(timers), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(timers[name]())
    return {name: spread(values) for name, values in times.items()}, failures


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the 20th and 80th percentile."""
    ordered = sorted(values)
    p20, p80 = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    figures = {"median_us": statistics.median(ordered), "p20_us": p20, "p80_us": p80}
    return {name: round(value, 3) for name, value in figures.items()}


def reason(error: BaseException) -> str:
    """One line about an exception."""
    first = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[0]}"[:300]


def copy_gbps() -> float:
    """GB/s, bytes read and written, of a copy within the device's memory."""
    size = (4 << 30) if has_gpu() else (8 << 20)
    source = torch.empty(size // 8, dtype=torch.int64, device="cuda" if has_gpu() else "cpu").random_()
    once = _clock(partial(torch.empty_like(source).copy_, source), launches=1)
    return 2 * size / 1e3 / statistics.median(once() for _ in range(20))


def empty_kernel_us() -> float:
    """A launch of a kernel that does nothing, in a graph: what no kernel can go below."""
    nothing: Call = partial(torch.cuda._sleep, 0) if has_gpu() else (lambda: None)
    times, failures = race({"nothing": lambda _: nothing}, [None] * 200, passes=1, rounds=11)
    if failures:
        raise RuntimeError(failures["nothing"])
    return times["nothing"]["median_us"]


def host_us(call: Call, loops: int = 7, calls: int = 200) -> float:
    """Microseconds the host spends on an eager call; so few in a row that the launch queue never fills and blocks."""
    for _ in range(20):
        call()
    times = []
    for _ in range(loops):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append(time.perf_counter() - start)
    synchronize()
    return statistics.median(times) / calls * 1e6


def _timer(prepare: Prepare, sets: Sequence[Any], passes: int, pool: Any) -> Timer:
    """``passes`` launches over every set, ready to be timed."""
    for buffers in sets[:3]:  # compiles what has to be compiled
        prepare(buffers)()
    calls = [prepare(buffers) for _ in range(passes) for buffers in sets]
    if not has_gpu():
        return _clock(partial(_launch, calls, len(sets)), len(calls))
    return _clock(partial(_replay, _captured(calls, len(sets), pool), calls), len(calls))


def _replay(graph: torch.cuda.CUDAGraph, calls: Sequence[Call]) -> None:
    """Replay the graph of ``calls``, which hold the memory that it reads."""
    graph.replay()


def _launch(calls: Iterable[Call], sets: int) -> None:
    """Run the calls in order; what one returned lives until its set comes round again."""
    kept: list[Any] = [None] * sets
    for i, call in enumerate(calls):
        kept[i % sets] = None
        kept[i % sets] = call()


def _captured(calls: Sequence[Call], sets: int, pool: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    gc.disable()  # a collection could free memory of the device in the middle of the capture
    try:
        # autograd launches from a thread of its own, which a global capture would refuse
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            _launch(calls, sets)
        finally:
            graph.capture_end()
    finally:
        gc.enable()
    return graph


def _clock(run: Call, launches: int) -> Timer:
    """Times ``run``, in microseconds a launch."""
    run()
    synchronize()
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start  # seconds to enqueue it
    synchronize()
    if not has_gpu():
        return lambda: _host_clock(run) / launches
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = int((1.5 * host + 20e-6) * CYCLES_PER_SECOND)

    def once() -> float:
        torch.cuda._sleep(cycles)  # the device waits here until everything below is queued
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / launches

    return once


def _host_clock(run: Call) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e6
