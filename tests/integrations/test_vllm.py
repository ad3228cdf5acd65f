"""The plug-in where vLLM is not installed: when it acts, and what it says of a hook that is missing."""

import importlib
import importlib.util
import logging
import sys
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from batchproof.errors import ModeError
from batchproof.integrations.vllm import HOOKS, Hook, aten, register
from batchproof.numerics import first_mismatch
from batchproof.ops.linear import linear
from batchproof.ops.scaled_mm import scaled_mm
from batchproof.ops.softmax import softmax

plugin = importlib.import_module("batchproof.integrations.vllm.plugin")


@pytest.fixture
def hooks(monkeypatch):
    """Hooks, the second missing, the others not wanted, in a process new to them; the list of what gets installed."""
    installed = []
    fakes = (
        Hook("present", "what is there", lambda: None, lambda: installed.append("present")),
        Hook("absent", "what is not", lambda: "Engine has no socket", lambda: installed.append("absent")),
        Hook("off", "who asks", lambda: None, lambda: installed.append("off"), switch="BATCHPROOF_LINEAR"),
        Hook("too", "who else asks", lambda: None, lambda: installed.append("too"), switch="BATCHPROOF_ATTENTION"),
        Hook("three", "who else", lambda: None, lambda: installed.append("three"), switch="BATCHPROOF_SAMPLER"),
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
    "variable",
    [
        "VLLM_BATCH_INVARIANT",
        "BATCHPROOF_STRICT",
        "BATCHPROOF_FUSE_NORM_QUANT",
        "BATCHPROOF_FUSE_ACTIVATION_QUANT",
        "BATCHPROOF_LINEAR",
        "BATCHPROOF_ATTENTION",
        "BATCHPROOF_SAMPLER",
    ],
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
    switched = [hook for hook in HOOKS if hook.switch == "BATCHPROOF_LINEAR"]
    assert {hook.name for hook in switched} == {"linear", "fp8_linear", "fp8_block_linear"}
    platform = SimpleNamespace(is_cuda=lambda: True, is_device_capability=lambda wanted: wanted == capability)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    for capability in (80, 89, 90, 100):
        wanted = {hook.name for hook in switched if hook.is_wanted()}
        assert wanted == ({"linear", "fp8_linear"} if capability == 90 else set())


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64)])
def test_linear_takes_the_arguments_of_vllms(shape):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=generator).bfloat16() for s in (shape, (48, 64), (48,)))
    assert first_mismatch(aten.linear(x, weight, bias), linear(x, weight, bias)) is None
    assert first_mismatch(aten.linear(input=x, weight=weight), linear(x, weight)) is None
    assert first_mismatch(aten.linear(x, weight, bias.float()), linear(x, weight) + bias.float()) is None


class BaseOfBlockKernels:
    """What vLLM's class does for ours: names the parameters of a layer and quantises a token by 128 of k."""

    def __init__(self, config):
        self.config = config

    @classmethod
    def can_implement(cls, config):
        return (False, "scales are static") if config.activation_quant_key.scale.static else (True, None)

    def process_weights_after_loading(self, layer):
        layer.loaded = True

    def _get_layer_params(self, layer):
        names = ("weight", "weight_scale", "weight_scale_inv")
        return SimpleNamespace(**{name: getattr(layer, name, None) for name in names})

    def quant_fp8(self, x):
        assert x.is_contiguous()
        groups = x.float().unflatten(1, (-1, 128))
        scale = groups.abs().amax(2) / 448
        return (groups / scale[:, :, None]).flatten(1).to(torch.float8_e4m3fn), scale.t().contiguous().t()


class DeepGemm(BaseOfBlockKernels):
    def process_weights_after_loading(self, layer):
        layer.laid_out = True


@pytest.fixture
def block_kernel(monkeypatch):
    """Our class for scales for blocks, over a base of the test's, whether vLLM is installed or not."""
    scaled_mm_kernels = "vllm.model_executor.kernels.linear.scaled_mm"
    fakes = {
        f"{scaled_mm_kernels}.cutlass": SimpleNamespace(CutlassFp8BlockScaledMMKernel=BaseOfBlockKernels),
        f"{scaled_mm_kernels}.deep_gemm": SimpleNamespace(DeepGemmFp8BlockScaledMMKernel=DeepGemm),
        "vllm.model_executor.utils": SimpleNamespace(replace_parameter=setattr),
    }
    for name, module in fakes.items():
        parts = name.split(".")
        for parent in (".".join(parts[:i]) for i in range(1, len(parts))):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, module)
    source = Path(plugin.__file__).with_name("block_linear.py")
    spec = importlib.util.spec_from_file_location("batchproof.integrations.vllm.block_linear_on_fakes", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.InvariantFp8BlockScaledMMKernel


def config_of(blocks=(128, 128), static=False, out_dtype=torch.bfloat16):
    key = SimpleNamespace(scale=SimpleNamespace(group_shape=blocks, static=static))
    return SimpleNamespace(activation_quant_key=key, weight_quant_key=key, out_dtype=out_dtype)


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize(("n", "k"), [(384, 256), (200, 384), (64, 128)])
def test_scales_for_blocks_reach_our_product_as_it_wants_them(block_kernel, name, n, k):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-n // 128), k // 128, generator=generator)
    bias = torch.randn(n, generator=generator).bfloat16()
    layer = SimpleNamespace(weight=weight, **{name: scale})
    kernel = block_kernel(config_of())
    kernel.process_weights_after_loading(layer)
    assert layer.loaded
    assert getattr(layer, name) is scale
    wide = torch.randn(6, 2 * k, generator=generator).bfloat16()
    x = wide[:, k:]  # rows further apart
    quantised, token_scale = kernel.quant_fp8(x.contiguous())
    whole = kernel.apply_weights(layer, x, bias)
    assert first_mismatch(whole, scaled_mm(quantised, weight.t(), token_scale, scale.t(), bias)) is None
    assert first_mismatch(kernel.apply_weights(layer, x[2:3], bias), whole[2:3]) is None
    assert first_mismatch(kernel.apply_weights(layer, x.unflatten(0, (2, 3)), bias), whole.unflatten(0, (2, 3))) is None


def test_scales_of_powers_of_two_become_fp32(block_kernel):
    scale = torch.tensor([[0.25, 2.0**-20]])
    layer = SimpleNamespace(weight_scale_inv=scale.to(torch.float8_e8m0fnu))
    block_kernel(config_of()).process_weights_after_loading(layer)
    assert layer.weight_scale_inv.dtype == torch.float32
    assert first_mismatch(layer.weight_scale_inv, scale) is None


def test_a_weight_that_the_model_reads_itself_is_laid_out_for_deep_gemm(block_kernel):
    layer = SimpleNamespace(is_bmm=True)
    block_kernel(config_of()).process_weights_after_loading(layer)
    assert vars(layer) == {"is_bmm": True, "laid_out": True}


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"blocks": (64, 128)}, r"weight scales are for (64, 128), want (128, 128)"),
        ({"static": True}, "scales are static"),
        ({"out_dtype": torch.float64}, "outputs are torch.float64, want one of"),
    ],
)
def test_other_layers_stay_vllms_and_the_log_says_why_once(block_kernel, caplog, setting, named):
    with caplog.at_level(logging.WARNING, logger="vllm.batchproof"):
        assert block_kernel.can_implement(config_of()) == (True, None)
        assert caplog.text == ""
        for _ in range(2):
            able, reason = block_kernel.can_implement(config_of(**setting))
    assert not able
    assert named in reason
    assert len(caplog.records) == 1
    assert f"stay vLLM's: {reason}" in caplog.text


def test_block_layers_need_fp8_tensor_cores(block_kernel):
    assert [block_kernel.is_supported(capability)[0] for capability in (80, 89, 90, None)] == [False, True, True, True]


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
        "fp8_block_linear",
        "attention",
        "rope",
        "sampler",
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
