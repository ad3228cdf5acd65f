"""RMSNorm fused with quantisation, with and without a residual sum: fp8 static, per token, per block; int8 per token.

``ours, unquantised`` is the norm of the same rows without quantisation, which moves more bytes: for context, no peer.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import norms
from cases import Case
from plain import BLOCK

FP8 = torch.float8_e4m3fn
OPS = (
    "rms_norm_static_fp8_quant",
    "add_rms_norm_static_fp8_quant",
    "rms_norm_dynamic_per_token_quant",
    "add_rms_norm_dynamic_per_token_quant",
    "rms_norm_per_block_quant",
    "add_rms_norm_per_block_quant",
)
HIDDEN = (4096, 8192)
TOKENS = (1, 8, 32, 64, 256, 1024, 4096, 16384)
COMPILED_TOKENS = (8, 4096)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    norms.add_arguments(parser, OPS, HIDDEN, TOKENS)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Race every op at every shape; the result file's contents."""
    specs, missing = norms.find(options.ops)
    unquantised = {op: norms.add_rms_norm if op.startswith("add_") else norms.rms_norm for op in OPS}
    race = norms.Race(
        cases(options), specs, missing,
        extra={f"{norms.OURS}, unquantised": unquantised}, compiled_tokens=COMPILED_TOKENS,
    )  # fmt: skip
    return norms.run(race, options)


def cases(options: argparse.Namespace) -> list[Case]:
    """By op, format, hidden size, tokens."""
    shapes = [(size, hidden) for hidden in options.hidden for size in norms.tokens(options)]
    found = []
    for op in options.ops:
        formats = (FP8, torch.int8) if "per_token" in op else (FP8,)
        found += [_case(op, shape, dtype) for dtype in formats for shape in shapes]
    return found


def _case(op: str, shape: tuple[int, int], dtype: torch.dtype) -> Case:
    add, static, per_token = op.startswith("add_"), "static" in op, "per_token" in op
    scales = 0 if static else 1 if per_token else shape[-1] // BLOCK
    arguments = {} if static else {"dtype": dtype} if per_token else {"group_size": BLOCK}
    return Case(
        op, shape, ("x", "residual") if add else ("x",), reads=4 if add else 2, writes=3 if add else 1,
        parameters=("weight", "scale") if static else ("weight",),
        arguments=arguments,
        out=dtype, scales=scales, label=("int8" if dtype == torch.int8 else "fp8") if per_token else "",
    )  # fmt: skip
