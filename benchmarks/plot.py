"""Draw the norm benchmarks' plots from a result file: latency against tokens, and share of the copy bandwidth.

``python benchmarks/plot.py`` writes docs/norms_latency_<device>.png and docs/norms_bandwidth_<device>.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from peers import STATIC
from tables import OURS

HERE = Path(__file__).parent
OP = "fused_add_rms_norm"
LARGE = 512  # tokens from which on bandwidth is the limit
COLORS = {
    "vLLM": "#d55e00",
    "vLLM batch-invariant": "#e69f00",
    "FlashInfer": "#009e73",
    "Liger": "#cc79a7",
    "Liger CuTe": "#f0a3c9",
    "Quack": "#56b4e9",
    "SGLang": "#8c564b",
    "torch.compile": "#7f7f7f",
    "PyTorch": "#b8b800",
}
OUR_COLOR = "#0b3d91"

Row = Mapping[str, Any]
Value = Callable[[Row, str], float | None]


def latency(result: Mapping[str, Any], path: Path, mode: str = "cold") -> None:
    """Microseconds against tokens, one panel a hidden size, with the floor that bandwidth sets."""
    figure, panels = _panels(result, f"{OP}: time of a launch, {_setting(result)}")
    for hidden, axes in panels.items():
        rows = _rows(result, hidden)
        tokens = [row["tokens"] for row in rows]
        axes.fill_between(
            tokens, [row["floor_us"] for row in rows], color="0.9", label="under the floor of the copy bandwidth"
        )
        _draw(axes, rows, lambda row, name: _median(row, name, mode))
        axes.set_yscale("log", base=2)
        axes.set_ylim(bottom=0.7)
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.yaxis.set_minor_locator(NullLocator())
    _finish(figure, panels, "microseconds", path)


def bandwidth(result: Mapping[str, Any], path: Path) -> None:
    """Bytes that must be moved over time, as a share of what a copy reaches, where there are many tokens."""
    figure, panels = _panels(result, f"{OP}: share of the bandwidth of a copy, {_setting(result)}")
    for hidden, axes in panels.items():
        rows = [row for row in _rows(result, hidden) if row["tokens"] >= LARGE]
        axes.axhline(1.0, color="0.6", linewidth=1, linestyle="--")
        _draw(axes, rows, _share)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.grid(axis="y", color="0.9")
    _finish(figure, panels, "share of the copy bandwidth", path)


def parse(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a program that draws plots."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="h200", help="folder under the results; default: h200")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="default: benchmarks/results")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs", help="folder for the plots; default: docs")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw both plots of one device."""
    options = parse(__doc__, arguments)
    result = json.loads((options.results / options.device / "rms_norm.json").read_text())
    for name, draw in {"latency": latency, "bandwidth": bandwidth}.items():
        path = options.out / f"norms_{name}_{options.device}.png"
        draw(result, path)
        print(f"written to {path}")
    return 0


def _panels(result: Mapping[str, Any], title: str) -> tuple[Figure, dict[int, Axes]]:
    sizes = sorted({row["hidden"] for row in result["rows"] if row["op"] == OP})
    columns = 1 if len(sizes) == 1 else 2
    lines = -(-len(sizes) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.4 * lines + 1.1), dpi=120, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    for axes in grid[len(sizes) :]:
        axes.set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure, dict(zip(sizes, grid, strict=False))


def _draw(axes: Axes, rows: Sequence[Row], value: Value) -> None:
    """A line for each contender, ours on top."""
    names = dict.fromkeys(name for row in rows for name in row["times"]["cold"])
    for name in sorted(names, key=lambda name: name == OURS):
        points = [(row["tokens"], y) for row in rows if (y := value(row, name)) is not None]
        ours, sparse = name == OURS, name in STATIC
        axes.plot(
            *zip(*points, strict=True), label="batchproof" if ours else name,
            color=OUR_COLOR if ours else COLORS.get(name, "0.4"), linewidth=2.6 if ours else 1.3,
            marker="s" if sparse else "o", markersize=4.5 if ours or sparse else 2.5, linestyle="" if sparse else "-",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["tokens"] for row in rows][:: 1 if len(rows) < 10 else 3])
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelbottom=True)
    axes.spines[["top", "right"]].set_visible(False)


def _finish(figure: Figure, panels: Mapping[int, Axes], what: str, path: Path) -> None:
    for hidden, axes in panels.items():
        axes.set_title(f"hidden size {hidden}", loc="left", fontsize=10)
        axes.set(xlabel="tokens", ylabel=what)
    handles: dict[str, Any] = {}
    for axes in panels.values():
        handles.update(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    ordered = sorted(handles, key=lambda label: label != "batchproof")
    figure.legend([handles[label] for label in ordered], ordered, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _rows(result: Mapping[str, Any], hidden: int) -> list[Row]:
    return sorted(
        (row for row in result["rows"] if row["op"] == OP and row["hidden"] == hidden), key=lambda row: row["tokens"]
    )


def _median(row: Row, name: str, mode: str) -> float | None:
    times = row["times"].get(mode, row["times"]["cold"])
    return times[name]["median_us"] if name in times else None


def _share(row: Row, name: str) -> float | None:
    median = _median(row, name, "cold")
    return None if median is None else row["floor_us"] / median


def _setting(result: Mapping[str, Any]) -> str:
    return f"bf16, cold cache, {result['device'].removeprefix('NVIDIA ')}"


def _plain(value: float, _: int) -> str:
    return f"{value:g}" if value < 1024 or value % 1024 else f"{value / 1024:g}k"


if __name__ == "__main__":
    sys.exit(main())
