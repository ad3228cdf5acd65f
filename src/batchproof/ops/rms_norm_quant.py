"""RMSNorm, and RMSNorm of a residual sum, fused with the quantisation that the next linear layer would start with.

    y = rms_norm(x) or rms_norm(residual + x)      rounded to the activation dtype, as those ops return it
    static       out = y in fp8 by one scale, known before the batch
    per token    out = y in fp8 or int8 by a scale for every token
    per block    out = y in fp8 by a scale for every 128, or 64, columns of a token

The bits are those of ``rms_norm`` or ``add_rms_norm`` followed by vLLM's quantisation op: see ``_quantize``, which
has its operations one by one.

Invariance: a row's y is that of ``rms_norm``, whose argument holds here. A scale is a maximum, which has no order,
over elements of that row alone, and quantising is elementwise. A dynamic scale *per tensor* is a maximum over the
batch: one neighbour's outlier would move every row to a coarser grid. It is variant by definition, so there is no
such op; calibrate a static scale, or take one per token.

Source: vLLM's ops of these names, which quantise another y. The static ones, like vLLM's own norms, multiply by the
weight before they round; the per-token and per-block ones normalise the residual sum before it is rounded, multiply
by the reciprocal of the int8 scale, and bound a block's scale from below as they do a token's. The static and
per-block ones choose their threads, and so the order of their sums, by the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError, DtypeError, ShapeError
from ..registry import Inputs, OpSpec, register_spec
from ._library import check_positive_scalar, check_scalar, register_op, require_no_grad
from ._quantize import quantize_per_block_reference, quantize_per_token_reference, quantize_static_fp8_reference
from ._rms_norm_quant_kernel import launch
from .rms_norm import _normalise_cpu, _residual_sum, _validate, add_rms_norm_reference, rms_norm_reference

__all__ = [
    "add_rms_norm_dynamic_per_token_quant",
    "add_rms_norm_per_block_quant",
    "add_rms_norm_static_fp8_quant",
    "rms_norm_dynamic_per_token_quant",
    "rms_norm_per_block_quant",
    "rms_norm_static_fp8_quant",
]

FP8 = torch.float8_e4m3fn
GROUP_SIZES = (64, 128)


class _Call(NamedTuple):
    """The arguments of a call of one of the six ops; ``mode`` is "static", "token" or "block"."""

    op: str
    mode: str
    x: Tensor  # [..., hidden_size]
    weight: Tensor | None  # [hidden_size]
    eps: float = 1e-6
    gemma: bool = False
    residual: Tensor | None = None  # of x's shape
    scale: Tensor | None = None  # static: one element
    dtype: torch.dtype = FP8
    scale_ub: Tensor | None = None  # token, in fp8: one element or None
    group_size: int = 0  # block: columns a scale


def _check(call: _Call) -> None:
    op, x = call.op, call.x
    _validate(op, x, call.residual, call.weight, call.eps)
    if call.dtype not in (FP8, torch.int8):
        raise DtypeError(f"{op}: dtype is {call.dtype}, want {FP8} or {torch.int8}")
    if call.scale_ub is not None and call.dtype != FP8:
        raise ArgumentError(f"{op}: scale_ub is given with dtype {call.dtype}, want None; it bounds fp8 scales")
    for name, value in (("scale", call.scale), ("scale_ub", call.scale_ub)):
        if value is not None:
            check_scalar(op, name, value, "x", x)
    if call.mode == "block":
        if call.group_size not in GROUP_SIZES:
            raise ArgumentError(f"{op}: group_size is {call.group_size}, want one of {GROUP_SIZES}")
        if x.shape[-1] % call.group_size:
            raise ShapeError(f"{op}: x has shape {tuple(x.shape)}, want a hidden_size that {call.group_size} divides")


def _check_positive(call: _Call) -> None:
    for name, value in (("scale", call.scale), ("scale_ub", call.scale_ub)):
        if value is not None:
            check_positive_scalar(call.op, name, value)


def _quantize(y: Tensor, call: _Call) -> tuple[Tensor, Tensor | None]:
    """The normalised ``y``, quantised, and its scales if they are dynamic."""
    if call.scale is not None:
        return quantize_static_fp8_reference(y, call.scale), None
    if call.mode == "token":
        return quantize_per_token_reference(y, call.dtype, call.scale_ub)
    return quantize_per_block_reference(y, call.group_size)


def _returned(out: Tensor, scales: Tensor | None, residual_out: Tensor | None) -> Any:
    """(out, scales, residual_out) without what a mode or a form has none of; a tensor alone is no tuple."""
    there = tuple(tensor for tensor in (out, scales, residual_out) if tensor is not None)
    return there if len(there) > 1 else out


def _empty(call: _Call) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, scales = call.x, None
    out = torch.empty_like(x, dtype=call.dtype, memory_format=torch.contiguous_format)
    if call.mode != "static":
        blocks = x.shape[-1] // call.group_size if call.mode == "block" else 1
        scales = torch.empty((*x.shape[:-1], blocks), dtype=torch.float32, device=x.device)
    total = None if call.residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, scales, total


def _cpu(call: _Call) -> Any:
    _check(call)
    _check_positive(call)
    total = None if call.residual is None else _residual_sum(call.x, call.residual).contiguous()
    y = _normalise_cpu(call.x if total is None else total, call.weight, call.eps, call.gemma).contiguous()
    return _returned(*_quantize(y, call), total)


def _cuda(call: _Call) -> Any:
    _check(call)
    out, scales, total = _empty(call)
    launch(
        call.x, call.residual, call.weight, out, total, call.scale, scales, call.scale_ub,
        call.eps, call.gemma, call.mode, call.group_size,
    )  # fmt: skip
    return _returned(out, scales, total)


def _fake(call: _Call) -> Any:
    _check(call)
    return _returned(*_empty(call))


def _reference(op: str, mode: str, **arguments: Any) -> Any:
    """``rms_norm_reference`` or ``add_rms_norm_reference``, then the quantisation, which is exact."""
    call = _Call(op, mode, **arguments)
    if call.residual is None:
        return _returned(*_quantize(rms_norm_reference(call.x, call.weight, call.eps, call.gemma), call), None)
    y, total = add_rms_norm_reference(call.x, call.residual, call.weight, call.eps, call.gemma)
    return _returned(*_quantize(y, call), total)


def _register(mode: str, schema: str) -> Callable[..., Any]:
    """Define an op whose implementations get its arguments as a ``_Call``."""
    op, _, arguments = schema.partition(")")[0].partition("(")
    names = [argument.split()[-1] for argument in arguments.split(", ")]

    def bound(implementation: Callable[[_Call], Any]) -> Callable[..., Any]:
        return lambda *values: implementation(_Call(op, mode, **dict(zip(names, values, strict=True))))

    return register_op(schema, cpu=bound(_cpu), cuda=bound(_cuda), fake=bound(_fake))


_static = _register(
    "static",
    "rms_norm_static_fp8_quant(Tensor x, Tensor? weight, Tensor scale, float eps, bool gemma) -> Tensor",
)
_add_static = _register(
    "static",
    "add_rms_norm_static_fp8_quant(Tensor x, Tensor residual, Tensor? weight, Tensor scale, float eps, bool gemma)"
    " -> (Tensor, Tensor)",
)
_per_token = _register(
    "token",
    "rms_norm_dynamic_per_token_quant(Tensor x, Tensor? weight, float eps, bool gemma, ScalarType dtype,"
    " Tensor? scale_ub) -> (Tensor, Tensor)",
)
_add_per_token = _register(
    "token",
    "add_rms_norm_dynamic_per_token_quant(Tensor x, Tensor residual, Tensor? weight, float eps, bool gemma,"
    " ScalarType dtype, Tensor? scale_ub) -> (Tensor, Tensor, Tensor)",
)
_per_block = _register(
    "block",
    "rms_norm_per_block_quant(Tensor x, Tensor? weight, float eps, bool gemma, int group_size) -> (Tensor, Tensor)",
)
_add_per_block = _register(
    "block",
    "add_rms_norm_per_block_quant(Tensor x, Tensor residual, Tensor? weight, float eps, bool gemma, int group_size)"
    " -> (Tensor, Tensor, Tensor)",
)


def rms_norm_static_fp8_quant(
    x: Tensor, weight: Tensor | None, scale: Tensor, eps: float = 1e-6, *, gemma: bool = False
) -> Tensor:
    """``rms_norm``, divided by a scale that is known beforehand and rounded to fp8.

    Args:
        x: [..., hidden_size], fp32, fp16 or bf16, any strides.
        weight: [hidden_size] of x's dtype, or None for none.
        scale: one fp32 element on x's device, of any shape, positive: a value of ``out`` stands for itself times it.
            A scale that is computed from the batch makes the result depend on the batch.
        eps: added to the mean square; finite, not negative.
        gemma: scale by ``1 + weight``, as in ``rms_norm``.

    Returns:
        float8_e4m3fn of x's shape, contiguous, saturated at 448 times the scale.

    Invariance: each row's bits depend on the row, weight, scale, eps and the form alone; see the module docstring.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: before anything is computed. The value of the scale is
            checked on the CPU alone: on a GPU, reading it would wait for the device.
        UnsupportedError: autograd would record the call.

    Source: vLLM's ``static_scaled_fp8_quant``.
    """
    require_no_grad("rms_norm_static_fp8_quant", x, weight, scale)
    result: Tensor = _static(x, weight, scale, eps, gemma)
    return result


def add_rms_norm_static_fp8_quant(
    x: Tensor, residual: Tensor, weight: Tensor | None, scale: Tensor, eps: float = 1e-6, *, gemma: bool = False
) -> tuple[Tensor, Tensor]:
    """``rms_norm_static_fp8_quant`` of ``residual + x``: returns it and that sum, rounded to the dtype.

    Args, invariance and errors are those of ``rms_norm_static_fp8_quant``; residual has x's shape and dtype.
    """
    require_no_grad("add_rms_norm_static_fp8_quant", x, residual, weight, scale)
    result: tuple[Tensor, Tensor] = _add_static(x, residual, weight, scale, eps, gemma)
    return result


def rms_norm_dynamic_per_token_quant(
    x: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    gemma: bool = False,
    dtype: torch.dtype = FP8,
    scale_ub: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``rms_norm``, each token divided by a scale of its own and rounded to fp8 or int8.

    Args:
        x: [..., hidden_size], fp32, fp16 or bf16, any strides.
        weight: [hidden_size] of x's dtype, or None for none.
        eps: added to the mean square; finite, not negative.
        gemma: scale by ``1 + weight``, as in ``rms_norm``.
        dtype: float8_e4m3fn or int8.
        scale_ub: None, or one fp32 element on x's device, positive: the largest absolute value that a token's fp8
            scale may be made for; what lies beyond it saturates.

    Returns:
        ``dtype`` of x's shape and the fp32 scales [..., 1], contiguous. A token of zeros has int8 scale 0.

    Invariance: a token's bits, and its scale's, depend on its row, weight, eps, scale_ub and the form alone; see the
    module docstring.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: before anything is computed. The value of scale_ub is
            checked on the CPU alone: on a GPU, reading it would wait for the device.
        UnsupportedError: autograd would record the call.

    Source: vLLM's ``dynamic_per_token_scaled_fp8_quant`` and ``dynamic_scaled_int8_quant``.
    """
    require_no_grad("rms_norm_dynamic_per_token_quant", x, weight, scale_ub)
    result: tuple[Tensor, Tensor] = _per_token(x, weight, eps, gemma, dtype, scale_ub)
    return result


def add_rms_norm_dynamic_per_token_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    gemma: bool = False,
    dtype: torch.dtype = FP8,
    scale_ub: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``rms_norm_dynamic_per_token_quant`` of ``residual + x``: returns both of its results and that sum.

    Args, invariance and errors are those of ``rms_norm_dynamic_per_token_quant``; residual has x's shape and dtype,
    and so has the sum.
    """
    require_no_grad("add_rms_norm_dynamic_per_token_quant", x, residual, weight, scale_ub)
    result: tuple[Tensor, Tensor, Tensor] = _add_per_token(x, residual, weight, eps, gemma, dtype, scale_ub)
    return result


def rms_norm_per_block_quant(
    x: Tensor, weight: Tensor | None, eps: float = 1e-6, *, gemma: bool = False, group_size: int = 128
) -> tuple[Tensor, Tensor]:
    """``rms_norm``, each block of ``group_size`` columns of a token divided by a scale of its own and rounded to fp8.

    Args:
        x: [..., hidden_size], fp32, fp16 or bf16, any strides; group_size divides hidden_size.
        weight: [hidden_size] of x's dtype, or None for none.
        eps: added to the mean square; finite, not negative.
        gemma: scale by ``1 + weight``, as in ``rms_norm``.
        group_size: 128 or 64.

    Returns:
        float8_e4m3fn of x's shape and the fp32 scales [..., hidden_size / group_size], contiguous.

    Invariance: a block's bits, and its scale's, depend on its token's row, weight, eps and the form alone; see the
    module docstring.

    Raises:
        ShapeError: group_size does not divide hidden_size, or tensors do not fit.
        DtypeError, DeviceError, ArgumentError: before anything is computed.
        UnsupportedError: autograd would record the call.

    Source: vLLM's ``per_token_group_fp8_quant`` with fp32 scales in rows.
    """
    require_no_grad("rms_norm_per_block_quant", x, weight)
    result: tuple[Tensor, Tensor] = _per_block(x, weight, eps, gemma, group_size)
    return result


def add_rms_norm_per_block_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    gemma: bool = False,
    group_size: int = 128,
) -> tuple[Tensor, Tensor, Tensor]:
    """``rms_norm_per_block_quant`` of ``residual + x``: returns both of its results and that sum.

    Args, invariance and errors are those of ``rms_norm_per_block_quant``; residual has x's shape and dtype, and so
    has the sum.
    """
    require_no_grad("add_rms_norm_per_block_quant", x, residual, weight)
    result: tuple[Tensor, Tensor, Tensor] = _add_per_block(x, residual, weight, eps, gemma, group_size)
    return result


def _sample(
    mode: str, residual: bool, num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    inputs: Inputs = {"x": randn(num_tokens, 4096), "weight": randn(4096) * 0.1 + 1.0, "eps": 1e-6}
    if residual:
        inputs["residual"] = randn(num_tokens, 4096)
    if mode == "static":
        inputs["scale"] = torch.full((1,), 4.0 / 448.0, device=device)
    if mode == "block":
        inputs["group_size"] = 128
    return inputs


for _op, _mode, _axes in (
    (rms_norm_static_fp8_quant, "static", ("x",)),
    (add_rms_norm_static_fp8_quant, "static", ("x", "residual")),
    (rms_norm_dynamic_per_token_quant, "token", ("x",)),
    (add_rms_norm_dynamic_per_token_quant, "token", ("x", "residual")),
    (rms_norm_per_block_quant, "block", ("x",)),
    (add_rms_norm_per_block_quant, "block", ("x", "residual")),
):
    register_spec(
        OpSpec(
            _op.__name__,
            _op,
            partial(_reference, _op.__name__, _mode),
            partial(_sample, _mode, len(_axes) == 2),
            batch_axes=dict.fromkeys(_axes, 0),
            tolerance="rms_norm_quant",
        )
    )
