"""Softmax and its logarithm over vocabularies, as sampling and logprobs need them, against other libraries'.

Rows are read from memory: the sets a graph goes over exceed the L2 cache twice.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

import batchproof
import timing
import vocabularies
from batchproof.numerics import first_mismatch
from batchproof.registry import get_spec
from contenders import distance, load, sift
from errors import Refused
from softmax_tables import full
from tables import OURS
from vocabularies import DTYPES, logits

Rows = Callable[[torch.Tensor], torch.Tensor]

SOFTMAXES = ("log_softmax", "softmax")
WIDTHS = (32000, 128256, 151936, 256000)
ROWS = (1, 8, 64, 256, 2048)
ERROR = 0.01  # of the norm of the output: a peer that is further off computes something else


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that narrow the benchmark."""
    parser.add_argument(
        "--ops", nargs="+", choices=SOFTMAXES, default=list(SOFTMAXES), metavar="OP", help=", ".join(SOFTMAXES)
    )
    vocabularies.add_arguments(parser, WIDTHS, ROWS, DTYPES)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Gate and race every batch; the result file's contents."""
    result = {"how": __doc__} | vocabularies.race_all(options, options.ops, contenders, _gate, _race)
    print(full(result))
    return result


def contenders(op: str) -> tuple[dict[str, Rows], dict[str, str]]:
    """The peers, and why those that are missing are."""
    log = op == "log_softmax"
    stock = torch.log_softmax if log else torch.softmax
    loaders: dict[str, Callable[[], Rows]] = {
        "torch": lambda: lambda x: stock(x, -1),
        "torch.compile": lambda: _compiled(stock),
        "vLLM batch-invariant": lambda: _vllm("log_softmax" if log else "softmax_batch_invariant"),
    }
    if not log:
        loaders["FlashInfer"] = lambda: importlib.import_module("flashinfer.sampling").softmax
    return load(loaders)


def _compiled(stock: Callable[..., torch.Tensor]) -> Rows:
    torch._dynamo.config.recompile_limit = 1000  # past it torch.compile runs eagerly without a word
    return torch.compile(lambda x: stock(x, -1), fullgraph=True, dynamic=False)  # type: ignore[no-any-return]


def _vllm(name: str) -> Rows:
    function = getattr(importlib.import_module("vllm.model_executor.layers.batch_invariant"), name)
    return lambda x: function(x, -1)


def _gate(op: str, dtype: str, width: int, most: int, generator: torch.Generator) -> None:
    """Ours has one result for a row whatever the batch, near the reference; otherwise nothing is timed."""
    x, ours = logits(dtype, most, width, generator), getattr(batchproof, op)
    whole = ours(x)
    error = distance(whole[:8], get_spec(op).reference(x[:8]))
    if not error < ERROR:
        raise Refused(f"{op} {dtype} {width}: ours is off by {error:.2g} of the norm")
    for rows in (size for size in (1, 2, 7, 8, 33, 257, 1024) if size < most):
        for some in (slice(0, rows), slice(most - rows, most)):
            differs = first_mismatch(ours(x[some]), whole[some])
            if differs:
                raise Refused(f"{op} {dtype} {width}: rows {some} of {most} in a batch of {rows}: {differs}")


def _race(
    op: str, dtype: str, width: int, count: int, peers: Mapping[str, Rows], missing: Mapping[str, str],
    copy_gbps: float, rounds: int, generator: torch.Generator,
) -> dict[str, Any]:  # fmt: skip
    """Time every contender on one batch; its row."""
    moved = 2 * count * width * DTYPES[dtype].itemsize
    timing.release_memory()
    sets = [logits(dtype, count, width, generator) for _ in range(timing.rotations(moved, timing.l2_bytes())["cold"])]
    wanted = get_spec(op).reference(sets[0][:8])
    _, failed = sift(peers, lambda name: peers[name](sets[0])[:8], wanted, ERROR)
    good = {OURS: getattr(batchproof, op)} | {name: peer for name, peer in peers.items() if name not in failed}
    prepared = {name: partial(partial, function) for name, function in good.items()}
    times, more = timing.race(prepared, sets, timing.passes(len(sets), moved), rounds)
    return {
        "op": op, "dtype": dtype, "width": width, "rows": count, "sets": len(sets),
        "floor_us": round(moved / copy_gbps / 1e3, 3), "missing": {**missing, **failed, **more}, "times": times,
    }  # fmt: skip
