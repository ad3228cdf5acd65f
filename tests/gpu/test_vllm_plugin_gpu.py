"""The plug-in in real vLLM, layer by layer: what it puts in place, its bits, and what it makes of a compiled graph."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

import batchproof
from invariance import assert_same

pytestmark = pytest.mark.gpu
vllm = pytest.importorskip("vllm", reason="needs vLLM")
HIDDEN = 4096


def same(out, wanted):
    """The same bits: of a tensor, or of each of a tuple."""
    assert_same(*(tensors if isinstance(tensors, tuple) else (tensors,) for tensors in (out, wanted)))


@pytest.fixture(scope="module", autouse=True)
def registered():
    from batchproof.integrations.vllm import plugin

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_BATCH_INVARIANT", "1")
        patch.setenv("BATCHPROOF_STRICT", "1")
        plugin.register()
        plugin.register()
        yield


def config(*custom_ops, **passes):
    from vllm.config import CompilationConfig, VllmConfig
    from vllm.config.compilation import PassConfig

    return VllmConfig(
        compilation_config=CompilationConfig(
            custom_ops=list(custom_ops or ("none",)), pass_config=PassConfig(**passes), mode=3
        )
    )


@pytest.fixture(params=["none", "all"])
def current(request):
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(config(request.param)):
        yield


def layer(name, size=HIDDEN, dtype=torch.bfloat16, **kwargs):
    from vllm.model_executor.layers import layernorm

    made = getattr(layernorm, name)(size, eps=1e-6, **kwargs).to("cuda", dtype)
    torch.nn.init.normal_(made.weight, 0.0 if name == "GemmaRMSNorm" else 1.0, 0.1)
    return made.requires_grad_(False)


def test_every_hook_finds_its_interface():
    from batchproof.integrations.vllm import HOOKS

    assert [hook.missing() for hook in HOOKS] == [None] * len(HOOKS)


@pytest.mark.parametrize(("name", "gemma"), [("RMSNorm", False), ("GemmaRMSNorm", True)])
def test_layers_are_ours_and_have_the_bits_of_our_ops(current, generator, name, gemma):
    norm = layer(name)
    assert type(norm).__name__ == f"Invariant{name}"
    x, residual = (torch.randn(300, HIDDEN, device="cuda", generator=generator).bfloat16() for _ in range(2))
    weight = norm.weight.data
    same(norm(x), batchproof.rms_norm(x, weight, 1e-6, gemma=gemma))
    whole = norm(x, residual)
    same(whole, batchproof.add_rms_norm(x, residual, weight, 1e-6, gemma=gemma))
    for rows in (slice(0, 1), slice(299, 300), slice(20, 275), slice(0, 256)):
        same(norm(x[rows], residual[rows]), tuple(t[rows] for t in whole))


def test_heads_of_a_fused_projection_are_normalised_where_they_lie(current, generator):
    norm = layer("RMSNorm", 128)
    qkv = torch.randn(300, 48 * 128, device="cuda", generator=generator).bfloat16()
    heads = qkv[:, : 32 * 128].unflatten(-1, (32, 128))
    same(norm(heads), batchproof.rms_norm(heads.contiguous(), norm.weight.data, 1e-6))
    same(norm(heads[7:8]), norm(heads)[7:8])


@pytest.mark.parametrize("name", ["RMSNorm", "GemmaRMSNorm"])
def test_a_weight_of_another_dtype_is_applied_as_vllm_defines_it(current, generator, name):
    norm = layer(name, dtype=torch.float32)
    x, residual = (torch.randn(9, HIDDEN, device="cuda", generator=generator).bfloat16() for _ in range(2))
    out, total = norm(x, residual)
    same(total, x + residual)
    wide = total.double()
    weight = norm.weight.double() + (1.0 if name == "GemmaRMSNorm" else 0.0)
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight
    torch.testing.assert_close(out, expected.bfloat16(), rtol=2**-7, atol=1e-6)
    same(norm(x[3:4], residual[3:4])[0], out[3:4])


def test_a_variance_over_part_of_the_row_is_refused(current):
    with pytest.raises(NotImplementedError, match="var_hidden_size 64 of hidden_size 4096"):
        layer("RMSNorm", var_hidden_size=64)


def test_ir_ops_are_served_by_us_first(generator):
    from vllm import ir

    configured = config()
    priority = configured.kernel_config.ir_op_priority
    assert priority.rms_norm[0] == priority.fused_add_rms_norm[0] == "batchproof"
    assert configured.additional_config["batchproof"]["version"] == batchproof.__version__
    x = torch.randn(300, HIDDEN, device="cuda", generator=generator).bfloat16()
    weight = torch.randn(HIDDEN, device="cuda", generator=generator).bfloat16()
    with priority.set_priority():
        same(ir.ops.rms_norm(x, weight, 1e-6), batchproof.rms_norm(x, weight, 1e-6))
        expected = batchproof.add_rms_norm(x, x, weight, 1e-6)
        same(ir.ops.fused_add_rms_norm(x, x, weight, 1e-6), expected)


def test_another_provider_first_is_refused():
    from vllm.config import KernelConfig, VllmConfig
    from vllm.config.kernel import IrOpPriorityConfig

    with pytest.raises(ValueError, match="vllm_c"):
        VllmConfig(kernel_config=KernelConfig(ir_op_priority=IrOpPriorityConfig(rms_norm=["vllm_c"])))


def step(norms, quantise, x, residual, scale):
    """A norm, and norms of sums, behind each of which its output is quantised."""
    plain, added, gemma = norms
    static, per_token = quantise
    first, _ = static(plain(x), scale)
    out, residual = added(first.bfloat16() * 2, residual)
    second, _ = static(out, scale)
    out, residual = gemma(second.bfloat16() * 2, residual)
    third, scales = per_token(out)
    return first, second, third, scales, residual


@pytest.mark.parametrize("fuse", ["0", "1"])
@pytest.mark.parametrize("asked", [True, False])
def test_norms_and_quantisation_are_fused_whatever_the_flags_and_keep_their_bits(generator, monkeypatch, fuse, asked):
    from torch._inductor import config as inductor
    from vllm.compilation.passes.inductor_pass import pass_context
    from vllm.config import set_current_vllm_config
    from vllm.config.utils import Range
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname

    monkeypatch.setenv("BATCHPROOF_FUSE_NORM_QUANT", fuse)
    manager = resolve_obj_by_qualname(current_platform.get_pass_manager_cls())()
    configured = config(fuse_norm_quant=asked, eliminate_noops=True)
    manager.configure(configured)
    names = [type(p).__name__ for p in manager.passes]
    assert "RMSNormQuantFusionPass" not in names
    assert ("NormQuantFusionPass" in names) is (fuse == "1")
    with set_current_vllm_config(configured), pass_context(Range(1, 4096)):
        norms = layer("RMSNorm"), layer("RMSNorm"), layer("GemmaRMSNorm")
        norms[1].variance_epsilon = 3e-6  # no epsilon is built in
        quantise = tuple(
            QuantFP8(static, shape, compile_native=False)
            for static, shape in ((True, GroupShape.PER_TENSOR), (False, GroupShape.PER_TOKEN))
        )
        x, residual = (torch.randn(300, HIDDEN, device="cuda", generator=generator).bfloat16() for _ in range(2))
        scale = torch.full((1,), 0.02, device="cuda")
        torch._dynamo.reset()
        for tensor in (x, residual):  # as vLLM compiles: this axis is free, and floats are literals
            torch._dynamo.mark_dynamic(tensor, 0)
        with inductor.patch(post_grad_custom_post_pass=manager, force_disable_caches=True):
            compiled = torch.compile(partial(step, norms, quantise), dynamic=False)(x, residual, scale)
    matched = [p.matched_count for p in manager.passes if type(p).__name__ == "NormQuantFusionPass"]
    assert matched == ([3] if fuse == "1" else [])
    quantised = [out.view(torch.uint8) for out in compiled[:2]]
    y = batchproof.rms_norm(x, norms[0].weight.data, 1e-6)
    static = batchproof.rms_norm_static_fp8_quant(x, norms[0].weight.data, scale, 1e-6)
    same(quantised[0], static.view(torch.uint8))
    same(quantised[0], quantise[0].forward_native(y, scale)[0].view(torch.uint8))
    out, total = batchproof.add_rms_norm(static.bfloat16() * 2, residual, norms[1].weight.data, 3e-6)
    same(quantised[1], quantise[0].forward_native(out, scale)[0].view(torch.uint8))
    wanted = batchproof.add_rms_norm(compiled[1].bfloat16() * 2, total, norms[2].weight.data, 1e-6, gemma=True)[1]
    same(compiled[4], wanted)


_ROWS_OF_SOFTMAX_THAT_CHANGE = """
import sys, torch
if sys.argv[1] == "ours":
    from batchproof.integrations.vllm import register
    register()
from vllm.model_executor.layers.batch_invariant import enable_batch_invariant_mode
enable_batch_invariant_mode()
x = torch.randn(64, 32000, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
whole = torch.softmax(x, -1)
print("changed", sum(not torch.equal(torch.softmax(x[i : i + 1], -1), whole[i : i + 1]) for i in range(64)))
"""


@pytest.mark.parametrize(("side", "varies"), [("stock", True), ("ours", False)])
def test_softmax_under_the_mode(side, varies):
    """In a process of its own: what the mode registers stays."""
    done = subprocess.run(
        [sys.executable, "-c", _ROWS_OF_SOFTMAX_THAT_CHANGE, side], capture_output=True, text=True, check=False,
        env=os.environ | {"VLLM_BATCH_INVARIANT": "1", "VLLM_PLUGINS": "", "BATCHPROOF_STRICT": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    changed = int(done.stdout.split("changed")[1])
    assert (changed > 0) == varies


@pytest.mark.parametrize("per_token", [False, True])
def test_fp8_layers_run_our_product(current, generator, monkeypatch, per_token):
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.quantization.utils import quant_utils
    from vllm.platforms.interface import PlatformEnum

    from batchproof.integrations.vllm.linear import InvariantFP8ScaledMMLinearKernel

    monkeypatch.setitem(linear._POSSIBLE_FP8_KERNELS, PlatformEnum.CUDA, [InvariantFP8ScaledMMLinearKernel])
    names = ("kFp8DynamicTokenSym", "kFp8StaticChannelSym") if per_token else ("kFp8StaticTensorSym",) * 2
    keys = [getattr(quant_utils, name) for name in names]
    kernel = linear.init_fp8_linear_kernel(*keys, torch.bfloat16, torch.bfloat16, (384, HIDDEN))
    module = torch.nn.Module()
    module.weight = torch.randn(384, HIDDEN, device="cuda", generator=generator).to(torch.float8_e4m3fn).t()
    module.weight_scale = torch.rand(384 if per_token else 1, 1, device="cuda", generator=generator)
    module.input_scale = None if per_token else torch.tensor(0.02, device="cuda")
    module.input_scale_ub = None
    kernel.process_weights_after_loading(module)
    x = torch.randn(300, HIDDEN, device="cuda", generator=generator).bfloat16()
    whole = kernel.apply_weights(module, x)
    quantised, scale = kernel.quant_fp8(x, module.input_scale, None)
    same(whole, batchproof.scaled_mm(quantised, module.weight, scale, module.weight_scale))
    for rows in (slice(0, 1), slice(299, 300), slice(17, 50), slice(0, 257)):
        same(kernel.apply_weights(module, x[rows]), whole[rows])


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("n", [576, 1024])
def test_fp8_layers_with_scales_for_blocks_run_our_product(current, generator, n, side_by_side):
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic128Sym, kFp8Static128BlockSym

    from batchproof.integrations.vllm.block_linear import InvariantFp8BlockScaledMMKernel
    from batchproof.integrations.vllm.hooks import _install_fp8_block_linear

    _install_fp8_block_linear()
    keys = (kFp8Dynamic128Sym, kFp8Static128BlockSym)
    kernel = linear.init_fp8_linear_kernel(*keys, torch.bfloat16, torch.bfloat16, (n, HIDDEN))
    assert type(kernel) is InvariantFp8BlockScaledMMKernel
    module = torch.nn.Module()
    weight = torch.randn(n, HIDDEN, device="cuda", generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-n // 128), HIDDEN // 128, device="cuda", generator=generator)
    module.weight, module.weight_scale_inv = (torch.nn.Parameter(t, requires_grad=False) for t in (weight, scale))
    kernel.process_weights_after_loading(module)
    bias = torch.randn(n, device="cuda", generator=generator).bfloat16()
    x = torch.randn(300, 2 * HIDDEN, device="cuda", generator=generator).bfloat16()[:, HIDDEN:]
    x = x.contiguous() if side_by_side else x
    whole = kernel.apply_weights(module, x, bias)
    quantised, token_scale = kernel.quant_fp8(x.contiguous())
    same(whole, batchproof.scaled_mm(quantised, weight.t(), token_scale, scale.t(), bias))
    for rows in (slice(0, 1), slice(299, 300), slice(17, 50), slice(0, 257)):
        same(kernel.apply_weights(module, x[rows], bias), whole[rows])


def test_without_its_list_of_kernels_the_hook_for_blocks_says_so(monkeypatch):
    from vllm.model_executor.kernels import linear

    from batchproof.integrations.vllm import HOOKS

    hook = next(hook for hook in HOOKS if hook.name == "fp8_block_linear")
    assert hook.missing() is None
    monkeypatch.setattr(linear, "_POSSIBLE_FP8_BLOCK_KERNELS", {})
    assert "no list of fp8 linear kernels with scales for blocks" in hook.missing()
