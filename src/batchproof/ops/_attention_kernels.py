"""The kernels of ``paged_attention``: one order of keys, walked by one program or shared out to several.

A query row's keys are cut at absolute positions into splits of SPLIT keys. ``_walk`` gives a split's largest score,
normaliser and total, from nothing, tile by tile; ``_merge`` adds splits up in ascending order. ``attention_kernel``
does both where one program has all splits of its rows (WALK). Otherwise it stores what ``_walk`` gave for each, and
``merge_kernel`` merges that in the same order.

Both products, and the sum of a tile's row, which is a third with ones, are the tensor core's: their bits do not depend
on the number of rows in a program, of warps, or on the instruction. The largest score has no order, and everything else
is elementwise. That is why the batch may choose rows, warps and workers.
"""

from __future__ import annotations

from ._quantize_jit import FP8_MAX_TL, to_fp8
from ._row_tree import launch_dependents, wait_for_inputs
from ._triton import tl, triton

__all__ = ["attention_kernel", "merge_kernel"]

LOG2_E = tl.constexpr(1.4426950408889634)
CHUNK = tl.constexpr(128)  # sequences looked at together


@triton.jit
def _locate(number, cu_seqlens_q_ptr, sequences, each, TOKENS: tl.constexpr):
    """The sequence that block ``number`` of a batch is of, and which of its blocks it is: of TOKENS queries, or fewer.

    Every sequence has ``each`` blocks. Or, if that is 0, one that begins at token t has those from t // TOKENS + its
    number on: all that it needs and one more at most, so that num_tokens // TOKENS + sequences programs are enough for
    all, whatever their lengths.

    Source: how vLLM's Triton attention finds a query block's sequence, by counting instead of by bisection.
    """
    sequence, block = number % sequences, number // sequences
    if each == 0:
        start = tl.load(cu_seqlens_q_ptr)
        up_to = number * 0  # sequences that begin at the block or before it
        for some in range(0, sequences, CHUNK):
            index = some + tl.arange(0, CHUNK)
            mask = index < sequences
            begins = (tl.load(cu_seqlens_q_ptr + index, mask=mask, other=0) - start) // TOKENS + index
            up_to += tl.sum((mask & (begins <= number)).to(tl.int32), axis=0)
        sequence = up_to - 1
        block = number - sequence - ((tl.load(cu_seqlens_q_ptr + sequence) - start) // TOKENS).to(tl.int32)
    return sequence, block


@triton.jit
def _bounds(cu_seqlens_q_ptr, seqused_k_ptr, k_start_ptr, sequence, HAS_START: tl.constexpr):
    """A sequence's first token, its number of queries, and the positions [key_start, key_end) of its keys."""
    first = tl.load(cu_seqlens_q_ptr + sequence).to(tl.int64)
    num_queries = (tl.load(cu_seqlens_q_ptr + sequence + 1).to(tl.int64) - first).to(tl.int32)
    key_start = tl.load(k_start_ptr + sequence).to(tl.int32) if HAS_START else 0
    key_end = key_start + tl.load(seqused_k_ptr + sequence).to(tl.int32)
    return first, num_queries, key_start, key_end


@triton.jit
def _span(oldest, newest, key_start, key_end, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Where the keys begin and end that queries at positions ``oldest`` to ``newest`` see between them."""
    begin = tl.maximum(oldest - window + 1, key_start) if HAS_WINDOW else key_start
    end = tl.minimum(newest + 1, key_end) if CAUSAL else key_end
    return begin, end


@triton.jit
def _softcap(scores, cap):
    """The soft cap, cap * tanh(scores / cap), with tanh(x) = 1 - 2 / (exp(2 x) + 1)."""
    return cap * (1.0 - 2.0 / (tl.exp(2.0 * (scores / cap)) + 1.0))


@triton.jit
def _is_finite(x):
    """Where x is neither infinite nor NaN."""
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def _any(rows, values):
    """Where a row [ROWS, TILE] and a value [TILE, HEAD_DIM] are both true for some key."""
    return tl.dot(rows.to(tl.float16), values.to(tl.float16)) > 0.0


@triton.jit
def _odd_values(weights, visible, v):
    """What infinities and NaN in ``v`` add to a row's output: what they would if it were multiplied by what it sees."""
    wide = v.to(tl.float32)
    infinite = tl.abs(wide) == float("inf")
    counts = visible & (weights.to(tl.float32) != 0.0)
    plus, minus = _any(counts, infinite & (wide > 0.0)), _any(counts, infinite & (wide < 0.0))
    nan = _any(visible, wide != wide) | _any(visible & (weights.to(tl.float32) == 0.0), infinite) | (plus & minus)
    return tl.where(nan, float("nan"), tl.where(plus, float("inf"), tl.where(minus, float("-inf"), 0.0)))


@triton.jit
def _nothing(ROWS: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr):
    """Largest score, normaliser and total of no keys; fp32, as they are of all."""
    largest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    return largest, tl.zeros([ROWS], dtype=tl.float32), tl.zeros([ROWS, HEAD_DIM_PADDED], dtype=tl.float32)


@triton.jit
def _base(largest):
    """What to subtract from scores: the largest, and 0 where nothing is visible."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _merge(largest, normaliser, total, right_largest, right_normaliser, right_total):
    """Two splits' results as one; where nothing is visible in one, the other's bits (but for a zero's sign)."""
    new_largest = tl.maximum(largest, right_largest)
    base = _base(new_largest)
    left, right = tl.exp2(largest - base), tl.exp2(right_largest - base)
    normaliser = tl.fma(right_normaliser, right, normaliser * left)
    return new_largest, normaliser, tl.fma(right_total, right[:, None], total * left[:, None])


@triton.jit
def _output(largest, normaliser, total, sinks_ptr, head, v_scale_ptr):
    """The weighted mean of values, zero where nothing is visible; of all NaN one.

    A sink is a score of the row's ``head`` whose value is zero. ``+ 0.0``: of zeros, masked keys can change the sign.
    """
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        one = tl.full(normaliser.shape, 1.0, tl.float32)
        largest, normaliser, total = _merge(largest, normaliser, total, sink, one, tl.zeros_like(total))
    mean = (total + 0.0) * (1.0 / tl.where(normaliser == 0.0, 1.0, normaliser))[:, None]
    if v_scale_ptr is not None:
        mean *= tl.load(v_scale_ptr)
    return tl.where(mean == mean, mean, float("nan"))


@triton.jit
def _stored(mean, out_scale_ptr, DTYPE: tl.constexpr):
    """An output as it is stored: rounded to q's dtype, and quantised if there is a scale."""
    if out_scale_ptr is not None:
        return to_fp8(mean.to(DTYPE).to(tl.float32) * tl.div_rn(1.0, tl.load(out_scale_ptr)), FP8_MAX_TL)
    else:
        return mean.to(DTYPE)


@triton.jit
def _walk(
    q, page, at, oldest_at, newest_at, begin, end, key_start, k_ptr, v_ptr, pages_ptr,
    k_page, k_slot, v_page, v_slot, score_scale, softcap, window,
    HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, PAGE_SIZE: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, MERGE: tl.constexpr, FINITE: tl.constexpr,
):  # fmt: skip
    """Largest score, normaliser and total of the rows ``q`` at positions ``at`` over keys [begin, end).

    Online softmax over tiles at multiples of TILE; ``k_ptr`` and ``v_ptr`` are of the key head, ``pages_ptr`` of the
    sequence, ``page`` is each key's of the first tile. A key that a row does not see adds zero, and a tile of them
    changes nothing. The largest score is in powers of two; scores become so as it is subtracted, by a multiply-add.
    MERGE: of all splits, each from nothing, merged in ascending order; else the keys are those of one split.
    FINITE: values are multiplied as they are. An infinity or NaN makes an element of every row's total infinite or NaN,
    for good, seen or not; so if all of it is finite, it has the bits it has without FINITE, where each row gets only
    what it sees. Rows that all see the same keys, [begin, end), need no other way.
    """
    dims = tl.arange(0, HEAD_DIM_PADDED)
    dim_mask = dims < HEAD_DIM
    merged_largest, merged_normaliser, merged_total = _nothing(ROWS, HEAD_DIM_PADDED)
    largest, normaliser, total = _nothing(ROWS, HEAD_DIM_PADDED)
    ones = tl.full([TILE, 16], 1.0, dtype=q.dtype)
    factor = LOG2_E if HAS_SOFTCAP else score_scale * LOG2_E  # from products to powers of two
    # What seldom runs shall cost no registers: it is not pipelined, unless in fp32, which then needs fewer
    stages: tl.constexpr = 1 if not FINITE and q.dtype != tl.float32 else None
    for tile in tl.range(begin // TILE * TILE, end, TILE, num_stages=stages):
        if MERGE:  # noqa: SIM102 - decided when the kernel is compiled
            if tile % SPLIT == 0:
                merged_largest, merged_normaliser, merged_total = _merge(
                    merged_largest, merged_normaliser, merged_total, largest, normaliser, total
                )
                largest, normaliser, total = _nothing(ROWS, HEAD_DIM_PADDED)
        keys = tile + tl.arange(0, TILE)
        key_mask = (keys >= begin) & (keys < end)
        slot = (keys - key_start) % PAGE_SIZE
        k_offsets = page[None, :] * k_page + slot[None, :] * k_slot + dims[:, None]
        v_offsets = page[:, None] * v_page + slot[:, None] * v_slot + dims[None, :]
        k = tl.load(k_ptr + k_offsets, mask=key_mask[None, :] & dim_mask[:, None], other=0.0).to(q.dtype)
        page = _page_of(keys + TILE, begin, end, key_start, pages_ptr, PAGE_SIZE)  # of the next tile
        scores = tl.dot(q, k, input_precision="ieee")
        if HAS_SOFTCAP:
            scores = _softcap(scores * score_scale, softcap)
        edge = (tile < begin) | (tile + TILE > end)  # else all rows see all keys
        if CAUSAL:
            edge |= tile + TILE - 1 > oldest_at
        if HAS_WINDOW:
            edge |= newest_at - tile >= window
        if edge:
            visible = _visible(keys, key_mask, at, window, CAUSAL, HAS_WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1) * factor)
        base = _base(new_largest)
        probabilities = tl.exp2(tl.fma(scores, factor, -base[:, None]))
        rescale = tl.exp2(largest - base)
        weights = probabilities.to(q.dtype)
        # On the tensor core, whose sum has one order in every layout; of what values are multiplied by
        normaliser = normaliser * rescale + tl.max(tl.dot(weights, ones, input_precision="ieee"), axis=1)
        v = tl.load(v_ptr + v_offsets, mask=key_mask[:, None] & dim_mask[None, :], other=0.0).to(q.dtype)
        total = total * rescale[:, None]
        if FINITE:
            total = tl.dot(weights, v, total, input_precision="ieee")
        else:
            clean = tl.where(_is_finite(v), v, tl.zeros_like(v))
            visible = _visible(keys, key_mask, at, window, CAUSAL, HAS_WINDOW)
            total = tl.dot(weights, clean, total, input_precision="ieee") + _odd_values(weights, visible, v)
        largest = new_largest
    if MERGE:
        largest, normaliser, total = _merge(merged_largest, merged_normaliser, merged_total, largest, normaliser, total)
    return largest, normaliser, total


@triton.jit
def _visible(keys, key_mask, at, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Which keys of a tile each row sees."""
    visible = key_mask[None, :] & (at == at)[:, None]
    if CAUSAL:
        visible &= keys[None, :] <= at[:, None]
    if HAS_WINDOW:
        visible &= at[:, None] - keys[None, :] < window
    return visible


@triton.jit
def _page_of(keys, begin, end, key_start, pages_ptr, PAGE_SIZE: tl.constexpr):
    """The page of each key in [begin, end)."""
    mask = (keys >= begin) & (keys < end)
    return tl.load(pages_ptr + (keys - key_start) // PAGE_SIZE, mask=mask, other=0).to(tl.int64)


@triton.jit(
    do_not_specialize=[
        "sequences",
        "each",
        "num_tokens",
        "table_width",
        "table_row",
        "softmax_scale",
        "softcap",
        "window",
        "workers",
        "splits",
    ]
)
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, largest_ptr, normaliser_ptr, total_ptr,
    cu_seqlens_q_ptr, seqused_k_ptr, k_start_ptr, block_table_ptr,
    sinks_ptr, k_scale_ptr, v_scale_ptr, out_scale_ptr, odd_ptr,
    sequences, each, num_tokens, table_width, q_token, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head,
    table_row: tl.int64, softmax_scale: tl.float32, softcap: tl.float32, window, workers, splits,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr, ROWS: tl.constexpr, CONSUMERS: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr, PAGE_SIZE: tl.constexpr, WALK: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_START: tl.constexpr, ONE_TOKEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS query rows of one sequence and key head: row r is token r // GROUP_PADDED, query head r % GROUP_PADDED.

    WALK: all of their splits, merged and written to ``out`` (workers is 1). Otherwise every ``workers``-th of them, to
    ``largest`` and ``normaliser`` [num_tokens, NUM_HEADS, splits] and ``total`` [.., splits, HEAD_DIM], where a
    sequence's splits are counted from the first that any of its queries sees; or to ``out`` if there is but one.
    ONE_TOKEN: no sequence has two queries, and a program is for a sequence, a key head and a worker. Otherwise for key
    heads of parts of blocks, and a worker: ``_locate`` says whose block of CONSUMERS such parts.
    ``odd`` [programs]: if given, all is written but what programs with a flag there have, as
    ``_hopper_attention_kernel`` says.
    """
    wait_for_inputs(PDL)
    launch_dependents(PDL)
    TOKENS: tl.constexpr = 1 if ONE_TOKEN else ROWS // GROUP_PADDED
    FROM_ZERO: tl.constexpr = not (HAS_WINDOW or HAS_START)  # the first key seen is the sequence's first
    KV_HEADS: tl.constexpr = NUM_HEADS // GROUP
    if ONE_TOKEN:
        sequence = tl.program_id(0)
        kv_head = tl.program_id(1).to(tl.int64)
    else:
        part = tl.program_id(0) // KV_HEADS
        sequence, block = _locate(part // CONSUMERS, cu_seqlens_q_ptr, sequences, each, CONSUMERS * TOKENS)
        kv_head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    worker = tl.program_id(2)
    pages_ptr = block_table_ptr + sequence * table_row
    keys = tl.arange(0, TILE)
    if FROM_ZERO:  # asked for beside the bounds, not after them
        page = _page_of(worker * SPLIT + keys, 0, table_width * PAGE_SIZE, 0, pages_ptr, PAGE_SIZE)
    first, num_queries, key_start, key_end = _bounds(cu_seqlens_q_ptr, seqused_k_ptr, k_start_ptr, sequence, HAS_START)
    if ONE_TOKEN:
        start_token = 0
        is_last = sequence == tl.num_programs(0) - 1
        unwritten = first + tl.minimum(num_queries, 1)
        rest = tl.where(is_last, num_tokens, first + num_queries)
    else:  # the last block, which sees the most, begins first
        blocks = tl.cdiv(num_queries, CONSUMERS * TOKENS)
        start_token = ((blocks - 1 - block) * CONSUMERS + part % CONSUMERS) * TOKENS
        is_last = part == tl.num_programs(0) // KV_HEADS - 1
        unwritten = tl.load(cu_seqlens_q_ptr + sequences).to(tl.int64)
        rest = tl.where(is_last, num_tokens, unwritten)
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    head_in_group = rows % GROUP_PADDED
    head = kv_head * GROUP + head_in_group
    if worker == 0:  # rows that no program writes are zero
        for token in range(unwritten, rest):
            offsets = (token * NUM_HEADS + head)[:, None] * HEAD_DIM + dims[None, :]
            mask = (head_in_group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
            zeros = tl.zeros([ROWS, HEAD_DIM_PADDED], tl.float32)
            tl.store(out_ptr + offsets, _stored(zeros, out_scale_ptr, q_ptr.dtype.element_ty), mask=mask)
    if (start_token < 0) | (start_token >= num_queries):
        return
    if odd_ptr is not None:  # noqa: SIM102 - decided when the kernel is compiled
        if tl.load(odd_ptr + tl.program_id(0)) == 0:
            return

    token = start_token + rows // GROUP_PADDED
    row_mask = (token < num_queries) & (rows // GROUP_PADDED < TOKENS) & (head_in_group < GROUP)
    mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]
    q_offsets = (first + token)[:, None] * q_token + head[:, None] * q_head + dims[None, :]
    q = tl.load(q_ptr + q_offsets, mask=mask, other=0.0)

    oldest = key_end - num_queries  # the position of the sequence's first query
    oldest_at, newest_at = oldest + start_token, oldest + start_token + TOKENS - 1
    first_split = _span(oldest, oldest, key_start, key_end, window, CAUSAL, HAS_WINDOW)[0] // SPLIT
    begin, end = _span(oldest_at, newest_at, key_start, key_end, window, CAUSAL, HAS_WINDOW)
    end_split = tl.minimum(tl.cdiv(end, SPLIT), first_split + splits)  # no wrong length may reach past the memory
    row = (first + token) * NUM_HEADS + head
    out_ptrs = out_ptr + row[:, None] * HEAD_DIM + dims[None, :]
    k_ptr += kv_head * k_head
    v_ptr += kv_head * v_head
    score_scale = softmax_scale
    if k_scale_ptr is not None:
        score_scale *= tl.load(k_scale_ptr)
    begin_split = begin // SPLIT
    if not FROM_ZERO:
        first_key = tl.maximum(begin // TILE * TILE, (begin_split + worker) * SPLIT)
        page = _page_of(first_key + keys, begin, end, key_start, pages_ptr, PAGE_SIZE)
    few = end_split - begin_split <= 1
    for split in range(begin_split + worker, begin_split + 1 if WALK or few else end_split, workers):
        if WALK:
            split_begin, split_end = begin, end
        else:
            split_begin, split_end = tl.maximum(begin, split * SPLIT), tl.minimum(end, split * SPLIT + SPLIT)
        largest, normaliser, total = _walk(
            q, page, oldest + token, oldest_at, newest_at, split_begin, split_end, key_start, k_ptr, v_ptr, pages_ptr,
            k_page, k_slot, v_page, v_slot, score_scale, softcap, window, HEAD_DIM, HEAD_DIM_PADDED,
            ROWS, TILE, SPLIT, PAGE_SIZE, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, WALK, True,
        )  # fmt: skip
        if not ONE_TOKEN:  # noqa: SIM102 - decided when the kernel is compiled
            if tl.min(tl.min(_is_finite(total).to(tl.int32), axis=1), axis=0) == 0:
                total = _walk(
                    q, page, oldest + token, oldest_at, newest_at, split_begin, split_end, key_start, k_ptr, v_ptr,
                    pages_ptr, k_page, k_slot, v_page, v_slot, score_scale, softcap, window, HEAD_DIM,
                    HEAD_DIM_PADDED, ROWS, TILE, SPLIT, PAGE_SIZE, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, WALK, False,
                )[2]  # fmt: skip
        if WALK or few:
            # a padding row takes another's sink
            known = tl.minimum(head, NUM_HEADS - 1)
            out = _output(largest, normaliser, total, sinks_ptr, known, v_scale_ptr)
            tl.store(out_ptrs, _stored(out, out_scale_ptr, q.dtype), mask=mask)
        else:
            place = row * splits + split - first_split
            tl.store(largest_ptr + place, largest, mask=row_mask)
            tl.store(normaliser_ptr + place, normaliser, mask=row_mask)
            tl.store(total_ptr + place[:, None] * HEAD_DIM + dims[None, :], total, mask=mask)
            page = _page_of((split + workers) * SPLIT + keys, begin, end, key_start, pages_ptr, PAGE_SIZE)


@triton.jit(do_not_specialize=["sequences", "each", "window", "splits"])
def merge_kernel(
    q_ptr, largest_ptr, normaliser_ptr, total_ptr, out_ptr, cu_seqlens_q_ptr, seqused_k_ptr, k_start_ptr,
    sinks_ptr, v_scale_ptr, out_scale_ptr, sequences, each, window, splits,
    TOKENS: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr,
    SPLIT: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_START: tl.constexpr,
    ONE_TOKEN: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token's query head: the results of the splits it sees, as ``attention_kernel`` stored them, to ``out``.

    ``TOKENS`` were one program's there, and are written already if that saw one split or none. ``q`` says the dtype.
    """
    wait_for_inputs(PDL)
    launch_dependents(PDL)
    if ONE_TOKEN:
        sequence, token = tl.program_id(0), 0
    else:
        sequence, token = _locate(tl.program_id(0), cu_seqlens_q_ptr, sequences, each, 1)
    head = tl.program_id(1)
    first, num_queries, key_start, key_end = _bounds(cu_seqlens_q_ptr, seqused_k_ptr, k_start_ptr, sequence, HAS_START)
    if token >= num_queries:
        return

    oldest = key_end - num_queries
    first_split = _span(oldest, oldest, key_start, key_end, window, CAUSAL, HAS_WINDOW)[0] // SPLIT
    last_split = first_split + splits
    at = oldest + token // TOKENS * TOKENS
    begin, end = _span(at, at + TOKENS - 1, key_start, key_end, window, CAUSAL, HAS_WINDOW)
    if tl.minimum(tl.cdiv(end, SPLIT), last_split) - begin // SPLIT <= 1:
        return

    begin, end = _span(oldest + token, oldest + token, key_start, key_end, window, CAUSAL, HAS_WINDOW)
    end_split = tl.minimum(tl.cdiv(end, SPLIT), last_split)
    row = (first + token) * NUM_HEADS + head + tl.arange(0, 1)
    dims = tl.arange(0, HEAD_DIM_PADDED)[None, :]
    dim_mask = dims < HEAD_DIM
    largest, normaliser, total = _nothing(1, HEAD_DIM_PADDED)
    for split in tl.range(begin // SPLIT, end_split, num_stages=STAGES):
        place = row * splits + split - first_split
        split_total = tl.load(total_ptr + place[:, None] * HEAD_DIM + dims, mask=dim_mask, other=0.0)
        largest, normaliser, total = _merge(
            largest, normaliser, total, tl.load(largest_ptr + place), tl.load(normaliser_ptr + place), split_total
        )
    heads = head + tl.arange(0, 1)
    mean = _output(largest, normaliser, total, sinks_ptr, heads, v_scale_ptr)
    out = _stored(mean, out_scale_ptr, q_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * HEAD_DIM + dims, out, mask=dim_mask)
