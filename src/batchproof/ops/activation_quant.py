"""A gated activation and the static fp8 quantisation of its output in one kernel, with the bits of the two.

    out = fp8(silu_and_mul(x) * (1 / scale))

Invariance: an element of the output depends on two of x and on the scale; the operations are those of ``activation``
and of ``_quantize``, all elementwise.

Source: vLLM's ``silu_and_mul_quant``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Inputs, OpSpec, register_spec
from ._library import check_positive_scalar, check_scalar, register_op, require_no_grad
from ._quantize import quantize_static_fp8_reference
from ._quantize_jit import FP8_MAX_TL, to_fp8
from ._row_launch import dependent_launch
from ._row_tree import launch_dependents, wait_for_inputs
from ._rows import packed, vector_width
from ._triton import device_guard, tl, triton
from .activation import MAX_BLOCK, NUM_WARPS, check_gated, silu_and_mul, silu_and_mul_reference, times_sigmoid

__all__ = ["silu_and_mul_static_fp8_quant", "silu_and_mul_static_fp8_quant_reference"]

FP8 = torch.float8_e4m3fn


def silu_and_mul_static_fp8_quant_reference(x: Tensor, scale: Tensor) -> Tensor:
    """``silu_and_mul_reference``, then the quantisation, which is exact."""
    return quantize_static_fp8_reference(silu_and_mul_reference(x), scale)


@triton.jit(do_not_specialize=["num_vectors"])
def _silu_and_mul_quant_kernel(
    x_ptr, scale_ptr, out_ptr, num_vectors: tl.int64,
    BLOCK: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of one output row of d = num_vectors * VEC, as ``_activation_kernel`` has them."""
    width = num_vectors * VEC
    blocks = tl.cdiv(width, BLOCK).to(tl.int32)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    x_ptr += row * width * 2
    dtype = x_ptr.dtype.element_ty
    wait_for_inputs(PDL)
    launch_dependents(PDL)
    factor = tl.div_rn(1.0, tl.load(scale_ptr))
    gate = tl.load(x_ptr + columns, mask=mask, other=0.0).to(ACC)
    up = tl.load(x_ptr + width + columns, mask=mask, other=0.0).to(tl.float32)
    y = (times_sigmoid(gate, gate).to(dtype).to(tl.float32) * up).to(dtype)
    tl.store(out_ptr + row * width + columns, to_fp8(y.to(tl.float32) * factor, FP8_MAX_TL), mask=mask)


def launch(x: Tensor, scale: Tensor, out: Tensor) -> None:
    """Run the kernel; ``out`` is new and packed, half as wide as ``x``."""
    if out.numel() == 0:
        return
    x = packed(x)
    width = out.shape[-1]
    vec = vector_width(x)
    vec = vec if width % vec == 0 else 1  # what an up row begins at as well
    block = min(triton.next_power_of_2(width), MAX_BLOCK)
    pdl = x.is_cuda and dependent_launch(x.get_device())
    with device_guard(x):
        _silu_and_mul_quant_kernel[(out.numel() // width * triton.cdiv(width, block),)](
            x, scale, out, width // vec, BLOCK=block, VEC=vec,
            ACC=tl.float64 if x.dtype == torch.float32 else tl.float32, PDL=pdl,
            num_warps=NUM_WARPS, enable_fp_fusion=False, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip


def _validate(x: Tensor, scale: Tensor) -> None:
    check_gated("silu_and_mul_static_fp8_quant", x)
    check_scalar("silu_and_mul_static_fp8_quant", "scale", scale, x)


def _cpu(x: Tensor, scale: Tensor) -> Tensor:
    _validate(x, scale)
    check_positive_scalar("silu_and_mul_static_fp8_quant", "scale", scale)
    return quantize_static_fp8_reference(silu_and_mul(x), scale)


def _cuda(x: Tensor, scale: Tensor) -> Tensor:
    out = _fake(x, scale)
    launch(x, scale, out)
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
