"""The plug-in where vLLM is not installed: when it acts, and what it says of a hook that is missing."""

import importlib
import importlib.util
import logging
import sys
from functools import partial
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace

import pytest
import torch

from batchproof.errors import ModeError
from batchproof.integrations.vllm import HOOKS, Hook, aten, register
from batchproof.numerics import first_mismatch
from batchproof.ops.linear import linear
from batchproof.ops.softmax import softmax

plugin = importlib.import_module("batchproof.integrations.vllm.plugin")


@pytest.fixture
def hooks(monkeypatch):
    """Hooks, the second missing, the third not wanted, in a process new to them; the list of what gets installed."""
    installed = []
    fakes = (
        Hook("present", "what is there", lambda: None, lambda: installed.append("present")),
        Hook("absent", "what is not", lambda: "Engine has no socket", lambda: installed.append("absent")),
        Hook("off", "who asks", lambda: None, lambda: installed.append("off"), switch="BATCHPROOF_LINEAR"),
    )
    monkeypatch.setattr(plugin, "HOOKS", fakes)
    monkeypatch.setattr(plugin, "_done", False)
    monkeypatch.setattr(Hook, "missing", lambda self: self.probe())
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    return installed


def test_vllm_finds_the_entry_point():
    found = [point for point in entry_points(group="vllm.general_plugins") if point.name == "batchproof"]
    assert found
    assert found[0].load() is register


@pytest.mark.parametrize("value", ["0", None])
def test_it_touches_nothing_unless_asked(hooks, monkeypatch, value):
    monkeypatch.delenv("VLLM_BATCH_INVARIANT") if value is None else monkeypatch.setenv("VLLM_BATCH_INVARIANT", value)
    register()
    assert hooks == []


def test_a_hook_is_installed_once_and_a_missing_one_is_an_error_in_the_log(hooks, caplog):
    with caplog.at_level(logging.INFO, logger="vllm.batchproof"):
        register()
        register()
    assert hooks == ["present"]
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "absent: Engine has no socket" in errors[0]
    assert "what is there" in caplog.text


def test_strict_refuses_to_start_with_a_hook_missing(hooks, monkeypatch):
    monkeypatch.setenv("BATCHPROOF_STRICT", "1")
    with pytest.raises(ModeError, match="absent: Engine has no socket"):
        register()


def test_a_hook_that_fails_while_it_is_installed_is_missing(hooks, monkeypatch, caplog):
    def fail():
        raise RuntimeError("no room")

    monkeypatch.setattr(plugin, "HOOKS", (Hook("broken", "everything", lambda: None, fail),))
    with caplog.at_level(logging.INFO, logger="vllm.batchproof"):
        register()
    assert "broken: RuntimeError: no room" in caplog.text
    assert "serves" not in caplog.text


@pytest.mark.parametrize(
    "variable", ["VLLM_BATCH_INVARIANT", "BATCHPROOF_STRICT", "BATCHPROOF_FUSE_NORM_QUANT", "BATCHPROOF_LINEAR"]
)
def test_a_malformed_variable_stops_the_start(hooks, monkeypatch, variable):
    monkeypatch.setenv(variable, "yes")
    with pytest.raises(ModeError, match=f"{variable} is 'yes', want 0 or 1"):
        register()


@pytest.mark.parametrize("default", ["0", "1"])
@pytest.mark.parametrize("value", ["0", "1", None])
def test_linear_layers_are_taken_over_where_that_is_asked_or_the_default(hooks, monkeypatch, value, default):
    install = partial(hooks.append, "fp8_linear")
    fake = Hook("fp8_linear", "linear layers", lambda: None, install, "BATCHPROOF_LINEAR", lambda: default)
    monkeypatch.setattr(plugin, "HOOKS", (fake,))
    if value is not None:
        monkeypatch.setenv("BATCHPROOF_LINEAR", value)
    register()
    assert hooks == (["fp8_linear"] if (value or default) == "1" else [])


def test_elsewhere_than_on_hopper_linear_layers_stay_vllms(monkeypatch):
    monkeypatch.delenv("BATCHPROOF_LINEAR", raising=False)
    switched = [hook for hook in HOOKS if hook.switch]
    assert {hook.name for hook in switched} == {"linear", "fp8_linear"}
    platform = SimpleNamespace(is_cuda=lambda: True, is_device_capability=lambda wanted: wanted == capability)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    for capability in (80, 89, 90, 100):
        assert [hook.is_wanted() for hook in switched] == [capability == 90] * 2


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64)])
def test_linear_takes_the_arguments_of_vllms(shape):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=generator).bfloat16() for s in (shape, (48, 64), (48,)))
    assert first_mismatch(aten.linear(x, weight, bias), linear(x, weight, bias)) is None
    assert first_mismatch(aten.linear(input=x, weight=weight), linear(x, weight)) is None


def test_without_vllm_every_hook_says_what_is_missing():
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed")
    assert {hook.name for hook in HOOKS} == {
        "rms_norm",
        "gemma_rms_norm",
        "ir_ops",
        "graph_passes",
        "softmax",
        "linear",
        "fp8_linear",
    }
    for hook in HOOKS:
        assert "No module named 'vllm'" in hook.missing()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_softmax_takes_the_arguments_of_both_aten_ops(dtype):
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    for argument, wanted in ((None, None), (False, None), (True, torch.float32), (torch.float32, torch.float32)):
        assert first_mismatch(aten.softmax(x, -1, argument), softmax(x, -1, wanted)) is None
    assert first_mismatch(aten.softmax(x.t(), 0), softmax(x.t(), 0)) is None


def test_softmax_of_other_dtypes_is_computed_as_vllm_does():
    x = torch.randn(5, 33, dtype=torch.float64)
    torch.testing.assert_close(aten.softmax(x, -1), torch.softmax(x, -1))
    torch.testing.assert_close(aten.softmax(x.float(), -1, torch.float64), torch.softmax(x.float().double(), -1))
