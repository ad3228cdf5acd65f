"""Providers of vLLM's IR norms, for whatever calls those without going through a norm layer.

Signatures are vLLM's to the letter: it compares them. Annotations are real types, since it reads them.
"""

from torch import Tensor

from ...errors import UnsupportedError
from . import layers

__all__ = ["PROVIDERS", "fused_add_rms_norm", "rms_norm"]

PROVIDERS = ("rms_norm", "fused_add_rms_norm")


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """``vllm.ir.ops.rms_norm``; a variance over a part of the row is an UnsupportedError."""
    _require_whole_rows("rms_norm", variance_size)
    return layers.rms_norm(x, weight, epsilon)


def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """``vllm.ir.ops.fused_add_rms_norm``, as new tensors; a variance over a part of the row is an UnsupportedError."""
    _require_whole_rows("fused_add_rms_norm", variance_size)
    return layers.add_rms_norm(x, x_residual, weight, epsilon)


def _require_whole_rows(op: str, variance_size: int | None) -> None:
    if variance_size is not None:
        raise UnsupportedError(f"{op}: variance_size is {variance_size}, want None: it has no batch-invariant form")
