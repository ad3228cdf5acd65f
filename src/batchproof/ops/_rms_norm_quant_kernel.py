"""The kernel of ``rms_norm_quant`` and its launch: the norm's rows and tree, then the operations of ``_quantize``."""

from __future__ import annotations

import torch

from ._quantize_jit import (
    FP8_MAX_TL,
    FP8_MIN_SCALE_TL,
    INT8_MAX_TL,
    block_scale,
    magnitude,
    quotient,
    to_fp8,
    to_int8,
)
from ._row_launch import CachedKernel, RowVariant, address_rows, row_plan
from ._row_tree import along_rows, load_rows, normalised, row_rstd, rows_of_program, wait_for_inputs
from ._rows import readable
from ._triton import tl, triton

__all__ = ["launch"]

MODES = {"static": 0, "token": 1, "block": 2}
STATIC, TOKEN, BLOCK = (tl.constexpr(number) for number in MODES.values())


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
            largest = tl.maximum(largest, tl.max(tl.reshape(magnitude(y), [ROWS, CHUNK // VEC, VEC]), axis=2))
        amax = along_rows(tl.max(largest, axis=1))
        if INT8:
            scale = tl.div_rn(amax, INT8_MAX_TL)
            factor = tl.div_rn(INT8_MAX_TL, amax)
        else:
            if scale_ptr is not None:
                amax = tl.minimum(amax, tl.load(scale_ptr))
            scale = tl.maximum(tl.div_rn(amax, FP8_MAX_TL), FP8_MIN_SCALE_TL)
        tl.store(scales_ptr + row, scale, mask=row_mask)
    elif MODE == STATIC:
        factor = tl.div_rn(1.0, static_scale)
    for i in tl.static_range(CHUNKS):
        y = normalised(values, weights, source_ptr, weight_ptr, columns, row_mask, rstd, i, HIDDEN, CHUNK, GEMMA).to(
            tl.float32
        )
        if MODE == STATIC:
            out = to_fp8(y * factor, FP8_MAX_TL)
        elif DIMS == 3:
            scale = block_scale(y, 2)
            number = i * BLOCKS + tl.arange(0, BLOCKS)[None, :, None]
            blocks_ptr = scales_ptr + row.to(tl.int64) * (HIDDEN // GROUP) + number
            tl.store(blocks_ptr, scale, mask=number < HIDDEN // GROUP)
            out = to_fp8(quotient(y, scale, False), -FP8_MAX_TL)
        elif MODE == BLOCK:
            scale = tl.full(y.shape, 1.0, tl.float32)
            for number in tl.static_range(HIDDEN // GROUP):
                in_block = columns // GROUP == number
                its_scale = block_scale(tl.where(in_block, y, 0.0), 1)
                tl.store(scales_ptr + row.to(tl.int64) * (HIDDEN // GROUP) + number, its_scale, mask=row_mask)
                scale = tl.where(in_block, its_scale, scale)
            out = to_fp8(quotient(y, scale, False), -FP8_MAX_TL)
        elif INT8:
            out = to_int8(y * factor)
        else:
            out = to_fp8(quotient(y, scale, scale_ptr is not None), FP8_MAX_TL)
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
