"""The doctor says what is there and what is missing, and its exit code means what it says. No vLLM is needed here."""

import json
import sys
from types import SimpleNamespace

import pytest

from batchproof import cli, doctor
from batchproof.integrations.vllm import Hook
from batchproof.integrations.vllm.coverage import COVERAGE, NOTHING

LINEAR = ("linear", "fp8_linear", "fp8_block_linear")
NAMES = ("rms_norm", "gemma_rms_norm", "ir_ops", "graph_passes", "softmax", *LINEAR, "attention", "rope", "sampler")
VARIABLES = (
    "VLLM_BATCH_INVARIANT", "BATCHPROOF_STRICT", "BATCHPROOF_FUSE_NORM_QUANT", "BATCHPROOF_LINEAR",
    "BATCHPROOF_FUSE_ACTIVATION_QUANT",
    "BATCHPROOF_ATTENTION", "BATCHPROOF_SAMPLER", "VLLM_USE_FLASHINFER_SAMPLER",
)  # fmt: skip
SWITCHES = dict.fromkeys(LINEAR, "BATCHPROOF_LINEAR") | dict.fromkeys(("attention", "rope"), "BATCHPROOF_ATTENTION")
ALL_ASKED = dict.fromkeys(("VLLM_BATCH_INVARIANT", *SWITCHES.values()), "1")
ABSENT_ENTRY_POINT = "this installation of batchproof has no such entry point"


def _load():
    raise RuntimeError("two\nlines")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in (*VARIABLES, "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def place(monkeypatch):
    """Makes a machine: the version of vLLM, what each hook misses, the entry points, and variables."""

    def make(vllm="0.26.0", missing=None, points=("batchproof",), load=lambda: None, **variables):
        versions = {"vllm": vllm, "triton": "3.6.0", "transformers": "5.17.0"}
        lines = missing or {}
        hooks = [Hook(n, f"what {n} is for", lambda n=n: lines.get(n), lambda: None, SWITCHES.get(n)) for n in NAMES]
        monkeypatch.setattr(Hook, "missing", lambda hook: hook.probe())
        found = [SimpleNamespace(name=name, load=load) for name in points]
        monkeypatch.setattr(doctor, "_version", lambda package: versions[package])
        monkeypatch.setattr(doctor, "_all_hooks", lambda: hooks)
        monkeypatch.setattr(doctor, "entry_points", lambda group: found if group == "vllm.general_plugins" else [])
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return make


@pytest.fixture
def run(capsys):
    """Runs the doctor; gives its exit code and what it printed."""

    def call(*arguments):
        code = cli.main(["doctor", *arguments])
        return (code, *capsys.readouterr())

    return call


def _served(report):
    return {row["op"]: (row["served_by"], row["varies"]) for row in report["coverage"]}


@pytest.mark.parametrize("mode", ["0", "1"])
def test_without_vllm_it_says_so_and_prints_the_rest(place, run, monkeypatch, mode):
    place(vllm="not installed", points=(), VLLM_BATCH_INVARIANT=mode)
    monkeypatch.setattr(doctor, "_all_hooks", lambda: pytest.fail("there is no vLLM to look at"))
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "vllm          not installed\n" in out
    assert out.splitlines()[-1].startswith("vLLM is not installed")
    for part in (
        "python ",
        "torch ",
        "triton        3.6.0",
        "GPU ",
        "make_invariant covers Llama, ",
        ABSENT_ENTRY_POINT,
    ):
        assert part in out
    assert f"  VLLM_BATCH_INVARIANT is '{mode}'\n" in out


def test_all_there_exits_0_and_batchproof_serves_what_it_has_hooks_for(place, run):
    place(**ALL_ASKED)
    code, out, _ = run()
    assert code == 0
    assert out.splitlines()[-1].startswith("all there")
    assert "plug-in batchproof in vllm.general_plugins: ok\n" in out
    for name in NAMES:
        assert f"hook {name} (what {name} is for): ok\n" in out
    for row in COVERAGE:
        expected = ("batchproof", NOTHING) if row.hook else (f"vLLM: {row.vllm}", row.varies)
        assert _served(doctor.collect())[row.op] == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_hook_exits_1_with_its_line_and_its_ops_are_vllms(place, run, name):
    line = f"module 'vllm.{name}' has no such thing"
    place(missing={name: line}, **ALL_ASKED)
    code, out, _ = run()
    assert code == 1
    assert f"hook {name} (what {name} is for): {line}\n" in out
    assert out.splitlines()[-1] == f"vLLM would run without all of batchproof: hooks missing: {name}"
    served = _served(doctor.collect())
    for row in COVERAGE:
        if row.hook == name:
            assert served[row.op] == (f"vLLM: {row.vllm}", row.varies)


def test_linear_layers_are_vllms_unless_asked_for_and_then_nobody_misses_the_hook(place, run):
    place(missing={"fp8_linear": "gone"}, VLLM_BATCH_INVARIANT="1")
    code, out, _ = run()
    assert code == 0
    assert "hook fp8_linear (what fp8_linear is for): gone\n" in out
    assert _served(doctor.collect())["fp8 linear"][0].startswith("vLLM: one pinned CUTLASS")
    place(VLLM_BATCH_INVARIANT="1")
    assert _served(doctor.collect())["fp8 linear"][0].startswith("vLLM: one pinned CUTLASS")


def test_norm_and_quantisation_are_not_fused_where_the_norm_is_not_ours(place):
    place(missing={"rms_norm": "gone"}, VLLM_BATCH_INVARIANT="1")
    assert _served(doctor.collect())["norm + fp8 quantisation"][0].startswith("vLLM: its norm and its quantisation")


def test_norm_and_quantisation_stay_two_if_that_is_asked_for(place):
    place(VLLM_BATCH_INVARIANT="1", BATCHPROOF_FUSE_NORM_QUANT="0")
    served, varies = _served(doctor.collect())["norm + fp8 quantisation"]
    assert served.startswith("batchproof's norm and vLLM's quantisation, two kernels")
    assert varies == NOTHING


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"VLLM_PLUGINS": "other"}, "VLLM_PLUGINS is 'other', want batchproof in it"),
        ({"VLLM_PLUGINS": ""}, "VLLM_PLUGINS is '', want batchproof in it"),
        ({"VLLM_PLUGINS": "other, batchproof"}, "VLLM_PLUGINS is 'other, batchproof', want"),  # vLLM strips nothing
        ({"points": ("other",)}, ABSENT_ENTRY_POINT),
        ({"load": _load}, "loading it fails: RuntimeError: two lines"),
    ],
    ids=["another", "none", "with a blank", "no entry point", "fails"],
)
def test_a_plugin_that_would_not_be_loaded_exits_1_and_serves_nothing(place, run, setting, named):
    place(VLLM_BATCH_INVARIANT="1", **setting)
    code, out, _ = run()
    assert code == 1
    assert f"plug-in batchproof in vllm.general_plugins: {named}" in out
    assert out.splitlines()[-1].endswith("the plug-in would not be loaded")
    assert all(served.startswith("vLLM: ") for served, _ in _served(doctor.collect()).values())


def test_an_allowed_plugin_is_loaded(place, run):
    place(VLLM_BATCH_INVARIANT="1", VLLM_PLUGINS="other,batchproof")
    assert run()[0] == 0


def test_with_the_mode_off_nothing_is_served_and_nothing_is_wrong(place, run):
    place(missing={"ir_ops": "gone"}, VLLM_PLUGINS="other")
    code, out, _ = run()
    assert code == 0
    assert out.splitlines()[-1].startswith("VLLM_BATCH_INVARIANT is not 1")
    assert "hooks missing: ir_ops; the plug-in would not be loaded" in out.splitlines()[-1]
    assert len(set(_served(doctor.collect()).values())) == 1


@pytest.mark.parametrize("value", ["", "yes", "2", " 1"])
@pytest.mark.parametrize("name", VARIABLES)
def test_a_malformed_variable_exits_2_with_its_value_named(place, run, name, value):
    place(**{name: value})
    assert run() == (2, "", f"batchproof: {name} is {value!r}, want 0 or 1\n")


@pytest.mark.parametrize("missing", [{}, {"ir_ops": "gone"}], ids=str)
def test_json_has_the_facts_of_the_text(place, run, missing):
    place(missing=missing, VLLM_BATCH_INVARIANT="1")
    text_code, text, _ = run()
    code, out, _ = run("--json")
    report = json.loads(out)
    assert code == text_code == (0 if report["ok"] else 1) == len(missing)
    assert doctor.render(report) + "\n" == text
    assert report["versions"]["vllm"] == "0.26.0"
    assert {hook["name"]: hook["missing"] for hook in report["hooks"]} == {n: missing.get(n) for n in NAMES}
    assert {v["name"]: v["value"] for v in report["environment"]}["VLLM_BATCH_INVARIANT"] == "1"
    assert [row["op"] for row in report["coverage"]] == [row.op for row in COVERAGE]


def test_what_vllm_prints_while_it_is_looked_at_is_not_in_the_json(place, run):
    place(load=lambda: sys.stdout.write("INFO from vLLM\n"))
    _, out, err = run("--json")
    assert json.loads(out)["versions"]["vllm"] == "0.26.0"
    assert err == "INFO from vLLM\n"


def test_a_table_line_is_no_wider_than_a_terminal_and_loses_no_word(place, run):
    place(VLLM_BATCH_INVARIANT="1", VLLM_PLUGINS="other")
    _, out, _ = run()
    table = out[out.index("served by") :]
    assert max(map(len, table.splitlines())) <= 120
    for row in COVERAGE:
        assert set(f"{row.op} {row.vllm} {row.varies}".split()) <= set(out.split())


def test_without_transformers_it_says_so(place, run, monkeypatch):
    place()
    monkeypatch.setattr(doctor, "_version", lambda package: "not installed")
    assert "\ntransformers\n  not installed\n" in run()[1]


def test_the_doctor_takes_no_model_and_its_help_explains_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--json" in out
    assert "--model" not in out
    codes = out[out.index("exit code:") :]
    assert all(f"{number} " in codes for number in (0, 1, 2))


def test_a_coverage_row_names_a_hook_that_exists_and_every_hook_has_a_row():
    hooks = pytest.importorskip("batchproof.integrations.vllm.hooks", exc_type=ImportError)
    assert {hook.name for hook in hooks.HOOKS} == set(NAMES) == {row.hook for row in COVERAGE} - {None}


def test_a_coverage_row_says_something_in_every_column():
    assert len({row.op for row in COVERAGE}) == len(COVERAGE) > 12
    assert all(row.op and row.vllm and row.varies for row in COVERAGE)
