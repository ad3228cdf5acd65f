"""Every op in plain torch, as a model would write it: what torch.compile is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

E4M3_MAX = 448.0
BLOCK = 128  # elements that share a scale in the per-block formats

Tensor = torch.Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Llama's norm."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Llama's norm of a residual sum, and the sum."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """torch's own, for the compiler to take apart."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def rms_norm_gated(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int | None, norm_before_gate: bool
) -> Tensor:
    """Mamba-2's norm, by groups of the last axis."""
    wide, gated = x.float(), F.silu(gate.float())
    if not norm_before_gate:
        wide = wide * gated
    groups = wide.unflatten(-1, (-1, group_size or x.shape[-1]))
    y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.float()
    return (y * gated if norm_before_gate else y).to(x.dtype)


def static_quant(y: Tensor, scale: Tensor) -> Tensor:
    """E4M3 with a scale that is given."""
    return (y.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def dynamic_quant(y: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 or int8, as ``like`` is, with a scale for every row of the last axis."""
    largest = 127.0 if like.dtype == torch.int8 else E4M3_MAX
    scales = y.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / largest
    codes = y.float() / scales
    codes = codes.round() if like.dtype == torch.int8 else codes
    return codes.clamp(-largest, largest).to(like.dtype), scales


def block_quant(y: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 with a scale for every BLOCK elements."""
    codes, scales = dynamic_quant(y.unflatten(-1, (-1, BLOCK)), like)
    return codes.flatten(-2), scales.squeeze(-1)


def _quantised(quantise: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Tensor, weight: Tensor, eps: float, like: Tensor) -> Any:
        return quantise(rms_norm(x, weight, eps), like)

    return run


def _add_quantised(quantise: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Tensor, residual: Tensor, weight: Tensor, eps: float, like: Tensor) -> Any:
        out, total = add_rms_norm(x, residual, weight, eps)
        codes = quantise(out, like)
        return (*codes, total) if isinstance(codes, tuple) else (codes, total)

    return run


# op -> the function, and the buffers that are its arguments
PLAIN: dict[str, tuple[Callable[..., Any], str]] = {
    "fused_add_rms_norm": (add_rms_norm, "x residual weight eps"),
    "add_rms_norm": (add_rms_norm, "x residual weight eps"),
    "rms_norm": (rms_norm, "x weight eps"),
    "rms_norm_backward": (rms_norm, "x weight eps"),
    "add_rms_norm_backward": (add_rms_norm, "x residual weight eps"),
    "layer_norm": (layer_norm, "x weight bias eps"),
    "rms_norm_gated": (rms_norm_gated, "x gate weight eps group_size norm_before_gate"),
    "rms_norm_static_fp8_quant": (_quantised(static_quant), "x weight eps scale"),
    "rms_norm_dynamic_per_token_quant": (_quantised(dynamic_quant), "x weight eps out"),
    "rms_norm_per_block_quant": (_quantised(block_quant), "x weight eps out"),
    "add_rms_norm_static_fp8_quant": (_add_quantised(static_quant), "x residual weight eps scale"),
    "add_rms_norm_dynamic_per_token_quant": (_add_quantised(dynamic_quant), "x residual weight eps out"),
    "add_rms_norm_per_block_quant": (_add_quantised(block_quant), "x residual weight eps out"),
}
