"""A vLLM plug-in for bench_vllm_latency.py: batch-invariant norms as they were before vLLM's PR 40413.

There the residual was added by torch, and vLLM's Triton norm ran on the sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def register() -> None:
    """Put the norm of that time in the place of today's; vLLM calls this in each of its processes."""
    from vllm.model_executor.layers import batch_invariant, layernorm

    todays = batch_invariant.rms_norm_batch_invariant

    def rms_norm_batch_invariant(
        input: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            return todays(input, weight, eps)
        total = input + residual
        return todays(total, weight, eps), total

    layernorm.rms_norm_batch_invariant = rms_norm_batch_invariant
