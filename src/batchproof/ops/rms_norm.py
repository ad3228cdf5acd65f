"""RMSNorm, and RMSNorm of a residual sum, batch-invariant by construction.

    out = (x * rsqrt(mean(x**2) + eps)).to(dtype) * weight            Llama
    out = (x * rsqrt(mean(x**2) + eps) * (1 + weight)).to(dtype)      Gemma

With a residual, ``residual + x`` is first rounded to the activation dtype, stored, and then normalised. On a GPU
squares are summed in fp32 (fp32 input: in fp64), as the models do: a bf16 row with values past 1.8e19 overflows to 0.

Invariance: on a GPU a row is summed by the tree of ``_row_tree``, a function of (hidden_size, dtype) alone. The number
of rows chooses how many warps take a row and in which order they read it, from the table in ``_row_launch``; all of
those launches add in that tree. What could make Triton compile another one, the alignment of pointers and strides, is
pinned: aligned hidden sizes get aligned tensors (anything else is copied first), and no integer argument is
specialised on. Contraction of multiply and add into FMA is off. On the CPU the sum is exact, so it has no order (see
``_exact``).

On sm_90 and later, launches are programmatic dependent ones: this kernel's programs take their places while the
kernel before it ends, and wait for its end before they touch memory.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019. The fused form is vLLM's
``fused_add_rms_norm``, whose block size (and so its bits) changes at 256 tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from ..registry import OpSpec, register_spec
from . import _exact
from ._autograd import is_recorded, refuse_leaves
from ._library import (
    check_like,
    check_no_overlap,
    check_parameter,
    check_positive,
    check_rows,
    check_writable,
    register_op,
)
from ._row_launch import CachedKernel, RowVariant, address_rows, row_plan
from ._row_tree import along_rows, load_rows, normalised, row_rstd, rows_of_program, wait_for_inputs
from ._rows import readable
from ._triton import tl, triton
from .rms_norm_backward import with_gradient

__all__ = ["add_rms_norm", "add_rms_norm_reference", "fused_add_rms_norm", "rms_norm", "rms_norm_reference"]


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, gemma: bool = False
) -> torch.Tensor:
    """The formula in float64, rounded to the dtype where the models round."""
    wide = x.double()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return y.to(x.dtype)
    if gemma:
        return (y * (1.0 + weight.double())).to(x.dtype)
    return (y.to(x.dtype).double() * weight.double()).to(x.dtype)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6, gemma: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual sum rounded to the dtype, then ``rms_norm_reference``; new tensors."""
    total = (x.double() + residual.double()).to(x.dtype)
    return rms_norm_reference(total, weight, eps, gemma), total


@triton.jit(
    do_not_specialize=["num_rows", "num_inner", "eps"]
    + [f"{tensor}_{axis}" for tensor in ("x", "residual", "out", "residual_out") for axis in ("outer", "inner")]
)
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, residual_out_ptr,
    x_outer: tl.int64, x_inner: tl.int64, residual_outer: tl.int64, residual_inner: tl.int64,
    out_outer: tl.int64, out_inner: tl.int64, residual_out_outer: tl.int64, residual_out_inner: tl.int64,
    num_rows: tl.int32, num_inner: tl.int32, eps: tl.float64,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_2: tl.constexpr,
    VEC: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    AHEAD: tl.constexpr, HOLD: tl.constexpr, LATE: tl.constexpr, GEMMA: tl.constexpr, FLAT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows of HIDDEN elements. Rows are addressed by two strides, in units of ALIGN elements; by one if FLAT."""
    _, row_mask, outer, inner = rows_of_program(num_rows, num_inner, ROWS, FLAT)
    columns = tl.arange(0, CHUNK)[None, :]
    x_ptr += (outer * x_outer + inner * x_inner) * ALIGN
    out_ptr += (outer * out_outer + inner * out_inner) * ALIGN
    if residual_ptr is not None:
        residual_ptr += (outer * residual_outer + inner * residual_inner) * ALIGN
        residual_out_ptr += (outer * residual_out_outer + inner * residual_out_inner) * ALIGN

    wait_for_inputs(PDL)
    values, weights, parts = load_rows(
        x_ptr, residual_ptr, residual_out_ptr, weight_ptr, columns, row_mask,
        HIDDEN, CHUNK, CHUNKS, VEC, ACC, AHEAD, HOLD, LATE, PDL,
    )  # fmt: skip
    rstd = along_rows(row_rstd(parts, eps, HIDDEN, CHUNKS_2))
    source_ptr = x_ptr
    if residual_ptr is not None:
        source_ptr = residual_out_ptr
    if not HOLD:
        tl.debug_barrier()  # what is read back below may have been written by another thread
    for i in tl.static_range(CHUNKS):
        at = i * CHUNK + columns
        y = normalised(values, weights, source_ptr, weight_ptr, columns, row_mask, rstd, i, HIDDEN, CHUNK, GEMMA)
        tl.store(out_ptr + at, y, mask=(at < HIDDEN) & row_mask)


_KERNEL = CachedKernel(_rms_norm_kernel)


def launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    out: torch.Tensor,
    residual_out: torch.Tensor | None,
    eps: float,
    gemma: bool,
    variant: RowVariant | None = None,
) -> None:
    """Run the kernel on tensors of one shape; ``out`` may be ``x`` and ``residual_out`` may be ``residual``.

    ``variant`` is the plan's for the number of rows unless it is given: the bits are the same.
    """
    if x.numel() == 0:
        return
    plan = row_plan(x.shape[-1], x.dtype)
    rows = address_rows(plan, (x, residual), (out, residual_out))
    variant = variant or plan.variant(rows.num_rows)
    source, added, target, total = rows.tensors
    flat = rows.num_inner == 1
    _KERNEL(
        (plan, variant, residual is None, weight is None, gemma, flat),
        -(-rows.num_rows // plan.rows),
        x,
        (source, added, readable(weight, 1), target, total, *rows.strides, rows.num_rows, rows.num_inner, eps),
        (*plan.constants(variant), gemma, flat),
        variant.warps,
    )
    for original, copy in rows.pending:
        original.copy_(copy)


def _validate(op: str, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float) -> None:
    check_rows(op, x)
    check_parameter(op, "weight", weight, x)
    check_like(op, "residual", residual, x)
    check_positive(op, "eps", eps)


def _validate_in_place(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float) -> None:
    op = "fused_add_rms_norm"
    _validate(op, x, residual, weight, eps)
    check_writable(op, "x", x)
    check_writable(op, "residual", residual)
    check_no_overlap(op, "residual", residual, "x", x)
    if weight is not None:
        check_no_overlap(op, "weight", weight, "x", x)
        check_no_overlap(op, "weight", weight, "residual", residual)


def _normalise_cpu(x: torch.Tensor, weight: torch.Tensor | None, eps: float, gemma: bool) -> torch.Tensor:
    """``x`` normalised in float64 around an exact sum of squares, rounded where the models round."""
    wide = x.double()
    mean = _exact.exact_sum(wide * wide).unsqueeze(-1) / x.shape[-1]
    y = wide * (1.0 / (mean + eps).sqrt())
    if weight is None:
        return _exact.rounded_to(y, x.dtype)
    wide_weight = weight.double()
    y = y * (wide_weight + 1.0) if gemma else y.to(x.dtype).double() * wide_weight
    return _exact.rounded_to(y, x.dtype)


def _residual_sum(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return _exact.rounded_to(x.double() + residual.double(), x.dtype)


def _rms_norm_cpu(x: torch.Tensor, weight: torch.Tensor | None, eps: float, gemma: bool) -> torch.Tensor:
    _validate("rms_norm", x, None, weight, eps)
    return _normalise_cpu(x, weight, eps, gemma).contiguous()


def _rms_norm_cuda(x: torch.Tensor, weight: torch.Tensor | None, eps: float, gemma: bool) -> torch.Tensor:
    _validate("rms_norm", x, None, weight, eps)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch(x, None, weight, out, None, eps, gemma)
    return out


def _rms_norm_fake(x: torch.Tensor, weight: torch.Tensor | None, eps: float, gemma: bool) -> torch.Tensor:
    _validate("rms_norm", x, None, weight, eps)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _add_rms_norm_cpu(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, gemma: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    _validate("add_rms_norm", x, residual, weight, eps)
    total = _residual_sum(x, residual).contiguous()
    return _normalise_cpu(total, weight, eps, gemma), total


def _add_rms_norm_cuda(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, gemma: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    _validate("add_rms_norm", x, residual, weight, eps)
    out, total = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    launch(x, residual, weight, out, total, eps, gemma)
    return out, total


def _add_rms_norm_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, gemma: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    _validate("add_rms_norm", x, residual, weight, eps)
    out, total = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    return out, total


def _fused_add_rms_norm_cpu(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, gemma: bool
) -> None:
    _validate_in_place(x, residual, weight, eps)
    residual.copy_(_residual_sum(x, residual))
    x.copy_(_normalise_cpu(residual, weight, eps, gemma))


def _fused_add_rms_norm_cuda(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, gemma: bool
) -> None:
    _validate_in_place(x, residual, weight, eps)
    launch(x, residual, weight, x, residual, eps, gemma)
    for written in (x, residual):  # as ``copy_`` does: a backward pass that has kept one of them has to notice
        if not written.is_inference():
            torch.autograd.graph.increment_version(written)


def _fused_add_rms_norm_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, gemma: bool
) -> None:
    _validate("fused_add_rms_norm", x, residual, weight, eps)


_rms_norm = register_op(
    "rms_norm(Tensor x, Tensor? weight, float eps, bool gemma) -> Tensor",
    cpu=_rms_norm_cpu, cuda=_rms_norm_cuda, fake=_rms_norm_fake,
)  # fmt: skip
_add_rms_norm = register_op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, bool gemma) -> (Tensor, Tensor)",
    cpu=_add_rms_norm_cpu, cuda=_add_rms_norm_cuda, fake=_add_rms_norm_fake,
)  # fmt: skip
_fused_add_rms_norm = register_op(
    "fused_add_rms_norm(Tensor(a!) x, Tensor(b!) residual, Tensor? weight, float eps, bool gemma) -> ()",
    cpu=_fused_add_rms_norm_cpu, cuda=_fused_add_rms_norm_cuda, fake=_fused_add_rms_norm_fake,
)  # fmt: skip
_rms_norm, _add_rms_norm = with_gradient(_rms_norm), with_gradient(_add_rms_norm)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, *, gemma: bool = False
) -> torch.Tensor:
    """Normalise ``x`` by the root mean square of its last axis.

    Args:
        x: [..., hidden_size], fp32, fp16 or bf16, any strides. Use [tokens, heads, head_dim] for q/k norms.
        weight: [hidden_size] of x's dtype, or None for none.
        eps: added to the mean square; finite, not negative.
        gemma: scale by ``1 + weight`` before the one rounding, as Gemma does, rather than after it.

    Returns:
        A new contiguous tensor of x's shape and dtype.

    Invariance: each row's bits depend on the row, weight, eps and the form alone; see the module docstring.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: before anything is written.

    Source: Zhang and Sennrich, 2019; the roundings of Hugging Face's LlamaRMSNorm and GemmaRMSNorm.
    """
    result: torch.Tensor = _rms_norm(x, weight, eps, gemma)
    return result


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6, *, gemma: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place: ``residual += x``, then ``x = rms_norm(residual)``; returns ``(x, residual)``, as vLLM does.

    Args:
        x: [..., hidden_size], fp32, fp16 or bf16; overwritten with the output.
        residual: of x's shape and dtype, not overlapping it; overwritten with the sum, rounded to the dtype.
        weight: [hidden_size] of x's dtype, or None for none.
        eps: added to the mean square; finite, not negative.
        gemma: scale by ``1 + weight``, as in ``rms_norm``.

    Invariance: as ``rms_norm``, and the bits of ``rms_norm(residual + x)``.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: before anything is written.
        LayoutError: x and residual overlap, or one of them overlaps itself.
        UnsupportedError: autograd would record the call, and x or residual is a leaf that requires grad.

    Source: vLLM's ``fused_add_rms_norm``.
    """
    if is_recorded(x, residual, weight):
        return _recorded_in_place(x, residual, weight, eps, gemma)
    _fused_add_rms_norm(x, residual, weight, eps, gemma)
    return x, residual


def _recorded_in_place(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, gemma: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The functional form, copied: the next norm writes over ``residual``, of which this one's gradient is made."""
    if not torch.compiler.is_compiling():  # traced tensors have no addresses to compare
        _validate_in_place(x, residual, weight, eps)
    refuse_leaves("fused_add_rms_norm", x=x, residual=residual)
    out, total = _add_rms_norm(x, residual, weight, eps, gemma)
    return x.copy_(out), residual.copy_(total)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6, *, gemma: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """``fused_add_rms_norm`` as a function: returns new ``(out, residual + x)`` and writes neither input.

    The form for torch.compile: nothing is mutated, so nothing has to be copied to keep it from being mutated.

    Args, invariance and errors are those of ``fused_add_rms_norm``; x and residual may overlap here.
    """
    result: tuple[torch.Tensor, torch.Tensor] = _add_rms_norm(x, residual, weight, eps, gemma)
    return result


def _sample(
    num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator, residual: bool = False
) -> dict[str, Any]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    inputs: dict[str, Any] = {"x": randn(num_tokens, 4096), "weight": randn(4096) * 0.1 + 1.0, "eps": 1e-6}
    return {**inputs, "residual": randn(num_tokens, 4096)} if residual else inputs


def _sample_residual(
    num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    return _sample(num_tokens, dtype, device, generator, residual=True)


register_spec(OpSpec("rms_norm", rms_norm, rms_norm_reference, _sample, batch_axes={"x": 0}, tolerance="rms_norm"))
register_spec(
    OpSpec(
        "add_rms_norm",
        add_rms_norm,
        add_rms_norm_reference,
        _sample_residual,
        batch_axes={"x": 0, "residual": 0},
        tolerance="rms_norm",
    )
)
register_spec(
    OpSpec(
        "fused_add_rms_norm",
        fused_add_rms_norm,
        add_rms_norm_reference,
        _sample_residual,
        batch_axes={"x": 0, "residual": 0},
        tolerance="rms_norm",
        in_place=("x", "residual"),
    )
)
