"""The comparisons everything else rests on: bits without tolerance, distances in ulps, and a table with reasons."""

import math

import pytest
import torch

from batchproof.errors import ArgumentError
from batchproof.numerics import TOLERANCES, as_bits, bits_equal, first_mismatch, ulp_distance
from batchproof.registry import all_specs

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INF, NAN = math.inf, math.nan


def pair(dtype, a, b):
    return torch.tensor([a], dtype=dtype), torch.tensor([b], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_equal_for_nan_and_differ_for_signed_zero(dtype):
    assert bits_equal(*pair(dtype, NAN, NAN))
    assert bits_equal(*pair(dtype, INF, INF))
    assert not bits_equal(*pair(dtype, 0.0, -0.0))
    assert not bits_equal(*pair(dtype, 1.0, 1.0 + torch.finfo(dtype).eps))
    a, b = pair(dtype, NAN, NAN)
    as_bits(b).bitwise_xor_(1)
    assert not bits_equal(a, b), "another NaN payload is another result"


def test_bits_need_one_shape_and_dtype():
    a = torch.zeros(2, 3)
    assert not bits_equal(a, a.half())
    assert not bits_equal(a, a.view(3, 2))
    assert not bits_equal(a, a.int()), "the same zero bits"
    assert bits_equal(a.t().contiguous().t(), a)
    assert bits_equal(torch.empty(0, 3), torch.empty(0, 3))
    with pytest.raises(ArgumentError, match=r"as_bits takes real tensors, got torch.complex64"):
        as_bits(torch.zeros(1, dtype=torch.complex64))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_first_mismatch_is_none_for_equal_bits_of_any_dtype(dtype):
    x = torch.arange(6).view(2, 3).to(dtype)
    assert first_mismatch(x, x.clone()) is None


def test_first_mismatch_says_where_and_how_many():
    a = torch.zeros(2, 3)
    b = a.clone()
    b[1, 0], b[1, 2] = -0.0, NAN
    assert first_mismatch(a, b) == "2 of 6 elements differ, first at (1, 0): 0.0 against -0.0"
    assert first_mismatch(a, b[:1]) == "(2, 3) torch.float32 against (1, 3) torch.float32"
    assert first_mismatch(a, a.half()) == "(2, 3) torch.float32 against (2, 3) torch.float16"
    assert (
        first_mismatch(torch.tensor(1.0), torch.tensor(2.0)) == "1 of 1 elements differ, first at (): 1.0 against 2.0"
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.float8_e5m2])
def test_neighbouring_numbers_are_one_ulp_apart(dtype):
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps
    for a, b, distance in [
        (1.0, 1.0, 0),
        (1.0, 1.0 + info.eps, 1),
        (1.0, 1.0 - info.eps / 2, 1),
        (-1.0, -1.0 - info.eps, 1),
        (0.0, -0.0, 0),
        (0.0, tiny, 1),
        (-tiny, tiny, 2),
        (1.0, 2.0, round(1 / info.eps)),
        (-1.0, -2.0, round(1 / info.eps)),
    ]:
        x, y = (torch.tensor([value], dtype=torch.float64).to(dtype) for value in (a, b))
        assert ulp_distance(x, y).item() == distance, f"{a} and {b}"
        assert ulp_distance(y, x).item() == distance, f"{b} and {a}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_nearer_than_nan(dtype):
    largest = torch.finfo(dtype).max
    far = torch.iinfo(torch.int64).max
    assert ulp_distance(*pair(dtype, largest, INF)).item() == 1
    assert 0 < ulp_distance(*pair(dtype, largest, 1.0)).item() < ulp_distance(*pair(dtype, largest, -1.0)).item()
    assert 0 < ulp_distance(*pair(dtype, INF, 0.0)).item() < ulp_distance(*pair(dtype, INF, -INF)).item() <= far
    assert ulp_distance(*pair(dtype, NAN, 1.0)).item() == far
    assert ulp_distance(*pair(dtype, 1.0, NAN)).item() == far
    assert ulp_distance(*pair(dtype, NAN, -NAN)).item() == 0


def test_ulp_distance_needs_one_dtype_and_shape():
    with pytest.raises(ArgumentError, match="ulp_distance needs one shape and dtype"):
        ulp_distance(torch.zeros(2), torch.zeros(2).half())
    with pytest.raises(ArgumentError, match="ulp_distance needs one shape and dtype"):
        ulp_distance(torch.zeros(2), torch.zeros(3))


def test_every_op_has_a_tolerance_and_every_tolerance_a_reason_and_a_use():
    used = {spec.tolerance for spec in all_specs().values()}
    assert used <= TOLERANCES.keys()
    assert TOLERANCES.keys() <= used | {"rms_norm_unweighted", "rms_norm_backward_x"}
    for name, tolerance in TOLERANCES.items():
        assert len(tolerance.reason) > 20, name
        assert tolerance.ulp or tolerance.atol, name
