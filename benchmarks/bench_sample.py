"""Sampling a token a row from logits over a vocabulary, with and without filters, against other libraries'.

Temperature 1. Logits are read from memory: the sets a graph goes over exceed the L2 cache twice. vLLM's filter works in
place; here it is given a copy, which its time has in it.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

import batchproof
import timing
import vocabularies
from batchproof.numerics import first_mismatch
from batchproof.ops._sample_filters import filter_logits
from contenders import load
from errors import Refused
from sample_tables import full
from vocabularies import Subject


class Filters(NamedTuple):
    """What every row asks for; None for nothing."""

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


class Batch(NamedTuple):
    """Logits [rows, vocabulary], and what of it stands in tensors of one value a row."""

    logits: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    min_p: torch.Tensor | None


Draw = Callable[[Batch], torch.Tensor]

ASKS = {
    "nothing": Filters(),
    "top-k": Filters(top_k=50),
    "top-p": Filters(top_p=0.95),
    "top-k and top-p": Filters(top_k=50, top_p=0.95),
    "min-p": Filters(min_p=0.05),
}
ROWS = (1, 7, 8, 64, 256)
WIDTHS = (128256,)
PEERS = ("torch", "vLLM", "FlashInfer")
LEFT = 0.02  # of a peer's tokens that ours removes, at most: libraries round probabilities differently
ENOUGH = 256  # tokens of a peer that are looked at


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that narrow the benchmark."""
    parser.add_argument("--asks", nargs="+", choices=ASKS, default=list(ASKS), metavar="ASK", help=", ".join(ASKS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    vocabularies.add_arguments(parser, WIDTHS, ROWS, ("bf16",))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Gate and race every batch; the result file's contents."""
    result = {"how": __doc__, "asks": {ask: ASKS[ask]._asdict() for ask in options.asks}}
    of_peers = partial(contenders, names=options.peers)
    subject = Subject("ask", options.asks, of_peers, _gate, _batch, lambda ask: _ours, _failures, moved=1)
    result |= vocabularies.race_all(options, subject)
    print(full(result))
    return result


def _ours(batch: Batch) -> torch.Tensor:
    return batchproof.sample(*batch)


def contenders(ask: str, names: Sequence[str] = PEERS) -> tuple[dict[str, Draw], dict[str, str]]:
    """The peers of these names, and why those that are missing are."""
    loaders = {"torch": lambda: _torch, "vLLM": _vllm, "FlashInfer": partial(_flashinfer, ASKS[ask])}
    return load({name: loaders[name] for name in names})


def _torch(batch: Batch) -> torch.Tensor:
    """As ``generate`` of transformers does it: a sort if there is a filter but min-p, then multinomial."""
    x = batch.logits.float()
    if batch.min_p is not None:
        p = x.softmax(-1)
        x = x.masked_fill(p < batch.min_p.unsqueeze(1) * p.amax(-1, keepdim=True), -torch.inf)
    if batch.top_k is None and batch.top_p is None:
        return torch.multinomial(x.softmax(-1), 1).squeeze(1)
    ranked, index = x.sort(-1, descending=True)
    if batch.top_k is not None:
        rank = torch.arange(x.shape[1], device=x.device)
        ranked = ranked.masked_fill(rank >= batch.top_k.unsqueeze(1), -torch.inf)
    p = ranked.softmax(-1)
    if batch.top_p is not None:
        p = p.masked_fill(p.cumsum(-1) - p >= batch.top_p.unsqueeze(1), 0.0)
    return index.gather(1, torch.multinomial(p, 1)).squeeze(1)


def _vllm() -> Draw:
    """The sampler of its model runner V2, which chooses another filter below 8 rows."""
    gumbel = importlib.import_module("vllm.v1.worker.gpu.sample.gumbel").gumbel_sample
    cut = importlib.import_module("vllm.v1.sample.ops.topk_topp_sampler").apply_top_k_top_p
    floor = importlib.import_module("vllm.v1.worker.gpu.sample.min_p").apply_min_p

    def draw(batch: Batch) -> torch.Tensor:
        logits = batch.logits
        requests = torch.arange(len(logits), device=logits.device, dtype=torch.int32)
        if batch.min_p is not None or batch.top_k is not None or batch.top_p is not None:
            logits = logits.clone()
        if batch.min_p is not None:
            floor(logits, requests, batch.min_p)
        logits = cut(logits, None if batch.top_k is None else batch.top_k.int(), batch.top_p)
        return gumbel(
            logits, requests, batch.temperature, batch.seeds, batch.positions, apply_temperature=False
        )  # type: ignore[no-any-return]  # fmt: skip

    return draw


def _flashinfer(filters: Filters) -> Draw:
    """Its kernels that reject what the filters remove; none has all three."""
    flashinfer = importlib.import_module("flashinfer.sampling")
    if filters.min_p is not None:
        return lambda b: flashinfer.min_p_sampling_from_probs(flashinfer.softmax(b.logits.float()), b.min_p)
    if filters.top_k is None and filters.top_p is None:
        return lambda b: flashinfer.sampling_from_logits(b.logits.float())
    if filters.top_p is None:
        return lambda b: flashinfer.top_k_sampling_from_probs(flashinfer.softmax(b.logits.float()), b.top_k.int())  # type: ignore[union-attr]
    if filters.top_k is None:
        return lambda b: flashinfer.top_p_sampling_from_probs(flashinfer.softmax(b.logits.float()), b.top_p)
    return lambda b: flashinfer.top_k_top_p_sampling_from_logits(b.logits.float(), b.top_k.int(), b.top_p)  # type: ignore[union-attr]


def _batch(ask: str, dtype: str, width: int, rows: int, generator: torch.Generator) -> Batch:
    device = generator.device
    integers = torch.randint(2**40, (2, rows), generator=generator, device=device)
    given = (
        None if value is None else torch.full((rows,), value, device=device, dtype=kind)
        for value, kind in zip(ASKS[ask], (torch.int64, torch.float32, torch.float32), strict=True)
    )
    x = vocabularies.logits(dtype, rows, width, generator)
    return Batch(x, integers[0], integers[1] % 2**17, torch.ones(rows, device=device), *given)


def _rows_of(batch: Batch, which: slice) -> Batch:
    return Batch(*(None if tensor is None else tensor[which] for tensor in batch))  # type: ignore[arg-type]


def _gate(ask: str, dtype: str, width: int, most: int, generator: torch.Generator) -> None:
    """Ours has one token for a row whatever the batch; otherwise nothing is timed."""
    batch = _batch(ask, dtype, width, most, generator)
    whole = _ours(batch)
    for rows in (size for size in (1, 2, 7, 8, 33, 255) if size < most):
        for some in (slice(0, rows), slice(most - rows, most)):
            differs = first_mismatch(_ours(_rows_of(batch, some)), whole[some])
            if differs:
                raise Refused(f"{ask} {dtype} {width}: rows {some} of {most} in a batch of {rows}: {differs}")


def _refused(draw: Draw, batch: Batch) -> str | None:
    """Why a peer is out: more of its tokens than ``LEFT`` are such as the filters remove."""
    times = -(-ENOUGH // len(batch.logits))
    kept = filter_logits(batch.logits, batch.temperature, batch.top_k, batch.top_p, batch.min_p) > -torch.inf
    outside = sum(int((~kept.gather(1, draw(batch).long().view(-1, 1))).sum()) for _ in range(times))
    drawn = times * len(batch.logits)
    return f"{outside} of {drawn} tokens are among those removed" if outside > LEFT * drawn else None


def _failures(ask: str, peers: Mapping[str, Draw], batch: Batch) -> dict[str, str]:
    """Why peers are out: those that fail, and those that draw what is removed."""
    failed = {}
    for name, draw in peers.items():
        try:
            why = _refused(draw, batch)
        except Exception as error:
            why = timing.reason(error)
        if why is not None:
            failed[name] = why
    return failed
