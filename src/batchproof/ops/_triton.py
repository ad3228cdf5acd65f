"""Triton where there is one; on platforms without it the kernel modules still import, and only their launch fails."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

__all__ = ["HAS_TRITON", "INTERPRETED", "device_guard", "processors", "tl", "triton"]

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # macOS, Windows: the CPU implementations serve
    HAS_TRITON = False

    class _Missing:
        """Stands for ``triton`` and ``tl`` while kernels are defined."""

        def __getattr__(self, name: str) -> Any:
            return _Missing()

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if args and callable(args[0]) else _Missing()

    triton = tl = _Missing()


# Kernels run on CPU tensors, in Triton's interpreter, whose fp8 casts and fused operations are not the GPU's
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def device_guard(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one for a launch; nothing to do for CPU tensors (Triton's interpreter)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the CPU (Triton's interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
