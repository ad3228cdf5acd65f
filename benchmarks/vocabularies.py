"""What benchmarks over vocabularies share: their options, and gating and racing every batch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import timing
from tables import OURS

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


class Subject(NamedTuple):
    """What is raced.

    Attributes:
        key: what a row of the result file calls it: "op", or "ask" for what is asked of one op.
        names: its kinds.
        contenders: of a name, the peers, and why those that are missing are.
        gate: takes name, dtype, width, most rows and generator; raises what is not to be timed.
        batch: takes name, dtype, width, rows and generator; gives what contenders take.
        ours: of a name, our contender.
        failures: of a name, the peers and a batch, why those that are out are.
        moved: how often the logits' bytes have to be moved.
    """

    key: str
    names: Sequence[str]
    contenders: Callable[[str], tuple[Mapping[str, Any], Mapping[str, str]]]
    gate: Callable[[str, str, int, int, torch.Generator], None]
    batch: Callable[[str, str, int, int, torch.Generator], Any]
    ours: Callable[[str], Callable[[Any], torch.Tensor]]
    failures: Callable[[str, Mapping[str, Any], Any], Mapping[str, str]]
    moved: int


def race_all(options: argparse.Namespace, subject: Subject) -> dict[str, Any]:
    """Gate every vocabulary and race every batch; the result file's speed of a copy, rounds and rows."""
    device = "cuda" if timing.has_gpu() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    rows = []
    with timing.side_stream(), torch.no_grad():
        copy_gbps = timing.copy_gbps()
        cases = [(name, dtype, width) for name in subject.names for dtype in options.dtypes for width in options.widths]
        for case in tqdm(cases, "race", unit="vocabulary"):
            peers, missing = subject.contenders(case[0])
            subject.gate(*case, max(options.rows), generator)
            for count in options.rows:
                rows.append(_race(subject, case, count, peers, missing, copy_gbps, options.rounds, generator))
    return {"copy_gbps": round(copy_gbps, 1), "rounds": options.rounds, "rows": rows}


def _race(
    subject: Subject, case: tuple[str, str, int], count: int, peers: Mapping[str, Any], missing: Mapping[str, str],
    copy_gbps: float, rounds: int, generator: torch.Generator,
) -> dict[str, Any]:  # fmt: skip
    """Time every contender on one batch; its row."""
    name, dtype, width = case
    moved = subject.moved * count * width * DTYPES[dtype].itemsize
    timing.release_memory()
    number = timing.rotations(moved, timing.l2_bytes())["cold"]
    sets = [subject.batch(*case, count, generator) for _ in range(number)]
    failed = subject.failures(name, peers, sets[0])
    good = {OURS: subject.ours(name)} | {peer: run for peer, run in peers.items() if peer not in failed}
    prepared = {contender: partial(partial, run) for contender, run in good.items()}
    times, more = timing.race(prepared, sets, timing.passes(len(sets), moved), rounds)
    return {
        subject.key: name, "dtype": dtype, "width": width, "rows": count, "sets": len(sets),
        "floor_us": round(moved / copy_gbps / 1e3, 3), "missing": {**missing, **failed, **more}, "times": times,
    }  # fmt: skip
