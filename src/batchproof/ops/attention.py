"""Paged attention over ragged sequences: prefill, chunked prefill, decode and cached prefixes by one path.

    out[t, h] = sum over visible j of softmax_j(softcap(q[t, h] . k[j, h'] * softmax_scale)) * v[j, h']

for the query token at absolute position p of its sequence; visible are j <= p (causal) and j > p - window.

Invariance: keys are taken in tiles of TILE at absolute positions of their own sequence, in ascending order, with an
online softmax in fp32, by one tile shape for every batch. A masked key adds an exact zero and a fully masked tile
changes nothing, so a query's bits depend on its own row, its sequence's keys up to its position and the scalars:
not on how many queries came with it, on neighbours, on the block table's layout or the page size.
On the CPU scores and outputs are exact sums (see ``_attention_cpu``), which have no order.

Source: Dao et al., FlashAttention, 2022 (online softmax); Kwon et al., PagedAttention, 2023 (block tables).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..errors import ArgumentError, DeviceError, ShapeError
from ..registry import OpSpec, register_spec
from ._attention_cpu import attend_paged, slots_of, visible_keys
from ._library import check_dtype, check_same, register_op, require_no_grad
from ._triton import device_guard, tl, triton

__all__ = ["paged_attention", "paged_attention_reference"]

TILE = 64  # keys per step of the online softmax, at absolute positions
ROWS = 16  # query rows (tokens times query heads of one key head) per program, whatever the batch
WARPS = 4


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    k_start: torch.Tensor | None = None,
) -> torch.Tensor:
    """The formula in float64, one sequence at a time."""
    out = torch.zeros_like(q)
    bounds = cu_seqlens_q.tolist()
    group = q.shape[1] // k_cache.shape[2]
    for i, num_keys in enumerate(seqused_k.tolist()):
        queries = q[bounds[i] : bounds[i + 1]].double()
        index = torch.arange(num_keys, device=q.device)
        slots = slots_of(block_table[i : i + 1], index, k_cache)[0]
        positions = index + (0 if k_start is None else k_start[i])
        keys, values = (c.flatten(0, 1)[slots].double().repeat_interleave(group, 1) for c in (k_cache, v_cache))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = positions[num_keys - queries.shape[0] :]
        scores = scores.masked_fill(~visible_keys(at, positions, causal, window), -math.inf)
        probabilities = scores.softmax(-1).nan_to_num(0.0)
        out[bounds[i] : bounds[i + 1]] = torch.einsum("hqk,khd->qhd", probabilities, values).to(q.dtype)
    return out


@triton.jit
def _softcap(scores, cap):
    """The soft cap, cap * tanh(scores / cap), with tanh(x) = 1 - 2 / (exp(2 x) + 1)."""
    return cap * (1.0 - 2.0 / (tl.exp(2.0 * (scores / cap)) + 1.0))


@triton.jit
def _odd_values(probabilities, v):
    """What infinities and NaN in ``v`` add to the output: nothing where the probability is zero, as of masked keys."""
    seen = (probabilities > 0.0).to(tl.float16)
    nan = tl.dot(seen, (v != v).to(tl.float16)) > 0.0
    plus = tl.dot(seen, (v.to(tl.float32) == float("inf")).to(tl.float16)) > 0.0
    minus = tl.dot(seen, (v.to(tl.float32) == float("-inf")).to(tl.float16)) > 0.0
    out = tl.where(plus, float("inf"), tl.where(minus, float("-inf"), 0.0))
    return tl.where(nan | (plus & minus), float("nan"), out)


@triton.jit(do_not_specialize=["table_row", "softmax_scale", "softcap", "window", "page_size"])
def _paged_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, cu_seqlens_q_ptr, seqused_k_ptr, block_table_ptr, k_start_ptr,
    q_token, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head, table_row: tl.int64,
    softmax_scale: tl.float32, softcap: tl.float32, window, page_size,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_START: tl.constexpr,
):  # fmt: skip
    """ROWS query rows of one sequence and key head: row r is token r // GROUP_PADDED, query head r % GROUP_PADDED."""
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    first = tl.load(cu_seqlens_q_ptr + sequence).to(tl.int64)
    num_queries = tl.load(cu_seqlens_q_ptr + sequence + 1).to(tl.int64) - first
    key_start = tl.load(k_start_ptr + sequence).to(tl.int32) if HAS_START else 0
    key_end = key_start + tl.load(seqused_k_ptr + sequence).to(tl.int32)
    tokens_per_program: tl.constexpr = ROWS // GROUP_PADDED
    start_token = tl.program_id(2) * tokens_per_program
    if start_token >= num_queries:
        return

    rows = tl.arange(0, ROWS)
    token = start_token + rows // GROUP_PADDED
    head_in_group = rows % GROUP_PADDED
    row_mask = (token < num_queries) & (head_in_group < GROUP)
    head = kv_head * GROUP + head_in_group
    at = (key_end - num_queries + token).to(tl.int32)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    dim_mask = dims < HEAD_DIM
    q_offsets = (first + token)[:, None] * q_token + head[:, None] * q_head + dims[None, :]
    q = tl.load(q_ptr + q_offsets, mask=row_mask[:, None] & dim_mask[None, :], other=0.0)

    largest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    normaliser = tl.zeros([ROWS], dtype=tl.float32)
    total = tl.zeros([ROWS, HEAD_DIM_PADDED], dtype=tl.float32)
    oldest_at = key_end - num_queries.to(tl.int32) + start_token
    end = tl.minimum(oldest_at + tokens_per_program, key_end) if CAUSAL else key_end
    begin = tl.maximum(oldest_at - window + 1, key_start) if HAS_WINDOW else key_start

    for tile in range(begin // TILE * TILE, end, TILE):
        keys = tile + tl.arange(0, TILE)
        key_mask = (keys >= key_start) & (keys < key_end)
        index = keys - key_start
        page_ptrs = block_table_ptr + sequence * table_row + index // page_size
        page = tl.load(page_ptrs, mask=key_mask, other=0).to(tl.int64)
        slot = (index % page_size).to(tl.int64)
        k_offsets = page[None, :] * k_page + slot[None, :] * k_slot + kv_head * k_head + dims[:, None]
        k = tl.load(k_ptr + k_offsets, mask=key_mask[None, :] & dim_mask[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * softmax_scale
        if HAS_SOFTCAP:
            scores = _softcap(scores, softcap)
        visible = key_mask[None, :] & row_mask[:, None]
        if CAUSAL:
            visible &= keys[None, :] <= at[:, None]
        if HAS_WINDOW:
            visible &= at[:, None] - keys[None, :] < window
        scores = tl.where(visible, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # nothing visible yet
        probabilities = tl.exp(scores - base[:, None])
        rescale = tl.exp(largest - base)
        normaliser = normaliser * rescale + tl.sum(probabilities, axis=1)
        v_offsets = page[:, None] * v_page + slot[:, None] * v_slot + kv_head * v_head + dims[None, :]
        v = tl.load(v_ptr + v_offsets, mask=key_mask[:, None] & dim_mask[None, :], other=0.0)
        total = total * rescale[:, None]
        odd = (v != v) | (tl.abs(v.to(tl.float32)) == float("inf"))
        clean = tl.where(odd, tl.zeros_like(v), v)
        total = tl.dot(probabilities.to(v.dtype), clean, total, input_precision="ieee")
        if tl.max(tl.max(odd.to(tl.int32), axis=1), axis=0) > 0:
            total += _odd_values(probabilities, v)
        largest = new_largest

    out = total / tl.where(normaliser == 0.0, 1.0, normaliser)[:, None]
    out_offsets = ((first + token)[:, None] * NUM_HEADS + head[:, None]) * HEAD_DIM + dims[None, :]
    tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & dim_mask[None, :])


def launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    window: int,
    softcap: float,
    k_start: torch.Tensor | None,
) -> torch.Tensor:
    """Run the kernel, which wants unit stride on every tensor's last axis."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    num_sequences, kv_heads = seqused_k.shape[0], k_cache.shape[2]
    if out.numel() == 0 or num_sequences == 0 or max_seqlen_q == 0:
        return out
    q, k_cache, v_cache, block_table = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (q, k_cache, v_cache, block_table)
    )
    cu_seqlens_q, seqused_k = cu_seqlens_q.contiguous(), seqused_k.contiguous()
    k_start = None if k_start is None else k_start.contiguous()
    group = q.shape[1] // kv_heads
    group_padded = triton.next_power_of_2(group)
    rows = max(ROWS, group_padded)
    grid = (num_sequences, kv_heads, triton.cdiv(max_seqlen_q, rows // group_padded))
    with device_guard(q):
        _paged_attention_kernel[grid](
            q, k_cache, v_cache, out, cu_seqlens_q, seqused_k, block_table, k_start,
            *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], block_table.stride(0),
            softmax_scale, softcap, window, k_cache.shape[1],
            NUM_HEADS=q.shape[1], GROUP=group, GROUP_PADDED=group_padded, HEAD_DIM=q.shape[2],
            HEAD_DIM_PADDED=max(16, triton.next_power_of_2(q.shape[2])),
            ROWS=rows, TILE=TILE, CAUSAL=causal, HAS_WINDOW=window > 0, HAS_SOFTCAP=softcap > 0.0,
            HAS_START=k_start is not None, num_warps=WARPS, num_stages=2, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _paged_attention_cpu(*arguments: Any) -> torch.Tensor:
    _validate(*arguments)
    return attend_paged(*arguments)


def _paged_attention_cuda(*arguments: Any) -> torch.Tensor:
    _validate(*arguments)
    return launch(*arguments)


def _paged_attention_fake(*arguments: Any) -> torch.Tensor:
    _validate(*arguments)
    q: torch.Tensor = arguments[0]
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _validate(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    window: int,
    softcap: float,
    k_start: torch.Tensor | None,
) -> None:
    op = "paged_attention"
    check_dtype(op, "q", q)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_same(op, name, cache, "q", q)
        if q.dim() != 3 or cache.dim() != 4 or cache.shape[3] != q.shape[2] or q.shape[1] % cache.shape[2]:
            raise ShapeError(
                f"{op}: q has shape {tuple(q.shape)} and {name} {tuple(cache.shape)}, want [num_tokens, num_heads, "
                "head_dim] and [num_pages, page_size, num_kv_heads, head_dim] with num_heads a multiple of num_kv_heads"
            )
    if v_cache.shape != k_cache.shape:
        raise ShapeError(f"{op}: v_cache has shape {tuple(v_cache.shape)}, want {tuple(k_cache.shape)} as k_cache has")
    indices = {"cu_seqlens_q": cu_seqlens_q, "seqused_k": seqused_k, "block_table": block_table, "k_start": k_start}
    for name, index in indices.items():
        if index is None:
            continue
        check_dtype(op, name, index, (torch.int32, torch.int64))
        if index.device != q.device:
            raise DeviceError(f"{op}: {name} is on {index.device}, want {q.device} where q is")
    sequences = seqused_k.shape[0]
    if k_start is not None and k_start.shape != (sequences,):
        raise ShapeError(f"{op}: k_start has shape {tuple(k_start.shape)}, want ({sequences},)")
    if cu_seqlens_q.shape != (sequences + 1,) or block_table.dim() != 2 or block_table.shape[0] != sequences:
        raise ShapeError(
            f"{op}: cu_seqlens_q {tuple(cu_seqlens_q.shape)}, seqused_k {tuple(seqused_k.shape)}, block_table "
            f"{tuple(block_table.shape)}, want [S + 1], [S] and [S, max_pages]"
        )
    if not math.isfinite(softmax_scale) or window < 0 or not 0.0 <= softcap < math.inf or max_seqlen_q < 0:
        raise ArgumentError(
            f"{op}: softmax_scale {softmax_scale}, window {window}, softcap {softcap}, max_seqlen_q {max_seqlen_q}; "
            "want finite numbers, the last three not negative"
        )


_paged_attention = register_op(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cu_seqlens_q, Tensor seqused_k, "
    "Tensor block_table, SymInt max_seqlen_q, float softmax_scale, bool causal, int window, float softcap, "
    "Tensor? k_start) -> Tensor",
    cpu=_paged_attention_cpu,
    cuda=_paged_attention_cuda,
    fake=_paged_attention_fake,
)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    k_start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of ragged queries over keys and values in pages.

    Args:
        q: [num_tokens, num_heads, head_dim], fp32, fp16 or bf16; the sequences' new tokens, one after another.
        k_cache: [num_pages, page_size, num_kv_heads, head_dim] of q's dtype, the new tokens' keys included.
        v_cache: the values, as k_cache.
        cu_seqlens_q: [num_sequences + 1], int32 or int64: where each sequence's queries begin and end.
        seqused_k: [num_sequences]: keys of each sequence; its queries are the last of these positions.
        block_table: [num_sequences, max_pages]: the pages of each sequence in the order of positions.
        max_seqlen_q: the most queries any sequence has; bounds the launch and changes no bits.
        softmax_scale: factor on q . k, often head_dim ** -0.5.
        causal: whether a query sees only positions up to its own.
        window: how many positions a query sees, its own included; 0 for all.
        softcap: cap * tanh(score / cap) if not 0 (Gemma-2).
        k_start: [num_sequences]: the absolute position of each block table's first key, where a sliding window has
            let go of the older ones; None for 0.

    Returns:
        [num_tokens, num_heads, head_dim], contiguous; zero for a query that sees no key.

    Invariance: see the module docstring. Prefill at once, in chunks and token by token give the same bits.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: before anything is computed.
        UnsupportedError: autograd would record the call.
    """
    require_no_grad("paged_attention", q, k_cache, v_cache)
    result: torch.Tensor = _paged_attention(
        q,
        k_cache,
        v_cache,
        cu_seqlens_q,
        seqused_k,
        block_table,
        max_seqlen_q,
        softmax_scale,
        causal,
        window,
        softcap,
        k_start,
    )
    return result


def _sample(num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    """``num_tokens`` sequences that decode one token each, over 1 to 200 keys in pages of 16."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    pages = 13
    lengths = torch.randint(1, 16 * pages, (num_tokens,), generator=generator, device=device)
    table = torch.randperm(num_tokens * pages, generator=generator, device=device).view(num_tokens, pages)
    return {
        "q": randn(num_tokens, 8, 64),
        "k_cache": randn(max(num_tokens, 1) * pages, 16, 2, 64),
        "v_cache": randn(max(num_tokens, 1) * pages, 16, 2, 64),
        "cu_seqlens_q": torch.arange(num_tokens + 1, dtype=torch.int32, device=device),
        "seqused_k": lengths.int(),
        "block_table": table.int(),
        "max_seqlen_q": 1,
        "softmax_scale": 0.125,
    }


def _select(inputs: dict[str, Any], index: torch.Tensor) -> dict[str, Any]:
    """The sequences in ``index``: their queries, lengths and block tables, over the same cache."""
    index = index.to(inputs["q"].device)
    chosen = {name: inputs[name].index_select(0, index) for name in ("q", "seqused_k", "block_table")}
    return {**inputs, **chosen, "cu_seqlens_q": inputs["cu_seqlens_q"][: len(index) + 1]}


register_spec(
    OpSpec(
        "paged_attention",
        paged_attention,
        paged_attention_reference,
        _sample,
        batch_axes={"q": 0, "seqused_k": 0, "block_table": 0},
        tolerance="attention",
        select_inputs=_select,
    )
)
