"""How ``paged_attention`` shares a batch out to programs, from its shapes alone; no bit depends on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ._triton import triton

__all__ = [
    "BLOCKS",
    "DECODE",
    "DECODES",
    "PREFILL",
    "WIDE_BLOCKS",
    "Block",
    "Plan",
    "block_for",
    "blocks_for",
    "consumers_for",
    "plan_for",
    "workers_for",
]

FULL = 4  # programs for each of a GPU's multiprocessors: with fewer, splits are shared out
MOST_SCRATCH = 2**28  # bytes of splits' results


@dataclass(frozen=True)
class Block:
    """A program's query rows (tokens times query heads of one key head), its warps, and the pipeline's depth."""

    rows: int
    warps: int
    stages: int


DECODE = Block(16, 4, 3)
DECODES = Block(16, 2, 2)  # where there are so many that bandwidth counts, not latency
CONSUMER = Block(64, 4, 2)
PREFILL = Block(128, 8, 3)  # for which Hopper has a kernel of its own, whose programs have consumers of 64 rows
BLOCKS = (DECODE, CONSUMER, PREFILL)  # the first that holds a sequence's rows, or the last
WIDE_BLOCKS = (Block(16, 4, 2), Block(64, 8, 2))  # heads of more than 128: an output of as many registers
FEW = 3  # programs of the kernel for Hopper that there are multiprocessors for: with fewer, splits are shared out
WIDE = 4  # programs of three consumers for each of a GPU's multiprocessors: with fewer, they have two
MANY = 2  # programs for each of a GPU's multiprocessors: then they hide each other's latency


def block_for(rows: int, group: int, head_dim: int, several: bool) -> Block:
    """How many rows a program has where a sequence has ``rows`` at most; ``group`` rows stay together.

    ``several``: whether blocks may differ, as on Hopper's tensor cores; elsewhere one is for all.
    """
    blocks = BLOCKS if head_dim <= 128 else WIDE_BLOCKS
    if several:
        block = next((b for b in blocks if b.rows >= rows), blocks[-1])
    else:
        block = replace(blocks[0], stages=2)
    return block if block.rows >= group else replace(block, rows=group)


def workers_for(programs: int, splits: int, scratch: int, multiprocessors: int, full: int = FULL) -> int:
    """How many programs share the splits of the same rows; 1: it merges them itself. No bit depends on it.

    Args:
        programs: those of one worker each.
        splits: most splits of a sequence.
        scratch: bytes of all the splits' results, which several workers leave in memory.
        multiprocessors: the GPU's.
        full: programs that each of them is to have.
    """
    if scratch > MOST_SCRATCH:
        return 1
    return max(1, min(splits, full * multiprocessors // programs))


def consumers_for(programs: int, filled: float, multiprocessors: int) -> int:
    """How many consumers a program of the kernel for Hopper has.

    Args:
        programs: of three consumers each.
        filled: what part of those has a token; the rest are of sequences that end.
        multiprocessors: the GPU's.
    """
    return 3 if programs >= WIDE * multiprocessors and filled > 2 / 3 else 2


@dataclass(frozen=True)
class Plan:
    """How a batch is shared out to programs; no bit depends on it.

    ``group``: rows of one token, a power of two; ``tokens``: of a sequence in a program; ``grid``: of one worker each,
    (sequences, key heads) if no sequence has two queries, or else (key heads of blocks, 1). ``consumers``: so many
    programs' rows are one's of the kernel for Hopper; 0 if that is not for the batch. ``each``: as ``blocks_for`` says.
    """

    block: Block
    group: int
    tokens: int
    grid: tuple[int, int]
    workers: int
    consumers: int = 0
    each: int = 0


def blocks_for(num_tokens: int, num_sequences: int, max_seqlen_q: int, tokens: int) -> tuple[int, int]:
    """How many blocks of ``tokens`` queries a batch has, and how many each of its sequences has.

    The second is 0 if a sequence has those that it needs, which are fewer where lengths differ; see ``_locate``.
    """
    each, fewest = triton.cdiv(max_seqlen_q, tokens), num_tokens // tokens + num_sequences
    return (each * num_sequences, each) if each * num_sequences <= fewest else (fewest, 0)


@lru_cache(maxsize=4096)
def plan_for(
    q_shape: Sequence[int], num_sequences: int, kv_heads: int, max_seqlen_q: int, splits: int, several: bool,
    multiprocessors: int, workers: int | None = None, block: Block | None = None,
    hopper: bool = False,
) -> Plan:  # fmt: skip
    """The plan of a batch, from its shapes; ``workers`` and ``block`` if they are not to be chosen.

    ``several``: as ``block_for`` takes it. ``splits``: as ``splits_for`` gives them. ``hopper``: whether the kernel for
    Hopper is for it, which is so much faster that its programs need no help, unless they are few.
    """
    num_tokens, num_heads, head_dim = q_shape
    group = triton.next_power_of_2(num_heads // kv_heads)
    chosen = block or block_for(group * max_seqlen_q, group, head_dim, several)
    hopper = hopper and block is None and several and group <= CONSUMER.rows
    tokens = 1 if max_seqlen_q == 1 else chosen.rows // group
    blocks, each = blocks_for(num_tokens, num_sequences, max_seqlen_q, tokens)
    grid = (num_sequences, kv_heads) if max_seqlen_q == 1 else (blocks * kv_heads, 1)
    programs = math.prod(grid)
    room = MANY if head_dim <= 128 else 1  # programs of one consumer that a multiprocessor has at a time
    of_one_token = hopper and max_seqlen_q == 1 and programs < room * multiprocessors
    hopper = hopper and group * max_seqlen_q > CONSUMER.rows
    if workers is None and hopper and programs * FEW >= multiprocessors:
        workers = 1
    elif workers is None:
        scratch = 4 * num_tokens * num_heads * splits * (head_dim + 2)
        workers = workers_for(programs, splits, scratch, multiprocessors, 1 if of_one_token else FULL)
    if of_one_token:
        return Plan(chosen, group, 1, grid, workers, 1)
    if hopper and workers == 1:
        tokens = CONSUMER.rows // group
        blocks, _ = blocks_for(num_tokens, num_sequences, max_seqlen_q, 3 * tokens)
        filled = num_tokens / (3 * tokens * blocks)
        consumers = consumers_for(blocks * kv_heads, filled, multiprocessors) if head_dim <= 128 else 2
        blocks, each = blocks_for(num_tokens, num_sequences, max_seqlen_q, consumers * tokens)
        part = CONSUMER if head_dim <= 128 else WIDE_BLOCKS[1]
        return Plan(part, group, tokens, (consumers * blocks * kv_heads, 1), 1, consumers, each)
    # Without workers, of which a launch has as many as the block table has room for splits: most may find no key
    if block is None and chosen is DECODE and programs >= MANY * multiprocessors:
        chosen = DECODES
    return Plan(chosen, group, tokens, grid, workers, each=each)
