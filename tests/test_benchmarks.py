"""The benchmark driver, its gate, its peers and its pages, with shapes of no size."""

import dataclasses
import itertools
import json
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from batchproof import registry

ROOT = Path(__file__).parent.parent
TINY = ["--hidden", "64", "--tokens", "1", "4", "--rounds", "2"]


@pytest.fixture
def bench(monkeypatch):
    """The modules under benchmarks, by name, with few buffer sets."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import cases
    import gate
    import norms
    import peers
    import plain
    import plot
    import readme
    import run
    import tables
    import timing

    monkeypatch.setattr(timing, "MAX_SETS", 32)
    modules = (cases, gate, norms, peers, plain, plot, readme, run, tables, timing)
    return SimpleNamespace(**{module.__name__: module for module in modules})


def plant(monkeypatch, name, spoil):
    """Replace an op by itself followed by ``spoil(inputs, first output)``."""
    spec = registry.get_spec(name)

    def op(**inputs):
        out = spec.op(**inputs)
        spoil(inputs, out[0] if isinstance(out, tuple) else out)
        return out

    monkeypatch.setitem(registry._SPECS, name, dataclasses.replace(spec, op=op))


# The driver.


def test_a_run_writes_every_case_and_prints_a_line_for_each(bench, tmp_path, capsys):
    out = tmp_path / "new" / "rms_norm.json"
    assert bench.run.main(["rms_norm", *TINY, "--peers", "PyTorch", "--out", str(out)]) == 0
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert [row["case"] for row in result["rows"]] == [
        f"{op} {tokens}x64" for op in ("fused_add_rms_norm", "add_rms_norm", "rms_norm") for tokens in (1, 4)
    ]
    for row in result["rows"]:
        assert row["case"] in printed
        tensors = 2 if row["op"] == "rms_norm" else 4
        assert row["floor_us"] == round(tensors * 2 * row["tokens"] * 64 / result["copy_gbps"] / 1e3, 4)
        assert set(row["times"]) == {"cold", "warm"}
        for times in row["times"].values():
            assert set(times) == {"ours", "PyTorch"}
            for figures in times.values():
                assert 0 < figures["p20_us"] <= figures["median_us"] <= figures["p80_us"]
    assert set(result["host_us"]) == {"fused_add_rms_norm", "add_rms_norm", "rms_norm"}
    assert result["rounds"] == 2
    assert {"device", "torch", "triton", "commit", "date", "l2_bytes", "empty_kernel_us"} <= set(result)
    assert [path.name for path in out.parent.iterdir()] == ["rms_norm.json"]


@pytest.mark.parametrize("name", ["rms_norm_quant", "rms_norm_backward", "layer_norm", "rms_norm_gated"])
def test_every_norm_benchmark_runs_or_says_which_op_there_is_none(name, bench, tmp_path, capsys):
    out = tmp_path / "result.json"
    options = ["--hidden", "256", "--tokens", "2", "--rounds", "1", "--peers", "PyTorch", "--out", str(out)]
    assert bench.run.main([name, *options]) == 0, capsys.readouterr().err
    result = json.loads(out.read_text())
    __import__(f"bench_{name}")
    assert {row["op"] for row in result["rows"]} | set(result["missing_ops"]) == set(sys.modules[f"bench_{name}"].OPS)


def test_queries_and_keys_are_normalised_by_heads(bench):
    __import__("bench_rms_norm")
    options = SimpleNamespace(ops=["rms_norm", "add_rms_norm"], hidden=[128], tokens=None, quick=False)
    assert [case.shape for case in sys.modules["bench_rms_norm"].cases(options)] == [(8, 32, 128), (8192, 32, 128)]


def test_help_lists_the_benchmarks_and_teaches_one(bench, capsys):
    for arguments, wanted in (
        (["--help"], bench.run.BENCHMARKS),
        (["rms_norm", "--help"], ["--peers", "--quick", "vLLM"]),
    ):
        with pytest.raises(SystemExit) as leaving:
            bench.run.main(arguments)
        assert leaving.value.code == 0
        printed = capsys.readouterr().out
        assert all(word in printed for word in wanted)


def test_cases_that_time_does_not_reach_are_named(bench, tmp_path, capsys):
    out = tmp_path / "result.json"
    options = [*TINY, "--ops", "rms_norm", "--peers", "--seconds", "1e-9", "--out", str(out)]
    assert bench.run.main(["rms_norm", *options]) == 0
    assert json.loads(out.read_text())["left_out"] == ["rms_norm 1x64", "rms_norm 4x64"]
    assert "left out for lack of time: rms_norm 4x64" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(bench, tmp_path):
    path = tmp_path / "result.json"
    bench.run.write(path, {"rows": [{"a": 1}, {"a": 2}], "b": []})
    assert json.loads(path.read_text()) == {"rows": [{"a": 1}, {"a": 2}], "b": []}
    with pytest.raises(TypeError, match="not JSON serializable"):
        bench.run.write(path, {"a": object()})
    assert json.loads(path.read_text())["b"] == []
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


# The gate.


def far_off(inputs, out):
    out[..., 0] *= 1.1


def off_by_the_batch(inputs, out):
    """One ulp, which the tolerance allows, in batches of more than two."""
    if len(out) > 2:
        out.view(torch.int16)[0] += 1


def failing(inputs, out):
    raise ValueError("planted")


@pytest.mark.parametrize(
    ("spoil", "said"), [(far_off, "inaccurate"), (off_by_the_batch, "bits of output 0"), (failing, "planted")]
)
@pytest.mark.parametrize("op", ["rms_norm", "fused_add_rms_norm"])
def test_a_planted_fault_stops_everything(op, spoil, said, bench, tmp_path, monkeypatch, capsys):
    plant(monkeypatch, op, spoil)
    monkeypatch.setattr(bench.timing, "race", lambda *_, **__: pytest.fail("something was timed"))
    out = tmp_path / "result.json"
    assert bench.run.main(["rms_norm", *TINY, "--peers", "--out", str(out)]) == 1
    printed = capsys.readouterr().err
    assert f"{op} 4x64" in printed
    assert said in printed
    assert not any(tmp_path.iterdir())


def test_the_gate_opens_for_what_is_right(bench):
    device = "cuda" if bench.timing.has_gpu() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    case = bench.cases.Case("rms_norm", (5, 64), ("x",), 2, 2)
    assert bench.gate.problems(registry.get_spec("rms_norm"), case.inputs(generator), generator) == []


# Peers.


def test_a_missing_peer_is_printed_and_recorded(bench, tmp_path, monkeypatch, capsys):
    def nobody():
        raise ImportError("No module named 'nobody'")

    monkeypatch.setitem(bench.peers.PEERS, "nobody", nobody)
    out = tmp_path / "result.json"
    assert bench.run.main(["rms_norm", *TINY, "--peers", "nobody", "PyTorch", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["missing"] == {"nobody": "ImportError: No module named 'nobody'"}
    assert "missing peer nobody: ImportError: No module named 'nobody'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda b: b.x.clone() + 1, "its result is off by"),
        (lambda b: b.x[:, :1], "elements, want"),
        (lambda b: b.nothing, "AttributeError"),
    ],
)
def test_a_peer_that_computes_something_else_is_missing(call, why, bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.peers.PEERS, "liar", lambda: {"rms_norm": call})
    out = tmp_path / "result.json"
    options = [*TINY, "--ops", "rms_norm", "--peers", "liar", "--out", str(out)]
    assert bench.run.main(["rms_norm", *options]) == 0
    row = json.loads(out.read_text())["rows"][0]
    assert why in row["missing"]["liar"]
    assert set(row["times"]["cold"]) == {"ours"}
    assert "missing peer liar from rms_norm 1x64 on:" in capsys.readouterr().out


def test_every_op_of_a_norm_benchmark_has_a_plain_form_to_compile_and_no_other_has(bench):
    ops = {op for name in bench.run.BENCHMARKS for op in getattr(__import__(f"bench_{name}"), "OPS", ())}
    assert set(bench.plain.PLAIN) == ops
    assert set(bench.peers.PEERS["PyTorch"]()) <= ops


@pytest.mark.parametrize("op", ["fused_add_rms_norm", "rms_norm"])
def test_plain_forms_are_the_ops(op, bench):
    generator = torch.Generator().manual_seed(0)
    case = bench.cases.Case(op, (5, 256), ("x",) if op == "rms_norm" else ("x", "residual"), 2, 2)
    b, (function, names) = case.buffers(generator), bench.plain.PLAIN[op]
    reference = registry.get_spec(op).reference(**b.inputs)
    out = function(*(getattr(b, name) for name in names.split()))
    assert bench.gate.peer_problem(out, reference[0] if isinstance(reference, tuple) else reference) is None


# Timing.


def test_rotating_buffers_do_not_alias(bench):
    generator = torch.Generator().manual_seed(0)
    case = bench.cases.Case("any", (2, 64), ("x", "residual"), 4, 4, parameters=("weight", "bias", "scale"),
                            out=torch.int8, scales=1)  # fmt: skip
    sets = [case.buffers(generator) for _ in range(8)]
    tensors = [value for b in sets for value in vars(b).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 8 * 9
    ranges = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    assert len({b.x.float().sum().item() for b in sets}) == 8
    assert all(b.x.any() and b.residual.any() for b in sets)


def test_cold_sets_exceed_the_cache_and_many_tokens_are_measured_once(bench, monkeypatch):
    monkeypatch.setattr(bench.timing, "MAX_SETS", 8192)
    l2, rotations = 50 << 20, bench.timing.rotations
    assert rotations(1 << 20, l2) == {"cold": 100, "warm": 20}
    assert rotations(1 << 10, l2) == {"cold": 8192, "warm": 20}
    assert rotations(5 << 20, l2) == {"cold": 20}
    assert rotations(1 << 30, l2) == {"cold": 4}
    assert bench.timing.passes(20, 1000) == 5
    assert bench.timing.passes(4, 2 << 30) == 1


def test_an_output_lives_until_its_set_comes_round_again(bench):
    """So that launches cannot share a block of memory, and the block of a set is free when its turn comes."""
    made, alive = [], []

    def call():
        alive.append(sum(reference() is not None for reference in made))
        tensor = torch.empty(1)
        made.append(weakref.ref(tensor))
        return tensor

    bench.timing._launch([call] * 7, sets=3)
    assert alive == [0, 1, 2, 2, 2, 2, 2]


def test_contenders_take_turns_and_a_failure_is_a_reason(bench):
    turns = []

    def contender(name):
        return lambda b: lambda: turns.append(name) if not bench.timing.has_gpu() else b.clone()

    def broken(b):
        raise RuntimeError("planted\nin two lines")

    sets = [torch.ones(4, device="cuda" if bench.timing.has_gpu() else "cpu") for _ in range(2)]
    with bench.timing.side_stream():
        times, failures = bench.timing.race({"a": contender("a"), "b": contender("b"), "c": broken}, sets, 1, rounds=9)
    assert set(times) == {"a", "b"}
    assert failures == {"c": "RuntimeError: planted"}
    if not bench.timing.has_gpu():
        rounds = ["".join(turns[i : i + 4]) for i in range(len(turns) - 36, len(turns), 4)]
        assert sorted(set(rounds)) == ["aabb", "bbaa"]


def test_spread(bench):
    assert bench.timing.spread(range(11)) == {"median_us": 5, "p20_us": 2, "p80_us": 8}


# Pages and plots.


def times(**medians):
    return {name: {"median_us": us, "p20_us": us * 0.99, "p80_us": us * 1.01} for name, us in medians.items()}


def row(tokens, *axes, op="fused_add_rms_norm", label="", **modes):
    shape = [tokens, *axes]
    case = f"{op} {'x'.join(map(str, shape))} {label}".strip()
    floor = tokens * axes[-1] * 8 / 4e6
    return {"case": case, "op": op, "label": label, "shape": shape, "tokens": tokens, "hidden": axes[-1],
            "floor_us": floor, "sets": {}, "missing": {}, "times": modes}  # fmt: skip


@pytest.fixture
def result():
    rows = [
        row(1, 4096, cold=times(ours=1.25, vLLM=2.5, Quack=2.0), warm=times(ours=1.0, vLLM=2.0, Quack=4.0)),
        row(1024, 4096, cold=times(ours=10.0, vLLM=9.5)),
        row(8, 32, 128, op="rms_norm", cold=times(ours=1.5)),
    ]
    rows[1]["missing"] = {"Quack": "RuntimeError: planted"}
    return {
        "device": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "copy_gbps": 4277.0, "empty_kernel_us": 0.53,
        "rounds": 12, "peers": {"vLLM": "0.26.0", "Quack": "0.6.3"}, "missing": {"SGLang": "no module"},
        "missing_ops": {}, "left_out": ["rms_norm 9x64"], "host_us": {"rms_norm": {"ours": 4.21, "vLLM": 3.0}},
        "rows": rows,
    }  # fmt: skip


def test_summary_table(bench, result):
    lines = bench.tables.summary({"rms_norm": result}, "picture.png").splitlines()
    assert lines[0] == "![Latency of the fused norm](picture.png)"
    assert "| 1 | 0.01 | 1.25 | 2.00 Quack | 0.62 | 1.00 | 2.00 vLLM | 0.50 |" in lines
    assert "| 1024 | 8.39 | 10.00 | 9.50 vLLM | 1.05 |  |  |  |" in lines
    assert "| 8 | 0.00 | 1.50 | - | - |  |  |  |" in lines
    assert "4277 GB/s" in lines[-1]
    assert "vLLM 0.26.0, Quack 0.6.3. Not there: SGLang (no module)" in lines[-1]
    assert "`benchmarks/results/h200/rms_norm.json`" in lines[-1]
    widths = [line.count("|") for line in lines if line.startswith("|")]
    assert set(widths) == {9}


def test_full_tables(bench, result):
    text = bench.tables.full("rms_norm", result)
    assert "**`fused_add_rms_norm`, tokens x 4096**" in text
    assert "| tokens | cache | floor | share | batchproof | vLLM | Quack |" in text
    assert "| 1 | warm | 0.01 |  | **1.00** | 2.00 | 4.00 |" in text
    assert "| 1024 | cold | 8.39 | 84% | 10.00 | **9.50** | - |" in text
    assert "Host time of an eager call of `rms_norm`, us: batchproof 4.2, vLLM 3.0." in text
    assert "Quack is missing from fused_add_rms_norm 1024x4096 on: RuntimeError: planted" in text
    assert "Not run for lack of time: rms_norm 9x64." in text


def test_naming_a_benchmark_is_all_that_the_pages_need(bench, result, monkeypatch):
    readme = bench.readme
    assert "norms h200" not in readme.pages()[readme.README] or readme.NORMS
    monkeypatch.setattr(readme, "NORMS", ("rms_norm",))
    committed = readme.load
    monkeypatch.setattr(readme, "load", lambda path: result if path == "h200/rms_norm.json" else committed(path))
    assert "| 2.00 Quack |" in readme.render(readme.README, readme.README.read_text())
    assert "| **1.00** | 2.00 | 4.00 |" in readme.render(readme.BENCHMARKS, readme.BENCHMARKS.read_text())


def test_plots(bench, result, tmp_path, capsys):
    result["rows"] += [row(1 << n, 64, cold=times(ours=1.0 + n, vLLM=2.0 + n)) for n in range(16)]
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "rms_norm.json").write_text(json.dumps(result))
    assert bench.plot.main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 0
    for name in ("latency", "bandwidth"):
        picture = (tmp_path / f"norms_{name}_h200.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert 10_000 < len(picture) < 500_000
