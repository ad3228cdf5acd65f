"""Markdown tables of the linear layers' benchmark: sums over the products of a model, for every number of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tables import OURS, best_peer, compared, title

Row = Mapping[str, Any]
EARLY = f"{OURS}, static weights"  # launched as an engine does that has declared its weights static
LINES = (1, 8, 64, 512, 4096)  # numbers of tokens in the summary
INVARIANT = ("vLLM CUTLASS, batch-invariant", "vLLM batch-invariant")


def full(results: Sequence[Mapping[str, Any]]) -> str:
    """Every format and model. Of several results, contenders of the later ones are added to the rows of the first."""
    rows = _joined(results)
    parts = []
    for form, model in dict.fromkeys((row["format"], row["model"]) for row in rows):
        chosen = [row for row in rows if (row["format"], row["model"]) == (form, model)]
        parts += [f"**{form}, {model}**: {_products(chosen)}", "", *_table(chosen), ""]
    return "\n".join([*parts, *_errors(rows)]).rstrip()


def page(results: Sequence[Mapping[str, Any]], paths: Sequence[str]) -> str:
    """``full``, and where the figures are from."""
    return f"{full(results)}\n\n{_origin(results[0], paths)}"


def summary(results: Sequence[Mapping[str, Any]], paths: Sequence[str]) -> str:
    """The first model in few lines: each format beside its best peer that varies and vLLM's batch-invariant product."""
    rows = _joined(results)
    rows = [row for row in rows if row["model"] == rows[0]["model"]]
    lines = [
        f"| {rows[0]['model']}, sum of a layer's products | floor | batchproof | best that varies | ratio | "
        "vLLM batch-invariant | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for form in dict.fromkeys(row["format"] for row in rows):
        for tokens in LINES:
            same = [row for row in rows if row["format"] == form and row["tokens"] == tokens]
            sums = _sums(same)
            ours = min(sums.pop(name)["median_us"] for name in (OURS, EARLY) if name in sums)
            invariant = next((sums.pop(name)["median_us"] for name in INVARIANT if name in sums), None)
            best = best_peer(sums)
            cells = [f"{form}, {tokens} tokens", f"{sum(row['floor_us'] for row in same):.1f}", f"{ours:.1f}"]
            cells += [f"{best[1]:.1f} {best[0]}", f"{ours / best[1]:.2f}"] if best else ["", ""]
            cells += [f"{invariant:.1f}", f"{ours / invariant:.2f}"] if invariant else ["", ""]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _origin(results[0], paths)])


def _origin(result: Mapping[str, Any], paths: Sequence[str]) -> str:
    files = ", ".join(f"`benchmarks/results/{path}`" for path in paths)
    return (
        "Microseconds a launch in a CUDA graph, weights read from memory. batchproof has two ways, of which the faster "
        "counts: as it is, and with weights declared static, as its plug-in for vLLM does. Floor: weights, activations "
        f"and output once, at the {result['copy_gbps']:.0f} GB/s of a copy. {result['device']}, torch "
        f"{result['torch']} ({files})."
    )


def _joined(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = [dict(row) for row in results[0]["rows"]]
    for result in results[1:]:
        more = {_key(row): row for row in result["rows"]}
        label = "batch-invariant" if result["vllm_batch_invariant"] == "1" else "again"
        for row in rows:
            times = more.get(_key(row), {"times": {}})["times"]
            row["times"] = row["times"] | {f"{n}, {label}": t for n, t in times.items() if n == "vLLM CUTLASS"}
    return rows


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("format", "model", "tokens", "n", "k"))


def _products(rows: Sequence[Row]) -> str:
    shapes = list(dict.fromkeys(f"{row['n']}x{row['k']}" for row in rows))
    return f"sum over {', '.join(shapes)}" if len(shapes) > 1 else shapes[0]


def _table(rows: Sequence[Row]) -> list[str]:
    """A line for each number of tokens: microseconds of those contenders that did every product."""
    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    lines = [f"| tokens | floor | {' | '.join(map(title, names))} | best peer | ratio |"]
    lines.append("|---" * (len(names) + 4) + "|")
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        same = [row for row in rows if row["tokens"] == tokens]
        cells = [str(tokens), f"{sum(row['floor_us'] for row in same):.2f}", *compared(_sums(same), names)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _sums(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Microseconds of those contenders that did every product."""
    names = dict.fromkeys(name for row in rows for name in row["times"])
    return {
        name: {"median_us": sum(row["times"][name]["median_us"] for row in rows)}
        for name in names
        if all(name in row["times"] for row in rows)
    }


def _errors(rows: Sequence[Row]) -> list[str]:
    """A line for each format: how far each contender is from float64."""
    lines = []
    for form in dict.fromkeys(row["format"] for row in rows):
        worst: dict[str, float] = {}
        for row in rows:
            for name, error in row["errors"].items() if row["format"] == form else ():
                worst[name] = max(worst.get(name, 0.0), error)
        listed = ", ".join(f"{title(name)} {error:.2e}" for name, error in worst.items())
        lines += [f"Largest distance from float64, {form}, as a share of the norm of the output: {listed}.", ""]
    return lines
