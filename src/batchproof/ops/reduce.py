"""Mean over any axes, batch-invariant by construction.

    mean(x) = sum(x) / n

Invariance: the reduced axes are brought last, in ascending order, and packed as rows of n elements. On a GPU one
program reduces one row: element by element over blocks of BLOCK columns, in ascending order, and then by the tree
that ``tl.sum`` compiles to for BLOCK elements and the warps of ``_rows.NUM_WARPS``, both functions of (n, dtype)
alone. Rows are packed from a 16-byte aligned base, n is not specialised on and contraction into FMA is off, so the
binary is a function of (n, dtype) as well. fp32 is accumulated in fp64, 16-bit types in fp32. On the CPU the sum is
exact within chunks of fixed size (see ``_exact``). One program a row is slow for a few very long rows, such as the
mean of a whole tensor; splitting those would be free to, but nothing in LLM inference asks for it.

Source: ``torch.mean``, whose CUDA kernel splits a row over blocks by the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import ArgumentError
from ..registry import OpSpec, register_spec
from . import _exact
from ._library import register_op, require_no_grad
from ._rows import block_and_warps, cast_first, normalise_dim, packed, vector_width
from ._triton import device_guard, tl, triton

__all__ = ["mean", "mean_reference"]


def mean_reference(
    x: torch.Tensor,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``x`` cast to ``dtype``, mean in float64, rounded once."""
    x = x if dtype is None else x.to(dtype)
    dims = [dim] if isinstance(dim, int) else list(dim or ())  # none named: all, here as in torch
    return x.double().mean(dims, keepdim).to(x.dtype)


@triton.jit(do_not_specialize=["num_vectors"])
def _mean_kernel(
    x_ptr, out_ptr, num_vectors: tl.int64, BLOCK: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """One packed row of num_vectors * VEC elements."""
    width = num_vectors * VEC
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * width
    sums = tl.zeros([BLOCK], dtype=ACC)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        sums += tl.load(x_ptr + columns, mask=columns < width, other=0.0).to(ACC)
    total = tl.sum(sums, axis=0)
    if tl.float64 == ACC:
        result = total / width.to(tl.float64)
    else:
        result = tl.div_rn(total, width.to(tl.float32))
    tl.store(out_ptr + row, result.to(out_ptr.dtype.element_ty))


def launch(rows: torch.Tensor, out: torch.Tensor) -> None:
    """Run the kernel on ``rows`` [num_rows, n], n at least 1; ``out`` [num_rows] is new."""
    if rows.numel() == 0:
        return
    rows = packed(rows)
    num_rows, width = rows.shape
    block, warps = block_and_warps(width)
    vec = vector_width(rows)
    with device_guard(rows):
        _mean_kernel[(num_rows,)](
            rows, out, width // vec,
            BLOCK=block, VEC=vec, ACC=tl.float64 if rows.dtype == torch.float32 else tl.float32,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def _mean_rows_cpu(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _exact.canonical_nan((_exact.exact_sum(rows.double()) / rows.shape[-1]).to(dtype))


def _mean_rows_cuda(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(rows.shape[:1], dtype=dtype, device=rows.device)
    launch(rows, out)
    return out


def _reduced(x: torch.Tensor, dim: Sequence[int] | None) -> list[int]:
    """The axes to reduce, ascending; all of them for None or (), as torch has it."""
    if not dim:
        return list(range(x.dim()))
    axes = sorted(normalise_dim("mean", d, x) for d in dim)
    if len(set(axes)) != len(axes):
        raise ArgumentError(f"mean: dim is {tuple(dim)}, want every axis at most once (x has {x.dim()} axes)")
    return axes if x.dim() else []


def _shape(x: torch.Tensor, reduced: list[int], keepdim: bool) -> list[int]:
    if keepdim:
        return [1 if axis in reduced else size for axis, size in enumerate(x.shape)]
    return [size for axis, size in enumerate(x.shape) if axis not in reduced]


def _run(
    x: torch.Tensor,
    dim: Sequence[int] | None,
    keepdim: bool,
    dtype: torch.dtype | None,
    rows_op: Callable[[torch.Tensor, torch.dtype], torch.Tensor],
) -> torch.Tensor:
    """Validate, bring the reduced axes last as rows [-1, n], run ``rows_op`` on them and shape what it gives."""
    x, dtype = cast_first("mean", x, dtype)
    reduced = _reduced(x, dim)
    shape = _shape(x, reduced, keepdim)
    if x.numel() == 0:  # nothing to reduce, or rows of nothing: 0 / 0
        return torch.full(shape, math.nan, dtype=dtype, device=x.device)
    kept = [axis for axis in range(x.dim()) if axis not in reduced]
    width = math.prod(x.shape[axis] for axis in reduced)
    return rows_op(x.permute(kept + reduced).reshape(-1, width), dtype).view(shape)


def _fake(x: torch.Tensor, dim: Sequence[int] | None, keepdim: bool, dtype: torch.dtype | None) -> torch.Tensor:
    _, dtype = cast_first("mean", x, dtype)
    return torch.empty(_shape(x, _reduced(x, dim), keepdim), dtype=dtype, device=x.device)


_mean = register_op(
    "mean(Tensor x, int[]? dim, bool keepdim, ScalarType? dtype) -> Tensor",
    cpu=lambda x, dim, keepdim, dtype: _run(x, dim, keepdim, dtype, _mean_rows_cpu),
    cuda=lambda x, dim, keepdim, dtype: _run(x, dim, keepdim, dtype, _mean_rows_cuda),
    fake=_fake,
)


def mean(
    x: torch.Tensor,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Mean of ``x`` over one axis, several or all, as ``torch.mean``.

    Args:
        x: any shape and strides, fp32, fp16 or bf16. Axes that are not the last ones are copied to be them.
        dim: an axis, a sequence of axes, or None (or an empty sequence) for all.
        keepdim: keep the reduced axes, with size 1.
        dtype: fp32, fp16 or bf16: x is cast to it first, and it is the output's. None for x's.

    Returns:
        A new contiguous tensor; NaN where the mean is of no elements. A zero mean is +0.

    Invariance: each output's bits depend on the elements it is the mean of, their order and the two dtypes alone,
    so a batch axis among the reduced ones is outside it; see the module docstring.

    Raises:
        ArgumentError: an axis of ``dim`` does not exist, or is named twice.
        DtypeError: x or ``dtype`` is something else than fp32, fp16 or bf16.
        UnsupportedError: autograd would record the call.

    Source: ``torch.mean``.
    """
    require_no_grad("mean", x)
    result: torch.Tensor = _mean(x, [dim] if isinstance(dim, int) else dim, keepdim, dtype)
    return result


def _aten(x: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``aten::mean``: over every axis."""
    return mean(x, dtype=dtype)


def _sample(num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    return {"x": torch.randn(num_tokens, 4096, generator=generator, device=device).to(dtype), "dim": -1}


register_spec(
    OpSpec(
        "mean",
        mean,
        mean_reference,
        _sample,
        batch_axes={"x": 0},
        tolerance="mean",
        aten={"mean": _aten, "mean.dim": mean},
    )
)
