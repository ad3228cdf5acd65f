"""Bit classes of the batch size: which sizes give the same bits, with exact thresholds, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable

__all__ = ["bisect_changes", "describe", "modulus", "sizes_to_try"]

DENSE = 70  # every size up to here is tried: enough to see classes by M mod 32
MANY_RUNS = 8  # fewer changes than this are thresholds rather than a period
MAX_CHANGES = 32


def sizes_to_try(largest: int, processors: int) -> list[int]:
    """Sizes at which launch heuristics change: powers of two, multiples of the processors, odd ones.

    Args:
        largest: the largest size.
        processors: SMs of the GPU, or threads of the CPU.
    """
    powers = {2**n + d for n in range(1, 20) for d in (-1, 0, 1)} | {3 * 2**n for n in range(12)}
    multiples = {processors * k + d for k in (1, 2, 4, 8, 16) for d in (-1, 0, 1)}
    odd = {100, 101, 200, 300, 333, 500, 777, 1000, 1500, 2000, 3000, 5000, 7777}
    found = set(range(1, min(DENSE, largest) + 1)) | powers | multiples | odd | {largest}
    return sorted(size for size in found if 1 <= size <= largest)


def bisect_changes(
    class_of: Callable[[int], object], sizes: Iterable[int], is_over: Callable[[], bool]
) -> tuple[dict[int, object], bool]:
    """The class of every size tried, with every change between two of ``sizes`` followed to the exact size.

    Between two sizes of one class nothing is tried. Where classes follow a remainder, or after ``MAX_CHANGES`` changes,
    no more are followed. The second value is false if ``is_over()`` ended it.
    """
    found: dict[int, object] = {}
    for size in sorted(sizes):
        if is_over():
            return found, False
        found[size] = class_of(size)
    if modulus(found) is not None:
        return found, True
    changed = [(a, b) for a, b in zip(list(found), list(found)[1:], strict=False) if found[a] != found[b] and b - a > 1]
    for low, high in changed[:MAX_CHANGES]:
        if is_over():
            return dict(sorted(found.items())), False
        _bisect(class_of, found, low, high)
    return dict(sorted(found.items())), True


def _bisect(class_of: Callable[[int], object], found: dict[int, object], low: int, high: int) -> None:
    """Follow every change between two sizes whose classes differ."""
    if high - low <= 1 or found[low] == found[high]:
        return
    middle = (low + high) // 2
    found[middle] = class_of(middle)
    _bisect(class_of, found, low, middle)
    _bisect(class_of, found, middle, high)


def modulus(found: dict[int, object]) -> int | None:
    """The smallest d, from 2 to 64, for which a size's class is that of its remainder by d; None for few changes."""
    if len(_runs(found)) <= MANY_RUNS:
        return None
    for d in range(2, 65):
        classes: dict[int, object] = {}
        if all(classes.setdefault(size % d, of) == of for size, of in found.items()) and len(found) > 1.5 * d:
            return d
    return None


def describe(found: dict[int, object]) -> str:
    """Such as "1-255 | 256-4096", "by M mod 32" or "every size another"."""
    if len(set(found.values())) == len(found) > 2:
        return "every size another"
    d = modulus(found)
    if d is not None:
        return f"by M mod {d}"
    ranges: dict[object, list[str]] = {}
    for first, last, of in _runs(found):
        ranges.setdefault(of, []).append(str(first) if first == last else f"{first}-{last}")
    return " | ".join(", ".join(_shortened(of)) for of in ranges.values())


def _shortened(ranges: list[str]) -> list[str]:
    return ranges if len(ranges) <= 6 else [*ranges[:5], f"and {len(ranges) - 5} more ranges"]


def _runs(found: dict[int, object]) -> list[tuple[int, int, object]]:
    """Sizes next to one another of one class, as (first, last, class)."""
    runs: list[tuple[int, int, object]] = []
    for size, of in sorted(found.items()):
        if runs and runs[-1][2] == of:
            runs[-1] = (runs[-1][0], size, of)
        else:
            runs.append((size, size, of))
    return runs
