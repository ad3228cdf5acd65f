"""Markdown tables of the softmax benchmark: a line for each batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tables import compared, title


def full(result: Mapping[str, Any]) -> str:
    """A Markdown table for each op and dtype."""
    parts = []
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["op"], row["dtype"]) == (op, dtype)]
        names = list(dict.fromkeys(name for row in rows for name in row["times"]))
        parts += [f"**`{op}`, {dtype}**", ""]
        parts.append(f"| rows x width | floor | {' | '.join(map(title, names))} | best peer | ratio |")
        parts.append("|---" * (len(names) + 4) + "|")
        for row in rows:
            shape = f"{row['rows']} x {row['width']}"
            cells = [shape, f"{row['floor_us']:.2f}", *compared(row["times"], names)]
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def page(result: Mapping[str, Any], path: str) -> str:
    """``full``, and where the figures are from."""
    return (
        f"{full(result)}\n\nMicroseconds a launch in a CUDA graph, rows read from memory. Floor: the rows read and "
        f"written once, at the {result['copy_gbps']:.0f} GB/s of a copy. {result['device']}, torch {result['torch']} "
        f"(`benchmarks/results/{path}`)."
    )
