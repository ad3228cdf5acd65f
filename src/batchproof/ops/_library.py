"""Registration with torch, and the argument checks that every op shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import ArgumentError, DeviceError, DtypeError, LayoutError, ShapeError, UnsupportedError

__all__ = [
    "FLOAT_DTYPES",
    "check_device",
    "check_dtype",
    "check_like",
    "check_no_overlap",
    "check_parameter",
    "check_positive",
    "check_positive_scalar",
    "check_rows",
    "check_same",
    "check_scalar",
    "check_writable",
    "register_op",
    "require_no_grad",
]

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_LIBRARY = torch.library.Library("batchproof", "FRAGMENT")


def register_op(
    schema: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define ``torch.ops.batchproof.<name>`` and return its overload. "CUDA" is ROCm's key as well.

    ``Library.define`` rather than ``custom_op``: about 2 us a call against 20.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"batchproof::{name}", fake, lib=_LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.batchproof, name).default
    return overload


def require_no_grad(op: str, *tensors: torch.Tensor | None) -> None:
    """UnsupportedError if autograd would record this call: the ops have no backward, and none is faked."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise UnsupportedError(
            f"{op} has no backward pass: call it under torch.no_grad() or torch.inference_mode(), "
            "or on tensors that do not require grad"
        )


def check_dtype(op: str, name: str, tensor: torch.Tensor, wanted: tuple[torch.dtype, ...] = FLOAT_DTYPES) -> None:
    """DtypeError unless ``tensor`` has one of the ``wanted`` dtypes."""
    if tensor.dtype not in wanted:
        raise DtypeError(f"{op}: {name} is {tensor.dtype}, want one of {', '.join(map(str, wanted))}")


def check_device(op: str, name: str, tensor: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """DeviceError unless two tensors are on one device."""
    if tensor.device != like.device:
        raise DeviceError(f"{op}: {name} is on {tensor.device}, want {like.device} where {like_name} is")


def check_same(op: str, name: str, tensor: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """DtypeError or DeviceError unless two tensors share dtype and device."""
    if tensor.dtype != like.dtype:
        raise DtypeError(f"{op}: {name} is {tensor.dtype}, want {like.dtype} as {like_name} is")
    check_device(op, name, tensor, like_name, like)


def check_scalar(op: str, name: str, value: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """DtypeError, DeviceError or ShapeError unless ``value`` is one fp32 element on ``like``'s device."""
    if value.dtype != torch.float32:
        raise DtypeError(f"{op}: {name} is {value.dtype}, want torch.float32")
    check_device(op, name, value, like_name, like)
    if value.numel() != 1:
        raise ShapeError(f"{op}: {name} has shape {tuple(value.shape)}, want one element")


def check_positive_scalar(op: str, name: str, value: torch.Tensor) -> None:
    """ArgumentError unless ``value`` is finite and above 0. For the CPU: on a GPU, reading it waits for the device."""
    if not 0.0 < value.item() < float("inf"):  # also for NaN
        raise ArgumentError(f"{op}: {name} is {value.item()}, want a finite positive number")


def check_rows(op: str, x: torch.Tensor) -> None:
    """DtypeError or ShapeError unless ``x`` is rows [..., hidden_size] of at least one element."""
    check_dtype(op, "x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ShapeError(f"{op}: x has shape {tuple(x.shape)}, want [..., hidden_size] with hidden_size at least 1")


def check_like(op: str, name: str, tensor: torch.Tensor | None, x: torch.Tensor) -> None:
    """DtypeError, DeviceError or ShapeError unless ``tensor`` is None or has x's dtype, device and shape."""
    if tensor is not None:
        check_same(op, name, tensor, "x", x)
        if tensor.shape != x.shape:
            raise ShapeError(f"{op}: {name} has shape {tuple(tensor.shape)}, want {tuple(x.shape)} as x has")


def check_parameter(op: str, name: str, parameter: torch.Tensor | None, x: torch.Tensor) -> None:
    """DtypeError, DeviceError or ShapeError unless ``parameter`` is None or [hidden_size], of x's dtype and device."""
    if parameter is not None:
        check_same(op, name, parameter, "x", x)
        if parameter.shape != x.shape[-1:]:
            raise ShapeError(f"{op}: {name} has shape {tuple(parameter.shape)}, want ({x.shape[-1]},), x's last axis")


def check_positive(op: str, name: str, value: float) -> None:
    """ArgumentError unless ``value`` is finite and not negative."""
    if not 0.0 <= value < float("inf"):  # also false for NaN
        raise ArgumentError(f"{op}: {name} is {value}, want a finite number that is not negative")


def check_writable(op: str, name: str, tensor: torch.Tensor) -> None:
    """LayoutError if two elements of ``tensor`` may share memory, so that it cannot be written in place."""
    if tensor.is_contiguous():
        return
    extent = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1:
            if stride < extent:
                raise LayoutError(
                    f"{op}: {name} is written in place, but has shape {tuple(tensor.shape)} and stride "
                    f"{tensor.stride()}; want a tensor whose elements do not share memory"
                )
            extent += (size - 1) * stride


def check_no_overlap(op: str, name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """LayoutError if two tensors share memory.

    Interleaved views (the two halves of a wider row) are told from overlapping ones; where the layouts are too
    different to tell, sharing an address range counts as overlap.
    """
    if tensor.numel() == 0 or other.numel() == 0 or not _ranges_meet(tensor, other) or _interleaved(tensor, other):
        return
    raise LayoutError(
        f"{op}: {name} and {other_name} overlap in memory, and one of them is written; want separate tensors"
    )


def _ranges_meet(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() < b.data_ptr() + _extent(b) and b.data_ptr() < a.data_ptr() + _extent(a)


def _extent(t: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if t.is_contiguous():
        return t.nbytes
    last = sum((int(size) - 1) * int(stride) for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


def _interleaved(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both are rows of one pitch, in disjoint columns of it."""
    if a.dim() != 2 or a.stride() != b.stride() or a.dtype != b.dtype or a.stride(1) != 1:
        return False
    shift_bytes = b.data_ptr() - a.data_ptr()
    pitch = a.stride(0)
    if pitch == 0 or shift_bytes % a.element_size():
        return False
    shift = shift_bytes // a.element_size() % pitch
    return a.shape[1] <= shift and shift + b.shape[1] <= pitch
