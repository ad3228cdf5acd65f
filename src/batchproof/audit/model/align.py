"""Cutting one request's numbers out of a tensor that a run in company, or on a chunk, has made.

A tensor of the run alone and its counterpart differ in the sizes of some axes. Each size has a role: requests, tokens,
keys. A layout knows the sizes that roles have in either run, and so which part of an axis is the request's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch

from ...numerics import bits_equal
from ..compare import difference
from ..report import Difference

__all__ = ["Chunk", "Company", "Layout", "Span", "compare", "largest_gap"]

Cut = tuple[slice, slice]
_ALL = slice(None)


class Layout(Protocol):
    """Where a request is on an axis, given the axis's size alone and in the other run."""

    def cuts(self, alone: int, other: int) -> list[Cut]:
        """The parts of both axes that may correspond; none if no role has these sizes."""
        ...


@dataclass(frozen=True)
class Span:
    """Tokens of a run in company whose requests have several lengths.

    Attributes:
        length: tokens of the request.
        padded: tokens of each request, padding on the left included.
        offset: tokens of the requests before it.
        total: tokens of all requests, without padding.
    """

    length: int
    padded: int
    offset: int
    total: int


@dataclass(frozen=True)
class Company:
    """A request at ``place`` among ``batch`` requests; ``spans`` if lengths differ: of queries, of keys."""

    batch: int = 1
    place: int = 0
    spans: tuple[Span, ...] = ()

    def cuts(self, alone: int, other: int) -> list[Cut]:
        """The whole axis if its size is the same; else one request's block, the last tokens of it, or its run."""
        if alone == other:
            return [(_ALL, _ALL)]
        found: list[slice] = []
        if other == alone * self.batch:  # requests outermost, as is usual; or innermost
            found.append(slice(self.place * alone, (self.place + 1) * alone))
            if alone > 1:
                found.append(slice(self.place, None, self.batch))
        for span in self.spans:
            if alone != span.length:
                continue
            if other == span.padded:
                found.append(slice(other - alone, other))
            if other == span.padded * self.batch:
                end = (self.place + 1) * span.padded
                found.append(slice(end - alone, end))
            if other == span.total:
                found.append(slice(span.offset, span.offset + alone))
        return [(_ALL, cut) for cut in found]


@dataclass(frozen=True)
class Chunk:
    """Tokens ``start`` to ``end`` of the ``length`` that were computed whole; keys are those up to ``end``."""

    start: int
    end: int
    length: int

    def cuts(self, alone: int, other: int) -> list[Cut]:
        """The whole axis if its size is the same; else the chunk's tokens, or all keys up to its end."""
        if alone == other:
            return [(_ALL, _ALL)]
        if alone != self.length:
            return []
        sizes = {self.end - self.start: slice(self.start, self.end), self.end: slice(0, self.end)}
        return [(sizes[other], _ALL)] if other in sizes else []


def compare(name: str, alone: torch.Tensor, other: torch.Tensor, layout: Layout) -> Difference | str | None:
    """How the request's part of ``other`` differs from ``alone``; None if it does not; why, if that cannot be told.

    Where sizes leave two ways of cutting, equal bits under one of them settle it: two parts of different contents do
    not agree by chance. If neither agrees, the closer one is compared.
    """
    if alone.layout is not torch.strided or other.layout is not torch.strided:
        return f"layout {other.layout}"
    pairs = list(_parts(alone, other, layout))
    if not pairs:
        return f"shape {tuple(alone.shape)} against {tuple(other.shape)}: which part corresponds is not known"
    if any(bits_equal(a, b) for a, b in pairs):
        return None
    return difference(name, *min(pairs, key=lambda pair: _distance(*pair)))


def largest_gap(alone: torch.Tensor, other: torch.Tensor, layout: Layout) -> float | None:
    """The largest absolute difference of the request's part, relative to its largest value; None if there is none."""
    pairs = [(a, b) for a, b in _parts(alone, other, layout) if a.numel()]
    gaps = [_distance(a, b) / max(float(a.double().abs().max()), 1e-300) for a, b in pairs]
    return min(filter(math.isfinite, gaps), default=None)


def _parts(alone: torch.Tensor, other: torch.Tensor, layout: Layout) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if alone.dim() != other.dim():
        return
    for cuts in product(*map(layout.cuts, alone.shape, other.shape)):
        yield alone[tuple(a for a, _ in cuts)], other[tuple(b for _, b in cuts)]


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape or a.numel() == 0:
        return math.inf
    gap = float((a.double() - b.double()).abs().max())
    return math.inf if math.isnan(gap) else gap
