"""An audited callable with its inputs: runs any rows in batches of any size, and puts every row's outputs together.

Whatever an op returns counts as an output, and so does every argument that it changes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import ArgumentError
from ...numerics import indexable
from ...registry import OpSpec
from ..compare import difference
from ..report import Difference
from .inputs import KINDS, Argument

__all__ = ["LAYOUTS", "Batched", "Company", "Output", "Result", "SpecWorkload", "Workload"]

# Expressions of x, a contiguous tensor, with x's values in another layout.
LAYOUTS = {
    "rows further apart": "torch.cat([x, x], -1)[..., :x.shape[-1]]",
    "one element off": "torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)",
    "both": "torch.nn.functional.pad(x, (1, 2))[..., 1:-2]",
    "every second row": "x.repeat_interleave(2, 0)[::2]",
    "last axis strided": "x.transpose(0, -1).contiguous().transpose(0, -1)",
}


@dataclass(frozen=True)
class Batched:
    """A tensor argument with rows of requests: its batch axis, and rows a request has along it."""

    axis: int
    each: int
    is_activation: bool


@dataclass(frozen=True)
class Output:
    """A result with rows of requests. ``index`` counts returned tensors; None: it is the changed argument ``name``."""

    name: str
    axis: int
    each: int
    index: int | None


@dataclass(frozen=True)
class Company:
    """What a batch is run with: ``fill`` in the activations of all places but ``kept``, or another layout."""

    fill: float | None = None
    kept: torch.Tensor | None = None
    layout: str | None = None


ALONE = Company()


@dataclass(frozen=True)
class Result:
    """Outputs of the first rows, each with the rows first; ``seen`` marks the rows that were run as they are."""

    outputs: tuple[tuple[str, torch.Tensor], ...]
    seen: torch.Tensor

    def difference(self, found: Result) -> Difference | None:
        """The first difference of rows that both have."""
        rows = min(len(self.seen), len(found.seen))
        both = self.seen[:rows] & found.seen[:rows]
        every = bool(both.all())
        for (name, mine), (_, other) in zip(self.outputs, found.outputs, strict=True):
            a, b = (t[:rows] if every else t[:rows][both] for t in (mine, other))
            differs = difference(name, a, b)
            if differs is not None:
                if differs.index and not every:  # rows were left out
                    row = int(both.nonzero()[differs.index[0]])
                    differs = Difference(**vars(differs) | {"index": (row, *differs.index[1:])})
                return differs
        return None


class Workload:
    """A callable and its arguments.

    Args:
        function: what is audited.
        arguments: see ``inputs.parse``.
        rows: requests there are in all.
        device: where it runs.
        most_calls: calls for one batch size; where that is less than all rows need, the first rows are run.
        seed: of the values.
    """

    kinds: tuple[str, ...] = KINDS

    def __init__(
        self, function: Callable[..., Any], arguments: Sequence[Argument], rows: int, device: torch.device,
        most_calls: int, seed: int = 0,
    ) -> None:  # fmt: skip
        self.function, self.arguments, self.rows, self.device = function, list(arguments), rows, device
        self.most_calls, self.seed = most_calls, seed
        self.by_place = _go_by_place(function, self.arguments)
        self.batched = {
            a.variable: Batched(a.axis, a.each, a.is_activation)
            for a in self.arguments
            if a.axis is not None and not a.extra and a.maker != "arange"
        }
        self._drawn: dict[str, dict[str, torch.Tensor]] = {}
        self._shared: dict[str, torch.Tensor] = {}
        self.unobserved: list[str] = []
        self.outputs = self._find_outputs()

    def recipe(self, kind: str) -> list[str]:
        """Lines of Python that make every drawn argument."""
        lines: list[str] = []
        earlier: dict[tuple[object, int], str] = {}
        for number, argument in enumerate(a for a in self.arguments if a.is_drawn):
            alike = earlier.get((argument.dims, argument.each)) if argument.is_activation else None
            lines += argument.recipe(self.rows, self.seed + number, kind, alike)
            if argument.is_activation:
                earlier[argument.dims, argument.each] = argument.variable
        return lines

    def prepare(self, kind: str, index: torch.Tensor) -> dict[str, Any]:
        """Arguments for a batch of the rows in ``index``: fresh tensors, but for those that are shared."""
        drawn, size = self._draw(kind), len(index)
        made: dict[str, Any] = {}
        for argument in self.arguments:
            x = argument.variable
            if argument.is_drawn:
                made[x] = (
                    _take(drawn[x], argument.axis, argument.each, index) if argument.axis is not None else drawn[x]
                )
            elif argument.maker == "M":
                made[x] = size
            elif argument.maker is not None:
                made[x] = argument.make_anew(size, self.device)
            else:
                made[x] = argument.literal
        return made

    def call(self, made: Mapping[str, Any]) -> list[Any]:
        """Call the function; what it returned, flat."""
        if self.by_place:
            return _flat(self.function(*(made[a.variable] for a in self.arguments)))
        return _flat(self.function(**{a.variable: made[a.variable] for a in self.arguments}))

    def observe(self, made: Mapping[str, Any], returned: Sequence[Any], size: int) -> list[tuple[str, torch.Tensor]]:
        """The outputs with the requests first: [size, ...], or [size, rows of a request, ...]."""
        tensors = ((o, made[o.name] if o.index is None else returned[o.index]) for o in self.outputs)
        return [(o.name, _rows_first(tensor, o.axis, size)) for o, tensor in tensors]

    def run_batch(self, kind: str, index: torch.Tensor, company: Company = ALONE) -> list[tuple[str, torch.Tensor]]:
        """One call on the rows in ``index``."""
        made = self.prepare(kind, index)
        for name, batched in self.batched.items():
            if not batched.is_activation:
                continue
            if company.fill is not None and company.kept is not None:
                _fill(made[name], batched, company.fill, ~company.kept)
            if company.layout is not None:
                made[name] = eval(LAYOUTS[company.layout], {"torch": torch, "x": made[name]})
        return self.observe(made, self.call(made), len(index))

    def run(
        self, kind: str, size: int, order: torch.Tensor | None = None, company: Company = ALONE,
        most_calls: int | None = None,
    ) -> Result:  # fmt: skip
        """The first rows in batches of ``size``; a last batch overlaps. ``order`` is a permutation of first rows."""
        rows = min(self.rows, size * (most_calls or self.most_calls)) if order is None else len(order)
        order = torch.arange(rows, device=self.device) if order is None else order
        whole: list[tuple[str, torch.Tensor]] = []
        places = []
        for start in range(0, rows, size):
            index = order[min(start, rows - size) :][:size]
            outputs = self.run_batch(kind, index, company)
            if not whole:
                whole = [(name, t.new_empty((rows, *t.shape[1:]))) for name, t in outputs]
            if company.kept is not None:
                index, outputs = (
                    index[company.kept],
                    [(name, indexable(t)[company.kept].view(t.dtype)) for name, t in outputs],
                )
            for (_, every_row), (_, part) in zip(whole, outputs, strict=True):
                indexable(every_row).index_copy_(0, index, indexable(part).contiguous())
            places.append(index)
        seen = torch.zeros(rows, dtype=torch.bool, device=self.device)
        seen[torch.cat(places)] = True
        return Result(tuple(whole), seen)

    def _draw(self, kind: str) -> dict[str, torch.Tensor]:
        if kind not in self._drawn:
            scope: dict[str, Any] = {"torch": torch}
            exec("\n".join(self.recipe(kind)), scope)
            drawn = {a.variable: scope[a.variable].to(self.device) for a in self.arguments if a.is_drawn}
            for name, tensor in drawn.items():
                if name not in self.batched:  # one tensor for all kinds, as weights are
                    drawn[name] = self._shared.setdefault(name, tensor)
            self._drawn[kind] = drawn
        return self._drawn[kind]

    def _find_outputs(self) -> list[Output]:
        """Call it with 3 rows and with 5: an axis that grows so is the batch's; a changed argument is an output."""
        if self.rows < 5:
            raise ArgumentError(f"rows is {self.rows}, want at least 5")
        few, many = (self._try(size) for size in (3, 5))
        found = []
        for (name, index), tensor in many.items():
            axis = _batch_axis(few[name, index].shape, tensor.shape) if (name, index) in few else None
            if index is not None and axis is not None:
                found.append(Output(name, axis, tensor.shape[axis] // 5, index))
            elif index is not None:
                self.unobserved.append(f"{name}: no axis of {list(tensor.shape)} grows with M: it is no request's")
        for name in sorted({name for tried in (few, many) for name, index in tried if index is None}):
            if name in self.batched:
                found.append(Output(name, self.batched[name].axis, self.batched[name].each, None))
            else:
                self.unobserved.append(f"{name}: is changed and has no axis M: it is no request's")
        if not found:
            raise ArgumentError("no output has an axis that grows with M, and no argument with one is changed")
        return found

    def _try(self, size: int) -> dict[tuple[str, int | None], torch.Tensor]:
        made = self.prepare("normal", torch.arange(size, device=self.device))
        before = {name: value.clone() for name, value in made.items() if isinstance(value, torch.Tensor)}
        returned = self.call(made)
        found: dict[tuple[str, int | None], torch.Tensor] = {
            (f"output {i}", i): value for i, value in enumerate(returned) if isinstance(value, torch.Tensor)
        }
        for name, value in before.items():
            if difference(name, value, made[name]) is not None:
                found[name, None] = made[name]
        same = {id(made[name]) for name, index in found if index is None}
        return {key: tensor for key, tensor in found.items() if key[1] is None or id(tensor) not in same}


class SpecWorkload(Workload):
    """One of batchproof's own ops, with the inputs of its ``OpSpec``."""

    kinds = ("normal", "wide exponents")

    def __init__(self, spec: OpSpec, dtype: torch.dtype, rows: int, device: torch.device, most_calls: int) -> None:
        self.spec, self.dtype, self.rows, self.device, self.most_calls = spec, dtype, rows, device, most_calls
        generator = torch.Generator(device).manual_seed(0)
        self.inputs = spec.sample_inputs(rows, dtype, device, generator)
        self.batched = {
            name: Batched(axis, 1, self.inputs[name].is_floating_point() and self.inputs[name].dim() > 1)
            for name, axis in spec.batch_axes.items()
        }
        self.function, self.unobserved = spec.op, []
        self.outputs = []

    def recipe(self, kind: str) -> list[str]:
        """Its inputs are those of its spec."""
        return []

    def prepare(self, kind: str, index: torch.Tensor) -> dict[str, Any]:
        """The spec's inputs of those requests."""
        made = dict(self.spec.select(self.inputs, index))
        if kind == "wide exponents":
            for name in (n for n, batched in self.batched.items() if batched.is_activation):
                powers = torch.arange(made[name].shape[-1], device=self.device) * 7919 % 23 - 12
                largest = torch.finfo(made[name].dtype).max
                made[name] = (made[name].float() * 2.0**powers).clamp(-largest, largest).to(made[name].dtype)
        return made

    def call(self, made: Mapping[str, Any]) -> list[Any]:
        """Through the public function."""
        return list(self.spec.run_rows(dict(made)))

    def observe(self, made: Mapping[str, Any], returned: Sequence[Any], size: int) -> list[tuple[str, torch.Tensor]]:
        """Every output has a row a request."""
        return [(f"output {i}", tensor) for i, tensor in enumerate(returned)]


def _go_by_place(function: Callable[..., Any], arguments: Sequence[Argument]) -> bool:
    """Whether arguments go by place: they have no names, or one that the function does not know."""
    if any(argument.name is None for argument in arguments):
        return True
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin may not tell
        return False
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return not takes_any and not {argument.name for argument in arguments} <= set(parameters)


def _take(tensor: torch.Tensor, axis: int, each: int, index: torch.Tensor) -> torch.Tensor:
    """The rows of requests, in a fresh tensor."""
    raw = indexable(tensor)
    if each == 1:
        return raw.index_select(axis, index).view(tensor.dtype)
    parted: torch.Tensor = raw.unflatten(axis, (-1, each))
    return parted.index_select(axis, index).flatten(axis, axis + 1).view(tensor.dtype)


def _rows_first(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    if tensor.shape[axis] == size:
        return tensor.movedim(axis, 0)
    parted: torch.Tensor = tensor.unflatten(axis, (size, -1))
    return parted.movedim(axis, 0)


def _fill(tensor: torch.Tensor, batched: Batched, value: float, places: torch.Tensor) -> None:
    """``value`` (inf and the largest as the dtype has them) in all rows of some requests, in place."""
    largest = torch.finfo(tensor.dtype).max
    filled = torch.tensor(value if not math.isfinite(value) else max(-largest, min(largest, value))).to(tensor.dtype)
    rows = places.repeat_interleave(batched.each)
    view = indexable(tensor).movedim(batched.axis, 0)
    view[rows] = indexable(filled.view(1)).to(tensor.device)[0]


def _flat(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    return [leaf for part in value for leaf in _flat(part)] if isinstance(value, (tuple, list)) else [value]


def _batch_axis(few: Sequence[int], many: Sequence[int]) -> int | None:
    """The axis that is 3 n long for 3 rows and 5 n for 5."""
    if len(few) != len(many):
        return None
    grown = [i for i, (a, b) in enumerate(zip(few, many, strict=True)) if a != b]
    return grown[0] if len(grown) == 1 and few[grown[0]] * 5 == many[grown[0]] * 3 else None
