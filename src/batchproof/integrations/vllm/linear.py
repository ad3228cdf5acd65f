"""vLLM's fp8 linear layers over batchproof's product."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFP8ScaledMMLinearKernel

from ...ops import scaled_mm as _scaled_mm  # noqa: F401 - defines the op

__all__ = ["InvariantFP8ScaledMMLinearKernel"]


class InvariantFP8ScaledMMLinearKernel(CutlassFP8ScaledMMLinearKernel):
    """Scales for the tensor, for tokens, for channels. The mode dequantises the layers of any class but subclasses."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing: no size has to be padded."""

    def apply_scaled_mm(
        self,
        *,
        A: torch.Tensor,
        B: torch.Tensor,
        out_dtype: torch.dtype,
        As: torch.Tensor,
        Bs: torch.Tensor,
        bias: torch.Tensor | None,
        output_shape: list[Any],
    ) -> torch.Tensor:
        """``A`` [M, K] by ``B`` [K, N], the transpose of a weight, times their scales."""
        out: torch.Tensor = torch.ops.batchproof.scaled_mm.default(A, B, As, Bs, bias, out_dtype)
        return out.view(*output_shape[:-1], B.shape[1])
