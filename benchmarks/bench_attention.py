"""Attention over a paged cache against other libraries', bf16: decodes to 128k keys, prefills to 8k, and both at once.

Keys and values are read from memory: the sets a graph goes over exceed the L2 cache twice. FlashAttention-3 is run with
the number of splits it chooses by the batch, and with one, which is what vLLM pins it to in its batch-invariant mode.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

import timing
from attention_tables import full
from batchproof.numerics import first_mismatch
from batchproof.ops.attention import paged_attention, paged_attention_reference
from contenders import distance, load, sift
from errors import Refused
from tables import OURS

Attend = Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class Heads:
    """Query heads, key heads, and the size of one, of a model on one GPU."""

    queries: int
    keys: int
    size: int


MODELS = {
    "Llama-8B": Heads(32, 8, 128),  # and Qwen3-8B
    "Llama-70B TP8": Heads(8, 1, 128),
    "Gemma-2-9B": Heads(16, 8, 256),
}
Case = tuple[tuple[int, int, int], ...]  # kinds of sequences: how many, queries of each, keys of each
DECODES = ((1, 1024), (1, 32768), (1, 131072), (8, 160), (8, 1024), (32, 1024), (64, 2048), (256, 1024))
PREFILLS = ((1, 512, 512), (1, 512, 8192), (1, 2048, 2048), (1, 8192, 8192), (8, 1024, 1024))
MIXED = (((255, 1, 1024), (1, 512, 2048)), ((112, 1, 1024), (16, 512, 512)))  # decodes beside chunks of prompts
CASES: tuple[Case, ...] = (*(((n, 1, keys),) for n, keys in DECODES), *((case,) for case in PREFILLS), *MIXED)
PAGE = 16
ROUNDS = 8
ERROR = 0.02  # of the norm of the output: a peer that is further off computes something else
DENSE_FLOPS = {"NVIDIA H200": 989.5e12, "NVIDIA H100 80GB HBM3": 989.5e12}  # a second in bf16, by NVIDIA's data sheets
SEGMENTS = 16  # vLLM's, of one sequence's keys


@dataclass
class Operands:
    """One batch: q [tokens, heads, size], a cache as vLLM lays it out, each sequence's pages and number of keys.

    ``bounds``: ``cu_seqlens_q`` as Python has it.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seqused_k: torch.Tensor
    block_table: torch.Tensor
    bounds: list[int]

    @property
    def max_seqlen_q(self) -> int:
        """Most queries of a sequence."""
        return max(end - start for start, end in itertools.pairwise(self.bounds))

    @property
    def keys(self) -> int:
        """Keys that the block table has room for."""
        return self.block_table.shape[1] * PAGE

    @property
    def scale(self) -> float:
        """The factor on scores."""
        return float(self.q.shape[-1] ** -0.5)

    @property
    def batch(self) -> tuple[Any, ...]:
        """The first arguments of ``paged_attention``."""
        return (
            self.q, self.k, self.v, self.cu_seqlens_q, self.seqused_k, self.block_table, self.max_seqlen_q, self.scale,
        )  # fmt: skip

    def tokens(self, chosen: list[int], queries: int) -> tuple[list[int], list[int]]:
        """The last ``queries`` tokens of each chosen sequence, or all that it has, and where they begin and end."""
        found: list[int] = []
        bounds = [0]
        for i in chosen:
            start, end = self.bounds[i : i + 2]
            found += range(max(start, end - queries), end)
            bounds.append(len(found))
        return found, bounds

    def some(self, chosen: list[int], queries: int) -> Operands:
        """The batch of those tokens."""
        tokens, bounds = self.tokens(chosen, queries)
        starts = torch.tensor(bounds, dtype=torch.int32, device=self.q.device)
        return Operands(
            self.q[tokens], self.k, self.v, starts, self.seqused_k[chosen], self.block_table[chosen], bounds
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that narrow the benchmark."""
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["Llama-8B"], metavar="MODEL",
                        help=f"default: Llama-8B; of {', '.join(MODELS)}")  # fmt: skip
    parser.add_argument("--cases", nargs="+", metavar="BxQxK[+BxQxK]",
                        help="sequences, queries and keys of each, such as 8x1x160, or several kinds of sequences: "
                        f"255x1x1024+1x512x2048; default: {', '.join(map(_name, CASES))}")  # fmt: skip
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER",
                        help=f"default: all of {', '.join(PEERS)}; the last compiles for minutes")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=ROUNDS)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Gate and race every batch; the result file's contents."""
    device = torch.device("cuda" if timing.has_gpu() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    chosen = [_case(text) for text in options.cases] if options.cases else CASES
    rows = []
    with timing.side_stream(), torch.no_grad():
        copy_gbps = timing.copy_gbps()
        flops = DENSE_FLOPS.get(torch.cuda.get_device_name()) if timing.has_gpu() else None
        cases = [(model, case) for model in options.models for case in chosen]
        for model, case in tqdm(cases, "race", unit="batch"):
            rows.append(_race(model, case, options, copy_gbps, flops, generator))
    result = {"how": __doc__, "copy_gbps": round(copy_gbps, 1), "dense_flops": flops, "rounds": options.rounds}
    result["rows"] = rows
    print(full(result))
    return result


def operands(heads: Heads, case: Case, generator: torch.Generator) -> Operands:
    """Random queries, keys and values, in pages of any order; a page's keys and values are side by side."""
    device = generator.device
    queries, keys = ([sizes[i] for sizes in case for _ in range(sizes[0])] for i in (1, 2))
    pages = [-(-n // PAGE) for n in keys]

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    cache = randn(sum(pages), heads.keys, PAGE, 2 * heads.size).transpose(1, 2)
    ids = torch.randperm(sum(pages), generator=generator, device=device).int()
    table = torch.nn.utils.rnn.pad_sequence([*ids.split(pages)], batch_first=True)
    bounds = [0, *itertools.accumulate(queries)]
    starts, lengths = (torch.tensor(sizes, dtype=torch.int32, device=device) for sizes in (bounds, keys))
    q = randn(bounds[-1], heads.queries, heads.size)
    return Operands(q, *cache.split(heads.size, dim=-1), starts, lengths, table, bounds)


def _ours(o: Operands) -> torch.Tensor:
    return paged_attention(*o.batch)


def _flash(example: Operands, splits: int) -> Attend:
    attend = importlib.import_module("vllm.vllm_flash_attn").flash_attn_varlen_func

    def run(o: Operands) -> torch.Tensor:
        out: torch.Tensor = attend(
            o.q, o.k, o.v, o.max_seqlen_q, o.cu_seqlens_q, o.keys, seqused_k=o.seqused_k, softmax_scale=o.scale,
            causal=True, block_table=o.block_table, num_splits=splits, fa_version=3,
        )  # fmt: skip
        return out

    return run


def _vllm_triton(example: Operands) -> Attend:
    attend = importlib.import_module("vllm.v1.attention.ops.triton_unified_attention").unified_attention
    heads, size = example.q.shape[1], example.q.shape[2]
    kv_heads, most = example.k.shape[2], max(128 // example.k.shape[2], 1)
    wide = 1 << (size - 1).bit_length()
    like = {"dtype": torch.float32, "device": example.q.device}
    parts = [torch.empty(most, heads, SEGMENTS, *last, **like) for last in ((wide,), (), ())]
    scale = torch.ones(1, **like).expand(len(example.seqused_k), kv_heads)

    def run(o: Operands) -> torch.Tensor:
        out = torch.empty_like(o.q)
        attend(
            o.q, o.k, o.v, out, o.cu_seqlens_q, o.max_seqlen_q, o.seqused_k, o.keys, o.scale, True, (-1, -1),
            o.block_table, 0.0, None, scale, scale, most, SEGMENTS, *parts,
        )  # fmt: skip
        return out

    return run


def _flashinfer(example: Operands) -> Attend:
    flashinfer = importlib.import_module("flashinfer")
    cls = "BatchDecodeWithPagedKVCacheWrapper" if example.max_seqlen_q == 1 else "BatchPrefillWithPagedKVCacheWrapper"
    space = torch.empty(256 << 20, dtype=torch.uint8, device=example.q.device)
    pages = -(-example.seqused_k // PAGE)
    starts = torch.nn.functional.pad(pages.cumsum(0), (1, 0)).int()
    taken = torch.arange(example.block_table.shape[1], device=pages.device) < pages[:, None]
    last_page = example.seqused_k - (pages - 1) * PAGE
    heads = (example.q.shape[1], example.k.shape[2], example.q.shape[2], PAGE)
    wrappers: dict[int, Any] = {}

    def run(o: Operands) -> torch.Tensor:
        if id(o) not in wrappers:  # a plan is made once for all layers of a step, outside of its graph
            wrapper = wrappers[id(o)] = getattr(flashinfer, cls)(space, "NHD")
            table = (starts, o.block_table[taken], last_page)
            if o.max_seqlen_q == 1:
                wrapper.plan(*table, *heads, q_data_type=o.q.dtype, kv_data_type=o.k.dtype)
            else:
                wrapper.plan(o.cu_seqlens_q, *table, *heads, causal=True, q_data_type=o.q.dtype, kv_data_type=o.k.dtype)
        out: torch.Tensor = wrappers[id(o)].run(o.q, (o.k, o.v))
        return out

    return run


PEERS: dict[str, Callable[[Operands], Attend]] = {
    "FlashAttention-3": partial(_flash, splits=0),
    "FlashAttention-3, one split": partial(_flash, splits=1),
    "vLLM Triton": _vllm_triton,
    "FlashInfer": _flashinfer,
}


def _race(
    model: str, case: Case, options: argparse.Namespace, copy_gbps: float, flops: float | None,
    generator: torch.Generator,
) -> dict[str, Any]:  # fmt: skip
    """Gate one batch and time every contender on it; its row."""
    heads = MODELS[model]
    moved = sum(4 * n * (keys * heads.keys + queries * heads.queries) * heads.size for n, queries, keys in case)
    seen = sum(n * queries * (2 * keys - queries + 1) // 2 for n, queries, keys in case)  # pairs of a query and a key
    floor = moved / copy_gbps / 1e3
    if flops:
        floor = max(floor, 4e6 * seen * heads.queries * heads.size / flops)
    timing.release_memory()
    decodes = all(queries == 1 for _, queries, _ in case)
    count = timing.rotations(moved, timing.l2_bytes())["cold"] if decodes else timing.MIN_SETS
    sets = [operands(heads, case, generator) for _ in range(count)]
    name = f"{model}, {_name(case)}"
    wanted = _gate(name, sets[0])
    peers, missing = load({name: partial(PEERS[name], sets[0]) for name in options.peers})

    def output(name: str) -> torch.Tensor:
        """Of the batch that was gated; of the others as well, so that what is planned is planned for all."""
        outs = [peers[name](o) for o in sets]
        return outs[0][-1:]

    errors, failed = sift(peers, output, wanted, ERROR)
    good: dict[str, Attend] = {OURS: _ours} | {name: peer for name, peer in peers.items() if name not in failed}
    prepared = {contender: partial(partial, attend) for contender, attend in good.items()}
    times, more = timing.race(prepared, sets, timing.passes(count, moved), options.rounds)
    return {
        "model": model, **dict(zip(("sequences", "queries", "keys"), _sizes(case), strict=True)), "sets": count,
        "floor_us": round(floor, 3), "missing": {**missing, **failed, **more}, "times": times,
        "errors": {peer: round(error, 8) for peer, error in errors.items()},
    }  # fmt: skip


def _gate(name: str, o: Operands) -> torch.Tensor:
    """Ours has one result alone, with others and token by token, near the reference; else nothing is timed.

    Returns:
        The reference's last row.
    """
    last = len(o.seqused_k) - 1
    whole = _ours(o)
    alone = o.some([last], 1)
    wanted = paged_attention_reference(*alone.batch)
    error = distance(whole[-1:], wanted)
    if not error < ERROR / 2:
        raise Refused(f"{name}: ours is off by {error:.2g} of the norm")
    for sequences in ([0], [last], [last, 0]):
        for queries in {1, min(17, o.max_seqlen_q), o.max_seqlen_q}:
            out, expected = _ours(o.some(sequences, queries)), whole[o.tokens(sequences, queries)[0]]
            differs = first_mismatch(out, expected)
            if differs:
                raise Refused(f"{name}: the last {queries} queries of sequences {sequences} alone: {differs}")
    return wanted


def _case(text: str) -> Case:
    case = []
    for kind in text.split("+"):
        sizes = [int(size) if size.isdigit() else 0 for size in kind.split("x")]
        if len(sizes) != 3 or 0 in sizes or sizes[1] > sizes[2]:
            raise Refused(
                f"--cases has {text!r}, want sequences x queries x keys, of which no fewer than queries: 8x1x160"
            )
        case.append((sizes[0], sizes[1], sizes[2]))
    return tuple(case)


def _name(case: Case) -> str:
    return "+".join("x".join(map(str, kind)) for kind in case)


def _sizes(case: Case) -> list[int | str]:
    """Sequences, queries and keys as the result has them: numbers, or those of several kinds of sequences in text."""
    return [sizes[0] if len(sizes) == 1 else " + ".join(map(str, sizes)) for sizes in zip(*case, strict=True)]
