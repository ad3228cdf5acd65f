"""A few lines of Python that show a difference, run before they are shown."""

from __future__ import annotations

import contextlib
import importlib
import io
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .workload import LAYOUTS, Output, Workload

__all__ = ["Side", "name_of", "reproduce"]


_SAID = "bytes that differ:"


@dataclass(frozen=True)
class Side:
    """One of two batches: its rows in order; ``fill`` in all places but ``kept``; another layout."""

    rows: range | Sequence[int]
    fill: float | None = None
    kept: Sequence[int] | None = None
    layout: str | None = None


def name_of(function: Callable[..., Any]) -> str:
    """Module and name of a callable."""
    module = getattr(function, "__module__", None) or ""
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", None) or repr(function)
    return f"{module}.{name}" if module and module != "__main__" and module not in name else name


def reproduce(workload: Workload, name: str, kind: str, first: Side, second: Side) -> str | None:
    """A program that prints how many bytes of each row that both sides keep differ; None if it would print nothing.

    It is run once, here: what it prints stands in its last line, as a comment.
    """
    lines = workload.recipe(kind)
    if not lines:
        return None
    importing = _import_line(workload.function, name)
    more = ", fill=None, kept=None" if _is_changed(first, second) else ""
    program = [
        "import torch", importing or f"# function = {name}", "", *lines, "",
        f"def run(rows{more}):", *_body(workload, (first, second)), "",
        f"a_rows, b_rows = {_rows(first.rows)}, {_rows(second.rows)}",
        f"a, b = run(a_rows{_more(first)}), run(b_rows{_more(second)})",
        f"both = [r for r in a_rows if r in b_rows{_both(first, second)}]",
        "for x, y in zip(a, b):",
        "    x, y = (t[[rows.index(r) for r in both]].contiguous().view(torch.uint8) for t, rows in ((x, a_rows), "
        "(y, b_rows)))",
        f'    print("{_SAID}", int((x != y).sum()), "of", x.numel())',
    ]  # fmt: skip
    printed = _run("\n".join(program), workload.function)
    if not any(int(line.split(":")[1].split()[0]) for line in printed):
        return None
    return "\n".join([*program, *(f"# {line}" for line in printed)])


def _import_line(function: Callable[..., Any], name: str) -> str | None:
    """Lines that import the function by its module and name, or by the dotted ``name``, if they give this function."""
    own = (getattr(function, "__module__", None) or "", getattr(function, "__qualname__", ""))
    dotted = [own, *((name[:i], name[i + 1 :]) for i, c in enumerate(name) if c == ".")]
    for module, attribute in dotted:
        if not module or module == "__main__" or "<" in attribute or not attribute:
            continue
        with contextlib.suppress(ImportError, AttributeError, ValueError):
            if operator.attrgetter(attribute)(importlib.import_module(module)) is function:
                more = "" if module == "torch" else f"import {module}\n"
                return f"{more}function = {module}.{attribute}"
    return None


def _body(workload: Workload, sides: Sequence[Side]) -> list[str]:
    """The lines of ``run``."""
    lines = ["    rows = torch.tensor(list(rows))"]
    device = str(workload.device)
    layouts = {side.layout for side in sides if side.layout}
    for a in workload.arguments:
        x = a.variable
        if a.is_drawn and a.axis is None:
            lines.append(f"    {x}_ = {x}.to({device!r})")
        elif a.is_drawn:
            fp8 = a.dtype.is_floating_point and a.dtype.itemsize == 1  # which has no index_select
            raw, back = (f"{x}.view(torch.uint8)", f".view({a.dtype})") if fp8 else (x, "")
            taken = f"{raw}.index_select({a.axis}, rows)"
            if a.each > 1:
                taken = f"{raw}.unflatten({a.axis}, (-1, {a.each})).index_select({a.axis}, rows)"
                taken += f".flatten({a.axis}, {(a.axis or 0) + 1})"
            lines.append(f"    {x}_ = {taken}{back}.to({device!r})")
        elif a.maker == "arange":
            lines.append(
                f"    {x}_ = torch.arange({a.each} * len(rows) + {a.extra}, dtype={a.dtype}, device={device!r})"
            )
        elif a.maker == "empty":
            shape = [f"{a.each} * len(rows) + {a.extra}" if dim is None else str(dim) for dim in a.dims]
            lines.append(f"    {x}_ = torch.zeros({', '.join(shape)}, dtype={a.dtype}, device={device!r})")
        elif a.maker == "M":
            lines.append(f"    {x}_ = len(rows)")
        else:
            lines.append(f"    {x}_ = {a.literal!r}")
        if a.is_activation and a.each == 1 and any(side.fill is not None for side in sides):
            lines.append("    if fill is not None:")
            lines.append(f"        {x}_.movedim({a.axis}, 0)[[p for p in range(len(rows)) if p not in kept]] = fill")
        if a.is_activation and layouts:
            expression = re.sub(r"\bx\b", f"{x}_", LAYOUTS[next(iter(layouts))])
            lines += ["    if fill == 'layout':", f"        {x}_ = {expression}"]
    names = [a.variable for a in workload.arguments]
    given = ", ".join(f"{name}_" if workload.by_place else f"{name}={name}_" for name in names)
    lines.append(f"    out = function({given})")
    return [*lines, f"    return [{', '.join(_observed(o) for o in workload.outputs)}]"]


def _observed(output: Output) -> str:
    tensor = f"{output.name}_" if output.index is None else f"(out if torch.is_tensor(out) else out[{output.index}])"
    if output.each == 1 and output.axis == 0:
        return tensor
    return f"{tensor}.unflatten({output.axis}, (len(rows), -1)).movedim({output.axis}, 0)"


def _is_changed(*sides: Side) -> bool:
    return any(side.fill is not None or side.layout is not None for side in sides)


def _rows(rows: range | Sequence[int]) -> str:
    return repr(rows) if isinstance(rows, range) else repr(list(rows))


def _more(side: Side) -> str:
    if side.layout:
        return ", 'layout'"
    if side.fill is None:
        return ""
    return f", float({str(side.fill)!r}), {list(side.kept or ())}"


def _both(first: Side, second: Side) -> str:
    kept = second.kept if second.kept is not None else first.kept
    return "" if kept is None else f" and b_rows.index(r) in {list(kept)}"


def _run(program: str, function: Callable[..., Any]) -> list[str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {"function": function})
    return [line for line in printed.getvalue().splitlines() if line.startswith(_SAID)]  # the function may print too
