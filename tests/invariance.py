"""The checker: runs an op on batches of many sizes and says where a row's bits depend on its batch.

It is a test helper of its own so that planted variance can be put through the same code as the ops (test_invariance).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from batchproof.numerics import first_mismatch
from batchproof.registry import Inputs, OpSpec

# 2**n and its neighbours: where launch heuristics, tail code and thread partitions change
SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513)
PLACE_SIZES = (1, 3, 9, 17, 33, 65, 129, 256)
GPU_SIZES = (*SIZES, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097)

Outputs = tuple[torch.Tensor, ...]
Change = Callable[[Inputs, OpSpec, torch.Generator], Inputs]


def assert_same(out: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], label: str = "") -> None:
    """Every output has the bits of the wanted one."""
    for i, (a, b) in enumerate(zip(out, wanted, strict=True)):
        assert first_mismatch(a, b) is None, f"{label} output {i}: {first_mismatch(a, b)}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every ``torch.empty`` in the block is full of NaN, so that what an op leaves unwritten shows."""
    mode, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def activations(inputs: Inputs, spec: OpSpec) -> list[str]:
    """The names of the batched arguments that hold activations, not positions, seeds or parameters."""
    return [name for name in spec.batch_axes if inputs[name].is_floating_point() and inputs[name].dim() > 1]


def as_computed(x: torch.Tensor) -> torch.Tensor:
    """A copy of ``x`` in a dtype that has arithmetic, which fp8 has not."""
    return x.float() if x.element_size() == 1 else x.clone()


def cancelling(inputs: Inputs, spec: OpSpec, generator: torch.Generator) -> Inputs:
    """The second half of every row undoes the first, but for a few ulps."""
    changed = dict(inputs)
    for name in activations(inputs, spec):
        x = as_computed(inputs[name])
        half = x.shape[-1] // 2
        noise = torch.randint(-2, 3, x[..., :half].shape, generator=generator, device=x.device)
        eps = torch.finfo(inputs[name].dtype).eps
        x[..., half : 2 * half] = -x[..., :half] * (1.0 + eps * noise).to(x.dtype)
        changed[name] = x.to(inputs[name].dtype)
    return changed


def wide_exponents(inputs: Inputs, spec: OpSpec, generator: torch.Generator) -> Inputs:
    """Every element is scaled by a power of two of its own, so that every order of a sum rounds elsewhere."""
    changed = dict(inputs)
    for name in activations(inputs, spec):
        x = inputs[name]
        powers = torch.randint(-12, 10, x.shape, generator=generator, device=x.device)
        scaled = x.float() * 2.0**powers
        changed[name] = (scaled.clamp(-448, 448) if x.element_size() == 1 else scaled).to(x.dtype)
    return changed


def with_neighbours(inputs: Inputs, spec: OpSpec, probes: torch.Tensor, value: float) -> Inputs:
    """``inputs`` with every activation of every request but ``probes`` replaced by ``value``."""
    changed = dict(inputs)
    for name in activations(inputs, spec):
        axis, dtype, x = spec.batch_axes[name], inputs[name].dtype, as_computed(inputs[name])
        hostile = torch.full_like(x, value if math.isnan(value) or math.isinf(value) else _largest(dtype) * value)
        changed[name] = hostile.index_copy(axis, probes, x.index_select(axis, probes)).to(dtype)
    return changed


def _largest(dtype: torch.dtype) -> float:
    return min(3e38, torch.finfo(dtype).max)


def _differing(label: str, out: Outputs, wanted: Outputs) -> list[str]:
    """What differs between two runs on the same requests, one sentence an output."""
    found = (first_mismatch(a, b) for a, b in zip(out, wanted, strict=True))
    return [f"{label}: output {i}: {mismatch}" for i, mismatch in enumerate(found) if mismatch]


def size_violations(spec: OpSpec, inputs: Inputs, sizes: Sequence[int]) -> list[str]:
    """The first M requests for every M: which M gives other bits than the M before it."""
    device = _device(inputs, spec)
    found: list[str] = []
    before, before_size = (), 0
    for size in sorted(sizes):
        with poisoned_memory():
            out = spec.run_rows(spec.select(inputs, torch.arange(size, device=device)))
        if before:
            found += _differing(f"M={size} against M={before_size}", tuple(t[:before_size] for t in out), before)
        before, before_size = out, size
    return found


def place_violations(spec: OpSpec, inputs: Inputs, sizes: Sequence[int], generator: torch.Generator) -> list[str]:
    """Middle, last and shuffled requests in batches of every size against the full batch; large sizes take turns."""
    device, total = _device(inputs, spec), max(sizes)
    full = spec.run_rows(inputs)
    found: list[str] = []
    for turn, size in enumerate(sizes):
        first = torch.arange(size, device=device)
        places = [
            ("the middle", first + (total - size) // 2),
            ("the end", first + total - size),
            ("everywhere", torch.randperm(total, generator=generator, device=device)[:size]),
        ]
        for place, index in places if size <= 65 else places[turn % 3 :][:1]:
            with poisoned_memory():
                out = spec.run_rows(spec.select(inputs, index))
            found += _differing(f"M={size} from {place} against M={total}", out, tuple(t[index] for t in full))
    return found


def neighbour_violations(spec: OpSpec, inputs: Inputs, sizes: Sequence[int]) -> list[str]:
    """Three requests alone, and among zeros, infinities, NaN and the largest numbers, at three places."""
    device = _device(inputs, spec)
    found: list[str] = []
    for size in sizes:
        batch = spec.select(inputs, torch.arange(size, device=device))
        for place in sorted({0, size // 2, size - 1}):
            probe = torch.tensor([place], device=device)
            alone = spec.run_rows(spec.select(inputs, probe))
            for value in (0.0, math.inf, math.nan, 1.0):
                with poisoned_memory():
                    out = spec.run_rows(with_neighbours(batch, spec, probe, value))
                label = f"M={size}, request {place} among {'the largest' if value == 1.0 else value}"
                found += _differing(label, tuple(t[probe] for t in out), alone)
    return found


def odd_rows_violations(spec: OpSpec, inputs: Inputs, sizes: Sequence[int]) -> list[str]:
    """Requests that hold NaN and infinities themselves: their bits, NaN payloads included, in every batch."""
    device = _device(inputs, spec)
    odd = dict(inputs)
    for name in activations(inputs, spec):
        assert spec.batch_axes[name] == 0
        x = as_computed(inputs[name])
        x[0::3, ..., 0], x[1::3, ..., -1], x[2::3, ..., 1 % x.shape[-1]] = math.nan, math.inf, -math.nan
        odd[name] = x.to(inputs[name].dtype)
    full = spec.run_rows(odd)
    found: list[str] = []
    for size in sizes:
        index = torch.arange(size, device=device) + (len(full[0]) - size) // 2
        out = spec.run_rows(spec.select(odd, index))
        found += _differing(f"M={size} of rows with NaN and inf", out, tuple(t[index] for t in full))
    return found


def violations(
    spec: OpSpec, dtype: torch.dtype, device: torch.device, sizes: Sequence[int] = SIZES, change: Change | None = None
) -> list[str]:
    """Every way in which ``spec`` lets a request's bits depend on its batch; empty if it does not."""
    generator = torch.Generator(device).manual_seed(1)
    inputs = spec.sample_inputs(max(sizes), dtype, device, generator)
    if change is not None:
        return size_violations(spec, change(inputs, spec, generator), sizes)
    among = (2, 33) if device.type == "cpu" else (2, 17, 33, 257, max(sizes))
    return [
        *size_violations(spec, inputs, sizes),
        *place_violations(spec, inputs, [s for s in sizes if s in PLACE_SIZES or s > 513] + [max(sizes)], generator),
        *neighbour_violations(spec, inputs, [size for size in among if size <= max(sizes)]),
        *odd_rows_violations(spec, inputs, [1, 2, 33, max(sizes) - 1]),
    ]


def scale_of(spec: OpSpec, inputs: Inputs, wanted: torch.Tensor) -> torch.Tensor:
    """What an op's absolute tolerance is in units of, broadcast over its output ``wanted``."""
    if spec.tolerance == "rms_norm_quant":
        return wanted.double().abs() * torch.finfo(inputs["x"].dtype).eps
    if spec.name == "rms_norm_backward":  # the largest term of a row's sum, or of a column's
        grad, x = inputs["grad_out"].double().abs(), inputs["x"].double().abs()
        terms = grad.amax(-1, keepdim=True) if wanted.dim() > 1 else (grad * x).amax(0)
        return terms * torch.finfo(inputs["x"].dtype).eps
    if spec.name == "linear":
        return inputs["x"].double().abs() @ inputs["weight"].double().abs().t()
    if spec.name == "scaled_mm":
        a, b, scale_a, scale_b = (inputs[name].double() for name in ("a", "b", "scale_a", "scale_b"))
        return (a.abs() @ b.abs()) * scale_a * scale_b
    if spec.name == "layer_norm":
        x, weight, bias = (inputs[name].double() for name in ("x", "weight", "bias"))
        return x.abs().amax(-1, keepdim=True) / x.std(-1, keepdim=True) * weight.abs() + bias.abs()
    x = next(inputs[name] for name in spec.batch_axes).double().abs()
    if spec.name == "paged_attention":
        return inputs["v_cache"].double().abs().amax()
    if spec.name == "rope_and_cache":  # a rotation makes nothing smaller by more than half
        return wanted.double().abs().amax((1, 2), keepdim=True) * torch.finfo(inputs["q"].dtype).eps
    if spec.name == "rope":
        return x.amax((1, 2), keepdim=True)
    if spec.tolerance == "log_softmax":
        return x.amax(-1, keepdim=wanted.dim() > 1)
    return {"mean": x.mean(-1)}.get(spec.name, torch.ones((), device=x.device))


def _device(inputs: Inputs, spec: OpSpec) -> torch.device:
    return inputs[next(iter(spec.batch_axes))].device
