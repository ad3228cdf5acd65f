"""Launches of Triton and Gluon kernels that skip Triton's analysis of the arguments once it was made.

The analysis costs the host more than the rest of a call, and an engine waits for it whenever a step's kernels are no
CUDA graph. What a binary depends on is little: dtypes, constants, which pointers are of 16 bytes, and of an integer
whether it is 1, a multiple of 16, or of 64 bits.
"""

from __future__ import annotations

from typing import Any

import torch

from ._triton import device_guard, triton

__all__ = ["FastKernel", "View"]

_PLAIN = frozenset({float, bool, type(None)})  # of which a binary depends on the type alone


class View:
    """What the TMA is told of a tensor: a tensor descriptor as a launch reads it, without its checks."""

    __slots__ = ("base", "block_shape", "layout", "padding", "round_f32_to_tf32", "shape", "strides")

    def __init__(self, base: torch.Tensor, shape: Any, strides: Any, block_shape: list[int], layout: Any) -> None:
        self.base, self.shape, self.strides, self.block_shape, self.layout = base, shape, strides, block_shape, layout
        self.padding, self.round_f32_to_tf32 = "zero", False


def _kind(argument: Any) -> Any:
    """What a binary depends on of an argument."""
    kind = type(argument)
    if kind is int:
        return (argument == 1) | (argument % 16 == 0) << 1 | (-(2**31) <= argument < 2**31) << 2
    if kind in _PLAIN:
        return kind
    if kind is View:
        return argument.base.dtype, *argument.block_shape
    return argument.dtype, argument.data_ptr() % 16 == 0


class FastKernel:
    """A jitted kernel; ``describe`` makes a tensor descriptor of a ``View``, if the kernel takes any."""

    def __init__(self, function: Any, describe: Any = None) -> None:
        self.function, self.describe = function, describe
        self.compiled: dict[Any, Any] = {}

    def __call__(
        self, grid: tuple[int, ...], like: torch.Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:  # fmt: skip
        """Launch a grid on the GPU of ``like``, or in Triton's interpreter.

        Args:
            grid: one to three sizes.
            like: a tensor on the device.
            arguments: the kernel's arguments, in order, up to the constants.
            keywords: its constants, and the compiler's options; from one place of a program always the same ones.
        """
        if not like.is_cuda:
            self.function[grid](*arguments, **keywords)
            return
        device = like.get_device()
        if device != torch.cuda.current_device():
            with device_guard(like):
                return self(grid, like, arguments, keywords)
        key = (device, *map(_kind, arguments), *keywords.values())
        found = self.compiled.get(key)
        if found is None:
            described = [self.describe(a) if isinstance(a, View) else a for a in arguments]
            compiled = self.function[grid](*described, **keywords)
            names = self.function.arg_names[len(arguments) :]
            self.compiled[key] = compiled, tuple(keywords[name] for name in names)
            return
        compiled, values = found
        sizes = (*grid, 1, 1)[:3]
        if triton.knobs.runtime.launch_enter_hook.calls or triton.knobs.runtime.launch_exit_hook.calls:
            compiled[sizes](*arguments, *values)  # a profiler listens
            return
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled.run(
            *sizes, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *values
        )  # fmt: skip
