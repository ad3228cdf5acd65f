"""Markdown tables of the softmax benchmark: a line for each batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tables import race

SIZES = {"rows x width": "{0[rows]} x {0[width]}".format}


def full(result: Mapping[str, Any]) -> str:
    """A Markdown table for each op and dtype."""
    parts = []
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["op"], row["dtype"]) == (op, dtype)]
        parts += [f"**`{op}`, {dtype}**", "", *race(rows, SIZES), ""]
    return "\n".join(parts).rstrip()


def page(result: Mapping[str, Any], path: str) -> str:
    """``full``, and where the figures are from."""
    return (
        f"{full(result)}\n\nMicroseconds a launch in a CUDA graph, rows read from memory. Floor: the rows read and "
        f"written once, at the {result['copy_gbps']:.0f} GB/s of a copy. {result['device']}, torch {result['torch']} "
        f"(`benchmarks/results/{path}`)."
    )
