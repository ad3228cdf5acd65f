"""The Triton kernels of ``rms_norm_backward``, where they are explained, and their launcher."""

from __future__ import annotations

import torch

from ._row_tree import rsqrt_exact
from ._rows import packed, vector_width
from ._triton import device_guard, tl, triton

__all__ = ["launch"]

# Elements of a row that registers hold with its share of grad_weight; wider rows are read twice, in such blocks
MAX_BLOCK = {torch.float32: 4096, torch.float16: 8192, torch.bfloat16: 8192}
# (widest BLOCK, CHUNK, LANES, warps): rows a program, rows at a time. Fewer rows a chunk: shorter programs, and more
# memory traffic for their sums, 8 / CHUNK bytes beside the 6 of reading and writing an element of 16 bits.
LAUNCHES = (
    (64, 128, 16, 4),
    (128, 128, 8, 4),
    (256, 64, 4, 4),
    (512, 32, 2, 4),
    (1024, 16, 1, 4),
    (2048, 16, 1, 4),
    (4096, 16, 1, 8),
    (8192, 16, 1, 16),
)
STAGES = 3  # rows in flight: two are fetched while one is reduced
COMBINE_LANES = 128
COMBINE_BLOCK = 32  # columns a program: 128 bytes of fp32, so that even narrow weights keep several programs busy
COMBINE_WARPS = 8


@triton.jit
def _fold(total, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """[LANES, BLOCK] to [BLOCK]: the upper half of the lanes is added to the lower half until one is left."""
    for halving in tl.static_range(LANES.bit_length() - 1):
        total = tl.sum(tl.reshape(total, [2, LANES >> (halving + 1), BLOCK]), axis=0)
    return tl.reshape(total, [BLOCK])


@triton.jit
def _load_scale(
    weight_ptr, block, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    ACC: tl.constexpr, HAS_WEIGHT: tl.constexpr, GEMMA: tl.constexpr,
):  # fmt: skip
    """[LANES, BLOCK], every lane the same: what the normalised value was multiplied with."""
    if HAS_WEIGHT:
        # Read for every lane, it has the layout that rows have; read once, it would impose its own on them.
        columns = tl.broadcast_to(block + tl.arange(0, BLOCK)[None, :], [LANES, BLOCK])
        weight = tl.load(weight_ptr + columns, mask=columns < HIDDEN, other=0.0).to(ACC)
        scale = weight + 1.0 if GEMMA else weight
    else:
        scale = tl.full([LANES, BLOCK], 1.0, dtype=ACC)
    return scale


@triton.jit(do_not_specialize=["grad_out_stride", "grad_residual_stride", "x_stride", "num_rows", "eps"])
def _backward_kernel(
    grad_out_ptr, grad_residual_ptr, x_ptr, weight_ptr, grad_x_ptr, partial_ptr,
    grad_out_stride: tl.int64, grad_residual_stride: tl.int64, x_stride: tl.int64, num_rows: tl.int64, eps: tl.float64,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
    VEC: tl.constexpr, ACC: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, GEMMA: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
):  # fmt: skip
    """CHUNK rows, LANES at a time: their grad_x, and their sum for grad_weight. Strides are in units of VEC."""
    start = tl.program_id(0).to(tl.int64) * CHUNK
    stop = tl.minimum(start + CHUNK, num_rows)
    dtype = grad_x_ptr.dtype.element_ty
    if WEIGHT_GRAD:
        partial_ptr += tl.program_id(0).to(tl.int64) * HIDDEN
        total = tl.zeros([LANES, BLOCK], dtype=ACC)
    scale = _load_scale(weight_ptr, 0, HIDDEN, BLOCK, LANES, ACC, HAS_WEIGHT, GEMMA)

    for first in tl.range(start, stop, LANES, num_stages=STAGES):
        rows = first + tl.arange(0, LANES)[:, None]
        x_rows = x_ptr + rows * x_stride * VEC
        grad_rows = grad_out_ptr + rows * grad_out_stride * VEC
        squares = tl.zeros([LANES, BLOCK], dtype=ACC)
        products = tl.zeros([LANES, BLOCK], dtype=ACC)
        for block in tl.static_range(0, HIDDEN, BLOCK):
            columns = block + tl.arange(0, BLOCK)[None, :]
            mask = (rows < stop) & (columns < HIDDEN)
            x = tl.load(x_rows + columns, mask=mask, other=0.0).to(ACC)
            grad = tl.load(grad_rows + columns, mask=mask, other=0.0).to(ACC)
            if HIDDEN > BLOCK:
                scale = _load_scale(weight_ptr, block, HIDDEN, BLOCK, LANES, ACC, HAS_WEIGHT, GEMMA)
            squares += x * x
            products += grad * scale * x

        mean = tl.sum(squares, axis=1)[:, None] / HIDDEN
        rstd = rsqrt_exact(mean + tl.full(mean.shape, eps, ACC))
        along = tl.sum(products, axis=1)[:, None] / HIDDEN * rstd  # mean(g * xhat)

        for block in tl.static_range(0, HIDDEN, BLOCK):
            columns = block + tl.arange(0, BLOCK)[None, :]
            mask = (rows < stop) & (columns < HIDDEN)
            if HIDDEN > BLOCK:
                x = tl.load(x_rows + columns, mask=mask, other=0.0).to(ACC)
                grad = tl.load(grad_rows + columns, mask=mask, other=0.0).to(ACC)
                scale = _load_scale(weight_ptr, block, HIDDEN, BLOCK, LANES, ACC, HAS_WEIGHT, GEMMA)
            y = x * rstd
            grad_x = (grad * scale - y * along) * rstd
            if HAS_RESIDUAL:
                residual_rows = grad_residual_ptr + rows * grad_residual_stride * VEC
                grad_x += tl.load(residual_rows + columns, mask=mask, other=0.0).to(ACC)
            tl.store(grad_x_ptr + rows * HIDDEN + columns, grad_x.to(dtype), mask=mask)
            if WEIGHT_GRAD:
                # Past the last row rstd may be infinite, and 0 * inf is no zero.
                term = tl.where(mask, grad * (y if GEMMA else y.to(dtype).to(ACC)), 0.0)
                if HIDDEN > BLOCK:  # one lane, too wide for registers: its sum is kept in memory
                    kept = tl.load(partial_ptr + columns, mask=mask & (first > start), other=0.0)
                    tl.store(partial_ptr + columns, kept + term, mask=mask)
                else:
                    total += term
        if WEIGHT_GRAD and HIDDEN > BLOCK:
            tl.debug_barrier()  # the next row may read a sum with another thread than wrote it

    if WEIGHT_GRAD and HIDDEN <= BLOCK:
        columns = tl.arange(0, BLOCK)
        tl.store(partial_ptr + columns, _fold(total, LANES, BLOCK), mask=columns < HIDDEN)


@triton.jit(do_not_specialize=["num_chunks"])
def _combine_kernel(
    partial_ptr, grad_weight_ptr, num_chunks: tl.int64,
    HIDDEN: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sum of ``partial`` [num_chunks, HIDDEN] over chunks, for BLOCK columns."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lanes = tl.arange(0, LANES)[:, None]
    total = tl.zeros([LANES, BLOCK], dtype=partial_ptr.dtype.element_ty)
    for first in tl.range(0, num_chunks, LANES, num_stages=STAGES):
        chunks = first + lanes
        mask = (chunks < num_chunks) & (columns[None, :] < HIDDEN)
        total += tl.load(partial_ptr + chunks * HIDDEN + columns[None, :], mask=mask, other=0.0)
    grad_weight = _fold(total, LANES, BLOCK).to(grad_weight_ptr.dtype.element_ty)
    tl.store(grad_weight_ptr + columns, grad_weight, mask=columns < HIDDEN)


def _as_matrix(t: torch.Tensor | None, vec: int) -> torch.Tensor | None:
    """``t`` as [rows, hidden_size] with unit stride, 16-byte base and rows in steps of ``vec``; copied if it is not."""
    if t is None:
        return None
    rows = t.reshape(-1, t.shape[-1])
    if (rows.stride(1) == 1 or rows.shape[1] == 1) and rows.stride(0) % vec == 0 and rows.data_ptr() % 16 == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def launch(
    grad_out: torch.Tensor,
    grad_residual_out: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    gemma: bool,
    grad_x: torch.Tensor,
    grad_weight: torch.Tensor | None,
) -> None:
    """Run the kernels on at least one row; ``grad_x`` and ``grad_weight`` are new and contiguous."""
    hidden_size = x.shape[-1]
    block = min(triton.next_power_of_2(hidden_size), MAX_BLOCK[x.dtype])
    chunk, lanes, warps = next(launch for widest, *launch in LAUNCHES if block <= widest)
    vec = vector_width(x)
    grads, residual_grads, rows = (_as_matrix(t, vec) for t in (grad_out, grad_residual_out, x))
    strides = [0 if t is None else t.stride(0) // vec for t in (grads, residual_grads, rows)]
    num_rows = x.numel() // hidden_size
    num_chunks = triton.cdiv(num_rows, chunk)
    wide = torch.float64 if x.dtype == torch.float32 else torch.float32
    partial = None if grad_weight is None else torch.empty(num_chunks, hidden_size, dtype=wide, device=x.device)
    with device_guard(x):
        _backward_kernel[(num_chunks,)](
            grads, residual_grads, rows, None if weight is None else packed(weight), grad_x, partial,
            *strides, num_rows, eps,
            HIDDEN=hidden_size, BLOCK=block, CHUNK=chunk, LANES=lanes, VEC=vec,
            STAGES=STAGES if hidden_size <= block else 1,  # a prefetch could overtake the sums kept in memory
            ACC=tl.float64 if wide == torch.float64 else tl.float32,
            HAS_RESIDUAL=grad_residual_out is not None, HAS_WEIGHT=weight is not None, GEMMA=gemma,
            WEIGHT_GRAD=partial is not None, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
        if partial is not None:
            _combine_kernel[(triton.cdiv(hidden_size, COMBINE_BLOCK),)](
                partial, grad_weight, num_chunks,
                HIDDEN=hidden_size, LANES=COMBINE_LANES, BLOCK=COMBINE_BLOCK, STAGES=STAGES,
                num_warps=COMBINE_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
