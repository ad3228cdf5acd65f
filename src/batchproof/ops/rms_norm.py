"""RMSNorm, and RMSNorm of a residual sum, batch-invariant by construction.

    out = (x * rsqrt(mean(x**2) + eps)).to(dtype) * weight            Llama
    out = (x * rsqrt(mean(x**2) + eps) * (1 + weight)).to(dtype)      Gemma

With a residual, ``residual + x`` is first rounded to the activation dtype, stored, and then normalised. On a GPU
squares are summed in fp32 (fp32 input: in fp64), as the models do: a bf16 row with values past 1.8e19 overflows to 0.

Invariance: on a GPU one program reduces one row, and the binary it runs is a function of (hidden_size, dtype, form)
alone: the row is summed by the tree that ``tl.sum`` compiles to for BLOCK elements and the warps of the table below.
What could make Triton compile another tree, the alignment of pointers and strides, is pinned: aligned hidden sizes
get aligned tensors (anything else is copied first), and no integer argument is specialised on. Contraction of
multiply and add into FMA is off. On the CPU the sum is exact, so it has no order (see ``_exact``).

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019. The fused form is vLLM's
``fused_add_rms_norm``, whose block size (and so its bits) changes at 256 tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ShapeError
from ..registry import OpSpec, register_spec
from . import _exact
from ._library import (
    check_dtype,
    check_no_overlap,
    check_positive,
    check_same,
    check_writable,
    register_op,
    require_no_grad,
)
from ._rows import readable, row_strides, writable
from ._triton import device_guard, tl, triton

__all__ = ["add_rms_norm", "add_rms_norm_reference", "fused_add_rms_norm", "rms_norm", "rms_norm_reference"]

MAX_BLOCK = 16384  # elements held in registers; wider rows are read twice
# (widest BLOCK, warps): the launch is a function of hidden_size alone
NUM_WARPS = ((512, 1), (1024, 2), (4096, 4), (8192, 8), (MAX_BLOCK, 16))


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
    do_not_specialize=["num_inner", "eps"]
    + [f"{tensor}_{axis}" for tensor in ("x", "residual", "out", "residual_out") for axis in ("outer", "inner")]
)
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, residual_out_ptr,
    x_outer: tl.int64, x_inner: tl.int64, residual_outer: tl.int64, residual_inner: tl.int64,
    out_outer: tl.int64, out_inner: tl.int64, residual_out_outer: tl.int64, residual_out_inner: tl.int64,
    num_inner: tl.int64, eps: tl.float32,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, GEMMA: tl.constexpr,
):  # fmt: skip
    """One row of HIDDEN elements. Rows are addressed by two strides, in units of VEC elements."""
    row = tl.program_id(0).to(tl.int64)
    outer = row // num_inner
    inner = row % num_inner
    x_ptr += (outer * x_outer + inner * x_inner) * VEC
    out_ptr += (outer * out_outer + inner * out_inner) * VEC
    if HAS_RESIDUAL:
        residual_ptr += (outer * residual_outer + inner * residual_inner) * VEC
        residual_out_ptr += (outer * residual_out_outer + inner * residual_out_inner) * VEC
    dtype = out_ptr.dtype.element_ty

    squares = tl.zeros([BLOCK], dtype=ACC)
    for start in tl.static_range(0, HIDDEN, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < HIDDEN
        value = tl.load(x_ptr + columns, mask=mask, other=0.0).to(ACC)
        if HAS_RESIDUAL:
            value = (value + tl.load(residual_ptr + columns, mask=mask, other=0.0).to(ACC)).to(dtype)
            tl.store(residual_out_ptr + columns, value, mask=mask)
            value = value.to(ACC)
        squares += value * value

    mean = tl.sum(squares, axis=0) / HIDDEN + eps
    if ACC == tl.float64:
        rstd = 1.0 / tl.sqrt(mean)
    else:
        rstd = tl.div_rn(1.0, tl.sqrt_rn(mean))

    if HAS_RESIDUAL and HIDDEN > BLOCK:
        tl.debug_barrier()  # the sum is read back below, perhaps by another thread than wrote it
    for start in tl.static_range(0, HIDDEN, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < HIDDEN
        if HIDDEN > BLOCK:
            source_ptr = residual_out_ptr if HAS_RESIDUAL else x_ptr
            value = tl.load(source_ptr + columns, mask=mask, other=0.0).to(ACC)
        y = value * rstd
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(ACC)
            y = y * (1.0 + weight) if GEMMA else y.to(dtype).to(ACC) * weight
        tl.store(out_ptr + columns, y.to(dtype), mask=mask)


def launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    out: torch.Tensor,
    residual_out: torch.Tensor | None,
    eps: float,
    gemma: bool,
) -> None:
    """Run the kernel on tensors of one shape; ``out`` may be ``x`` and ``residual_out`` may be ``residual``."""
    if x.numel() == 0:
        return
    hidden_size = x.shape[-1]
    vec = 16 // x.element_size()
    vec = vec if hidden_size % vec == 0 else 1
    sources = [readable(t, vec) for t in (x, residual)]
    targets = [writable(t, vec) for t in (out, residual_out)]
    block = min(triton.next_power_of_2(hidden_size), MAX_BLOCK)
    warps = next(count for widest, count in NUM_WARPS if block <= widest)
    pointers: list[Any] = [*sources, readable(weight, 1), *targets]
    strides = [step // vec for t in (*sources, *targets) for step in row_strides(t)]
    with device_guard(x):
        _rms_norm_kernel[(x.numel() // hidden_size,)](
            *pointers,
            *strides,
            x.shape[-2] if x.dim() > 2 else 1,
            eps,
            HIDDEN=hidden_size,
            BLOCK=block,
            VEC=vec,
            ACC=tl.float64 if x.dtype == torch.float32 else tl.float32,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            GEMMA=gemma,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    for original, target in zip((out, residual_out), targets, strict=True):
        if original is not None and target is not None and target is not original:
            original.copy_(target)


def _validate(op: str, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float) -> None:
    check_dtype(op, "x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ShapeError(f"{op}: x has shape {tuple(x.shape)}, want [..., hidden_size] with hidden_size at least 1")
    if weight is not None:
        check_same(op, "weight", weight, "x", x)
        if weight.shape != x.shape[-1:]:
            raise ShapeError(f"{op}: weight has shape {tuple(weight.shape)}, want ({x.shape[-1]},), x's last axis")
    if residual is not None:
        check_same(op, "residual", residual, "x", x)
        if residual.shape != x.shape:
            raise ShapeError(f"{op}: residual has shape {tuple(residual.shape)}, want {tuple(x.shape)} as x has")
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
        UnsupportedError: autograd would record the call.

    Source: Zhang and Sennrich, 2019; the roundings of Hugging Face's LlamaRMSNorm and GemmaRMSNorm.
    """
    require_no_grad("rms_norm", x, weight)
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
        UnsupportedError: autograd would record the call.

    Source: vLLM's ``fused_add_rms_norm``.
    """
    require_no_grad("fused_add_rms_norm", x, residual, weight)
    _fused_add_rms_norm(x, residual, weight, eps, gemma)
    return x, residual


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6, *, gemma: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """``fused_add_rms_norm`` as a function: returns new ``(out, residual + x)`` and writes neither input.

    The form for torch.compile: nothing is mutated, so nothing has to be copied to keep it from being mutated.

    Args, invariance and errors are those of ``fused_add_rms_norm``; x and residual may overlap here.
    """
    require_no_grad("add_rms_norm", x, residual, weight)
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
