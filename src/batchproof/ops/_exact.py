"""CPU arithmetic whose result cannot depend on the order of the sum, because every partial sum is exact.

A CPU BLAS chooses its blocking, its threads and its tail code by the number of rows, and says nothing about the
order in which it adds. So the CPU implementations do not try to pin that order: they make it irrelevant. Each row is
rounded to multiples of a power of two, its unit, so coarse that products and partial sums are multiples of one unit
below 2**53 of it. There float64 addition is exact, and therefore associative: whatever order the library takes, with
or without FMA, on however many threads, the bits are the same. Rounding the operands is the only error, and it is a
function of the row or column alone: at most 2**-22 of its largest value for 16-bit dtypes, which is nothing for values
within 2**11 (fp16) or 2**13 (bf16) of it, and 2**-28 for fp32. This is the first step of Ozaki's error-free
transformation of matrix products (Ozaki, Ogita, Oishi, Rump, Numer. Algorithms 59, 2012).

``exp`` and ``log`` are here for the same reason: libm's vector and tail code may differ in the last bit, so they are
written in additions, multiplications and divisions, which IEEE 754 defines to the bit.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import torch

__all__ = [
    "Packed",
    "exact_matmul",
    "exact_sum",
    "exp",
    "exp_float64",
    "log",
    "matmul_packed",
    "pack",
    "round_rows",
    "rounded_to",
]

CHUNK = 1024  # K per exact product; longer sums are added chunk by chunk in ascending k
# Bits kept of the left and the right operand; with the 10 bits of CHUNK they sum to 53. For fp32 the left operand
# is cut in two slices of that many bits, and so has 32.
NARROW_BITS = (22, 21)
WIDE_BITS = (16, 27)
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


def power_of_two_above(largest: torch.Tensor) -> torch.Tensor:
    """The smallest power of two above each float64 value that is not negative; 2**-400 at least, inf for inf, NaN."""
    return (largest.clamp_min(2.0**-401).view(torch.int64) & _EXPONENT_MASK).view(torch.float64) * 2.0


def round_rows(x: torch.Tensor, above: torch.Tensor, bits: int) -> torch.Tensor:
    """``x`` rounded to multiples of ``above * 2**-bits``, for powers of two ``above`` that exceed its |values|.

    Adding 1.5 * 2**52 units leaves no room for fractions of one; taking it away again is exact.
    """
    magic = _magic(above, bits)
    return (x + magic).sub_(magic)


def round_rows_(x: torch.Tensor, above: torch.Tensor, bits: int) -> torch.Tensor:
    """``round_rows`` in place; rows whose ``above`` is 0 stay as they are."""
    magic = _magic(above, bits)
    return x.add_(magic).sub_(magic)


def _magic(above: torch.Tensor, bits: int) -> torch.Tensor:
    return above * (1.5 * 2.0 ** (52 - bits))


def _all_finite(largest: torch.Tensor) -> bool:
    """Whether every largest |value| is finite; float64 sums of fp32 values cannot overflow."""
    return math.isfinite(largest.sum().item())


def canonical_nan(x: torch.Tensor) -> torch.Tensor:
    """``x`` with one bit pattern for every NaN: which operand's payload survives depends on the order of a sum."""
    return torch.where(x.isnan(), torch.full_like(x, math.nan), x)


def rounded_to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` in ``dtype``, NaN with one bit pattern: torch's vector and tail code disagree on the one they write."""
    y = x.to(dtype)
    if math.isnan(x.sum().item()):  # one pass where there is no NaN, which is nearly always
        y.masked_fill_(x.isnan(), math.nan)
    return y


def exact_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum of float64 ``x`` over its last axis: exact sums of CHUNK elements, then of those sums, and so on.

    Each element is rounded to 42 bits below the largest of its chunk. Rows with an infinity or NaN give what IEEE
    addition gives. A zero sum is +0.
    """
    while x.shape[-1] > CHUNK:
        padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % CHUNK))
        x = _exact_chunk_sum(padded.unflatten(-1, (-1, CHUNK)))
    return _exact_chunk_sum(x)


def _exact_chunk_sum(x: torch.Tensor) -> torch.Tensor:
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1])
    largest = x.abs().amax(-1, keepdim=True)
    total = round_rows(x, power_of_two_above(largest), 42).sum(-1) + 0.0  # + 0.0: a sum's zero may start as -0
    if not math.isfinite(total.sum().item()):
        largest = largest.squeeze(-1)
        total = torch.where(largest.isfinite(), total, canonical_nan(x.sum(-1)))
    return total


@dataclass(frozen=True)
class Packed:
    """A right operand [..., K, N], each column of at most CHUNK of K rounded to ``bits[1]`` bits: float64 chunks."""

    chunks: tuple[torch.Tensor, ...]
    bits: tuple[int, int]
    finite: bool


def bits_for(operand: torch.Tensor) -> tuple[int, int]:
    """The bits of a left and a right operand of this dtype."""
    return NARROW_BITS if operand.element_size() == 2 else WIDE_BITS


def pack(b: torch.Tensor) -> Packed:
    """Make ``b`` [..., K, N] the right operand of exact products with operands of its dtype."""
    chunks, finite = [], True
    for chunk in b.split(CHUNK, dim=-2):
        wide = chunk.double()
        largest = wide.abs().amax(-2, keepdim=True)
        rounded = round_rows(wide, power_of_two_above(largest), bits_for(b)[1])
        if not _all_finite(largest):
            finite = False
            rounded = torch.where(largest.isfinite(), rounded, wide)
        chunks.append(rounded)
    return Packed(tuple(chunks), bits_for(b), finite)


def exact_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` in float64 for a [..., M, K] and b [..., K, N] of one floating dtype.

    Invariance: an output element depends on its row of ``a`` and its column of ``b`` alone; see the module docstring.
    """
    return matmul_packed(a, pack(b))


def matmul_packed(a: torch.Tensor, b: Packed, weights: torch.Tensor | None = None) -> torch.Tensor:
    """``a @ b`` in float64 for a [..., M, K]; chunks of K are added in ascending order. A zero is +0.

    ``weights`` [..., 1, K] are powers of two: row k of ``b`` is exact in multiples of ``weights[k]`` times a unit that
    all rows share, and ``a`` is rounded accordingly. None if ``b`` is rounded by columns, as ``pack`` does.
    """
    out: torch.Tensor | None = None
    for number, chunk in enumerate(b.chunks):
        columns = slice(number * CHUNK, (number + 1) * CHUNK)
        scale = None if weights is None else weights[..., columns]
        product = _chunk_product(a[..., columns], chunk, b, scale)
        out = product if out is None else out.add_(product)
    assert out is not None
    return out.add_(0.0)  # the sign of a zero would depend on how the library starts its sum


def _chunk_product(a: torch.Tensor, b: torch.Tensor, packed: Packed, weights: torch.Tensor | None) -> torch.Tensor:
    m = a.shape[-2]
    if m == 0 or a.shape[-1] == 0:
        shape = (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), m, b.shape[-1])
        return torch.zeros(shape, dtype=torch.float64)
    a = a.double() if weights is None else a.double() * weights
    largest = a.abs().amax(-1, keepdim=True)
    above = power_of_two_above(largest)
    left = round_rows(a, above, packed.bits[0])
    if packed.bits == WIDE_BITS:  # what the first slice rounded away
        left = torch.cat((left, round_rows(a - left, above * 2.0 ** -packed.bits[0], packed.bits[0])), dim=-2)
    out = _product(left if weights is None else left / weights, b)
    if packed.bits == WIDE_BITS:
        out = out[..., :m, :] + out[..., m:, :]
    return out if packed.finite and _all_finite(largest) else _with_non_finite(out, a, b)


def _with_non_finite(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``out`` with the rows of ``a`` and the columns of ``b`` that are not finite as IEEE arithmetic has them.

    Every product in such a row or column is summed with an infinity or NaN, so the sum is +inf, -inf or NaN
    in whatever order it is taken.
    """
    rows = ~a.isfinite().all(-1, keepdim=True)
    columns = ~b.isfinite().all(-2, keepdim=True)
    return torch.where(rows | columns, canonical_nan(_product(a, b)), out)


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
