"""SiLU and tanh-GELU, alone and gating the second half of a row.

    silu(x)          = x * sigmoid(x)
    gelu_tanh(x)     = x * (1 + tanh(u)) / 2 = x * sigmoid(2 u),   u = sqrt(2 / pi) * (x + 0.044715 x**3)
    <act>_and_mul(x) = act(x[..., :d]).to(dtype) * x[..., d:]

Invariance: an element of the output depends on one element of x, or two, but that alone does not fix its bits: the
vector and the tail code of a library may compute another exp, and a compiler may contract multiply and add into FMA
in one of them. On a GPU all elements take the same instructions, since there is one code path (only the width of its
loads depends on d) and contraction is off. On the CPU everything is made of IEEE operations, without a
library's exp, tanh or sigmoid.

The sigmoid of a negative number is a small exponential, never ``1 - something``, so nothing cancels, and far out the
result goes through the subnormals to -0. fp32 is computed in fp64 and 16-bit types in fp32; one rounding.

Source: Elfwing et al., 2017 (SiLU); Hendrycks and Gimpel, 2016 (GELU), as Hugging Face's ``gelu_pytorch_tanh``. The
activation is rounded before the product, as in vLLM's ``SiluAndMul`` and Hugging Face's gated MLPs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..errors import ShapeError
from ..registry import OpSpec, register_spec
from . import _exact
from ._library import check_dtype, register_op, require_no_grad
from ._quantize_jit import FP8_MAX_TL, to_fp8
from ._row_launch import launch_options
from ._row_tree import launch_dependents, wait_for_inputs
from ._rows import packed, vector_width
from ._triton import device_guard, tl, triton

__all__ = [
    "check_gated",
    "gelu_tanh",
    "gelu_tanh_and_mul",
    "gelu_tanh_and_mul_reference",
    "gelu_tanh_reference",
    "silu",
    "silu_and_mul",
    "silu_and_mul_reference",
    "silu_reference",
]

MAX_BLOCK = 1024  # elements a program, 4 warps; an element's bits do not depend on either
NUM_WARPS = 4

_GELU_LINEAR = 2.0 * math.sqrt(2.0 / math.pi)  # 2 u = x * (linear + cubic * x**2)
_GELU_CUBIC = 0.044715 * _GELU_LINEAR
_GELU_LINEAR_TL = tl.constexpr(_GELU_LINEAR)
_GELU_CUBIC_TL = tl.constexpr(_GELU_CUBIC)


def silu_reference(x: torch.Tensor) -> torch.Tensor:
    """The formula in float64, rounded once."""
    wide = x.double()
    return (wide * torch.sigmoid(wide)).to(x.dtype)


def gelu_tanh_reference(x: torch.Tensor) -> torch.Tensor:
    """The formula in float64, rounded once; in its sigmoid form, as ``1 + tanh(u)`` cancels even in float64."""
    wide = x.double()
    return (wide * torch.sigmoid(wide * (wide * wide * _GELU_CUBIC + _GELU_LINEAR))).to(x.dtype)


def silu_and_mul_reference(x: torch.Tensor) -> torch.Tensor:
    """``silu_reference`` of the first half, rounded; its product with the second half, rounded."""
    gate, up = x.chunk(2, dim=-1)
    return (silu_reference(gate).double() * up.double()).to(x.dtype)


def gelu_tanh_and_mul_reference(x: torch.Tensor) -> torch.Tensor:
    """``gelu_tanh_reference`` of the first half, rounded; its product with the second half, rounded."""
    gate, up = x.chunk(2, dim=-1)
    return (gelu_tanh_reference(gate).double() * up.double()).to(x.dtype)


@triton.jit
def times_sigmoid(x, v):
    """x * sigmoid(v), unrounded, for x and v in fp32 or fp64."""
    # sigmoid(v) = 1 / (1 + e**2) for v >= 0 and e**2 / (1 + e**2) below, with e = exp(-|v| / 2). In two factors the
    # exponential does not underflow before its product with x does.
    e = tl.exp(tl.abs(v) * -0.5)
    negative = v < 0.0
    y = tl.where(negative, x * e, x) / (1.0 + e * e)
    return tl.where(negative, y * e, y)


@triton.jit(do_not_specialize=["num_vectors"])
def _activation_kernel(
    x_ptr, scale_ptr, out_ptr, num_vectors: tl.int64,
    BLOCK: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr, GELU: tl.constexpr, GATED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of one output row of d = num_vectors * VEC; x's rows have d elements, or 2 d if GATED.

    With a scale they are rounded to x's dtype, and quantised.
    """
    width = num_vectors * VEC
    blocks = tl.cdiv(width, BLOCK).to(tl.int32)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    x_ptr += row * (width * 2 if GATED else width)
    dtype = x_ptr.dtype.element_ty
    wait_for_inputs(PDL)
    launch_dependents(PDL)
    x = tl.load(x_ptr + columns, mask=mask, other=0.0).to(ACC)
    if GATED:
        up = tl.load(x_ptr + width + columns, mask=mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        factor = tl.div_rn(1.0, tl.load(scale_ptr))
    v = x * (x * x * _GELU_CUBIC_TL + _GELU_LINEAR_TL) if GELU else x
    y = times_sigmoid(x, v).to(dtype)
    if GATED:
        y = (y.to(tl.float32) * up).to(dtype)
    if scale_ptr is not None:
        y = to_fp8(y.to(tl.float32) * factor, FP8_MAX_TL)
    tl.store(out_ptr + row * width + columns, y, mask=mask)


def launch(x: torch.Tensor, out: torch.Tensor, gelu: bool, gated: bool, scale: torch.Tensor | None = None) -> None:
    """Run the kernel; ``out`` is new and packed, of x's shape or, if ``gated``, half as wide; fp8 if there is a scale.

    What quantises is launched early, for what comes after it is a product; it does not let that in at once, which made
    a step of one token 3% longer.
    """
    if out.numel() == 0:
        return
    x = packed(x)
    width = out.shape[-1] if out.dim() else 1
    vec = vector_width(x) if out.dim() else 1
    vec = vec if width % vec == 0 else 1
    options = {"PDL": 0, "enable_fp_fusion": False} if scale is None else launch_options(x, at_once=False)
    block = min(triton.next_power_of_2(width), MAX_BLOCK)
    with device_guard(x):
        _activation_kernel[(out.numel() // width * triton.cdiv(width, block),)](
            x, scale, out, width // vec,
            BLOCK=block, VEC=vec, ACC=tl.float64 if x.dtype == torch.float32 else tl.float32,
            GELU=gelu, GATED=gated, num_warps=NUM_WARPS, **options,
        )  # fmt: skip


def times_sigmoid_cpu(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``times_sigmoid`` in operations that IEEE 754 defines, for x and v in fp32 or float64."""
    half = v.abs().mul_(-0.5)
    e = _exact.exp(half) if v.dtype == torch.float32 else _exact.exp_float64(half)
    # Two factors e: the exponential must not underflow before its product with x does.
    factor = torch.where(v < 0.0, e, torch.ones_like(e))
    return (x * factor).div_((e * e).add_(1.0)).mul_(factor)


def _activate_cpu(x: torch.Tensor, gelu: bool) -> torch.Tensor:
    """x * sigmoid(v), by the kernel's formula: in fp32 for 16-bit dtypes, in float64 for fp32."""
    wide = x.float() if x.element_size() == 2 else x.double()
    v = wide * (wide * wide * _GELU_CUBIC + _GELU_LINEAR) if gelu else wide
    return times_sigmoid_cpu(wide, v).to(x.dtype)


def check_gated(op: str, x: torch.Tensor) -> None:
    """DtypeError or ShapeError unless ``x`` is [..., 2 * d]."""
    check_dtype(op, "x", x)
    if x.dim() == 0 or x.shape[-1] % 2 != 0:
        raise ShapeError(f"{op}: x has shape {tuple(x.shape)}, want [..., 2 * d], an even last axis")


def _validate(op: str, x: torch.Tensor, gated: bool) -> None:
    check_gated(op, x) if gated else check_dtype(op, "x", x)


def _empty_out(x: torch.Tensor, gated: bool) -> torch.Tensor:
    if gated:
        return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _register(op: str, *, gelu: bool, gated: bool) -> Callable[..., Any]:
    """Register ``op`` for one activation and form."""

    def cpu(x: torch.Tensor) -> torch.Tensor:
        _validate(op, x, gated)
        if not gated:
            return _exact.canonical_nan(_activate_cpu(x, gelu)).contiguous()
        gate, up = x.chunk(2, dim=-1)
        return _exact.canonical_nan(_activate_cpu(gate, gelu) * up).contiguous()

    def cuda(x: torch.Tensor) -> torch.Tensor:
        _validate(op, x, gated)
        out = _empty_out(x, gated)
        launch(x, out, gelu, gated)
        return out

    def fake(x: torch.Tensor) -> torch.Tensor:
        _validate(op, x, gated)
        return _empty_out(x, gated)

    return register_op(f"{op}(Tensor x) -> Tensor", cpu=cpu, cuda=cuda, fake=fake)


_silu = _register("silu", gelu=False, gated=False)
_gelu_tanh = _register("gelu_tanh", gelu=True, gated=False)
_silu_and_mul = _register("silu_and_mul", gelu=False, gated=True)
_gelu_tanh_and_mul = _register("gelu_tanh_and_mul", gelu=True, gated=True)


def silu(x: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(x)``, elementwise.

    Args:
        x: any shape and strides, fp32, fp16 or bf16; copied if it is not contiguous.

    Returns:
        A new contiguous tensor of x's shape and dtype. silu(-inf) is NaN, as torch has it.

    Invariance: each element's bits depend on that element alone; see the module docstring.

    Raises:
        DtypeError: x is something else than fp32, fp16 or bf16.
        UnsupportedError: autograd would record the call.

    Source: ``torch.nn.functional.silu``.
    """
    require_no_grad("silu", x)
    result: torch.Tensor = _silu(x)
    return result


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation, elementwise.

    Args:
        x: any shape and strides, fp32, fp16 or bf16; copied if it is not contiguous.

    Returns:
        A new contiguous tensor of x's shape and dtype. gelu_tanh(-inf) is NaN, as torch has it.

    Invariance: each element's bits depend on that element alone; see the module docstring.

    Raises:
        DtypeError: x is something else than fp32, fp16 or bf16.
        UnsupportedError: autograd would record the call.

    Source: ``torch.nn.functional.gelu(x, approximate="tanh")``, Hugging Face's ``gelu_pytorch_tanh``.
    """
    require_no_grad("gelu_tanh", x)
    result: torch.Tensor = _gelu_tanh(x)
    return result


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(x[..., :d]).to(dtype) * x[..., d:]``.

    Args:
        x: [..., 2 * d], any strides, fp32, fp16 or bf16; copied if it is not contiguous.

    Returns:
        A new contiguous tensor [..., d] of x's dtype, the bits of ``silu(x[..., :d]) * x[..., d:]``.

    Invariance: each element's bits depend on its gate and its factor alone; see the module docstring.

    Raises:
        ShapeError: x's last axis is odd, or there is none.
        DtypeError: x is something else than fp32, fp16 or bf16.
        UnsupportedError: autograd would record the call.

    Source: vLLM's ``SiluAndMul``.
    """
    require_no_grad("silu_and_mul", x)
    result: torch.Tensor = _silu_and_mul(x)
    return result


def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``gelu_tanh(x[..., :d]).to(dtype) * x[..., d:]``.

    Args:
        x: [..., 2 * d], any strides, fp32, fp16 or bf16; copied if it is not contiguous.

    Returns:
        A new contiguous tensor [..., d] of x's dtype, the bits of ``gelu_tanh(x[..., :d]) * x[..., d:]``.

    Invariance: each element's bits depend on its gate and its factor alone; see the module docstring.

    Raises:
        ShapeError: x's last axis is odd, or there is none.
        DtypeError: x is something else than fp32, fp16 or bf16.
        UnsupportedError: autograd would record the call.

    Source: vLLM's ``GeluAndMul`` with the tanh approximation.
    """
    require_no_grad("gelu_tanh_and_mul", x)
    result: torch.Tensor = _gelu_tanh_and_mul(x)
    return result


def _sample(num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    return {"x": (torch.randn(num_tokens, 4096, generator=generator, device=device) * 3.0).to(dtype)}


for _op, _reference in (
    (silu, silu_reference),
    (gelu_tanh, gelu_tanh_reference),
    (silu_and_mul, silu_and_mul_reference),
    (gelu_tanh_and_mul, gelu_tanh_and_mul_reference),
):
    register_spec(OpSpec(_op.__name__, _op, _reference, _sample, batch_axes={"x": 0}, tolerance="activation"))
