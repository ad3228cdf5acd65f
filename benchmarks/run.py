"""Run one benchmark and write its result file.

A result file holds the device, the versions and the commit it is of. It is written only if everything the benchmark
checks was green; otherwise what failed is printed, nothing is written, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from batchproof.generation.receipt import environment

HERE = Path(__file__).parent
BENCHMARKS = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}
EXAMPLES = """\
examples:
  python benchmarks/run.py rms_norm --quick                     a look, in a minute
  python benchmarks/run.py rms_norm                             all shapes, all peers that can be imported
  python benchmarks/run.py rms_norm --hidden 4096 --tokens 1 8 --peers vLLM Quack
  python benchmarks/run.py rms_norm --out /tmp/rms_norm.json    elsewhere than benchmarks/results/<device>
  python benchmarks/run.py rms_norm --help                      what it measures, and its options
then:
  python benchmarks/plot.py                                     the plots in docs, from the result files
  python benchmarks/readme.py                                   the tables in README.md and docs/benchmarks.md
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark and write its result file."""
    sys.path.insert(0, str(HERE))
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser, commands = _parsers()
    chosen = next((word for word in arguments if word in commands), None)
    module = importlib.import_module(f"bench_{chosen}") if chosen else None  # each needs packages of its own
    if chosen and module:
        module.add_arguments(commands[chosen])
    options = parser.parse_args(arguments)
    assert module is not None
    from errors import Refused

    try:
        result = describe() | {"benchmark": options.name} | module.run(options)
    except Refused as refusal:
        print(f"{refusal}\n{options.name}: refused, nothing is written", file=sys.stderr)
        return 1
    out = getattr(options, "out", None) or HERE / "results" / device_folder() / f"{options.name}.json"
    write(out, result)
    print(f"written to {out}")
    return 0


def describe() -> dict[str, Any]:
    """Where and of what a result is: device, versions, commit (COMMIT, where there is no history to ask), time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    commit = (
        os.environ.get("COMMIT")
        or subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    facts = environment(device, torch.bfloat16)
    threads = {} if device.type == "cuda" else {"threads": torch.get_num_threads()}
    return {**facts, **threads, "commit": commit or "unknown", "date": time.strftime("%Y-%m-%d")}


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result file, whole or not at all: one line a key, and one line a row of a list of rows."""
    lines = []
    for key, value in result.items():
        rows = value if isinstance(value, list) and value and isinstance(value[0], dict) else None
        listed = "[\n  " + ",\n  ".join(map(json.dumps, rows)) + "\n ]" if rows else json.dumps(value)
        lines.append(f" {json.dumps(key)}: {listed}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    partial.replace(path)


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and one for each benchmark, which only the benchmark itself can complete."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--out",
        type=Path,
        default=argparse.SUPPRESS,
        help="result file; default benchmarks/results/<device>/<name>.json",
    )
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "parents": [shared]}
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, **style)
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME", title="benchmarks")
    made = {}
    for name, path in BENCHMARKS.items():
        what = ast.get_docstring(ast.parse(path.read_text())) or ""
        made[name] = commands.add_parser(name, help=what.splitlines()[0], description=what, **style)
    return parser, made


def device_folder() -> str:
    """The folder of this device under results."""
    if not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name().lower().removeprefix("nvidia ").replace(" ", "_")


if __name__ == "__main__":
    sys.exit(main())
