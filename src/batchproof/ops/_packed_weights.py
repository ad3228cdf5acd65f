"""Weights in the form the exact CPU product wants them in, kept from call to call."""

from __future__ import annotations

import threading

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..numerics import as_bits
from . import _exact

__all__ = ["packed_transpose"]

LIMIT = 2**30  # bytes of packed weights that are kept; weights past it are packed again at every call


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
            if size + sum(c.nbytes for _, other in self._kept.values() for c in other.chunks) <= LIMIT:
                self._kept[weight] = (_as_words(weight).clone(), packed)
        return packed


def _as_words(weight: torch.Tensor) -> torch.Tensor:
    """The bits of ``weight``, eight bytes at a time if they can be had without a copy: the quickest to compare."""
    if weight.is_contiguous() and weight.nbytes % 8 == 0 and weight.data_ptr() % 8 == 0:
        return weight.detach().view(-1).view(torch.int64)
    return as_bits(weight.detach())


_packed_weights = _PackedWeights()
packed_transpose = _packed_weights.get
