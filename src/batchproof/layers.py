"""Modules over the ops: what a model is built from, or has its own modules swapped for."""

from __future__ import annotations

import torch
from torch import nn

from .ops.activation import gelu_tanh, silu
from .ops.linear import linear
from .ops.rms_norm import add_rms_norm_reference, fused_add_rms_norm, rms_norm, rms_norm_reference
from .ops.rope import rope_cos_sin

__all__ = ["GELUTanh", "Linear", "RMSNorm", "RotaryTable", "SiLU"]


class RMSNorm(nn.Module):
    """RMSNorm with an optional residual, as vLLM's layer; batch-invariant whether the switch is on or not.

    Args:
        hidden_size: size of the last axis.
        eps: added to the mean square.
        gemma: scale by ``1 + weight`` before the one rounding.
        weight: an existing parameter of that size to share; a new one (ones, or zeros for gemma) if None.
    """

    def __init__(
        self, hidden_size: int, eps: float = 1e-6, *, gemma: bool = False, weight: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.gemma = gemma
        initial = torch.zeros(hidden_size) if gemma else torch.ones(hidden_size)
        self.weight = nn.Parameter(initial) if weight is None else weight

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """``rms_norm(x)``; with a residual ``(out, residual + x)``, written over x and residual as vLLM does.

        The op dispatches on the tensors' device: Triton on CUDA and ROCm, exact sums on the CPU. See ``ops.rms_norm``
        for shapes, dtypes and errors.
        """
        if residual is None:
            return rms_norm(x, self.weight, self.eps, gemma=self.gemma)
        return fused_add_rms_norm(x, residual, self.weight, self.eps, gemma=self.gemma)

    forward_cuda = forward
    forward_hip = forward

    def forward_native(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The formula in plain torch and float64: what ``forward`` is compared with. New tensors."""
        if residual is None:
            return rms_norm_reference(x, self.weight, self.eps, self.gemma)
        return add_rms_norm_reference(x, residual, self.weight, self.eps, self.gemma)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}" + (", gemma=True" if self.gemma else "")


class Linear(nn.Module):
    """``ops.linear`` with a weight [out_features, in_features] and an optional bias, both shared with their maker."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class SiLU(nn.Module):
    """``ops.silu``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return silu(x)


class GELUTanh(nn.Module):
    """``ops.gelu_tanh``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gelu_tanh(x)


class RotaryTable(nn.Module):
    """Cosines and sines of rotary position embeddings, read from tables that depend on the position alone.

    Args:
        frequencies: for each layer type ("" where all layers share one) inv_freq [rot / 2] fp32 and the factor of
            every cosine and sine.
        num_positions: rows of the tables; a position past the end is an error.
    """

    def __init__(self, frequencies: dict[str, tuple[torch.Tensor, float]], num_positions: int) -> None:
        super().__init__()
        self.num_positions = num_positions
        for layer_type, (inv_freq, scaling) in frequencies.items():
            table = rope_cos_sin(inv_freq, num_positions, scaling)
            self.register_buffer(f"cos_sin_{layer_type}", table, persistent=False)

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str = ""
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each [*position_ids.shape, rot], of x's dtype, the half repeated as Hugging Face has it."""
        rows: torch.Tensor = getattr(self, f"cos_sin_{layer_type}")[position_ids.long()]
        cos, sin = rows.to(x.dtype).chunk(2, dim=-1)
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)

    def extra_repr(self) -> str:
        return f"num_positions={self.num_positions}"
