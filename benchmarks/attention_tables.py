"""Markdown tables of the attention benchmark: a line for each batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tables import compared, title

Row = Mapping[str, Any]


def full(result: Mapping[str, Any]) -> str:
    """Every model and batch."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in result["rows"]):
        parts += [f"**{model}**", "", *_table([row for row in result["rows"] if row["model"] == model]), ""]
    missing = {peer: why for row in result["rows"] for peer, why in row["missing"].items()}
    parts += [f"Not everywhere: {peer} ({why})." for peer, why in missing.items()]
    return "\n".join(parts).rstrip()


def page(result: Mapping[str, Any], path: str) -> str:
    """``full``, and where the figures are from."""
    return (
        f"{full(result)}\n\nMicroseconds a launch in a CUDA graph, keys and values read from memory. Floor: the cache, "
        f"queries and output once at the {result['copy_gbps']:.0f} GB/s of a copy, or the products at the GPU's dense "
        f"peak, whichever takes longer. {result['device']}, torch {result['torch']} (`benchmarks/results/{path}`)."
    )


def _table(rows: list[Row]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    head = ["sequences", "queries of each", "keys of each", "floor", *map(title, names), "best peer", "ratio"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        sizes = [str(row[name]) for name in ("sequences", "queries", "keys")]
        cells = [*sizes, f"{row['floor_us']:.2f}", *compared(row["times"], names)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
