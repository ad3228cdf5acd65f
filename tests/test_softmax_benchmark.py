"""The benchmark of softmax: what it races, what it refuses, and its table."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import batchproof

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import bench_softmax
    import run
    import timing

    monkeypatch.setattr(timing, "MAX_SETS", 3)
    monkeypatch.setattr(bench_softmax, "_compiled", lambda stock: lambda x: stock(x, -1))  # compiling is not its work
    return SimpleNamespace(softmax=bench_softmax, run=run)


def race(bench, path, *more):
    return bench.run.main(
        ["softmax", "--widths", "300", "--rows", "1", "9", "--rounds", "2", "--out", str(path), *more]
    )


def test_both_ops_are_raced_against_what_can_be_imported(bench, tmp_path, capsys):
    out = tmp_path / "softmax.json"
    assert race(bench, out) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["op"], row["dtype"], row["rows"]) for row in rows] == [
        (op, dtype, count) for op in ("log_softmax", "softmax") for dtype in ("fp32", "bf16") for count in (1, 9)
    ]
    for row in rows:
        assert {"ours", "torch", "torch.compile"} <= set(row["times"])
        assert row["times"]["ours"]["median_us"] > 0
        assert "vLLM batch-invariant" in {*row["missing"], *row["times"]}
    printed = capsys.readouterr().out
    assert "| rows x width | floor | batchproof | torch |" in printed
    assert printed.count("\n| 9 x 300 | ") == 4


def test_softmax_that_varies_is_not_timed(bench, tmp_path, monkeypatch, capsys):
    real = batchproof.softmax
    monkeypatch.setattr(batchproof, "softmax", lambda x: real(x) * (1.0 if len(x) > 2 else 1.001))
    assert race(bench, tmp_path / "softmax.json", "--ops", "softmax", "--dtypes", "fp32") == 1
    assert "rows slice(0, 1, None) of 9 in a batch of 1" in capsys.readouterr().err
    assert not (tmp_path / "softmax.json").exists()


def test_a_peer_that_computes_something_else_is_missing(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.softmax, "_compiled", lambda stock: lambda x: stock(x, -1) + 1.0)
    assert race(bench, tmp_path / "softmax.json", "--ops", "log_softmax", "--dtypes", "bf16") == 0
    rows = json.loads((tmp_path / "softmax.json").read_text())["rows"]
    assert all("of the norm" in row["missing"]["torch.compile"] for row in rows)
