"""Markdown tables of the linear layers' benchmark: sums over the products of a model, for every number of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tables import OURS, best_peer

Row = Mapping[str, Any]
EARLY = f"{OURS}, static weights"  # launched as an engine does that has declared its weights static
NAMES = {OURS: "batchproof", EARLY: "batchproof, static weights"}


def full(results: Sequence[Mapping[str, Any]]) -> str:
    """Every format and model. Of several results, contenders of the later ones are added to the rows of the first."""
    rows = [dict(row) for row in results[0]["rows"]]
    for result in results[1:]:
        more = {_key(row): row for row in result["rows"]}
        label = "batch-invariant" if result["vllm_batch_invariant"] == "1" else "again"
        for row in rows:
            times = more.get(_key(row), {"times": {}})["times"]
            row["times"] = row["times"] | {f"{n}, {label}": t for n, t in times.items() if n == "vLLM CUTLASS"}
    parts = []
    for form, model in dict.fromkeys((row["format"], row["model"]) for row in rows):
        chosen = [row for row in rows if (row["format"], row["model"]) == (form, model)]
        parts += [f"**{form}, {model}**: {_products(chosen)}", "", *_table(chosen), ""]
    return "\n".join([*parts, *_errors(rows)])


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("format", "model", "tokens", "n", "k"))


def _products(rows: Sequence[Row]) -> str:
    shapes = list(dict.fromkeys(f"{row['n']}x{row['k']}" for row in rows))
    return f"sum over {', '.join(shapes)}" if len(shapes) > 1 else shapes[0]


def _table(rows: Sequence[Row]) -> list[str]:
    """A line for each number of tokens: microseconds of those contenders that did every product."""
    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    titles = [NAMES.get(name, name) for name in names]
    lines = [f"| tokens | floor | {' | '.join(titles)} | best peer | ratio |", "|---" * (len(names) + 4) + "|"]
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        same = [row for row in rows if row["tokens"] == tokens]
        sums = {
            name: {"median_us": sum(row["times"][name]["median_us"] for row in same)}
            for name in names
            if all(name in row["times"] for row in same)
        }
        best = best_peer(sums)
        ours = min((sums[name]["median_us"] for name in NAMES if name in sums), default=None)
        ratio = f"{best[0]} | {ours / best[1]:.2f}" if best and ours is not None else " | "
        cells = [f"{sums[name]['median_us']:.2f}" if name in sums else "-" for name in names]
        lines.append(f"| {tokens} | {sum(row['floor_us'] for row in same):.2f} | {' | '.join(cells)} | {ratio} |")
    return lines


def _errors(rows: Sequence[Row]) -> list[str]:
    """A line for each format: how far each contender is from float64."""
    lines = []
    for form in dict.fromkeys(row["format"] for row in rows):
        worst: dict[str, float] = {}
        for row in rows:
            for name, error in row["errors"].items() if row["format"] == form else ():
                worst[name] = max(worst.get(name, 0.0), error)
        listed = ", ".join(f"{NAMES.get(name, name)} {error:.2e}" for name, error in worst.items())
        lines += [f"Largest distance from float64, {form}, as a share of the norm of the output: {listed}.", ""]
    return lines
