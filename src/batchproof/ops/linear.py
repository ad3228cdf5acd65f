"""Matrix products whose bits do not depend on the number of rows: linear, mm, addmm, bmm, baddbmm.

    out[m, n] = (sum over k of a[m, k] * b[k, n]) * alpha + beta * bias[n], accumulated in fp32, rounded once

Invariance: every output element is accumulated by the tensor core in ascending k, from zero, in one program; K is
never split by M, and K past the end adds exact zeros. On Hopper the bits depend neither on the tile nor on the
instruction (mma.sync or wgmma) nor on the operand order (measured, and tested in tests/gpu), so M may choose the
tile there, and the kernel of ``_hopper_product`` does the same sums where the TMA can read the operands; on other GPUs
there is one tile for every M. fp32 is computed in IEEE fp32 (no tf32), with one tile.
On the CPU the sum is exact in float64, so it has no order (see ``_exact``), and is rounded once.

With ``pieces`` K is cut in so many equal pieces, whose fp32 sums are added by a binary tree: (0 + 1) + (2 + 3) and so
on. A subtree is the product of a part of K: so 2, 4 or 8 ranks that hold a part each, and whose fp32 results are added
by the same tree (``add_pieces``), have the bits of one rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ArgumentError, ShapeError, UnsupportedError
from ..registry import OpSpec, register_spec
from . import _exact
from ._hopper import is_hopper, product
from ._library import check_dtype, check_same, register_op, require_no_grad
from ._packed_weights import packed_transpose
from ._triton import device_guard, tl, triton

__all__ = ["add_pieces", "addmm", "baddbmm", "bmm", "linear", "linear_reference", "mm"]


@dataclass(frozen=True)
class Tile:
    """The launch configuration of one program: tile sizes, warps, pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# By the number of rows: (most rows, tile). The bits are those of any other tile of the same list.
HOPPER_TILES = ((16, Tile(16, 64, 128, 4, 4)), (64, Tile(64, 64, 64, 4, 4)), (None, Tile(128, 128, 64, 8, 3)))
GENERIC_TILES = ((None, Tile(32, 64, 32, 4, 3)),)
FP32_TILES = ((None, Tile(32, 32, 32, 4, 2)),)
PIECES = (1, 2, 4, 8)


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias`` in float64, rounded once."""
    out = x.double() @ weight.double().t()
    return (out if bias is None else out + bias.double()).to(x.dtype)


@triton.jit
def _sum_of_pieces(
    a_ptrs, b_ptrs, a_k, b_k, row_mask, column_mask, span, FIRST: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile's fp32 sum over ``COUNT`` pieces of ``span`` of k from piece ``FIRST`` on: halves of them, then those two.

    ``a_ptrs`` [BLOCK_M, 1] and ``b_ptrs`` [1, BLOCK_N] are where k is 0.
    """
    if COUNT > 1:
        low = _sum_of_pieces(
            a_ptrs, b_ptrs, a_k, b_k, row_mask, column_mask, span, FIRST, COUNT // 2, BLOCK_M, BLOCK_N, BLOCK_K
        )
        high = _sum_of_pieces(
            a_ptrs, b_ptrs, a_k, b_k, row_mask, column_mask, span, FIRST + COUNT // 2, COUNT // 2,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        total = low + high
    else:
        ks = tl.arange(0, BLOCK_K).to(tl.int64)
        a_ptrs += (ks[None, :] + FIRST * span) * a_k
        b_ptrs += (ks[:, None] + FIRST * span) * b_k
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, span, BLOCK_K):
            k_mask = ks < span - start
            a = tl.load(a_ptrs, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=k_mask[:, None] & column_mask[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
            a_ptrs += BLOCK_K * a_k
            b_ptrs += BLOCK_K * b_k
    return total


@triton.jit(do_not_specialize=["M", "alpha", "beta"])
def _matmul_kernel(
    a_ptr, b_ptr, bias_ptr, out_ptr, M, N, span, alpha: tl.float32, beta: tl.float32,
    a_batch, a_row, a_k, b_batch, b_k, b_column, bias_batch, bias_row, bias_column, out_batch,
    HAS_BIAS: tl.constexpr, PIECES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_N] tile of one product of the batch; ``out`` is contiguous."""
    batch = tl.program_id(2).to(tl.int64)  # int64: products of sizes and strides pass 2**31
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < M
    column_mask = columns < N
    a_ptrs = a_ptr + batch * a_batch + rows[:, None] * a_row
    b_ptrs = b_ptr + batch * b_batch + columns[None, :] * b_column
    total = _sum_of_pieces(a_ptrs, b_ptrs, a_k, b_k, row_mask, column_mask, span, 0, PIECES, BLOCK_M, BLOCK_N, BLOCK_K)
    mask = row_mask[:, None] & column_mask[None, :]
    if HAS_BIAS:
        bias_ptrs = bias_ptr + batch * bias_batch + rows[:, None] * bias_row + columns[None, :] * bias_column
        total = total * alpha + beta * tl.load(bias_ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + batch * out_batch + rows[:, None] * N + columns[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


def tiles_for(x: torch.Tensor) -> tuple[tuple[int | None, Tile], ...]:
    """The tiles that may be chosen by M for this dtype and GPU: several only where they are known to agree."""
    if x.dtype == torch.float32:
        return FP32_TILES
    return HOPPER_TILES if is_hopper(x.device) else GENERIC_TILES


def launch(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, beta: float = 1.0, alpha: float = 1.0,
    tile: Tile | None = None, pieces: int = 1, out_dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """``alpha * a @ b + beta * bias`` for a [B, M, K], b [B, K, N] and a bias that broadcasts to [B, M, N]."""
    batch, m, k = a.shape
    n = b.shape[-1]
    out = torch.empty((batch, m, n), dtype=out_dtype or a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    plain = tile is None and batch == pieces == 1 and beta == alpha == 1
    if plain and _product(a[0], b[0].t(), bias, out[0]):
        return out
    if tile is None:
        tile = next(t for most, t in tiles_for(a) if most is None or m <= most)
    bias = None if bias is None else bias.expand(batch, m, n)
    grid = (triton.cdiv(m, tile.m), triton.cdiv(n, tile.n), batch)
    with device_guard(a):
        _matmul_kernel[grid](
            a, b, bias, out, m, n, k // pieces, alpha, beta, *a.stride(), *b.stride(),
            *((0, 0, 0) if bias is None else bias.stride()), m * n,
            HAS_BIAS=bias is not None, PIECES=pieces, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> bool:
    """Write ``x [M, K] @ weight [N, K].T + bias`` to ``out`` by the kernel for Hopper, if it can; whether it did."""
    along_columns = bias is None or (bias.shape == (weight.shape[0],) and bias.stride(0) == 1)
    return along_columns and product(x, weight, out, bias=bias)


def _validate(op: str, a: torch.Tensor, b: torch.Tensor, dims: int) -> None:
    check_dtype(op, "the left operand", a)
    check_same(op, "the right operand", b, "the left one", a)
    if a.dim() != dims or b.dim() != dims or a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
        wanted = "[M, K] and [K, N]" if dims == 2 else "[B, M, K] and [B, K, N]"
        raise ShapeError(f"{op}: shapes {tuple(a.shape)} and {tuple(b.shape)}, want {wanted}")


def _validate_bias(op: str, bias: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...]) -> None:
    check_same(op, "bias", bias, "the left operand", like)
    aligned = (1,) * (len(shape) - bias.dim()) + tuple(bias.shape)
    if len(aligned) != len(shape) or any(s not in (1, wanted) for s, wanted in zip(aligned, shape, strict=True)):
        raise ShapeError(f"{op}: bias has shape {tuple(bias.shape)}, want one that broadcasts to {shape}")


def check_pieces(op: str, pieces: int, k: int, multiple: int = 1) -> None:
    """ArgumentError unless k can be cut in so many equal pieces, each of a multiple of ``multiple``."""
    if pieces not in PIECES or (pieces > 1 and k % (pieces * multiple)):
        wanted = ", ".join(map(str, PIECES))
        raise ArgumentError(
            f"{op}: pieces is {pieces} and K {k}, want one of {wanted}, and K a multiple of pieces * {multiple}"
        )


def _validate_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pieces: int) -> None:
    check_dtype("linear", "x", x)
    check_same("linear", "weight", weight, "x", x)
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"linear: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, want [..., K], [N, K]"
        )
    check_pieces("linear", pieces, x.shape[-1])
    if bias is not None:
        _validate_bias("linear", bias, x, (weight.shape[0],))


def _linear_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pieces: int = 1,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    _validate_linear(x, weight, bias, pieces)
    if 0 in (x.numel(), weight.numel()):
        return linear_reference(x, weight, bias).to(out_dtype or x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    if pieces == 1:
        out = _exact.matmul_packed(rows, packed_transpose(weight))
    else:
        parts = zip(rows.chunk(pieces, 1), weight.chunk(pieces, 1), strict=True)
        out = add_pieces([_exact.rounded_to(_exact.exact_matmul(a, w.t()), torch.float32) for a, w in parts]).double()
    out = out if bias is None else out + bias.double()
    return _exact.rounded_to(out, out_dtype or x.dtype).view(*x.shape[:-1], weight.shape[0])


def _linear_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pieces: int = 1,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    _validate_linear(x, weight, bias, pieces)
    rows = math.prod(x.shape[:-1])  # not -1: with K = 0 it would be ambiguous
    n = weight.shape[0]
    if pieces == 1 and rows > 0 < n and is_hopper(x.device):  # launch's views of a batch of one take the host's time
        out = x.new_empty((*x.shape[:-1], n), dtype=out_dtype)
        if _product(x if x.dim() == 2 else x.reshape(rows, x.shape[-1]), weight, bias, out.view(rows, n)):
            return out
    out = launch(x.reshape(1, rows, x.shape[-1]), weight.t().unsqueeze(0), bias, pieces=pieces, out_dtype=out_dtype)
    return out.view(*x.shape[:-1], n)


def _linear_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pieces: int = 1,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    _validate_linear(x, weight, bias, pieces)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype or x.dtype)


def _baddbmm_cpu(
    bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, beta: float, alpha: float
) -> torch.Tensor:
    _validate_baddbmm(bias, a, b)
    if a.shape[-1] == 0:
        out = torch.zeros((*a.shape[:2], b.shape[2]), dtype=torch.float64)
    else:
        out = _exact.exact_matmul(a, b)
    if bias is not None:
        out = out * alpha + (bias.double() * beta if beta else 0.0)
    return _exact.rounded_to(out, a.dtype)


def _baddbmm_cuda(
    bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, beta: float, alpha: float
) -> torch.Tensor:
    _validate_baddbmm(bias, a, b)
    # beta == 0 means that the bias is not read, as in BLAS: a NaN in it must not count
    return launch(a, b, bias if beta or bias is None else torch.zeros_like(bias), beta, alpha)


def _baddbmm_fake(
    bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, beta: float, alpha: float
) -> torch.Tensor:
    _validate_baddbmm(bias, a, b)
    return a.new_empty((*a.shape[:2], b.shape[2]))


def _validate_baddbmm(bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> None:
    _validate("bmm" if bias is None else "baddbmm", a, b, dims=3)
    if bias is not None:
        _validate_bias("baddbmm", bias, a, (a.shape[0], a.shape[1], b.shape[2]))


_linear = register_op(
    "linear(Tensor x, Tensor weight, Tensor? bias, int pieces=1, ScalarType? out_dtype=None) -> Tensor",
    cpu=_linear_cpu, cuda=_linear_cuda, fake=_linear_fake,
)  # fmt: skip
_baddbmm = register_op(
    "baddbmm(Tensor? bias, Tensor a, Tensor b, float beta, float alpha) -> Tensor",
    cpu=_baddbmm_cpu, cuda=_baddbmm_cuda, fake=_baddbmm_fake,
)  # fmt: skip


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, pieces: int = 1,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """``x @ weight.T + bias``, as torch.nn.functional.linear.

    Args:
        x: [..., K], fp32, fp16 or bf16, any strides.
        weight: [N, K] of x's dtype, any strides. On the CPU it is packed once and kept while its bits stay the same.
        bias: [N] of x's dtype, or None.
        pieces: 1, 2, 4 or 8: equal pieces of K, whose fp32 sums are added by a tree; see the module docstring.
        out_dtype: fp32 for sums that ``add_pieces`` goes on with; default x's.

    Returns:
        [..., N] of ``out_dtype``: fp32 accumulation (exact on the CPU), bias added in fp32, rounded once.

    Invariance: a row's bits depend on its row of x, weight, bias and ``pieces`` alone; see the module docstring.

    Raises:
        ShapeError, DtypeError, DeviceError: before anything is computed.
        ArgumentError: K cannot be cut so.
        UnsupportedError: autograd would record the call.
    """
    require_no_grad("linear", x, weight, bias)
    result: torch.Tensor = _linear(x, weight, bias, pieces, out_dtype)
    return result


def add_pieces(sums: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of fp32 tensors of one shape, of ranks in their order, by the tree of ``linear``'s pieces.

    Neighbours are added, then neighbours of those sums; the last of an odd number goes on as it is. With 2, 4 or 8
    ranks the bits are those of one rank with all of K, if each has as many times fewer ``pieces``.

    Invariance: elementwise.

    Raises:
        ArgumentError: none is given.
        DtypeError: not fp32, whose sums the tree has.
    """
    if not sums:
        raise ArgumentError("add_pieces: no tensor, want one or more")
    for tensor in sums:
        check_dtype("add_pieces", "a sum", tensor, (torch.float32,))
    level = list(sums)
    while len(level) > 1:
        level = [low + high for low, high in zip(level[::2], level[1::2], strict=False)] + level[len(level) & ~1 :]
    return level[0]


def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` for a [M, K] and b [K, N] of one dtype and any strides; the bits of ``linear(a, b.T)``.

    Invariance, errors: as ``linear``.
    """
    _validate("mm", a, b, dims=2)
    return bmm(a.unsqueeze(0), b.unsqueeze(0)).squeeze(0)


def addmm(
    bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1.0, alpha: float = 1.0
) -> torch.Tensor:
    """``beta * bias + alpha * (a @ b)`` for a [M, K], b [K, N] and a bias that broadcasts to [M, N].

    Invariance, errors: as ``linear``. With beta 0 the bias is not read.
    """
    _validate("addmm", a, b, dims=2)
    return baddbmm(bias, a.unsqueeze(0), b.unsqueeze(0), beta=beta, alpha=alpha).squeeze(0)


def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` for every pair of a [B, M, K] and b [B, K, N] of one dtype and any strides.

    Invariance: an output element depends on its row of a and its column of b alone. Errors: as ``linear``.
    """
    require_no_grad("bmm", a, b)
    result: torch.Tensor = _baddbmm(None, a, b, 0.0, 1.0)
    return result


def baddbmm(
    bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1.0, alpha: float = 1.0
) -> torch.Tensor:
    """``beta * bias + alpha * (a @ b)`` for a [B, M, K], b [B, K, N] and a bias that broadcasts to [B, M, N].

    Invariance, errors: as ``bmm``. With beta 0 the bias is not read.
    """
    require_no_grad("baddbmm", bias, a, b)
    result: torch.Tensor = _baddbmm(bias, a, b, beta, alpha)
    return result


def _sample(num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    x = torch.randn(num_tokens, 1024, generator=generator, device=device)
    weight = torch.randn(768, 1024, generator=generator, device=device) * 1024**-0.5
    return {"x": x.to(dtype), "weight": weight.to(dtype)}


def _mv(a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return mm(a, v.unsqueeze(1)).squeeze(1)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return mm(a.unsqueeze(0), b.unsqueeze(1)).squeeze()


def _addmv(
    bias: torch.Tensor, a: torch.Tensor, v: torch.Tensor, *, beta: float = 1.0, alpha: float = 1.0
) -> torch.Tensor:
    return addmm(bias.unsqueeze(-1), a, v.unsqueeze(1), beta=beta, alpha=alpha).squeeze(1)


def _no_out_dtype(*args: Any, **kwargs: Any) -> torch.Tensor:
    raise UnsupportedError("a matrix product with out_dtype has no batch-invariant form; want one dtype for all")


register_spec(
    OpSpec(
        "linear",
        linear,
        linear_reference,
        _sample,
        batch_axes={"x": 0},
        tolerance="linear",
        aten={
            "mm": mm,
            "addmm": addmm,
            "bmm": bmm,
            "baddbmm": baddbmm,
            "mv": _mv,
            "dot": _dot,
            "addmv": _addmv,
            "mm.dtype": _no_out_dtype,
            "bmm.dtype": _no_out_dtype,
            "addmm.dtype": _no_out_dtype,
            "baddbmm.dtype": _no_out_dtype,
            "mm.dtype_out": _no_out_dtype,
            "bmm.dtype_out": _no_out_dtype,
            "addmm.dtype_out": _no_out_dtype,
            "baddbmm.dtype_out": _no_out_dtype,
        },
    )
)
