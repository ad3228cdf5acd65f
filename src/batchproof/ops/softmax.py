"""Softmax and its logarithm over one axis, batch-invariant by construction.

    softmax(x)     = exp(x - max(x)) / sum(exp(x - max(x)))
    log_softmax(x) = x - max(x) - log(sum(exp(x - max(x))))

Invariance: on a GPU a row is cut in blocks of BLOCK columns. A block gives its largest element and the sum of its
exponentials, by the tree that ``tl.sum`` compiles to for BLOCK elements and the warps of ``_rows.NUM_WARPS``; blocks
are added up in ascending order, each brought to the largest element so far. All of it is a function of (row width N,
dtypes) alone. Who does it is not: the blocks of few wide rows are shared out to programs of their own, or few programs
would read with the GPU idle; one program walks a row where there are many. The kernels only ever see packed rows from a
16-byte aligned base, so the alignment they are compiled for is a function of N as well; N is not specialised on, and
contraction into FMA is off. On the CPU the sum is exact within chunks of fixed size, and exp and log are made of IEEE
operations (see ``_exact``).

Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..registry import OpSpec, register_spec
from . import _exact
from ._library import register_op, require_no_grad
from ._row_launch import launch_options
from ._row_tree import launch_dependents, wait_for_inputs
from ._rows import block_and_warps, cast_first, normalise_dim, packed, vector_width
from ._triton import device_guard, processors, tl, triton

__all__ = ["log_softmax", "log_softmax_reference", "softmax", "softmax_reference"]

FULL = 2  # rows for each of a GPU's multiprocessors: with fewer, those wider than a block are shared out


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


@triton.jit
def _part(value):
    """The largest element of a block, and the sum of the exponentials of what lies below it."""
    peak = tl.max(value, axis=0)
    return peak, tl.sum(tl.exp(value - _base(peak)), axis=0)


@triton.jit
def _base(peak):
    """What to subtract: the largest element, and 0 where all are -inf."""
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def _add_part(peak, total, right_peak, right_total):
    """Two parts of a row as one."""
    new_peak = tl.maximum(peak, right_peak)
    base = _base(new_peak)
    return new_peak, total * tl.exp(peak - base) + right_total * tl.exp(right_peak - base)


@triton.jit
def _block_of(x_ptr, columns, width):
    """Elements of a row in fp32, -inf past its end."""
    return tl.load(x_ptr + columns, mask=columns < width, other=-float("inf")).to(tl.float32)


@triton.jit(do_not_specialize=["num_vectors"])
def _row_kernel(
    x_ptr, out_ptr, num_vectors: tl.int64,
    BLOCK: tl.constexpr, VEC: tl.constexpr, ONE_BLOCK: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """One packed row of num_vectors * VEC elements; one that fits BLOCK is read once, any other twice."""
    width = num_vectors * VEC
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * width
    out_ptr += row * width
    dtype = out_ptr.dtype.element_ty
    lanes = tl.arange(0, BLOCK)

    if ONE_BLOCK:
        value = _block_of(x_ptr, lanes, width)
        peak, total = _part(value)
        tl.store(out_ptr + lanes, _result(value - peak, total, LOG).to(dtype), mask=lanes < width)
    else:
        peak = -float("inf")
        total = 0.0
        for start in range(0, width, BLOCK):
            block_peak, block_total = _part(_block_of(x_ptr, start + lanes, width))
            peak, total = _add_part(peak, total, block_peak, block_total)
        for start in range(0, width, BLOCK):
            columns = start + lanes
            value = _block_of(x_ptr, columns, width)
            tl.store(out_ptr + columns, _result(value - peak, total, LOG).to(dtype), mask=columns < width)


@triton.jit(do_not_specialize=["num_vectors"])
def _parts_kernel(
    x_ptr, peaks_ptr, totals_ptr, num_vectors: tl.int64, BLOCK: tl.constexpr, VEC: tl.constexpr, PDL: tl.constexpr
):
    """Block program_id(1) of row program_id(0): its part, to ``peaks`` and ``totals`` [num_rows, blocks], fp32."""
    wait_for_inputs(PDL)
    launch_dependents(PDL)
    width = num_vectors * VEC
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    peak, total = _part(_block_of(x_ptr + row * width, block * BLOCK + tl.arange(0, BLOCK), width))
    place = row * tl.num_programs(1) + block
    tl.store(peaks_ptr + place, peak)
    tl.store(totals_ptr + place, total)


@triton.jit(do_not_specialize=["num_vectors"])
def _output_kernel(
    x_ptr, peaks_ptr, totals_ptr, out_ptr, num_vectors: tl.int64,
    BLOCK: tl.constexpr, VEC: tl.constexpr, LOG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Block program_id(1) of row program_id(0): the row's parts added up, then the block's output."""
    wait_for_inputs(PDL)
    launch_dependents(PDL)
    width = num_vectors * VEC
    row, blocks = tl.program_id(0).to(tl.int64), tl.num_programs(1)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = _block_of(x_ptr + row * width, columns, width)
    peak = -float("inf")
    total = 0.0
    for block in range(blocks):
        place = row * blocks + block
        peak, total = _add_part(peak, total, tl.load(peaks_ptr + place), tl.load(totals_ptr + place))
    result = _result(value - peak, total, LOG).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + columns, result, mask=columns < width)


def launch(rows: torch.Tensor, out: torch.Tensor, log: bool, shared: bool | None = None) -> None:
    """Run the kernels on ``rows`` [num_rows, N]; ``out`` is new, packed, of that shape.

    ``shared``: whether the blocks of a row are shared out; None: where that fills the GPU better. No bit depends on it.
    """
    if rows.numel() == 0:
        return
    rows = packed(rows)
    num_rows, width = rows.shape
    block, warps = block_and_warps(width)
    vec = vector_width(rows)
    blocks = triton.cdiv(width, block)
    constants = {"BLOCK": block, "VEC": vec, "num_warps": warps}
    if shared is None:
        shared = num_rows < FULL * processors(rows.device)
    with device_guard(rows):
        if not shared or blocks == 1:
            _row_kernel[(num_rows,)](
                rows, out, width // vec, ONE_BLOCK=blocks == 1, LOG=log, enable_fp_fusion=False, **constants
            )
            return
        options = constants | launch_options(rows)
        parts = rows.new_empty((2, num_rows, blocks), dtype=torch.float32)
        _parts_kernel[(num_rows, blocks)](rows, parts[0], parts[1], width // vec, **options)
        _output_kernel[(num_rows, blocks)](rows, parts[0], parts[1], out, width // vec, LOG=log, **options)


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
