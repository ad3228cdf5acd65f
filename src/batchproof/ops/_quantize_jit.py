"""The operations of ``_quantize`` on blocks of a kernel, with their bits."""

from __future__ import annotations

from ._quantize import BLOCK_MIN_AMAX, FP8_MAX, FP8_MIN_SCALE, INT8_MAX
from ._triton import INTERPRETED, tl, triton

__all__ = [
    "FP8_MAX_TL",
    "FP8_MIN_SCALE_TL",
    "INT8_MAX_TL",
    "block_scale",
    "magnitude",
    "quotient",
    "to_fp8",
    "to_int8",
]

FP8_MAX_TL, INT8_MAX_TL = tl.constexpr(FP8_MAX), tl.constexpr(INT8_MAX)
FP8_MIN_SCALE_TL, _BLOCK_MIN_AMAX = tl.constexpr(FP8_MIN_SCALE), tl.constexpr(BLOCK_MIN_AMAX)
_ROUNDER = tl.constexpr(1.5 * 2.0**23)  # fp32 values past it have no fractions
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def magnitude(y):
    """|y| in fp32, 0 for NaN."""
    wide = y.to(tl.float32)
    return tl.where(wide == wide, tl.abs(wide), 0.0)


@triton.jit
def quotient(y, scale, BOUNDED: tl.constexpr):
    """``y / scale`` rounded to nearest, in three operations: Markstein's correction of y times the reciprocal.

    It is exact because the reciprocal is rounded to nearest and nothing that matters under- or overflows: |y| is at
    most 448 times the scale, and below 2**-11 of it the result is 0 either way. With a BOUNDED scale |y| may be far
    beyond that, and saturates as it is. An infinite scale makes finite values 0: no remainder of theirs may be taken.
    """
    if _INTERPRETED:  # its fma rounds twice
        quotient = tl.div_rn(y, scale)
    else:
        reciprocal = tl.div_rn(1.0, scale)
        finite = tl.where(scale == float("inf"), 0.0, scale)
        estimate = y * reciprocal
        excess = tl.fma(estimate, finite, -y)
        quotient = tl.fma(excess, -reciprocal, estimate)  # signed so that -0 stays -0
        if BOUNDED:
            quotient = tl.where(tl.abs(estimate) > 2.0 * FP8_MAX_TL, estimate, quotient)
    return quotient


@triton.jit
def to_fp8(y, NAN: tl.constexpr):
    """fp32 as saturating e4m3, NaN as the bound NAN: the GPU's minimum and maximum return the number of the two."""
    if _INTERPRETED:
        y = _on_e4m3_grid(tl.minimum(tl.maximum(tl.where(y == y, y, NAN), -FP8_MAX_TL), FP8_MAX_TL))
    elif NAN > 0:
        y = tl.minimum(y, NAN)
    else:
        y = tl.maximum(y, NAN)
    return y.to(tl.float8e4nv)


@triton.jit
def _on_e4m3_grid(y):
    """fp32 up to 448 rounded to what e4m3 can hold, by adding 1.5 * 2**23 units: the interpreter casts wrongly."""
    exponent = tl.maximum(y.to(tl.int32, bitcast=True) & 0x7F800000, 0x3C800000)
    magic = ((exponent + (20 << 23)) | 0x400000).to(tl.float32, bitcast=True)
    rounded = (y + magic) - magic
    return tl.where(rounded == 0.0, y * 0.0, rounded)  # keeps the sign of zero


@triton.jit
def to_int8(y):
    """fp32 rounded to nearest even and saturated, NaN as 0."""
    y = tl.minimum(tl.maximum(tl.where(y == y, y, 0.0), -128.0), 127.0)
    return ((y + _ROUNDER) - _ROUNDER).to(tl.int8)


@triton.jit
def block_scale(y, axis: tl.constexpr):
    """The scale of every block of columns along ``axis``, kept with size 1."""
    amax = tl.maximum(tl.max(magnitude(y), axis=axis, keep_dims=True), _BLOCK_MIN_AMAX)
    return tl.div_rn(amax, FP8_MAX_TL)
