"""The benchmark of linear layers: what it races, what it refuses, and its sums, with shapes of no size."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import batchproof

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import bench_linear
    import run
    import timing

    monkeypatch.setattr(timing, "MAX_SETS", 8)
    return SimpleNamespace(linear=bench_linear, run=run)


def race(bench, path, *more):
    return bench.run.main(
        ["linear", "--shapes", "128x256", "--tokens", "1", "17", "--rounds", "2", "--out", str(path), *more]
    )


def test_every_format_is_raced_against_what_can_be_imported(bench, tmp_path, capsys):
    out = tmp_path / "linear.json"
    assert race(bench, out, "--formats", *bench.linear.FORMATS) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["format"], row["tokens"]) for row in rows] == [(f, m) for f in bench.linear.FORMATS for m in (1, 17)]
    for row in rows:
        assert row["times"]["ours"]["median_us"] > 0
        assert row["times"]["ours, static weights"]["median_us"] > 0
        assert row["errors"]["ours"] < 0.01
        assert ("torch" in row["times"]) == (row["format"] != "fp8 blocks")
        assert "torch" in row["times"] or "DeepGEMM" in row["missing"]
        assert row["floor_us"] > 0
    printed = capsys.readouterr().out
    assert "**fp8, shapes**: 128x256" in printed
    assert "| tokens | floor | batchproof | torch |" in printed
    assert printed.count("\n| 17 | ") == len(bench.linear.FORMATS)


def test_a_product_that_varies_is_not_timed(bench, tmp_path, monkeypatch, capsys):
    real = batchproof.scaled_mm
    monkeypatch.setattr(batchproof, "scaled_mm", lambda a, *more: real(a, *more) * (1.0 if len(a) < 16 else 1.01))
    assert race(bench, tmp_path / "linear.json", "--formats", "fp8") == 1
    assert "of 17 in a batch of" in capsys.readouterr().err
    assert not (tmp_path / "linear.json").exists()


def test_a_product_that_is_wrong_is_not_timed(bench, tmp_path, monkeypatch, capsys):
    real = batchproof.linear
    monkeypatch.setattr(batchproof, "linear", lambda a, weight: real(a, weight) * 1.1)
    assert race(bench, tmp_path / "linear.json", "--formats", "bf16") == 1
    assert "ours is off by" in capsys.readouterr().err


def test_a_peer_that_computes_something_else_is_missing(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "mm", lambda a, b: (a @ b) * 2)
    assert race(bench, tmp_path / "linear.json", "--formats", "bf16") == 0
    row = json.loads((tmp_path / "linear.json").read_text())["rows"][0]
    assert "off by 1 of the norm" in row["missing"]["torch"]
    assert set(row["times"]) == {"ours", "ours, static weights"}


def row(form, tokens, n, errors=(), **times):
    figures = {name.replace("_", " "): {"median_us": us} for name, us in times.items()}
    return {
        "format": form, "model": "A", "tokens": tokens, "n": n, "k": 256, "floor_us": n / 100, "times": figures,
        "errors": dict(errors),
    }  # fmt: skip


def test_the_table_sums_what_did_every_product(bench):
    from linear_tables import full

    static = "ours, static weights"
    rows = [row("fp8", 8, 128, torch=5.0, half=1.0), row("fp8", 8, 256, {"ours": 1e-3, "torch": 2e-3}, torch=7.0)]
    for one, ours, early in zip(rows, (4.0, 6.0), (3.0, 5.0), strict=True):
        one["times"] |= {"ours": {"median_us": ours}, static: {"median_us": early}, "vLLM CUTLASS": {"median_us": 9.0}}
    again = [dict(one) | {"times": {"vLLM CUTLASS": {"median_us": 20.0}, "torch": {"median_us": 0.1}}} for one in rows]
    results = [{"rows": rows, "vllm_batch_invariant": "0"}, {"rows": again, "vllm_batch_invariant": "1"}]
    lines = full(results).splitlines()
    assert lines[0] == "**fp8, A**: sum over 128x256, 256x256"
    head = "| tokens | floor | torch | half | batchproof | batchproof, static weights | vLLM CUTLASS | "
    assert lines[2] == head + "vLLM CUTLASS, batch-invariant | best peer | ratio |"
    assert lines[4] == "| 8 | 3.84 | 12.00 | - | 10.00 | 8.00 | 18.00 | 40.00 | torch | 0.67 |"
    assert lines[3].count("---") == lines[2].count("|") - 1 == lines[4].count("|") - 1
    assert "fp8, as a share of the norm of the output: batchproof 1.00e-03, torch 2.00e-03." in full(results)


def test_the_summary_has_the_best_that_varies_and_the_batch_invariant_one(bench):
    from linear_tables import summary

    rows = [
        row("fp8", m, n, ours=us, torch=us * 2, vLLM_CUTLASS=us * 4)
        for m in (1, 2, 8, 64, 512, 4096)
        for n, us in ((128, 5.0), (256, 7.0))
    ]
    slow = [dict(one) | {"times": {"vLLM CUTLASS": {"median_us": 100.0}}} for one in rows]
    what = {"copy_gbps": 4000, "device": "G", "torch": "2"}
    results = [{"rows": rows, "vllm_batch_invariant": "0"} | what, {"rows": slow, "vllm_batch_invariant": "1"} | what]
    lines = summary(results, ["g/linear.json"]).splitlines()
    assert lines[2] == "| fp8, 1 tokens | 3.8 | 12.0 | 24.0 torch | 0.50 | 200.0 | 0.06 |"
    assert len(lines) == 2 + 5 + 2
    assert lines[-1].endswith("at the 4000 GB/s of a copy. G, torch 2 (`benchmarks/results/g/linear.json`).")


def test_a_shape_is_checked(bench, tmp_path, capsys):
    code = bench.run.main(["linear", "--shapes", "128", "--out", str(tmp_path / "linear.json")])
    assert code == 1
    assert "--shapes has '128', want NxK" in capsys.readouterr().err


def test_blocks_fit_the_models(bench):
    for shapes in bench.linear.MODELS.values():
        assert all(n % 128 == 0 and k % 128 == 0 for n, k in shapes)
