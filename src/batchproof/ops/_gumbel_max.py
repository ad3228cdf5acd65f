"""Argmax and Gumbel-max of rows of logits on a GPU: the kernels of ``sample``, which says why no bit of theirs varies.

A row is cut into blocks, whose best are integers that order by value, then by lower index; the row's best is theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._fast_launch import FastKernel
from ._gumbel import BLOCK, NUM_WARPS, noise_block, random_words_block
from ._triton import tl, triton

__all__ = ["launch_best", "launch_best_of_requests", "order_key"]


@triton.jit
def order_key(x):
    """An int32 that orders as fp32 ``x`` does; NaN is -inf and -0 is +0."""
    x = tl.where(x != x, float("-inf"), x)
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit(do_not_specialize=["row_stride", "vocab_size"])
def _block_best_kernel(
    x_ptr, seeds_ptr, positions_ptr, temperature_ptr, requests_ptr, keys_ptr,
    row_stride: tl.int64, vocab_size: tl.int64,
    BLOCK: tl.constexpr, SAMPLE: tl.constexpr, OF_REQUESTS: tl.constexpr,
):  # fmt: skip
    """The best of one row's BLOCK columns as an int64 that orders by value, then by lower index.

    OF_REQUESTS: seeds and temperatures are the requests', and ``requests`` says which of them a row is.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * row_stride + columns, mask=columns < vocab_size, other=float("-inf")).to(tl.float32)
    if SAMPLE:
        request = tl.load(requests_ptr + row) if OF_REQUESTS else row
        temperature = tl.load(temperature_ptr + request)
        if temperature > 0.0:
            position = tl.load(positions_ptr + row).to(tl.int64)
            words = random_words_block(tl.load(seeds_ptr + request), position, first, BLOCK)
            x = tl.div_rn(x, tl.zeros_like(x) + temperature) + noise_block(words)
    # columns past the vocabulary are -inf with a higher index than any other
    best = tl.max((order_key(x).to(tl.int64) << 32) | (0x7FFFFFFF - columns).to(tl.int64), axis=0)
    tl.store(keys_ptr + row * tl.num_programs(1) + tl.program_id(1), best)


@triton.jit(do_not_specialize=["num_blocks"])
def _row_best_kernel(
    keys_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, out_ptr, num_blocks: tl.int64,
    BLOCK: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
):  # fmt: skip
    """The index of the row's best block maximum; -1 where a parameter is out of range."""
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCK)
    # past the end the last block is read again, which does not change a maximum
    keys = tl.load(keys_ptr + row * num_blocks + tl.minimum(blocks, num_blocks - 1))
    index = 0x7FFFFFFF - (tl.max(keys, axis=0) & 0xFFFFFFFF)
    valid = index >= 0
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)
        valid = valid & (temperature >= 0.0) & (temperature < float("inf"))
    if HAS_TOP_K:
        valid = valid & (tl.load(top_k_ptr + row) >= 0)
    if HAS_TOP_P:
        top_p = tl.load(top_p_ptr + row)
        valid = valid & (top_p > 0.0) & (top_p <= 1.0)
    if HAS_MIN_P:
        min_p = tl.load(min_p_ptr + row)
        valid = valid & (min_p >= 0.0) & (min_p <= 1.0)
    tl.store(out_ptr + row, tl.where(valid, index, -1))


_BLOCK_BEST, _ROW_BEST = FastKernel(_block_best_kernel), FastKernel(_row_best_kernel)


def launch_best(x: Tensor, *rows: Tensor | None) -> Tensor:
    """Argmax of ``x``; or given seeds, positions, temperature, top_k, top_p and min_p, Gumbel-max.

    The filters have been applied to ``x`` already; here they are only checked for being in range.
    """
    seeds, positions, temperature, *filters = (None if t is None else t.contiguous() for t in rows or (None,) * 6)
    return _launch_best(x, seeds, positions, temperature, None, (temperature, *filters))


def launch_best_of_requests(
    x: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor, requests: Tensor
) -> Tensor:
    """Gumbel-max for an engine, which keeps its requests' parameters in tables, and has checked them.

    Args:
        x: [num_tokens, vocab_size], with the filters applied.
        seeds: int64 [num_requests].
        positions: int32 or int64 [num_tokens].
        temperature: fp32 [num_requests].
        requests: int32 or int64 [num_tokens], the request of every row.
    """
    return _launch_best(x, seeds, positions, temperature, requests, (None,) * 4)


def _launch_best(
    x: Tensor, seeds: Tensor | None, positions: Tensor | None, temperature: Tensor | None, requests: Tensor | None,
    checked: tuple[Tensor | None, ...],
) -> Tensor:  # fmt: skip
    """``checked``: temperature, top_k, top_p and min_p of every row, or None."""
    num_tokens, vocab_size = x.shape
    out = x.new_empty(num_tokens, dtype=torch.int64)
    if num_tokens == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    keys = x.new_empty(num_tokens, num_blocks, dtype=torch.int64)
    _BLOCK_BEST(
        (num_tokens, num_blocks), x,
        (x, seeds, positions, temperature, requests, keys, x.stride(0), vocab_size),
        {
            "BLOCK": BLOCK, "SAMPLE": temperature is not None, "OF_REQUESTS": requests is not None,
            "num_warps": NUM_WARPS, "enable_fp_fusion": False,
        },
    )  # fmt: skip
    names = ("HAS_TEMPERATURE", "HAS_TOP_K", "HAS_TOP_P", "HAS_MIN_P")
    _ROW_BEST(
        (num_tokens,), x, (keys, *checked, out, num_blocks),
        {
            "BLOCK": triton.next_power_of_2(num_blocks),
            **{name: t is not None for name, t in zip(names, checked, strict=True)},
            "num_warps": 1,
        },
    )  # fmt: skip
    return out
