"""mean: accuracy, torch's semantics, and bits that depend on the reduced elements alone."""

import pytest
import torch

from batchproof.errors import ArgumentError, DtypeError, UnsupportedError
from batchproof.numerics import TOLERANCES, first_mismatch, ulp_distance
from batchproof.ops import reduce as module
from batchproof.ops._library import FLOAT_DTYPES
from batchproof.ops.reduce import mean, mean_reference
from batchproof.registry import get_spec

WIDTHS = [1, 2, 33, 193, 512, 4099, 20000]  # as in test_softmax
BATCHES = [1, 2, 3, 8, 31, 32, 33, 255, 256, 257, 1000]
INF, NAN = float("inf"), float("nan")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself runs in the other tests")


def randn(generator, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)


def assert_accurate(x, out, expected):
    """Within the table's ulps, or its atol in units of the mean of |x|; the last axis of x is the reduced one."""
    tolerance = TOLERANCES["mean"]
    near = (out.double() - expected.double()).abs() <= tolerance.atol * x.double().abs().mean(-1)
    bad = ~(near | (ulp_distance(out, expected) <= tolerance.ulp))
    assert not bad.any(), f"{int(bad.sum())} off, first {out[bad][0].item()} against {expected[bad][0].item()}"


def hostile(generator, rows, width, dtype):
    x = randn(generator, rows, width, dtype=dtype)
    x[0::4] = NAN
    x[1::4, -1] = INF
    x[2::4] = torch.finfo(dtype).max
    return x


def cancelling(generator, width, dtype):
    """A row whose outer thirds cancel and are so large that float64 partial sums round: the order would show."""
    x, third = randn(generator, 1, width, dtype=dtype), width // 3
    x[:, :third] *= 2.0**12 if dtype == torch.float16 else 2.0**40
    x[:, -third:] = -x[:, :third]
    return x


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_accuracy(width, dtype, generator):
    x = randn(generator, 5, width, dtype=dtype)
    assert_accurate(x, mean(x, -1), mean_reference(x, -1))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_accuracy_of_adversarial_rows(dtype, generator):
    """Cancellation, exponents far apart, subnormals, zeros of both signs."""
    info = torch.finfo(dtype)
    x = torch.zeros(6, 1001, dtype=dtype, device=generator.device)
    x[0, :1000] = randn(generator, 500, dtype=dtype).repeat_interleave(2)
    x[0, 1:1000:2] *= -1.0
    x[1] = torch.logspace(-30.0, 30.0, 1001, base=1.4, device=x.device).to(dtype)
    x[2] = info.smallest_normal / 4
    x[3, 0], x[3, 1:] = info.max / 4, info.tiny
    x[4] = -0.0
    x[5, 1], x[5, 2] = info.max, info.min
    out = mean(x, -1)
    assert_accurate(x, out, mean_reference(x, -1))
    assert not out[4].signbit()


def test_wide_rows_keep_their_tail(device):
    x = torch.full((1, 2**18), 2.0**-36, device=device)
    x[0, 12345] = 1.0
    assert ulp_distance(mean(x, -1), mean_reference(x, -1)).item() <= 1


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_rows_that_are_not_finite(dtype, device):
    x = torch.ones(5, 40, dtype=dtype, device=device)
    x[1, 3], x[2, 3], x[3, 3] = NAN, INF, -INF
    x[4, :2] = torch.tensor([INF, -INF])
    assert torch.equal(mean(x, 1).nan_to_num(7.0), torch.tensor([1.0, NAN, INF, -INF, NAN]).to(x).nan_to_num(7.0))


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [None, 0, 1, -1, (0, 2), (2, 0), (-1, -2), [1], (), (0, 1, 2)])
def test_any_axes(dim, keepdim, generator):
    x = randn(generator, 3, 5, 7)
    out, expected = mean(x, dim, keepdim), mean_reference(x, dim, keepdim)
    assert out.shape == expected.shape
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=0.0, atol=2.0**-20)
    assert expected.shape == x.mean(dim, keepdim).shape


def test_the_order_of_axes_is_theirs_not_the_callers(generator):
    x = randn(generator, 3, 5, 7)
    assert first_mismatch(mean(x, (0, 2)), mean(x, (-1, 0))) is None
    assert first_mismatch(mean(x, (1, 2)), mean(x.flatten(1), 1)) is None


def test_no_elements(device):
    assert mean(torch.empty(3, 0, device=device), 1).isnan().all()
    assert mean(torch.empty(3, 0, device=device), 1).shape == (3,)
    assert mean(torch.empty(0, 5, device=device), 1).shape == (0,)
    assert mean(torch.empty(0, device=device)).isnan()
    assert mean(torch.tensor(3.0, device=device)) == 3.0
    assert mean(torch.tensor(3.0, device=device), -1, keepdim=True).shape == ()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_dtype_casts_first(dtype, generator):
    for source in FLOAT_DTYPES:
        x = randn(generator, 3, 50, dtype=source)
        out = mean(x, -1, dtype=dtype)
        assert out.dtype == dtype
        assert_accurate(x, out, mean_reference(x, -1, dtype=dtype))
        if dtype != torch.float32:
            assert first_mismatch(out, mean(x.to(dtype), -1)) is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("width", [193, 40000])  # 40000: torch shares a lone row of that out over threads
def test_a_row_has_one_result(width, dtype, generator):
    probe = cancelling(generator, width, dtype)
    alone = mean(probe, -1)
    for rows in BATCHES if width < 1000 else (2, 9):
        for place in sorted({0, rows // 2, rows - 1}):
            batch = hostile(generator, rows, width, dtype)
            batch[place] = probe
            assert first_mismatch(mean(batch, -1)[place], alone[0]) is None, f"row {place} of {rows}"


def test_a_batch_is_its_parts(generator):
    x = randn(generator, 1000, 65)
    whole = mean(x, -1)
    for rows in (1, 3, 32, 257, 999):
        parts = torch.cat([mean(part, -1) for part in x.split(rows)])
        assert first_mismatch(parts, whole) is None, f"in parts of {rows}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 65])
def test_layout_leaves_the_bits_alone(width, dtype, generator):
    x = randn(generator, 6, width, dtype=dtype)
    expected = mean(x, -1)
    shifted = torch.empty(x.numel() + 1, dtype=dtype, device=x.device)[1:].view_as(x).copy_(x)
    spaced = torch.full((6, 2 * width + 1), NAN, dtype=dtype, device=x.device)[:, 1::2].copy_(x)
    for same in (shifted, spaced, x.t().contiguous().t()):
        assert first_mismatch(mean(same, -1), expected) is None
        assert first_mismatch(mean(same[3:4], -1), expected[3:4]) is None
    assert first_mismatch(mean(x.t().contiguous(), 0), expected) is None


def test_errors_name_the_value(device):
    x = torch.zeros(2, 3, device=device)
    with pytest.raises(ArgumentError, match=r"dim is -3, want one of -2 to 1 for x of shape \(2, 3\)"):
        mean(x, -3)
    with pytest.raises(ArgumentError, match=r"dim is \(1, -1\), want every axis at most once"):
        mean(x, (1, -1))
    with pytest.raises(DtypeError, match=r"x is torch.int64, want one of torch.float32"):
        mean(x.long())
    with pytest.raises(DtypeError, match=r"dtype is torch.int64, want one of torch.float32"):
        mean(x, dtype=torch.int64)
    with pytest.raises(UnsupportedError, match="no backward pass"):
        mean(x.requires_grad_())


def test_registered_op(generator):
    x = randn(generator, 3, 4, 5, dtype=torch.float16)
    for arguments in ((x, [-1], False, None), (x, None, True, torch.float32), (x.transpose(0, 2), [0, 2], False, None)):
        torch.library.opcheck(torch.ops.batchproof.mean.default, arguments)


def test_aten_signatures(generator):
    x, aten = randn(generator, 4, 6, dtype=torch.float16), get_spec("mean").aten
    assert first_mismatch(aten["mean"](x, dtype=torch.float32), mean(x, dtype=torch.float32)) is None
    assert first_mismatch(aten["mean.dim"](x, [1], True, dtype=None), mean(x, 1, True)) is None
    assert first_mismatch(aten["mean.dim"](x, None), mean(x)) is None


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 40, 65, 8200])
def test_kernel_in_the_interpreter(width, dtype, generator):
    x = randn(generator, 3, width, dtype=dtype)
    out, alone = torch.empty(3, dtype=dtype), torch.empty(1, dtype=dtype)
    module.launch(x, out)
    module.launch(x[2:], alone)
    assert_accurate(x, out, mean_reference(x, -1))
    assert first_mismatch(alone, out[2:]) is None
