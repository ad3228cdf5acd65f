"""Peers as a benchmark finds them: those that can be imported, and of those the ones that compute what ours does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch

import timing

Found = TypeVar("Found")


def load(loaders: Mapping[str, Callable[[], Found]]) -> tuple[dict[str, Found], dict[str, str]]:
    """What each loader gives, and for those that raise the reason."""
    found, missing = {}, {}
    for name, loader in loaders.items():
        try:
            found[name] = loader()
        except Exception as error:
            missing[name] = timing.reason(error)
    return found, missing


def sift(
    names: Iterable[str], output: Callable[[str], torch.Tensor], wanted: torch.Tensor, most: float
) -> tuple[dict[str, float], dict[str, str]]:
    """How far each contender's ``output`` is from ``wanted``; why those that failed or are off by ``most`` are out."""
    errors, failed = {}, {}
    for name in names:
        try:
            errors[name] = distance(output(name), wanted)
        except Exception as error:
            failed[name] = timing.reason(error)
            continue
        if not errors[name] < most:
            failed[name] = f"its result is off by {errors[name]:.2g} of the norm"
    return errors, failed


def distance(out: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference, as a share of the norm of ``wanted``."""
    return float((out.double() - wanted.double()).norm() / wanted.double().norm())
