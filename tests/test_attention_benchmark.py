"""The benchmark of attention: what it races, what it refuses, and its table, with batches of no size."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from batchproof.ops.attention import paged_attention, paged_attention_reference

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import bench_attention
    import run
    import timing

    monkeypatch.setattr(timing, "MAX_SETS", 3)
    small = bench_attention.Heads(4, 2, 16)
    monkeypatch.setattr(bench_attention, "MODELS", {"Llama-8B": small})
    return SimpleNamespace(attention=bench_attention, run=run)


def race(bench, path, *more):
    return bench.run.main(["attention", "--cases", "3x1x40", "2x20x45", "--rounds", "2", "--out", str(path), *more])


def test_decode_and_prefill_are_raced(bench, tmp_path, monkeypatch, capsys):
    peers = {"right": lambda _: lambda o: paged_attention_reference(*o.batch), "absent": lambda _: 1 / 0}
    peers["wrong"] = lambda _: lambda o: paged_attention(*o.batch) * 1.5
    monkeypatch.setattr(bench.attention, "PEERS", peers)
    out = tmp_path / "attention.json"
    assert race(bench, out, "--peers", *peers) == 0
    result = json.loads(out.read_text())
    assert [(row["sequences"], row["queries"], row["keys"]) for row in result["rows"]] == [(3, 1, 40), (2, 20, 45)]
    for row in result["rows"]:
        assert set(row["times"]) == {"ours", "right"}
        assert row["missing"]["absent"].startswith("ZeroDivisionError")
        assert "off by 0.5 of the norm" in row["missing"]["wrong"]
        assert row["errors"]["right"] < 0.01
        assert row["floor_us"] > 0
    printed = capsys.readouterr().out
    assert "| sequences | queries of each | keys of each | floor | batchproof | right | best peer | ratio |" in printed
    assert "\n| 2 | 20 | 45 | " in printed
    assert "Not everywhere: absent (ZeroDivisionError" in printed


def test_a_batch_has_sequences_of_several_kinds(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.attention, "PEERS", {"right": lambda _: lambda o: paged_attention_reference(*o.batch)})
    out = tmp_path / "attention.json"
    assert bench.run.main(["attention", "--cases", "3x1x40+1x20x45", "--rounds", "2", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["missing"] == {}
    assert row["errors"]["right"] < 0.01
    assert "\n| 3 + 1 | 1 + 20 | 40 + 45 | " in capsys.readouterr().out


@pytest.mark.parametrize("peer", ["FlashAttention-3", "vLLM Triton", "FlashInfer"])
def test_a_peer_that_cannot_be_imported_is_missing(bench, tmp_path, peer):
    out = tmp_path / "attention.json"
    assert race(bench, out, "--peers", peer) == 0
    assert all(row["missing"].keys() == {peer} for row in json.loads(out.read_text())["rows"])


def test_attention_that_varies_is_not_timed(bench, tmp_path, monkeypatch, capsys):
    real = bench.attention.paged_attention
    monkeypatch.setattr(
        bench.attention, "paged_attention", lambda q, *more: real(q, *more) * (1.0 if len(q) > 1 else 1.004)
    )
    assert race(bench, tmp_path / "attention.json", "--peers", "vLLM Triton") == 1
    assert "Llama-8B, 3x1x40: the last 1 queries of sequences [0] alone" in capsys.readouterr().err
    assert not (tmp_path / "attention.json").exists()


def test_attention_that_is_wrong_is_not_timed(bench, tmp_path, monkeypatch, capsys):
    real = bench.attention.paged_attention
    monkeypatch.setattr(bench.attention, "paged_attention", lambda *arguments: real(*arguments) * 1.1)
    assert race(bench, tmp_path / "attention.json", "--peers", "vLLM Triton") == 1
    assert "ours is off by" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["8x1", "8x1x", "0x1x5", "8x9x5", "8x1x5+", "8x1x5+1x2"])
def test_a_case_is_checked(bench, tmp_path, capsys, case):
    assert bench.run.main(["attention", "--cases", case, "--out", str(tmp_path / "attention.json")]) == 1
    assert f"--cases has '{case}', want sequences x queries x keys" in capsys.readouterr().err


def test_the_page_says_where_its_figures_are_from(bench):
    from attention_tables import page

    row = {"model": "A", "sequences": 8, "queries": 1, "keys": 160, "floor_us": 1.2, "missing": {}}
    row["times"] = {"ours": {"median_us": 6.0}, "FlashAttention-3": {"median_us": 10.0}}
    result = {"rows": [row], "copy_gbps": 4000, "device": "G", "torch": "2"}
    lines = page(result, "g/attention.json").splitlines()
    assert lines[4] == "| 8 | 1 | 160 | 1.20 | 6.00 | 10.00 | FlashAttention-3 | 0.60 |"
    assert lines[-1].endswith("G, torch 2 (`benchmarks/results/g/attention.json`).")
