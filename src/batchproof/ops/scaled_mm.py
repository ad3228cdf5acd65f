"""Products of fp8 matrices with their scales, whose bits do not depend on the number of rows.

    out[m, n] = (sum over k of a[m, k] * b[k, n]) * scale_b[n] * scale_a[m] + bias[n]         one scale a row and column
    out[m, n] = sum over j of (sum over k of block j) * (scale_a[m, j] * scale_b[j, n / 128]) + bias[n]   blocks of 128

Invariance: K is cut in groups of 128. The tensor core adds a group up in ascending k, starting from zero; the fp32 sums
of the groups are added in ascending order, in one program, and scaled, biased and rounded element by element. None of
it depends on M, which chooses the tile only. On Hopper every tile runs on wgmma, whose bits are those of any other tile
and either order of the operands (measured; tests/gpu); mma.sync gives others, so no tile is small enough to compile to
it, and operands that wgmma does not take, because k is not their fastest axis, are copied. Where the TMA can read the
operands, the kernel of ``_hopper_product`` does the same sums. On other GPUs there is one tile for every M. Adding up
groups in fp32 also is more accurate than the tensor core alone, which keeps 14 bits of a sum. On the CPU a sum is exact
in float64 (see ``_exact``) and rounded once.

Source: the groups are those of DeepSeek-V3 (arXiv 2412.19437, section 3.3.2); the order of the scales is that of vLLM's
CUTLASS epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import DtypeError, ShapeError
from ..registry import OpSpec, register_spec
from . import _exact, linear
from ._hopper import is_hopper, product
from ._library import FLOAT_DTYPES, check_dtype, register_op, require_no_grad
from ._quantize import quantize_per_token_reference
from ._triton import device_guard, tl, triton
from .linear import add_pieces, check_pieces

__all__ = ["scaled_mm", "scaled_mm_reference", "split_scales", "validate"]

FP8 = torch.float8_e4m3fn
GROUP = 128  # of k that the tensor core adds up by itself; also the side of a block of scales


@dataclass(frozen=True)
class Tile(linear.Tile):
    """A tile of ``linear``'s, and whether operands change places.

    ``swap`` puts the weight on wgmma's side of 64 rows and the tokens on its other, which may be as few as 16.
    """

    swap: bool = False


# By the number of rows: (most rows, tile). A block of scales is as wide as k may be in one step.
HOPPER_TILES = (
    (16, Tile(16, 64, 256, 4, 5, swap=True)),
    (32, Tile(32, 64, 256, 4, 4, swap=True)),
    (64, Tile(64, 64, 128, 4, 5, swap=True)),
    (None, Tile(128, 128, 128, 8, 4)),
)
HOPPER_BLOCK_TILES = tuple((most, replace(tile, k=GROUP)) for most, tile in HOPPER_TILES)
GENERIC_TILES = ((None, Tile(32, 64, 128, 4, 3)),)


def scaled_mm_reference(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:  # fmt: skip
    """The same in float64, rounded once; see ``scaled_mm``."""
    rows, columns = split_scales(a, b, scale_a, scale_b)
    columns = _of_every_column(columns, b.shape[1])
    out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64, device=a.device)
    for j, ks in _groups_in(slice(0, a.shape[1]), rows.shape[1]):
        product = a[:, ks].double() @ b[ks].double()
        out += product * (rows[:, j : j + 1].double() * columns[j].double())
    return (out if bias is None else out + bias.double()).to(out_dtype)


@triton.jit
def _sum_of_pieces(
    a_ptrs, b_ptrs, scale_a_ptrs, scale_b_ptrs, row_mask, column_mask, span, scale_a_group, scale_b_group,
    FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCKS: tl.constexpr, SWAP: tl.constexpr, GROUP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile's fp32 sum over ``COUNT`` pieces of ``span`` of k from piece ``FIRST`` on: halves of them, then those two.

    ``a_ptrs`` [BLOCK_M, 1] and ``b_ptrs`` [BLOCK_N, 1] are where k is 0, the pointers of scales where the group is 0.
    """
    if COUNT > 1:
        low = _sum_of_pieces(
            a_ptrs, b_ptrs, scale_a_ptrs, scale_b_ptrs, row_mask, column_mask, span, scale_a_group, scale_b_group,
            FIRST, COUNT // 2, BLOCKS, SWAP, GROUP_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        high = _sum_of_pieces(
            a_ptrs, b_ptrs, scale_a_ptrs, scale_b_ptrs, row_mask, column_mask, span, scale_a_group, scale_b_group,
            FIRST + COUNT // 2, COUNT // 2, BLOCKS, SWAP, GROUP_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        total = low + high
    else:
        ks = tl.arange(0, BLOCK_K)
        a_ptrs += FIRST * span + ks[None, :]
        b_ptrs += FIRST * span + ks[None, :]
        total = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, span, BLOCK_K):
            k_mask = ks[None, :] < span - start
            a = tl.load(a_ptrs + start, mask=row_mask[:, None] & k_mask, other=0.0)
            b = tl.load(b_ptrs + start, mask=column_mask[:, None] & k_mask, other=0.0)
            if BLOCKS:
                group = (FIRST * span + start) // GROUP_K
                scale_a = tl.load(scale_a_ptrs + group * scale_a_group, mask=row_mask, other=0.0)
                scale_b = tl.load(scale_b_ptrs + group * scale_b_group, mask=column_mask, other=0.0)
                if SWAP:
                    scale = scale_b[:, None] * scale_a[None, :]
                    total = tl.fma(tl.dot(b, a.T, max_num_imprecise_acc=GROUP_K), scale, total)
                else:
                    scale = scale_a[:, None] * scale_b[None, :]
                    total = tl.fma(tl.dot(a, b.T, max_num_imprecise_acc=GROUP_K), scale, total)
            elif SWAP:
                total = tl.dot(b, a.T, total, max_num_imprecise_acc=GROUP_K)
            else:
                total = tl.dot(a, b.T, total, max_num_imprecise_acc=GROUP_K)
    return total


@triton.jit(do_not_specialize=["M"])
def _scaled_mm_kernel(
    a_ptr, b_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, out_ptr, M, N, span, a_row, b_column,
    scale_a_row, scale_a_group, scale_b_group, scale_b_column,
    HAS_BIAS: tl.constexpr, PIECES: tl.constexpr, BLOCKS: tl.constexpr, SWAP: tl.constexpr, GROUP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_N] tile, held as its transpose if SWAP. k is the fastest axis of both operands."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # int64: products pass 2**31
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = rows < M, columns < N
    scale_a_ptrs = scale_a_ptr + rows * scale_a_row
    scale_b_ptrs = scale_b_ptr + (columns // GROUP_K if BLOCKS else columns) * scale_b_column
    total = _sum_of_pieces(
        a_ptr + rows[:, None] * a_row, b_ptr + columns[:, None] * b_column, scale_a_ptrs, scale_b_ptrs,
        row_mask, column_mask, span, scale_a_group, scale_b_group,
        0, PIECES, BLOCKS, SWAP, GROUP_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if SWAP:
        total = total.T
    if not BLOCKS:
        scale_b = tl.load(scale_b_ptrs, mask=column_mask, other=0.0)
        scale_a = tl.load(scale_a_ptrs, mask=row_mask, other=0.0)
        total = total * scale_b[None, :] * scale_a[:, None]
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + rows[:, None] * N + columns[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def tiles_for(device: torch.device, blocks: bool) -> tuple[tuple[int | None, Tile], ...]:
    """The tiles that may be chosen by M on this GPU: several only where they are known to agree."""
    if is_hopper(device):
        return HOPPER_BLOCK_TILES if blocks else HOPPER_TILES
    return GENERIC_TILES


def launch(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, bias: torch.Tensor | None,
    out_dtype: torch.dtype, tile: Tile | None = None, pieces: int = 1,
) -> torch.Tensor:  # fmt: skip
    """``scaled_mm`` by the kernel: on a GPU, or on CPU tensors in Triton's interpreter."""
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty((m, n), dtype=out_dtype, device=a.device)
    if out.numel() == 0:
        return out
    rows, columns = split_scales(a, b, scale_a, scale_b)
    blocks = rows.shape[1] > 1 or columns.shape[1] != n
    a, b = (t if t.stride(1) == 1 else t.contiguous() for t in (a, b.t()))
    if tile is None and pieces == 1 and product(a, b, out, rows, columns, bias, blocks):
        return out
    if tile is None:
        tile = next(t for most, t in tiles_for(a.device, blocks) if most is None or m <= most)
    grid = (triton.cdiv(m, tile.m), triton.cdiv(n, tile.n))
    with device_guard(a):
        _scaled_mm_kernel[grid](
            a, b, rows, columns, bias, out, m, n, k // pieces, a.stride(0), b.stride(0),
            *rows.stride(), *columns.stride(),
            HAS_BIAS=bias is not None, PIECES=pieces, BLOCKS=blocks, SWAP=tile.swap, GROUP_K=GROUP,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _groups_in(ks: slice, scales: int) -> list[tuple[int, slice]]:
    """The groups of k of a piece that have a scale of their own, with its number."""
    if scales == 1:
        return [(0, ks)]
    return [(first // GROUP, slice(first, min(first + GROUP, ks.stop))) for first in range(ks.start, ks.stop, GROUP)]


def split_scales(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales as [M, groups] and [groups, N], or [groups, N / 128] for blocks, without a copy."""
    (m, k), n = a.shape, b.shape[1]
    groups, blocks = -(-k // GROUP), -(-n // GROUP)
    shapes = tuple(scale_a.shape), tuple(scale_b.shape)
    if shapes == ((m, groups), (groups, blocks)) and (groups > 1 or blocks > 1):
        return scale_a, scale_b
    rows = _expanded(scale_a, m, ((m,), (m, 1)))
    columns = _expanded(scale_b, n, ((n,), (1, n), (n, 1)))
    if rows is None or columns is None:
        raise ShapeError(
            f"scaled_mm: scale_a has shape {shapes[0]} and scale_b {shapes[1]}, want one scale or ({m}, 1), and one "
            f"or (1, {n}), or for blocks of {GROUP} ({m}, {groups}) and ({groups}, {blocks})"
        )
    return rows.unsqueeze(1), columns.unsqueeze(0)


def _of_every_column(scales: torch.Tensor, n: int) -> torch.Tensor:
    """Scales [groups, N] of [groups, N] or of blocks [groups, N / 128]."""
    return scales if scales.shape[1] == n else scales.repeat_interleave(GROUP, 1)[:, :n]


def _expanded(scale: torch.Tensor, size: int, shapes: tuple[tuple[int, ...], ...]) -> torch.Tensor | None:
    """A scale for every row or column, in one dimension; None if it has no such shape."""
    if scale.numel() == 1:
        return scale.reshape(1).expand(size)
    return scale.reshape(size) if tuple(scale.shape) in shapes else None


def validate(
    op: str, a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, bias: torch.Tensor | None,
    out_dtype: torch.dtype, pieces: int,
) -> None:  # fmt: skip
    """DtypeError, ShapeError or ArgumentError unless ``op`` can multiply these."""
    for name, tensor, wanted in (("a", a, FP8), ("b", b, FP8), ("scale_a", scale_a, None), ("scale_b", scale_b, None)):
        check_dtype(op, name, tensor, (wanted or torch.float32,))
    if out_dtype not in FLOAT_DTYPES:
        raise DtypeError(f"{op}: out_dtype is {out_dtype}, want one of {', '.join(map(str, FLOAT_DTYPES))}")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ShapeError(f"{op}: shapes {tuple(a.shape)} and {tuple(b.shape)}, want [M, K] and [K, N]")
    split_scales(a, b, scale_a, scale_b)
    check_pieces(op, pieces, a.shape[1], GROUP)
    if bias is not None:
        check_dtype(op, "bias", bias, (out_dtype,))
        if tuple(bias.shape) != (b.shape[1],):
            raise ShapeError(f"{op}: bias has shape {tuple(bias.shape)}, want ({b.shape[1]},)")


def _scaled_mm_cpu(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, bias: torch.Tensor | None,
    out_dtype: torch.dtype, pieces: int = 1,
) -> torch.Tensor:  # fmt: skip
    validate("scaled_mm", a, b, scale_a, scale_b, bias, out_dtype, pieces)
    if a.shape[1] == 0 or b.numel() == 0:
        return scaled_mm_reference(a, b, scale_a, scale_b, bias, out_dtype)
    rows, columns = split_scales(a, b, scale_a, scale_b)
    columns = _of_every_column(columns, b.shape[1])
    left, right = a.half(), b.half()  # which hold every fp8 number
    sums = []
    for ks in _equal(a.shape[1], pieces):
        total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64)
        for j, group in _groups_in(ks, rows.shape[1]):
            scale = rows[:, j : j + 1].double() * columns[j].double() if rows.shape[1] > 1 else 1.0
            total += _exact.exact_matmul(left[:, group], right[group]) * scale
        sums.append(total)
    if pieces > 1:  # as on a GPU: a tree of fp32 sums
        sums = [add_pieces([_exact.rounded_to(total, torch.float32) for total in sums]).double()]
    out = sums[0] if rows.shape[1] > 1 else sums[0] * (rows.double() * columns.double())
    return _exact.rounded_to(out if bias is None else out + bias.double(), out_dtype)


def _equal(k: int, pieces: int) -> list[slice]:
    return [slice(k // pieces * i, k // pieces * (i + 1)) for i in range(pieces)]


def _scaled_mm_cuda(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, bias: torch.Tensor | None,
    out_dtype: torch.dtype, pieces: int = 1,
) -> torch.Tensor:  # fmt: skip
    validate("scaled_mm", a, b, scale_a, scale_b, bias, out_dtype, pieces)
    return launch(a, b, scale_a, scale_b, None if bias is None else bias.contiguous(), out_dtype, pieces=pieces)


def _scaled_mm_fake(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, bias: torch.Tensor | None,
    out_dtype: torch.dtype, pieces: int = 1,
) -> torch.Tensor:  # fmt: skip
    validate("scaled_mm", a, b, scale_a, scale_b, bias, out_dtype, pieces)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


_scaled_mm = register_op(
    "scaled_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, ScalarType out_dtype, "
    "int pieces=1) -> Tensor",
    cpu=_scaled_mm_cpu, cuda=_scaled_mm_cuda, fake=_scaled_mm_fake,
)  # fmt: skip


def scaled_mm(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16, *, pieces: int = 1,
) -> torch.Tensor:  # fmt: skip
    """``a @ b`` of fp8 matrices, times their scales, plus a bias.

    Args:
        a: [M, K], float8_e4m3fn. Fastest if its rows are contiguous; other layouts are copied.
        b: [K, N], float8_e4m3fn. Fastest as the transpose of a contiguous weight [N, K]; others are copied.
        scale_a: fp32: one scale; one a row, [M, 1] or [M]; or one for 128 of k in a row, [M, ceil(K / 128)].
        scale_b: fp32: one scale; one a column, [1, N], [N, 1] or [N]; or, with the last of ``scale_a``'s, one for
            blocks of 128 by 128, [ceil(K / 128), ceil(N / 128)].
        bias: [N] of ``out_dtype``, or None.
        out_dtype: bf16, fp16 or fp32.
        pieces: 1, 2, 4 or 8: equal pieces of K, multiples of 128, whose fp32 sums are added by a tree, before they are
            scaled where a scale is a row's or a column's; see ``linear``.

    Returns:
        [M, N] of ``out_dtype``, contiguous: scaled and biased in fp32 (exact on the CPU), rounded once.

    Invariance: a row's bits depend on its row of ``a`` and ``scale_a``, and on ``b``, ``scale_b`` and ``bias`` alone. A
    scale of one element must not be made of the batch, or it does.

    Raises:
        ShapeError, DtypeError: before anything is computed.
        ArgumentError: K cannot be cut so.
        UnsupportedError: autograd would record the call.
    """
    require_no_grad("scaled_mm", scale_a, scale_b, bias)
    result: torch.Tensor = _scaled_mm(a, b, scale_a, scale_b, bias, out_dtype, pieces)
    return result


def _sample(num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    k, n = 1024, 384
    a, scale_a = quantize_per_token_reference(torch.randn(num_tokens, k, generator=generator, device=device))
    weight, scale_b = quantize_per_token_reference(torch.randn(n, k, generator=generator, device=device) * k**-0.5)
    return {"a": a, "b": weight.t(), "scale_a": scale_a, "scale_b": scale_b.t(), "out_dtype": dtype}


register_spec(
    OpSpec(
        "scaled_mm",
        scaled_mm,
        scaled_mm_reference,
        _sample,
        batch_axes={"a": 0, "scale_a": 0},
        tolerance="scaled_mm",
    )
)
