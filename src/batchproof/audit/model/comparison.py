"""Comparing a run of a model with a recording of the request alone, op by op, while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from ..report import Difference
from .align import Layout, compare, largest_gap
from .observe import MODULE_OUTPUT, Call, Frame, Observer, Op, Recording, source_line, version

__all__ = ["EQUAL", "Comparison", "Findings", "Variance"]

# How the inputs of an op compare: their bits, or why these say nothing.
EQUAL, DIFFER, PLACED, UNALIGNED, OVERWRITTEN = "equal", "differ", "in another place", "unaligned", "overwritten"
UNPROVEN = "differs, or is in another place, on inputs not known to be equal; the model's output does not differ"


@dataclass(frozen=True)
class Variance:
    """An op or module output whose bits differ.

    Attributes:
        order: step of the run and number of the event in it.
        op: the op's name, or "module output".
        path: of the module; "" is the model itself.
        source: file and line.
        difference: how it differs.
        inputs: "equal", or how they are not.
        again: the op on its arguments, alone and in the other run.
    """

    order: tuple[int, int]
    op: str
    path: str
    source: str
    difference: Difference
    inputs: str
    again: tuple[Callable[[], object], Callable[[], object]] | None = None

    @property
    def rank(self) -> tuple[bool, tuple[int, int]]:
        """What differs on equal inputs comes first, since the cause is in it; then the order of execution."""
        return self.inputs != EQUAL, self.order


class Suspect(NamedTuple):
    """An op that ran and was not compared; see ``Variance``."""

    order: tuple[int, int]
    op: str
    path: str


@dataclass
class Findings:
    """What comparisons saw: counts, the first variance in order of execution, and what could not be compared.

    Attributes:
        compared: outputs compared.
        varying: outputs that differ.
        first: the first of them.
        unseen: (op, module path, reason) of what was not compared, counted.
        suspects: those of them that may be the cause of a difference, by order.
        spread: by module path, the largest difference of its output relative to the largest value.
        outputs_differ: whether the model's own output does.
        steps: runs compared.
    """

    compared: int = 0
    varying: int = 0
    first: Variance | None = None
    unseen: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    suspects: list[Suspect] = field(default_factory=list)
    spread: dict[str, float | None] = field(default_factory=dict)
    outputs_differ: bool = False
    steps: int = 0

    def found(self, variance: Variance) -> None:
        """Count a variance; the first one is kept."""
        self.varying += 1
        if self.first is None or variance.rank < self.first.rank:
            self.first = variance

    def suspected(self) -> list[str]:
        """Ops that were not compared in the first variance's module, or a module in it, before it was left."""
        assert self.first is not None
        (step, index), path = self.first.order, self.first.path
        inside = f"{path}." if path else ""
        names = [
            s.op
            for s in sorted(self.suspects)
            if s.order[0] == step and s.order[1] <= index and f"{s.path}.".startswith(inside)
        ]
        return list(dict.fromkeys(names))


class Comparison(Observer):
    """Compares a run with a recording, op by op, as it goes; what it finds is in ``findings``.

    Ops of one call of a module correspond while their names do. From where they part, that is on another path through
    the module's code, only an op whose name is there once on either side is compared, and it is said to vary only if
    its inputs are known to be equal and the module's output differs too. The rest is not observed.
    """

    def __init__(self, model: nn.Module, recording: Recording, layout: Layout, findings: Findings) -> None:
        super().__init__(model)
        self._calls = recording.calls
        self._layout = layout
        self._findings = findings
        self._step = findings.steps
        self._pending: list[Variance] = []
        findings.steps += 1

    def saw_op(self, op: Op, frame: Frame) -> None:
        """Compare it with its counterpart if that is known, else when the module returns."""
        recorded = self._calls.get((frame.path, frame.ordinal), Call()).ops
        if not frame.rest and frame.matched < len(recorded) and recorded[frame.matched].name == op.name:
            self._compare(recorded[frame.matched], op, frame.path)
            frame.matched += 1
        else:
            op.outputs = [t.clone() for t in op.outputs]
            op.source = source_line()
            frame.rest.append(op)

    def left(self, frame: Frame, output: Op) -> None:
        """Compare the module's output, and what is left of its ops; with the model's own, settle what is pending."""
        call = self._calls.get((frame.path, frame.ordinal), Call())
        recorded = call.output or Op(MODULE_OUTPUT, 0)
        outcomes = self._compare(recorded, output, frame.path)
        differs = any(isinstance(outcome, Difference) for outcome in outcomes)
        if len(recorded.outputs) != len(output.outputs):
            self._skip(output, frame.path, f"{len(recorded.outputs)} tensors alone, {len(output.outputs)} here")
        if outcomes:
            self._measure(frame.path, recorded.outputs[0], output.outputs[0], outcomes[0])
        self._compare_rest(call.ops[frame.matched :], frame.rest, frame.path, differs)
        if frame.path == "":
            self._findings.outputs_differ |= differs
            self._settle(differs)

    def _settle(self, differs: bool) -> None:
        """Count what differs on inputs not known to be equal if the model's output differs; else it was cut wrongly."""
        for variance in self._pending:
            if differs:
                self._findings.found(variance)
            else:
                self._findings.unseen[variance.op, variance.path, UNPROVEN] += 1
        self._pending.clear()

    def _compare_rest(self, alone: list[Op], other: list[Op], path: str, differs: bool) -> None:
        """The ops of one call of a module after the two runs parted; ``differs``: the module's output does."""
        here, there = (Counter(op.name for op in ops) for ops in (alone, other))
        recorded = {op.name: op for op in alone}
        for op in other:
            if here[op.name] == there[op.name] == 1:
                self._compare(recorded[op.name], op, path, parted=True, may_vary=differs)
            else:
                self._skip(op, path, "on another path than alone")
        for op in alone:
            if op.name not in there:
                self._skip(op, path, "only alone, on another path", suspect=False)  # named by what runs here instead

    def _compare(
        self, recorded: Op, op: Op, path: str, parted: bool = False, may_vary: bool = True
    ) -> list[Difference | str | None]:
        outcomes: list[Difference | str | None] = []
        for i, (wanted, found) in enumerate(zip(recorded.outputs, op.outputs, strict=False)):
            outcome = compare(f"output {i}", wanted, found, self._layout)
            outcomes.append(outcome)
            if isinstance(outcome, str):
                self._skip(op, path, outcome)
                continue
            inputs = EQUAL if outcome is None else self._compare_inputs(recorded, op)
            trusted = inputs == EQUAL and may_vary if parted else inputs != UNALIGNED or op.name == MODULE_OUTPUT
            if outcome is not None and not trusted:  # a consequence of other inputs, or another op of the same name
                reason = "on another path than alone, with other inputs"
                self._skip(op, path, reason, suspect=inputs not in (DIFFER, PLACED))
                continue
            self._findings.compared += 1
            if outcome is not None:
                self._vary(recorded, op, path, outcome, inputs)
        return outcomes

    def _vary(self, recorded: Op, op: Op, path: str, outcome: Difference, inputs: str) -> None:
        again = (recorded.again, op.again) if recorded.again and op.again and inputs == EQUAL else None
        variance = Variance((self._step, op.index), op.name, path, op.source or source_line(), outcome, inputs, again)
        if inputs == EQUAL:
            self._findings.found(variance)
        else:
            self._pending.append(variance)

    def _compare_inputs(self, recorded: Op, op: Op) -> str:
        """Whether the request's part of the floating-point inputs has the same bits, as far as that can be told.

        Inputs that only one of them has, such as a mask, are left out.
        """
        if op.places:
            return PLACED
        result = EQUAL
        for (wanted, before), (found, since) in zip(recorded.inputs, op.inputs, strict=False):
            if version(wanted) != before or version(found) != since:
                result = result if result == UNALIGNED else OVERWRITTEN
                continue
            outcome = compare("input", wanted, found, self._layout)
            if isinstance(outcome, Difference):
                return DIFFER
            result = UNALIGNED if outcome else result
        return result

    def _measure(self, path: str, wanted: torch.Tensor, found: torch.Tensor, outcome: Difference | str | None) -> None:
        gap = None if isinstance(outcome, str) else 0.0
        if isinstance(outcome, Difference):
            gap = largest_gap(wanted, found, self._layout)
        previous = self._findings.spread.get(path, 0.0)
        self._findings.spread[path] = None if gap is None or previous is None else max(previous, gap)

    def _skip(self, op: Op, path: str, reason: str, suspect: bool = True) -> None:
        self._findings.unseen[op.name, path, reason] += 1
        if suspect and op.name != MODULE_OUTPUT:
            self._findings.suspects.append(Suspect((self._step, op.index), op.name, path))
