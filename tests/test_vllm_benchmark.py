"""The parts of the vLLM latency benchmark that need neither vLLM nor a GPU; an engine is a script that plays one."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent

# Plays the part of vllm_worker.py: what it does is by variant in FAKE, which "serve"s if nothing else is asked of it.
FAKE = """\
import json, os, subprocess, sys, time
from pathlib import Path
folder, name = Path(sys.argv[1]), sys.argv[2]
deed = json.loads(os.environ["FAKE"]).get(name, "serve")
order = Path(os.environ["ORDER"])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
(order.parent / f"{name}.child").write_text(str(child.pid))
def write(path, content):
    partial = path.with_name("." + path.name)
    partial.write_text(json.dumps(content))
    partial.replace(path)
if deed == "exit":
    sys.exit("ValueError: planted: no kernel for this\\nRuntimeError: Engine core initialization failed.")
if deed == "hang":
    time.sleep(60)
write(folder / f"{name}.ready", {"vllm": "0.0"})
for number in range(100):
    command = folder / f"{name}.{number}.command"
    while not command.exists():
        time.sleep(0.005)
    do = json.loads(command.read_text())["do"]
    with order.open("a") as file:
        file.write(f"{do} {name}\\n")
    if deed == f"die in {do}":
        sys.exit(3)
    answer = {"kernels": [["norm", 65.0, 2.0]]} if do == "profile" else {"avg_latency": 2.0, "latencies": [1.0, 3.0]}
    write(folder / f"{name}.{number}.done", {"error": "planted"} if deed == f"fail in {do}" else answer)
"""


@pytest.fixture
def bench(monkeypatch):
    """The benchmark's modules, by name."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import bench_vllm_latency
    import errors
    import plot_vllm
    import vllm_tables
    import vllm_worker

    return SimpleNamespace(
        run=bench_vllm_latency, errors=errors, plot=plot_vllm, tables=vllm_tables, worker=vllm_worker
    )


@pytest.fixture
def fake(bench, monkeypatch, tmp_path):
    """Run the benchmark on fake engines that misbehave as told; no process of theirs may be left."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setenv("ORDER", str(tmp_path / "order"))

    def run(deeds, *arguments):
        monkeypatch.setenv("FAKE", json.dumps(deeds))
        parser = bench.run.argparse.ArgumentParser()
        bench.run.add_arguments(parser)
        options = parser.parse_args(["--logs", str(tmp_path / "logs"), "--flags", "original", *arguments])
        return bench.run.run(options, script)

    yield run
    children = [int(path.read_text()) for path in tmp_path.glob("*.child")]
    assert children
    deadline = time.monotonic() + 5
    while (alive := [pid for pid in children if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert alive == []


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# The engines.


def test_engines_are_measured_one_at_a_time_in_rounds_that_alternate(fake, tmp_path, capsys):
    result = fake({}, "--variants", "a", "b", "d")
    order = (tmp_path / "order").read_text().split("\n")
    assert order == [
        *(f"measure {name}" for name in "abddba"),
        *(f"profile {name}" for name in "abd"),
        "",
    ]
    assert [row["variant"] for row in result["rows"]] == ["a", "b", "d"]
    for row in result["rows"]:
        assert row["rounds_s"] == [2.0, 2.0]
        assert row["latencies_s"] == [[1.0, 3.0]] * 2
        assert (row["median_s"], row["ratio"]) == (2.0, 1.0)
        assert "missing" not in row
    assert result["vllm"] == "0.0"
    assert [entry["total"] for entry in result["kernels"]] == [65.0] * 3
    assert result["copy_gbps"] > 0
    assert (result["shapes"]["hidden_size"], result["context"]) == (4096, 48)
    assert json.loads(json.dumps(result)) == result
    printed = capsys.readouterr().out
    assert "original: vLLM batch-invariant: round 2: 2.0000 s" in printed
    assert "| vLLM batch-invariant | original | 2.0000 | 1.000 |" in printed


def test_an_engine_that_does_not_start_is_missing_with_its_reason(fake, capsys):
    result = fake({"b": "exit"}, "--variants", "a", "b")
    first, second = result["rows"]
    assert (first["median_s"], first["ratio"]) == (2.0, None)
    assert second["median_s"] is None
    assert second["missing"] == "ended with exit code 1: ValueError: planted: no kernel for this"
    assert "Engine core initialization failed" in capsys.readouterr().out  # the log's tail


def test_an_engine_that_hangs_is_given_up(fake):
    result = fake({"a": "hang"}, "--variants", "a", "b", "--timeout", "3")
    assert result["rows"][0]["missing"].startswith("not ready after 3 s")
    assert result["rows"][1]["median_s"] == 2.0


def test_engines_that_fail_later_are_missing_and_stop_nobody(fake, tmp_path):
    deeds = {"a": "die in measure", "b": "fail in profile", "c": "fail in measure"}
    result = fake(deeds)
    rows = {row["variant"]: row for row in result["rows"]}
    assert rows["a"]["missing"].startswith("ended with exit code 3")
    assert rows["c"]["missing"] == rows["b"]["missing"] == "planted"
    assert rows["a"]["median_s"] is rows["c"]["median_s"] is None
    assert rows["b"]["median_s"] == rows["d"]["median_s"] == 2.0, "a failed profile leaves the times"
    assert [entry["variant"] for entry in result["kernels"]] == ["d", "f", "g", "e"]
    assert (tmp_path / "order").read_text().count("measure a") == 1


def test_nothing_is_left_after_an_interrupt(fake, bench, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.run, "summarise", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fake({}, "--variants", "a", "b")


def test_a_run_without_any_result_or_with_one_round_is_refused(fake, bench):
    with pytest.raises(bench.errors.Refused, match="planted: no kernel"):
        fake({"a": "exit", "b": "exit"}, "--variants", "a", "b")
    with pytest.raises(bench.errors.Refused, match="--rounds is 1"):
        fake({}, "--rounds", "1")


def test_the_variants_differ_by_environment(bench, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "7")
    made = {variant: bench.run._environment(variant, tmp_path) for variant in "abcde"}
    assert [made[variant]["VLLM_BATCH_INVARIANT"] for variant in "abcde"] == ["1", "1", "1", "1", "0"]
    assert [made[variant]["VLLM_PLUGINS"] for variant in "abcde"] == [
        "batchproof_bench_unfused", "", "batchproof", "batchproof", "",
    ]  # fmt: skip
    assert [made[variant]["BATCHPROOF_FUSE_NORM_QUANT"] for variant in "cd"] == ["0", "1"]
    assert all(made[variant]["PYTHONPATH"] == f"{tmp_path}{os.pathsep}/somewhere" for variant in "abcde")


# The plug-ins.


def test_vllm_finds_the_plugins_and_an_engine_without_one_is_refused(bench, tmp_path, monkeypatch):
    folder = bench.run.write_plugins(tmp_path / "plugins")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    importlib.invalidate_caches()
    (found,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="batchproof_bench_unfused")
    assert found.load().__name__ == "register"
    bench.worker.check_plugins("")
    bench.worker.check_plugins("batchproof_bench_unfused")
    with pytest.raises(SystemExit, match="no vLLM plug-in named 'batchprof'"):
        bench.worker.check_plugins("batchprof")


def test_the_unfused_norm_adds_then_normalises(bench, monkeypatch):
    def todays(input, weight, eps=1e-6, residual=None):
        assert residual is None
        return input * weight

    batch_invariant = SimpleNamespace(rms_norm_batch_invariant=todays)
    layernorm = SimpleNamespace(rms_norm_batch_invariant=todays)
    layers = SimpleNamespace(batch_invariant=batch_invariant, layernorm=layernorm)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers", layers)
    import vllm_unfused

    for _ in range(2):  # vLLM may register a plug-in twice
        vllm_unfused.register()
        assert layernorm.rms_norm_batch_invariant(2, 10) == 20
        assert layernorm.rms_norm_batch_invariant(2, 10, 1e-5, residual=3) == (50, 5)


# The worker.


def test_a_worker_serves_reports_errors_and_ends_with_its_parent(bench, tmp_path):
    serve = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import vllm_worker as w, pathlib;"
        f"w.serve(pathlib.Path({str(tmp_path)!r}), 'x', {{'good': lambda: {{'n': 1}}, 'bad': lambda: 1 / 0}})"
    )
    for number, do in enumerate(("good", "bad")):
        bench.worker.write(tmp_path / f"x.{number}.command", {"do": do})
    # The parent of the worker ends at once, having said which process the worker is.
    starter = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {serve!r}], stdout=2).pid)"
    starter += (
        f"\nimport pathlib, time\nwhile not pathlib.Path({str(tmp_path / 'x.1.done')!r}).exists(): time.sleep(.01)"
    )
    pid = int(subprocess.run([sys.executable, "-c", starter], capture_output=True, timeout=20, check=True).stdout)
    assert json.loads((tmp_path / "x.0.done").read_text()) == {"n": 1}
    assert json.loads((tmp_path / "x.1.done").read_text())["error"].startswith("ZeroDivisionError")
    deadline = time.monotonic() + 5
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(pid)


# What readers see.


def synthetic():
    names = {"a": "before the change", "b": "vLLM batch-invariant", "d": "batchproof norms, fused quantisation"}
    kernels = {
        "a": [["_rms_norm_kernel", 65.0, 3.0], ["triton_poi_fused_add_0", 64.0, 2.0], ["nvjet_tst", 128.0, 9.0]],
        "b": [["vllm::fused_add_rms_norm_kernel", 64.0, 3.0], ["vllm::static_quant", 64.0, 1.5], ["nvjet_b", 128.0, 9]],
        "d": [["_fused_add_rms_norm_quant_kernel", 64.0, 2.5], ["nvjet_tst", 128.0, 9.0]],
    }
    rows = [
        {"flags": flags, "variant": variant, "name": names[variant], "median_s": seconds, "ratio": ratio}
        for flags in ("original", "default")
        for variant, seconds, ratio in (("a", 0.5, 1.25), ("b", 0.4, 1.0), ("d", 0.3, 0.75))
    ]
    rows[-1] |= {"median_s": None, "ratio": None, "missing": "ended with exit code 1: a | b"}
    return {
        "device": "NVIDIA H200", "torch": "2.11.0", "vllm": "0.26.0", "model": "Llama-3.1-8B-Instruct-FP8", "batch": 8,
        "input_tokens": 32, "output_tokens": 128, "rounds": 2, "iterations": 10, "rows": rows, "variants": names,
        "flags": {"original": ["-cc.custom_ops+=+rms_norm"], "default": []},
        "original": {"source": "vLLM PR 40413", "before_s": 0.5245, "after_s": 0.5136},
        "kernels": [{"flags": "original", "variant": v, "total": 0.0, "kernels": k} for v, k in kernels.items()],
    }  # fmt: skip


def test_the_latency_table_leaves_lm_head_out_of_its_last_column(bench):
    result = synthetic()
    result["kernels"] = [
        {"flags": "original", "variant": variant, "total": 2.0, "kernels": [["gemm", 1.0, us], ["norm", 65.0, 4.0]]}
        for variant, us in (("a", 1000.0), ("b", 500.0))
    ]
    expected = (0.5 - 128 * 1000e-6) / (0.4 - 128 * 500e-6)
    assert bench.tables.latency_rows(result).splitlines()[2].endswith(f"| 1000 | {expected:.3f} |")


def test_the_throughput_table_has_tokens_a_second_and_the_share_of_the_default(bench):
    result = synthetic()
    result["rows"] = [row | {"variant": "e"} if row["variant"] == "b" else row for row in result["rows"]]
    lines = bench.tables.throughput_table(result).splitlines()
    tokens = result["batch"] * result["output_tokens"]
    assert lines[2] == f"| before the change | original | 0.500 | {tokens / 0.5:.0f} | 0.800 |"
    assert lines[3].endswith(f"| original | 0.400 | {tokens / 0.4:.0f} | 1.000 |")
    assert "`benchmarks/results/h200/vllm_throughput.json`" in lines[-1]


def test_a_line_about_one_side_counts_all_comparisons_and_names_engines_that_failed(bench):
    row = {
        "model": "llama", "configuration": "eager", "error": None, "greedy_comparisons": 39, "greedy_differ": 1,
        "seeded_comparisons": 3, "seeded_differ": 2,
    }  # fmt: skip
    failed = row | dict.fromkeys((name for name in row if "_" in name), 0) | {"error": "out of memory"}
    line = bench.tables.exactness_line({"device": "H", "commit": "abc", "rows": [row, row, failed]}, "h/x.json")
    assert "6 of 84 comparisons differ in 3 engines" in line
    assert "`benchmarks/results/h/x.json`, commit abc" in line
    assert line.endswith("llama, eager: out of memory.")


def test_the_latency_table(bench):
    table = bench.tables.latency_table(synthetic())
    assert table.splitlines()[2:8] == [
        "| before the change | original | 0.5000 | 1.250 |  |  |",
        "| vLLM batch-invariant | original | 0.4000 | 1.000 |  |  |",
        "| batchproof norms, fused quantisation | original | 0.3000 | 0.750 |  |  |",
        "| before the change | default | 0.5000 | 1.250 |  |  |",
        "| vLLM batch-invariant | default | 0.4000 | 1.000 |  |  |",
        r"| batchproof norms, fused quantisation | default | missing: ended with exit code 1: a \| b |  |  |  |",
    ]
    for said in (
        "NVIDIA H200",
        "vLLM 0.26.0",
        "dummy weights",
        "batch of 8",
        "32 tokens in",
        "128 out",
        "2 interleaved",
    ):
        assert said in table
    assert "`benchmarks/results/h200/vllm_latency.json`" in table
    assert "default: none" in table


def test_the_kernels_table_has_the_total_and_the_kinds_that_differ(bench):
    assert bench.tables.kernels_table(synthetic()).splitlines()[2:7] == [
        "| original | all | 257 (1475 us) | 256 (1440 us) | 192 (1312 us) |",
        "| original | norm with quantisation | 0 | 0 | 64 (160 us) |",
        "| original | norm | 65 (195 us) | 64 (192 us) | 0 |",
        "| original | quantisation | 0 | 64 (96 us) | 0 |",
        "| original | residual add | 64 (128 us) | 0 | 0 |",
    ]


def test_the_plot_has_every_bar_with_its_seconds(bench, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(bench.plot.Figure, "savefig", lambda figure, path: drawn.append(figure))
    bench.plot.latency(synthetic(), tmp_path / "plot.png")
    published, original, default = drawn[0].axes
    texts = [[text.get_text().strip() for text in axes.texts] for axes in (published, original, default)]
    assert texts[0] == ["0.5245 s  (+2.1%)", "0.5136 s"]
    assert texts[1] == ["0.5000 s  (+25.0%)", "0.4000 s", "0.3000 s  (-25.0%)"]
    assert texts[2][-1] == "missing"
    assert [bar.get_width() for bar in original.patches] == [0.5, 0.4, 0.3]


def test_the_plot_is_drawn_from_the_result_file(bench, tmp_path):
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "vllm_latency.json").write_text(json.dumps(synthetic()))
    assert bench.plot.main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "vllm_latency_h200.png").read_bytes().startswith(b"\x89PNG")
