"""Products of matrices on Hopper's tensor cores: ``left @ right.T`` of fp8, bf16 or fp16, summed as ``linear`` does.

One kernel for all sizes, written in Gluon, where nothing about a sum is left to a compiler. A program is a producer
warp, which has the TMA bring tiles of both operands into a ring in shared memory, and one or two consumers of four
warps, which hand them to wgmma, add up and store. Programs stay and take every ``num_programs``-th tile of the output.

Invariance: a consumer adds k up in ascending order from zero and in no other way: bf16 and fp16 in the tensor core's
fp32 accumulator; fp8 by groups of 128, each started from zero and added to an fp32 sum, with a scale of its own by one
fused multiply-add. The size and shape of a tile, the number of consumers, the side that an operand is on, the order of
tiles and the depth of the ring move data, not sums: the bits are those of ``linear``'s and ``scaled_mm``'s Triton
kernels (measured; tests/gpu). That is why M may choose them (``_hopper.Shape``).

With dependent launch, a program starts while the kernel before still runs, and fills its ring with weights, if those
are known to be there, before it waits for that kernel.

Sources: the ring of full and empty barriers is CUTLASS's pipeline for sm_90; two consumers whose additions overlap the
other's wgmma, and groups of 128, are those of DeepGEMM.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._fast_launch import FastKernel, View
from ._hopper import SIDE, Shape
from ._quantize_jit import FP8_MAX_TL, to_fp8
from ._triton import processors
from .activation import times_sigmoid

__all__ = ["launch"]

STEP_BYTES = 128  # of k in one step, a swizzled row of shared memory: 128 fp8 or 64 bf16 numbers
MOST_SHARED = 227 * 1024
_times_sigmoid, _to_fp8 = gluon.jit(times_sigmoid.fn), gluon.jit(to_fp8.fn)
DTYPES = {torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def _place(tile, lefts, rights, GROUP: gl.constexpr):
    """Tile number ``tile``, in columns of GROUP tiles: those at work at a time share what they read."""
    band = tile // (GROUP * rights)
    size = gl.minimum(lefts - band * GROUP, GROUP)
    within = tile % (GROUP * rights)
    return band * GROUP + within % size, within // size


@gluon.jit
def _load_side(desc, ring, ready, stage, row, apart, k, wanted, COUNT: gl.constexpr):
    """Ask the TMA for an operand's part of a step: COUNT boxes, ``apart`` rows apart. Past the end are zeros."""
    for i in gl.static_range(COUNT):
        tma.async_copy_global_to_shared(desc, [row + i * apart, k], ready, ring.index(stage * COUNT + i), pred=wanted)


@gluon.jit
def _load(
    left_desc, right_desc, left_ring, right_ring, full, empty, lefts, rights, steps, apart,
    CONSUMERS: gl.constexpr, BOXES: gl.constexpr, WIDTH: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, SWAP: gl.constexpr, PDL: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """The producer: one warp."""
    ahead = 0  # steps whose weights were asked for before the kernel before had ended
    if PDL:
        left, right = _place(gl.program_id(0), lefts, rights, GROUP)
        ahead = gl.minimum(steps, STAGES)
        for step in range(ahead):
            ready, k = full.index(step), step * STEP
            mbarrier.expect(ready, BYTES)
            if SWAP:
                _load_side(left_desc, left_ring, ready, step, left * CONSUMERS * 64, apart, k, True, BOXES)
            else:
                _load_side(right_desc, right_ring, ready, step, right * WIDTH, 0, k, True, 1)
        gdc_wait()
    done = 0
    for tile in range(gl.program_id(0), lefts * rights, gl.num_programs(0)):
        left, right = _place(tile, lefts, rights, GROUP)
        for step in range(steps):
            stage, k = done % STAGES, step * STEP
            ready = full.index(stage)
            new = done >= ahead
            mbarrier.wait(empty.index(stage), (done // STAGES & 1) ^ 1)
            mbarrier.expect(ready, BYTES, pred=new)
            _load_side(
                left_desc, left_ring, ready, stage, left * CONSUMERS * 64, apart, k, new if SWAP else True, BOXES
            )
            _load_side(right_desc, right_ring, ready, stage, right * WIDTH, 0, k, True if SWAP else new, 1)
            done += 1


@gluon.jit
def _multiply(
    left_ring, right_ring, full, done, start, accumulate,
    BOX: gl.constexpr, BOXES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Wait for a step's tiles and start their product on the tensor core."""
    stage = done % STAGES
    mbarrier.wait(full.index(stage), done // STAGES & 1)
    left, right = left_ring.index(stage * BOXES + BOX), right_ring.index(stage).permute((1, 0))
    return warpgroup_mma(left, right, start, use_acc=accumulate, is_async=True)


@gluon.jit
def _free(empty, done, STAGES: gl.constexpr):
    """Tell the producer that a step's tiles have been read."""
    mbarrier.arrive(empty.index(done % STAGES), count=1)


@gluon.jit
def _along(ptr, index, stride, size, PER_INDEX: gl.constexpr, AXIS: gl.constexpr):
    """A value for every index, for a tile to be multiplied by; or the one there is."""
    if PER_INDEX:
        values = gl.load(ptr + index.to(gl.int64) * stride, mask=index < size, other=0.0)
    else:
        values = gl.load(ptr)
    return gl.expand_dims(values, AXIS) if PER_INDEX else values


@gluon.jit
def _scale_of_group(
    scale_a_ptr, scale_b_ptr, tokens, num_tokens, group, scale_a_row, scale_a_group, scale_b_group,
    BLOCKS: gl.constexpr, AXIS: gl.constexpr,
):  # fmt: skip
    """What a group's sum is multiplied by, if groups have scales of their own."""
    if BLOCKS:
        scale = _along(scale_a_ptr + group * scale_a_group, tokens, scale_a_row, num_tokens, True, AXIS)
        scale = scale * gl.load(scale_b_ptr + group * scale_b_group)
    else:
        scale = 1.0
    return scale


@gluon.jit
def _add(total, part, scale, BLOCKS: gl.constexpr):
    """A group's sum, times its scale, added to the total."""
    if BLOCKS:
        scale, _ = gl.broadcast(scale, part)
        total = gl.fma(part, scale, total)
    else:
        total += part
    return total


@gluon.jit
def _sum_steps(
    totals, left_ring, right_ring, full, empty, done, scale_a_ptr, scale_b_ptr, tokens, num_tokens, step,
    scale_a_row, scale_a_group, scale_b_group,
    COUNT: gl.constexpr, BOX: gl.constexpr, BOXES: gl.constexpr, STAGES: gl.constexpr, PROMOTE: gl.constexpr,
    BLOCKS: gl.constexpr, AXIS: gl.constexpr,
):  # fmt: skip
    """The totals with COUNT steps more, which are on the tensor core together and added in ascending order.

    A total for each box of a stage from BOX on: one, or those of gates and of factors.
    """
    LAYOUT: gl.constexpr = totals[0].type.layout
    SIDES: gl.constexpr = len(totals)
    if PROMOTE:
        zero = gl.zeros(totals[0].shape, gl.float32, LAYOUT)
        scales = ()
        parts = ()
        for i in gl.static_range(COUNT):
            scale = _scale_of_group(
                scale_a_ptr, scale_b_ptr, tokens, num_tokens, step + i, scale_a_row, scale_a_group, scale_b_group,
                BLOCKS, AXIS,
            )  # fmt: skip
            scales = scales + (scale,)  # type: ignore[assignment]  # noqa: RUF005 - the compiler adds tuples
        for i in gl.static_range(COUNT):
            for side in gl.static_range(SIDES):
                part = _multiply(left_ring, right_ring, full, done + i, zero, False, BOX + side, BOXES, STAGES)
                parts = parts + (part,)  # type: ignore[assignment]  # noqa: RUF005
        for i in gl.static_range(COUNT):
            added = ()
            for side in gl.static_range(SIDES):
                part = warpgroup_mma_wait((COUNT - i) * SIDES - 1 - side, deps=[parts[i * SIDES + side]])
                if side == SIDES - 1:
                    _free(empty, done + i, STAGES)
                added = added + (_add(totals[side], part, scales[i], BLOCKS),)  # type: ignore[assignment]  # noqa: RUF005
            totals = added
    else:
        total = totals[0]
        for i in gl.static_range(COUNT):
            total = _multiply(left_ring, right_ring, full, done + i, total, True, BOX, BOXES, STAGES)
        for i in gl.static_range(COUNT):
            total = warpgroup_mma_wait(COUNT - 1 - i, deps=[total])
            _free(empty, done + i, STAGES)
        totals = (total,)
    return totals


@gluon.jit
def _gated(gate, up, scale_ptr):
    """What ``silu_and_mul_static_fp8_quant`` makes of gates and factors."""
    x = gate.to(gl.float32)
    y = _times_sigmoid(x, x).to(gate.dtype)
    y = (y.to(gl.float32) * up.to(gl.float32)).to(gate.dtype)
    return _to_fp8(y.to(gl.float32) * gl.div_rn(1.0, gl.load(scale_ptr)), FP8_MAX_TL)


@gluon.jit
def _compute(
    WHICH: gl.constexpr, left_ring, right_ring, staging, full, empty, out_desc,
    scale_a_ptr, scale_b_ptr, bias_ptr, gated_scale_ptr, out_ptr, lefts, rights, steps, num_tokens, num_columns,
    scale_a_row, scale_a_group, scale_b_group, scale_b_column,
    CONSUMERS: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    K_OF_WGMMA: gl.constexpr, PROMOTE: gl.constexpr, HAS_SCALES: gl.constexpr, BLOCKS: gl.constexpr,
    PER_TOKEN: gl.constexpr, PER_COLUMN: gl.constexpr, HAS_BIAS: gl.constexpr, SWAP: gl.constexpr, PDL: gl.constexpr,
    BOXES: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Consumer number WHICH: four warps, and 64 rows of a tile; if GATED those of gates and those of factors."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, K_OF_WGMMA])
    TOKEN_AXIS: gl.constexpr = 1 if SWAP else 0
    SCALE: gl.constexpr = HAS_SCALES and not BLOCKS
    SOON: gl.constexpr = WIDTH <= 32 or not (PER_TOKEN or PER_COLUMN)  # where there are registers to hold scales
    FEW: gl.constexpr = WIDTH <= 32 and GATED is None
    TOGETHER: gl.constexpr = 4 if FEW else 2 if PROMOTE else 1  # steps: a wide tile has no registers for more sums
    if PDL:
        gdc_wait()
    done = 0
    for tile in range(gl.program_id(0), lefts * rights, gl.num_programs(0)):
        left, right = _place(tile, lefts, rights, GROUP)
        row = (left * CONSUMERS + WHICH) * 64
        rows = row + gl.arange(0, 64, gl.SliceLayout(1, layout))
        across = right * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
        tokens = across if SWAP else rows
        columns = rows if SWAP else across
        block_ptr = scale_b_ptr + (row if SWAP else right * WIDTH) // 128 * scale_b_column
        if SCALE and SOON:
            scale_a = _along(scale_a_ptr, tokens, scale_a_row, num_tokens, PER_TOKEN, 1 - TOKEN_AXIS)
            scale_b = _along(scale_b_ptr, columns, scale_b_column, num_columns, PER_COLUMN, TOKEN_AXIS)
        total = gl.zeros([64, WIDTH], gl.float32, layout)
        totals = (total,) if GATED is None else (total, total)
        whole = steps // TOGETHER * TOGETHER
        for step in range(0, whole, TOGETHER):
            totals = _sum_steps(
                totals, left_ring, right_ring, full, empty, done, scale_a_ptr, block_ptr, tokens, num_tokens, step,
                scale_a_row, scale_a_group, scale_b_group,
                TOGETHER, WHICH, BOXES, STAGES, PROMOTE, BLOCKS, 1 - TOKEN_AXIS,
            )  # fmt: skip
            done += TOGETHER
        for step in range(whole, steps):
            totals = _sum_steps(
                totals, left_ring, right_ring, full, empty, done, scale_a_ptr, block_ptr, tokens, num_tokens, step,
                scale_a_row, scale_a_group, scale_b_group,
                1, WHICH, BOXES, STAGES, PROMOTE, BLOCKS, 1 - TOKEN_AXIS,
            )  # fmt: skip
            done += 1
        total = totals[0]
        if SCALE:
            if not SOON:
                scale_a = _along(scale_a_ptr, tokens, scale_a_row, num_tokens, PER_TOKEN, 1 - TOKEN_AXIS)
                scale_b = _along(scale_b_ptr, columns, scale_b_column, num_columns, PER_COLUMN, TOKEN_AXIS)
            total = total * scale_b * scale_a
        if HAS_BIAS:
            total += _along(bias_ptr, columns, 1, num_columns, True, TOKEN_AXIS).to(gl.float32)
        if GATED is None:
            out = total.to(out_ptr.dtype.element_ty)
        else:
            up_ptr, up = scale_b_ptr + num_columns * scale_b_column, totals[1]  # type: ignore[misc]
            if SCALE:
                up = up * _along(up_ptr, columns, scale_b_column, num_columns, PER_COLUMN, TOKEN_AXIS) * scale_a
            out = _gated(total.to(GATED), up.to(GATED), gated_scale_ptr)
        if SWAP:
            out_ptrs = out_ptr + tokens.to(gl.int64)[None, :] * num_columns + columns[:, None]
            gl.store(out_ptrs, out, mask=(columns < num_columns)[:, None] & (tokens < num_tokens)[None, :])
        else:
            mine = staging.index(WHICH)
            tma.store_wait(0)  # the tile before has left
            mine.store(out)
            fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [row, right * WIDTH], mine)
    if not SWAP:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tokens", "scale_a_row", "scale_a_group"])
def _product_kernel(
    left_desc, right_desc, out_desc, scale_a_ptr, scale_b_ptr, bias_ptr, gated_scale_ptr, out_ptr,
    num_tokens, num_columns, k, scale_a_row, scale_a_group, scale_b_group, scale_b_column,
    CONSUMERS: gl.constexpr, WIDTH: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, HAS_SCALES: gl.constexpr, BLOCKS: gl.constexpr, PER_TOKEN: gl.constexpr,
    PER_COLUMN: gl.constexpr, HAS_BIAS: gl.constexpr, SWAP: gl.constexpr, PDL: gl.constexpr, GATED: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """``left @ right.T``: left is the tokens and right the weight [N, K], or the other way round if SWAP.

    GATED: None, or the dtype of products of which the first half of the columns gates the second; one consumer, SWAP.
    """
    if PDL:
        gdc_launch_dependents()
    dtype: gl.constexpr = left_desc.dtype
    PROMOTE: gl.constexpr = dtype.is_fp8()
    K_OF_WGMMA: gl.constexpr = STEP // 4
    BOXES: gl.constexpr = CONSUMERS if GATED is None else 2  # of the left in a step, and the rows between them
    apart = 64 if GATED is None else num_columns
    BYTES: gl.constexpr = (BOXES * 64 + WIDTH) * 128
    left_ring = gl.allocate_shared_memory(dtype, [STAGES * BOXES, 64, STEP], left_desc.layout)
    right_ring = gl.allocate_shared_memory(dtype, [STAGES, WIDTH, STEP], right_desc.layout)
    rows: gl.constexpr = out_desc.block_shape[0]
    staged: gl.constexpr = [CONSUMERS, rows, out_desc.block_shape[1]]
    staging = gl.allocate_shared_memory(out_desc.dtype, staged, out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    lefts = gl.cdiv(num_columns if SWAP else num_tokens, CONSUMERS * 64)
    rights = gl.cdiv(num_tokens if SWAP else num_columns, WIDTH)
    steps = gl.cdiv(k, STEP)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_compute, (
                0, left_ring, right_ring, staging, full, empty, out_desc,
                scale_a_ptr, scale_b_ptr, bias_ptr, gated_scale_ptr, out_ptr, lefts, rights, steps, num_tokens,
                num_columns, scale_a_row, scale_a_group, scale_b_group, scale_b_column, CONSUMERS, WIDTH, STAGES, GROUP,
                K_OF_WGMMA, PROMOTE, HAS_SCALES, BLOCKS, PER_TOKEN, PER_COLUMN, HAS_BIAS, SWAP, PDL, BOXES, GATED,
            )),
            (_compute, (
                1, left_ring, right_ring, staging, full, empty, out_desc,
                scale_a_ptr, scale_b_ptr, bias_ptr, gated_scale_ptr, out_ptr, lefts, rights, steps, num_tokens,
                num_columns, scale_a_row, scale_a_group, scale_b_group, scale_b_column, CONSUMERS, WIDTH, STAGES, GROUP,
                K_OF_WGMMA, PROMOTE, HAS_SCALES, BLOCKS, PER_TOKEN, PER_COLUMN, HAS_BIAS, SWAP, PDL, BOXES, GATED,
            )),
            (_load, (
                left_desc, right_desc, left_ring, right_ring, full, empty, lefts, rights, steps, apart,
                CONSUMERS, BOXES, WIDTH, STEP, STAGES, GROUP, SWAP, PDL, BYTES,
            )),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_compute, (
                0, left_ring, right_ring, staging, full, empty, out_desc,
                scale_a_ptr, scale_b_ptr, bias_ptr, gated_scale_ptr, out_ptr, lefts, rights, steps, num_tokens,
                num_columns, scale_a_row, scale_a_group, scale_b_group, scale_b_column, CONSUMERS, WIDTH, STAGES, GROUP,
                K_OF_WGMMA, PROMOTE, HAS_SCALES, BLOCKS, PER_TOKEN, PER_COLUMN, HAS_BIAS, SWAP, PDL, BOXES, GATED,
            )),
            (_load, (
                left_desc, right_desc, left_ring, right_ring, full, empty, lefts, rights, steps, apart,
                CONSUMERS, BOXES, WIDTH, STEP, STAGES, GROUP, SWAP, PDL, BYTES,
            )),
        ], [1], [24])  # fmt: skip


@lru_cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], DTYPES[dtype])


def _view(tensor: torch.Tensor, rows: int, columns: int) -> View:
    return View(tensor, tensor.shape, tensor.stride(), [rows, columns], _layout(rows, columns, tensor.dtype))


def _describe(view: View) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(view.base, view.block_shape, view.layout)


_KERNEL = FastKernel(_product_kernel, _describe)


def stages_for(shape: Shape, staged: int, gated: bool = False) -> int:
    """The depth of the ring beside so many bytes of output to be stored."""
    most = (MOST_SHARED - staged - 1024) // ((shape.height * (1 + gated) + shape.width) * STEP_BYTES)
    return min(shape.stages, most) if shape.stages else most


def registers_for(shape: Shape, gated: bool = False) -> int | None:
    """Of a thread at most, so that several programs of one consumer are beside one another; two have them all."""
    return None if shape.consumers == 2 else 64 if shape.width <= 32 and not gated else 128


def launch(
    tokens: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, shape: Shape,
    scale_a: torch.Tensor | None = None, scale_b: torch.Tensor | None = None, bias: torch.Tensor | None = None,
    blocks: bool = False, static_weights: bool = False, gated: tuple[torch.dtype, torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Write ``tokens [M, K] @ weight [N, K].T``, times its scales, plus a bias, to ``out`` [M, N].

    Args:
        tokens: what ``_hopper.takes``.
        weight: what ``_hopper.takes``.
        out: what ``_hopper.takes``; contiguous if the shape swaps, else its rows may be further apart than N.
        shape: of the tiles.
        scale_a: fp32, [M, groups of k]; any strides, 0 for one scale.
        scale_b: fp32, [groups of k, N], or [groups of k, N / 128] for ``blocks``; any strides.
        bias: [N], contiguous.
        blocks: one scale for 128 by 128 of the weight and for 128 of k of a token.
        static_weights: start while the kernel before still runs, and read weights even then; it must not write them.
        gated: the dtype of products and the fp32 scale of ``out`` [M, N / 2], which is then what
            ``silu_and_mul_static_fp8_quant`` makes of them; for a shape of one consumer that swaps, without a bias.
    """
    (m, k), n = tokens.shape, out.shape[1]
    step = STEP_BYTES // tokens.element_size()
    left, right = (weight, tokens) if shape.swap else (tokens, weight)
    left_desc, right_desc = _view(left, SIDE, step), _view(right, shape.width, step)
    out_desc = right_desc if shape.swap else _view(out, SIDE, shape.width)  # if swapped, nothing is staged
    staged = shape.consumers * math.prod(out_desc.block_shape) * out_desc.base.element_size()
    is_gated = gated is not None
    stages = stages_for(shape, staged, is_gated)
    shared = stages * (shape.height * (1 + is_gated) + shape.width) * STEP_BYTES + staged + 2048
    beside = 1 if shape.consumers == 2 else max(1, MOST_SHARED // shared)
    scales = (out, out) if scale_a is None or scale_b is None else (scale_a, scale_b)  # not read if there are none
    strides = (*scales[0].stride(), *scales[1].stride())
    keywords = {
        "CONSUMERS": shape.consumers, "WIDTH": shape.width, "STEP": step, "STAGES": stages, "GROUP": shape.group,
        "HAS_SCALES": scale_a is not None, "BLOCKS": blocks,
        "PER_TOKEN": scales[0].stride(0) != 0, "PER_COLUMN": scales[1].stride(1) != 0,
        "HAS_BIAS": bias is not None, "SWAP": shape.swap, "PDL": static_weights,
        "GATED": None if gated is None else DTYPES[gated[0]],
        "num_warps": 4, "enable_fp_fusion": False, "maxnreg": registers_for(shape, is_gated),
        **({"launch_pdl": True} if static_weights else {}),
    }  # fmt: skip
    _KERNEL(
        (min(shape.tiles(m, n), processors(tokens.device) * beside),), tokens,
        (left_desc, right_desc, out_desc, *scales, bias, gated and gated[1], out, m, n, k, *strides),
        keywords,
    )  # fmt: skip
    return out
