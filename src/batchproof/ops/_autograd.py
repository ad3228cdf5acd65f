"""What ops with a backward pass share: registration with autograd that costs nothing where nothing is recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import UnsupportedError

__all__ = ["differentiable", "is_recorded", "refuse_leaves"]


def is_recorded(*arguments: Any) -> bool:
    """Whether autograd would record a call with these arguments."""
    return torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)


def differentiable(
    op: Callable[..., Any], save: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Register ``backward`` for an overload of ``torch.ops.batchproof``; returns what to call the op by.

    torch's autograd kernel is Python and takes 3 us to find that there is nothing to record. What is returned finds
    that first and passes it by; tracing has to see the op as it is.
    """
    torch.library.register_autograd(op, backward, setup_context=save)  # type: ignore[arg-type]

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or is_recorded(*arguments):
            return op(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    return call


def refuse_leaves(op: str, **tensors: torch.Tensor) -> None:
    """UnsupportedError if one of ``tensors``, which are to be overwritten, is what gradients are taken with respect to.

    torch says the same, but only as it writes, when another of them has been overwritten already.
    """
    for name, tensor in tensors.items():
        owner = tensor if tensor._base is None else tensor._base
        if owner.requires_grad and owner.is_leaf:
            raise UnsupportedError(
                f"{op}: {name} is overwritten, but it is a leaf that requires grad or a view of one; "
                "want the functional form, or a tensor that was computed"
            )
