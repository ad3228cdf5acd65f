"""A case of a norm benchmark: one op at one shape, the bytes it has to move, and its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

DTYPE = torch.bfloat16
EPS = 1e-6
SCALE = 0.02  # of static quantisation: unit rows land well inside E4M3's range


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: its name in the registry.
        shape: of x: tokens first, the normalised axis last.
        tensors: the arguments of x's shape.
        reads, writes: bytes of an element of x that are read and written, all tensors of x's shape together.
        parameters: those of "weight", "bias" and "scale" that the op takes.
        arguments: what else it takes.
        out: dtype of the output that peers are given preallocated; None for none.
        scales: fp32 scales written, a row.
        in_place: the op writes what it reads.
        label: tells apart cases of one op and shape.
    """

    op: str
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    reads: int
    writes: int
    parameters: tuple[str, ...] = ("weight",)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    out: torch.dtype | None = None
    scales: int = 0
    in_place: bool = False
    label: str = ""

    @property
    def name(self) -> str:
        """For people: op, shape, variant."""
        return f"{self.op} {'x'.join(map(str, self.shape))} {self.label}".strip()

    @property
    def rows(self) -> int:
        """Rows that are normalised."""
        return math.prod(self.shape[:-1])

    @property
    def moved(self) -> int:
        """Bytes that any kernel has to move; weights, which are small beside many tokens, are not counted."""
        return math.prod(self.shape) * (self.reads + self.writes) + 4 * self.rows * self.scales

    @property
    def distinct(self) -> int:
        """Bytes of memory that a call touches."""
        return math.prod(self.shape) * (self.reads + (0 if self.in_place else self.writes))

    def inputs(self, generator: torch.Generator) -> dict[str, Any]:
        """The op's keyword arguments: random, new memory."""

        def randn(*shape: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
            empty = torch.empty(shape, dtype=DTYPE, device=generator.device)
            return empty.normal_(mean, std, generator=generator)

        made: dict[str, Callable[[], torch.Tensor]] = {
            "weight": lambda: randn(self.shape[-1], mean=1.0, std=0.1),
            "bias": lambda: randn(self.shape[-1], std=0.1),
            "scale": lambda: torch.full((1,), SCALE, device=generator.device),
        }
        tensors = {name: randn(*self.shape) for name in self.tensors}
        return {**tensors, **{name: made[name]() for name in self.parameters}, **self.arguments, "eps": EPS}

    def buffers(self, generator: torch.Generator) -> SimpleNamespace:
        """The op's arguments under their names and together as ``inputs``, and the outputs that peers write to."""
        inputs = self.inputs(generator)
        b = SimpleNamespace(inputs=inputs, **inputs)
        if self.out is not None:
            b.out = torch.empty(self.shape, dtype=self.out, device=generator.device)
        if self.scales:
            b.scales = torch.empty(self.rows, self.scales, device=generator.device)
        if "bias" in inputs:  # some peers take fp32 parameters only
            b.weight32, b.bias32 = b.weight.float(), b.bias.float()
        return b
