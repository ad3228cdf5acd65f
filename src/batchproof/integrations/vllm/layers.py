"""vLLM's norm layers over batchproof's ops, which take their place when a model is built.

The ops are called as they are, not through vLLM's IR: so none of vLLM's fusions can take a norm for one of its own,
and put a kernel there whose bits follow the number of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from ...errors import UnsupportedError
from ...ops import rms_norm as _rms_norm  # noqa: F401 - defines the ops

__all__ = ["InvariantGemmaRMSNorm", "InvariantRMSNorm", "add_rms_norm", "rms_norm"]

_ops = torch.ops.batchproof


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, gemma: bool = False) -> Tensor:
    """``batchproof.rms_norm``, for weights of another dtype as well, as vLLM's IR defines it for those."""
    if weight is None or weight.dtype == x.dtype:
        out: Tensor = _ops.rms_norm.default(x, weight, eps, gemma)
        return out
    y = _ops.rms_norm.default(x.float(), None, eps, False)
    y = y * (weight.float() + 1.0) if gemma else y.to(weight.dtype) * weight
    return y.to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, gemma: bool = False
) -> tuple[Tensor, Tensor]:
    """``batchproof.add_rms_norm``: the norm of the sum and the sum; other weights as in ``rms_norm``."""
    if weight is None or weight.dtype == x.dtype:
        out, total = _ops.add_rms_norm.default(x, residual, weight, eps, gemma)
        return out, total
    total = (x.float() + residual.float()).to(x.dtype)
    return rms_norm(total, weight, eps, gemma), total


class InvariantRMSNorm(RMSNorm):
    """vLLM's RMSNorm, compiled or eager, with the custom op switched on or off: always the same kernel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.variance_size_override is not None:
            raise UnsupportedError(
                f"RMSNorm with var_hidden_size {self.variance_size_override} of hidden_size {self.hidden_size} has no "
                "batch-invariant form, want var_hidden_size to be None or hidden_size"
            )

    def forward_native(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """[..., hidden_size]: the norm of x; with a residual, of x + residual, and that sum, as new tensors."""
        weight = self.weight.data if self.has_weight else None
        if residual is None:
            return rms_norm(x, weight, self.variance_epsilon)
        return add_rms_norm(x, residual, weight, self.variance_epsilon)

    forward_cuda = forward_native


class InvariantGemmaRMSNorm(GemmaRMSNorm):
    """vLLM's GemmaRMSNorm, which has no batch-invariant form in vLLM."""

    def forward_native(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """[..., hidden_size]: the norm of x; with a residual, of x + residual, and that sum, as new tensors."""
        if residual is None:
            return rms_norm(x, self.weight.data, self.variance_epsilon, gemma=True)
        return add_rms_norm(x, residual, self.weight.data, self.variance_epsilon, gemma=True)

    forward_cuda = forward_native
