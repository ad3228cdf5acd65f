"""Draw the vLLM latency benchmark: seconds of each variant beside the published figures, and what a step consists of.

``python benchmarks/plot_vllm.py`` writes docs/vllm_latency_<device>.png, with a panel for each set of flags, and
docs/vllm_step_<device>.png where the result file has decode steps as read from a trace.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plot import COLORS, OUR_COLOR, parse
from vllm_tables import STEP_ORDER, floor_us, step_by_kind, step_entries

HERE = Path(__file__).parent
BAR_COLORS = {
    "a": "#f6d58a",
    "b": COLORS["vLLM batch-invariant"],
    "c": "#6f93cf",
    "d": "#3d69b3",
    "f": OUR_COLOR,
    "g": "#062558",
    "e": "0.7",
}
OUR_WHOLE = BAR_COLORS["g"]
STEP_COLORS = dict(zip(STEP_ORDER, ("#3d69b3", "#009e73", "#e69f00", "#cc79a7", "#8c564b", "#56b4e9"), strict=True))
TITLES = {"original": "here, the same flags", "default": "here, vLLM's default flags"}

Bar = tuple[str, float | None, str]  # label, seconds, color


def latency(result: Mapping[str, Any], path: Path) -> None:
    """A bar a variant with its seconds on it, shorter is faster; the change the experiment repeats stands first."""
    published = result["original"]
    panels: dict[str, list[Bar]] = {
        f"{published['source']}, published": [
            ("before the change", published["before_s"], BAR_COLORS["a"]),
            ("after it", published["after_s"], BAR_COLORS["b"]),
        ]
    }
    for flags in result["flags"]:
        rows = [row for row in result["rows"] if row["flags"] == flags]
        panels[TITLES.get(flags, flags)] = [(row["name"], row["median_s"], BAR_COLORS[row["variant"]]) for row in rows]
    heights = [len(bars) + 1.2 for bars in panels.values()]
    figure = Figure(figsize=(9, 0.36 * sum(heights) + 1.1), dpi=120, layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}).flatten()
    for axes, (title, bars) in zip(grid, panels.items(), strict=True):
        _draw(axes, title, bars)
    longest = max(seconds or 0.0 for bars in panels.values() for _, seconds, _ in bars)
    grid[-1].set_xlim(0, longest * 1.25)
    grid[-1].set_xlabel("seconds (shorter is faster); in brackets: against vLLM batch-invariant above")
    figure.suptitle(_title(result), x=0.01, ha="left", fontweight="bold", fontsize=11)
    figure.savefig(path)


def step(result: Mapping[str, Any], path: Path) -> None:
    """A bar a variant, of the microseconds that each kind of kernels adds to a decode step, and the floor as a line.

    Without the gaps, which are the host's, and under the profiler longer than they are.
    """
    entries, floor = step_entries(result), sum(floor_us(result).values())
    panels: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for (flags, variant), entry in entries.items():
        panels.setdefault(flags, []).append((result["variants"][variant], entry))
    heights = [len(bars) + 1.2 for bars in panels.values()]
    figure = Figure(figsize=(9, 0.42 * sum(heights) + 1.7), dpi=120, layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}).flatten()
    for axes, (flags, bars) in zip(grid, panels.items(), strict=True):
        _stack(axes, bars)
        if floor:
            axes.axvline(floor, color="black", linestyle="--", linewidth=1, label=f"floor: {floor:.0f} us")
        _finish(axes, f"flags: {flags}", [name for name, _ in bars])
    grid[-1].set_xlim(0, max(entry["step_us"] - entry["gap_us"] for entry in entries.values()) * 1.12)
    grid[-1].set_xlabel("microseconds of a step in which something runs (shorter is faster)")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    device = result["device"].removeprefix("NVIDIA ")
    title = f"{result['model']} in vLLM {result['vllm']}, {device}: a decode step of a batch of {result['batch']}"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the plots of one device."""
    options = parse(__doc__, arguments)
    result = json.loads((options.results / options.device / "vllm_latency.json").read_text())
    plots = {"latency": latency, "step": step} if step_entries(result) else {"latency": latency}
    for name, draw in plots.items():
        path = options.out / f"vllm_{name}_{options.device}.png"
        draw(result, path)
        print(f"written to {path}")
    return 0


def _draw(axes: Axes, title: str, bars: Sequence[Bar]) -> None:
    places = range(len(bars))
    axes.barh(places, [seconds or 0.0 for _, seconds, _ in bars], color=[color for _, _, color in bars], height=0.72)
    reference = next((seconds for _, seconds, color in bars if color == BAR_COLORS["b"]), None)
    for place, (_, seconds, color) in zip(places, bars, strict=True):
        text = "missing" if seconds is None else f"{seconds:.4f} s"
        if seconds is not None and reference and color != BAR_COLORS["b"]:
            text += f"  ({seconds / reference - 1:+.1%})"
        weight = "bold" if color == OUR_WHOLE else "normal"
        axes.text(seconds or 0.0, place, f" {text}", va="center", ha="left", fontsize=9, fontweight=weight)
    _finish(axes, title, [label for label, _, _ in bars])


def _stack(axes: Axes, bars: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    kinds = [step_by_kind(entry) for _, entry in bars]
    left = [0.0] * len(bars)
    for kind in STEP_ORDER:
        widths = [groups.get(kind, (0.0, 0.0))[1] for groups in kinds]
        axes.barh(range(len(bars)), widths, left=left, height=0.72, label=kind, color=STEP_COLORS[kind], linewidth=0)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, (_, entry) in enumerate(bars):
        busy = entry["step_us"] - entry["gap_us"]
        axes.text(busy, place, f" {busy:.0f} us", va="center", ha="left", fontsize=9)


def _finish(axes: Axes, title: str, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _title(result: Mapping[str, Any]) -> str:
    device = result["device"].removeprefix("NVIDIA ")
    return (
        f"{result['model']} in vLLM {result['vllm']}, {device}: seconds for a batch of {result['batch']},\n"
        f"{result['input_tokens']} tokens in, {result['output_tokens']} out (published: on its author's machine)"
    )


if __name__ == "__main__":
    sys.exit(main())
