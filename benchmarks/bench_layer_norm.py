"""LayerNorm with weight and bias, bf16, against the kernels of other libraries, and against the copy bandwidth."""

from __future__ import annotations

import argparse
from typing import Any

import norms
from cases import Case

OPS = ("layer_norm",)
HIDDEN = (1024, 4096, 8192)
TOKENS = (1, 8, 64, 256, 1024, 4096, 16384)
COMPILED_TOKENS = (1, 64, 4096)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    norms.add_arguments(parser, OPS, HIDDEN, TOKENS)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Race every shape; the result file's contents."""
    specs, missing = norms.find(options.ops)
    cases = [
        Case("layer_norm", (size, hidden), ("x",), reads=2, writes=2, parameters=("weight", "bias"))
        for hidden in options.hidden
        for size in norms.tokens(options)
    ]
    return norms.run(norms.Race(cases, specs, missing, compiled_tokens=COMPILED_TOKENS), options)
