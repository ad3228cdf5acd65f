"""Gated RMSNorm, bf16: Mamba-2's, which gates before it normalises, and gated delta nets', which gate after.

A hidden size of 128 stands for the latter: 32 heads of 128. From 8192 on there are 8 groups as well as one.
"""

from __future__ import annotations

import argparse
from typing import Any

import norms
from cases import Case

OPS = ("rms_norm_gated",)
HIDDEN = (128, 4096, 8192)
TOKENS = (1, 8, 64, 256, 1024, 4096, 16384)
COMPILED_TOKENS = (1, 64, 4096)
HEADS, HEAD_DIM = 32, 128
GROUPS, GROUPED_FROM = 8, 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    norms.add_arguments(parser, OPS, HIDDEN, TOKENS)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Race every form at every shape; the result file's contents."""
    specs, missing = norms.find(options.ops)
    return norms.run(norms.Race(cases(options), specs, missing, compiled_tokens=COMPILED_TOKENS), options)


def cases(options: argparse.Namespace) -> list[Case]:
    """By hidden size and form, then tokens."""
    found = []
    for hidden in options.hidden:
        heads = (HEADS,) if hidden == HEAD_DIM else ()
        for group_size in (None, hidden // GROUPS) if hidden >= GROUPED_FROM else (None,):
            label = "gate after" if heads else f"groups of {group_size}" if group_size else "gate before"
            arguments = {"norm_before_gate": bool(heads), "group_size": group_size}
            found += [
                Case("rms_norm_gated", (size, *heads, hidden), ("x", "gate"), 4, 2, arguments=arguments, label=label)
                for size in norms.tokens(options)
            ]
    return found
