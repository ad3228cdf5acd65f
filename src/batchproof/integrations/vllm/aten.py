"""What vLLM's batch-invariant mode calls or registers for aten, where its own follows the batch or is slow."""

from __future__ import annotations

from typing import Any

import torch

from ...ops import linear as _linear  # noqa: F401 - defines the op
from ...ops import softmax as _softmax  # noqa: F401 - defines the op
from ...ops._library import FLOAT_DTYPES

__all__ = ["linear", "softmax"]


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """For ``linear_batch_invariant``, which unquantised layers and the language model's head call."""
    fits = bias is not None and bias.dtype == input.dtype
    out: torch.Tensor = torch.ops.batchproof.linear.default(input, weight, bias if fits else None)
    return out if fits or bias is None else out + bias  # of another dtype: added as vLLM does


def softmax(input: torch.Tensor, dim: int, dtype: Any = None) -> torch.Tensor:
    """For ``aten::softmax``, whose last argument is a dtype, and ``aten::_softmax``, where it is half_to_float."""
    if isinstance(dtype, bool):
        dtype = torch.float32 if dtype else None
    wanted = input.dtype if dtype is None else dtype
    if input.dtype not in FLOAT_DTYPES or wanted not in FLOAT_DTYPES:  # fp64, of which no model makes use
        shifted = torch.exp(input.to(wanted) - torch.amax(input.to(wanted), dim, keepdim=True))
        return shifted / torch.sum(shifted, dim, keepdim=True)
    out: torch.Tensor = torch.ops.batchproof.softmax.default(input, dim, dtype)
    return out
