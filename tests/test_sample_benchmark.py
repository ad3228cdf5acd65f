"""The benchmark of sampling: what it races, what it refuses, and its table."""

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
    import bench_sample
    import run
    import sample_tables
    import timing

    monkeypatch.setattr(timing, "MAX_SETS", 3)
    return SimpleNamespace(sample=bench_sample, run=run, tables=sample_tables)


def race(bench, path, *more):
    return bench.run.main(["sample", "--widths", "300", "--rows", "1", "9", "--rounds", "2", "--out", str(path), *more])


def test_every_ask_is_raced_against_what_can_be_imported(bench, tmp_path, capsys):
    out = tmp_path / "sample.json"
    assert race(bench, out) == 0
    result = json.loads(out.read_text())
    assert [(row["ask"], row["rows"]) for row in result["rows"]] == [
        (ask, count) for ask in bench.sample.ASKS for count in (1, 9)
    ]
    for row in result["rows"]:
        assert {"ours", "torch"} <= set(row["times"])
        assert {"vLLM", "FlashInfer"} <= {*row["missing"], *row["times"]}
    printed = capsys.readouterr().out
    assert "| asked for | rows x vocabulary | floor | batchproof | torch |" in printed
    assert "\n| top-k and top-p | 9 x 300 | " in printed
    assert "top-p: top_p 0.95; top-k and top-p: top_k 50, top_p 0.95" in bench.tables.page(result, "sample.json")


def test_sampling_that_varies_is_not_timed(bench, tmp_path, monkeypatch, capsys):
    real = batchproof.sample
    monkeypatch.setattr(batchproof, "sample", lambda logits, *rows: real(logits, *rows) + (len(logits) > 2))
    assert race(bench, tmp_path / "sample.json", "--asks", "nothing") == 1
    assert "rows slice(0, 1, None) of 9 in a batch of 1" in capsys.readouterr().err
    assert not (tmp_path / "sample.json").exists()


def test_a_peer_that_draws_what_is_removed_is_missing(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.sample, "_torch", lambda batch: batch.logits.float().argmin(-1))
    assert race(bench, tmp_path / "sample.json", "--asks", "top-k", "min-p") == 0
    rows = json.loads((tmp_path / "sample.json").read_text())["rows"]
    assert all("tokens are among those removed" in row["missing"]["torch"] for row in rows)
