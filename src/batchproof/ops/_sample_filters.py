"""What ``sample`` keeps of a row: min-p, then top-k, then top-p, all on the scaled logits x = logits / temperature.

The ranking is by value, then by lower index; -inf and NaN are never kept. With m the row's largest x,

    min_p   keeps the entries with x >= m + log(min_p), compared in float64;
    top_k   keeps the first top_k of those;
    top_p   keeps of what is left every entry before which there is less than ceil(top_p * total) of the total weight.

An entry weighs floor(exp(x - m) * 2**40): x - m and exp in fp32, where an infinity counts as the largest finite number;
sums in int64, which are exact; the product with top_p in float64. So there is no order to a sum, and no softmax.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _exact
from ._filter_kernel import UNIT, launch_filter, log_share

__all__ = ["filter_by_sort", "filter_logits", "scaled"]

LARGEST = torch.finfo(torch.float32).max


def scaled(logits: Tensor, temperature: Tensor) -> Tensor:
    """``logits / temperature`` in fp32, by 1 in greedy rows; NaN as -inf, -0 as +0 (a radix sort may part them)."""
    divisor = torch.where(temperature > 0, temperature, torch.ones_like(temperature)).unsqueeze(1)
    return (logits.float() / divisor).nan_to_num_(-torch.inf, torch.inf, -torch.inf).add_(0.0)


def filter_logits(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None = None
) -> Tensor:
    """``logits`` with -inf at what min_p, top_k and top_p remove; a row that asks for nothing comes back as it was."""
    if logits.is_cuda:
        return launch_filter(logits, temperature, top_k, top_p, min_p)
    return filter_by_sort(logits, temperature, top_k, top_p, min_p)


def filter_by_sort(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None = None,
    exp: Callable[[Tensor], Tensor] = _exact.exp,
) -> Tensor:
    """The definition with any fp32 ``exp``. min_p alone, which compares with a threshold, takes no sort."""
    x = scaled(logits, temperature)
    nothing = torch.zeros_like(temperature, dtype=torch.bool)
    by_share = nothing if min_p is None else min_p > 0
    by_count = nothing if top_k is None else (top_k > 0) & (top_k < logits.shape[1])
    by_weight = nothing if top_p is None else top_p < 1
    asked = ((temperature > 0) & (by_share | by_count | by_weight)).unsqueeze(1)
    floor = -LARGEST if min_p is None else _least_kept(x, min_p)
    if top_k is None and top_p is None:
        return logits.masked_fill((x < floor) & asked, -torch.inf)
    ranked, index = x.sort(dim=-1, descending=True, stable=True)
    kept = ranked >= floor
    if top_k is not None:
        rank = torch.arange(logits.shape[1], device=logits.device)
        kept &= (rank < top_k.unsqueeze(1)) | ~by_count.unsqueeze(1)
    if top_p is not None:
        finite = ranked.clamp(-LARGEST, LARGEST)
        weight = (exp(finite - finite[:, :1]) * UNIT).to(torch.int64).masked_fill_(~kept, 0)
        total = weight.sum(-1, keepdim=True).double()
        wanted = (top_p.double().unsqueeze(1) * total).ceil_().to(torch.int64).clamp_(min=1)
        kept &= (weight.cumsum(-1) - weight < wanted) | ~by_weight.unsqueeze(1)
    removed = torch.ones_like(kept).scatter_(1, index, ~kept)
    return logits.masked_fill(removed & asked, -torch.inf)


def _least_kept(x: Tensor, min_p: Tensor) -> Tensor:
    """``max(x) + log(min_p)`` of each row in float64 [num_tokens, 1]; the lowest finite number where min_p is 0.

    A probability is a share min_p of the largest where the difference of the two logits is log(min_p): there is no
    softmax to round. log(1) is exactly 0, so 1 keeps the largest and its equals.
    """
    floor = x.amax(-1).double() + log_share(min_p)
    return floor.masked_fill_(min_p == 0, -LARGEST).clamp_(min=-LARGEST).unsqueeze(1)
