"""What the ops on rows share: how rows are laid out, addressed and launched."""

from __future__ import annotations

import torch

from ..errors import ArgumentError, DtypeError
from ._library import FLOAT_DTYPES, check_dtype
from ._triton import triton

__all__ = ["block_and_warps", "cast_first", "normalise_dim", "packed", "vector_width"]

MIN_BLOCK = 32  # one warp; narrower rows are masked
MAX_BLOCK = 8192  # elements of a row in registers at a time; wider rows are walked in blocks
# (widest BLOCK, warps): the launch is a function of the row's width alone
NUM_WARPS = ((512, 1), (1024, 2), (2048, 4), (4096, 8), (MAX_BLOCK, 16))


def block_and_warps(width: int) -> tuple[int, int]:
    """BLOCK and num_warps for rows of ``width`` elements."""
    block = min(max(triton.next_power_of_2(width), MIN_BLOCK), MAX_BLOCK)
    return block, next(warps for widest, warps in NUM_WARPS if block <= widest)


def vector_width(rows: torch.Tensor) -> int:
    """Elements in 16 bytes if they divide the row, else 1: what a kernel may assume of a packed row's start."""
    width = 16 // rows.element_size()
    return width if rows.shape[-1] % width == 0 else 1


def packed(t: torch.Tensor) -> torch.Tensor:
    """``t`` contiguous with a 16-byte aligned base, copied if it is not, so that no launch sees another alignment."""
    if t.is_contiguous() and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def normalise_dim(op: str, dim: int, x: torch.Tensor) -> int:
    """``dim`` counted from the front; ArgumentError if ``x`` has no such axis. A scalar counts as one axis."""
    axes = max(x.dim(), 1)
    if not -axes <= dim < axes:
        raise ArgumentError(f"{op}: dim is {dim}, want one of {-axes} to {axes - 1} for x of shape {tuple(x.shape)}")
    return dim % axes


def cast_first(op: str, x: torch.Tensor, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.dtype]:
    """``x`` as the op has to read it, and the output dtype.

    A cast to float32 is exact and left to the op, which computes in float32 or wider; any other is made here.
    """
    check_dtype(op, "x", x)
    if dtype is None:
        return x, x.dtype
    if dtype not in FLOAT_DTYPES:
        raise DtypeError(f"{op}: dtype is {dtype}, want one of {', '.join(map(str, FLOAT_DTYPES))}")
    return (x if dtype == torch.float32 else x.to(dtype)), dtype


def as_rows(t: torch.Tensor) -> torch.Tensor:
    """``t`` [..., hidden] as [outer, inner, hidden] without a copy; RuntimeError if its strides do not allow it."""
    if t.dim() <= 2:
        return t.view(-1, t.shape[-1]).unsqueeze(1) if t.dim() == 1 else t.unsqueeze(1)
    return t if t.dim() == 3 else t.view(-1, *t.shape[-2:])


def row_strides(t: torch.Tensor | None) -> tuple[int, int]:
    """Outer and inner stride in elements; 0 along an axis of one row."""
    if t is None:
        return 0, 0
    rows = as_rows(t)
    return tuple(step if size > 1 else 0 for size, step in zip(rows.shape[:2], rows.stride()[:2], strict=True))  # type: ignore[return-value]


def addressable(t: torch.Tensor, vec: int) -> bool:
    """Whether the kernel can address ``t``: unit stride, 16-byte base, row strides in units of ``vec`` elements."""
    if t.is_contiguous() and t.data_ptr() % 16 == 0:
        return True
    if t.data_ptr() % 16 or (t.stride(-1) != 1 and t.shape[-1] > 1):
        return False
    try:
        return all(step % vec == 0 for step in row_strides(t))
    except RuntimeError:
        return False


def readable(t: torch.Tensor | None, vec: int) -> torch.Tensor | None:
    return t if t is None or addressable(t, vec) else t.clone(memory_format=torch.contiguous_format)


def writable(t: torch.Tensor | None, vec: int) -> torch.Tensor | None:
    return t if t is None or addressable(t, vec) else torch.empty_like(t, memory_format=torch.contiguous_format)
