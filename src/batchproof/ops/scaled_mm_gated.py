"""An fp8 product, the gated activation of its columns and their static fp8 quantisation, with the bits of the three.

    y = scaled_mm(a, b, scale_a, scale_b)       [M, 2 * d], rounded to ``dtype``: gates, then what they gate
    out = fp8(silu_and_mul(y) * (1 / scale))    [M, d]

Invariance: that of ``scaled_mm`` and ``activation_quant``. On Hopper a batch of few tokens is one kernel
(``_hopper_product``), whose tile has a gate beside its factor; a larger one is the two kernels. The sums are the same,
and the rest is elementwise, by the same operations.

Source: the epilogues of CUTLASS; vLLM's ``silu_and_mul_quant``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from ..registry import OpSpec, register_spec
from ._hopper import gated_product
from ._library import check_positive_scalar, check_scalar, register_op, require_no_grad
from ._quantize import quantize_per_token_reference
from .activation_quant import FP8, silu_and_mul_static_fp8_quant, silu_and_mul_static_fp8_quant_reference
from .scaled_mm import scaled_mm, scaled_mm_reference, split_scales, validate

__all__ = ["scaled_mm_silu_and_mul_static_fp8_quant", "scaled_mm_silu_and_mul_static_fp8_quant_reference"]

_OP = "scaled_mm_silu_and_mul_static_fp8_quant"


def scaled_mm_silu_and_mul_static_fp8_quant_reference(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The references of the two, one after the other."""
    return silu_and_mul_static_fp8_quant_reference(
        scaled_mm_reference(a, b, scale_a, scale_b, None, dtype), scale.float()
    )


def _validate(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    validate(_OP, a, b, scale_a, scale_b, None, dtype, 1)
    check_scalar(_OP, "scale", scale, "a", a)
    if b.shape[1] % 2:
        raise ShapeError(f"{_OP}: b has shape {tuple(b.shape)}, want [K, 2 * d], an even last axis")


def _cpu(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    _validate(a, b, scale_a, scale_b, scale, dtype)
    check_positive_scalar(_OP, "scale", scale)
    return silu_and_mul_static_fp8_quant(scaled_mm(a, b, scale_a, scale_b, None, dtype), scale)


def _cuda(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = _fake(a, b, scale_a, scale_b, scale, dtype)
    rows, columns = split_scales(a, b, scale_a, scale_b)
    whole = rows.shape[1] == 1 and columns.shape[1] == b.shape[1]  # no scales for blocks
    if out.numel() and whole and gated_product(a, b.t(), out, rows, columns, dtype, scale):
        return out
    product: Tensor = torch.ops.batchproof.scaled_mm.default(a, b, scale_a, scale_b, None, dtype)
    quantised: Tensor = torch.ops.batchproof.silu_and_mul_static_fp8_quant.default(product, scale)
    return quantised


def _fake(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    _validate(a, b, scale_a, scale_b, scale, dtype)
    return a.new_empty((a.shape[0], b.shape[1] // 2), dtype=FP8)


_fused = register_op(
    f"{_OP}(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor scale, ScalarType dtype) -> Tensor",
    cpu=_cpu, cuda=_cuda, fake=_fake,
)  # fmt: skip


def scaled_mm_silu_and_mul_static_fp8_quant(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """``silu_and_mul_static_fp8_quant(scaled_mm(a, b, scale_a, scale_b, out_dtype=dtype), scale)``.

    Args:
        a: [M, K], as ``scaled_mm`` takes it.
        b: [K, 2 * d], as ``scaled_mm`` takes it: the columns of gates, then those of what they gate.
        scale_a: as ``scaled_mm`` takes it.
        scale_b: as ``scaled_mm`` takes it.
        scale: one fp32 element on a's device, of any shape, positive: a value of the output stands for itself times it.
            A scale that is computed from the batch makes the result depend on the batch.
        dtype: bf16, fp16 or fp32, to which the product is rounded.

    Returns:
        float8_e4m3fn [M, d], contiguous, saturated at 448 times the scale; NaN becomes 448.

    Invariance: a row's bits depend on its row of ``a`` and ``scale_a``, and on ``b``, ``scale_b`` and ``scale`` alone.

    Raises:
        ShapeError, DtypeError, DeviceError: before anything is computed.
        ArgumentError: the scale is not a finite positive number; on the CPU alone.
        UnsupportedError: autograd would record the call.
    """
    require_no_grad(_OP, scale_a, scale_b, scale)
    result: Tensor = _fused(a, b, scale_a, scale_b, scale, dtype)
    return result


def _sample(num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    k, d = 1024, 192
    a, scale_a = quantize_per_token_reference(torch.randn(num_tokens, k, generator=generator, device=device))
    weight, scale_b = quantize_per_token_reference(torch.randn(2 * d, k, generator=generator, device=device) * k**-0.5)
    return {
        "a": a, "b": weight.t(), "scale_a": scale_a, "scale_b": scale_b.t(),
        "scale": torch.full((1,), 0.02, device=device), "dtype": dtype,
    }  # fmt: skip


register_spec(
    OpSpec(
        _OP,
        scaled_mm_silu_and_mul_static_fp8_quant,
        scaled_mm_silu_and_mul_static_fp8_quant_reference,
        _sample,
        batch_axes={"a": 0, "scale_a": 0},
        tolerance="activation_quant",
    )
)
