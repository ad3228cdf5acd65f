"""The CPU's exact arithmetic: no order of a sum shows, and the error is what the docstrings say."""

import math
from fractions import Fraction

import pytest
import torch

from batchproof.numerics import first_mismatch, ulp_distance
from batchproof.ops import _exact
from batchproof.ops._library import FLOAT_DTYPES

INF, NAN = math.inf, math.nan


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def randn(generator, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator).to(dtype)


def wide(generator, *shape, dtype=torch.float32):
    """Values whose exponents are far apart."""
    bits = 12 if dtype == torch.float16 else 30
    return (randn(generator, *shape) * 2.0 ** torch.randint(-bits, bits, shape, generator=generator)).to(dtype)


def test_an_ordinary_product_has_an_order(generator):
    """What the rest of this file would show if the arithmetic were not exact."""
    a, b = wide(generator, 8, 1000).double(), wide(generator, 1000, 8).double()
    order = torch.randperm(1000, generator=generator)
    assert first_mismatch(a[:, order] @ b[order], a @ b) is not None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("make", [randn, wide])
@pytest.mark.parametrize("k", [1, 2, 3, 17, 256, 1000, 1024])
def test_the_order_of_k_leaves_a_product_alone(k, make, dtype, generator):
    a, b = make(generator, 9, k, dtype=dtype), make(generator, k, 11, dtype=dtype)
    expected = _exact.exact_matmul(a, b)
    for _ in range(3):
        order = torch.randperm(k, generator=generator)
        assert first_mismatch(_exact.exact_matmul(a[:, order], b[order]), expected) is None
    padded = [torch.nn.functional.pad(t, p) for t, p in ((a, (0, 1024 - k)), (b, (0, 0, 0, 1024 - k)))]
    assert first_mismatch(_exact.exact_matmul(*padded), expected) is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 31, 33, 65])
def test_rows_and_columns_leave_a_product_alone(rows, dtype, generator):
    a, b = wide(generator, 65, 1500, dtype=dtype), wide(generator, 1500, 33, dtype=dtype)
    full = _exact.exact_matmul(a, b)
    assert first_mismatch(_exact.exact_matmul(a[-rows:], b), full[-rows:]) is None
    assert first_mismatch(_exact.exact_matmul(a, b[:, :rows]), full[:, :rows]) is None
    shuffled = torch.randperm(65, generator=generator)[:rows]
    assert first_mismatch(_exact.exact_matmul(a[shuffled], b), full[shuffled]) is None


def test_order_leaves_a_product_of_the_largest_integers_alone():
    """Every partial sum at its bound: all operands as large as their bits allow, all of one sign."""
    for dtype in FLOAT_DTYPES:
        a = torch.full((4, 1024), 2.0 - torch.finfo(dtype).eps, dtype=dtype)
        expected = 1024 * Fraction(a[0, 0].item()) ** 2
        error = abs(Fraction(_exact.exact_matmul(a, a.t())[1, 2].item()) - expected)
        assert error <= expected * Fraction(2) ** (-22 if dtype != torch.float32 else -27)
        a[:, ::2] = a[:, ::2] * 2.0**-9
        order = torch.randperm(1024, generator=torch.Generator().manual_seed(0))
        expected = _exact.exact_matmul(a, a.t())
        assert first_mismatch(_exact.exact_matmul(a[:, order], a[:, order].t()), expected) is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("k", [64, 1024, 3000])
def test_a_product_is_as_accurate_as_it_says(k, dtype, generator):
    a, b = randn(generator, 5, k, dtype=dtype), randn(generator, k, 6, dtype=dtype)
    out = _exact.exact_matmul(a, b)
    column = b.double().abs().amax(0) * 2.0 ** (-28 if dtype == torch.float32 else -22)
    row = a.double().abs().amax(1, keepdim=True) * 2.0**-33
    bound = a.double().abs().sum(1, keepdim=True) * column + row * b.double().abs().sum(0)
    for i in range(5):
        for j in range(6):
            terms = zip(a[i].tolist(), b[:, j].tolist(), strict=True)
            truth = sum(Fraction(x) * Fraction(y) for x, y in terms)
            assert abs(Fraction(out[i, j].item()) - truth) <= Fraction(bound[i, j].item()) * Fraction(101, 100)


@pytest.mark.parametrize("make", [randn, wide])
@pytest.mark.parametrize("n", [1, 2, 7, 100, 1023, 1024])
def test_the_order_leaves_a_sum_alone(n, make, generator):
    x = make(generator, 5, n).double() ** 2
    expected = _exact.exact_sum(x)
    for _ in range(3):
        assert first_mismatch(_exact.exact_sum(x[:, torch.randperm(n, generator=generator)]), expected) is None
    assert first_mismatch(_exact.exact_sum(torch.nn.functional.pad(x, (0, 1024 - n))), expected) is None
    assert first_mismatch(torch.cat([_exact.exact_sum(row[None]) for row in x]), expected) is None


@pytest.mark.parametrize("n", [1025, 5000, 2**20 + 1])
def test_long_sums_are_accurate_and_depend_on_their_row_alone(n, generator):
    x = torch.rand(3, n, generator=generator, dtype=torch.float64)
    out = _exact.exact_sum(x)
    for row, total in zip(x, out.tolist(), strict=True):
        assert total == pytest.approx(math.fsum(row.tolist()), rel=2.0**-40, abs=0.0)
    assert first_mismatch(_exact.exact_sum(x[1:2]), out[1:2]) is None
    within = torch.randperm(1024, generator=generator)
    x[:, :1024] = x[:, within]
    assert first_mismatch(_exact.exact_sum(x), out) is None, "the order within a chunk"


@pytest.mark.parametrize("scale", [2.0**-298, 2.0**-200, 1.0, 2.0**250])
def test_a_sum_is_accurate_at_any_scale(scale, generator):
    """2**-298: the square of the smallest float32."""
    x = torch.rand(2, 100, generator=generator, dtype=torch.float64) * scale
    for row, total in zip(x, _exact.exact_sum(x).tolist(), strict=True):
        assert total == pytest.approx(math.fsum(row.tolist()), rel=2.0**-34, abs=0.0)


def test_sums_that_cancel_are_positive_zero():
    x = torch.tensor([[1.0, -1.0], [-0.0, -0.0], [3.0, -2.0]], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    assert first_mismatch(_exact.exact_sum(x), expected) is None
    ones = torch.ones(2, 1)
    assert first_mismatch(_exact.exact_matmul(x.float(), ones), expected[:, None]) is None
    assert _exact.exact_sum(torch.empty(2, 0, dtype=torch.float64)).tolist() == [0.0, 0.0]


def test_threads_leave_the_bits_alone(generator):
    a, b, threads = wide(generator, 257, 1500), wide(generator, 1500, 300), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append((_exact.exact_matmul(a, b), _exact.exact_sum(a.double())))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert first_mismatch(one, two) is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_what_is_not_finite_stays_in_its_row_and_column(dtype, generator):
    a, b = randn(generator, 9, 40, dtype=dtype), randn(generator, 40, 7, dtype=dtype)
    clean = _exact.exact_matmul(a, b)
    a[1, 3], a[2, 5], a[4, 6] = NAN, INF, -INF
    b[7, 2], b[8, 5] = NAN, INF
    out = _exact.exact_matmul(a, b)
    truth = a.double() @ b.double()
    assert torch.equal(out.isnan(), truth.isnan())
    assert torch.equal(out.isinf(), truth.isinf())
    assert torch.equal(out[out.isinf()], truth[truth.isinf()])
    finite = truth.isfinite()
    assert int(finite.sum()) == 6 * 5
    assert first_mismatch(out[finite], clean[finite]) is None
    order = torch.randperm(40, generator=generator)
    assert first_mismatch(_exact.exact_matmul(a[:, order], b[order]), out) is None


def test_sums_of_what_is_not_finite_are_those_of_ieee(generator):
    x = randn(generator, 6, 3000).double()
    clean = _exact.exact_sum(x)
    x[1, 7], x[2, 2000], x[3, 8] = NAN, INF, -INF
    x[4, 3], x[4, 2999] = INF, -INF
    out = _exact.exact_sum(x)
    assert torch.equal(out.isnan(), torch.tensor([False, True, False, False, True, False]))
    assert out[2].item() == INF
    assert out[3].item() == -INF
    assert first_mismatch(out[::5], clean[::5]) is None


def test_exp_is_within_two_ulp_and_depends_on_its_element_alone():
    x = torch.cat((torch.linspace(-87.3, 0.0, 400001), -(2.0 ** torch.arange(-149, 6).float()), torch.zeros(1)))
    out = _exact.exp(x)
    assert int(ulp_distance(out, torch.exp(x.double()).float()).max()) <= 2
    assert _exact.exp(torch.tensor([0.0, -87.4, -1e30, -INF])).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert _exact.exp(torch.tensor([NAN])).isnan().all()
    for count in (1, 3, 7, 1000):
        assert first_mismatch(_exact.exp(x[5 : 5 + count]), out[5 : 5 + count]) is None


def test_exp_float64_is_within_its_bound():
    x = torch.cat((torch.linspace(-700.0, 0.0, 100001, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)))
    error = (_exact.exp_float64(x) / torch.exp(x) - 1.0).abs().max().item()
    assert error <= 2.0**-40
    special = torch.tensor([0.0, -701.0, -INF, NAN], dtype=torch.float64)
    assert _exact.exp_float64(special)[:3].tolist() == [1.0, 0.0, 0.0]
    assert _exact.exp_float64(special)[3].isnan()


def test_log_is_within_two_ulp_of_what_it_can_hold():
    x = torch.cat(
        [torch.logspace(-300, 300, 100001, dtype=torch.float64), torch.linspace(0.5, 2.0, 100001, dtype=torch.float64)]
    )
    error = (_exact.log(x) - x.log()).abs()
    assert (error <= 4.0 * torch.finfo(torch.float64).eps * x.log().abs().clamp_min(2.0**-3)).all()
    assert _exact.log(torch.tensor([1.0, INF], dtype=torch.float64)).tolist() == [0.0, INF]
    assert _exact.log(torch.tensor([NAN], dtype=torch.float64)).isnan().all()


def test_a_nan_has_one_bit_pattern():
    bits = torch.tensor([0x7FF8000000000000, 0x7FF0000000000001, -1], dtype=torch.int64)
    out = _exact.canonical_nan(bits.view(torch.float64)).view(torch.int64)
    assert len(set(out.tolist())) == 1
