"""A decode step of vLLM, from a chrome trace to table and plot; the traces are made by hand."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
NORM = "void vllm::rms_norm_kernel<c10::BFloat16, 8>(int)"
MAIN, SIDE = 7, 23  # streams


@pytest.fixture
def bench(monkeypatch):
    """The benchmark's modules, by name."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import plot_vllm
    import vllm_tables
    import vllm_worker

    return SimpleNamespace(plot=plot_vllm, tables=vllm_tables, worker=vllm_worker)


# A step of 100 us: 0-10 prepares, 12-32 a norm, 30-60 a product that starts early, 60-62 nothing, 62-70 sampling
# behind the annotation's end, 70-100 nothing, and in a stream of its own a copy of which 3 us are during the sampling.
STEP = [
    ("kernel", "prepare", MAIN, 0, 10),
    ("kernel", NORM, MAIN, 12, 20),
    ("kernel", "product", MAIN, 30, 30),
    ("kernel", "sample", MAIN, 62, 8),
    ("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", SIDE, 67, 5),
]
FULL = "execute_context_0(0)_generation_8(8)"
PREFILL = "execute_context_8(256)_generation_0(0)"


def trace(steps, length=100.0, covered=60.0):
    """Events of steps one after the other, each (annotation, what runs in it), as torch's profiler has them."""
    events = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}}]
    for number, (name, spans) in enumerate(steps):
        base = 1000.0 + number * length
        ahead = {"ph": "X", "name": name, "ts": base - 150, "dur": 9}
        events.append(ahead | {"cat": "user_annotation", "tid": 1})
        events.append(ahead | {"cat": "cuda_runtime", "name": "cudaGraphLaunch"})
        on_gpu = {"ph": "X", "cat": "gpu_user_annotation", "name": name}
        events.append(on_gpu | {"ts": base, "dur": covered, "tid": MAIN})
        events.append(on_gpu | {"ts": base + 40, "dur": 1, "tid": SIDE})  # torch has one in every stream
        for category, span, stream, start, duration in spans:
            event = {"ph": "X", "cat": category, "name": span, "tid": stream}
            events.append(event | {"ts": base + start, "dur": duration})
    return events


def write_trace(path, events):
    content = json.dumps({"schemaVersion": 1, "traceEvents": events}).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def usual(bench, tmp_path, events, name="trace.json"):
    return bench.worker.usual_step(bench.worker.read_trace(write_trace(tmp_path / name, events)))


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_what_a_kernel_adds_and_the_gaps_make_up_the_step(bench, tmp_path, name):
    found = usual(bench, tmp_path, trace([(PREFILL, STEP[:2]), *[(FULL, STEP)] * 12]), name)
    assert found["steps"] == 7, "of eleven with a step behind them"
    assert found["added"] == [
        ["product", 1.0, 28.0, 0.0],
        ["vllm::rms_norm_kernel", 1.0, 20.0, 2.0],
        ["prepare", 1.0, 10.0, 28.0],
        ["sample", 1.0, 8.0, 2.0],
        ["Memcpy DtoH", 1.0, 2.0, 0.0],
    ]
    assert (found["step_us"], found["gap_us"]) == (100.0, 32.0)
    assert found["step_us"] == sum(row[2] + row[3] for row in found["added"])
    assert found["kernels"] == [
        ["product", 1.0, 30.0], ["vllm::rms_norm_kernel", 1.0, 20.0], ["prepare", 1.0, 10.0], ["sample", 1.0, 8.0],
    ]  # fmt: skip


def test_a_kernel_within_another_adds_nothing_whatever_its_stream(bench):
    spans = [
        bench.worker.Span(name, "kernel", stream, start, end)
        for name, stream, start, end in (("a", MAIN, 0, 10), ("b", SIDE, 2, 9), ("c", MAIN, 9, 12), ("d", SIDE, 15, 16))
    ]
    accounted = [(span.name, added, gap) for span, added, gap in bench.worker.account(spans)]
    assert accounted == [("a", 10, 0.0), ("b", 0.0, 0.0), ("c", 2, 0.0), ("d", 1, 3)]


def test_odd_steps_are_left_out_but_a_copy_that_ends_in_the_next_step_makes_none(bench, tmp_path):
    odd = [*STEP, ("kernel", "sort", MAIN, 80, 15)]
    late = [*STEP[:-1], ("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", SIDE, 101, 5)]
    steps = [(FULL, STEP)] * 5 + [(FULL, odd), (FULL, late), (FULL, odd)] + [(FULL, STEP)] * 4
    found = usual(bench, tmp_path, trace(steps))
    assert found["steps"] == 5
    assert "sort" not in {row[0] for row in found["added"]}
    (copies,) = (row for row in found["added"] if row[0] == "Memcpy DtoH")
    assert copies[1] == 0.8


def test_slow_steps_do_not_move_the_length(bench, tmp_path):
    """A step in which the host was late ends where the next begins, and is a step all the same."""
    events = trace([(FULL, STEP)] * 12)
    for event in events:
        if event["ph"] == "X" and event["ts"] >= 1500:
            event["ts"] += 400
    found = usual(bench, tmp_path, events)
    assert (found["steps"], found["step_us"], found["gap_us"]) == (7, 100.0, 32.0)


def test_a_step_with_another_kind_behind_it_is_not_stretched(bench, tmp_path):
    steps = [(FULL, STEP)] * 6 + [("execute_context_1(32)_generation_8(8)", STEP)] + [(FULL, STEP)] * 5
    assert usual(bench, tmp_path, trace(steps))["step_us"] == 100.0


def test_too_few_steps_or_no_annotations_are_errors(bench, tmp_path):
    with pytest.raises(RuntimeError, match=r"3 of 7 decode steps are alike and in the middle, want 4"):
        usual(bench, tmp_path, trace([(FULL, STEP)] * 8))
    with pytest.raises(RuntimeError, match=r"0 of 0 decode steps"):
        usual(bench, tmp_path, trace([(FULL, STEP)]))
    elsewhere = [(category, name, SIDE, *when) for category, name, _, *when in STEP]
    with pytest.raises(RuntimeError, match=r"0 of 11 decode steps"):
        usual(bench, tmp_path, trace([(FULL, elsewhere)] * 12))
    with pytest.raises(RuntimeError, match=r"no gpu_user_annotation .*: \['execute_context_8\(256\)"):
        usual(bench, tmp_path, trace([(PREFILL, STEP)] * 9))
    bare = [event for event in trace([(FULL, STEP)] * 9) if event.get("cat") != "gpu_user_annotation"]
    with pytest.raises(RuntimeError, match=r"no gpu_user_annotation .* \[\]"):
        usual(bench, tmp_path, bare)


class Engine:
    """Writes a trace for each profile."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0

    def start_profile(self):
        pass

    def generate(self, prompts, sampling_params, use_tqdm):
        assert [len(prompt["prompt_token_ids"]) for prompt in prompts] == [32] * 8
        self.tokens = sampling_params.max_tokens

    def stop_profile(self):
        self.count += 1
        steps = [(PREFILL, STEP), *[(FULL, STEP)] * (self.tokens - 1)]
        write_trace(self.folder / f"dp0_pp0_tp0_rank0.{self.count}.pt.trace.json", trace(steps))
        (self.folder / f"host_1.async_llm.{self.count}.pt.trace.json.gz").write_bytes(b"of the front-end")


def test_a_profile_is_one_run_of_the_whole_batch(bench, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **kwargs: SimpleNamespace(**kwargs)))
    engine = Engine(tmp_path)
    for number in (1, 2):
        found = bench.worker.profile(engine, tmp_path)
        assert (found["steps"], found["step_us"]) == (bench.worker.TOKENS - 1 - 1 - 4, 100.0)
        assert engine.count == number


def test_a_profile_that_wrote_no_trace_is_an_error(bench, tmp_path):
    (tmp_path / "host.async_llm.1.pt.trace.json").write_text("{}")
    with pytest.raises(RuntimeError, match="wrote 0 traces"):
        bench.worker.new_trace(tmp_path, set())
    (tmp_path / "empty.json").write_text('{"traceEvents": []}')
    with pytest.raises(RuntimeError, match="no kernel"):
        bench.worker.read_trace(tmp_path / "empty.json")


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("_rms_norm_kernel", "_rms_norm_kernel"),
        ("void vllm::norm<c10::BFloat16, Foo<(int)8> >(float*, int)", "vllm::norm"),
        ("std::enable_if<!(false), void>::type internal::gemvx::kernel<int>(int)", "internal::gemvx::kernel"),
        ("void at::native::(anonymous namespace)::sort<int>(int)", "at::native::sort"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16> >(int)",
            "at::native::vectorized_elementwise_kernel [CUDAFunctor_add]",
        ),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<int> >(int)", "cutlass::device_kernel"),
        (
            "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<int> > >(int)",
            "cutlass::device_kernel [FlashAttnFwdSm90]",
        ),
    ],
)
def test_names_of_kernels_are_shortened(bench, name, short):
    assert bench.worker.shorten(name) == short


# What readers see.

SHAPES = {
    "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
}  # fmt: skip


def synthetic():
    rows = {
        "b": [["matmul_kernel_persistent", 129.0, 4000.0, 5.0], ["vllm::rms_norm", 65.0, 100.0, 1.0]],
        "e": [
            ["nvjet_tst", 129.0, 2000.0, 5.0],
            ["triton_red_fused_add_rms_norm_clamp", 64.0, 60.0, 0.0],
            ["triton_poi_fused_clamp_view", 32.0, 30.0, 0.0],
            ["Memcpy HtoD", 1.5, 3.0, 0.0],
        ],
    }
    kernels = [
        {"flags": "original", "variant": variant, "total": 0, "kernels": [], "steps": 9, "added": added, "gap_us": 7.0,
         "step_us": 7.0 + sum(row[2] for row in added)} for variant, added in rows.items()
    ]  # fmt: skip
    return {
        "device": "NVIDIA H100", "torch": "2.11.0", "vllm": "0.26.0", "model": "Llama-3.1-8B-Instruct-FP8", "batch": 8,
        "input_tokens": 32, "output_tokens": 100, "rounds": 2, "iterations": 10, "context": 48, "copy_gbps": 4000.0,
        "variants": {"b": "vLLM batch-invariant", "d": "norms", "g": "ours", "e": "vLLM default"}, "shapes": SHAPES,
        "flags": {"original": ["-x"], "default": []}, "kernels": kernels,
        "original": {"source": "vLLM PR 40413", "before_s": 0.5245, "after_s": 0.5136},
        "rows": [
            {"flags": "original", "variant": "b", "name": "vLLM batch-invariant", "median_s": 0.42, "ratio": 1.0},
            {"flags": "original", "variant": "e", "name": "vLLM default", "median_s": None, "ratio": None,
             "missing": "no"},
        ],
    }  # fmt: skip


def test_the_floor_is_of_the_models_bytes(bench):
    floor = bench.tables.floor_us(synthetic())
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336
    assert floor["matrix products"] == pytest.approx((32 * layer + 2 * 128256 * 4096) / 4e6)
    assert floor["attention and KV cache"] == pytest.approx(8 * 48 * 32 * 2 * 8 * 128 * 2 / 4e6)
    assert floor["activation"] == pytest.approx(8 * 32 * 14336 * 5 / 4e6)
    norms = 8 * 4096 * (32 * (2 * 7 + 3) + 6)
    assert floor["norms and quantisation"] == pytest.approx(norms / 4e6)
    assert bench.tables.floor_us({key: value for key, value in synthetic().items() if key != "shapes"}) == {}


def test_the_step_table(bench):
    table = bench.tables.step_table(synthetic(), "h100/vllm_latency.json")
    title, _, picture, _, *lines = table.splitlines()
    assert (title, picture) == (
        "### A decode step, kernel by kernel",
        "![A decode step](vllm_step_h100.png)",
    )
    assert lines[:8] == [
        "| flags | kernels | floor, us | vLLM default | vLLM batch-invariant | ours |",
        "|---|---|---|---|---|---|",
        "| original | matrix products | 2007 | 129 (2000 us) | 129 (4000 us) | - |",
        "| original | norms and quantisation | 5 | 96 (90 us) | 65 (100 us) | - |",
        "| original | copies and fills |  | 1.5 (3 us) | - | - |",
        "| original | nothing runs |  | 7 us | 7 us | - |",
        "| original | **step** | 2029 | 226.5 (2100 us) | 194 (4107 us) | - |",
        "| original | without the profiler |  | - | 4200 us | - |",
    ]
    for said in ("NVIDIA H100", "4000 GB/s", "48 tokens a request", "`benchmarks/results/h100/vllm_latency.json`"):
        assert said in lines[-1]


def test_results_without_steps_have_no_table_and_no_plot(bench, tmp_path):
    result = synthetic()
    for entry in result["kernels"]:
        del entry["step_us"]
    assert bench.tables.step_table(result) == ""
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "vllm_latency.json").write_text(json.dumps(result))
    assert bench.plot.main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.glob("*.png")] == ["vllm_latency_h200.png"]


def test_the_plot_stacks_what_the_kinds_add_without_gaps(bench, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(bench.plot.Figure, "savefig", lambda figure, path: drawn.append(figure))
    bench.plot.step(synthetic(), tmp_path / "plot.png")
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["vLLM default", "vLLM batch-invariant"]
    ends = [0.0, 0.0]
    for bars in axes.containers:
        assert [bar.get_x() for bar in bars] == ends
        ends = [bar.get_x() + bar.get_width() for bar in bars]
    assert ends == [2093.0, 4100.0]
    assert [text.get_text().strip() for text in axes.texts] == ["2093 us", "4100 us"]
    assert axes.lines[0].get_xdata()[0] == pytest.approx(sum(bench.tables.floor_us(synthetic()).values()))


def test_the_plots_are_drawn_from_the_result_file(bench, tmp_path):
    (tmp_path / "h100").mkdir()
    (tmp_path / "h100" / "vllm_latency.json").write_text(json.dumps(synthetic()))
    assert bench.plot.main(["--results", str(tmp_path), "--out", str(tmp_path), "--device", "h100"]) == 0
    assert (tmp_path / "vllm_step_h100.png").read_bytes().startswith(b"\x89PNG")
