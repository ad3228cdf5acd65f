"""The filters of ``sample`` as a kernel, a program a row: thresholds are searched for, and nothing is sorted.

What a row keeps is a run of its ranking. A key, an int32 that orders as the scaled logits do, says where the run ends,
and a column which of the entries that tie there are in it. A threshold is the largest key from which on the entries'
counts or int64 weights reach what is wanted; such sums have no order, so every way of searching finds the same one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _exact
from ._gumbel_max import order_key
from ._triton import device_guard, tl, triton

__all__ = ["UNIT", "launch_filter", "log_share"]

UNIT = 2.0**40  # top-p counts weights in units of 1 / UNIT of the largest entry's; less than one is none
BLOCK = 2048  # columns read at a time; any cut gives the same result
NUM_WARPS = 16
_UNIT = tl.constexpr(UNIT)
_LEAST = tl.constexpr(-0x80000000)  # below every key: a threshold that keeps all
_MINUS_INF = tl.constexpr(-0x7F800001)  # the keys of -inf and of inf: those of finite values lie between
_INF = tl.constexpr(0x7F800000)
_LAST = tl.constexpr(0x7FFFFFFF)  # no column comes after it


def log_share(min_p: Tensor) -> Tensor:
    """``log(min_p)`` in float64; -inf where it is 0."""
    wide = min_p.double()
    return (_exact.log(wide) if min_p.device.type == "cpu" else wide.log()).masked_fill_(min_p == 0, -torch.inf)


@triton.jit
def _value(key):
    """The fp32 number of a key; the largest finite one for inf and above."""
    key = tl.minimum(key.to(tl.int32), _INF - 1)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _weight(key, top):
    """``exp(x - top)`` in units, int64; two infinities have no difference, so they weigh as the largest finite one."""
    return (tl.exp(_value(key) - top) * _UNIT).to(tl.int64)


@triton.jit
def _row_keys(x_ptr, columns, vocab_size, divisor):
    """The keys of scaled logits, and the logits; past the vocabulary they are -inf, which no filter counts."""
    logits = tl.load(x_ptr + columns, mask=columns < vocab_size, other=float("-inf"))
    x = logits.to(tl.float32)
    return order_key(tl.div_rn(x, tl.zeros_like(x) + divisor)), logits


@triton.jit
def _amounts(keys, top, WEIGHTS: tl.constexpr):
    """What entries add to a sum: int64 weights, or int32 ones."""
    if WEIGHTS:
        return _weight(keys, top)
    else:
        return tl.zeros_like(keys) + 1


@triton.jit
def _share(top_p, total):
    """The weight that makes up a share of the total; at least 1, so that the first is kept."""
    return tl.maximum(tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def _narrow(low, high, above, key1, key2, key3, sum1, sum2, sum3, wanted):
    """The bracket: the sum from low on reaches what is wanted; that from high on, which is ``above``, does not."""
    is1, is2, is3 = sum1 >= wanted, sum2 >= wanted, sum3 >= wanted
    low = tl.maximum(low, tl.where(is3, key3, tl.where(is2, key2, tl.where(is1, key1, low))))
    high = tl.minimum(high, tl.where(is3, high, tl.where(is2, key3, tl.where(is1, key2, key1))))
    above = tl.where(is3, above, tl.where(is2, sum3, tl.where(is1, sum2, sum1)))
    return low, high, above


@triton.jit
def _bracket(x_ptr, vocab_size, divisor, base, top_key, top, wanted, top_p, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    """The total from ``base`` on, what is wanted of it and a bracket: thresholds tend to be few nats below the top."""
    columns = tl.arange(0, BLOCK)
    sums = tl.full([BLOCK], 0, tl.int64 if WEIGHTS else tl.int32)
    sums1, sums2, sums3 = sums, sums, sums
    key1, key2, key3 = order_key(top - 14.0), order_key(top - 8.0), order_key(top - 4.0)
    key0 = base.to(tl.int32)
    key1, key2, key3 = tl.maximum(key1, key0), tl.maximum(key2, key0), tl.maximum(key3, key0)
    for start in range(0, vocab_size, BLOCK):
        keys, _ = _row_keys(x_ptr, start + columns, vocab_size, divisor)
        amounts = _amounts(keys, top, WEIGHTS)
        sums += tl.where(keys >= key0, amounts, 0)
        sums1 += tl.where(keys >= key1, amounts, 0)
        sums2 += tl.where(keys >= key2, amounts, 0)
        sums3 += tl.where(keys >= key3, amounts, 0)
    total = tl.sum(sums, axis=0).to(tl.int64)
    sum1, sum2, sum3 = tl.sum(sums1, axis=0), tl.sum(sums2, axis=0), tl.sum(sums3, axis=0)
    if WEIGHTS:
        wanted = _share(top_p, total)
    low, high, above = _narrow(
        base, top_key + 1, tl.full([], 0, tl.int64),
        key1.to(tl.int64), key2.to(tl.int64), key3.to(tl.int64),
        sum1.to(tl.int64), sum2.to(tl.int64), sum3.to(tl.int64), wanted,
    )  # fmt: skip
    return total, wanted, low, high, above


@triton.jit
def _list_keys(x_ptr, vocab_size, divisor, least, list_ptr, BLOCK: tl.constexpr):
    """List the row's keys from ``least`` on; how many each of BLOCK lanes has, and the most that one has.

    Lane j takes columns j, j + BLOCK, ... and number i of its keys lies at i * BLOCK + j, which is no later than its
    column: no lane waits for another, as it would for a place in a single file.
    """
    columns = tl.arange(0, BLOCK)
    lengths = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        keys, _ = _row_keys(x_ptr, start + columns, vocab_size, divisor)
        listed = keys >= least.to(tl.int32)
        tl.store(list_ptr + lengths * BLOCK + columns, keys, mask=listed)
        lengths += listed.to(tl.int32)
    tl.debug_barrier()  # other threads may read it
    return lengths, tl.max(lengths, axis=0)


@triton.jit
def _list_sums(
    list_ptr, lengths, most, low, key1, key2, key3, high, top, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The listed counts or weights from each of three keys on; the least key from low on and the largest below high."""
    columns = tl.arange(0, BLOCK)
    sums1 = tl.full([BLOCK], 0, tl.int64 if WEIGHTS else tl.int32)
    sums2, sums3 = sums1, sums1
    least, largest = tl.full([BLOCK], _LAST, tl.int32), tl.full([BLOCK], _MINUS_INF, tl.int32)
    low, key1, key2 = low.to(tl.int32), key1.to(tl.int32), key2.to(tl.int32)
    key3, high = key3.to(tl.int32), high.to(tl.int32)
    for number in range(0, most):
        keys = tl.load(list_ptr + number * BLOCK + columns, mask=number < lengths, other=_MINUS_INF)
        amounts = _amounts(keys, top, WEIGHTS)
        sums1 += tl.where(keys >= key1, amounts, 0)
        sums2 += tl.where(keys >= key2, amounts, 0)
        sums3 += tl.where(keys >= key3, amounts, 0)
        least = tl.where((keys >= low) & (keys < least), keys, least)
        largest = tl.where((keys < high) & (keys > largest), keys, largest)
    sum1, sum2, sum3 = tl.sum(sums1, axis=0), tl.sum(sums2, axis=0), tl.sum(sums3, axis=0)
    least, largest = tl.min(least, axis=0), tl.max(largest, axis=0)
    return sum1.to(tl.int64), sum2.to(tl.int64), sum3.to(tl.int64), least.to(tl.int64), largest.to(tl.int64)


@triton.jit
def _threshold(list_ptr, lengths, most, low, high, above, wanted, top, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key from which on the sum reaches ``wanted``, and the sum above it.

    A bracket is cut where the value is halfway, and its halves where the key is: at worst it is left with half. Its
    ends then move to the nearest listed keys, which changes no sum: a bracket of few entries takes few steps.
    """
    while high - low > 1:
        halfway = order_key(0.5 * _value(low) + 0.5 * _value(high)).to(tl.int64)
        key2 = tl.minimum(tl.maximum(halfway, low + 1), high - 1)
        key1 = low + (key2 - low) // 2
        key3 = key2 + (high - key2) // 2
        sum1, sum2, sum3, least, largest = _list_sums(
            list_ptr, lengths, most, low, key1, key2, key3, high, top, WEIGHTS, BLOCK
        )
        low, high, above = _narrow(least, largest + 1, above, key1, key2, key3, sum1, sum2, sum3, wanted)
    return low, above


@triton.jit
def _column_of_tie(x_ptr, vocab_size, divisor, key, count, BLOCK: tl.constexpr):
    """The column of entry number ``count``, from 1, of those with this key; there are as many."""
    start, before, column = 0, tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    while before < count:
        columns = start + tl.arange(0, BLOCK)
        keys, _ = _row_keys(x_ptr, columns, vocab_size, divisor)
        ties = (keys == key.to(tl.int32)).to(tl.int32)
        here = tl.sum(ties, axis=0)
        if before + here >= count:
            number = before + tl.cumsum(ties, axis=0)
            column = tl.max(tl.where((ties > 0) & (number == count), columns, 0), axis=0)
        before += here
        start += BLOCK
    return column


@triton.jit
def _search(
    x_ptr, vocab_size, divisor, base, top_key, by_count, top_k, by_weight, top_p, list_ptr, BLOCK: tl.constexpr
):  # fmt: skip
    """Of the keys from ``base`` on, what top_k and then top_p leave: everything above a key, and its ties to a column.

    The list has all that may be left. Of the ties at top-k's threshold only those that it left have a weight.
    """
    top = _value(top_key)
    if by_count:
        total, wanted, low, high, above = _bracket(
            x_ptr, vocab_size, divisor, base, top_key, top, top_k, top_p, False, BLOCK
        )
    else:
        total, wanted, low, high, above = _bracket(
            x_ptr, vocab_size, divisor, base, top_key, top, top_k, top_p, True, BLOCK
        )
    lengths, most = _list_keys(x_ptr, vocab_size, divisor, low, list_ptr, BLOCK)
    key, ties = base - 1, tl.zeros_like(total)
    if by_count:
        if total > top_k:
            key, above = _threshold(list_ptr, lengths, most, low, high, above, top_k, top, False, BLOCK)
            ties = top_k - above
        low, high, above = tl.maximum(key, base), top_key + 1, tl.zeros_like(total)
        if by_weight:
            next_key = key + 1
            left, _, _, _, _ = _list_sums(
                list_ptr, lengths, most, next_key, next_key, next_key, next_key, next_key, top, True, BLOCK
            )
            wanted = _share(top_p, left + ties * _weight(key, top))
    if by_weight:
        key, above = _threshold(list_ptr, lengths, most, low, high, above, wanted, top, True, BLOCK)
        weight = _weight(key, top)
        ties = (wanted - above + weight - 1) // weight
    next_key = key + 1
    at, past, _, _, _ = _list_sums(list_ptr, lengths, most, key, key, next_key, next_key, next_key, top, False, BLOCK)
    column = tl.where(ties > 0, _LAST, -1)
    if (ties > 0) & (ties < at - past):
        column = _column_of_tie(x_ptr, vocab_size, divisor, key, ties, BLOCK)
    tl.debug_barrier()  # the list may lie where the result is written
    return key, column


@triton.jit
def _filter_kernel(
    x_ptr, temperature_ptr, top_k_ptr, top_p_ptr, log_share_ptr, list_ptr, out_ptr, row_stride: tl.int64, vocab_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its largest value, the thresholds that it asks for, and a copy with -inf at what they remove."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * row_stride
    columns = tl.arange(0, BLOCK)
    temperature = tl.load(temperature_ptr + row)
    drawn = temperature > 0.0
    divisor = tl.where(drawn, temperature, 1.0)
    top_k = tl.full([], 0, tl.int64)
    top_p = tl.full([], 1.0, tl.float32)
    share = tl.full([], float("-inf"), tl.float64)
    if top_k_ptr is not None:
        top_k = tl.load(top_k_ptr + row)
    if top_p_ptr is not None:
        top_p = tl.load(top_p_ptr + row)
    if log_share_ptr is not None:
        share = tl.load(log_share_ptr + row)
    by_count, by_weight = drawn & (top_k > 0) & (top_k < vocab_size), drawn & (top_p < 1.0)
    by_floor = drawn & (share > float("-inf"))
    key, column = tl.full([], _LEAST, tl.int64), tl.full([], -1, tl.int32)
    if by_count | by_weight | by_floor:
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            inside = start + columns < vocab_size
            x = tl.load(x_ptr + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            largest = tl.maximum(largest, tl.where(x != x, float("-inf"), x))
        top = tl.div_rn(tl.max(largest, axis=0), divisor)  # a quotient that is rounded keeps the order
        base = tl.full([], _MINUS_INF + 1, tl.int64)
        if by_floor:
            floor = top.to(tl.float64) + share
            near = floor.to(tl.float32)
            base = tl.maximum(base, order_key(near).to(tl.int64) + (near.to(tl.float64) < floor).to(tl.int64))
        top_key = order_key(top).to(tl.int64)
        key = base - 1
        if (by_count | by_weight) & (top_key >= base):
            key, column = _search(
                x_ptr, vocab_size, divisor, base, top_key, by_count, top_k, by_weight, top_p,
                list_ptr + row * vocab_size, BLOCK,
            )  # fmt: skip
    for start in range(0, vocab_size, BLOCK):
        keys, logits = _row_keys(x_ptr, start + columns, vocab_size, divisor)
        kept = (keys > key.to(tl.int32)) | ((keys == key.to(tl.int32)) & (start + columns <= column))
        result = tl.where(kept, logits, tl.full([BLOCK], float("-inf"), tl.float32).to(logits.dtype))
        tl.store(out_ptr + row * vocab_size + start + columns, result, mask=start + columns < vocab_size)


def launch_filter(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None = None
) -> Tensor:
    """Run the kernel: what ``filter_logits`` returns, contiguous."""
    num_tokens, vocab_size = logits.shape
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if num_tokens == 0:
        return out
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    # an int32 an entry to list keys in: the result's own memory, where its elements are as wide
    keys = out.view(torch.int32) if out.element_size() == 4 else torch.empty_like(out, dtype=torch.int32)
    given = (temperature, top_k, top_p, None if min_p is None else log_share(min_p))
    with device_guard(logits):
        _filter_kernel[(num_tokens,)](
            logits, *(None if t is None else t.contiguous() for t in given), keys, out, logits.stride(0), vocab_size,
            BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out
