"""Prefill on Hopper: ``paged_attention`` of many queries, by wgmma and the TMA, with the bits of ``attention_kernel``.

One program has 128 or 192 query rows (tokens times query heads of one key head) of a sequence. A producer warp has the
TMA bring keys and values, page by page, into rings in shared memory; two or three consumers of four warps have 64 rows
each. They take turns at the tensor core: while it has one's values and next scores, the others compute their softmax.

Invariance: the order of keys, splits and tiles, and every formula, are those of ``_attention_kernels._walk``, and the
products' bits do not depend on the instruction. Values are multiplied as they are. Where a total is infinite or NaN,
its consumer says so in ``odd``, and what it wrote is to be computed again by ``attention_kernel``, which gives every
row only what it sees: past a sequence's end a page may hold anything.

Source: Shah et al., FlashAttention-3, 2024 (one warp that loads, groups that take turns).
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

from ._fast_launch import FastKernel, View
from ._quantize import FP8_MAX

__all__ = ["HEAD_DIMS", "launch", "places_for", "prefill_kernel"]

HEAD_DIMS = (64, 128)
STAGES = {2: 3, 3: 2}  # tiles of keys, and of values, in flight, by the number of consumers
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
PAGE = 16  # a page has a multiple of so many keys, which the TMA brings at once
BOX = gl.constexpr(PAGE)
COLUMNS = gl.constexpr(64)  # of them: 128 bytes, the width of the swizzle
SIDE = gl.constexpr(64)  # rows of a wgmma
LOG2_E = gl.constexpr(1.4426950408889634)
MOST = gl.constexpr(FP8_MAX)


@gluon.jit
def _pages(pages_ptr, tile, begin, end, PAGE_SIZE: gl.constexpr, BOXES: gl.constexpr):
    """The pages of a tile's boxes, where there are keys that a row sees; elsewhere there may be no page."""
    pages = ()
    for i in gl.static_range(BOXES):
        seen = gl.maximum(gl.minimum(tile + i * BOX, end - 1), begin)
        page = gl.load(pages_ptr + seen // PAGE_SIZE, mask=tile < end, other=0).to(gl.int32)
        pages = pages + (page,)  # type: ignore[assignment]  # noqa: RUF005 - the compiler adds tuples
    return pages


@gluon.jit
def _load(
    k_desc, v_desc, k_ring, v_ring, k_full, v_full, k_empty, v_empty, pages_ptr, begin, end, kv_head,
    page_rows, head_rows, head_columns,
    TILE: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    """The producer: one warp that fills the rings, tile by tile."""
    BOXES: gl.constexpr = TILE // BOX
    PARTS: gl.constexpr = HEAD_DIM // COLUMNS
    done = 0
    start = begin // TILE * TILE
    pages = _pages(pages_ptr, start, begin, end, PAGE_SIZE, BOXES)
    for tile in range(start, end, TILE):
        stage = done % STAGES
        phase = (done // STAGES & 1) ^ 1
        next_pages = _pages(pages_ptr, tile + TILE, begin, end, PAGE_SIZE, BOXES)  # asked for before they are needed
        for values in gl.static_range(2):
            full = v_full if values else k_full
            empty = v_empty if values else k_empty
            ring = v_ring if values else k_ring
            desc = v_desc if values else k_desc
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), TILE * HEAD_DIM * 2)
            for i in gl.static_range(BOXES):
                row = pages[i] * page_rows + kv_head * head_rows + (tile + i * BOX) % PAGE_SIZE
                for part in gl.static_range(PARTS):
                    box = ring.index((stage * PARTS + part) * BOXES + i)
                    column = kv_head * head_columns + part * COLUMNS
                    tma.async_copy_global_to_shared(desc, [row, column], full.index(stage), box)
        pages = next_pages
        done += 1  # noqa: SIM113 - the compiler knows no enumerate


@gluon.jit
def _merge(largest, normaliser, total, right_largest, right_normaliser, right_total):
    """Two splits' results as one."""
    ROW: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    new_largest = gl.maximum(largest, right_largest)
    base = gl.where(new_largest == float("-inf"), 0.0, new_largest)
    left, right = gl.exp2(largest - base), gl.exp2(right_largest - base)
    normaliser = normaliser * left + right_normaliser * right
    left_of_row = gl.expand_dims(gl.convert_layout(left, ROW), 1)
    right_of_row = gl.expand_dims(gl.convert_layout(right, ROW), 1)
    return new_largest, normaliser, total * left_of_row + right_total * right_of_row


@gluon.jit
def _attend(
    WHICH: gl.constexpr, q_tiles, merged_tiles, k_ring, v_ring, ones, turns, k_full, v_full, k_empty, v_empty,
    q_ptr, out_ptr, odd_ptr, sinks_ptr, out_scale_ptr, first, num_queries, start_token, oldest, begin, end, kv_head,
    program, q_token, q_head, softmax_scale, softcap, window,
    CONSUMERS: gl.constexpr, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, GROUP_PADDED: gl.constexpr,
    HEAD_DIM: gl.constexpr, TILE: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_WINDOW: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Consumer number WHICH: four warps, and SIDE rows.

    It has the tensor core in turn with the others, for a tile's values and the next one's scores.
    """
    dtype: gl.constexpr = k_ring.dtype
    BOXES: gl.constexpr = TILE // BOX * (HEAD_DIM // COLUMNS)
    TILE_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, HEAD_DIM], dtype)
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    TOTAL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    SCORE: gl.constexpr = gl.SliceLayout(1, SCORES)
    ROW: gl.constexpr = gl.SliceLayout(1, TOTAL)

    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    rows = WHICH * SIDE + gl.arange(0, SIDE, gl.SliceLayout(1, load_layout))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, load_layout))
    token = start_token + rows // GROUP_PADDED
    mask = (token < num_queries) & (rows % GROUP_PADDED < GROUP)
    offsets = (first + token).to(gl.int64) * q_token + (kv_head * GROUP + rows % GROUP_PADDED) * q_head
    q = q_tiles.index(WHICH)
    q.store(gl.load(q_ptr + offsets[:, None] + dims[None, :], mask=mask[:, None], other=0.0))
    fence_async_shared()

    of_score = WHICH * SIDE + gl.arange(0, SIDE, SCORE)
    at = oldest + start_token + of_score // GROUP_PADDED
    oldest_at = oldest + start_token + WHICH * SIDE // GROUP_PADDED
    newest_at = oldest_at + (SIDE - 1) // GROUP_PADDED
    keys_of_tile = gl.arange(0, TILE, gl.SliceLayout(0, SCORES))
    no_scores = gl.zeros([SIDE, TILE], gl.float32, SCORES)
    no_sums = gl.zeros([SIDE, 8], gl.float32, SUMS)
    nothing = gl.full([SIDE], float("-inf"), gl.float32, SCORE)
    zeros = gl.zeros([SIDE], gl.float32, SCORE)
    empty = gl.zeros([SIDE, HEAD_DIM], gl.float32, TOTAL)
    merged = merged_tiles.index(WHICH)
    merged.store(empty)
    merged_largest, merged_normaliser = nothing, zeros
    largest, normaliser, total = nothing, zeros, empty
    some = begin // TILE * TILE < end
    mbarrier.wait(k_full.index(0), 0, pred=some)
    k = k_ring.index(0)._reinterpret(dtype, [TILE, HEAD_DIM], TILE_LAYOUT)
    scores = warpgroup_mma(q, k.permute((1, 0)), no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(0), count=1, pred=some)
    done = 0
    for tile in range(begin // TILE * TILE, end, TILE):
        if (tile % SPLIT == 0) & (tile > begin):
            merged_largest, merged_normaliser, total = _merge(
                merged_largest, merged_normaliser, merged.load(TOTAL), largest, normaliser, total
            )
            merged.store(total)
            largest, normaliser, total = nothing, zeros, empty
        if HAS_SOFTCAP:
            capped = 1.0 - 2.0 / (gl.exp(2.0 * ((scores * softmax_scale) / softcap)) + 1.0)
            scores = softcap * capped * LOG2_E
        else:
            scores = scores * (softmax_scale * LOG2_E)
        edge = (tile < begin) | (tile + TILE > end)  # else all rows see all keys
        if CAUSAL:
            edge |= tile + TILE - 1 > oldest_at
        if HAS_WINDOW:
            edge |= newest_at - tile >= window
        if edge:
            keys = tile + keys_of_tile
            visible = ((keys >= begin) & (keys < end))[None, :] & (at == at)[:, None]
            if CAUSAL:
                visible &= keys[None, :] <= at[:, None]
            if HAS_WINDOW:
                visible &= at[:, None] - keys[None, :] < window
            scores = gl.where(visible, scores, float("-inf"))
        new_largest = gl.maximum(largest, gl.max(scores, axis=1))
        base = gl.where(new_largest == float("-inf"), 0.0, new_largest)
        rescale = gl.exp2(largest - base)
        weights = gl.exp2(scores - base[:, None]).to(dtype)
        of_sums = gl.convert_layout(weights, gl.DotOperandLayout(0, SUMS, 2))
        of_total = gl.convert_layout(weights, gl.DotOperandLayout(0, TOTAL, 2))
        total = total * gl.expand_dims(gl.convert_layout(rescale, ROW), 1)
        stage, next_stage = done % STAGES, (done + 1) % STAGES
        more = tile + TILE < end  # else the next scores are of anything, and not used
        mbarrier.wait(v_full.index(stage), done // STAGES & 1)
        v = v_ring.index(stage * BOXES)._reinterpret(dtype, [TILE, HEAD_DIM], TILE_LAYOUT)
        mbarrier.wait(turns.index(WHICH), (done & 1) ^ (1 if WHICH == 0 else 0))
        sums = warpgroup_mma(of_sums, ones.permute((1, 0)), no_sums, use_acc=False, is_async=True)
        total = warpgroup_mma(of_total, v, total, is_async=True)
        mbarrier.wait(k_full.index(next_stage), (done + 1) // STAGES & 1, pred=more)
        k = k_ring.index(next_stage * BOXES)._reinterpret(dtype, [TILE, HEAD_DIM], TILE_LAYOUT)
        scores = warpgroup_mma(q, k.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        mbarrier.arrive(turns.index((WHICH + 1) % CONSUMERS), count=1)
        sums = warpgroup_mma_wait(2, deps=[sums])
        normaliser = normaliser * rescale + gl.convert_layout(gl.max(sums, axis=1), SCORE)
        total = warpgroup_mma_wait(1, deps=[total])
        mbarrier.arrive(v_empty.index(stage), count=1)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_empty.index(next_stage), count=1, pred=more)
        largest = new_largest
        done += 1  # noqa: SIM113 - the compiler knows no enumerate

    largest, normaliser, total = _merge(
        merged_largest, merged_normaliser, merged.load(TOTAL), largest, normaliser, total
    )  # fmt: skip
    if sinks_ptr is not None:
        known = gl.minimum(kv_head * GROUP + of_score % GROUP_PADDED, NUM_HEADS - 1)  # a padding row takes another's
        sink = gl.load(sinks_ptr + known).to(gl.float32) * LOG2_E
        one = gl.full([SIDE], 1.0, gl.float32, SCORE)
        largest, normaliser, total = _merge(largest, normaliser, total, sink, one, empty)
    divisor = gl.where(normaliser == 0.0, 1.0, normaliser)
    mean = (total + 0.0) / gl.expand_dims(gl.convert_layout(divisor, ROW), 1)
    finite = gl.min(gl.min((gl.abs(total) < float("inf")).to(gl.int32), axis=1), axis=0)
    gl.store(odd_ptr + program * CONSUMERS + WHICH, 1 - finite)

    rows = WHICH * SIDE + gl.arange(0, SIDE, ROW)
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, TOTAL))
    token = start_token + rows // GROUP_PADDED
    mask = (token < num_queries) & (rows % GROUP_PADDED < GROUP)
    row = (first + token).to(gl.int64) * NUM_HEADS + kv_head * GROUP + rows % GROUP_PADDED
    out_ptrs = out_ptr + row[:, None] * HEAD_DIM + dims[None, :]
    mean = mean.to(dtype)
    if out_scale_ptr is not None:  # as _quantize_jit.to_fp8 does it: NaN becomes MOST, and the cast saturates
        mean = gl.minimum(mean.to(gl.float32) * gl.div_rn(1.0, gl.load(out_scale_ptr)), MOST).to(gl.float8e4nv)
    gl.store(out_ptrs, mean, mask=mask[:, None])


@gluon.jit(do_not_specialize=["table_row", "softmax_scale", "softcap", "window"])
def prefill_kernel(
    k_desc, v_desc, q_ptr, out_ptr, odd_ptr, sinks_ptr, out_scale_ptr,
    cu_seqlens_q_ptr, seqused_k_ptr, block_table_ptr, q_token, q_head, table_row, page_rows, head_rows, head_columns,
    softmax_scale: gl.float32, softcap: gl.float32, window, CONSUMERS: gl.constexpr,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, GROUP_PADDED: gl.constexpr, HEAD_DIM: gl.constexpr,
    TILE: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr, PAGE_SIZE: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_WINDOW: gl.constexpr, HAS_SOFTCAP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """The consumers' rows of one sequence and key head: row r is token r // GROUP_PADDED, head r % GROUP_PADDED.

    ``odd`` [programs, CONSUMERS]: whether a consumer's total is infinite or NaN somewhere; not written where its
    program has no query.
    """
    sequence = gl.program_id(0)
    kv_head = gl.program_id(1)
    blocks = gl.num_programs(2)
    block = blocks - 1 - gl.program_id(2)  # the last, which see the most, begin first
    program = (sequence * gl.num_programs(1) + kv_head) * blocks + block
    first = gl.load(cu_seqlens_q_ptr + sequence).to(gl.int32)
    num_queries = gl.load(cu_seqlens_q_ptr + sequence + 1).to(gl.int32) - first
    key_end = gl.load(seqused_k_ptr + sequence).to(gl.int32)
    TOKENS: gl.constexpr = CONSUMERS * SIDE // GROUP_PADDED
    start_token = block * TOKENS
    if start_token < num_queries:
        oldest = key_end - num_queries  # the position of the sequence's first query
        begin = gl.maximum(oldest + start_token - window + 1, 0) if HAS_WINDOW else 0
        end = gl.minimum(oldest + start_token + TOKENS, key_end) if CAUSAL else key_end
        dtype: gl.constexpr = k_desc.dtype
        BOXES: gl.constexpr = TILE // BOX * (HEAD_DIM // COLUMNS)
        Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, HEAD_DIM], dtype)
        ONES_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, TILE], dtype)
        q_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, SIDE, HEAD_DIM], Q_LAYOUT)
        MERGED: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
        merged_tiles = gl.allocate_shared_memory(gl.float32, [CONSUMERS, SIDE, HEAD_DIM], MERGED)
        k_ring = gl.allocate_shared_memory(dtype, [STAGES * BOXES, BOX, COLUMNS], k_desc.layout)
        v_ring = gl.allocate_shared_memory(dtype, [STAGES * BOXES, BOX, COLUMNS], v_desc.layout)
        ones = gl.allocate_shared_memory(dtype, [8, TILE], ONES_LAYOUT)
        ones.store(gl.full([8, TILE], 1.0, dtype, gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])))
        fence_async_shared()
        turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
        k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(CONSUMERS):
            mbarrier.init(turns.index(i), count=1)
        for i in gl.static_range(STAGES):
            mbarrier.init(k_full.index(i), count=1)
            mbarrier.init(v_full.index(i), count=1)
            mbarrier.init(k_empty.index(i), count=CONSUMERS)
            mbarrier.init(v_empty.index(i), count=CONSUMERS)
        pages_ptr = block_table_ptr + sequence.to(gl.int64) * table_row
        if CONSUMERS == 3:
            gl.warp_specialize([
                (_attend, (
                    0, q_tiles, merged_tiles, k_ring, v_ring, ones, turns, k_full, v_full, k_empty, v_empty,
                    q_ptr, out_ptr, odd_ptr, sinks_ptr, out_scale_ptr, first, num_queries, start_token, oldest, begin,
                    end, kv_head, program, q_token, q_head, softmax_scale, softcap, window, CONSUMERS, NUM_HEADS, GROUP,
                    GROUP_PADDED, HEAD_DIM, TILE, SPLIT, STAGES, CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
                )),
                (_attend, (
                    1, q_tiles, merged_tiles, k_ring, v_ring, ones, turns, k_full, v_full, k_empty, v_empty,
                    q_ptr, out_ptr, odd_ptr, sinks_ptr, out_scale_ptr, first, num_queries, start_token, oldest, begin,
                    end, kv_head, program, q_token, q_head, softmax_scale, softcap, window, CONSUMERS, NUM_HEADS, GROUP,
                    GROUP_PADDED, HEAD_DIM, TILE, SPLIT, STAGES, CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
                )),
                (_attend, (
                    2, q_tiles, merged_tiles, k_ring, v_ring, ones, turns, k_full, v_full, k_empty, v_empty,
                    q_ptr, out_ptr, odd_ptr, sinks_ptr, out_scale_ptr, first, num_queries, start_token, oldest, begin,
                    end, kv_head, program, q_token, q_head, softmax_scale, softcap, window, CONSUMERS, NUM_HEADS, GROUP,
                    GROUP_PADDED, HEAD_DIM, TILE, SPLIT, STAGES, CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
                )),
                (_load, (
                    k_desc, v_desc, k_ring, v_ring, k_full, v_full, k_empty, v_empty, pages_ptr, begin, end, kv_head,
                    page_rows, head_rows, head_columns, TILE, HEAD_DIM, STAGES, PAGE_SIZE,
                )),
            ], [4, 4, 1], [160, 160, 24])  # fmt: skip
        else:
            gl.warp_specialize([
                (_attend, (
                    0, q_tiles, merged_tiles, k_ring, v_ring, ones, turns, k_full, v_full, k_empty, v_empty,
                    q_ptr, out_ptr, odd_ptr, sinks_ptr, out_scale_ptr, first, num_queries, start_token, oldest, begin,
                    end, kv_head, program, q_token, q_head, softmax_scale, softcap, window, CONSUMERS, NUM_HEADS, GROUP,
                    GROUP_PADDED, HEAD_DIM, TILE, SPLIT, STAGES, CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
                )),
                (_attend, (
                    1, q_tiles, merged_tiles, k_ring, v_ring, ones, turns, k_full, v_full, k_empty, v_empty,
                    q_ptr, out_ptr, odd_ptr, sinks_ptr, out_scale_ptr, first, num_queries, start_token, oldest, begin,
                    end, kv_head, program, q_token, q_head, softmax_scale, softcap, window, CONSUMERS, NUM_HEADS, GROUP,
                    GROUP_PADDED, HEAD_DIM, TILE, SPLIT, STAGES, CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
                )),
                (_load, (
                    k_desc, v_desc, k_ring, v_ring, k_full, v_full, k_empty, v_empty, pages_ptr, begin, end, kv_head,
                    page_rows, head_rows, head_columns, TILE, HEAD_DIM, STAGES, PAGE_SIZE,
                )),
            ], [4, 1], [240, 40])  # fmt: skip


def _places(cache: torch.Tensor) -> tuple[int, int, int] | None:
    """A cache [pages, page_size, kv_heads, head_dim] as rows of slots: where pages and heads are in it.

    Returns:
        Rows from a page to the next, and rows and columns from a head to the next; None if they are no whole numbers,
        or not as the TMA needs them, in multiples of 16 bytes.
    """
    pages, page_size, heads, _ = cache.shape
    page, slot, head, one = cache.stride()
    head = 0 if heads == 1 else head
    in_rows = head >= slot  # a head's slots are together; else a slot's heads
    width = cache.element_size()
    fits = slot > 0 and one == 1 and page % slot == 0 and page_size % PAGE == 0 and (not in_rows or head % slot == 0)
    aligned = slot * width % 16 == 0 and cache.data_ptr() % 16 == 0 and (in_rows or head * width % 16 == 0)
    if not (fits and aligned and pages > 0):
        return None
    return page // slot, head // slot if in_rows else 0, 0 if in_rows else head


def _view(cache: torch.Tensor, places: tuple[int, int, int]) -> View:
    """What the TMA is to know of a cache, which it reads in boxes of PAGE slots."""
    pages, page_size, heads, head_dim = cache.shape
    page_rows, head_rows, head_columns = places
    rows = (pages - 1) * page_rows + (heads - 1) * head_rows + page_size
    columns = (heads - 1) * head_columns + head_dim
    return View(cache, [rows, columns], [cache.stride(1), 1], [PAGE, COLUMNS.value], _layout(cache.dtype))


@lru_cache
def _layout(dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for([PAGE, COLUMNS.value], DTYPES[dtype])


def _describe(view: View) -> Any:
    return TensorDescriptor(view.base, view.shape, view.strides, view.block_shape, view.layout)


_KERNEL = FastKernel(prefill_kernel, _describe)


def places_for(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple[int, int, int] | None:
    """``_places`` of both caches; None if the kernel is not for these dtypes, head size and caches."""
    if q.dtype not in DTYPES or k_cache.dtype != q.dtype or q.shape[2] not in HEAD_DIMS:
        return None
    places = _places(k_cache)
    if places is None or _places(v_cache) != places or k_cache.shape[0] * places[0] >= 2**31:
        return None
    return places


def launch(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, places: tuple[int, int, int], out: torch.Tensor,
    cu_seqlens_q: torch.Tensor, seqused_k: torch.Tensor, block_table: torch.Tensor, sinks: torch.Tensor | None,
    out_scale: torch.Tensor | None, softmax_scale: float, causal: bool, window: int, softcap: float,
    grid: tuple[int, int, int], consumers: int, group: int, tile: int, split: int,
) -> torch.Tensor:  # fmt: skip
    """Write the outputs of a grid of (sequences, key heads, blocks of ``SIDE * consumers`` rows) to ``out``.

    ``places``: as ``places_for`` gives them. ``group``: rows of one token, a power of two. Everything else is as
    ``attention.launch`` has it.

    Returns:
        [programs * consumers] int32, what is to be computed again; see ``prefill_kernel``.
    """
    odd = torch.empty(math.prod(grid) * consumers, dtype=torch.int32, device=q.device)
    keywords = {
        "CONSUMERS": consumers, "NUM_HEADS": q.shape[1], "GROUP": q.shape[1] // k_cache.shape[2], "GROUP_PADDED": group,
        "HEAD_DIM": q.shape[2], "TILE": tile, "SPLIT": split, "STAGES": STAGES[consumers],
        "PAGE_SIZE": k_cache.shape[1], "CAUSAL": causal, "HAS_WINDOW": window > 0, "HAS_SOFTCAP": softcap > 0.0,
        "num_warps": 4, "enable_fp_fusion": False,
    }  # fmt: skip
    _KERNEL(
        grid, q,
        (
            _view(k_cache, places), _view(v_cache, places), q, out, odd, sinks, out_scale,
            cu_seqlens_q, seqused_k, block_table, *q.stride()[:2], block_table.stride(0), *places,
            softmax_scale, softcap, window,
        ),
        keywords,
    )  # fmt: skip
    return odd
