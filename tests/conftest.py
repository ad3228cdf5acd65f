"""Where the tests run: on the GPU if there is one, else on the CPU, with Triton's kernels in its interpreter."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the helper module `invariance`
sys.path.insert(0, str(Path(__file__).parent / "gpu"))  # for `vllm_runs` and `vllm_exactness`
sys.path.insert(0, str(Path(__file__).parent / "audit"))  # for `mutation` and the mutants
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before any kernel module is


def pytest_collection_modifyitems(items):
    if HAS_GPU:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch.cuda.is_available() is false"))


@pytest.fixture
def device():
    """The device whose registered implementation a test exercises."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def generator(device):
    return torch.Generator(device).manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--result-file", type=Path, help="write what passed, failed and was skipped, and where, as JSON")


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    score = sys.modules.get("mutation")
    if score is not None and (score.SCORE.killed or score.SCORE.survived):
        terminalreporter.write_line(score.SCORE.line())
    path = config.getoption("--result-file")
    if path is None or hasattr(config, "workerinput"):  # a worker of pytest-xdist knows its own share only
        return
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    from run import describe

    reports = terminalreporter.stats
    outcomes = {key: reports.get(key, []) for key in ("passed", "failed", "error", "skipped")}
    files = {}
    for outcome, found in outcomes.items():
        for report in found:
            counts = files.setdefault(report.nodeid.split("::")[0], dict.fromkeys(outcomes, 0))
            counts[outcome] += 1
    result = describe() | {outcome: len(found) for outcome, found in outcomes.items()}
    result["failures"] = [report.nodeid for report in [*outcomes["failed"], *outcomes["error"]]]
    result["files"] = dict(sorted(files.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
