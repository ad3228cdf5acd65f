"""One engine of bench_vllm_latency.py: built once, then measured and profiled when its parent asks.

``python vllm_worker.py CONTROL_DIR NAME -- <arguments of vllm bench latency>``

Parent and worker talk through files in CONTROL_DIR, each written whole: the worker's NAME.ready, then for every
NAME.<number>.command of the parent the worker's NAME.<number>.done, with ``error`` in it where something went wrong.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import itertools
import json
import os
import re
import statistics
import sys
import time
import traceback
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

BATCH, PROMPT = 8, 32  # requests, and tokens in each, as vllm bench latency has them unless told otherwise
TOKENS = 33  # out of the profiled run; the requests may be admitted, and end, in several steps
ENDS = 2  # decode steps left out at the beginning and at the end
FEWEST = 4  # alike decode steps that a profile needs
FULL = f"execute_context_0(0)_generation_{BATCH}({BATCH})"  # vLLM's name for a decode step of the whole batch
POLL_S = 0.05

Action = Callable[[], dict[str, Any]]


class Span(NamedTuple):
    """A time on the GPU, in microseconds: of a kernel, of a copy or fill, or of a step as vLLM annotates it."""

    name: str
    category: str
    stream: Any
    start: float
    end: float


class Step(NamedTuple):
    """A decode step: its microseconds, and what ran with (what it adds, the time before it when nothing ran)."""

    length: float
    spans: list[tuple[Span, float, float]]

    def kernels(self, stream: Any) -> frozenset[tuple[str, int]]:
        """How often each kernel was launched in a stream; copies in others end in this step or in the next."""
        launched = Counter(span.name for span, _, _ in self.spans if (span.category, span.stream) == ("kernel", stream))
        return frozenset(launched.items())


def main(arguments: Sequence[str]) -> int:
    """Build the engine, say that it is ready, and do as told."""
    control, name, separator, *flags = arguments
    if separator != "--":
        raise SystemExit(f"usage: vllm_worker.py CONTROL_DIR NAME -- ARGUMENTS, got {list(arguments)}")
    folder = Path(control)
    sys.argv = sys.argv[:1]  # the engine's process looks for flags of its own here
    # Our modules (`tables`, `run`, ...) must not stand before installed ones; a spawned engine inherits the path.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    check_plugins(os.environ.get("VLLM_PLUGINS", ""))
    actions = build(flags, folder, name)
    write(folder / f"{name}.ready", {"vllm": importlib.metadata.version("vllm")})
    serve(folder, name, actions)
    return 0


def check_plugins(wanted: str) -> None:
    """Import the plug-ins that are wanted: vLLM only logs that one failed or is none, and times itself without it."""
    for name in filter(None, wanted.split(",")):
        found = list(importlib.metadata.entry_points(group="vllm.general_plugins", name=name))
        if not found:
            raise SystemExit(f"PluginError: there is no vLLM plug-in named {name!r}; is its package installed?")
        found[0].load()


def build(flags: Sequence[str], folder: Path, name: str) -> dict[str, Action]:
    """The engine, once and for all: what can be asked of it."""
    from vllm import LLM
    from vllm.benchmarks import latency
    from vllm.engine.arg_utils import EngineArgs

    traces = folder / f"{name}.traces"
    traces.mkdir()
    # vLLM makes its profiler when a profile is started, so until then this costs the timing nothing.
    profiler = {
        "profiler": "torch",
        "torch_profiler_dir": str(traces.resolve()),
        "torch_profiler_with_stack": "false",
        "torch_profiler_use_gzip": "false",
        "torch_profiler_dump_cuda_time_total": "false",
    }
    flags = [*flags, *(f"--profiler-config.{key}={value}" for key, value in profiler.items())]
    engine = LLM.from_engine_args(EngineArgs.from_cli_args(_parse(flags)))
    LLM.from_engine_args = staticmethod(lambda _: engine)  # latency.main would build another every time

    def measure() -> dict[str, Any]:
        args = _parse(flags)  # anew: an engine may change the defaults that it was given
        args.output_json = str(folder / f"{name}.latency.json")
        latency.main(args)
        measured = json.loads(Path(args.output_json).read_text())
        return {key: measured[key] for key in ("avg_latency", "latencies")}

    return {"measure": measure, "profile": lambda: profile(engine, traces)}


def _parse(flags: Sequence[str]) -> Any:
    from vllm.benchmarks import latency
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    latency.add_cli_args(parser)
    return parser.parse_args(list(flags))


def serve(folder: Path, name: str, actions: Mapping[str, Action]) -> None:
    """Do one command after the other, until the parent is gone."""
    parent = os.getppid()
    for number in itertools.count():
        path = folder / f"{name}.{number}.command"
        while not path.exists():
            if os.getppid() != parent:
                return
            time.sleep(POLL_S)
        try:
            answer = actions[json.loads(path.read_text())["do"]]()
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        write(folder / f"{name}.{number}.done", answer)


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content))
    partial.replace(path)


def profile(engine: Any, folder: Path) -> dict[str, Any]:
    """What runs in a decode step, from the trace of a run."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [1 + (31 * row + i) % 9999 for i in range(PROMPT)]} for row in range(BATCH)]
    known = set(folder.iterdir())
    engine.start_profile()
    engine.generate(
        prompts, sampling_params=SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=TOKENS), use_tqdm=False
    )
    engine.stop_profile()
    return usual_step(read_trace(new_trace(folder, known)))


def new_trace(folder: Path, known: set[Path]) -> Path:
    """The trace of the GPU's process that is not in ``known``; the front-end's, of the CPU, is called async_llm."""
    found = [path for path in folder.glob("*.pt.trace.json*") if path not in known and "async_llm" not in path.name]
    if len(found) != 1:
        raise RuntimeError(f"the profiler wrote {len(found)} traces to {folder}, want one")
    return found[0]


def read_trace(path: Path) -> list[Span]:
    """What ran on the GPU and the engine's steps there, by start; a chrome trace of torch's profiler, maybe compressed.

    vLLM annotates what it launches for a step but for the sampling, and on the GPU's timeline torch has the annotation
    from the start of the first of it to the end of the last, once in each stream.
    """
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode(errors="replace")
    spans = []
    for event in json.loads(text, strict=False)["traceEvents"]:
        category, name = event.get("cat"), event.get("name", "")
        if category == "kernel":
            name = shorten(name)
        elif category in ("gpu_memcpy", "gpu_memset"):
            name = name.split(" (")[0]  # Memcpy HtoD (Pinned -> Device)
        elif category != "gpu_user_annotation" or not name.startswith("execute_context_"):
            continue
        spans.append(Span(name, category, event.get("tid"), event["ts"], event["ts"] + event["dur"]))
    if not any(span.category == "kernel" for span in spans):
        raise RuntimeError(f"no kernel in the trace {path.name}")
    return sorted(spans, key=lambda span: span.start)


def usual_step(spans: Sequence[Span]) -> dict[str, Any]:
    """The decode step of the whole batch, from the middle ones that launch what most of them launch.

    ``step_us``: the median of their lengths. ``kernels``: [name, launches, mean microseconds], which overlap and so do
    not add up. ``added``: [name, launches, microseconds it adds, microseconds before it when nothing runs], copies and
    fills too, all means of a step. ``gap_us``: what the added ones leave of ``step_us``. Longest first.
    """
    steps, stream = decode_steps(spans)
    middle = steps[ENDS:-ENDS]
    launched = [step.kernels(stream) for step in middle]
    most = max(launched, key=launched.count, default=None)
    alike = [step for step, kernels in zip(middle, launched, strict=True) if kernels and kernels == most]
    if len(alike) < FEWEST:
        raise RuntimeError(f"{len(alike)} of {len(steps)} decode steps are alike and in the middle, want {FEWEST}")
    found: dict[tuple[str, bool], list[tuple[float, float, float]]] = {}
    for step in alike:
        for span, added, gap in step.spans:
            key = span.name, span.category == "kernel"
            found.setdefault(key, []).append((span.end - span.start, added, gap))
    kernels, rows = [], []
    for (name, is_kernel), times in found.items():
        duration, added, gap = (sum(column) for column in zip(*times, strict=True))
        launches = round(len(times) / len(alike), 2)
        rows.append([name, launches, round(added / len(alike), 2), round(gap / len(alike), 2)])
        if is_kernel:
            kernels.append([name, launches, round(duration / len(times), 2)])
    length = statistics.median(step.length for step in alike)
    return {
        "kernels": sorted(kernels, key=lambda row: -row[1] * row[2]),
        "steps": len(alike),
        "step_us": round(length, 2),
        "gap_us": round(length - sum(row[2] for row in rows), 2),
        "added": sorted(rows, key=lambda row: -row[2]),
    }


def decode_steps(spans: Sequence[Span]) -> tuple[list[Step], Any]:
    """The decode steps of the whole batch, and the stream that they run in.

    A step goes from its first kernel to the next step's: what is launched after the forward pass, such as the sampling,
    is in it, however far ahead the host has launched.
    """
    marks = [span for span in spans if span.category == "gpu_user_annotation"]
    covered: dict[Any, float] = {}
    for mark in marks:
        if mark.name == FULL:
            covered[mark.stream] = covered.get(mark.stream, 0.0) + mark.end - mark.start
    if not covered:
        names = sorted({mark.name for mark in marks})
        raise RuntimeError(f"no gpu_user_annotation of the trace is {FULL!r}, which tells decode steps: {names}")
    stream = max(covered, key=lambda stream: covered[stream])
    ran = list(account([span for span in spans if span.category != "gpu_user_annotation"]))
    starts = [span.start for span, _, _ in ran]
    steps = []
    for mark, after in itertools.pairwise(mark for mark in marks if mark.stream == stream):
        if mark.name == FULL:
            first, last = (bisect_left(starts, edge.start) for edge in (mark, after))
            steps.append(Step(after.start - mark.start, ran[first:last]))
    return steps, stream


def account(spans: Sequence[Span]) -> Iterator[tuple[Span, float, float]]:
    """Each span, by start, with what it adds to the time in which anything ran, and the gap before it."""
    latest = spans[0].start
    for span in spans:
        yield span, max(0.0, span.end - max(span.start, latest)), max(0.0, span.start - latest)
        latest = max(latest, span.end)


@cache
def shorten(name: str) -> str:
    """A kernel's name without its return type, template arguments and parameters; of generic ones, what they do."""
    plain, depth = "", 0
    for letter in name.replace("(anonymous namespace)::", ""):
        depth -= letter in ">)"
        if depth == 0 and letter not in ">)<(":
            plain += letter
        depth += letter in "<("
    plain = plain.split()[-1] if plain.split() else name
    does = re.search(r"\w*Functor\w*|\w+_kernel_cuda", name) if "elementwise" in plain else None
    does = re.search(r"FlashAttn\w+", name) if plain == "cutlass::device_kernel" else does
    return f"{plain} [{does.group()}]"[:120] if does else plain[:120]


if __name__ == "__main__":  # vLLM's engine is a child that may import this file again
    sys.exit(main(sys.argv[1:]))
