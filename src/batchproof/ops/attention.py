"""Paged attention over ragged sequences: prefill, chunked prefill, decode and cached prefixes in one order.

    out[t, h] = sum over visible j of softmax_j(softcap(q[t, h] . k[j, h'] * softmax_scale)) * v[j, h']

for the query token at absolute position p of its sequence; visible are j <= p (causal) and j > p - window. A head's
sink, if it has one, is one more score of the softmax, of a value that is zero. Keys and values in fp8 have a scale.

Invariance: keys are cut in splits of SPLIT, and those in tiles of TILE, at absolute positions of their own sequence.
An online softmax in fp32 takes a split's tiles in ascending order, from nothing; the splits' results are merged in
ascending order, always by one formula. A masked key adds an exact zero, and a fully masked tile or split changes
nothing, so a query's bits depend on its own row, its sequence's keys up to its position and the scalars: not on how
many queries came with it, on neighbours, on the block table's layout or the page size; nor on how many programs
share the splits, nor on their rows and warps, which the shapes of a batch choose (``_attention_plan``). See
``_attention_kernels``.
On the CPU scores and outputs are exact sums (see ``_attention_cpu``), which have no order.

Source: Dao et al., FlashAttention, 2022 (online softmax); Kwon et al., PagedAttention, 2023 (block tables);
Dao et al., Flash-Decoding, 2023 (splits of keys).
"""

from __future__ import annotations

import math
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from ..errors import ArgumentError, ShapeError
from ..registry import OpSpec, register_spec
from ._attention_cpu import attend_paged, slots_of, visible_keys
from ._attention_kernels import attention_kernel, merge_kernel
from ._attention_plan import Block, Plan, blocks_for, plan_for
from ._fast_launch import FastKernel
from ._hopper import is_hopper
from ._library import (
    check_device,
    check_dtype,
    check_positive_scalar,
    check_same,
    check_scalar,
    register_op,
    require_no_grad,
)
from ._quantize import quantize_static_fp8_reference
from ._row_launch import launch_options
from ._triton import processors, triton

__all__ = ["paged_attention", "paged_attention_reference"]

# What the bits depend on: the same for every batch
SPLIT = 512  # keys whose softmax starts anew, at absolute positions; a multiple of TILE
TILE = 64  # keys per step of the online softmax
# What they do not depend on (see ``_attention_plan`` as well)
MERGE_STAGES = 4  # splits' results in flight

_ATTENTION, _MERGE = FastKernel(attention_kernel), FastKernel(merge_kernel)
FP8 = torch.float8_e4m3fn  # what a cache may be instead of q's dtype


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
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
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
        scores = scores if k_scale is None else scores * k_scale.double()
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = positions[num_keys - queries.shape[0] :]
        scores = scores.masked_fill(~visible_keys(at, positions, causal, window), -math.inf)
        if sinks is not None:
            sink = sinks.double().view(-1, 1, 1).expand(-1, scores.shape[1], 1)
            scores = torch.cat([scores, sink], -1)
        probabilities = scores.softmax(-1).nan_to_num(0.0)[..., :num_keys]
        means = torch.einsum("hqk,khd->qhd", probabilities, values)
        out[bounds[i] : bounds[i + 1]] = (means if v_scale is None else means * v_scale.double()).to(q.dtype)
    return out if out_scale is None else quantize_static_fp8_reference(out, out_scale)


def splits_for(context: int, max_seqlen_q: int, window: int, has_start: bool) -> int:
    """Most splits with a key that a query of one sequence sees, of ``context`` keys at most; from shapes alone."""
    bounds = [context + (SPLIT - 1 if has_start else 0)]  # from a split's last key on, if the first need not be at 0
    if window:
        bounds.append(window + max_seqlen_q - 1 + SPLIT - 1)
    return -(-min(bounds) // SPLIT)


@lru_cache
def _hopper() -> ModuleType | None:
    """The module of the kernel for Hopper; None with a Triton that has no Gluon, or another."""
    try:
        from . import _hopper_attention
    except ImportError:
        return None
    return _hopper_attention


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
    k_start: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    workers: int | None = None,
    block: Block | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the kernels, which want unit stride on every tensor's last axis.

    ``workers`` and ``block``: as ``workers_for`` and ``block_for`` say. ``out``: contiguous, to be written; in fp8 if
    there is an ``out_scale``.
    """
    num_sequences, kv_heads = seqused_k.shape[0], k_cache.shape[2]
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype if out_scale is None else FP8, device=q.device)
    if q.numel() == 0 or num_sequences == 0 or max_seqlen_q == 0:
        return out.zero_()
    q, k_cache, v_cache, block_table = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (q, k_cache, v_cache, block_table)
    )
    k_start = None if k_start is None else k_start.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    sequences = (cu_seqlens_q.contiguous(), seqused_k.contiguous(), k_start)
    num_tokens, num_heads, head_dim = q.shape
    context = block_table.shape[1] * k_cache.shape[1]
    several = q.dtype != torch.float32 and is_hopper(q.device)
    splits = splits_for(context, max_seqlen_q, window, k_start is not None)
    as_it_is = block is None and k_start is None and k_scale is None and v_scale is None
    hopper = _hopper() if several and as_it_is else None
    places = hopper.places_for(q, k_cache, v_cache) if hopper else None
    plan = plan_for(
        q.shape, num_sequences, kv_heads, max_seqlen_q, splits, several, processors(q.device), workers, block,
        places is not None,
    )  # fmt: skip
    parts: list[torch.Tensor | None] = [None] * 3  # largest scores, normalisers, totals
    if plan.workers > 1:
        shape = (num_tokens, num_heads, splits)
        parts = [q.new_empty((*shape, *of), dtype=torch.float32) for of in ((), (), (head_dim,))]
    attention_constants, merge_constants = _constants(
        num_heads, kv_heads, head_dim, k_cache.shape[1], causal, window > 0, softcap > 0.0, k_start is not None,
        max_seqlen_q == 1, plan, SPLIT, TILE, tuple(launch_options(q).items()),
    )  # fmt: skip
    odd = None  # what is left for attention_kernel to do; None for all
    if hopper and places is not None and plan.consumers:
        odd = hopper.launch(
            q, k_cache, v_cache, places, out, *sequences[:2], block_table, sinks, out_scale, softmax_scale, causal,
            window, softcap, plan, parts, splits, TILE, SPLIT,
        )  # fmt: skip
    if plan.consumers != 1:
        _ATTENTION(
            (*plan.grid, plan.workers), q,
            (
                q, k_cache, v_cache, out, *parts, *sequences, block_table, sinks, k_scale, v_scale, out_scale,
                odd, num_sequences, plan.each, num_tokens, block_table.shape[1], *q.stride()[:2], *k_cache.stride()[:3],
                *v_cache.stride()[:3], block_table.stride(0), softmax_scale, softcap, window, plan.workers, splits,
            ),
            attention_constants,
        )  # fmt: skip
    if plan.workers > 1:
        blocks, each = blocks_for(num_tokens, num_sequences, max_seqlen_q, 1)
        _MERGE(
            (blocks, num_heads, 1), q,
            (q, *parts, out, *sequences, sinks, v_scale, out_scale, num_sequences, each, window, splits),
            merge_constants,
        )  # fmt: skip
    return out


@lru_cache(maxsize=4096)
def _constants(
    num_heads: int, kv_heads: int, head_dim: int, page_size: int, causal: bool, has_window: bool, has_softcap: bool,
    has_start: bool, one_token: bool, plan: Plan, split: int, tile: int, options: tuple[tuple[str, Any], ...],
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """What attention_kernel and merge_kernel are compiled with; made once, as an engine waits for it in every layer."""
    of_both = {
        "NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "HEAD_DIM_PADDED": max(16, triton.next_power_of_2(head_dim)),
        "SPLIT": split, "CAUSAL": causal, "HAS_WINDOW": has_window, "HAS_START": has_start, "ONE_TOKEN": one_token,
        **dict(options),
    }  # fmt: skip
    of_attention = {
        "GROUP": num_heads // kv_heads, "GROUP_PADDED": plan.group, "ROWS": plan.block.rows,
        "CONSUMERS": max(1, plan.consumers), "TILE": tile, "PAGE_SIZE": page_size,
        "WALK": plan.workers == 1, "HAS_SOFTCAP": has_softcap, "num_warps": plan.block.warps,
        "num_stages": plan.block.stages, **of_both,
    }  # fmt: skip
    return of_attention, {"TOKENS": plan.tokens, "STAGES": MERGE_STAGES, "num_warps": 1, **of_both}


def _paged_attention_cpu(*arguments: Any) -> torch.Tensor:
    _validate(*arguments)
    *others, out_scale = arguments
    out = attend_paged(*others)
    if out_scale is None:
        return out
    check_positive_scalar("paged_attention", "out_scale", out_scale)
    return quantize_static_fp8_reference(out, out_scale)


def _paged_attention_cuda(*arguments: Any) -> torch.Tensor:
    _validate(*arguments)
    return launch(*arguments)


def _paged_attention_fake(*arguments: Any) -> torch.Tensor:
    _validate(*arguments)
    q: torch.Tensor = arguments[0]
    dtype = q.dtype if arguments[-1] is None else FP8
    return torch.empty_like(q, dtype=dtype, memory_format=torch.contiguous_format)


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
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> None:
    op = "paged_attention"
    check_dtype(op, "q", q)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_device(op, name, cache, "q", q) if cache.dtype == FP8 else check_same(op, name, cache, "q", q)
        if q.dim() != 3 or cache.dim() != 4 or cache.shape[3] != q.shape[2] or q.shape[1] % cache.shape[2]:
            raise ShapeError(
                f"{op}: q has shape {tuple(q.shape)} and {name} {tuple(cache.shape)}, want [num_tokens, num_heads, "
                "head_dim] and [num_pages, page_size, num_kv_heads, head_dim] with num_heads a multiple of num_kv_heads"
            )
    check_same(op, "v_cache", v_cache, "k_cache", k_cache)
    if v_cache.shape != k_cache.shape:
        raise ShapeError(f"{op}: v_cache has shape {tuple(v_cache.shape)}, want {tuple(k_cache.shape)} as k_cache has")
    indices = {"cu_seqlens_q": cu_seqlens_q, "seqused_k": seqused_k, "block_table": block_table, "k_start": k_start}
    for name, index in indices.items():
        if index is None:
            continue
        check_dtype(op, name, index, (torch.int32, torch.int64))
        check_device(op, name, index, "q", q)
    if sinks is not None:
        check_dtype(op, "sinks", sinks)
        if sinks.shape != (q.shape[1],):
            raise ShapeError(f"{op}: sinks has shape {tuple(sinks.shape)}, want ({q.shape[1]},)")
        check_device(op, "sinks", sinks, "q", q)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale), ("out_scale", out_scale)):
        if scale is not None:
            check_scalar(op, name, scale, "q", q)
    sequences = seqused_k.shape[0]
    if k_start is not None and k_start.shape != (sequences,):
        raise ShapeError(f"{op}: k_start has shape {tuple(k_start.shape)}, want ({sequences},)")
    if cu_seqlens_q.shape != (sequences + 1,) or block_table.dim() != 2 or block_table.shape[0] != sequences:
        raise ShapeError(
            f"{op}: cu_seqlens_q {tuple(cu_seqlens_q.shape)}, seqused_k {tuple(seqused_k.shape)}, block_table "
            f"{tuple(block_table.shape)}, want [S + 1], [S] and [S, max_pages]"
        )
    if not 0.0 < softmax_scale < math.inf or window < 0 or not 0.0 <= softcap < math.inf or max_seqlen_q < 0:
        raise ArgumentError(
            f"{op}: softmax_scale {softmax_scale}, window {window}, softcap {softcap}, max_seqlen_q {max_seqlen_q}; "
            "want finite numbers, the first positive and the others not negative"
        )


_paged_attention = register_op(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cu_seqlens_q, Tensor seqused_k, "
    "Tensor block_table, SymInt max_seqlen_q, float softmax_scale, bool causal, int window, float softcap, "
    "Tensor? k_start, Tensor? sinks, Tensor? k_scale, Tensor? v_scale, Tensor? out_scale) -> Tensor",
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
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of ragged queries over keys and values in pages.

    Args:
        q: [num_tokens, num_heads, head_dim], fp32, fp16 or bf16; the sequences' new tokens, one after another.
        k_cache: [num_pages, page_size, num_kv_heads, head_dim], q's dtype or fp8 e4m3, the new tokens' keys included.
        v_cache: the values, as k_cache.
        cu_seqlens_q: [num_sequences + 1], int32 or int64: where each sequence's queries begin and end.
        seqused_k: [num_sequences]: keys of each sequence; its queries are the last of these positions.
        block_table: [num_sequences, max_pages]: the pages of each sequence in the order of positions.
        max_seqlen_q: the most queries any sequence has; bounds the launch and changes no bits.
        softmax_scale: positive factor on q . k, often head_dim ** -0.5.
        causal: whether a query sees only positions up to its own.
        window: how many positions a query sees, its own included; 0 for all.
        softcap: cap * tanh(score / cap) if not 0 (Gemma-2).
        k_start: [num_sequences]: the absolute position of each block table's first key, where a sliding window has
            let go of the older ones; None for 0.
        sinks: [num_heads], fp32, fp16 or bf16: a score of each head for no key (GPT-OSS); None for none.
        k_scale: one fp32 element, positive: what keys in fp8 are to be multiplied by; None for 1.
        v_scale: one fp32 element, as k_scale for values.
        out_scale: one fp32 element, positive: the output is divided by it and rounded to fp8; None for q's dtype.

    Returns:
        [num_tokens, num_heads, head_dim], contiguous; zero for a query that sees no key. With an out_scale fp8 e4m3,
        saturated at 448 times the scale, NaN as 448: the bits of the quantisation of the output in q's dtype.

    Invariance: see the module docstring. Prefill at once, in chunks and token by token give the same bits.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: before anything is computed.
        UnsupportedError: autograd would record the call.
    """
    require_no_grad("paged_attention", q, k_cache, v_cache, sinks, out_scale)
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
        sinks,
        k_scale,
        v_scale,
        out_scale,
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
