"""Audit a callable: on which batch sizes, places, neighbours and layouts do the bits of a row depend?

A row's outputs are compared, bit for bit, between batches that hold it. Every relation that batch invariance implies is
a check of its own, so that a cause can be told from its consequences: an op that differs from itself on the same input
is not judged further; one whose rows depend on their neighbours' values differs between batch sizes as well, and the
first relation that varies names the cause.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ...errors import ArgumentError
from ...registry import OpSpec
from ..launches import differing, explain, launches
from ..report import HOLDS, NOT_EXERCISED, VARIES, Check, Difference, Launch, Report, Series, describe_environment
from .capture import eager_and_captured
from .classes import bisect_changes, describe, sizes_to_try
from .inputs import parse
from .reproduce import Side, name_of, reproduce
from .workload import LAYOUTS, Company, Result, SpecWorkload, Workload

__all__ = ["RELATIONS", "assert_batch_invariant", "audit_op"]

RELATIONS = (
    "repeat", "neighbours", "position", "padding", "batch size", "chunking", "graph against eager", "layout",
)  # fmt: skip
HOSTILE = {"zeros": 0.0, "the largest numbers": 3e38, "infinities": math.inf, "NaN": math.nan}
FEW_CALLS = 8  # for relations that one batch can show
MOST_CLASSES = 12  # of which the outputs are kept; beyond them, every size is its own
ROWS = {"cuda": 4096, "cpu": 1024}
CALLS = {"cuda": 4096, "cpu": 128}

_SIDES: tuple[tuple[Any, Any], ...] = ((max, operator.le), (min, operator.ge))

Progress = Callable[[str, int, int], None]


def audit_op(
    function: Callable[..., Any] | OpSpec, arguments: Mapping[str, Any] | Sequence[Any] = (), *,
    rows: int | None = None, device: str | torch.device | None = None, dtype: torch.dtype = torch.bfloat16,
    sizes: Sequence[int] | None = None, most_calls: int | None = None, limit_s: float = 300.0, seed: int = 0,
    name: str | None = None, require: Sequence[str] = (), progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Find the batch sizes, places, neighbours and layouts on which the bits of a callable's rows depend.

    Args:
        function: any callable of tensors, or an ``OpSpec`` of batchproof's, which brings its own arguments.
        arguments: by name or by place, in the notation of ``inputs``: ``"randn[M,4096]:bf16"`` has a
            row a request, ``"randn[4096]:bf16"`` is shared, ``1e-6`` is itself.
        rows: requests in all, and the largest batch; default 4096 on a GPU, 1024 on a CPU.
        device: default: the GPU if there is one.
        dtype: of an ``OpSpec``'s inputs.
        sizes: batch sizes to try; default: every size to 70, powers of two, multiples of the SMs, odd ones. Changes
            between two of them are followed to the exact size.
        most_calls: calls for one batch size and kind of input; default 4096 on a GPU, which covers all rows, or 128.
        limit_s: seconds after which no further size is tried.
        seed: of the inputs' values.
        name: of the op, in the report; default: its module and name.
        require: relations that must have been exercised, or the verdict is "not audited".
        progress: called with (stage, done, of).

    Returns:
        A report with every relation's check, the bit classes of the batch size, and a program that shows what varies.

    Raises:
        ArgumentError: an argument in a wrong notation, a relation that does not exist, no output of requests.
    """
    unknown = set(require) - set(RELATIONS)
    if unknown:
        raise ArgumentError(f"require has {sorted(unknown)}, want some of {', '.join(RELATIONS)}")
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = rows or ROWS.get(target.type, ROWS["cpu"])
    calls = most_calls or CALLS.get(target.type, CALLS["cpu"])
    began = time.monotonic()
    called = name or (f"batchproof.{function.name}" if isinstance(function, OpSpec) else name_of(function))
    settings: dict[str, Any] = {"rows": rows, "calls a size": calls, "seed": seed, "limit_s": limit_s}
    settings["arguments"] = {str(key): str(value) for key, value in _items(arguments)}
    whole = partial(
        Report, "op", called, required=tuple(require), settings=settings, environment=describe_environment(target)
    )
    try:
        if isinstance(function, OpSpec):
            workload: Workload = SpecWorkload(function, dtype, rows, target, calls)
        else:
            workload = Workload(function, parse(arguments), rows, target, calls, seed)
        audit = _Audit(workload, called, sizes, began + limit_s, progress or (lambda *_: None))
        checks = tuple(audit.checks())
    except ArgumentError:
        raise
    except Exception as error:  # audited code may raise anything; then nothing is known of it
        why = f"it raised {type(error).__name__}: {error}"
        return whole(error=why, seconds=time.monotonic() - began)
    return whole(
        checks=checks, classes=describe(audit.classes) if audit.classes else None, series=audit.series(),
        not_observed=tuple(workload.unobserved), reproduction=audit.reproduction, seconds=time.monotonic() - began,
    )  # fmt: skip


def assert_batch_invariant(
    function: Callable[..., Any] | OpSpec, arguments: Mapping[str, Any] | Sequence[Any] = (), **options: Any
) -> None:
    """Fail a test with the audit's report, unless every relation that could be exercised holds.

    Takes what ``audit_op`` takes. AssertionError carries the report's text, with the first relation that varies, the
    exact threshold and a program that shows it.
    """
    __tracebackhide__ = True
    report = audit_op(function, arguments, **options)
    if report.verdict != HOLDS:
        raise AssertionError(report.text())


class _Audit:
    """The relations of one workload."""

    def __init__(
        self, workload: Workload, name: str, sizes: Sequence[int] | None, deadline: float, progress: Progress
    ) -> None:
        self.workload, self.name, self.deadline, self.progress = workload, name, deadline, progress
        self.rows, self.device = workload.rows, workload.device
        self.sizes = sorted(sizes or sizes_to_try(self.rows, _processors(self.device)))
        if not 1 <= self.sizes[0] <= self.sizes[-1] <= self.rows:
            raise ArgumentError(f"sizes go from {self.sizes[0]} to {self.sizes[-1]}, want 1 to {self.rows} (rows)")
        self.kept: dict[str, list[Result]] = {kind: [] for kind in workload.kinds}
        self.classes: dict[int, object] = {}
        self.cases = 0
        self.reproduction: str | None = None

    def checks(self) -> list[Check]:
        """Every relation, in the order of ``RELATIONS``."""
        repeat = self._repeat()
        if repeat.verdict == VARIES:
            why = "cannot be told apart from run to run: the op differs from itself on the same input"
            return [repeat, *(Check(relation, NOT_EXERCISED, detail=why) for relation in RELATIONS[1:])]
        made = {"repeat": repeat, "batch size": self._batch_size()}
        others = {
            "neighbours": self._neighbours, "position": self._position, "padding": self._padding,
            "chunking": self._chunking, "graph against eager": self._graph, "layout": self._layout,
        }  # fmt: skip
        for relation, check in others.items():
            try:
                made[relation] = check()
            except Exception as error:  # what an op does not take, it may refuse in any way
                why = f"it raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                made[relation] = Check(relation, NOT_EXERCISED, detail=why)
                self.cases = 0
        return [made[relation] for relation in RELATIONS]

    def series(self) -> tuple[Series, ...]:
        """The bit class of every size tried."""
        if not self.classes:
            return ()
        number: dict[object, int] = {}
        y = tuple(float(number.setdefault(of, len(number))) for of in self.classes.values())
        return (Series("Bit classes", "classes", "batch size M, rows", "bit class", tuple(self.classes), y),)

    def _probes(self) -> list[int]:
        """Batch sizes at which the other relations are tried."""
        within = [size for size in (2, 9, 33, 257) if size <= self.rows]
        return sorted({*within, self.sizes[-1]})

    def _compare(self, expected: Result, found: Result) -> Difference | None:
        self.cases += int((expected.seen[: len(found.seen)] & found.seen[: len(expected.seen)]).sum())
        return expected.difference(found)

    def _report(self, relation: str, failures: dict[int, tuple[str, Difference]], what: str) -> Check:
        """A check of what failed at which batch size."""
        cases, self.cases = self.cases, 0
        if not failures:
            return Check(relation, HOLDS, cases, what)
        threshold, (detail, differs) = min(failures.items())
        return Check(relation, VARIES, cases, detail, threshold, op=self.name, difference=differs)

    def _reproduce(self, kind: str, first: Side, second: Side) -> None:
        if self.reproduction is None:
            self.reproduction = reproduce(self.workload, self.name, kind, first, second)

    def _repeat(self) -> Check:
        failures: dict[int, tuple[str, Difference]] = {}
        for size in self._probes():
            self.progress("repeat", size, self.sizes[-1])
            first = self.workload.run("normal", size, most_calls=FEW_CALLS)
            for again in range(3):
                second = self.workload.run("normal", size, most_calls=FEW_CALLS)
                differs = self._compare(first, second)
                if differs and size not in failures:
                    failures[size] = (f"the same {size} rows, run again ({again + 1}), give other bits", differs)
                    self._reproduce("normal", Side(range(size)), Side(range(size)))
        return self._report("repeat", failures, f"the same batches of {_list(self._probes())} rows four times")

    def _class_of(self, size: int) -> object:
        """The bit class of a size: for every kind of input, the number of the outputs its rows have."""
        self.progress("batch size", size, self.sizes[-1])
        found: list[int] = []
        for kind in self.workload.kinds:
            result, kept = self.workload.run(kind, size), self.kept[kind]
            same = next((i for i, other in enumerate(kept) if self._compare(other, result) is None), None)
            if same is None and len(kept) < MOST_CLASSES:
                kept.append(result)
                same = len(kept) - 1
            elif same is not None and len(result.seen) > len(kept[same].seen):
                kept[same] = result
            found.append(-size if same is None else same)
        return tuple(found)

    def _batch_size(self) -> Check:
        self.classes, complete = bisect_changes(self._class_of, self.sizes, lambda: time.monotonic() > self.deadline)
        tried, cases = list(self.classes), self.cases
        self.cases = 0
        changed = next((i for i in range(1, len(tried)) if self.classes[tried[i]] != self.classes[tried[i - 1]]), None)
        if changed is None:
            span = f" from {tried[0]} to {tried[-1]}" if tried else ""
            detail = f"{len(tried)} sizes{span}, {_list(self.workload.kinds)} inputs"
            if complete:
                return Check("batch size", HOLDS, cases, detail)
            detail = f"time was over after {detail}; {len(self.sizes)} were wanted"
            return Check("batch size", NOT_EXERCISED, cases, detail)
        before, after = tried[changed - 1], tried[changed]
        kind, differs = self._between(before, after)
        row = differs.index[0] if differs.index else 0
        fewest = next(size for size in tried if self.classes[size] == self.classes[before])
        self._reproduce(kind, Side(self._tile(row, fewest)), Side(self._tile(row, after)))
        kernels = differing(self._launches(before), self._launches(after))
        detail = f"{kind} inputs: {before} and {after} rows give other bits; {explain(*kernels)}"
        return Check("batch size", VARIES, cases, detail, after, "rows", self.name, None, differs, kernels)

    def _between(self, before: int, after: int) -> tuple[str, Difference]:
        """The first kind of input whose rows differ between two sizes of other classes, and how."""
        found = ((k, self.workload.run(k, before).difference(self.workload.run(k, after))) for k in self.workload.kinds)
        return next((kind, differs) for kind, differs in found if differs is not None)

    def _tile(self, row: int, size: int) -> range:
        """The batch of ``size`` in which ``Workload.run`` ran a row."""
        start = min(row // size * size, min(self.rows, size * self.workload.most_calls) - size)
        return range(start, start + size)

    def _launches(self, size: int) -> tuple[Launch, ...]:
        made = self.workload.prepare("normal", torch.arange(size, device=self.device))
        return launches(lambda: self.workload.call(made), self.device)

    def _smallest(self, fails: Callable[[int], tuple[str, Difference] | None], sizes: Sequence[int]) -> Any:
        """The failures at ``sizes``, and at the smallest size between the first of them and the one before it."""
        failures: dict[int, tuple[str, Difference]] = {}
        held = 1
        for size in sizes:
            failure = fails(size)
            if failure is None:
                held = size
                continue
            failures[size] = failure
            while size - held > 1:
                middle = (held + size) // 2
                failure = fails(middle)
                if failure is None:
                    held = middle
                else:
                    size, failures[middle] = middle, failure
            break
        return failures

    def _neighbours(self) -> Check:
        def fails(size: int) -> tuple[str, Difference] | None:
            self.progress("neighbours", size, self.sizes[-1])
            places, rows = torch.arange(size, device=self.device), self._whole_batches(size)
            whole = self.workload.run("normal", size, rows)
            others = {"every second place": places % 2 == 0, "all places but one": places == size // 2}
            for said, kept in others.items():
                for value, fill in HOSTILE.items():
                    found = self.workload.run("normal", size, rows, Company(fill, kept))
                    differs = self._compare(whole, found)
                    if differs:
                        place = differs.index[0] % size
                        tile = range(differs.index[0] - place, differs.index[0] - place + size)
                        kept_places = [int(p) for p in kept.nonzero().flatten()]
                        self._reproduce("normal", Side(tile), Side(tile, fill, kept_places))
                        return f"{size} rows, {value} in {said}: place {place} has other bits", differs
            order, odd = rows.clone(), rows % size % 2 == 1
            order[odd] = rows[odd].roll(1)  # other rows beside those in even places
            differs = self._compare(whole, self.workload.run("normal", size, order, Company(kept=places % 2 == 0)))
            said = f"{size} rows, other rows in every second place: the rest has other bits"
            return (said, differs) if differs else None

        activations = any(batched.is_activation for batched in self.workload.batched.values())
        if not activations:
            return Check("neighbours", NOT_EXERCISED, detail="no argument of requests holds floating-point numbers")
        failures = self._smallest(fails, self._probes())
        what = f"{_list(HOSTILE)} and other rows beside, {_list(self._probes())} rows"
        return self._report("neighbours", failures, what)

    def _whole_batches(self, size: int) -> torch.Tensor:
        """Rows that fill batches of ``size``, so that each row has one place."""
        return torch.arange(min(self.rows // size, FEW_CALLS) * size, device=self.device)

    def _position(self) -> Check:
        def fails(size: int) -> tuple[str, Difference] | None:
            self.progress("position", size, self.sizes[-1])
            tiles = self._whole_batches(size).view(-1, size)
            whole = self.workload.run("normal", size, tiles.flatten())
            generator = torch.Generator().manual_seed(size)
            shuffled = torch.randperm(size, generator=generator).to(self.device)
            orders = {
                "moved by one": tiles.roll(1, 1), "moved by half": tiles.roll(size // 2, 1),
                "in reverse": tiles.flip(1), "shuffled": tiles[:, shuffled],
            }  # fmt: skip
            for said, order in orders.items():
                differs = self._compare(whole, self.workload.run("normal", size, order.flatten()))
                if differs:
                    row = differs.index[0]
                    tile, moved = (side[row // size].tolist() for side in (tiles, order))
                    self._reproduce("normal", Side(tile), Side(moved))
                    return f"the same {size} rows {said}: row {row} has other bits", differs
            return None

        failures = self._smallest(fails, self._probes())
        return self._report("position", failures, f"moved, reversed and shuffled, {_list(self._probes())} rows")

    def _padding(self) -> Check:
        failures: dict[int, tuple[str, Difference]] = {}
        tried = []
        for size in (s for s in (1, 3, 5, 9, 33, 100, 257, 1000) if s in self.classes):
            padded = 1 << size.bit_length()
            if self.classes.get(padded) != self.classes[size]:
                continue  # what then differs is the batch size's doing
            tried.append(f"{size} to {padded}")
            places = torch.arange(padded, device=self.device)
            for said, kept in (("behind", places < size), ("before", places >= padded - size)):
                alone = self.workload.run("normal", padded, most_calls=FEW_CALLS)
                found = self.workload.run("normal", padded, company=Company(0.0, kept), most_calls=FEW_CALLS)
                differs = self._compare(alone, found)
                if differs and size not in failures:
                    failures[size] = (f"{size} rows with zeros {said} them, {padded} in all, have other bits", differs)
        if not tried:
            return Check("padding", NOT_EXERCISED, detail="no size and the next power of two give the same bits")
        return self._report("padding", failures, f"{_list(tried)} rows, zeros behind and before")

    def _presumed_class(self, size: int) -> object:
        """The class of the sizes tried on either side of ``size``; None if these differ."""
        below, above = (self.classes[pick(s for s in self.classes if side(s, size))] for pick, side in _SIDES)
        return below if below == above else None

    def _chunking(self) -> Check:
        failures: dict[int, tuple[str, Difference]] = {}
        tried = []
        for whole in (s for s in self._probes() if s in self.classes):
            parts = [part for part in (1, whole // 3, whole - 1 - whole // 3) if part > 0]
            if {self._presumed_class(part) for part in parts} != {self.classes[whole]}:
                continue  # what then differs is the batch size's doing
            tried.append(whole)
            expected = self.workload.run_batch("normal", torch.arange(whole, device=self.device))
            pieces, start = [], 0
            for part in parts:
                index = torch.arange(start, start + part, device=self.device)
                pieces.append(self.workload.run_batch("normal", index))
                start += part
            joined = [(name, torch.cat([p[i][1] for p in pieces])) for i, (name, _) in enumerate(pieces[0])]
            seen = torch.ones(whole, dtype=torch.bool, device=self.device)
            differs = self._compare(Result(tuple(expected), seen), Result(tuple(joined), seen))
            if differs:
                failures[whole] = (f"{whole} rows in pieces of {_list(parts)} have other bits", differs)
        if not tried:
            return Check("chunking", NOT_EXERCISED, detail="pieces are of other bit classes than the whole")
        return self._report("chunking", failures, f"{_list(tried)} rows in three uneven pieces")

    def _graph(self) -> Check:
        if self.device.type != "cuda":
            return Check("graph against eager", NOT_EXERCISED, detail=f"no CUDA graphs on {self.device.type}")
        failures: dict[int, tuple[str, Difference]] = {}
        for size in self._probes():
            self.progress("graph against eager", size, self.sizes[-1])
            eager, captured = eager_and_captured(self.workload, size)
            differs = self._compare(eager, captured)
            if differs:
                failures[size] = (f"{size} rows in a CUDA graph have other bits than eager", differs)
        return self._report("graph against eager", failures, f"captured and replayed, {_list(self._probes())} rows")

    def _layout(self) -> Check:
        failures: dict[int, tuple[str, Difference]] = {}
        held: list[str] = []
        refused: list[str] = []
        for size in self._probes()[:3]:
            self.progress("layout", size, self.sizes[-1])
            for layout in LAYOUTS:
                try:
                    plain = self.workload.run("normal", size, most_calls=FEW_CALLS)
                    other = self.workload.run("normal", size, company=Company(layout=layout), most_calls=FEW_CALLS)
                except Exception as error:
                    refused.append(f"{layout} ({type(error).__name__})")
                    continue
                differs = self._compare(plain, other)
                held.append(layout)
                if differs and size not in failures:
                    failures[size] = (f"{size} rows, {layout}, have other bits than contiguous ones", differs)
                    self._reproduce("normal", Side(range(size)), Side(range(size), layout=layout))
        said = f"; refused: {_list(dict.fromkeys(refused))}" if refused else ""
        if not held:
            return Check("layout", NOT_EXERCISED, detail=f"none is taken{said}")
        return self._report("layout", failures, f"{_list(dict.fromkeys(held))}{said}")


def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return torch.get_num_threads()


def _items(arguments: Mapping[str, Any] | Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(arguments.items() if isinstance(arguments, Mapping) else enumerate(arguments))


def _list(entries: Any) -> str:
    return ", ".join(str(entry) for entry in entries)
