"""vLLM's Triton attention over batchproof's ``paged_attention``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...ops._library import FLOAT_DTYPES
from ...ops.attention import FP8, launch
from .log import say_that_it_stays_vllms

__all__ = ["NEUTRAL", "OF_IMPL", "OF_STEP", "attention_over_ours", "forward_over_ours", "why_vllms"]

# What vLLM's ``unified_attention`` is asked for beyond paged attention, and what it is where it is not asked for.
NEUTRAL: dict[str, Any] = {
    "q_descale": None,
    "alibi_slopes": None,
    "qq_bias": None,
    "mm_prefix_range": None,
    "rswa_prefix_lens": None,
    "rswa_window": None,
    "use_alibi_sqrt": False,
    "k_scale_cache": None,
    "v_scale_cache": None,
    "chunk_lookback": -1,
}


def why_vllms(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, causal: Any, window_size: Any,
    others: dict[str, Any],
) -> str | None:  # fmt: skip
    """Why a layer's attention stays vLLM's, in a few words; None if it is ours. No answer follows the batch."""
    if q.dtype not in FLOAT_DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"queries are {q.dtype} and the cache {k.dtype}"
    if int(others.get("kv_quant_mode", 0)):
        return f"the cache is quantised, {others['kv_quant_mode']!r}"
    reason = _why_not_to(out, q.dtype, others.get("output_scale"))
    if reason is not None:
        return reason
    if not isinstance(causal, bool):
        return "causal is a tensor"
    if tuple(window_size) != (-1, -1) and not (causal and window_size[0] >= 0 and window_size[1] <= 0):
        return f"the window is {tuple(window_size)}, causal {causal}"
    asked = [name for name, neutral in NEUTRAL.items() if others.get(name, neutral) is not neutral]
    return f"asked for {', '.join(asked)}" if asked else None


def _why_not_to(out: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> str | None:
    """Why ours does not write to this output, of a model's dtype or quantised by a scale; None if it does."""
    if not out.is_contiguous():
        return "its output is not contiguous"
    if out.dtype != (dtype if scale is None else FP8):
        return f"its output is {out.dtype}, {'not ' if scale is None else ''}to be quantised"
    if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1):
        return f"the scale of its output is {scale.dtype} of shape {tuple(scale.shape)}"
    return None


def attention_over_ours(original: Callable[..., None], is_ours: Callable[[], bool]) -> Callable[..., None]:
    """vLLM's ``unified_attention`` that runs ours where it can, else ``original``; ``is_ours``: if models allow it."""

    @functools.wraps(original)
    def unified_attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, cu_seqlens_q: torch.Tensor,
        max_seqlen_q: int, seqused_k: torch.Tensor, max_seqlen_k: int, softmax_scale: float, causal: Any,
        window_size: Any, block_table: torch.Tensor, softcap: float, *more: Any, **others: Any,
    ) -> None:  # fmt: skip
        if not is_ours():
            reason: str | None = "the model sees some of its prompt both ways"
        elif more:
            reason = "more arguments than known"
        else:
            reason = why_vllms(q, k, v, out, causal, window_size, others)
        if reason is None:
            window = window_size[0] + 1 if window_size[0] >= 0 else 0
            launch(
                q, k, v, cu_seqlens_q, seqused_k, block_table, max_seqlen_q, softmax_scale, causal, window, softcap,
                None, others.get("sinks"), out_scale=others.get("output_scale"), out=out,
            )  # fmt: skip
            return
        say_that_it_stays_vllms("attention stays", reason)
        original(
            q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal, window_size,
            block_table, softcap, *more, **others,
        )  # fmt: skip

    return unified_attention


# What ``TritonAttentionImpl`` has of a layer, and what it is where ``unified_attention`` is asked for nothing beyond
OF_IMPL: dict[str, Any] = {
    "attn_type": "decoder", "alibi_slopes": None, "use_alibi_sqrt": False, "chunk_lookback": -1, "_kv_quant_mode": 0,
    "_is_per_token_head_quant": False,
}  # fmt: skip
OF_STEP: dict[str, Any] = {
    "use_cascade": False, "causal": True, "mm_prefix_range_tensor": None, "rswa_prefix_lens": None, "rswa_window": None,
}  # fmt: skip


class _Layer(NamedTuple):
    """What all calls of a layer have in common. ``k`` and ``v`` are views of ``kv_cache``; None if it is not ours."""

    kv_cache: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    window: int


def _describe(impl: Any, kv_cache: torch.Tensor) -> _Layer:
    plain = all(getattr(impl, name) == neutral for name, neutral in OF_IMPL.items())
    behind, ahead = impl.sliding_window
    paged = kv_cache.dim() == 4 and kv_cache.dtype in FLOAT_DTYPES
    if not plain or not paged or not (behind == -1 or (behind >= 0 and ahead == 0)):
        return _Layer(kv_cache, None, None, 0)
    k, v = kv_cache.transpose(1, 2).split(impl.head_size, dim=-1)
    return _Layer(kv_cache, k, v, behind + 1)


def forward_over_ours(original: Callable[..., Any], is_ours: Callable[[], bool]) -> Callable[..., Any]:
    """vLLM's ``TritonAttentionImpl.forward``, straight to ours where nothing is asked but paged attention.

    It does what ``attention_over_ours`` does, without the views and arguments that vLLM makes for it in every layer: a
    prefill runs in pieces, between which the GPU waits for the host.
    """

    @functools.wraps(original)
    def forward(
        self: Any, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor,
        attn_metadata: Any, output: torch.Tensor, output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> Any:  # fmt: skip
        step = attn_metadata
        known: _Layer | None = self.__dict__.get("batchproof")
        if step is not None and (known is None or known.kv_cache is not kv_cache):
            known = self.batchproof = _describe(self, kv_cache)
        if (
            step is None or known is None or known.k is None or known.v is None or output_block_scale is not None
            or step.use_cascade or step.causal is not True or step.mm_prefix_range_tensor is not None
            or step.rswa_prefix_lens is not None or step.rswa_window is not None
            or query.dtype != kv_cache.dtype or _why_not_to(output, query.dtype, output_scale) is not None
            or not is_ours()
        ):  # fmt: skip
            return original(
                self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        count, out = step.num_actual_tokens, output
        if count != query.shape[0]:
            query, out = query[:count], output[:count]
        launch(
            query, known.k, known.v, step.query_start_loc, step.seq_lens, step.block_table, step.max_query_len,
            self.scale, True, known.window, self.logits_soft_cap, None, self.sinks, out_scale=output_scale, out=out,
        )  # fmt: skip
        return output

    return forward
