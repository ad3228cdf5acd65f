"""What benchmarks over vocabularies share: their options, and gating and racing every batch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from tqdm import tqdm

import timing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 10


def add_arguments(
    parser: argparse.ArgumentParser, widths: Iterable[int], rows: Iterable[int], dtypes: Iterable[str]
) -> None:  # fmt: skip
    """Options for the sizes, with these defaults."""
    several: dict[str, Any] = {"nargs": "+", "metavar": "N", "type": int}
    parser.add_argument("--widths", default=list(widths), help="sizes of vocabularies", **several)
    parser.add_argument("--rows", default=list(rows), help="rows of a batch", **several)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(dtypes), metavar="DTYPE")
    parser.add_argument("--rounds", type=int, default=ROUNDS)


def logits(dtype: str, rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Normal, of standard deviation 4: [rows, width]."""
    return torch.randn(rows, width, generator=generator, device=generator.device).mul_(4.0).to(DTYPES[dtype])


def race_all(
    options: argparse.Namespace,
    whats: Iterable[str],
    contenders: Callable[[str], tuple[Mapping[str, Any], Mapping[str, str]]],
    gate: Callable[[str, str, int, int, torch.Generator], None],
    race: Callable[..., dict[str, Any]],
) -> dict[str, Any]:
    """Gate every vocabulary and race every batch; the result file's speed of a copy, rounds and rows.

    Args:
        options: those of ``add_arguments``.
        whats: what is raced, by name: ops, or what is asked of one.
        contenders: of a name, the peers, and why those that are missing are.
        gate: takes name, dtype, width, most rows and generator; raises what is not to be timed.
        race: takes name, dtype, width, rows, peers, missing, GB/s of a copy, rounds and generator; gives a row.
    """
    device = "cuda" if timing.has_gpu() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    rows = []
    with timing.side_stream(), torch.no_grad():
        copy_gbps = timing.copy_gbps()
        cases = [(what, dtype, width) for what in whats for dtype in options.dtypes for width in options.widths]
        for case in tqdm(cases, "race", unit="vocabulary"):
            peers, missing = contenders(case[0])
            gate(*case, max(options.rows), generator)
            for count in options.rows:
                rows.append(race(*case, count, peers, missing, copy_gbps, options.rounds, generator))
    return {"copy_gbps": round(copy_gbps, 1), "rounds": options.rounds, "rows": rows}
