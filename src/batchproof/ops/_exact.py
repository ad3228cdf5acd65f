"""CPU arithmetic whose result cannot depend on the order of the sum, because every partial sum is exact.

A CPU BLAS chooses its blocking, its threads and its tail code by the number of rows, and says nothing about the
order in which it adds. So the CPU implementations do not try to pin that order: they make it irrelevant. Each row is
scaled by a power of two and rounded to integers that float64 holds; products and partial sums of such integers stay
below 2**53, where float64 addition is exact and therefore associative. Whatever order the library takes, with or
without FMA, on however many threads, the bits are the same. The rounding of the inputs, 2**-28 of a row's largest
value or finer, is the only error, and it is a function of the row alone. This is the first step of Ozaki's
error-free transformation of matrix products (Ozaki, Ogita, Oishi, Rump, Numer. Algorithms 59, 2012).

``exp`` and ``log`` are here for the same reason: libm's vector and tail code may differ in the last bit, so they are
written in additions, multiplications and divisions, which IEEE 754 defines to the bit.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import torch

__all__ = ["PackedColumns", "exact_matmul", "exact_sum", "exp", "exp_float64", "log", "matmul_packed", "pack"]

RIGHT_BITS = 27  # bits kept of the right operand (the weight), relative to the largest of its column
CHUNK = 1024  # K per exact product; longer sums are added chunk by chunk in ascending k
LEFT_BITS = 53 - RIGHT_BITS - 10  # bits per slice of the left operand: CHUNK products sum to at most 2**53
_EXPONENT_MASK = 0x7FF0000000000000


_state = threading.local()


def is_computing() -> bool:
    """Whether this thread is inside an exact float64 product, which batch-invariant mode must let through."""
    return getattr(_state, "computing", False)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` by the library's float64 kernel, whatever order it takes."""
    _state.computing = True
    try:
        return a @ b
    finally:
        _state.computing = False


def power_of_two_above(x: torch.Tensor) -> torch.Tensor:
    """The smallest power of two greater than each |x| (float64), 2**-200 at least; 1 where x is not finite."""
    x = torch.where(x.isfinite(), x.abs(), torch.ones_like(x)).clamp_min(2.0**-201)
    return (x.view(torch.int64) & _EXPONENT_MASK).view(torch.float64) * 2.0


def exact_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum of float64 ``x`` over its last axis: exact sums of CHUNK elements, then of those sums, and so on.

    An exact sum of n elements rounds each to 52 - log2(n) bits below the largest; in chunks that stays 42 bits for
    any n. Rows with an infinity or NaN give what IEEE addition gives. A zero sum is +0.
    """
    while x.shape[-1] > CHUNK:
        padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % CHUNK))
        x = _exact_chunk_sum(padded.unflatten(-1, (-1, CHUNK)))
    return _exact_chunk_sum(x)


def _exact_chunk_sum(x: torch.Tensor) -> torch.Tensor:
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1])
    largest = x.abs().amax(-1, keepdim=True)
    unit = power_of_two_above(largest) * (CHUNK * 2.0**-52)
    total = (x / unit).round_().sum(-1, keepdim=True) * unit + 0.0  # + 0.0: a sum's zero may start as -0
    if not bool(largest.isfinite().all()):
        total = torch.where(largest.isfinite(), total, canonical_nan(x.sum(-1, keepdim=True)))
    return total.squeeze(-1)


def canonical_nan(x: torch.Tensor) -> torch.Tensor:
    """``x`` with one bit pattern for every NaN: which operand's payload survives depends on the order of a sum."""
    return torch.where(x.isnan(), torch.full_like(x, math.nan), x)


def split_rows(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(high, low, unit)`` with x = (high + low * 2**-bits) * unit, where high and low are integers of ``bits`` bits.

    ``x`` is float64 [..., K]; ``unit`` is a power of two per row, [..., 1]. What lies under 2**(-2 * bits) of the
    row's largest value is rounded away. Values that are not finite must have been replaced.
    """
    unit = power_of_two_above(x.abs().amax(-1, keepdim=True)) * 2.0**-bits
    scaled = x / unit
    high = scaled.round()
    low = ((scaled - high) * 2.0**bits).round_()
    return high, low, unit


@dataclass(frozen=True)
class PackedColumns:
    """A right operand [..., K, N] of at most CHUNK of K, equal to ``integers * unit`` (float64, unit [..., 1, N])."""

    integers: torch.Tensor
    unit: torch.Tensor
    finite: bool


def pack_columns(b: torch.Tensor) -> PackedColumns:
    """Round each column of ``b`` [..., K, N] to RIGHT_BITS bits below its largest value."""
    b = b.to(torch.float64)
    largest = b.abs().amax(-2, keepdim=True)
    unit = power_of_two_above(largest) * 2.0**-RIGHT_BITS
    return PackedColumns((b / unit).round_(), unit, bool(largest.isfinite().all()))


def exact_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` in float64 for a [..., M, K] and b [..., K, N] of any floating dtype.

    Invariance: an output element depends on its row of ``a`` and its column of ``b`` alone; see the module docstring.
    """
    return matmul_packed(a, pack(b))


def pack(b: torch.Tensor) -> list[PackedColumns]:
    """``pack_columns`` of every CHUNK of K of ``b`` [..., K, N]."""
    return [pack_columns(chunk) for chunk in b.split(CHUNK, dim=-2)]


def matmul_packed(a: torch.Tensor, packed: list[PackedColumns]) -> torch.Tensor:
    """``a @ b`` in float64 for a [..., M, K] and ``packed = pack(b)``; chunks of K are added in ascending order."""
    products = [_chunk_product(part, p) for part, p in zip(a.split(CHUNK, dim=-1), packed, strict=True)]
    out = products[0]
    for product in products[1:]:
        out += product
    return out + 0.0  # the sign of a zero would depend on how the library starts its sum; this makes it +0


def _chunk_product(a: torch.Tensor, b: PackedColumns) -> torch.Tensor:
    a = a.to(torch.float64)
    m, k = a.shape[-2:]
    if m == 0 or k == 0:
        return a.new_zeros(*torch.broadcast_shapes(a.shape[:-2], b.unit.shape[:-2]), m, b.unit.shape[-1])
    largest = a.abs().amax(-1, keepdim=True)
    finite = b.finite and bool(largest.isfinite().all())
    high, low, unit = split_rows(a if finite else a.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), LEFT_BITS)
    both = _product(torch.cat((high, low), dim=-2), b.integers)
    out = (both[..., :m, :] + both[..., m:, :] * 2.0**-LEFT_BITS) * unit * b.unit
    return out if finite else _with_non_finite(out, a, b.integers)


def _with_non_finite(out: torch.Tensor, a: torch.Tensor, integers: torch.Tensor) -> torch.Tensor:
    """Rows of ``a`` and columns of the right operand that are not finite, as IEEE arithmetic has them.

    Every product in such a row or column is summed with an infinity or NaN, so the sum is +inf, -inf or NaN
    in whatever order it is taken.
    """
    raw = canonical_nan(_product(a, integers))
    rows = ~a.isfinite().all(-1, keepdim=True)
    columns = ~integers.isfinite().all(-2, keepdim=True)
    return torch.where(rows | columns, raw, out)


_LN2_HIGH = 0.693359375  # 10 bits: n * _LN2_HIGH is exact in float32 for |n| < 2**14
_LN2_LOW = -2.12194440e-4
# Cephes expf (S. Moshier): exp(r) = 1 + r + r**2 * P(r) for |r| <= ln(2) / 2, within 1 ulp of float32
_EXP_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_EXP_LOWEST = -87.3  # below it exp is subnormal in float32, and 0 here


def exp(x: torch.Tensor) -> torch.Tensor:
    """Exp of float32 ``x`` <= 0, within 2 ulp; 0 below -87.3. Additions and multiplications only, no FMA."""
    n = (x.clamp_min(_EXP_LOWEST) * 1.4426950408889634).round_()
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = torch.full_like(r, _EXP_POLYNOMIAL[0])
    for coefficient in _EXP_POLYNOMIAL[1:]:
        p.mul_(r).add_(coefficient)
    p.mul_(r).mul_(r).add_(r).add_(1.0)
    power = n.to(torch.int32).add_(127).bitwise_left_shift_(23).view(torch.float32)
    return p.mul_(power).masked_fill_(x < _EXP_LOWEST, 0.0)


_LN2_HIGH_64 = 0.6931471803691238  # 33 bits: n * _LN2_HIGH_64 is exact in float64 for |n| < 2**20
_LN2_LOW_64 = 1.9082149292705877e-10
_EXP_LOWEST_64 = -700.0  # times any float32, e**-700 is under the smallest float32


def exp_float64(x: torch.Tensor) -> torch.Tensor:
    """Exp of float64 ``x`` <= 0 within 2**-40; 0 below -700. Additions and multiplications only, no FMA."""
    n = (x.clamp_min(_EXP_LOWEST_64) * (1.0 / math.log(2.0))).round_()
    r = (x - n * _LN2_HIGH_64) - n * _LN2_LOW_64
    p = torch.full_like(r, 1.0 / math.factorial(11))
    for order in range(10, -1, -1):  # Taylor: the first term left out is under 2**-46 for |r| <= ln(2) / 2
        p.mul_(r).add_(1.0 / math.factorial(order))
    power = n.to(torch.int64).add_(1023).bitwise_left_shift_(52).view(torch.float64)
    return p.mul_(power).masked_fill_(x < _EXP_LOWEST_64, 0.0)


def log(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of float64 ``x``, positive and normal or infinite or NaN, within 2 ulp of float64.

    With x = m * 2**e and m in [sqrt(1/2), sqrt(2)): log(x) = e ln 2 + 2 artanh((m - 1) / (m + 1)).
    """
    bits = x.view(torch.int64)
    m = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000).view(torch.float64)
    e = ((bits >> 52) - 1023).to(torch.float64)
    above = m > math.sqrt(2.0)
    m = torch.where(above, m * 0.5, m)
    e = torch.where(above, e + 1.0, e)
    s = (m - 1.0) / (m + 1.0)
    square = s * s
    series = torch.full_like(s, 1.0 / 23.0)
    for odd in range(21, 0, -2):
        series.mul_(square).add_(1.0 / odd)
    result = (series.mul_(s).mul_(2.0)).add_(e * math.log(2.0))
    return torch.where(x.isfinite(), result, x)
