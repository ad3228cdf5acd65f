"""What sampling takes: the checks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError, DeviceError, ShapeError
from ._gumbel import BLOCK
from ._library import check_dtype

__all__ = [
    "check_rows_of",
    "check_sampling",
    "check_values",
    "validate_argmax",
    "validate_noise",
    "validate_sample",
]

MAX_VOCAB = 65535 * BLOCK  # the second axis of a CUDA grid
_INTEGERS = ("seeds", "positions", "top_k", "tokens")


def check_rows_of(op: str, num_tokens: int, device: torch.device, **rows: Tensor | None) -> None:
    """Each of ``rows`` is None or [num_tokens] of the dtype its name asks for, on ``device``."""
    for name, tensor in rows.items():
        if tensor is None:
            continue
        check_dtype(op, name, tensor, (torch.int64 if name in _INTEGERS else torch.float32,))
        if tensor.shape != (num_tokens,):
            raise ShapeError(f"{op}: {name} has shape {tuple(tensor.shape)}, want ({num_tokens},), one value a token")
        if tensor.device != device:
            raise DeviceError(f"{op}: {name} is on {tensor.device}, want {device} where the others are")


def _check_vocab(op: str, vocab_size: int) -> None:
    if not 1 <= vocab_size <= MAX_VOCAB:
        raise ShapeError(f"{op}: the vocabulary has {vocab_size} entries, want 1 to {MAX_VOCAB}")


def validate_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> None:
    if seeds.dim() != 1:
        raise ShapeError(f"gumbel_noise: seeds has shape {tuple(seeds.shape)}, want [num_tokens]")
    check_rows_of("gumbel_noise", seeds.shape[0], seeds.device, seeds=seeds, positions=positions)
    _check_vocab("gumbel_noise", vocab_size)


def validate_argmax(x: Tensor, op: str = "argmax", name: str = "x") -> None:
    check_dtype(op, name, x)
    if x.dim() != 2:
        raise ShapeError(f"{op}: {name} has shape {tuple(x.shape)}, want [num_tokens, vocab_size]")
    _check_vocab(op, x.shape[1])


def validate_sample(logits: Tensor, *rows: Tensor | None) -> None:
    """``rows`` are seeds, positions, temperature, top_k, top_p and, if any, min_p."""
    validate_argmax(logits, "sample", "logits")
    names = ("seeds", "positions", "temperature", "top_k", "top_p", "min_p")
    check_rows_of("sample", logits.shape[0], logits.device, **dict(zip(names, rows, strict=False)))


def check_sampling(
    temperature: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None, min_p: Tensor | None = None
) -> None:
    """ArgumentError unless temperature is finite, it and top_k not negative, top_p in (0, 1] and min_p in [0, 1].

    For the host's copy of the parameters, before they go to a GPU, where ``sample`` does not wait to read them.
    """
    check_values("temperature", temperature, (temperature >= 0) & temperature.isfinite(), "finite and not negative")
    if top_k is not None:
        check_values("top_k", top_k, top_k >= 0, "not negative (0 keeps all)")
    if top_p is not None:
        check_values("top_p", top_p, (top_p > 0) & (top_p <= 1), "in (0, 1]")
    if min_p is not None:
        check_values("min_p", min_p, (min_p >= 0) & (min_p <= 1), "in [0, 1]")


def check_values(name: str, values: Tensor, good: Tensor, wanted: str, op: str = "sample") -> None:
    """ArgumentError, with the first of ``values`` [num_tokens] that is not ``good``, if one is not."""
    if not bool(good.all()):
        row = int((~good).nonzero()[0])
        raise ArgumentError(f"{op}: {name}[{row}] is {values[row].item()}, want it {wanted}")
