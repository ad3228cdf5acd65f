"""The table of ops. Tests, benchmarks, the auditor and the switch iterate over it; nothing else lists the ops."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import ArgumentError
from .numerics import indexable

__all__ = ["OpSpec", "all_specs", "get_spec", "register_spec"]

Inputs = dict[str, Any]


@dataclass(frozen=True)
class OpSpec:
    """One op: what it is, what it must equal, how to feed it, and which axis of it is the batch.

    Attributes:
        name: the public name, equal to ``torch.ops.batchproof.<name>``.
        op: the public function.
        reference: plain torch, the same keyword arguments, returns a new tensor or tuple; never in place.
        sample_inputs: ``(num_tokens, dtype, device, generator) -> keyword arguments`` of ``op``.
        batch_axes: for every tensor argument that carries the batch, its batch axis.
        dtypes: the activation dtypes it takes.
        tolerance: the entry of ``numerics.TOLERANCES`` its accuracy is held to.
        aten: for every aten overload that the switch sends here, a function with that overload's signature.
        in_place: the arguments it writes and returns.
        select_inputs: for ops whose batch is more than an axis of some tensors: what ``select`` returns.
        row_outputs: how many of its outputs have a row a request, counted from the first; those after them are sums
            over the batch. None if all have.
    """

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    sample_inputs: Callable[[int, torch.dtype, torch.device, torch.Generator], Inputs]
    batch_axes: Mapping[str, int]
    tolerance: str
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    aten: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    in_place: tuple[str, ...] = ()
    select_inputs: Callable[[Inputs, torch.Tensor], Inputs] | None = None
    row_outputs: int | None = None

    def select(self, inputs: Inputs, index: torch.Tensor) -> Inputs:
        """The inputs of the requests in ``index`` (int64), fresh tensors, everything else shared."""
        if self.select_inputs is not None:
            return self.select_inputs(inputs, index)
        chosen = dict(inputs)
        for argument, axis in self.batch_axes.items():
            tensor = inputs[argument]
            rows = indexable(tensor).index_select(axis, index.to(tensor.device))
            chosen[argument] = rows.view(tensor.dtype)
        return chosen

    def run(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """Call the op on ``inputs``, on copies of what it writes, and return its outputs as a tuple."""
        arguments = {k: v.clone() if k in self.in_place else v for k, v in inputs.items()}
        out = self.op(**arguments)
        return out if isinstance(out, tuple) else (out,)

    def run_rows(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """``run``, less the outputs that are sums over the batch."""
        return self.run(inputs)[: self.row_outputs]


_SPECS: dict[str, OpSpec] = {}


def register_spec(spec: OpSpec) -> OpSpec:
    """Add a spec; a name can be taken once."""
    if spec.name in _SPECS:
        raise ArgumentError(f"an op named {spec.name!r} is registered already")
    _SPECS[spec.name] = spec
    return spec


def all_specs() -> dict[str, OpSpec]:
    """Every op by name, sorted. Imports the kernel modules."""
    from . import ops

    for module in pkgutil.iter_modules(ops.__path__):
        importlib.import_module(f"{ops.__name__}.{module.name}")
    return dict(sorted(_SPECS.items()))


def get_spec(name: str) -> OpSpec:
    """The spec of one op; ArgumentError, with the names there are, if there is none."""
    specs = all_specs()
    if name not in specs:
        raise ArgumentError(f"no op named {name!r}; there are {', '.join(specs)}")
    return specs[name]
