"""Two results that should have the same bits: how they differ."""

from __future__ import annotations

import math

import torch

from ..numerics import as_bits, ulp_distance
from .report import Difference

__all__ = ["difference"]


def difference(output: str, expected: torch.Tensor, found: torch.Tensor) -> Difference | None:
    """How ``found`` differs from ``expected`` in its bits, or None; another shape or dtype is a difference too.

    Args:
        output: the name to give it.
        expected: a tensor of any shape and dtype.
        found: what should equal it.
    """
    if expected.shape != found.shape or expected.dtype != found.dtype:
        wanted, seen = (f"{tuple(t.shape)} {t.dtype}" for t in (expected, found))
        return Difference(output, (), wanted, seen, max(expected.numel(), found.numel()), expected.numel())
    if expected.is_complex():
        expected, found = torch.view_as_real(expected), torch.view_as_real(found)
    differ = as_bits(expected) != as_bits(found)
    elements = int(differ.sum())
    if elements == 0:
        return None
    index = tuple(int(i) for i in differ.nonzero()[0])
    ulps = largest = None
    if expected.is_floating_point():
        a, b = expected[differ], found[differ]
        ulps = int(ulp_distance(a, b).max()) if a.element_size() > 1 else None  # fp8 lacks isnan
        gaps = (a.double() - b.double()).abs()
        finite = gaps[gaps.isfinite()]
        largest = float(finite.max()) if finite.numel() else None
    value, other = (_plain(side[index].item()) for side in (expected, found))
    return Difference(output, index, value, other, elements, expected.numel(), ulps, largest)


def _plain(value: float) -> float | str:
    """A number that JSON can hold, or its name."""
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
