"""Watching a model run: every op that passes torch's dispatcher, and every module's output.

An ``Observer`` is a dispatch mode with hooks on the model's modules, so that an op is known by the call of the module
it runs in and its number there. A ``Recording`` keeps what a run makes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

__all__ = ["MODULE_OUTPUT", "Call", "Frame", "Observer", "Op", "Recording", "source_line", "version"]

MODULE_OUTPUT = "module output"
OLD = -2  # the version of an input that the op itself has written over
# What copies, or is made of no number: whether it runs depends on strides and masks, and its bits on nothing.
_COMPUTES_NOTHING = {
    "clone", "_unsafe_view", "empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_empty_strided",
    "new_zeros", "new_ones", "new_full",
}  # fmt: skip
# What puts numbers where integers say, or counts them, which may follow the batch: rows sorted by expert, for one.
_PLACES = {
    "index", "index_select", "index_put", "index_put_", "index_copy_", "gather", "scatter", "scatter_", "embedding",
    "cat", "stack", "copy_", "roll", "flip", "repeat", "masked_select", "masked_scatter", "masked_scatter_", "histc",
}  # fmt: skip
_TORCH, _HERE = (str(Path(file).parent) for file in (torch.__file__, __file__))


@dataclass
class Op:
    """One op of a run, or the output of a module.

    Attributes:
        name: such as "aten.mm.default", or "module output".
        index: its number among the events of the run.
        outputs: what it returned; what it wrote, if it returns nothing.
        inputs: floating-point tensors, with the version that tells whether they were written to since.
        places: integers say where in its output numbers are, so that another place is no variance of its own.
        again: runs it once more.
        source: file and line, if they were noted.
    """

    name: str
    index: int
    outputs: list[torch.Tensor] = field(default_factory=list)
    inputs: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    places: bool = False
    again: Callable[[], object] | None = None
    source: str = ""


@dataclass
class Call:
    """One call of a module: the ops it runs itself, not in modules inside it, and its output."""

    ops: list[Op] = field(default_factory=list)
    output: Op | None = None


@dataclass
class Frame:
    """A call of a module that has not returned: the ``ordinal``-th of that path. ``rest``: ops not matched yet."""

    path: str
    ordinal: int
    inputs: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    matched: int = 0
    rest: list[Op] = field(default_factory=list)


class Observer(TorchDispatchMode):
    """Knows in which module's call an op runs; subclasses say what to do with ops and outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._paths = {module: path for path, module in model.named_modules()}
        self._stack = [Frame("", -1)]
        self._ordinals: Counter[str] = Counter()
        self._handles: list[Any] = []
        self._events = 0
        self._paused = False

    def __enter__(self) -> Any:
        for module in self._paths:
            self._handles.append(module.register_forward_pre_hook(self._enter_module, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave_module, always_call=True))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._paused and _computes(func):
            op = _op(func, args, kwargs, result)
            if op is not None:
                self._events += 1
                op.index = self._events
                self.saw_op(op, self._stack[-1])
        return result

    def _enter_module(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        path = self._paths[module]
        self._stack.append(Frame(path, self._ordinals[path], _versions((args, kwargs))))
        self._ordinals[path] += 1

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        self._events += 1
        self._paused = True
        try:
            frame = self._stack.pop()
            outputs = [t for t in _tensors(output) if t.is_floating_point()]
            self.left(frame, Op(MODULE_OUTPUT, self._events, outputs, frame.inputs))
        finally:
            self._paused = False

    def saw_op(self, op: Op, frame: Frame) -> None:
        """An op has run."""
        raise NotImplementedError

    def left(self, frame: Frame, output: Op) -> None:
        """A module's call has returned."""
        raise NotImplementedError


class Recording(Observer):
    """Keeps every output of a run: of a request alone, so they are small."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.calls: dict[tuple[str, int], Call] = {}

    def saw_op(self, op: Op, frame: Frame) -> None:
        """Keep it; a copy, because later ops may write over it."""
        op.outputs = [t.clone() for t in op.outputs]
        self._call(frame).ops.append(op)

    def left(self, frame: Frame, output: Op) -> None:
        """Keep its output."""
        output.outputs = [t.clone() for t in output.outputs]
        self._call(frame).output = output

    def _call(self, frame: Frame) -> Call:
        return self.calls.setdefault((frame.path, frame.ordinal), Call())


def _op(func: Any, args: Any, kwargs: Any, result: Any) -> Op | None:
    """An op that has run; None if it neither read nor made a floating-point number.

    Arithmetic of integers is exact, and counts what differs by right, such as the tokens of a batch.
    """
    read, written = _arguments(func, args, kwargs)
    outputs = list(_tensors(result)) or written
    random = torch.Tag.nondeterministic_seeded in func.tags
    reads_numbers = any(map(_is_number, (*read, *written)))
    if not outputs or not (reads_numbers or any(map(_is_number, outputs))):
        return None
    inputs = _versions(read) + [(t, OLD) for t in written if _is_number(t)]
    places = func.overloadpacket.__name__ in _PLACES or not (reads_numbers or random)
    return Op(str(func), 0, outputs, inputs, places, lambda: _again(func, args, kwargs))


def _again(func: Any, args: Any, kwargs: Any) -> object:
    """Run an op once more; on copies, if it writes to its arguments."""
    if func._schema.is_mutable:
        args, kwargs = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    return func(*args, **kwargs)


@cache
def _computes(func: Any) -> bool:
    """Whether an op makes numbers: a view does not, and a tensor of a constant is made of nothing that could vary."""
    schema = func._schema
    if torch.Tag.nondeterministic_seeded in func.tags:
        return True
    reads = any("Tensor" in str(argument.type) for argument in schema.arguments)
    aliases = [r.alias_info for r in schema.returns if r.alias_info is not None]
    view = bool(aliases) and not any(alias.is_write for alias in aliases)
    return reads and not view and func.overloadpacket.__name__ not in _COMPUTES_NOTHING


def _arguments(func: Any, args: Any, kwargs: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors an op only reads, and those it writes."""
    read: list[torch.Tensor] = []
    written: list[torch.Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        (written if writes else read).extend(_tensors(value))
    return read, written


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in nested tuples, lists and mappings, in order; other objects, such as caches, are passed over."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))


def _is_number(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _versions(value: Any) -> list[tuple[torch.Tensor, int]]:
    return [(t, version(t)) for t in _tensors(value) if _is_number(t)]


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; tensors made in inference mode do not count."""
    return -1 if tensor.is_inference() else tensor._version


def source_line() -> str:
    """File and line of the innermost frame that is neither torch's nor the auditor's."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, _HERE, "<")):
            _, _, short = file.replace("/src/", "/site-packages/").rpartition("/site-packages/")
            return f"{short}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
