"""Matrix products whose bits do not depend on the number of rows: linear, mm, addmm, bmm, baddbmm.

    out[m, n] = (sum over k of a[m, k] * b[k, n]) * alpha + beta * bias[n], accumulated in fp32, rounded once

Invariance: every output element is accumulated by the tensor core in ascending k, from zero, in one program; K is
never split by M, and K past the end adds exact zeros. On Hopper the bits depend neither on the tile nor on the
instruction (mma.sync or wgmma) nor on the operand order (measured, and tested in tests/gpu), so M may choose the
tile there; on other GPUs there is one tile for every M. fp32 is computed in IEEE fp32 (no tf32), with one tile.
On the CPU the sum is exact in float64, so it has no order (see ``_exact``), and is rounded once.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import ShapeError, UnsupportedError
from ..numerics import as_bits
from ..registry import OpSpec, register_spec
from . import _exact
from ._library import check_dtype, check_same, register_op, require_no_grad
from ._triton import device_guard, tl, triton

__all__ = ["addmm", "baddbmm", "bmm", "linear", "linear_reference", "mm"]


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
PACKED_LIMIT = 2**30  # bytes of packed weights kept on the CPU; weights past it are packed again at every call


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias`` in float64, rounded once."""
    out = x.double() @ weight.double().t()
    return (out if bias is None else out + bias.double()).to(x.dtype)


@triton.jit(do_not_specialize=["M", "alpha", "beta"])
def _matmul_kernel(
    a_ptr, b_ptr, bias_ptr, out_ptr, M, N, K, alpha: tl.float32, beta: tl.float32,
    a_batch, a_row, a_k, b_batch, b_k, b_column, bias_batch, bias_row, bias_column, out_batch,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_N] tile of one product of the batch; ``out`` is contiguous."""
    batch = tl.program_id(2).to(tl.int64)  # int64: products of sizes and strides pass 2**31
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    row_mask = rows < M
    column_mask = columns < N
    a_ptrs = a_ptr + batch * a_batch + rows[:, None] * a_row + ks[None, :] * a_k
    b_ptrs = b_ptr + batch * b_batch + ks[:, None] * b_k + columns[None, :] * b_column
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k_mask = ks < K - start
        a = tl.load(a_ptrs, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=k_mask[:, None] & column_mask[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_ptrs += BLOCK_K * a_k
        b_ptrs += BLOCK_K * b_k
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
    if x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) == (9, 0):
        return HOPPER_TILES
    return GENERIC_TILES


def launch(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
    tile: Tile | None = None,
) -> torch.Tensor:
    """``alpha * a @ b + beta * bias`` for a [B, M, K], b [B, K, N] and a bias that broadcasts to [B, M, N]."""
    batch, m, k = a.shape
    n = b.shape[-1]
    out = torch.empty((batch, m, n), dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    if tile is None:
        tile = next(t for most, t in tiles_for(a) if most is None or m <= most)
    bias = None if bias is None else bias.expand(batch, m, n)
    grid = (triton.cdiv(m, tile.m), triton.cdiv(n, tile.n), batch)
    with device_guard(a):
        _matmul_kernel[grid](
            a, b, bias, out, m, n, k, alpha, beta, *a.stride(), *b.stride(),
            *((0, 0, 0) if bias is None else bias.stride()), m * n,
            HAS_BIAS=bias is not None, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out


class _PackedWeights:
    """Weights as the exact CPU product wants them, kept while the weight lives and its bits stay the same."""

    def __init__(self) -> None:
        self._kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._lock = threading.Lock()

    def get(self, weight: torch.Tensor) -> _exact.Packed:
        """The packed transpose of ``weight`` [N, K]."""
        kept = self._kept.get(weight)
        # Compared by value: a write through .data or another alias leaves the version counter alone.
        if kept is not None and torch.equal(kept[0], _as_words(weight)):
            packed: _exact.Packed = kept[1]
            return packed
        packed = _exact.pack(weight.t())
        size = sum(chunk.nbytes for chunk in packed.chunks)
        with self._lock:
            self._kept.pop(weight, None)
            if size + sum(c.nbytes for _, other in self._kept.values() for c in other.chunks) <= PACKED_LIMIT:
                self._kept[weight] = (_as_words(weight).clone(), packed)
        return packed


def _as_words(weight: torch.Tensor) -> torch.Tensor:
    """The bits of ``weight``, eight bytes at a time if they can be had without a copy: the quickest to compare."""
    if weight.is_contiguous() and weight.nbytes % 8 == 0 and weight.data_ptr() % 8 == 0:
        return weight.detach().view(-1).view(torch.int64)
    return as_bits(weight.detach())


_packed_weights = _PackedWeights()


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


def _validate_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    check_dtype("linear", "x", x)
    check_same("linear", "weight", weight, "x", x)
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"linear: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, want [..., K], [N, K]"
        )
    if bias is not None:
        _validate_bias("linear", bias, x, (weight.shape[0],))


def _linear_cpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    _validate_linear(x, weight, bias)
    if 0 in (x.numel(), weight.numel()):
        return linear_reference(x, weight, bias)
    out = _exact.matmul_packed(x.reshape(-1, x.shape[-1]), _packed_weights.get(weight))
    out = out if bias is None else out + bias.double()
    return _exact.rounded_to(out, x.dtype).view(*x.shape[:-1], weight.shape[0])


def _linear_cuda(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    _validate_linear(x, weight, bias)
    rows = math.prod(x.shape[:-1])  # not -1: with K = 0 it would be ambiguous
    out = launch(x.reshape(1, rows, x.shape[-1]), weight.t().unsqueeze(0), bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def _linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    _validate_linear(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


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
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    cpu=_linear_cpu, cuda=_linear_cuda, fake=_linear_fake,
)  # fmt: skip
_baddbmm = register_op(
    "baddbmm(Tensor? bias, Tensor a, Tensor b, float beta, float alpha) -> Tensor",
    cpu=_baddbmm_cpu, cuda=_baddbmm_cuda, fake=_baddbmm_fake,
)  # fmt: skip


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``, as torch.nn.functional.linear.

    Args:
        x: [..., K], fp32, fp16 or bf16, any strides.
        weight: [N, K] of x's dtype, any strides. On the CPU it is packed once and kept while its bits stay the same.
        bias: [N] of x's dtype, or None.

    Returns:
        [..., N] of x's dtype: fp32 accumulation (exact on the CPU), bias added in fp32, rounded once.

    Invariance: each output row's bits depend on its row of x, weight and bias alone; see the module docstring.

    Raises:
        ShapeError, DtypeError, DeviceError: before anything is computed.
        UnsupportedError: autograd would record the call.
    """
    require_no_grad("linear", x, weight, bias)
    result: torch.Tensor = _linear(x, weight, bias)
    return result


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
