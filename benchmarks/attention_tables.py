"""Markdown tables of the attention benchmark: a line for each batch."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from tables import race

SIZES = {heading: itemgetter(heading.split()[0]) for heading in ("sequences", "queries of each", "keys of each")}


def full(result: Mapping[str, Any]) -> str:
    """Every model and batch."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in result["rows"]):
        parts += [f"**{model}**", "", *race([row for row in result["rows"] if row["model"] == model], SIZES), ""]
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
