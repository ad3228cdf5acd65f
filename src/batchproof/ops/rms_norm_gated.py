"""RMSNorm with a gate, before it or after it, batch-invariant by construction: the norm of state-space layers.

    norm before gate    out = (rms_norm(x, weight) * silu(gate)).to(dtype)          Qwen3-Next
    gate before norm    out = rms_norm(x * silu(gate)).to(dtype) * weight           Mamba2

A row may be normalised as a whole or in groups of ``group_size`` columns, each on its own.

Roundings are those of Hugging Face's models in 16 bits. Norm before gate, as in Qwen3-Next, Qwen3.5 and OLMo-Hybrid:
the normalised value is rounded, its product with the weight is, and the product of that with silu in fp32. Gate before
norm, as in Mamba2, Bamba, Granite-MoE-hybrid, Zamba2 and Nemotron-H, the last two in groups: the gated value stays in
fp32, the normalised one is rounded, and its product with the weight is. Falcon-H1, which has both orders, multiplies
in fp32 and rounds once at the end; it is not followed. fp32 is computed in fp64.

Invariance: on a GPU the mean square is a sum by the tree of ``_row_tree``, which (group_size, dtype) alone decide. The
number of rows may choose the launch, and all launches of a width have that tree. silu is elementwise, by the one code
path of ``activation``; contraction of multiply and add into FMA is off. On the CPU the sum is exact, so it has no order
(see ``_exact``), and silu is made of IEEE operations.

Source: Zhang and Sennrich, 2019; Dao and Gu, Transformers are SSMs, 2024; the models above in transformers 5.17.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ArgumentError, ShapeError
from ..registry import OpSpec, register_spec
from . import _exact
from ._library import check_like, check_parameter, check_positive, check_rows, register_op, require_no_grad
from ._row_launch import CachedKernel, RowVariant, address_rows, row_plan
from ._row_tree import (
    along_rows,
    chunk_of,
    launch_dependents,
    load_chunks,
    row_rstd,
    rows_of_program,
    vector_sums,
    wait_for_inputs,
)
from ._rows import readable
from ._triton import tl, triton
from .activation import times_sigmoid, times_sigmoid_cpu

__all__ = ["rms_norm_gated", "rms_norm_gated_reference"]


def rms_norm_gated_reference(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm_before_gate: bool,
    group_size: int | None = None,
) -> torch.Tensor:
    """The formula in float64, rounded to the dtype where the models round."""
    silu = gate.double() * torch.sigmoid(gate.double())
    wide = x.double() if norm_before_gate else x.double() * silu
    groups: torch.Tensor = wide.unflatten(-1, (-1, group_size or x.shape[-1]))
    y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2).to(x.dtype)
    if weight is not None:
        y = (y.double() * weight.double()).to(x.dtype)
    return (y.double() * silu).to(x.dtype) if norm_before_gate else y


@triton.jit(do_not_specialize=["x_outer", "x_inner", "gate_outer", "gate_inner", "num_rows", "num_inner", "eps"])
def _rms_norm_gated_kernel(
    x_ptr, gate_ptr, weight_ptr, out_ptr,
    x_outer: tl.int64, x_inner: tl.int64, gate_outer: tl.int64, gate_inner: tl.int64,
    num_rows: tl.int32, num_inner: tl.int32, eps: tl.float64,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_2: tl.constexpr,
    VEC: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    AHEAD: tl.constexpr, HOLD: tl.constexpr, LATE: tl.constexpr,
    NORM_FIRST: tl.constexpr, GROUPS: tl.constexpr, FLAT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS groups of HIDDEN columns, GROUPS of them a row of x; addressed as ``_rms_norm_kernel`` does; packed out."""
    row, row_mask, outer, inner = rows_of_program(num_rows, num_inner, ROWS, FLAT)
    # Read for every row, the weight has the layout that rows have; read once, it would impose its own on them
    columns = tl.broadcast_to(tl.arange(0, CHUNK)[None, :], [ROWS, CHUNK])
    x_ptr += (outer * x_outer + inner * x_inner) * ALIGN
    gate_ptr += (outer * gate_outer + inner * gate_inner) * ALIGN
    out_ptr += row.to(tl.int64) * HIDDEN
    dtype = out_ptr.dtype.element_ty
    if GROUPS > 1 and weight_ptr is not None:
        weight_ptr += row % GROUPS * HIDDEN

    wait_for_inputs(PDL)
    loaded = load_chunks(x_ptr, columns, row_mask, HIDDEN, CHUNK, AHEAD)
    gates = load_chunks(gate_ptr, columns, row_mask, HIDDEN, CHUNK, AHEAD)
    weights = load_chunks(weight_ptr, columns, True, HIDDEN, CHUNK, AHEAD)
    if not LATE:
        launch_dependents(PDL)
    values = ()
    parts = ()
    for i in tl.static_range(CHUNKS):
        value = chunk_of(loaded, x_ptr, columns, row_mask, i, HIDDEN, CHUNK)
        if not NORM_FIRST:
            gate = chunk_of(gates, gate_ptr, columns, row_mask, i, HIDDEN, CHUNK).to(ACC)
            value = value.to(ACC) * times_sigmoid(gate, gate)
        if HOLD:
            values += (value,)
        wide = value.to(ACC)
        parts += (vector_sums(wide * wide, CHUNK, VEC),)
    rstd = along_rows(row_rstd(parts, eps, HIDDEN, CHUNKS_2))
    if LATE:  # no earlier: between loads and sums it makes the compiler take twice the registers
        launch_dependents(PDL)
    for i in tl.static_range(CHUNKS):
        at = i * CHUNK + columns
        wide = chunk_of(values, x_ptr, columns, row_mask, i, HIDDEN, CHUNK).to(ACC)
        if NORM_FIRST or not HOLD:
            gate = chunk_of(gates, gate_ptr, columns, row_mask, i, HIDDEN, CHUNK).to(ACC)
            silu = times_sigmoid(gate, gate)
            if not NORM_FIRST:
                wide = wide * silu
        y = (wide * rstd).to(dtype)
        if weight_ptr is not None:
            weight = chunk_of(weights, weight_ptr, columns, True, i, HIDDEN, CHUNK)
            y = (y.to(ACC) * weight.to(ACC)).to(dtype)
        if NORM_FIRST:
            y = (y.to(ACC) * silu).to(dtype)
        tl.store(out_ptr + at, y, mask=(at < HIDDEN) & row_mask)


_KERNEL = CachedKernel(_rms_norm_gated_kernel)


def launch(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    out: torch.Tensor,
    eps: float,
    norm_before_gate: bool,
    group_size: int | None,
    variant: RowVariant | None = None,
) -> None:
    """Run the kernel on tensors of one shape, x and gate of any strides; ``out`` is new and packed.

    ``variant`` is the plan's for the number of groups unless it is given: the bits are the same.
    """
    if x.numel() == 0:
        return
    hidden_size = x.shape[-1]
    width = group_size or hidden_size
    groups = hidden_size // width
    if groups > 1:
        x, gate = (t.unflatten(-1, (groups, width)) for t in (x, gate))
    plan = row_plan(width, x.dtype, "gated")
    rows = address_rows(plan, (x, gate), ())
    variant = variant or plan.variant(rows.num_rows)
    flat = rows.num_inner == 1
    _KERNEL(
        (plan, variant, weight is None, norm_before_gate, groups, flat),
        -(-rows.num_rows // plan.rows),
        x,
        (*rows.tensors, readable(weight, 1), out, *rows.strides, rows.num_rows, rows.num_inner, eps),
        (*plan.constants(variant), norm_before_gate, groups, flat),
        variant.warps,
    )


def _validate(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor | None, eps: float, group_size: int | None
) -> None:
    op = "rms_norm_gated"
    check_rows(op, x)
    check_like(op, "gate", gate, x)
    check_parameter(op, "weight", weight, x)
    if group_size is not None and group_size < 1:
        raise ArgumentError(f"{op}: group_size is {group_size}, want None or at least 1")
    if group_size is not None and x.shape[-1] % group_size:
        raise ShapeError(f"{op}: x has shape {tuple(x.shape)}, want a hidden_size that group_size {group_size} divides")
    check_positive(op, "eps", eps)


def _rms_norm_gated_cpu(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    norm_before_gate: bool,
    group_size: int | None,
) -> torch.Tensor:
    """silu, and x times it, as the kernel has them: in fp32 for 16-bit dtypes; the rest in float64."""
    _validate(x, gate, weight, eps, group_size)
    gate = gate.float() if x.element_size() == 2 else gate.double()
    silu = times_sigmoid_cpu(gate, gate)
    value = x if norm_before_gate else x.to(silu.dtype) * silu
    groups = value.double().unflatten(-1, (-1, group_size or x.shape[-1]))
    mean = _exact.exact_sum(groups * groups).unsqueeze(-1) / groups.shape[-1]
    y = (groups * (1.0 / (mean + eps).sqrt())).flatten(-2)
    if weight is not None:
        y = y.to(x.dtype).double() * weight.double()
    if norm_before_gate:
        y = y.to(x.dtype).double() * silu.double()
    return _exact.rounded_to(y, x.dtype).contiguous()


def _rms_norm_gated_cuda(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    norm_before_gate: bool,
    group_size: int | None,
) -> torch.Tensor:
    _validate(x, gate, weight, eps, group_size)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch(x, gate, weight, out, eps, norm_before_gate, group_size)
    return out


def _rms_norm_gated_fake(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    norm_before_gate: bool,
    group_size: int | None,
) -> torch.Tensor:
    _validate(x, gate, weight, eps, group_size)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_rms_norm_gated = register_op(
    "rms_norm_gated(Tensor x, Tensor gate, Tensor? weight, float eps, bool norm_before_gate, int? group_size)"
    " -> Tensor",
    cpu=_rms_norm_gated_cpu, cuda=_rms_norm_gated_cuda, fake=_rms_norm_gated_fake,
)  # fmt: skip


def rms_norm_gated(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm_before_gate: bool,
    group_size: int | None = None,
) -> torch.Tensor:
    """``rms_norm(x, weight) * silu(gate)``, or ``rms_norm(x * silu(gate), weight)``.

    Args:
        x: [..., hidden_size], fp32, fp16 or bf16, any strides.
        gate: of x's shape and dtype, with strides of its own: both are usually columns of one projection.
        weight: [hidden_size] of x's dtype, or None for none.
        eps: added to the mean square; finite, not negative.
        norm_before_gate: normalise x and gate the result, as Qwen3-Next does; or gate x first, as Mamba2 does.
        group_size: columns that are normalised together; divides hidden_size. None for all of them.

    Returns:
        A new contiguous tensor of x's shape and dtype, with the roundings of the module docstring.

    Invariance: each row's bits depend on its x, its gate, weight, eps and the form alone; see the module docstring.

    Raises:
        ShapeError: tensors do not fit, or group_size does not divide hidden_size.
        DtypeError, DeviceError, ArgumentError: before anything is written.
        UnsupportedError: autograd would record the call.

    Source: Hugging Face's Qwen3NextRMSNormGated (norm before gate), MambaRMSNormGated and Zamba2RMSNormGated.
    """
    require_no_grad("rms_norm_gated", x, gate, weight)
    result: torch.Tensor = _rms_norm_gated(x, gate, weight, eps, norm_before_gate, group_size)
    return result


def _sample(num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    return {
        "x": randn(num_tokens, 4096),
        "gate": randn(num_tokens, 4096) * 2.0,
        "weight": randn(4096) * 0.1 + 1.0,
        "eps": 1e-6,
        "norm_before_gate": False,
    }


register_spec(
    OpSpec(
        "rms_norm_gated",
        rms_norm_gated,
        rms_norm_gated_reference,
        _sample,
        batch_axes={"x": 0, "gate": 0},
        tolerance="rms_norm_gated",
    )
)
