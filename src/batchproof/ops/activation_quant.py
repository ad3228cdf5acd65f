"""A gated activation and the static fp8 quantisation of its output in one kernel, with the bits of the two.

    out = fp8(silu_and_mul(x) * (1 / scale))

Invariance: an element of the output depends on two of x and on the scale; the operations are those of ``activation``,
whose kernel this is, and of ``_quantize``, all elementwise.

Source: vLLM's ``silu_and_mul_quant``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Inputs, OpSpec, register_spec
from ._library import check_positive_scalar, check_scalar, register_op, require_no_grad
from ._quantize import quantize_static_fp8_reference
from .activation import check_gated, launch, silu_and_mul, silu_and_mul_reference

__all__ = ["silu_and_mul_static_fp8_quant", "silu_and_mul_static_fp8_quant_reference"]

FP8 = torch.float8_e4m3fn


def silu_and_mul_static_fp8_quant_reference(x: Tensor, scale: Tensor) -> Tensor:
    """``silu_and_mul_reference``, then the quantisation, which is exact."""
    return quantize_static_fp8_reference(silu_and_mul_reference(x), scale)


def _validate(x: Tensor, scale: Tensor) -> None:
    check_gated("silu_and_mul_static_fp8_quant", x)
    check_scalar("silu_and_mul_static_fp8_quant", "scale", scale, "x", x)


def _cpu(x: Tensor, scale: Tensor) -> Tensor:
    _validate(x, scale)
    check_positive_scalar("silu_and_mul_static_fp8_quant", "scale", scale)
    return quantize_static_fp8_reference(silu_and_mul(x), scale)


def _cuda(x: Tensor, scale: Tensor) -> Tensor:
    out = _fake(x, scale)
    launch(x, out, gelu=False, gated=True, scale=scale)
    return out


def _fake(x: Tensor, scale: Tensor) -> Tensor:
    _validate(x, scale)
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=FP8, device=x.device)


_silu_and_mul_static_fp8_quant = register_op(
    "silu_and_mul_static_fp8_quant(Tensor x, Tensor scale) -> Tensor", cpu=_cpu, cuda=_cuda, fake=_fake
)


def silu_and_mul_static_fp8_quant(x: Tensor, scale: Tensor) -> Tensor:
    """``silu_and_mul``, divided by a scale that is known beforehand and rounded to fp8.

    Args:
        x: [..., 2 * d], any strides, fp32, fp16 or bf16; copied if it is not contiguous.
        scale: one fp32 element on x's device, of any shape, positive: a value of the output stands for itself times it.
            A scale that is computed from the batch makes the result depend on the batch.

    Returns:
        float8_e4m3fn [..., d], contiguous, saturated at 448 times the scale; NaN becomes 448.

    Invariance: each element's bits depend on its gate, its factor and the scale alone; see the module docstring.

    Raises:
        ShapeError: x's last axis is odd, or there is none; the scale has more than one element.
        DtypeError: x is something else than fp32, fp16 or bf16, or the scale than fp32.
        DeviceError: the scale is on another device.
        ArgumentError: the scale is not a finite positive number; on the CPU alone.
        UnsupportedError: autograd would record the call.

    Source: vLLM's ``silu_and_mul_quant``.
    """
    require_no_grad("silu_and_mul_static_fp8_quant", x, scale)
    result: Tensor = _silu_and_mul_static_fp8_quant(x, scale)
    return result


def _sample(num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    x = torch.randn(num_tokens, 4096, generator=generator, device=device) * 3.0
    return {"x": x.to(dtype), "scale": torch.full((1,), 0.02, device=device)}


register_spec(
    OpSpec(
        "silu_and_mul_static_fp8_quant",
        silu_and_mul_static_fp8_quant,
        silu_and_mul_static_fp8_quant_reference,
        _sample,
        batch_axes={"x": 0},
        tolerance="activation_quant",
    )
)
