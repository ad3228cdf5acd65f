"""Run benchmarks and write a result file: ``python benchmarks/run.py NAME [options]``; ``--help`` lists the names."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from batchproof.generation.receipt import environment

HERE = Path(__file__).parent
BENCHMARKS = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def main() -> int:
    """Run one benchmark and write its result file."""
    sys.path.insert(0, str(HERE))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="result file; default benchmarks/results/<device>/<name>.json")
    commands = parser.add_subparsers(dest="name", required=True)
    modules = {name: importlib.import_module(f"bench_{name}") for name in BENCHMARKS}
    for name, module in modules.items():
        module.add_arguments(commands.add_parser(name, help=module.__doc__.splitlines()[0]))
    options = parser.parse_args()
    result = describe() | {"benchmark": options.name} | modules[options.name].run(options)
    out = options.out or HERE / "results" / _folder() / f"{options.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")
    return 0


def describe() -> dict[str, Any]:
    """Where and of what a result is: device, versions, commit, time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = environment(device, torch.bfloat16)
    threads = {} if device.type == "cuda" else {"threads": torch.get_num_threads()}
    return {**facts, **threads, "commit": commit or "unknown", "date": time.strftime("%Y-%m-%d")}


def _folder() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name().lower().removeprefix("nvidia ").replace(" ", "_")


if __name__ == "__main__":
    sys.exit(main())
