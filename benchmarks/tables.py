"""Tables of the norm benchmarks, in Markdown, from the contents of their result files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

OURS = "ours"  # contenders whose name begins so are not peers
Row = Mapping[str, Any]

SUMMARY_TOKENS = (1, 8, 64, 256, 1024, 4096, 16384)
# (benchmark, op, axes of x after the tokens) that README shows
SUMMARY = (
    ("rms_norm", "fused_add_rms_norm", (4096,)),
    ("rms_norm", "rms_norm", (32, 128)),
    ("rms_norm_quant", "add_rms_norm_static_fp8_quant", (4096,)),
    ("rms_norm_quant", "add_rms_norm_dynamic_per_token_quant", (4096,)),
)


def best_peer(times: Mapping[str, Mapping[str, float]]) -> tuple[str, float] | None:
    """The fastest contender that is not ours, and its median."""
    others = {name: figures["median_us"] for name, figures in times.items() if not name.startswith(OURS)}
    name = min(others, key=others.__getitem__, default=None)
    return None if name is None else (name, others[name])


def race(rows: Sequence[Mapping[str, Any]], sizes: Mapping[str, Callable[[Any], Any]]) -> list[str]:
    """The lines of a table: each row's sizes, by heading, its floor, every contender, and the best peer."""
    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    head = [*sizes, "floor", *map(title, names), "best peer", "ratio"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [*(str(size(row)) for size in sizes.values()), f"{row['floor_us']:.2f}", *compared(row["times"], names)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def compared(times: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> list[str]:
    """Cells: every contender's microseconds, the best peer, and the faster of ours over it."""
    cells = [f"{times[name]['median_us']:.2f}" if name in times else "-" for name in names]
    best = best_peer(times)
    ours = [figures["median_us"] for name, figures in times.items() if name.startswith(OURS)]
    return [*cells, best[0], f"{min(ours) / best[1]:.2f}"] if best and ours else [*cells, "", ""]


def failures(result: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """(peer, why) and the first case that the peer failed."""
    return {(peer, why): row["case"] for row in reversed(result["rows"]) for peer, why in row["missing"].items()}


def summary(results: Mapping[str, Mapping[str, Any]], picture: str) -> str:
    """What README shows: few shapes, and only the best peer. ``results`` by benchmark; "rms_norm" has to be there."""
    lines = [f"![Latency of the fused norm]({picture})", ""]
    for benchmark, op, axes in SUMMARY:
        rows = [row for row in results.get(benchmark, {"rows": []})["rows"] if _is(row, op, axes)]
        if not rows:
            continue
        columns = "floor | batchproof | best peer | ratio | batchproof, warm | best peer, warm | ratio"
        lines += [f"| {_title(op, axes)} | {columns} |", "|---|---|---|---|---|---|---|---|"]
        lines += [
            f"| {row['tokens']} | {_us(row['floor_us'])} | {_cells(row, 'cold')} | {_cells(row, 'warm')} |"
            for row in rows
        ]
        lines.append("")
    return "\n".join([*lines, _caption(results["rms_norm"], list(results))])


def full(name: str, result: Mapping[str, Any]) -> str:
    """Every figure of a result file, one table for each op, form and hidden size."""
    lines = []
    for (op, axes, label), group in groupby(result["rows"], key=lambda row: (row["op"], _axes(row), row["label"])):
        lines += [f"**{_title(op, axes, label)}**", "", *_table(list(group)), ""]
    for op, times in result["host_us"].items():
        lines += [f"Host time of an eager call of `{op}`, us: {_listed(times)}.", ""]
    for failed, case in failures(result).items():
        lines += [f"{failed[0]} is missing from {case} on: {failed[1]}", ""]
    if result["left_out"]:
        lines += [f"Not run for lack of time: {', '.join(result['left_out'])}.", ""]
    return "\n".join([*lines, _caption(result, [name])])


def _table(rows: Sequence[Row]) -> list[str]:
    """A line for every number of tokens and cache mode; the fastest is bold."""
    names = dict.fromkeys(name for row in rows for times in row["times"].values() for name in times)
    lines = [
        f"| tokens | cache | floor | share | {' | '.join(title(name) for name in names)} |",
        "|---" * (len(names) + 4) + "|",
    ]
    for row in rows:
        for mode, times in row["times"].items():
            fastest = min(figures["median_us"] for figures in times.values())
            cells = [_us(times[name]["median_us"], fastest) if name in times else "-" for name in names]
            share = f"{row['floor_us'] / times[OURS]['median_us']:.0%}" if mode == "cold" else ""
            lines.append(f"| {row['tokens']} | {mode} | {_us(row['floor_us'])} | {share} | {' | '.join(cells)} |")
    return lines


def _cells(row: Row, mode: str) -> str:
    times = row["times"].get(mode)
    if times is None:
        return " |  | "
    ours, best = times[OURS]["median_us"], best_peer(times)
    return f"{_us(ours)} | {_us(best[1])} {best[0]} | {ours / best[1]:.2f}" if best else f"{_us(ours)} | - | -"


def _is(row: Row, op: str, axes: tuple[int, ...]) -> bool:
    shown = row["tokens"] in SUMMARY_TOKENS or len(axes) > 1
    return row["op"] == op and _axes(row) == axes and row["label"] in ("", "fp8") and shown


def _axes(row: Row) -> tuple[int, ...]:
    return tuple(row["shape"][1:])


def _title(op: str, axes: tuple[int, ...], label: str = "") -> str:
    return f"`{op}`, tokens x {' x '.join(map(str, axes))}{', ' if label else ''}{label}"


def _caption(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """Of what the figures are; the first of ``names`` is the file of ``result``."""
    peers = ", ".join(f"{peer} {number}" for peer, number in result["peers"].items())
    missing = "; ".join(f"{peer} ({why})" for peer, why in result["missing"].items())
    files = ", ".join(f"`benchmarks/results/h200/{name}.json`" for name in names)
    return (
        f"Microseconds a launch in a CUDA graph, bf16, median of {result['rounds']} rounds. Floor: the bytes that must "
        f"be moved, at the {result['copy_gbps']:.0f} GB/s of a copy; a kernel that does nothing takes "
        f"{result['empty_kernel_us']:.2f}. Warm: what fits is in the L2 cache; otherwise nothing is. "
        f"{result['device']}, torch {result['torch']}, triton {result['triton']}{', ' if peers else ''}{peers}"
        f"{f'. Not there: {missing}' if missing else ''} ({files})."
    )


def title(contender: str) -> str:
    """Of a contender's column."""
    return contender.replace(OURS, "batchproof", 1) if contender.startswith(OURS) else contender


def _us(value: float, fastest: float | None = None) -> str:
    text = f"{value:.2f}" if value < 99.95 else f"{value:.0f}"
    return f"**{text}**" if value == fastest else text


def _listed(times: Mapping[str, float]) -> str:
    return ", ".join(f"{title(name)} {value:.1f}" for name, value in times.items())
