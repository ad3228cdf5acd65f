"""The backward pass of RMSNorm and of RMSNorm of a residual sum, bf16: gradients of x (and residual) and of the weight.

Autograd through the forward ops; only the way back is timed. What must not depend on the batch is a row's gradient; the
weight's is a sum over the batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

import norms
from batchproof.registry import OpSpec
from cases import Case
from timing import Call, Prepare

OPS = ("rms_norm_backward", "add_rms_norm_backward")
HIDDEN = (2048, 4096, 8192)
TOKENS = (256, 1024, 4096, 16384)
COMPILED_TOKENS = (4096,)

Forward = Callable[[Any], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    norms.add_arguments(parser, OPS, HIDDEN, TOKENS)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Race every op at every shape; the result file's contents."""
    specs, missing = find(options.ops)
    shapes = [(size, hidden) for hidden in options.hidden for size in norms.tokens(options)]
    race = norms.Race(
        [_case(op, shape) for op in options.ops for shape in shapes], specs, missing,
        calls=FORWARDS, prepare=backward, compiled_tokens=COMPILED_TOKENS, host=False,
    )  # fmt: skip
    return norms.run(race, options)


def backward(forward: Forward) -> Prepare:
    """A contender that is timed going back, over and over, after one forward."""

    def prepare(b: Any) -> Call:
        leaves, gradients = [b.x, b.weight], [b.grad_out]
        if b.grad_residual_out is not None:
            b.residual = torch.zeros_like(b.x)  # the way back reads the sum alone
            leaves, gradients = [b.x, b.residual, b.weight], [b.grad_out, b.grad_residual_out]
        for leaf in leaves:
            leaf.requires_grad_()
        with torch.enable_grad():
            out = forward(b)
        outputs = out if isinstance(out, tuple) else (out,)
        return partial(torch.autograd.grad, outputs, leaves, gradients, retain_graph=True)

    return prepare


def find(ops: Iterable[str]) -> tuple[dict[str, OpSpec], dict[str, str]]:
    """The spec of the gradients, computed by way of autograd, or why there is none."""
    found, missing = norms.find(["rms_norm_backward"])
    if missing:
        return {}, dict.fromkeys(ops, *missing.values())
    axes = {op: dict.fromkeys(_case(op, (1, 1)).tensors, 0) for op in ops}
    spec = found["rms_norm_backward"]
    return {op: replace(spec, op=partial(_gradients, FORWARDS[op]), batch_axes=axes[op]) for op in ops}, {}


def _case(op: str, shape: tuple[int, int]) -> Case:
    if op == "rms_norm_backward":
        return Case(op, shape, ("grad_out", "x"), reads=4, writes=2, arguments={"grad_residual_out": None})
    return Case(op, shape, ("grad_out", "grad_residual_out", "x"), reads=6, writes=2)


def _gradients(forward: Forward, **inputs: Any) -> tuple[torch.Tensor, ...]:
    """Of x and the weight."""
    fresh = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    of_x, *_, of_weight = backward(forward)(SimpleNamespace(**fresh))()
    return of_x, of_weight


FORWARDS: dict[str, Forward] = {"rms_norm_backward": norms.rms_norm, "add_rms_norm_backward": norms.add_rms_norm}
