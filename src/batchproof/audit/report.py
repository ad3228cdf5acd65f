"""What an audit found: relations that hold or vary, what was not exercised, and the verdict that follows.

One structure for all three targets (op, model, server), so that text, JSON and HTML are written once. JSON carries
``schema``; a reader refuses a schema it does not know.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .._version import __version__
from ..errors import ArgumentError

__all__ = ["SCHEMA", "Check", "Difference", "Launch", "Report", "Series", "by", "describe_environment"]

SCHEMA = "batchproof.audit/1"
HOLDS, VARIES, NOT_EXERCISED = "holds", "varies", "not exercised"
NOT_AUDITED = "not audited"
_EXIT_CODES = {HOLDS: 0, VARIES: 1, NOT_AUDITED: 2}


@dataclass(frozen=True)
class Launch:
    """A kernel launch as the profiler saw it; on a CPU, an aten op, without grid and block.

    Attributes:
        kernel: its name, demangled.
        grid: programs (CTAs) in x, y, z.
        block: threads a program in x, y, z.
        shared_bytes: shared memory a program, static and dynamic.
    """

    kernel: str
    grid: tuple[int, ...] = ()
    block: tuple[int, ...] = ()
    shared_bytes: int = 0

    def __str__(self) -> str:
        shape = f" grid {by(self.grid)} block {by(self.block)}" if self.grid else ""
        return f"{self.kernel}{shape}" + (f" shared {self.shared_bytes} B" if self.shared_bytes else "")


@dataclass(frozen=True)
class Difference:
    """How two results that should have the same bits differ.

    Attributes:
        output: which output, such as "output 0", "residual" or "model.layers.0.mlp".
        index: of the first element that differs.
        expected, found: its two values.
        elements, of: how many elements differ, of how many compared.
        ulps: the largest distance in units in the last place; None for other than floating-point numbers.
        largest: the largest absolute difference of finite elements.
    """

    output: str
    index: tuple[int, ...]
    expected: float | str
    found: float | str
    elements: int
    of: int
    ulps: int | None = None
    largest: float | None = None

    def __str__(self) -> str:
        size = "" if self.ulps is None else f", at most {self.ulps} ulp apart"
        return (
            f"{self.output}: {self.elements} of {self.of} elements differ{size}, "
            f"first at {list(self.index)}: {self.expected!r} against {self.found!r}"
        )


@dataclass(frozen=True)
class Check:
    """One relation that batch invariance implies, and whether it held.

    Attributes:
        relation: its name, such as "batch size", "position" or "neighbours".
        verdict: "holds", "varies" or "not exercised".
        cases: comparisons of bits that were made.
        detail: one sentence on what was seen; why, if it was not exercised.
        threshold: the smallest number of ``unit`` at which the result is another, if there is one.
        unit: what is counted, such as "rows", "tokens", "requests".
        op: the op that varies, as far as it is known: in a model, the first one.
        where: its module path and source line, in a model.
        difference: the first difference seen.
        launches: the kernels on either side, before and from the threshold on.
    """

    relation: str
    verdict: str
    cases: int = 0
    detail: str = ""
    threshold: int | None = None
    unit: str = "rows"
    op: str | None = None
    where: str | None = None
    difference: Difference | None = None
    launches: tuple[tuple[Launch, ...], tuple[Launch, ...]] | None = None

    def __post_init__(self) -> None:
        if self.verdict not in (HOLDS, VARIES, NOT_EXERCISED):
            raise ArgumentError(f"verdict is {self.verdict!r}, want {HOLDS!r}, {VARIES!r} or {NOT_EXERCISED!r}")


@dataclass(frozen=True)
class Series:
    """Numbers for a plot.

    Attributes:
        title: what it shows.
        kind: "classes" (y is the number of a bit class, and x where it was measured) or "spread" (y over layers).
        x_label, y_label: of the axes, with units.
        x: numbers, or labels.
        y: a number for each x; None where nothing was measured.
    """

    title: str
    kind: str
    x_label: str
    y_label: str
    x: tuple[float | str, ...]
    y: tuple[float | None, ...]

    def __post_init__(self) -> None:
        if self.kind not in ("classes", "spread"):
            raise ArgumentError(f"kind of a series is {self.kind!r}, want 'classes' or 'spread'")
        if len(self.x) != len(self.y):
            raise ArgumentError(f"a series has {len(self.x)} x and {len(self.y)} y, want as many")
        infinite = [value for value in self.y if value is not None and not math.isfinite(value)]
        if infinite:
            raise ArgumentError(f"a series has the value {infinite[0]}, want finite numbers, or None for not measured")


@dataclass(frozen=True)
class Report:
    """The result of an audit.

    Attributes:
        target: "op", "model" or "server".
        name: what was audited.
        checks: the relations, in the order in which a cause is looked for: the first that varies explains the rest.
        classes: for an op: batch sizes that give the same bits, in words, such as "1-255 | 256-4096".
        not_observed: what ran and could not be looked at, each with the reason.
        series: plots.
        reproduction: a Python program that shows the difference, or the command that does.
        required: names of relations (``--require``) that must have been exercised.
        settings: what the audit was told.
        environment: device and versions.
        seconds: time it took.
        error: why nothing could be audited.
    """

    target: str
    name: str
    checks: tuple[Check, ...] = ()
    classes: str | None = None
    not_observed: tuple[str, ...] = ()
    series: tuple[Series, ...] = ()
    reproduction: str | None = None
    required: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None

    @property
    def verdict(self) -> str:
        """Varies if any relation does; not audited if nothing, or not all that was required, was exercised."""
        if any(check.verdict == VARIES for check in self.checks):
            return VARIES
        exercised = {check.relation for check in self.checks if check.verdict == HOLDS}
        return HOLDS if exercised and not self.error and set(self.required) <= exercised else NOT_AUDITED

    @property
    def exit_code(self) -> int:
        """0 holds, 1 varies, 2 could not be audited."""
        return _EXIT_CODES[self.verdict]

    @property
    def cause(self) -> Check | None:
        """The first relation that varies, which explains those after it."""
        return next((check for check in self.checks if check.verdict == VARIES), None)

    @property
    def headline(self) -> str:
        """The verdict, with the relations that vary."""
        found = ", ".join(check.relation for check in self.checks if check.verdict == VARIES)
        return f"{VARIES} by {found}" if found else self.verdict

    @property
    def gaps(self) -> tuple[str, ...]:
        """What the verdict does not cover, one sentence each."""
        skipped = [f"{c.relation}: {c.detail}" for c in self.checks if c.verdict == NOT_EXERCISED]
        absent = set(self.required) - {check.relation for check in self.checks}
        return (*skipped, *(f"{name}: required, and was not looked at" for name in sorted(absent)))

    def to_json(self) -> str:
        """JSON, with the schema and the verdict in it."""
        body = asdict(self) | {"verdict": self.verdict, "gaps": list(self.gaps)}
        return json.dumps({"schema": SCHEMA} | body, indent=1, allow_nan=False, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """A report read back; ArgumentError if it has another schema."""
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            seen = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ArgumentError(f"schema is {seen!r}, want {SCHEMA!r}")
        for derived in ("schema", "verdict", "gaps"):
            data.pop(derived, None)
        data["checks"] = tuple(_check(check) for check in data["checks"])
        data["series"] = tuple(Series(**s | {"x": tuple(s["x"]), "y": tuple(s["y"])}) for s in data["series"])
        data |= {name: tuple(data[name]) for name in ("not_observed", "required")}
        return cls(**data)

    def text(self) -> str:
        """For people: the verdict first, then its reasons, then what it does not cover."""
        lines = [f"{self.target} {self.name}: {self.headline}"]
        if self.error:
            lines.append(f"  {self.error}")
        if self.cause is not None:
            lines += _explain(self.cause)
        if self.classes:
            lines.append(f"  bit classes of the batch size: {self.classes}")
        width = max((len(check.relation) for check in self.checks), default=0)
        lines += ["", "relations"]
        lines += [f"  {c.relation:<{width}}  {c.verdict:<13}  {c.cases:>6} compared  {c.detail}" for c in self.checks]
        lines += _section("not covered by this verdict", self.gaps)
        lines += _section("not observed", self.not_observed)
        if self.reproduction:
            lines += ["", "to see it:", *(f"  {line}" for line in self.reproduction.splitlines())]
        where = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        return "\n".join([*lines, "", f"{where}; {self.seconds:.1f} s"]) + "\n"


def describe_environment(device: torch.device | None = None) -> dict[str, str]:
    """Device and versions an audit's result depends on."""
    name = f"cpu {platform.machine()}"
    if device is not None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"device": name, "torch": torch.__version__, "batchproof": __version__}


def _explain(check: Check) -> list[str]:
    lines = [f"  {check.relation} varies: {check.detail}"]
    if check.op:
        lines.append(f"  op: {check.op}" + (f", in {check.where}" if check.where else ""))
    if check.threshold is not None:
        lines.append(f"  from {check.threshold} {check.unit} on")
    if check.difference:
        lines.append(f"  {check.difference}")
    if check.launches:
        before, after = check.launches
        lines += [f"  kernels before: {launch}" for launch in before]
        lines += [f"  kernels after:  {launch}" for launch in after]
    return lines


def _section(title: str, entries: Sequence[str]) -> list[str]:
    return ["", title, *(f"  {entry}" for entry in entries)] if entries else []


def _check(data: dict[str, Any]) -> Check:
    if data["difference"]:
        data["difference"] = Difference(**data["difference"] | {"index": tuple(data["difference"]["index"])})
    if data["launches"]:
        before, after = (tuple(_launch(launch) for launch in side) for side in data["launches"])
        data["launches"] = (before, after)
    return Check(**data)


def _launch(data: dict[str, Any]) -> Launch:
    return Launch(**data | {"grid": tuple(data["grid"]), "block": tuple(data["block"])})


def by(sizes: Sequence[int]) -> str:
    """Such as 132x1x1."""
    return "x".join(str(size) for size in sizes)
