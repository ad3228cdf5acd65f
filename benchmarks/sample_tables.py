"""Markdown tables of the sampling benchmark: a line for each batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tables import race

SIZES = {"asked for": "{0[ask]}".format, "rows x vocabulary": "{0[rows]} x {0[width]}".format}


def full(result: Mapping[str, Any]) -> str:
    """A Markdown table for each dtype."""
    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["dtype"] == dtype]
        parts += [f"**`sample`, {dtype}**", "", *race(rows, SIZES), ""]
    return "\n".join(parts).rstrip()


def page(result: Mapping[str, Any], path: str) -> str:
    """``full``, and where the figures are from."""
    asks = (
        f"{ask}: {', '.join(f'{name} {value}' for name, value in filters.items() if value is not None)}"
        for ask, filters in result["asks"].items()
        if any(value is not None for value in filters.values())
    )
    return (
        f"{full(result)}\n\nMicroseconds a launch in a CUDA graph, logits read from memory; {'; '.join(asks)}. Floor: "
        f"the logits read once, at the {result['copy_gbps']:.0f} GB/s of a copy. {result['device']}, torch "
        f"{result['torch']} (`benchmarks/results/{path}`)."
    )
