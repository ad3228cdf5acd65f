"""The modules models are built from: the bits of the ops, the switch on or off, and shared parameters."""

import pytest
import torch
from torch import nn

import batchproof
from batchproof import layers
from batchproof.errors import BatchproofError
from batchproof.numerics import first_mismatch, ulp_distance
from batchproof.ops import activation
from batchproof.ops._library import FLOAT_DTYPES
from batchproof.ops.linear import linear
from batchproof.ops.rms_norm import fused_add_rms_norm, rms_norm
from batchproof.ops.rope import rope, rope_cos_sin


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("gemma", [False, True])
def test_rms_norm_is_the_op_and_close_to_its_native_form(gemma, dtype, generator):
    device = generator.device
    layer = batchproof.RMSNorm(100, 1e-5, gemma=gemma).to(device, dtype)
    layer.weight.copy_(torch.randn(100, generator=generator, device=device))
    x, residual = (torch.randn(5, 100, generator=generator, device=device).to(dtype) for _ in range(2))
    out = layer(x)
    assert first_mismatch(out, rms_norm(x, layer.weight, 1e-5, gemma=gemma)) is None
    assert int(ulp_distance(out, layer.forward_native(x)).max()) <= 2
    native, native_total = layer.forward_native(x, residual)
    mine, total = x.clone(), residual.clone()
    returned = layer(mine, total)
    assert returned[0] is mine, "over x, as vLLM's layer"
    assert returned[1] is total, "over residual, as vLLM's layer"
    assert (
        first_mismatch(mine, fused_add_rms_norm(x.clone(), residual.clone(), layer.weight, 1e-5, gemma=gemma)[0])
        is None
    )
    assert first_mismatch(total, native_total) is None
    assert int(ulp_distance(mine, native).max()) <= 2


def test_rms_norm_starts_as_the_identity_scale(device):
    x = torch.randn(3, 8, device=device)
    plain, gemma = batchproof.RMSNorm(8).to(device), batchproof.RMSNorm(8, gemma=True).to(device)
    assert (plain.eps, plain.weight.tolist(), gemma.weight.tolist()) == (1e-6, [1.0] * 8, [0.0] * 8)
    assert first_mismatch(plain(x), rms_norm(x)) is None
    assert first_mismatch(gemma(x), rms_norm(x)) is None
    assert list(plain.state_dict()) == ["weight"]


def test_the_switch_changes_nothing_inside_rms_norm(generator):
    device = generator.device
    layer = batchproof.RMSNorm(512).to(device)
    x, residual = (torch.randn(9, 512, generator=generator, device=device) for _ in range(2))
    for forward in (layer.forward, layer.forward_cuda, layer.forward_hip):
        off, off_pair = forward(x), forward(x.clone(), residual.clone())
        with batchproof.batch_invariant():
            on, on_pair = forward(x), forward(x.clone(), residual.clone())
        for one, other in zip((off, *off_pair), (on, *on_pair), strict=True):
            assert first_mismatch(one, other) is None


def test_rms_norm_passes_the_ops_errors_on(device):
    layer = batchproof.RMSNorm(8).to(device)
    with pytest.raises(BatchproofError, match=r"weight has shape \(8,\), want \(9,\)"):
        layer(torch.zeros(2, 9, device=device))
    x = torch.zeros(2, 8, device=device)
    with pytest.raises(BatchproofError, match="overlap"):
        layer(x, x)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_shares_its_makers_parameters(bias, generator):
    stock = nn.Linear(30, 20, bias=bias, device=generator.device)
    layer = layers.Linear(stock.weight, stock.bias)
    assert layer.weight is stock.weight
    assert layer.bias is stock.bias
    assert (layer.in_features, layer.out_features) == (30, 20)
    assert list(layer.state_dict()) == list(stock.state_dict())
    x = torch.randn(4, 3, 30, generator=generator, device=generator.device)
    assert first_mismatch(layer(x), linear(x, stock.weight, stock.bias)) is None
    torch.testing.assert_close(layer(x), stock(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_activations_are_the_ops(dtype, generator):
    x = torch.randn(5, 30, generator=generator, device=generator.device).to(dtype)
    assert first_mismatch(layers.SiLU()(x), activation.silu(x)) is None
    assert first_mismatch(layers.GELUTanh()(x), activation.gelu_tanh(x)) is None


def test_rotary_table_rows_are_those_of_rope(generator):
    device = generator.device
    inv_freq = (10000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)).float().to(device)
    table = layers.RotaryTable({"": (inv_freq, 1.0), "sliding": (inv_freq * 2, 0.5)}, 100).to(device)
    positions = torch.randint(100, (3, 7), generator=generator, device=device)
    x = torch.randn(21, 2, 16, generator=generator, device=device)
    for layer_type, frequencies, scaling in (("", inv_freq, 1.0), ("sliding", inv_freq * 2, 0.5)):
        cos, sin = (t.flatten(0, 1).unsqueeze(1) for t in table(x, positions, layer_type))
        assert cos.shape == (21, 1, 16)
        turned = x * cos + torch.cat((-x[..., 8:], x[..., :8]), -1) * sin
        expected = rope(x, positions.flatten(), rope_cos_sin(frequencies, 100, scaling))
        torch.testing.assert_close(turned, expected, rtol=1e-6, atol=1e-6)
    assert table(x.bfloat16(), positions)[0].dtype == torch.bfloat16
    assert table.state_dict() == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the check would wait for the device")
def test_a_position_past_the_table_is_an_error():
    table = layers.RotaryTable({"": (torch.ones(4), 1.0)}, 10)
    with pytest.raises((BatchproofError, IndexError)):
        table(torch.zeros(1), torch.tensor([[10]]))
