"""What the warps of Hopper's attention (``_hopper_attention_kernel``) do: one loads keys and values, others attend.

A producer warp has the TMA bring keys and values, page by page, into rings in shared memory; consumers of four warps
have 64 query rows each, and ask the tensor core for a tile's values and the next one's scores together: the softmax of
the next is computed beside the values, and beside the other consumers' products. Some take turns (``takes_turns``).

Invariance: the order of keys, splits and tiles, and every formula, are those of ``_attention_kernels._walk``, and the
products' bits do not depend on the instruction.

Source: Shah et al., FlashAttention-3, 2024 (one warp that loads, groups that take turns).
"""

from __future__ import annotations

import triton
from triton import language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import smid

from ._quantize import FP8_MAX

__all__ = ["BOX", "COLUMNS", "SIDE", "attend", "load", "merges_in_shared", "next_of", "pages_of", "takes_turns"]

BOX = gl.constexpr(16)  # keys that the TMA brings at once, of one page
COLUMNS = gl.constexpr(64)  # of them: 128 bytes, the width of the swizzle
SIDE = gl.constexpr(64)  # rows of a wgmma
LOG2_E = gl.constexpr(1.4426950408889634)
MOST = gl.constexpr(FP8_MAX)
ALL_NAN = gl.constexpr(tl.PropagateNan.ALL)


@triton.constexpr_function
def takes_turns(consumers, head_dim):
    """Whether consumers take turns: where it is faster."""
    return consumers == 3 or (consumers == 2 and head_dim > 128)


@triton.constexpr_function
def merges_in_shared(walk, consumers, head_dim):
    """Whether what earlier splits have come to is in shared memory; two consumers have registers for it."""
    return walk and consumers != 2 and head_dim <= 128


@gluon.jit
def pages_of(pages_ptr, tile, begin, end, PAGE_SIZE: gl.constexpr, BOXES: gl.constexpr):
    """The pages of a tile's boxes, where there are keys that a row sees; elsewhere there may be no page."""
    pages = ()
    for i in gl.static_range(BOXES):
        seen = gl.maximum(gl.minimum(tile + i * BOX, end - 1), begin)
        page = gl.load(pages_ptr + seen // PAGE_SIZE, mask=tile < end, other=0).to(gl.int32)
        pages = pages + (page,)  # type: ignore[assignment]  # noqa: RUF005 - the compiler adds tuples
    return pages


@gluon.jit
def next_of(tile, workers, TILE: gl.constexpr, SPLIT: gl.constexpr):
    """The tile after this one; after a split's last, the first of every ``workers``-th split."""
    tile += TILE
    return gl.where(tile % SPLIT == 0, tile + (workers - 1) * SPLIT, tile)


@gluon.jit
def _send(
    desc, ring, full, stage, tile, pages, wanted, begin, end, kv_head, page_rows, head_rows, head_columns,
    PAGE_SIZE: gl.constexpr, BOXES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Have the TMA bring a tile, if it is ``wanted``, into a stage of a ring, with zeros for boxes that no row sees."""
    for i in gl.static_range(BOXES):
        keys = tile + i * BOX
        row = pages[i] * page_rows + kv_head * head_rows + keys % PAGE_SIZE
        row = gl.where((keys < end) & (keys + BOX > begin), row, -BOX)
        for part in gl.static_range(PARTS):
            box = ring.index((stage * PARTS + part) * BOXES + i)
            column = kv_head * head_columns + part * COLUMNS
            tma.async_copy_global_to_shared(desc, [row, column], full.index(stage), box, pred=wanted)


@gluon.jit
def load(
    k_desc, v_desc, k_ring, v_ring, full, empty, pages_ptr, pages, next_pages, tile, begin, end, workers, kv_head,
    page_rows, head_rows, head_columns,
    SPLIT: gl.constexpr, TILE: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    """The producer: one warp that fills the rings, step by step with a tile's values and the next one's keys.

    ``pages`` and ``next_pages``: the first two tiles'. Others' are asked for a step before they are needed.
    """
    BOXES: gl.constexpr = TILE // BOX
    PARTS: gl.constexpr = HEAD_DIM // COLUMNS
    BYTES: gl.constexpr = TILE * HEAD_DIM * 2
    mbarrier.expect(full.index(0), BYTES, pred=tile < end)
    _send(
        k_desc, k_ring, full, 0, tile, pages, tile < end, begin, end, kv_head, page_rows, head_rows, head_columns,
        PAGE_SIZE, BOXES, PARTS,
    )  # fmt: skip
    next_tile = next_of(tile, workers, TILE, SPLIT)
    done = 1
    while tile < end:
        stage = done % STAGES
        more = next_tile < end
        later_tile = next_of(next_tile, workers, TILE, SPLIT)
        later_pages = pages_of(pages_ptr, later_tile, begin, end, PAGE_SIZE, BOXES)
        mbarrier.wait(empty.index(stage), (done // STAGES & 1) ^ 1)
        if more:
            mbarrier.expect(full.index(stage), 2 * BYTES)
        else:
            mbarrier.expect(full.index(stage), BYTES)
        _send(
            k_desc, k_ring, full, stage, next_tile, next_pages, more, begin, end, kv_head, page_rows, head_rows,
            head_columns, PAGE_SIZE, BOXES, PARTS,
        )  # fmt: skip
        _send(
            v_desc, v_ring, full, stage, tile, pages, True, begin, end, kv_head, page_rows, head_rows, head_columns,
            PAGE_SIZE, BOXES, PARTS,
        )  # fmt: skip
        tile, pages, next_tile, next_pages = next_tile, next_pages, later_tile, later_pages
        done += 1


@gluon.jit
def _merge(largest, normaliser, total, right_largest, right_normaliser, right_total):
    """Two splits' results as one."""
    ROW: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    new_largest = gl.maximum(largest, right_largest)
    base = gl.where(new_largest == float("-inf"), 0.0, new_largest)
    left, right = gl.exp2(largest - base), gl.exp2(right_largest - base)
    normaliser = gl.fma(right_normaliser, right, normaliser * left)
    left_of_row = gl.expand_dims(gl.convert_layout(left, ROW), 1)
    right_of_row = gl.expand_dims(gl.convert_layout(right, ROW), 1)
    return new_largest, normaliser, gl.fma(right_total, right_of_row, total * left_of_row)


@gluon.jit
def _larger_or_nan(left, right):
    return gl.maximum(left, right, propagate_nan=ALL_NAN)


@gluon.jit
def _by_thread(total):
    """A wgmma's accumulator as a vector: four elements of a thread, then those of the others, then the next four."""
    parts = total.reshape([total.shape[0] // 16, 2, 8, total.shape[1] // 8, 4, 2])
    return parts.permute([3, 0, 2, 4, 1, 5]).reshape([total.shape[0] * total.shape[1]])


@gluon.jit
def _put_aside(total, tile, ptr, SHARED: gl.constexpr):
    """Keep what earlier splits have come to: in shared memory, in memory, or in registers, which are then returned."""
    if SHARED:
        tile.store(_by_thread(total))
        return 0
    elif ptr is not None:
        flat = _by_thread(total)
        gl.store(ptr + gl.arange(0, flat.shape[0], flat.type.layout), flat)
        return 0
    else:
        return total


@gluon.jit
def _kept(kept, tile, ptr, SHARED: gl.constexpr, HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """What ``_put_aside`` kept, and returned as ``kept``; every thread reads what it wrote itself."""
    if SHARED or ptr is not None:
        FLAT: gl.constexpr = _by_thread(gl.zeros([SIDE, HEAD_DIM], gl.float32, LAYOUT)).type.layout
        flat = tile.load(FLAT) if SHARED else gl.load(ptr + gl.arange(0, SIDE * HEAD_DIM, FLAT))
        parts = flat.reshape([HEAD_DIM // 8, SIDE // 16, 8, 4, 2, 2]).permute([1, 4, 2, 0, 3, 5])
        return gl.convert_layout(parts.reshape([SIDE, HEAD_DIM]), LAYOUT, assert_trivial=True)
    else:
        return kept


@gluon.jit
def _forget_unseen(v_ring, stage, tile, begin, end, TILE: gl.constexpr, PARTS: gl.constexpr):
    """Make values zero that no row sees, in boxes with others that one does: they may be infinite or NaN."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for last in gl.static_range(2):
        edge = end if last else begin
        if (edge > tile) & (edge < tile + TILE) & (edge % BOX != 0):
            box = (edge - tile) // BOX
            keys = tile + box * BOX + gl.arange(0, BOX, gl.SliceLayout(1, LAYOUT))
            seen = ((keys >= begin) & (keys < end))[:, None]
            for part in gl.static_range(PARTS):
                values = v_ring.index((stage * PARTS + part) * (TILE // BOX) + box)
                values.store(gl.where(seen, values.load(LAYOUT), 0.0))
            fence_async_shared()


@gluon.jit
def _store_split(
    largest_ptr, normaliser_ptr, total_ptr, largest, normaliser, total, score_row, score_mask, row, mask, number, splits
):  # fmt: skip
    """Store a split's results where ``merge_kernel`` looks for them."""
    LAYOUT: gl.constexpr = total.type.layout
    place = score_row * splits + number
    gl.store(largest_ptr + place, largest, mask=score_mask)
    gl.store(normaliser_ptr + place, normaliser, mask=score_mask)
    columns = gl.arange(0, total.shape[1], gl.SliceLayout(0, LAYOUT))
    offsets = (row * splits + number)[:, None] * total.shape[1] + columns[None, :]
    gl.store(total_ptr + offsets, total, mask=mask[:, None])


@gluon.jit
def _softmax(
    scores, largest, tile, at, keys_of_tile, oldest_at, newest_at, begin, end, softmax_scale, softcap, window,
    dtype: gl.constexpr, TILE: gl.constexpr, CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
):  # fmt: skip
    """A tile's weights; by what the sums and the total of the tiles before are rescaled, and the new largest score."""
    if HAS_SOFTCAP:
        capped = 1.0 - 2.0 / (gl.exp(2.0 * ((scores * softmax_scale) / softcap)) + 1.0)
        scores = softcap * capped
    factor = LOG2_E if HAS_SOFTCAP else softmax_scale * LOG2_E
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
    new_largest = gl.maximum(largest, gl.max(scores, axis=1) * factor)
    base = gl.where(new_largest == float("-inf"), 0.0, new_largest)
    rescale = gl.exp2(largest - base)
    return gl.exp2(gl.fma(scores, factor, -base[:, None])).to(dtype), rescale, new_largest


@gluon.jit
def _stand_by(
    WHICH: gl.constexpr, turns, full, empty, tile, end, workers,
    CONSUMERS: gl.constexpr, TURNS: gl.constexpr, TILE: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Take part in what consumers have in common, with no query to attend from."""
    done = 0
    while tile < end:
        stage = done % STAGES
        mbarrier.wait(full.index(stage), done // STAGES & 1)
        tile = next_of(tile, workers, TILE, SPLIT)
        if TURNS:
            mbarrier.wait(turns.index(WHICH), (done & 1) ^ 1, pred=done > 0)
            mbarrier.arrive(turns.index((WHICH + 1) % CONSUMERS), count=1, pred=done > 0)
        mbarrier.arrive(empty.index(stage), count=1)
        done += 1


@gluon.jit
def attend(
    WHICH: gl.constexpr, q_tiles, merged, k_ring, v_ring, ones, turns, full, empty,
    q_ptr, out_ptr, merged_ptr, odd_ptr, largest_ptr, normaliser_ptr, total_ptr, sinks_ptr, out_scale_ptr,
    first, num_queries, start_token, oldest, tile, begin, end, workers, first_split, splits, is_whole,
    kv_head, number, q_token, q_head, softmax_scale, softcap, window,
    WALK: gl.constexpr, CONSUMERS: gl.constexpr, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr,
    GROUP_PADDED: gl.constexpr, HEAD_DIM: gl.constexpr, TILE: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Consumer number WHICH: four warps, and SIDE rows.

    No product is in flight from one step of its loop to the next: the assembler would then wait for every one.
    """
    dtype: gl.constexpr = k_ring.dtype
    TURNS: gl.constexpr = takes_turns(CONSUMERS, HEAD_DIM)
    SHARED: gl.constexpr = merges_in_shared(WALK, CONSUMERS, HEAD_DIM)
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
    of_row = WHICH * SIDE + gl.arange(0, SIDE, ROW)
    token = start_token + of_row // GROUP_PADDED
    mask = (token < num_queries) & (of_row % GROUP_PADDED < GROUP)
    row = (first + token).to(gl.int64) * NUM_HEADS + kv_head * GROUP + of_row % GROUP_PADDED
    score_token = start_token + of_score // GROUP_PADDED
    score_mask = (score_token < num_queries) & (of_score % GROUP_PADDED < GROUP)
    score_row = (first + score_token).to(gl.int64) * NUM_HEADS + kv_head * GROUP + of_score % GROUP_PADDED
    no_scores = gl.zeros([SIDE, TILE], gl.float32, SCORES)
    no_sums = gl.zeros([SIDE, 8], gl.float32, SUMS)
    nothing = gl.full([SIDE], float("-inf"), gl.float32, SCORE)
    zeros = gl.zeros([SIDE], gl.float32, SCORE)
    no_total = gl.zeros([SIDE, HEAD_DIM], gl.float32, TOTAL)
    if merged_ptr is not None:
        merged_ptr += (smid() * CONSUMERS + WHICH) * (SIDE * HEAD_DIM)
    no_merged = gl.zeros([SIDE, HEAD_DIM], gl.float32, TOTAL)  # a loop cannot carry two that begin as one, no_total
    kept = _put_aside(no_merged, merged, merged_ptr, SHARED)
    merged_largest, merged_normaliser = nothing, zeros
    normalisers, total = no_sums, no_total  # the same in all 8 columns
    if WHICH > 0:  # noqa: SIM102 - decided when the kernel is compiled
        if start_token + WHICH * SIDE // GROUP_PADDED >= num_queries:
            _stand_by(WHICH, turns, full, empty, tile, end, workers, CONSUMERS, TURNS, TILE, SPLIT, STAGES)
            end = tile
    some = tile < end
    mbarrier.wait(full.index(0), 0, pred=some)
    k = k_ring.index(0)._reinterpret(dtype, [TILE, HEAD_DIM], TILE_LAYOUT)
    scores = warpgroup_mma(q, k.permute((1, 0)), no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(empty.index(0), count=1, pred=some)
    weights, _rescale, largest = _softmax(
        scores, nothing, tile, at, keys_of_tile, oldest_at, newest_at, begin, end, softmax_scale, softcap, window,
        dtype, TILE, CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
    )  # fmt: skip
    done = 1
    split = tile // SPLIT
    next_tile = next_of(tile, workers, TILE, SPLIT)
    while next_tile < end:
        of_sums = gl.convert_layout(weights, gl.DotOperandLayout(0, SUMS, 2))
        of_total = gl.convert_layout(weights, gl.DotOperandLayout(0, TOTAL, 2))
        stage = done % STAGES
        mbarrier.wait(full.index(stage), done // STAGES & 1)
        k = k_ring.index(stage * BOXES)._reinterpret(dtype, [TILE, HEAD_DIM], TILE_LAYOUT)
        v = v_ring.index(stage * BOXES)._reinterpret(dtype, [TILE, HEAD_DIM], TILE_LAYOUT)
        if odd_ptr is None:
            _forget_unseen(v_ring, stage, tile, begin, end, TILE, HEAD_DIM // COLUMNS)
        if TURNS:
            mbarrier.wait(turns.index(WHICH), (done & 1) ^ (0 if WHICH == 0 else 1))
        scores = warpgroup_mma(q, k.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        sums = warpgroup_mma(of_sums, ones.permute((1, 0)), no_sums, use_acc=False, is_async=True)
        total = warpgroup_mma(of_total, v, total, is_async=True)
        if TURNS:
            mbarrier.arrive(turns.index((WHICH + 1) % CONSUMERS), count=1)
        scores = warpgroup_mma_wait(2, deps=[scores])
        new_split = next_tile % SPLIT == 0
        weights, rescale, next_largest = _softmax(
            scores, gl.where(new_split, nothing, largest), next_tile, at, keys_of_tile, oldest_at, newest_at, begin,
            end, softmax_scale, softcap, window, dtype, TILE, CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
        )  # fmt: skip
        total, sums = warpgroup_mma_wait(0, deps=[total, sums])
        mbarrier.arrive(empty.index(stage), count=1)
        normalisers += sums
        if new_split:
            normaliser = gl.convert_layout(gl.max(normalisers, axis=1), SCORE)
            if WALK:
                merged_largest, merged_normaliser, total = _merge(
                    merged_largest, merged_normaliser, _kept(kept, merged, merged_ptr, SHARED, HEAD_DIM, TOTAL),
                    largest, normaliser, total,
                )  # fmt: skip
                kept = _put_aside(total, merged, merged_ptr, SHARED)
            elif largest_ptr is not None:
                _store_split(
                    largest_ptr, normaliser_ptr, total_ptr, largest, normaliser, total, score_row, score_mask, row,
                    mask, split - first_split, splits,
                )  # fmt: skip
                split = next_tile // SPLIT
            normalisers, total = no_sums, no_total
        else:
            normalisers *= gl.expand_dims(gl.convert_layout(rescale, gl.SliceLayout(1, SUMS)), 1)
            total *= gl.expand_dims(gl.convert_layout(rescale, ROW), 1)
        largest = next_largest
        tile, next_tile = next_tile, next_of(next_tile, workers, TILE, SPLIT)
        done += 1

    if some:  # the last tile's values
        stage = done % STAGES
        mbarrier.wait(full.index(stage), done // STAGES & 1)
        v = v_ring.index(stage * BOXES)._reinterpret(dtype, [TILE, HEAD_DIM], TILE_LAYOUT)
        if odd_ptr is None:
            _forget_unseen(v_ring, stage, tile, begin, end, TILE, HEAD_DIM // COLUMNS)
        of_sums = gl.convert_layout(weights, gl.DotOperandLayout(0, SUMS, 2))
        of_total = gl.convert_layout(weights, gl.DotOperandLayout(0, TOTAL, 2))
        sums = warpgroup_mma(of_sums, ones.permute((1, 0)), no_sums, use_acc=False, is_async=True)
        total = warpgroup_mma(of_total, v, total, is_async=True)
        total, sums = warpgroup_mma_wait(0, deps=[total, sums])
        normalisers += sums
    normaliser = gl.convert_layout(gl.max(normalisers, axis=1), SCORE)
    if WALK:
        largest, normaliser, total = _merge(
            merged_largest, merged_normaliser, _kept(kept, merged, merged_ptr, SHARED, HEAD_DIM, TOTAL),
            largest, normaliser, total,
        )  # fmt: skip
    elif largest_ptr is not None:  # noqa: SIM102 - decided when the kernel is compiled
        if not is_whole:
            _store_split(
                largest_ptr, normaliser_ptr, total_ptr, largest, normaliser, total, score_row, score_mask, row, mask,
                split - first_split, splits,
            )  # fmt: skip
    if sinks_ptr is not None:
        known = gl.minimum(kv_head * GROUP + of_score % GROUP_PADDED, NUM_HEADS - 1)  # a padding row takes another's
        sink = gl.load(sinks_ptr + known).to(gl.float32) * LOG2_E
        one = gl.full([SIDE], 1.0, gl.float32, SCORE)
        largest, normaliser, total = _merge(largest, normaliser, total, sink, one, no_total)
    reciprocal = 1.0 / gl.where(normaliser == 0.0, 1.0, normaliser)
    mean = (total + 0.0) * gl.expand_dims(gl.convert_layout(reciprocal, ROW), 1)
    if odd_ptr is not None:
        most = gl.reduce(gl.reduce(gl.abs(total), 1, _larger_or_nan), 0, _larger_or_nan)
        odd = 1 - (most < float("inf")).to(gl.int32)
        gl.store(odd_ptr + (number * CONSUMERS + WHICH) * (NUM_HEADS // GROUP) + kv_head, odd)

    q.store(mean.to(dtype))  # the queries are read: through their place, so that rows are written whole
    mean = q.load(load_layout)
    mask = (rows // GROUP_PADDED < num_queries - start_token) & (rows % GROUP_PADDED < GROUP)
    out_ptr += ((first + start_token).to(gl.int64) * NUM_HEADS + kv_head * GROUP) * HEAD_DIM
    out_ptrs = out_ptr + (rows // GROUP_PADDED * NUM_HEADS + rows % GROUP_PADDED)[:, None] * HEAD_DIM + dims[None, :]
    if out_scale_ptr is not None:  # as _quantize_jit.to_fp8 does it: NaN becomes MOST, and the cast saturates
        mean = gl.minimum(mean.to(gl.float32) * gl.div_rn(1.0, gl.load(out_scale_ptr)), MOST).to(gl.float8e4nv)
    gl.store(out_ptrs, mean, mask=(mask & is_whole)[:, None])
