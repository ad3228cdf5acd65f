"""vLLM's Triton attention over batchproof's ``paged_attention``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ...ops._library import FLOAT_DTYPES
from ...ops.attention import FP8, launch
from .log import say_that_it_stays_vllms

__all__ = ["NEUTRAL", "attention_over_ours", "why_vllms"]

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
    scale = others.get("output_scale")
    if not out.is_contiguous():
        return "its output is not contiguous"
    if out.dtype != (q.dtype if scale is None else FP8):
        return f"its output is {out.dtype}, {'not ' if scale is None else ''}to be quantised"
    if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1):
        return f"the scale of its output is {scale.dtype} of shape {tuple(scale.shape)}"
    if not isinstance(causal, bool):
        return "causal is a tensor"
    if tuple(window_size) != (-1, -1) and not (causal and window_size[0] >= 0 and window_size[1] <= 0):
        return f"the window is {tuple(window_size)}, causal {causal}"
    asked = [name for name, neutral in NEUTRAL.items() if others.get(name, neutral) is not neutral]
    return f"asked for {', '.join(asked)}" if asked else None


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
