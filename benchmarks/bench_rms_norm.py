"""RMSNorm and RMSNorm of a residual sum, bf16, against the kernels of other libraries, and against the copy bandwidth.

``fused_add_rms_norm`` works in place, ``add_rms_norm`` returns new tensors, ``rms_norm`` has no residual. A hidden size
of 128 stands for the norms of queries and keys: 32 heads of 128, for ``rms_norm`` with 8 and 8192 tokens.
"""

from __future__ import annotations

import argparse
from typing import Any

import norms
from cases import DTYPE, Case

OPS = ("fused_add_rms_norm", "add_rms_norm", "rms_norm")
HIDDEN = (128, 2048, 4096, 5120, 8192)
TOKENS = (1, 8, *(1 << n for n in range(5, 16)))
HEADS, HEAD_DIM = 32, 128
HEAD_TOKENS = (8, 8192)
COMPILED_TOKENS = (8, 256, 4096)  # and the q/k norms


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    norms.add_arguments(parser, OPS, HIDDEN, TOKENS)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Race every op at every shape; the result file's contents."""
    specs, missing = norms.find(options.ops)
    race = norms.Race(cases(options), specs, missing, compiled_tokens=(*COMPILED_TOKENS, *HEAD_TOKENS))
    return norms.run(race, options)


def cases(options: argparse.Namespace) -> list[Case]:
    """By op, then hidden size, then tokens."""
    found = []
    for op in options.ops:
        for hidden in options.hidden:
            heads = (HEADS,) if hidden == HEAD_DIM else ()
            if heads and op != "rms_norm":
                continue
            sizes = (options.tokens or HEAD_TOKENS) if heads else norms.tokens(options)
            found += [_case(op, (size, *heads, hidden)) for size in sizes]
    return found


def _case(op: str, shape: tuple[int, ...]) -> Case:
    if op == "rms_norm":
        return Case(op, shape, ("x",), reads=2, writes=2, out=DTYPE)
    return Case(op, shape, ("x", "residual"), reads=4, writes=4, in_place=op == "fused_add_rms_norm")
