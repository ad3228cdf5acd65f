"""vLLM's fp8 linear layers with scales for blocks over batchproof's product."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFp8BlockScaledMMKernel
from vllm.model_executor.kernels.linear.scaled_mm.deep_gemm import DeepGemmFp8BlockScaledMMKernel
from vllm.model_executor.utils import replace_parameter

from ...ops._library import FLOAT_DTYPES
from ...ops.scaled_mm import GROUP
from .log import say_that_it_stays_vllms

__all__ = ["InvariantFp8BlockScaledMMKernel"]


class InvariantFp8BlockScaledMMKernel(CutlassFp8BlockScaledMMKernel):
    """Weight scales for blocks of 128 by 128, a token's for 128 of k.

    Tokens are quantised by vLLM, as for its CUTLASS kernel: fp32 scales, one token's beside the next one's, not rounded
    to powers of two. The weight keeps the bits of the checkpoint.
    """

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Wherever the product runs: CUTLASS is not needed."""
        if compute_capability is not None and compute_capability < 89:
            return False, f"needs compute capability 8.9, seen {compute_capability / 10}"
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        """Layers of blocks of 128 by 128; the log names what others are left to vLLM for."""
        able, reason = super().can_implement(config)
        blocks = tuple(config.weight_quant_key.scale.group_shape)
        if able and blocks != (GROUP, GROUP):
            able, reason = False, f"weight scales are for {blocks}, want ({GROUP}, {GROUP})"
        elif able and config.out_dtype not in FLOAT_DTYPES:
            able, reason = False, f"outputs are {config.out_dtype}, want one of {', '.join(map(str, FLOAT_DTYPES))}"
        if reason is not None:
            say_that_it_stays_vllms("fp8 linear layers stay", reason)
        return able, reason

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Scales become fp32. What a model multiplies by itself, DeepSeek-V4's ``wo_a``, is laid out for DeepGEMM."""
        if getattr(layer, "is_bmm", False):
            DeepGemmFp8BlockScaledMMKernel(self.config).process_weights_after_loading(layer)
            return
        super().process_weights_after_loading(layer)
        name = "weight_scale" if getattr(layer, "weight_scale_inv", None) is None else "weight_scale_inv"
        scale = getattr(layer, name)
        if scale.dtype != torch.float32:  # powers of two in e8m0
            replace_parameter(layer, name, scale.data.float())

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """``x`` [..., K] quantised, by the transpose of the weight [N, K]; the bias is added before rounding."""
        params = self._get_layer_params(layer)
        scale = params.weight_scale if params.weight_scale_inv is None else params.weight_scale_inv
        # vLLM quantises contiguous tokens by one kernel and others by another; one token alone is always contiguous.
        tokens = x.reshape(-1, x.shape[-1]).contiguous()
        quantised, token_scale = self.quant_fp8(tokens)
        out = self.apply_block_scaled_mm(quantised, params.weight, token_scale, scale, bias)
        return out.view(*x.shape[:-1], params.weight.shape[0])

    def apply_block_scaled_mm(
        self, A: torch.Tensor, B: torch.Tensor, As: torch.Tensor, Bs: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``A`` [M, K] by the transpose of ``B`` [N, K]; scales are [M, K / 128] and [N / 128, K / 128], rounded up."""
        dtype = self.config.out_dtype
        out: torch.Tensor = torch.ops.batchproof.scaled_mm.default(A, B.t(), As, Bs.t(), bias, dtype)
        return out
