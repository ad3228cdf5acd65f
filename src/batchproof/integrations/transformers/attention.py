"""``paged_attention`` under the two names that transformers looks attention up by.

"batchproof" serves a usual forward: padding on either side is cut away and the rest is computed ragged, at the
absolute positions it has in its sequence. "paged|batchproof" serves continuous batching, which is ragged already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from ...errors import UnsupportedError
from ...ops.attention import paged_attention

__all__ = ["NAME", "register_attention"]

NAME = "batchproof"


def register_attention() -> None:
    """Make both names known to transformers; doing it twice is doing it once."""
    AttentionInterface.register(NAME, _padded_attention)
    # The mask FlashAttention gets: [batch, keys] of what is not padding, or None. The paged name has no mask.
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    AttentionInterface.register(f"paged|{NAME}", _paged_attention)


def _refuse(dropout: float) -> None:
    if dropout:
        raise UnsupportedError(f"attention dropout is {dropout}, want 0: call model.eval()")


def _padded_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """For query [B, H, Q, D], key and value [B, Hkv, K, D]: ([B, Q, H, D], None), zero where the query is padding."""
    _refuse(dropout)
    batch, heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    keep, first, lengths = _real_tokens(attention_mask, batch, num_keys, query.device)
    queries_per_row = torch.full_like(lengths, num_queries) if keep is None else keep[:, -num_queries:].sum(-1)
    k_start = None
    if sliding_window and position_ids is not None:  # the cache may have let go of a sequence's first keys
        positions = position_ids.to(query.device).expand(batch, -1)
        positions = positions if keep is None else positions.masked_fill(~keep[:, -num_queries:], -1)
        k_start = positions.amax(-1) + 1 - lengths
    slots = torch.arange(batch, device=query.device).unsqueeze(1) * num_keys + first.unsqueeze(1)
    table = slots + torch.arange(num_keys, device=query.device)
    q = query.transpose(1, 2)
    out = paged_attention(
        q.reshape(-1, heads, head_dim) if keep is None else q[keep[:, -num_queries:]],
        key.transpose(1, 2).reshape(batch * num_keys, 1, -1, head_dim),
        value.transpose(1, 2).reshape(batch * num_keys, 1, -1, head_dim),
        cu_seqlens_q=torch.nn.functional.pad(queries_per_row.cumsum(0), (1, 0)),
        seqused_k=lengths,
        block_table=table,
        max_seqlen_q=num_queries,
        softmax_scale=head_dim**-0.5 if scaling is None else scaling,
        causal=getattr(module, "is_causal", True),
        window=sliding_window or 0,
        softcap=softcap or 0.0,
        k_start=k_start,
        sinks=kwargs.get("s_aux"),
    )
    if keep is None:
        return out.view(batch, num_queries, heads, head_dim), None
    padded = torch.zeros_like(q, memory_format=torch.contiguous_format)
    padded[keep[:, -num_queries:]] = out
    return padded, None


def _real_tokens(
    mask: torch.Tensor | None, batch: int, num_keys: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(keep [B, K] or None, first [B], length [B]): which keys are not padding; they must be one run a row."""
    if mask is None:
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        return None, zeros, zeros + num_keys
    if mask.dim() != 2 or mask.shape[1] != num_keys:
        raise UnsupportedError(
            f"attention mask of shape {tuple(mask.shape)}, want [{batch}, {num_keys}] of what to keep"
        )
    keep = mask.to(torch.bool)
    lengths = keep.sum(-1)
    first = keep.int().argmax(-1)
    index = torch.arange(num_keys, device=device)
    run = (index >= first.unsqueeze(1)) & (index < (first + lengths).unsqueeze(1))
    if not torch.equal(run, keep):
        raise UnsupportedError("attention mask with holes, want padding on the left or right of each sequence only")
    return keep, first, lengths


def _paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    *,
    cache: Any,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: Any,
    max_seqlen_q: int,
    read_index: list[torch.Tensor],
    write_index: list[torch.Tensor],
    position_ids: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """For query [1, H, tokens, D], key and value [1, Hkv, tokens, D] of the new tokens: ([1, tokens, H, D], None)."""
    _refuse(dropout)
    layer: int = module.layer_idx  # type: ignore[assignment]
    window = cache.sliding_windows[layer]  # 1 stands for full attention
    if isinstance(cu_seq_lens_k, dict):
        cu_seq_lens_k = cu_seq_lens_k["full_attention" if window == 1 else "sliding_attention"]
    # Writes the new keys and values and returns every sequence's, one after another in the order of positions.
    keys, values = cache.update(key, value, layer, read_index, write_index)
    lengths = cu_seq_lens_k.diff()
    first = cu_seq_lens_k[:-1].unsqueeze(1).long()
    longest = int(kwargs["max_seqlen_k"]) if not isinstance(kwargs.get("max_seqlen_k"), dict) else int(lengths.max())
    table = (first + torch.arange(max(longest, 1), device=query.device)).clamp_(max=max(keys.shape[0] - 1, 0))
    k_start = None
    if window != 1:
        ends = position_ids[0, cu_seq_lens_q[1:].long() - 1] + 1
        k_start = ends - lengths
    out = paged_attention(
        query[0].transpose(0, 1),
        keys.unsqueeze(1),
        values.unsqueeze(1),
        cu_seqlens_q=cu_seq_lens_q,
        seqused_k=lengths,
        block_table=table,
        max_seqlen_q=int(max_seqlen_q),
        softmax_scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=0 if window == 1 else window,
        softcap=softcap or 0.0,
        k_start=k_start,
        sinks=kwargs.get("s_aux"),
    )
    return out.unsqueeze(0), None
