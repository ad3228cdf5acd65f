"""The kernel of ``rms_norm_quant`` and its launch: the norm's rows and tree, then the operations of ``_quantize``."""

from __future__ import annotations

import torch

from ._quantize import BLOCK_MIN_AMAX, FP8_MAX, FP8_MIN_SCALE, INT8_MAX
from ._row_launch import CachedKernel, RowVariant, address_rows, row_plan
from ._row_tree import along_rows, load_rows, normalised, row_rstd, rows_of_program, wait_for_inputs
from ._rows import readable
from ._triton import INTERPRETED, tl, triton

__all__ = ["launch"]

MODES = {"static": 0, "token": 1, "block": 2}
STATIC, TOKEN, BLOCK = (tl.constexpr(number) for number in MODES.values())
_FP8_MAX, _INT8_MAX = tl.constexpr(FP8_MAX), tl.constexpr(INT8_MAX)
_FP8_MIN_SCALE, _BLOCK_MIN_AMAX = tl.constexpr(FP8_MIN_SCALE), tl.constexpr(BLOCK_MIN_AMAX)
_ROUNDER = tl.constexpr(1.5 * 2.0**23)  # fp32 values past it have no fractions
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _magnitude(y):
    """|y| in fp32, 0 for NaN."""
    wide = y.to(tl.float32)
    return tl.where(wide == wide, tl.abs(wide), 0.0)


@triton.jit
def _quotient(y, scale, BOUNDED: tl.constexpr):
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
            quotient = tl.where(tl.abs(estimate) > 2.0 * _FP8_MAX, estimate, quotient)
    return quotient


@triton.jit
def _to_fp8(y, NAN: tl.constexpr):
    """fp32 as saturating e4m3, NaN as the bound NAN: the GPU's minimum and maximum return the number of the two."""
    if _INTERPRETED:
        y = _on_e4m3_grid(tl.minimum(tl.maximum(tl.where(y == y, y, NAN), -_FP8_MAX), _FP8_MAX))
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
def _to_int8(y):
    """fp32 rounded to nearest even and saturated, NaN as 0."""
    y = tl.minimum(tl.maximum(tl.where(y == y, y, 0.0), -128.0), 127.0)
    return ((y + _ROUNDER) - _ROUNDER).to(tl.int8)


@triton.jit
def _block_scale(y, axis: tl.constexpr):
    """The scale of every block of columns along ``axis``, kept with size 1."""
    amax = tl.maximum(tl.max(_magnitude(y), axis=axis, keep_dims=True), _BLOCK_MIN_AMAX)
    return tl.div_rn(amax, _FP8_MAX)


@triton.jit(
    do_not_specialize=["num_rows", "num_inner", "eps"]
    + [f"{tensor}_{axis}" for tensor in ("x", "residual", "residual_out") for axis in ("outer", "inner")]
)
def _rms_norm_quant_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, residual_out_ptr, scale_ptr, scales_ptr,
    x_outer: tl.int64, x_inner: tl.int64, residual_outer: tl.int64, residual_inner: tl.int64,
    residual_out_outer: tl.int64, residual_out_inner: tl.int64,
    num_rows: tl.int32, num_inner: tl.int32, eps: tl.float64,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_2: tl.constexpr,
    VEC: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    AHEAD: tl.constexpr, HOLD: tl.constexpr, LATE: tl.constexpr, GEMMA: tl.constexpr, FLAT: tl.constexpr,
    MODE: tl.constexpr, INT8: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows of HIDDEN elements, as ``_rms_norm_kernel`` takes them, GROUP columns a scale; packed out, scales."""
    BLOCKS: tl.constexpr = CHUNK // GROUP
    DIMS: tl.constexpr = 3 if MODE == BLOCK and ROWS == 1 else 2
    row, row_mask, outer, inner = rows_of_program(num_rows, num_inner, ROWS, FLAT)
    columns = tl.arange(0, CHUNK)[None, :]
    if DIMS == 3:  # [1, BLOCKS, GROUP]: blocks are an axis from the start, for rows laid out anew would be summed anew
        row, outer, inner = row[:, :, None], outer[:, :, None], inner[:, :, None]
        columns = tl.arange(0, BLOCKS)[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    x_ptr += (outer * x_outer + inner * x_inner) * ALIGN
    out_ptr += row.to(tl.int64) * HIDDEN
    source_ptr = x_ptr
    if residual_ptr is not None:
        residual_ptr += (outer * residual_outer + inner * residual_inner) * ALIGN
        residual_out_ptr += (outer * residual_out_outer + inner * residual_out_inner) * ALIGN
        source_ptr = residual_out_ptr

    wait_for_inputs(PDL)
    if MODE == STATIC:
        static_scale = tl.load(scale_ptr)  # on its way while the row is
    values, weights, parts = load_rows(
        x_ptr, residual_ptr, residual_out_ptr, weight_ptr, columns, row_mask,
        HIDDEN, CHUNK, CHUNKS, VEC, ACC, AHEAD, HOLD, LATE, PDL,
    )  # fmt: skip
    rstd = along_rows(row_rstd(parts, eps, HIDDEN, CHUNKS_2))
    if not HOLD:
        tl.debug_barrier()  # what is read back below may have been written by another thread

    if MODE == TOKEN:
        largest = tl.zeros([ROWS, CHUNK // VEC], tl.float32)
        for i in tl.static_range(CHUNKS):
            y = normalised(values, weights, source_ptr, weight_ptr, columns, row_mask, rstd, i, HIDDEN, CHUNK, GEMMA)
            largest = tl.maximum(largest, tl.max(tl.reshape(_magnitude(y), [ROWS, CHUNK // VEC, VEC]), axis=2))
        amax = along_rows(tl.max(largest, axis=1))
        if INT8:
            scale = tl.div_rn(amax, _INT8_MAX)
            factor = tl.div_rn(_INT8_MAX, amax)
        else:
            if scale_ptr is not None:
                amax = tl.minimum(amax, tl.load(scale_ptr))
            scale = tl.maximum(tl.div_rn(amax, _FP8_MAX), _FP8_MIN_SCALE)
        tl.store(scales_ptr + row, scale, mask=row_mask)
    elif MODE == STATIC:
        factor = tl.div_rn(1.0, static_scale)
    for i in tl.static_range(CHUNKS):
        y = normalised(values, weights, source_ptr, weight_ptr, columns, row_mask, rstd, i, HIDDEN, CHUNK, GEMMA).to(
            tl.float32
        )
        if MODE == STATIC:
            out = _to_fp8(y * factor, _FP8_MAX)
        elif DIMS == 3:
            scale = _block_scale(y, 2)
            number = i * BLOCKS + tl.arange(0, BLOCKS)[None, :, None]
            blocks_ptr = scales_ptr + row.to(tl.int64) * (HIDDEN // GROUP) + number
            tl.store(blocks_ptr, scale, mask=number < HIDDEN // GROUP)
            out = _to_fp8(_quotient(y, scale, False), -_FP8_MAX)
        elif MODE == BLOCK:
            scale = tl.full(y.shape, 1.0, tl.float32)
            for number in tl.static_range(HIDDEN // GROUP):
                in_block = columns // GROUP == number
                its_scale = _block_scale(tl.where(in_block, y, 0.0), 1)
                tl.store(scales_ptr + row.to(tl.int64) * (HIDDEN // GROUP) + number, its_scale, mask=row_mask)
                scale = tl.where(in_block, its_scale, scale)
            out = _to_fp8(_quotient(y, scale, False), -_FP8_MAX)
        elif INT8:
            out = _to_int8(y * factor)
        else:
            out = _to_fp8(_quotient(y, scale, scale_ptr is not None), _FP8_MAX)
        at = i * CHUNK + columns
        tl.store(out_ptr + at, out, mask=(at < HIDDEN) & row_mask)


_KERNEL = CachedKernel(_rms_norm_quant_kernel)


def launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    out: torch.Tensor,
    residual_out: torch.Tensor | None,
    scale: torch.Tensor | None,
    scales: torch.Tensor | None,
    scale_ub: torch.Tensor | None,
    eps: float,
    gemma: bool,
    mode: str,
    group_size: int,
    variant: RowVariant | None = None,
) -> None:
    """Run the kernel on checked tensors, x and residual of any strides, the others contiguous.

    ``mode`` is "static", with one fp32 element ``scale`` and no ``scales``; "token", with fp32 ``scales`` [..., 1], and
    with fp8 perhaps one fp32 element ``scale_ub``; or "block", with fp32 ``scales`` [..., hidden_size / group_size].
    ``out`` is float8_e4m3fn, or int8 in mode "token". ``weight`` and ``scale`` may have any strides. ``variant`` is
    the plan's for the number of rows unless it is given: the bits are the same.
    """
    if x.numel() == 0:
        return
    plan = row_plan(x.shape[-1], x.dtype, "static" if mode == "static" else "dynamic")
    rows = address_rows(plan, (x, residual), (residual_out,))
    variant = variant or plan.variant(rows.num_rows)
    constants = plan.constants(variant)
    source, added, total = rows.tensors
    flat, int8 = rows.num_inner == 1, out.dtype == torch.int8
    bound = scale if mode == "static" else scale_ub
    scale = None if bound is None else readable(bound.reshape(1), 1)
    _KERNEL(
        (plan, variant, residual is None, weight is None, scale is None, gemma, flat, mode, int8, group_size),
        -(-rows.num_rows // plan.rows),
        x,
        (
            source, added, readable(weight, 1), out, total, scale, scales,
            *rows.strides, rows.num_rows, rows.num_inner, eps,
        ),
        (*constants, gemma, flat, MODES[mode], int8, group_size if mode == "block" else constants[2]),
        variant.warps,
    )  # fmt: skip
