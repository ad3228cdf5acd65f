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
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

BATCH, PROMPT = 8, 32  # requests, and tokens in each, as vllm bench latency has them unless told otherwise
SHORT, LONG = 9, 17  # tokens out of two profiled runs, which differ by decode steps and by nothing else
TRIES = 6  # times both are recorded, until two traces differ by decode steps alone
FULL = f"execute_context_0(0)_generation_{BATCH}({BATCH})"  # vLLM's name for a decode step of the whole batch
POLL_S = 0.05

Action = Callable[[], dict[str, Any]]


class Trace(NamedTuple):
    """What counts of a trace: the engine's steps by name, and (launches, microseconds) of each kernel by name."""

    steps: Counter[str]
    kernels: dict[str, tuple[int, float]]


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

    return {"measure": measure, "profile": lambda: {"kernels": kernels_of_a_step(engine, traces)}}


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


def kernels_of_a_step(engine: Any, folder: Path) -> list[list[Any]]:
    """Kernels of a decode step, from traces of two runs that differ by ``LONG - SHORT`` of them.

    The engine starts on the first request it sees, so the eight may be admitted in one step or in several. Two traces
    are comparable only if they did that alike, which the names of the engine's steps tell; else there are more tries.
    """
    short: list[Trace] = []
    long: list[Trace] = []
    for _ in range(TRIES):
        short.append(_record(engine, folder, SHORT))
        long.append(_record(engine, folder, LONG))
        for pair in itertools.product(short, long):
            if comparable(*pair):
                return per_step(*pair)
    raise RuntimeError(f"no two traces differ by decode steps alone: {[dict(trace.steps) for trace in short + long]}")


def _record(engine: Any, folder: Path, tokens: int) -> Trace:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [1 + (31 * row + i) % 9999 for i in range(PROMPT)]} for row in range(BATCH)]
    known = set(folder.iterdir())
    engine.start_profile()
    engine.generate(
        prompts, sampling_params=SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=tokens), use_tqdm=False
    )
    engine.stop_profile()
    return read_trace(new_trace(folder, known))


def new_trace(folder: Path, known: set[Path]) -> Path:
    """The trace of the GPU's process that is not in ``known``; the front-end's, of the CPU, is called async_llm."""
    found = [path for path in folder.glob("*.pt.trace.json*") if path not in known and "async_llm" not in path.name]
    if len(found) != 1:
        raise RuntimeError(f"the profiler wrote {len(found)} traces to {folder}, want one")
    return found[0]


def read_trace(path: Path) -> Trace:
    """The steps and kernels of a chrome trace as torch's profiler writes them, maybe compressed."""
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode(errors="replace")
    events = json.loads(text, strict=False)["traceEvents"]
    steps: Counter[str] = Counter()
    kernels: dict[str, tuple[int, float]] = {}
    for event in events:
        if event.get("cat") == "kernel":
            name = shorten(event["name"])
            count, total = kernels.get(name, (0, 0.0))
            kernels[name] = (count + 1, total + event["dur"])
        elif event.get("cat") == "user_annotation" and event["name"].startswith("execute_context_"):
            steps[event["name"]] += 1  # the GPU's timeline has it once more, as gpu_user_annotation
    if not kernels:
        raise RuntimeError(f"no kernel in the trace {path.name}")
    return Trace(steps, kernels)


def comparable(short: Trace, long: Trace) -> bool:
    """Whether all steps but the decode steps of the whole batch are the same."""
    rest = [{name: count for name, count in trace.steps.items() if name != FULL} for trace in (short, long)]
    return rest[0] == rest[1]


def per_step(short: Trace, long: Trace) -> list[list[Any]]:
    """[name, launches in a decode step, mean microseconds] of every kernel, those that take longest first."""
    steps = LONG - SHORT
    rows = []
    for name, (count, total) in long.kernels.items():
        less, before = short.kernels.get(name, (0, 0.0))
        if count > less:
            rows.append([name, round((count - less) / steps, 2), round((total - before) / (count - less), 2)])
    return sorted(rows, key=lambda row: -row[1] * row[2])


def shorten(name: str) -> str:
    """A kernel's name without its return type, template arguments and parameters; of elementwise ones, what they do."""
    plain, depth = "", 0
    for letter in name.replace("(anonymous namespace)::", ""):
        depth -= letter in ">)"
        if depth == 0 and letter not in ">)<(":
            plain += letter
        depth += letter in "<("
    plain = plain.split()[-1] if plain.split() else name
    does = re.search(r"\w*Functor\w*|\w+_kernel_cuda", name) if "elementwise" in plain else None
    return f"{plain} [{does.group()}]"[:120] if does else plain[:120]


if __name__ == "__main__":  # vLLM's engine is a child that may import this file again
    sys.exit(main(sys.argv[1:]))
