"""The kernel of ``rope_and_cache`` and its launch: a program takes some heads of one token's q, k or v."""

from __future__ import annotations

import torch
from torch import Tensor

from . import rms_norm as norm
from ._row_launch import CachedKernel
from ._row_tree import along_rows, launch_dependents, row_rstd, scale_row, vector_sums, wait_for_inputs
from ._rows import packed, readable
from ._triton import tl, triton
from .rope import rotated

__all__ = ["launch"]

# (most tokens, pairs a program, warps). Few tokens: one vector a thread, many programs; many: loads in flight
LAUNCHES = ((256, 512, 2), (2**31 - 1, 1024, 2))
MAX_VECTORS = 64  # of a head that is normalised here: two warps'


@triton.jit
def _slot(slot_mapping_ptr, token, num_mapped, num_slots):
    """A token's slot, and whether there is one; 0 if not."""
    slot = tl.load(slot_mapping_ptr + token, mask=token < num_mapped, other=-1).to(tl.int64)
    is_slot = (slot >= 0) & (slot < num_slots)
    return tl.where(is_slot, slot, 0), is_slot


@triton.jit
def _load_pairs(
    ptr, mask, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """[HEADS, BLOCK_HALF] first and second elements of rows, or of one row for all heads; ptr and mask [HEADS, 1]."""
    if INTERLEAVED:
        columns = tl.broadcast_to(tl.arange(0, 2 * BLOCK_HALF)[None, :], [HEADS, 2 * BLOCK_HALF])
        both = tl.load(ptr + columns, mask=mask & (columns < 2 * HALF), other=0.0)
        first, second = tl.split(tl.reshape(both, [HEADS, BLOCK_HALF, 2]))
    else:
        columns = tl.broadcast_to(tl.arange(0, BLOCK_HALF)[None, :], [HEADS, BLOCK_HALF])
        first = tl.load(ptr + columns, mask=mask & (columns < HALF), other=0.0)
        second = tl.load(ptr + HALF + columns, mask=mask & (columns < HALF), other=0.0)
    return first, second


@triton.jit
def _rstd(
    x_ptr, mask, x1, x2, eps, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALVES: tl.constexpr, VEC: tl.constexpr,
    ACC: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """1 / sqrt(mean of squares + eps) of heads, from their HALVES x1 and x2, or else read again as rows."""
    if HALVES:
        x1, x2 = x1.to(ACC), x2.to(ACC)
        parts = (vector_sums(x1 * x1, BLOCK_DIM // 2, VEC), vector_sums(x2 * x2, BLOCK_DIM // 2, VEC))
        rstd = row_rstd(parts, eps, HEAD_DIM, 2)
    else:
        columns = tl.arange(0, BLOCK_DIM)[None, :]
        x = tl.load(x_ptr + columns, mask=mask & (columns < HEAD_DIM), other=0.0).to(ACC)
        rstd = row_rstd((vector_sums(x * x, BLOCK_DIM, VEC),), eps, HEAD_DIM, 1)
    return along_rows(rstd)


@triton.jit
def _turn_heads(
    x_ptr, weight_ptr, out_ptr, is_head, is_written, cos_sin_ptr, position, num_positions, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_REST: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token, normalised if there is a weight, and rotated; pointers and ``is_head`` [HEADS, 1]."""
    REST: tl.constexpr = HEAD_DIM - 2 * HALF
    HALVES: tl.constexpr = not INTERLEAVED and REST == 0 and HALF == BLOCK_HALF and HALF % VEC == 0
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x1, x2 = _load_pairs(x_ptr, is_head, HEADS, HALF, BLOCK_HALF, INTERLEAVED)
    # Read for every head, the weight and the table have the layout that heads have, and 16 bytes are a load
    if weight_ptr is not None:
        weight1, weight2 = _load_pairs(weight_ptr, True, HEADS, HALF, BLOCK_HALF, INTERLEAVED)
    pairs = tl.broadcast_to(tl.arange(0, BLOCK_HALF)[None, :], [HEADS, BLOCK_HALF])
    in_table = (position >= 0) & (position < num_positions) & (pairs < HALF)  # outside: not read, NaN
    cos = tl.load(cos_sin_ptr + position * (2 * HALF) + pairs, mask=in_table, other=float("nan"))
    sin = tl.load(cos_sin_ptr + position * (2 * HALF) + HALF + pairs, mask=in_table, other=float("nan"))
    if weight_ptr is not None:
        rstd = _rstd(x_ptr, is_head, x1, x2, eps, HEADS, HEAD_DIM, HALVES, VEC, ACC, BLOCK_DIM)
        x1, x2 = scale_row(x1, rstd, weight1, False), scale_row(x2, rstd, weight2, False)
    y1, y2 = rotated(x1, x2, cos, sin, dtype)
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        tl.store(out_ptr + columns, tl.interleave(y1, y2), mask=is_written & (columns < 2 * HALF))
    else:
        tl.store(out_ptr + pairs, y1, mask=is_written & (pairs < HALF))
        tl.store(out_ptr + HALF + pairs, y2, mask=is_written & (pairs < HALF))
    if REST > 0:
        columns = 2 * HALF + tl.broadcast_to(tl.arange(0, BLOCK_REST)[None, :], [HEADS, BLOCK_REST])
        rest = tl.load(x_ptr + columns, mask=is_head & (columns < HEAD_DIM), other=0.0)
        if weight_ptr is not None:
            rest = scale_row(rest, rstd, tl.load(weight_ptr + columns, mask=columns < HEAD_DIM, other=0.0), False)
        tl.store(out_ptr + columns, rest, mask=is_written & (columns < HEAD_DIM))


@triton.jit(
    do_not_specialize=["num_positions", "num_mapped", "num_slots", "eps"]
    + [f"{tensor}_{axis}" for tensor in "qkv" for axis in ("token", "head")]
    + [f"{cache}_{axis}" for cache in ("k_cache", "v_cache") for axis in ("page", "offset", "head")]
)
def _rope_and_cache_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, positions_ptr, cos_sin_ptr, slot_mapping_ptr,
    q_out_ptr, k_cache_ptr, v_cache_ptr,
    q_token: tl.int64, q_head: tl.int64, k_token: tl.int64, k_head: tl.int64, v_token: tl.int64, v_head: tl.int64,
    k_cache_page: tl.int64, k_cache_offset: tl.int64, k_cache_head: tl.int64,
    v_cache_page: tl.int64, v_cache_offset: tl.int64, v_cache_head: tl.int64,
    num_positions: tl.int64, num_mapped: tl.int64, num_slots: tl.int64, eps: tl.float64,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr, INTERLEAVED: tl.constexpr, VEC: tl.constexpr, CACHE_VEC: tl.constexpr, ACC: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_REST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token's q, k or v. Strides are in units of VEC elements, the caches' of CACHE_VEC."""
    Q_BLOCKS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    KV_BLOCKS: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    token = (tl.program_id(0) // (Q_BLOCKS + 2 * KV_BLOCKS)).to(tl.int64)
    block = tl.program_id(0) % (Q_BLOCKS + 2 * KV_BLOCKS)
    lanes = tl.arange(0, HEADS)[:, None]
    wait_for_inputs(PDL)
    launch_dependents(PDL)
    if block < Q_BLOCKS:
        heads = block * HEADS + lanes
        is_head = heads < NUM_HEADS
        position = tl.load(positions_ptr + token).to(tl.int64)
        _turn_heads(
            q_ptr + (token * q_token + heads * q_head) * VEC, q_weight_ptr,
            q_out_ptr + (token * NUM_HEADS + heads) * HEAD_DIM, is_head, is_head,
            cos_sin_ptr, position, num_positions, eps,
            HEADS, HEAD_DIM, HALF, INTERLEAVED, BLOCK_HALF, BLOCK_DIM, BLOCK_REST, VEC, ACC,
        )  # fmt: skip
    elif block < Q_BLOCKS + KV_BLOCKS:
        heads = (block - Q_BLOCKS) * HEADS + lanes
        is_head = heads < NUM_KV_HEADS
        position = tl.load(positions_ptr + token).to(tl.int64)
        slot, is_slot = _slot(slot_mapping_ptr, token, num_mapped, num_slots)
        place = slot // PAGE_SIZE * k_cache_page + slot % PAGE_SIZE * k_cache_offset + heads * k_cache_head
        _turn_heads(
            k_ptr + (token * k_token + heads * k_head) * VEC, k_weight_ptr,
            k_cache_ptr + place * CACHE_VEC, is_head, is_head & is_slot,
            cos_sin_ptr, position, num_positions, eps,
            HEADS, HEAD_DIM, HALF, INTERLEAVED, BLOCK_HALF, BLOCK_DIM, BLOCK_REST, VEC, ACC,
        )  # fmt: skip
    else:
        heads = (block - Q_BLOCKS - KV_BLOCKS) * HEADS + lanes
        columns = tl.arange(0, BLOCK_DIM)[None, :]
        mask = (heads < NUM_KV_HEADS) & (columns < HEAD_DIM)
        slot, is_slot = _slot(slot_mapping_ptr, token, num_mapped, num_slots)
        value = tl.load(v_ptr + (token * v_token + heads * v_head) * VEC + columns, mask=mask)
        place = slot // PAGE_SIZE * v_cache_page + slot % PAGE_SIZE * v_cache_offset + heads * v_cache_head
        tl.store(v_cache_ptr + place * CACHE_VEC + columns, value, mask=mask & is_slot)


_KERNEL = CachedKernel(_rope_and_cache_kernel)


def _addressable(t: Tensor, vec: int) -> bool:
    """Whether axes but the last are in steps of ``vec`` elements from a 16-byte aligned base."""
    return t.data_ptr() % 16 == 0 and not any(step % vec for step in t.stride()[:-1])


def _heads(x: Tensor, vec: int) -> Tensor:
    """``x`` [num_tokens, heads, head_dim] if a kernel can address it, else a copy."""
    if _addressable(x, vec) and (x.stride(2) == 1 or x.shape[2] == 1):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    norm.launch(x, None, weight, out, None, eps, False)
    return out


def _plan(num_tokens: int, head_dim: int, half: int) -> tuple[tuple[int, ...], int]:
    """HEADS, BLOCK_HALF, BLOCK_DIM and BLOCK_REST, and the warps of a program.

    However few heads there are, there is room for as many as give each thread a vector: were a vector shared out, its
    sum would be as well.
    """
    sizes = (half, head_dim, head_dim - 2 * half)
    block_half, block_dim, block_rest = (triton.next_power_of_2(max(size, 1)) for size in sizes)
    pairs, warps = next(shape for most, *shape in LAUNCHES if num_tokens <= most)
    heads = max(pairs // max(block_half, block_dim // 2), 1)
    return (heads, block_half, block_dim, block_rest), warps


def launch(
    q_out: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos_sin: Tensor, k_cache: Tensor,
    v_cache: Tensor, slot_mapping: Tensor, interleaved: bool, q_weight: Tensor | None, k_weight: Tensor | None,
    eps: float,
) -> None:  # fmt: skip
    """Run the kernel; ``q_out`` is new and contiguous, of q's shape, and the caches are written."""
    num_heads, kv_heads, head_dim = q.shape[1], *k.shape[1:]
    if q.numel() + k.numel() == 0:
        return
    vec = 16 // q.element_size()
    vec = vec if head_dim % vec == 0 else 1
    cache_vec = vec if _addressable(k_cache, vec) and _addressable(v_cache, vec) else 1
    if cache_vec == 1 or head_dim > MAX_VECTORS * vec or torch.version.hip is not None:
        # Stores of single elements might be what the compiler lays the sums out for, and warps of 64 make another tree
        q, q_weight = (q if q_weight is None else _normalised(q, q_weight, eps)), None
        k, k_weight = (k if k_weight is None else _normalised(k, k_weight, eps)), None
    q, k, v = (_heads(x, vec) for x in (q, k, v))
    half = cos_sin.shape[1] // 2
    blocks, warps = _plan(len(q), head_dim, half)
    shape = (num_heads, kv_heads, head_dim, half, max(k_cache.shape[1], 1), interleaved, vec, cache_vec)
    constants = (*shape, tl.float64 if q.dtype == torch.float32 else tl.float32, *blocks)
    weights = (readable(q_weight, 1), readable(k_weight, 1))
    pointers = (q, k, v, *weights, packed(positions), packed(cos_sin), packed(slot_mapping), q_out, k_cache, v_cache)
    strides = [step // vec for x in (q, k, v) for step in x.stride()[:2]]
    strides += [step // cache_vec for cache in (k_cache, v_cache) for step in cache.stride()[:3]]
    dtypes = (q.dtype, positions.dtype, cos_sin.dtype, slot_mapping.dtype)
    aligned = tuple(cache.data_ptr() % 16 == 0 for cache in (k_cache, v_cache))
    _KERNEL(
        (shape, blocks, dtypes, aligned, q_weight is None, k_weight is None),
        len(q) * (-(-num_heads // blocks[0]) + 2 * -(-kv_heads // blocks[0])),
        q,
        (*pointers, *strides, cos_sin.shape[0], len(slot_mapping), k_cache.shape[0] * k_cache.shape[1], eps),
        constants,
        warps,
    )
