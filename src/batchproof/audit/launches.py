"""The kernels a call launches, with grid and block, from torch's profiler."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .report import Launch, by

__all__ = ["differing", "explain", "launches"]


def launches(call: Callable[[], object], device: torch.device) -> tuple[Launch, ...]:
    """The kernels of one call in order; on a CPU the aten ops that it calls itself, which have no grid.

    Args:
        call: what to profile. It is called twice: what it compiles or chooses at first is not in the trace.
        device: where it runs.
    """
    call()
    if device.type != "cuda":
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
            call()
        events: Any = seen.events()
        return tuple(Launch(event.name) for event in events if "::" in event.name and event.cpu_parent is None)
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as seen:
        call()
        torch.cuda.synchronize(device)
    return _kernels(seen)


def differing(before: tuple[Launch, ...], after: tuple[Launch, ...]) -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
    """The launches without those that both sides begin and end with: what is the same explains nothing."""
    shorter = min(len(before), len(after))
    first = next((i for i in range(shorter) if before[i] != after[i]), shorter)
    last = next((i for i in range(shorter - first) if before[-1 - i] != after[-1 - i]), shorter - first)
    return before[first : len(before) - last], after[first : len(after) - last]


def explain(before: Sequence[Launch], after: Sequence[Launch]) -> str:
    """What changes from launches to others, in few words: kernels, else blocks, else grids."""
    if list(before) == list(after):
        return "the same kernels are launched, with the same grids and blocks"
    names = [[_short(launch.kernel) for launch in side] for side in (before, after)]
    if names[0] != names[1]:
        old, new = (", ".join(dict.fromkeys(side)) or "none" for side in names)
        return f"{old} becomes {new}"
    pairs = list(zip(before, after, strict=True))
    for was, now in pairs:
        if was.block != now.block:
            return f"{_short(was.kernel)}: block {by(was.block)} becomes {by(now.block)}"
        if was.shared_bytes != now.shared_bytes:
            return f"{_short(was.kernel)}: {was.shared_bytes} bytes of shared memory become {now.shared_bytes}"
    if any(was.grid != now.grid for was, now in pairs):
        return "; ".join(
            f"{_short(w.kernel)}: grid {by(w.grid)} becomes {by(n.grid)}" for w, n in pairs if w.grid != n.grid
        )
    return "kernels of one name and other template arguments"


def _short(kernel: str) -> str:
    """A kernel's name without return type, namespaces, template arguments and parameters."""
    name = re.sub(r"^(void|std::enable_if<.*?>::type) ", "", kernel)
    return re.split(r"[<(]", name)[0].split("::")[-1]


def _kernels(seen: Any) -> tuple[Launch, ...]:
    """Kernels of a profile in the order of their start; only its trace, as a file, has their grids."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: float(e["ts"]))
    return tuple(_launch(event["name"], event.get("args", {})) for event in found)


def _launch(name: str, arguments: dict[str, Any]) -> Launch:
    grid, block = (tuple(int(n) for n in arguments.get(key, ())) for key in ("grid", "block"))
    return Launch(name, grid, block, int(arguments.get("shared memory", 0)))
