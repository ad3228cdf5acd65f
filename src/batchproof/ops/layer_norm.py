"""LayerNorm over the last axis, batch-invariant by construction.

    out = ((x - mean(x)) / sqrt(mean((x - mean(x))**2) + eps) * weight + bias).to(dtype)

On a GPU everything is computed in fp32 (fp32 input: in fp64) and rounded once. Deviations are squared and summed once
the mean is known, from registers: the difference of two moments, which needs no second sum, cancels.

Invariance: on a GPU both means are sums by the tree of ``_row_tree``, which (hidden_size, dtype) alone decide. The
number of rows may choose the launch, and all launches of a width have that tree; rows too wide for registers are read
again for each sum, with the same values. Contraction of multiply and add into FMA is off. On the CPU both sums are
exact, so they have no order (see ``_exact``).

Source: Ba, Kiros and Hinton, Layer Normalization, 2016; the one rounding of ``torch.nn.functional.layer_norm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ShapeError
from ..registry import OpSpec, register_spec
from . import _exact
from ._library import check_parameter, check_positive, check_rows, register_op, require_no_grad
from ._row_launch import CachedKernel, RowVariant, address_rows, row_plan
from ._row_tree import (
    along_rows,
    chunk_of,
    launch_dependents,
    load_chunks,
    row_mean,
    row_rstd,
    rows_of_program,
    vector_sums,
    wait_for_inputs,
)
from ._rows import readable
from ._triton import tl, triton

__all__ = ["layer_norm", "layer_norm_reference"]


def layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """The formula in float64, rounded once."""
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.double()
    if bias is not None:
        y = y + bias.double()
    return y.to(x.dtype)


@triton.jit(do_not_specialize=["x_outer", "x_inner", "num_rows", "num_inner", "eps"])
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, mean_ptr, rstd_ptr,
    x_outer: tl.int64, x_inner: tl.int64, num_rows: tl.int32, num_inner: tl.int32, eps: tl.float64,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_2: tl.constexpr,
    VEC: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    AHEAD: tl.constexpr, HOLD: tl.constexpr, LATE: tl.constexpr, FLAT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows of HIDDEN elements, x's in strides of ALIGN elements as ``_rms_norm_kernel`` has it; packed outputs."""
    row, row_mask, outer, inner = rows_of_program(num_rows, num_inner, ROWS, FLAT)
    # Read for every row, weight and bias have the layout that rows have; read once, they would impose their own on them
    columns = tl.broadcast_to(tl.arange(0, CHUNK)[None, :], [ROWS, CHUNK])
    x_ptr += (outer * x_outer + inner * x_inner) * ALIGN
    out_ptr += row.to(tl.int64) * HIDDEN

    wait_for_inputs(PDL)
    values = load_chunks(x_ptr, columns, row_mask, HIDDEN, CHUNK, CHUNKS if HOLD else 0)
    weights = load_chunks(weight_ptr, columns, True, HIDDEN, CHUNK, AHEAD)
    biases = load_chunks(bias_ptr, columns, True, HIDDEN, CHUNK, AHEAD)
    if not LATE:
        launch_dependents(PDL)
    sums = ()
    for i in tl.static_range(CHUNKS):
        x = chunk_of(values, x_ptr, columns, row_mask, i, HIDDEN, CHUNK)
        sums += (vector_sums(x.to(ACC), CHUNK, VEC),)
    mean = along_rows(row_mean(sums, HIDDEN, CHUNKS_2))
    if not HOLD:
        tl.debug_barrier()  # else the compiler would keep the row rather than read it again, and run out of registers
    squares = ()
    for i in tl.static_range(CHUNKS):
        deviation = chunk_of(values, x_ptr, columns, row_mask, i, HIDDEN, CHUNK).to(ACC) - mean
        if (i + 1) * CHUNK > HIDDEN:
            deviation = tl.where(i * CHUNK + columns < HIDDEN, deviation, 0.0)
        squares += (vector_sums(deviation * deviation, CHUNK, VEC),)
    rstd = along_rows(row_rstd(squares, eps, HIDDEN, CHUNKS_2))
    if LATE:
        launch_dependents(PDL)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=row < num_rows)
        tl.store(rstd_ptr + row, rstd, mask=row < num_rows)
    if not HOLD:
        tl.debug_barrier()
    for i in tl.static_range(CHUNKS):
        at = i * CHUNK + columns
        y = (chunk_of(values, x_ptr, columns, row_mask, i, HIDDEN, CHUNK).to(ACC) - mean) * rstd
        if weight_ptr is not None:
            y = y * chunk_of(weights, weight_ptr, columns, True, i, HIDDEN, CHUNK).to(ACC)
        if bias_ptr is not None:
            y = y + chunk_of(biases, bias_ptr, columns, True, i, HIDDEN, CHUNK).to(ACC)
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=(at < HIDDEN) & row_mask)


_KERNEL = CachedKernel(_layer_norm_kernel)


def launch(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    eps: float,
    variant: RowVariant | None = None,
) -> None:
    """Run the kernel; ``out`` is new and packed, and so are ``mean`` and ``rstd`` [...] in fp32, or None both.

    ``variant`` is the plan's for the number of rows unless it is given: the bits are the same.
    """
    if x.numel() == 0:
        return
    plan = row_plan(x.shape[-1], x.dtype, "layer_norm")
    rows = address_rows(plan, (x,), ())
    variant = variant or plan.variant(rows.num_rows)
    flat = rows.num_inner == 1
    _KERNEL(
        (plan, variant, weight is None, bias is None, mean is None, flat),
        -(-rows.num_rows // plan.rows),
        x,
        (
            *rows.tensors, readable(weight, 1), readable(bias, 1), out, mean, rstd,
            *rows.strides, rows.num_rows, rows.num_inner, eps,
        ),
        (*plan.constants(variant), flat),
        variant.warps,
    )  # fmt: skip


def _validate(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> None:
    op = "layer_norm"
    check_rows(op, x)
    check_parameter(op, "weight", weight, x)
    check_parameter(op, "bias", bias, x)
    check_positive(op, "eps", eps)


Normalised = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]  # out, and [...] mean and rstd


def _normalise_cpu(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, statistics: bool
) -> Normalised:
    """In float64 around two exact sums; statistics are rounded to x's dtype, as torch has them on CPUs."""
    _validate(x, weight, bias, eps)
    wide = x.double()
    mean = _exact.exact_sum(wide) / x.shape[-1]
    centred = wide - mean.unsqueeze(-1)
    rstd = 1.0 / (_exact.exact_sum(centred * centred) / x.shape[-1] + eps).sqrt()
    y = centred * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * weight.double()
    if bias is not None:
        y = y + bias.double()
    out = _exact.rounded_to(y, x.dtype).contiguous()
    if not statistics:
        return out, None, None
    return out, _exact.rounded_to(mean, x.dtype), _exact.rounded_to(rstd, x.dtype)


def _normalise_cuda(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, statistics: bool
) -> Normalised:
    """By the kernel; statistics are fp32 for every dtype, as torch has them on GPUs."""
    _validate(x, weight, bias, eps)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = rstd = None
    if statistics:
        mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    launch(x, weight, bias, out, mean, rstd, eps)
    return out, mean, rstd


def _fake(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    _validate(x, weight, bias, eps)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_layer_norm = register_op(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    cpu=lambda x, weight, bias, eps: _normalise_cpu(x, weight, bias, eps, statistics=False)[0],
    cuda=lambda x, weight, bias, eps: _normalise_cuda(x, weight, bias, eps, statistics=False)[0],
    fake=_fake,
)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """Normalise ``x`` to mean 0 and variance 1 over its last axis, then scale and shift.

    Args:
        x: [..., hidden_size], fp32, fp16 or bf16, any strides.
        weight: [hidden_size] of x's dtype, or None for none.
        bias: [hidden_size] of x's dtype, or None for none.
        eps: added to the variance, which is that of the row, not an estimate; finite, not negative.

    Returns:
        A new contiguous tensor of x's shape and dtype. A row whose elements are all the same may be left with the
        rounding error of its mean, over sqrt(eps), in place of zeros.

    Invariance: each row's bits depend on the row, weight, bias and eps alone; see the module docstring.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: before anything is written.
        UnsupportedError: autograd would record the call.

    Source: Ba, Kiros and Hinton, 2016; ``torch.nn.functional.layer_norm``.
    """
    require_no_grad("layer_norm", x, weight, bias)
    result: torch.Tensor = _layer_norm(x, weight, bias, eps)
    return result


def _aten(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> Normalised:
    """``aten::native_layer_norm``, what F.layer_norm becomes: over several axes, and with what its backward needs."""
    axes, shape = len(normalized_shape), tuple(normalized_shape)
    if axes == 0 or x.shape[-axes:] != shape:
        raise ShapeError(f"layer_norm: x has shape {tuple(x.shape)}, want its last axes to be normalized_shape {shape}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != shape:
            raise ShapeError(f"layer_norm: {name} has shape {tuple(parameter.shape)}, want normalized_shape {shape}")
    normalise = _normalise_cuda if x.is_cuda else _normalise_cpu
    flat_weight, flat_bias = (None if t is None else t.flatten() for t in (weight, bias))
    out, *statistics = normalise(x.flatten(-axes), flat_weight, flat_bias, eps, statistics=True)
    mean, rstd = (None if t is None else t[(..., *[None] * axes)] for t in statistics)
    return out.view(x.shape), mean, rstd


def _sample(num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    return {"x": randn(num_tokens, 4096), "weight": randn(4096) * 0.1 + 1.0, "bias": randn(4096) * 0.1, "eps": 1e-5}


register_spec(
    OpSpec(
        "layer_norm",
        layer_norm,
        layer_norm_reference,
        _sample,
        batch_axes={"x": 0},
        tolerance="layer_norm",
        aten={"native_layer_norm": _aten},
    )
)
