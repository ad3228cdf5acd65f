"""silu, gelu_tanh and their gated forms: every 16-bit value, the limits, and bits that depend on an element alone."""

import pytest
import torch

from batchproof.errors import DtypeError, ShapeError, UnsupportedError
from batchproof.numerics import TOLERANCES, as_bits, first_mismatch, ulp_distance
from batchproof.ops import activation as module
from batchproof.ops._library import FLOAT_DTYPES
from batchproof.ops.activation import gelu_tanh, gelu_tanh_and_mul, silu, silu_and_mul
from batchproof.registry import get_spec

PLAIN = [silu, gelu_tanh]
GATED = [silu_and_mul, gelu_tanh_and_mul]
BATCHES = [1, 2, 3, 8, 31, 32, 33, 255, 256, 257, 1000]
INF, NAN = float("inf"), float("nan")
TORCH = {silu: torch.nn.functional.silu, gelu_tanh: lambda x: torch.nn.functional.gelu(x, approximate="tanh")}
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself runs in the other tests")


def randn(generator, *shape, dtype=torch.float32):
    return (torch.randn(*shape, generator=generator, device=generator.device) * 3.0).to(dtype)


def assert_accurate(op, x, out):
    expected = get_spec(op.__name__).reference(x)
    bad = ulp_distance(out, expected) > TOLERANCES["activation"].ulp
    assert not bad.any(), f"{int(bad.sum())} off, first {out[bad][0].item()} against {expected[bad][0].item()}"


def every_value(dtype, device):
    """All of a 16-bit dtype; for fp32 a sweep of the exponents and of where exp underflows."""
    if dtype != torch.float32:
        return torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype)
    exponents = torch.logspace(-149.0, 127.9, 20001, base=2.0, dtype=torch.float64, device=device)
    return torch.cat((exponents, -exponents, torch.linspace(-125.0, 125.0, 50001, device=device))).float()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("op", PLAIN)
def test_accuracy_of_every_value(op, dtype, device):
    x = every_value(dtype, device)
    x = x[x != -INF]  # the reference has its NaN as well, but the next test says so
    assert_accurate(op, x, op(x))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("op", PLAIN)
def test_limits_are_torchs(op, dtype, device):
    largest = torch.finfo(dtype).max
    x = torch.tensor([INF, -INF, NAN, largest, -largest, 0.0, -0.0, 1e4, -1e4], device=device).to(dtype)
    out, expected = op(x), TORCH[op](x)
    assert torch.equal(out.isnan(), expected.isnan())
    assert first_mismatch(out.nan_to_num(5.0), expected.nan_to_num(5.0)) is None  # the signs of zeros included


@pytest.mark.parametrize("op", PLAIN)
def test_underflow_is_gradual(op, device):
    lowest, highest = (-106.0, -80.0) if op is silu else (-10.6, -9.9)
    x = torch.linspace(lowest, highest, 1001, device=device)
    out = op(x)
    assert (out < 0.0).all()
    assert (out.abs() < torch.finfo(torch.float32).tiny).any()
    assert (out[1:] <= out[:-1]).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("width", [1, 3, 64, 65, 1025])
@pytest.mark.parametrize("op", GATED)
def test_gated_accuracy(op, width, dtype, generator):
    x = randn(generator, 5, 2 * width, dtype=dtype)
    out = op(x)
    assert out.shape == (5, width)
    assert_accurate(op, x, out)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("op", "activation"), [(silu_and_mul, silu), (gelu_tanh_and_mul, gelu_tanh)])
def test_gated_rounds_the_activation_first(op, activation, dtype, generator):
    x = randn(generator, 9, 130, dtype=dtype)
    gate, up = x.chunk(2, dim=-1)
    assert first_mismatch(op(x), (activation(gate).double() * up.double()).to(dtype)) is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("op", PLAIN + GATED)
def test_a_row_has_one_result(op, dtype, generator):
    width = 66  # d is odd for the gated forms, even for the others
    probe = randn(generator, 1, width, dtype=dtype)
    alone = op(probe)
    for rows in BATCHES:
        for place in sorted({0, rows // 2, rows - 1}):
            batch = randn(generator, rows, width, dtype=dtype)
            batch[0::3], batch[1::3] = NAN, torch.finfo(dtype).max
            batch[place] = probe
            assert first_mismatch(op(batch)[place], alone[0]) is None, f"row {place} of {rows}"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("op", PLAIN)
def test_an_element_has_one_result_wherever_it_stands(op, dtype, generator):
    x = randn(generator, 1031, dtype=dtype)
    expected = op(x)
    for start, stop in ((0, 1), (1, 2), (5, 22), (1000, 1031), (3, 1030)):
        assert first_mismatch(op(x[start:stop]), expected[start:stop]) is None
        assert first_mismatch(op(x[start:stop, None]), expected[start:stop, None]) is None
    for index in range(0, 1031, 97):
        assert first_mismatch(op(x[index]), expected[index]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", PLAIN + GATED)
def test_layout_leaves_the_bits_alone(op, dtype, generator):
    for width in (64, 66):
        x = randn(generator, 6, width, dtype=dtype)
        expected = op(x)
        shifted = torch.empty(x.numel() + 1, dtype=dtype, device=x.device)[1:].view_as(x).copy_(x)
        spaced = torch.full((6, 2 * width + 1), NAN, dtype=dtype, device=x.device)[:, 1::2].copy_(x)
        for same in (shifted, spaced, x.t().contiguous().t()):
            out = op(same)
            assert out.is_contiguous()
            assert first_mismatch(out, expected) is None
        assert first_mismatch(op(x[:1].expand(4, -1)), expected[:1].expand(4, -1)) is None
        assert first_mismatch(op(x.view(2, 3, width)), expected.view(2, 3, -1)) is None


@pytest.mark.parametrize("op", PLAIN + GATED)
def test_empty(op, device):
    half = 2 if op in GATED else 1
    for shape in ((0, 8), (4, 0), (0,)):
        assert op(torch.empty(shape, device=device)).shape == (*shape[:-1], shape[-1] // half)


@pytest.mark.parametrize("op", PLAIN + GATED)
def test_errors_name_the_value(op, device):
    with pytest.raises(DtypeError, match=r"x is torch.float64, want one of torch.float32"):
        op(torch.zeros(4, dtype=torch.float64, device=device))
    with pytest.raises(UnsupportedError, match="no backward pass"):
        op(torch.zeros(4, device=device, requires_grad=True))


@pytest.mark.parametrize("op", GATED)
@pytest.mark.parametrize("shape", [(2, 5), ()])
def test_gated_needs_an_even_last_axis(op, shape, device):
    with pytest.raises(ShapeError, match=rf"x has shape \({', '.join(map(str, shape))}\), want \[..., 2 \* d\]"):
        op(torch.zeros(shape, device=device))


@pytest.mark.parametrize("op", PLAIN + GATED)
def test_registered_op(op, generator):
    overload = getattr(torch.ops.batchproof, op.__name__).default
    x = randn(generator, 3, 4, 6, dtype=torch.float16)
    for argument in (x, x.transpose(0, 1)):
        torch.library.opcheck(overload, (argument,))


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("op", PLAIN + GATED)
def test_kernel_in_the_interpreter(op, dtype, generator):
    gated = op in GATED
    for width in (8, 66, 1030):
        x = randn(generator, 3, 2 * width if gated else width, dtype=dtype)
        x[0, :6] = torch.tensor([INF, -INF, NAN, 100.0, -100.0, torch.finfo(dtype).max])
        out, alone = torch.empty(3, width, dtype=dtype), torch.empty(1, width, dtype=dtype)
        module.launch(x, out, "gelu" in op.__name__, gated)
        module.launch(x[2:], alone, "gelu" in op.__name__, gated)
        assert_accurate(op, x, out)
        assert first_mismatch(alone, out[2:]) is None


@interpreted
@pytest.mark.parametrize("op", PLAIN)
def test_kernel_agrees_with_the_cpu(op):
    """fp32 is computed in fp64 in both, with different exponentials: the one rounding hides that."""
    x = torch.linspace(-120.0, 20.0, 4001)
    out = torch.empty_like(x)
    module.launch(x, out, op is gelu_tanh, False)
    assert int((as_bits(out) - as_bits(op(x))).abs().max()) <= 1
