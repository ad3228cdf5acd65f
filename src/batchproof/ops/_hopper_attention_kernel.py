"""Attention on Hopper by wgmma and the TMA, with the bits of ``attention_kernel``: of many queries, or of one each.

One program has 128 or 192 query rows (tokens times query heads of one key head) of a sequence, for two or three
consumers (``_hopper_attend``), and all the keys that they see; or it has the rows of a sequence's only token, for one
consumer, and every ``workers``-th split of its keys.

Values are multiplied as they are. Where a total of many queries is infinite or NaN, its consumer says so in ``odd``,
and what it wrote is to be computed again by ``attention_kernel``, which gives every row only what it sees: past a
sequence's end a page may hold anything. The rows of one token see the same keys: others' values are set to zero.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._hopper_attend import BOX, COLUMNS, SIDE, attend, load, merges_in_shared, next_of, pages_of, takes_turns
from ._row_tree import AT_ONCE, LATER

__all__ = ["hopper_attention_kernel"]

CHUNK = gl.constexpr(128)  # sequences looked at together


@gluon.jit
def _locate(number, cu_seqlens_q_ptr, sequences, each, TOKENS: gl.constexpr):
    """As ``_attention_kernels._locate``."""
    sequence, block = number % sequences, number // sequences
    if each == 0:
        start = gl.load(cu_seqlens_q_ptr)
        up_to = number * 0
        for some in range(0, sequences, CHUNK):
            index = some + gl.arange(0, CHUNK, gl.BlockedLayout([1], [32], [4], [0]))
            mask = index < sequences
            begins = (gl.load(cu_seqlens_q_ptr + index, mask=mask, other=0) - start) // TOKENS + index
            up_to += gl.sum((mask & (begins <= number)).to(gl.int32), axis=0)
        sequence = up_to - 1
        block = number - sequence - ((gl.load(cu_seqlens_q_ptr + sequence) - start) // TOKENS).to(gl.int32)
    return sequence, block


@gluon.jit(
    do_not_specialize=[
        "sequences",
        "each",
        "table_width",
        "table_row",
        "workers",
        "splits",
        "num_tokens",
        "softmax_scale",
        "softcap",
        "window",
    ]
)
def hopper_attention_kernel(
    k_desc, v_desc, q_ptr, out_ptr, merged_ptr, odd_ptr, largest_ptr, normaliser_ptr, total_ptr, sinks_ptr,
    out_scale_ptr, cu_seqlens_q_ptr, seqused_k_ptr, block_table_ptr, sequences, each, table_width, q_token, q_head,
    table_row, page_rows, head_rows, head_columns, softmax_scale: gl.float32, softcap: gl.float32,
    window, workers, splits, num_tokens,
    WALK: gl.constexpr, ONE_TOKEN: gl.constexpr, PDL: gl.constexpr, CONSUMERS: gl.constexpr,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, GROUP_PADDED: gl.constexpr, HEAD_DIM: gl.constexpr,
    TILE: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr, PAGE_SIZE: gl.constexpr, CAUSAL: gl.constexpr,
    HAS_WINDOW: gl.constexpr, HAS_SOFTCAP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """The consumers' rows of one sequence and key head: row r is token r // GROUP_PADDED, head r % GROUP_PADDED.

    A program is for a key head of the block that ``_locate`` finds. ``odd`` [blocks, CONSUMERS, key heads]: whether a
    consumer's total is infinite or NaN somewhere; not written where its program has no query. ``merged``
    [multiprocessors, CONSUMERS, SIDE * HEAD_DIM]: for what earlier splits come to, if shared memory has no room; a
    multiprocessor has one program at a time.
    """
    dtype: gl.constexpr = k_desc.dtype
    BOXES: gl.constexpr = TILE // BOX * (HEAD_DIM // COLUMNS)
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, HEAD_DIM], dtype)
    ONES_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, TILE], dtype)
    q_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, SIDE, HEAD_DIM], Q_LAYOUT)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES * BOXES, BOX, COLUMNS], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES * BOXES, BOX, COLUMNS], v_desc.layout)
    ones = gl.allocate_shared_memory(dtype, [8, TILE], ONES_LAYOUT)
    ones.store(gl.full([8, TILE], 1.0, dtype, gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])))
    SHARED: gl.constexpr = merges_in_shared(WALK, CONSUMERS, HEAD_DIM)
    KEPT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    merged_0 = gl.allocate_shared_memory(gl.float32, [SIDE * HEAD_DIM], KEPT) if SHARED else ones  # not used
    merged_1 = gl.allocate_shared_memory(gl.float32, [SIDE * HEAD_DIM], KEPT) if SHARED and CONSUMERS == 3 else ones
    merged_2 = gl.allocate_shared_memory(gl.float32, [SIDE * HEAD_DIM], KEPT) if SHARED and CONSUMERS == 3 else ones
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # No barrier without a use: its place would also be that of what the warps are handed, and it is written late
    turns = full
    if takes_turns(CONSUMERS, HEAD_DIM):
        turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(CONSUMERS):
            mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    if PDL == AT_ONCE:
        gdc_launch_dependents()
    if PDL:
        gdc_wait()
    if PDL == LATER:
        gdc_launch_dependents()
    KV_HEADS: gl.constexpr = NUM_HEADS // GROUP
    TOKENS: gl.constexpr = CONSUMERS * SIDE // GROUP_PADDED
    worker = gl.program_id(2)
    if ONE_TOKEN:
        number, kv_head = gl.program_id(0), gl.program_id(1)
        sequence, block = number, 0
    else:
        number, kv_head = gl.program_id(0) // KV_HEADS, gl.program_id(0) % KV_HEADS
        sequence, block = _locate(number, cu_seqlens_q_ptr, sequences, each, TOKENS)
    pages_ptr = block_table_ptr + sequence.to(gl.int64) * table_row
    PAGES: gl.constexpr = TILE // BOX
    FROM_ZERO: gl.constexpr = not HAS_WINDOW
    if FROM_ZERO:  # asked for beside the lengths, not after them: what is past the end is not used
        width, next_tile = table_width * PAGE_SIZE, next_of(worker * SPLIT, workers, TILE, SPLIT)
        pages = pages_of(pages_ptr, worker * SPLIT, 0, width, PAGE_SIZE, PAGES)
        next_pages = pages_of(pages_ptr, next_tile, 0, width, PAGE_SIZE, PAGES)
    first = gl.load(cu_seqlens_q_ptr + sequence).to(gl.int32)
    after = gl.load(cu_seqlens_q_ptr + sequence + 1).to(gl.int32)
    num_queries = after - first
    key_end = gl.load(seqused_k_ptr + sequence).to(gl.int32)
    start_token = (gl.cdiv(num_queries, TOKENS) - 1 - block) * TOKENS  # the last, which sees the most, begins first
    oldest = key_end - num_queries  # the position of the sequence's first query
    if ONE_TOKEN:
        unwritten = first + gl.minimum(num_queries, 1)
        num_queries = gl.minimum(num_queries, 1)
        if worker == 0:  # rows that no program writes are zero
            rest = gl.where(sequence == sequences - 1, num_tokens, after)
            columns = gl.arange(0, GROUP_PADDED * HEAD_DIM, gl.BlockedLayout([4], [32], [4], [0]))
            nothing = gl.zeros([GROUP_PADDED * HEAD_DIM], gl.float32, gl.BlockedLayout([4], [32], [4], [0]))
            for token in range(unwritten, rest):
                heads_ptr = out_ptr + (token * NUM_HEADS + kv_head * GROUP) * HEAD_DIM
                gl.store(heads_ptr + columns, nothing.to(out_ptr.dtype.element_ty), mask=columns < GROUP * HEAD_DIM)
    begin = gl.maximum(oldest + start_token - window + 1, 0) if HAS_WINDOW else 0
    end = gl.minimum(oldest + start_token + TOKENS, key_end) if CAUSAL else key_end
    tile = begin // TILE * TILE
    first_split, is_whole = 0, worker == 0
    if not WALK:
        first_split = (gl.maximum(oldest - window + 1, 0) if HAS_WINDOW else 0) // SPLIT
        end = gl.minimum(end, (first_split + splits) * SPLIT)  # no wrong length may reach past the memory
        is_whole = gl.cdiv(end, SPLIT) - begin // SPLIT <= 1
        tile = gl.maximum(tile, (begin // SPLIT + worker) * SPLIT)
    if not FROM_ZERO:
        pages = pages_of(pages_ptr, tile, begin, end, PAGE_SIZE, PAGES)
        next_pages = pages_of(pages_ptr, next_of(tile, workers, TILE, SPLIT), begin, end, PAGE_SIZE, PAGES)
    if (start_token >= 0) & ((tile < end) | (is_whole & (worker == 0))):
        if CONSUMERS == 1:
            gl.warp_specialize([
                (attend, (
                    0, q_tiles, merged_0, k_ring, v_ring, ones, turns, full, empty, q_ptr, out_ptr, merged_ptr, odd_ptr,
                    largest_ptr, normaliser_ptr, total_ptr, sinks_ptr, out_scale_ptr, first, num_queries, start_token,
                    oldest, tile, begin, end, workers, first_split, splits, is_whole, kv_head, number, q_token, q_head,
                    softmax_scale, softcap, window, WALK, CONSUMERS, NUM_HEADS, GROUP, GROUP_PADDED, HEAD_DIM, TILE,
                    SPLIT, STAGES, CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
                )),
                (load, (
                    k_desc, v_desc, k_ring, v_ring, full, empty, pages_ptr, pages, next_pages, tile, begin, end,
                    workers, kv_head, page_rows, head_rows, head_columns, SPLIT, TILE, HEAD_DIM, STAGES, PAGE_SIZE,
                )),
            ], [1], [40])  # fmt: skip
        elif CONSUMERS == 3:
            gl.warp_specialize([
                (attend, (
                    0, q_tiles, merged_0, k_ring, v_ring, ones, turns, full, empty, q_ptr, out_ptr, merged_ptr, odd_ptr,
                    largest_ptr, normaliser_ptr, total_ptr, sinks_ptr, out_scale_ptr, first, num_queries, start_token,
                    oldest, tile, begin, end, workers, first_split, splits, is_whole, kv_head, number, q_token, q_head,
                    softmax_scale, softcap, window, WALK, CONSUMERS, NUM_HEADS, GROUP, GROUP_PADDED, HEAD_DIM, TILE,
                    SPLIT, STAGES, CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
                )),
                (attend, (
                    1, q_tiles, merged_1, k_ring, v_ring, ones, turns, full, empty, q_ptr, out_ptr, merged_ptr, odd_ptr,
                    largest_ptr, normaliser_ptr, total_ptr, sinks_ptr, out_scale_ptr, first, num_queries, start_token,
                    oldest, tile, begin, end, workers, first_split, splits, is_whole, kv_head, number, q_token, q_head,
                    softmax_scale, softcap, window, WALK, CONSUMERS, NUM_HEADS, GROUP, GROUP_PADDED, HEAD_DIM, TILE,
                    SPLIT, STAGES, CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
                )),
                (attend, (
                    2, q_tiles, merged_2, k_ring, v_ring, ones, turns, full, empty, q_ptr, out_ptr, merged_ptr, odd_ptr,
                    largest_ptr, normaliser_ptr, total_ptr, sinks_ptr, out_scale_ptr, first, num_queries, start_token,
                    oldest, tile, begin, end, workers, first_split, splits, is_whole, kv_head, number, q_token, q_head,
                    softmax_scale, softcap, window, WALK, CONSUMERS, NUM_HEADS, GROUP, GROUP_PADDED, HEAD_DIM, TILE,
                    SPLIT, STAGES, CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
                )),
                (load, (
                    k_desc, v_desc, k_ring, v_ring, full, empty, pages_ptr, pages, next_pages, tile, begin, end,
                    workers, kv_head, page_rows, head_rows, head_columns, SPLIT, TILE, HEAD_DIM, STAGES, PAGE_SIZE,
                )),
            ], [4, 4, 1], [160, 160, 24])  # fmt: skip
        else:
            gl.warp_specialize([
                (attend, (
                    0, q_tiles, merged_0, k_ring, v_ring, ones, turns, full, empty, q_ptr, out_ptr, merged_ptr, odd_ptr,
                    largest_ptr, normaliser_ptr, total_ptr, sinks_ptr, out_scale_ptr, first, num_queries, start_token,
                    oldest, tile, begin, end, workers, first_split, splits, is_whole, kv_head, number, q_token, q_head,
                    softmax_scale, softcap, window, WALK, CONSUMERS, NUM_HEADS, GROUP, GROUP_PADDED, HEAD_DIM, TILE,
                    SPLIT, STAGES, CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
                )),
                (attend, (
                    1, q_tiles, merged_1, k_ring, v_ring, ones, turns, full, empty, q_ptr, out_ptr, merged_ptr, odd_ptr,
                    largest_ptr, normaliser_ptr, total_ptr, sinks_ptr, out_scale_ptr, first, num_queries, start_token,
                    oldest, tile, begin, end, workers, first_split, splits, is_whole, kv_head, number, q_token, q_head,
                    softmax_scale, softcap, window, WALK, CONSUMERS, NUM_HEADS, GROUP, GROUP_PADDED, HEAD_DIM, TILE,
                    SPLIT, STAGES, CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
                )),
                (load, (
                    k_desc, v_desc, k_ring, v_ring, full, empty, pages_ptr, pages, next_pages, tile, begin, end,
                    workers, kv_head, page_rows, head_rows, head_columns, SPLIT, TILE, HEAD_DIM, STAGES, PAGE_SIZE,
                )),
            ], [4, 1], [240, 40])  # fmt: skip
