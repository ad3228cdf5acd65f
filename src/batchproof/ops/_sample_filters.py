"""What ``sample`` keeps of a row: min-p, then top-k, then top-p, all on the scaled logits."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _exact
from .softmax import softmax

__all__ = ["filter_logits", "scaled"]

MASS_BITS = 40  # top-p adds probabilities as multiples of 2**-40; one under 2**-41 counts as none


def scaled(logits: Tensor, temperature: Tensor) -> Tensor:
    """``logits / temperature`` in fp32, by 1 in greedy rows; NaN as -inf, -0 as +0 (a radix sort may part them)."""
    divisor = torch.where(temperature > 0, temperature, torch.ones_like(temperature)).unsqueeze(1)
    return (logits.float() / divisor).nan_to_num_(-torch.inf, torch.inf, -torch.inf).add_(0.0)


def filter_logits(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None = None
) -> Tensor:
    """``logits`` with -inf at what min_p, top_k and top_p remove; a row that asks for nothing comes back as it was.

    The ranking is that of the scaled logits, which is that of the probabilities before they are rounded. It takes a
    sort; min_p alone, which compares with a threshold, does not.
    """
    x = scaled(logits, temperature)
    greedy = (temperature == 0).unsqueeze(1)
    floor = None if min_p is None else _least_kept(x, min_p)
    if top_k is None and top_p is None:
        return logits if floor is None else logits.masked_fill((x < floor) & ~greedy, -torch.inf)
    ranked, index = x.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    kept = torch.ones_like(ranked, dtype=torch.bool) if floor is None else ranked >= floor
    if top_k is not None:
        kept &= (rank < top_k.unsqueeze(1)) | (top_k == 0).unsqueeze(1)
    if top_p is not None:
        # two infinities have no difference: the largest finite number takes all the mass just as well
        finite = ranked.clamp(max=torch.finfo(torch.float32).max).masked_fill_(~kept, -torch.inf)
        share = softmax(finite).nan_to_num_(0.0)  # NaN: a row of -inf
        mass = (share.double() * 2.0**MASS_BITS).round_().to(torch.int64)
        wanted = (top_p.double() * 2.0**MASS_BITS).ceil_().to(torch.int64)  # at least 1, so the first is kept
        before = mass.cumsum(-1) - mass
        kept &= (before < wanted.unsqueeze(1)) | (top_p == 1).unsqueeze(1)
    kept |= greedy
    removed = torch.ones_like(kept).scatter_(1, index, ~kept)
    return logits.masked_fill(removed, -torch.inf)


def _least_kept(x: Tensor, min_p: Tensor) -> Tensor:
    """``max(x) + log(min_p)`` of each row in float64 [num_tokens, 1]; -inf where min_p is 0, which keeps all.

    A probability is a share min_p of the largest where the difference of the two logits is log(min_p): there is no
    softmax to round. log(1) is exactly 0, so 1 keeps the largest and its equals.
    """
    wide = min_p.double()
    logarithm = _exact.log(wide) if min_p.device.type == "cpu" else wide.log()
    floor = x.amax(-1).double() + logarithm
    return floor.masked_fill_(min_p == 0, -torch.inf).unsqueeze(1)
