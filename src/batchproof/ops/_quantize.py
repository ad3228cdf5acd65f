"""Quantisation of activations to fp8 and int8, bit for bit as vLLM's CUDA ops do it.

    static fp8       out = fp8(y * (1 / scale))
    per token fp8    scale = max(min(amax, scale_ub) / 448, 1 / (448 * 512))    out = fp8(y / scale)
    per token int8   scale = amax / 127                                         out = int8(y * (127 / amax))
    per block fp8    scale = max(amax, 1e-10) / 448                             out = fp8(y / scale)

``y`` is a value of the activation dtype raised to fp32, and every operation above is one fp32 operation, rounded to
nearest even: a product with a reciprocal is not a quotient. ``amax`` is the largest |y| of a token, or of a block of
its columns, without the NaN in it, 0 if there is nothing else. fp8 is e4m3: rounding is to nearest even on its grid,
and saturates at 448; int8 is two's complement and saturates at -128 and 127. A zero token has int8 scale 0.

What NaN becomes is what vLLM's order of minimum and maximum makes of it: 448, in a block -448, and 0 in int8. A token
with an infinity has scale inf: its finite values become 0, and the infinity, which is divided by itself, what NaN does.

These functions are definitions rather than approximations: elementwise IEEE operations and a maximum, so that they
have the same bits on every device and for every batch. Tests and the CPU implementations call them.

Source: vLLM 0.26.0's ``static_scaled_fp8_quant``, ``dynamic_per_token_scaled_fp8_quant``, ``dynamic_scaled_int8_quant``
and ``per_token_group_fp8_quant``, read from their compiled code for sm_90.
"""

from __future__ import annotations

import math

import torch

__all__ = ["quantize_per_block_reference", "quantize_per_token_reference", "quantize_static_fp8_reference"]

FP8_MAX = 448.0
INT8_MAX = 127.0
FP8_MIN_SCALE = 1.0 / (FP8_MAX * 512.0)  # per token
BLOCK_MIN_AMAX = 1e-10  # per block


def quantize_static_fp8_reference(y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``y`` of any floating dtype and shape by one fp32 ``scale`` of one element: float8_e4m3fn of y's shape."""
    scale = scale.reshape(())
    return _to_fp8(y.float() * (torch.ones_like(scale) / scale), nan=FP8_MAX)


def quantize_per_token_reference(
    y: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn, scale_ub: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``y`` [..., hidden_size] by a scale for every token: ``dtype``, float8_e4m3fn or int8, and fp32 [..., 1].

    ``scale_ub``, an fp32 tensor of one element, bounds a token's amax and not its scale.
    """
    y = y.float()
    amax = _amax(y)
    if dtype == torch.int8:
        limit = _filled(amax, INT8_MAX)
        return _to_int8(y * (limit / amax)), amax / limit  # a token of zeros times infinity is NaN, so 0
    if scale_ub is not None:
        amax = torch.fmin(amax, scale_ub.reshape(()))
    scales = (amax / _filled(amax, FP8_MAX)).clamp_min(FP8_MIN_SCALE)
    return _to_fp8(y / scales, nan=FP8_MAX), scales


def quantize_per_block_reference(y: torch.Tensor, group_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """``y`` [..., hidden_size] by a scale for every ``group_size`` columns of a token.

    Returns float8_e4m3fn of y's shape, and fp32 scales [..., hidden_size / group_size].
    """
    blocks = y.float().unflatten(-1, (-1, group_size))
    amax = _amax(blocks).clamp_min(BLOCK_MIN_AMAX)
    scales = amax / _filled(amax, FP8_MAX)
    return _to_fp8(blocks / scales, nan=-FP8_MAX).flatten(-2), scales.squeeze(-1)


def _amax(y: torch.Tensor) -> torch.Tensor:
    return y.abs().nan_to_num(nan=0.0, posinf=math.inf).amax(-1, keepdim=True)


def _filled(like: torch.Tensor, value: float) -> torch.Tensor:
    """An operand in place of a Python scalar: division by a scalar is a product with its reciprocal on CUDA."""
    return torch.full_like(like, value)


def _to_fp8(y: torch.Tensor, nan: float) -> torch.Tensor:
    """fp32 ``y`` as e4m3; clamped before the cast, since some versions of torch cast what is too large to NaN."""
    return y.nan_to_num(nan=nan, posinf=FP8_MAX, neginf=-FP8_MAX).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _to_int8(y: torch.Tensor) -> torch.Tensor:
    return y.nan_to_num(nan=0.0, posinf=INT8_MAX, neginf=-INT8_MAX - 1.0).round().clamp(-128, 127).to(torch.int8)
