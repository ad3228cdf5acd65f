"""Paged attention on the CPU: scores and outputs are exact sums, so neither the batch nor an order shows in them."""

from __future__ import annotations

import math
import threading

import torch

from . import _exact

__all__ = ["attend_paged", "slots_of", "visible_keys"]

SCRATCH_ELEMENTS = 2**23  # 64 MiB a thread
_PROBABILITY_UNIT = 2.0**-30  # probabilities are summed in fixed point; 2**22 of them stay exact in float64
_scratch = threading.local()


def slots_of(block_table: torch.Tensor, index: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """Cache slots [B, K] of the keys at ``index`` [B, K] (or [K]) of block tables [B, P]."""
    page_size = cache.shape[1]
    pages = block_table.long().gather(1, (index // page_size).expand(block_table.shape[0], -1))
    return pages * page_size + index % page_size


def visible_keys(at: torch.Tensor, keys: torch.Tensor, causal: bool, window: int) -> torch.Tensor:
    """[..., Q, K]: may the query at position ``at`` [..., Q] see the key at position ``keys`` [K]?"""
    distance = at.unsqueeze(-1) - keys
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return visible & (distance < window) if window else visible


def attend_paged(
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
) -> torch.Tensor:
    """Sequences with equally many queries are computed together: exact sums make the padding of keys harmless.

    Keys that only fill up a shorter sequence are masked, and never read from another sequence's pages.
    """
    out = torch.zeros(q.shape, dtype=q.dtype)
    by_queries: dict[int, list[int]] = {}
    for i, count in enumerate(cu_seqlens_q.diff().tolist()):
        by_queries.setdefault(count, []).append(i)
    starts = torch.zeros_like(seqused_k) if k_start is None else k_start
    scale = softmax_scale if k_scale is None else softmax_scale * k_scale.item()
    out_scale = 1.0 if v_scale is None else v_scale.item()
    for num_queries, members in by_queries.items():
        if num_queries == 0:
            continue
        chosen = torch.tensor(members)
        tokens = (cu_seqlens_q[chosen].long().unsqueeze(-1) + torch.arange(num_queries)).view(-1)
        first = starts[chosen].long().unsqueeze(-1)
        end = first + seqused_k[chosen].long().unsqueeze(-1)
        # Chunks of the exact product lie at absolute positions, as the GPU's tiles do.
        positions = torch.arange(int(first.min()) // _exact.CHUNK * _exact.CHUNK, int(end.max()))
        if positions.numel() == 0:
            continue
        exists = (positions >= first) & (positions < end)
        # Where a sequence has no key, its last one stands in: it is masked, and masked keys count as exact zeros.
        index = torch.minimum((positions - first).clamp_(min=0), (end - first - 1).clamp_(min=0))
        slots = slots_of(block_table.index_select(0, chosen), index, k_cache)
        keys, values = (
            c.flatten(0, 1)[slots.view(-1)].view(*slots.shape, *c.shape[2:]).to(q.dtype) for c in (k_cache, v_cache)
        )
        at = end - num_queries + torch.arange(num_queries)
        visible = visible_keys(at, positions, causal, window) & exists.unsqueeze(1)
        queries = q.index_select(0, tokens).view(len(members), num_queries, *q.shape[1:])
        result = _attend_groups(queries, keys, values, visible, scale, softcap, sinks, out_scale)
        out.index_copy_(0, tokens, result.reshape(-1, *q.shape[1:]))
    return out


def _attend_groups(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor, scale: float, softcap: float,
    sinks: torch.Tensor | None, out_scale: float,
) -> torch.Tensor:  # fmt: skip
    """``_attend_cpu`` for q [B, Q, H, D]: the query heads that share a key head become rows of one product."""
    batch, num_queries, heads, head_dim = q.shape
    kv_heads = keys.shape[2]
    group = heads // kv_heads
    rows = q.view(batch, num_queries, kv_heads, group, head_dim).transpose(1, 2).flatten(2, 3)
    if sinks is not None:  # [kv_heads, rows, 1]
        sinks = sinks.float().view(kv_heads, 1, group).expand(-1, num_queries, -1).reshape(kv_heads, -1, 1)
    out = _attend_cpu(rows, keys, values, visible.repeat_interleave(group, 1).unsqueeze(1), scale, softcap, sinks)
    return (
        _exact.rounded_to(out if out_scale == 1.0 else out * out_scale, q.dtype)
        .view(batch, kv_heads, num_queries, group, head_dim)
        .transpose(1, 2)
        .flatten(2, 3)
    )


def _attend_cpu(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor, scale: float, softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Exact attention of q [B, H, Q, D] over keys and values [B, K, H, D].

    ``visible`` is [B, 1, Q, K] and ``sinks`` [H, Q, 1]; float64 out.
    """
    rounded, _, finite = _round_vectors(keys)
    packed = _exact.Packed(rounded.transpose(-1, -2).split(_exact.CHUNK, dim=-2), _exact.bits_for(keys), finite)
    scores = _exact.matmul_packed(q, packed).mul_(scale).float()
    if softcap:
        scores = softcap * _tanh(scores / softcap)
    scores = scores.masked_fill_(~visible, -math.inf)
    largest = scores.amax(-1, keepdim=True)
    if sinks is not None:
        largest = torch.maximum(largest, sinks)
    base = largest.masked_fill(largest == -math.inf, 0.0)
    p = _exact.exp(scores.sub_(base)).double()
    normaliser = (p / _PROBABILITY_UNIT).round_().sum(-1, keepdim=True)
    if sinks is not None:
        normaliser += (_exact.exp(sinks - base).double() / _PROBABILITY_UNIT).round_()
    normaliser *= _PROBABILITY_UNIT
    # Each key's values are rounded relative to the largest of that key alone: a unit taken over several keys would
    # depend on which keys came along.
    rounded, above, finite = _round_vectors(values)
    if not finite:
        rounded, above, _ = _round_vectors(values.nan_to_num(0.0, 0.0, 0.0))
    packed = _exact.Packed(rounded.split(_exact.CHUNK, dim=-2), _exact.bits_for(values), finite=True)
    out = _exact.matmul_packed(p, packed, above.transpose(-1, -2))
    out = out.div_(normaliser.masked_fill_(normaliser == 0.0, 1.0))
    return out if finite else _with_non_finite(out, p, visible, values.transpose(1, 2).double())


def _round_vectors(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """The vectors of x [B, K, H, D], each rounded relative to its largest value, as float64 [B, H, K, D].

    With them the power of two above that value [B, H, K, 1] and whether all are finite; those that are not stay.
    The rounded vectors are in scratch memory, until the next call.
    """
    wide = _scratch_memory(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).copy_(x.transpose(1, 2))
    largest = torch.maximum(wide.amax(-1, keepdim=True), -wide.amin(-1, keepdim=True))
    above = _exact.power_of_two_above(largest)
    finite = bool(largest.isfinite().all())
    magic = above if finite else torch.where(largest.isfinite(), above, torch.zeros_like(above))
    return _exact.round_rows_(wide, magic, _exact.bits_for(x)[1]), above, finite


def _scratch_memory(*shape: int) -> torch.Tensor:
    """float64 memory that this thread uses again: having it from the system anew costs more than computing in it."""
    size = math.prod(shape)
    if size > SCRATCH_ELEMENTS:
        return torch.empty(shape, dtype=torch.float64)
    memory = getattr(_scratch, "memory", None)
    if memory is None or memory.numel() < size:
        with torch.inference_mode(False):  # a tensor of inference mode could not be written outside it
            memory = _scratch.memory = torch.empty(min(2 * size, SCRATCH_ELEMENTS), dtype=torch.float64)
    return memory[:size].view(shape)


def _with_non_finite(out: torch.Tensor, p: torch.Tensor, visible: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``out`` as if values that are not finite were multiplied by the probabilities of keys that are visible."""

    def any_of(rows: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        return _exact.exact_matmul(rows.double(), kind.double()) > 0.0

    seen, visible = p > 0.0, visible.expand_as(p)
    plus, minus = any_of(seen, values == math.inf), any_of(seen, values == -math.inf)
    nan = any_of(visible, values.isnan()) | any_of(visible & (p == 0.0), values.isinf())
    out = out.masked_fill(plus, math.inf).masked_fill(minus, -math.inf)
    return out.masked_fill(nan | (plus & minus), math.nan)


def _tanh(x: torch.Tensor) -> torch.Tensor:
    """The hyperbolic tangent of float32, from exp of what is not positive."""
    e = _exact.exp(-2.0 * x.abs())
    return torch.where(x < 0, (e - 1.0) / (1.0 + e), (1.0 - e) / (1.0 + e))
