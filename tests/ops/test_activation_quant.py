"""silu_and_mul_static_fp8_quant: the bits of its two ops, and bits that depend on an element alone."""

import pytest
import torch

from batchproof.errors import ArgumentError, DeviceError, DtypeError, ShapeError, UnsupportedError
from batchproof.numerics import first_mismatch
from batchproof.ops import activation_quant as module
from batchproof.ops._library import FLOAT_DTYPES
from batchproof.ops._quantize import quantize_static_fp8_reference
from batchproof.ops.activation import silu_and_mul
from batchproof.ops.activation_quant import silu_and_mul_static_fp8_quant as fused

BATCHES = [1, 2, 3, 8, 31, 32, 33, 255, 256, 257, 1000]
WIDTHS = [1, 8, 40, 65, 1024, 1025, 3000]  # of the output: masked, odd, a block, over one
INF, NAN = float("inf"), float("nan")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself runs in the other tests")


@pytest.fixture
def scale(device):
    return torch.full((1,), 0.02, device=device)


def randn(generator, *shape, dtype=torch.float32):
    x = torch.randn(*shape, generator=generator, device=generator.device)
    return (x * 2.0 ** torch.randint(-6, 5, shape, generator=generator, device=x.device)).to(dtype)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_has_the_bits_of_the_two(width, dtype, scale, generator):
    x = randn(generator, 7, 2 * width, dtype=dtype)
    expected = quantize_static_fp8_reference(silu_and_mul(x), scale)
    assert first_mismatch(fused(x, scale), expected) is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_it_saturates_and_has_a_number_for_nan(dtype, scale, device):
    gate = torch.tensor([INF, -INF, NAN, 1e4, -1e4, 8.0, 0.0, -0.0, 3.0], device=device).to(dtype)
    up = torch.tensor([1.0, 1.0, 1.0, 1e4, 1.0, NAN, 1.0, 1.0, -INF], device=device).to(dtype)
    x = torch.cat((gate, up))
    out = fused(x, scale).float()
    assert out.tolist()[:4] == [448.0, 448.0, 448.0, 448.0]  # NaN, as silu(-inf) is, becomes the largest
    assert out.tolist()[5:6] == [448.0]
    assert out.tolist()[8:] == [-448.0]
    assert first_mismatch(fused(x, scale), quantize_static_fp8_reference(silu_and_mul(x), scale)) is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_row_has_one_result(dtype, scale, generator):
    x = randn(generator, max(BATCHES), 2 * 1030, dtype=dtype)
    whole = fused(x, scale)
    for rows in BATCHES:
        assert first_mismatch(fused(x[-rows:], scale), whole[-rows:]) is None, f"{rows} rows"
    x[:-1] = NAN
    assert first_mismatch(fused(x, scale)[-1], whole[-1]) is None


def test_layout_leaves_the_bits_alone(scale, generator):
    x = randn(generator, 6, 3, 80)
    expected = fused(x, scale)
    wide = torch.full((6, 3, 161), NAN, device=x.device)
    wide[..., 1:161:2] = x
    assert first_mismatch(fused(wide[..., 1:161:2], scale), expected) is None
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert first_mismatch(fused(turned, scale), expected) is None
    assert first_mismatch(fused(x, scale.reshape(())), expected) is None
    assert fused(x[:0], scale).shape == (0, 3, 40)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 40, 65, 1030])
def test_kernel_in_the_interpreter(width, dtype, scale, generator):
    x = randn(generator, 3, 2 * width, dtype=dtype)
    out = torch.zeros(3, width, dtype=torch.float8_e4m3fn)
    module.launch(x, out, gelu=False, gated=True, scale=scale)
    expected = fused(x, scale)
    steps = (out.view(torch.int8).int() - expected.view(torch.int8).int()).abs()
    assert steps.max() <= 1  # its exponential is not the CPU's
    assert (steps > 0).sum() <= 0.02 * steps.numel() + 1


def test_errors_name_the_value(scale, device):
    x = torch.zeros(2, 8, device=device)
    with pytest.raises(ShapeError, match=r"x has shape \(2, 7\), want \[..., 2 \* d\]"):
        fused(x[:, :7], scale)
    with pytest.raises(DtypeError, match=r"x is torch\.float64"):
        fused(x.double(), scale)
    with pytest.raises(DtypeError, match=r"scale is torch\.float16, want torch\.float32"):
        fused(x, scale.half())
    with pytest.raises(ShapeError, match=r"scale has shape \(2,\), want one element"):
        fused(x, torch.ones(2, device=device))
    with pytest.raises(DeviceError, match="scale is on meta, want"):
        fused(x, scale.to("meta"))
    with pytest.raises(UnsupportedError, match="no backward pass"):
        fused(x.requires_grad_(), scale)


@pytest.mark.parametrize("value", [0.0, -1.0, INF, NAN])
def test_a_scale_that_is_not_positive_is_refused_on_the_cpu(value):
    with pytest.raises(ArgumentError, match=r"scale is .*, want a finite positive number"):
        fused(torch.zeros(2, 8), torch.tensor([value]))


def test_registered_op(scale, generator):
    x = randn(generator, 5, 16, dtype=torch.float16)
    torch.library.opcheck(torch.ops.batchproof.silu_and_mul_static_fp8_quant.default, (x, scale))
