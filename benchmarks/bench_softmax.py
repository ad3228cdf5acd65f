"""Softmax and its logarithm over vocabularies, as sampling and logprobs need them, against other libraries'.

Rows are read from memory: the sets a graph goes over exceed the L2 cache twice.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

import batchproof
import vocabularies
from batchproof.numerics import first_mismatch
from batchproof.registry import get_spec
from contenders import distance, load, sift
from errors import Refused
from softmax_tables import full
from vocabularies import DTYPES, Subject, logits

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
    subject = Subject("op", options.ops, contenders, _gate, _batch, _ours, _failures, moved=2)
    result = {"how": __doc__} | vocabularies.race_all(options, subject)
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


def _ours(op: str) -> Rows:
    ours: Rows = getattr(batchproof, op)
    return ours


def _batch(op: str, dtype: str, width: int, rows: int, generator: torch.Generator) -> torch.Tensor:
    return logits(dtype, rows, width, generator)


def _gate(op: str, dtype: str, width: int, most: int, generator: torch.Generator) -> None:
    """Ours has one result for a row whatever the batch, near the reference; otherwise nothing is timed."""
    x, ours = _batch(op, dtype, width, most, generator), _ours(op)
    whole = ours(x)
    error = distance(whole[:8], get_spec(op).reference(x[:8]))
    if not error < ERROR:
        raise Refused(f"{op} {dtype} {width}: ours is off by {error:.2g} of the norm")
    for rows in (size for size in (1, 2, 7, 8, 33, 257, 1024) if size < most):
        for some in (slice(0, rows), slice(most - rows, most)):
            differs = first_mismatch(ours(x[some]), whole[some])
            if differs:
                raise Refused(f"{op} {dtype} {width}: rows {some} of {most} in a batch of {rows}: {differs}")


def _failures(op: str, peers: Mapping[str, Rows], x: torch.Tensor) -> dict[str, str]:
    """Why peers are out: those that fail, and those that compute something else."""
    return sift(peers, lambda name: peers[name](x)[:8], get_spec(op).reference(x[:8]), ERROR)[1]
