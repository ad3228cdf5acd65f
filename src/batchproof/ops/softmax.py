"""Softmax and its logarithm over one axis, batch-invariant by construction.

    softmax(x)     = exp(x - max(x)) / sum(exp(x - max(x)))
    log_softmax(x) = x - max(x) - log(sum(exp(x - max(x))))

Invariance: on a GPU one program reduces one row. The maximum has no order. The sum is taken element by element over
blocks of BLOCK columns, in ascending order, and then by the tree that ``tl.sum`` compiles to for BLOCK elements and
the warps of ``_rows.NUM_WARPS``: both are functions of (row width N, dtypes) alone. The kernel only ever sees packed
rows from a 16-byte aligned base, so the alignment it is compiled for is a function of N as well; N is not
specialised on, and contraction into FMA is off. On the CPU the sum is exact within chunks of fixed size, and exp and
log are made of IEEE operations (see ``_exact``).

Source: the three passes of Milakov and Gimelshein, Online normalizer calculation for softmax, 2018, section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..registry import OpSpec, register_spec
from . import _exact
from ._library import register_op, require_no_grad
from ._rows import block_and_warps, cast_first, normalise_dim, packed, vector_width
from ._triton import device_guard, tl, triton

__all__ = ["log_softmax", "log_softmax_reference", "softmax", "softmax_reference"]


def softmax_reference(x: torch.Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``x`` cast to ``dtype``, softmax in float64, rounded once."""
    x = x if dtype is None else x.to(dtype)
    return torch.softmax(x.double(), dim).to(x.dtype)


def log_softmax_reference(x: torch.Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``x`` cast to ``dtype``, log-softmax in float64, rounded once."""
    x = x if dtype is None else x.to(dtype)
    return torch.log_softmax(x.double(), dim).to(x.dtype)


@triton.jit
def _result(shifted, total, LOG: tl.constexpr):
    """The output in fp32, from x - max and the sum of its exponentials."""
    if LOG:
        y = shifted - tl.log(total)
    else:
        y = tl.div_rn(tl.exp(shifted), total)
    return y


@triton.jit(do_not_specialize=["num_vectors"])
def _softmax_kernel(
    x_ptr, out_ptr, num_vectors: tl.int64,
    BLOCK: tl.constexpr, VEC: tl.constexpr, ONE_BLOCK: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """One packed row of num_vectors * VEC elements; one that fits BLOCK is read once, any other three times."""
    width = num_vectors * VEC
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * width
    out_ptr += row * width
    dtype = out_ptr.dtype.element_ty
    lanes = tl.arange(0, BLOCK)

    if ONE_BLOCK:
        mask = lanes < width
        value = tl.load(x_ptr + lanes, mask=mask, other=-float("inf")).to(tl.float32)
        shifted = value - tl.max(value, axis=0)
        total = tl.sum(tl.exp(shifted), axis=0)
        tl.store(out_ptr + lanes, _result(shifted, total, LOG).to(dtype), mask=mask)
    else:
        largest = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
        for start in range(0, width, BLOCK):
            columns = start + lanes
            value = tl.load(x_ptr + columns, mask=columns < width, other=-float("inf")).to(tl.float32)
            largest = tl.maximum(largest, value)
        peak = tl.max(largest, axis=0)

        powers = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, width, BLOCK):
            columns = start + lanes
            value = tl.load(x_ptr + columns, mask=columns < width, other=-float("inf")).to(tl.float32)
            powers += tl.exp(value - peak)
        total = tl.sum(powers, axis=0)

        for start in range(0, width, BLOCK):
            columns = start + lanes
            mask = columns < width
            value = tl.load(x_ptr + columns, mask=mask, other=-float("inf")).to(tl.float32)
            tl.store(out_ptr + columns, _result(value - peak, total, LOG).to(dtype), mask=mask)


def launch(rows: torch.Tensor, out: torch.Tensor, log: bool) -> None:
    """Run the kernel on ``rows`` [num_rows, N]; ``out`` is new, packed, of that shape."""
    if rows.numel() == 0:
        return
    rows = packed(rows)
    num_rows, width = rows.shape
    block, warps = block_and_warps(width)
    vec = vector_width(rows)
    with device_guard(rows):
        _softmax_kernel[(num_rows,)](
            rows, out, width // vec,
            BLOCK=block, VEC=vec, ONE_BLOCK=width <= block, LOG=log,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def _softmax_rows_cpu(rows: torch.Tensor, log: bool, dtype: torch.dtype) -> torch.Tensor:
    wide = rows.double()
    shifted = wide - wide.amax(-1, keepdim=True)
    powers = _exact.exp(shifted.float()).double()
    total = _exact.exact_sum(powers).unsqueeze(-1)
    y = shifted - _exact.log(total) if log else powers / total
    return _exact.canonical_nan(y.to(dtype))


def _softmax_rows_cuda(rows: torch.Tensor, log: bool, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    launch(rows, out, log)
    return out


_RowsOp = Callable[[torch.Tensor, bool, torch.dtype], torch.Tensor]


def _run(op: str, x: torch.Tensor, dim: int, dtype: torch.dtype | None, rows_op: _RowsOp) -> torch.Tensor:
    """Validate, bring ``dim`` last as rows [-1, N], run ``rows_op`` on them and bring it back."""
    dim = normalise_dim(op, dim, x)
    x, dtype = cast_first(op, x, dtype)
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    moved = x.reshape(1) if x.dim() == 0 else x.movedim(dim, -1)
    out = rows_op(moved.reshape(-1, moved.shape[-1]), op == "log_softmax", dtype).view(moved.shape)
    return out.reshape(()) if x.dim() == 0 else out.movedim(-1, dim).contiguous()


def _fake(op: str, x: torch.Tensor, dim: int, dtype: torch.dtype | None) -> torch.Tensor:
    normalise_dim(op, dim, x)
    _, dtype = cast_first(op, x, dtype)
    return torch.empty(x.shape, dtype=dtype, device=x.device)


_softmax = register_op(
    "softmax(Tensor x, int dim, ScalarType? dtype) -> Tensor",
    cpu=lambda x, dim, dtype: _run("softmax", x, dim, dtype, _softmax_rows_cpu),
    cuda=lambda x, dim, dtype: _run("softmax", x, dim, dtype, _softmax_rows_cuda),
    fake=lambda x, dim, dtype: _fake("softmax", x, dim, dtype),
)
_log_softmax = register_op(
    "log_softmax(Tensor x, int dim, ScalarType? dtype) -> Tensor",
    cpu=lambda x, dim, dtype: _run("log_softmax", x, dim, dtype, _softmax_rows_cpu),
    cuda=lambda x, dim, dtype: _run("log_softmax", x, dim, dtype, _softmax_rows_cuda),
    fake=lambda x, dim, dtype: _fake("log_softmax", x, dim, dtype),
)


def softmax(x: torch.Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Softmax of ``x`` over ``dim``, as ``torch.softmax``.

    Args:
        x: any shape and strides, fp32, fp16 or bf16. An axis other than the last is copied to be it.
        dim: the axis that sums to 1.
        dtype: fp32, fp16 or bf16: x is cast to it first, and it is the output's. None for x's.

    Returns:
        A new contiguous tensor of x's shape. A row that holds NaN or +inf, or only -inf, is NaN, as torch has it.

    Invariance: each row's bits depend on that row and the two dtypes alone; see the module docstring.

    Raises:
        ArgumentError: there is no axis ``dim``.
        DtypeError: x or ``dtype`` is something else than fp32, fp16 or bf16.
        UnsupportedError: autograd would record the call.

    Source: ``torch.softmax``; on a GPU the arithmetic is fp32, with one rounding to the output dtype.
    """
    require_no_grad("softmax", x)
    result: torch.Tensor = _softmax(x, dim, dtype)
    return result


def log_softmax(x: torch.Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Logarithm of the softmax of ``x`` over ``dim``, as ``torch.log_softmax``.

    Args:
        x: any shape and strides, fp32, fp16 or bf16. An axis other than the last is copied to be it.
        dim: the axis whose exponentials sum to 1.
        dtype: fp32, fp16 or bf16: x is cast to it first, and it is the output's. None for x's.

    Returns:
        A new contiguous tensor of x's shape. A row that holds NaN or +inf, or only -inf, is NaN, as torch has it.

    Invariance: each row's bits depend on that row and the two dtypes alone; see the module docstring.

    Raises:
        ArgumentError: there is no axis ``dim``.
        DtypeError: x or ``dtype`` is something else than fp32, fp16 or bf16.
        UnsupportedError: autograd would record the call.

    Source: ``torch.log_softmax``; on a GPU the arithmetic is fp32, with one rounding to the output dtype.
    """
    require_no_grad("log_softmax", x)
    result: torch.Tensor = _log_softmax(x, dim, dtype)
    return result


def _aten(x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    """``aten::_softmax``; half_to_float asks for fp32 out of 16-bit input."""
    return softmax(x, dim, torch.float32 if half_to_float else None)


def _aten_log(x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    """``aten::_log_softmax``, likewise."""
    return log_softmax(x, dim, torch.float32 if half_to_float else None)


def _sample(num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    return {"x": (torch.randn(num_tokens, 4096, generator=generator, device=device) * 4.0).to(dtype), "dim": -1}


register_spec(
    OpSpec(
        "softmax",
        softmax,
        softmax_reference,
        _sample,
        batch_axes={"x": 0},
        tolerance="softmax",
        aten={"_softmax": _aten},
    )
)
register_spec(
    OpSpec(
        "log_softmax",
        log_softmax,
        log_softmax_reference,
        _sample,
        batch_axes={"x": 0},
        tolerance="log_softmax",
        aten={"_log_softmax": _aten_log},
    )
)
