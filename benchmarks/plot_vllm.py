"""Draw the vLLM latency benchmark: seconds of each variant, one panel a set of flags, beside the published figures.

``python benchmarks/plot_vllm.py`` writes docs/vllm_latency_<device>.png.
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
from vllm_tables import joined

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
    grid[-1].set_xlabel("seconds (shorter is faster); in brackets: against vLLM batch-invariant of the same panel")
    figure.suptitle(_title(result), x=0.01, ha="left", fontweight="bold", fontsize=11)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the plot of one device."""
    options = parse(__doc__, arguments)
    path = options.out / f"vllm_latency_{options.device}.png"
    files = sorted((options.results / options.device).glob("vllm_latency*.json"))
    latency(joined([json.loads(file.read_text()) for file in files]), path)
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
        weight = "bold" if color == OUR_COLOR else "normal"
        axes.text(seconds or 0.0, place, f" {text}", va="center", ha="left", fontsize=9, fontweight=weight)
    axes.set_yticks(places, [label for label, _, _ in bars])
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
