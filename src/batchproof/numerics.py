"""Comparing results: bit for bit for invariance, in ulps against a reference for accuracy.

Invariance has no tolerance. Accuracy has one, in the table below, and each entry says why it is what it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import ArgumentError

__all__ = ["TOLERANCES", "Tolerance", "as_bits", "bits_equal", "first_mismatch", "indexable", "ulp_distance"]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Tolerance:
    """How far an op may be from its reference: ``ulp`` of the output dtype, or ``atol`` scaled as ``reason`` says."""

    reason: str
    ulp: int = 0
    atol: float = 0.0


TOLERANCES: dict[str, Tolerance] = {
    "rms_norm": Tolerance(ulp=2, reason="1 ulp of the normalised value (the sum's rounding), 1 more of the product"),
    "rms_norm_unweighted": Tolerance(ulp=1, reason="statistics carry more bits than the output, which is rounded once"),
    "rms_norm_quant": Tolerance(
        ulp=1,
        atol=3.0,
        reason="a norm off by an ulp is one step of fp8 at most; scales follow the norm: in units of dtype eps |scale|",
    ),
    "activation_quant": Tolerance(ulp=1, reason="an activation off by an ulp is one step of fp8 at most"),
    "rms_norm_backward_x": Tolerance(
        ulp=1, atol=2.0**-20, reason="fp32 sums, one rounding, but terms cancel: absolute in units of the largest term"
    ),
    "rms_norm_backward": Tolerance(
        ulp=1, atol=1.0, reason="fp32 may round a normalised value to its neighbour: in units of dtype eps |term|"
    ),
    "layer_norm": Tolerance(
        ulp=1,
        atol=2.0**-20,
        reason="fp32 statistics, one rounding, but x - mean and the bias cancel: absolute in units of the largest |x|, "
        "normalised and scaled, plus |bias|",
    ),
    "rms_norm_gated": Tolerance(
        ulp=4, reason="1 ulp of the normalised value, which each of two rounded products may make two of"
    ),
    "linear": Tolerance(
        ulp=1, atol=2.0**-20, reason="operand rounding on the CPU, fp32 sums on GPUs: atol in units of K max|x| max|w|"
    ),
    "scaled_mm": Tolerance(
        ulp=1,
        atol=2.0**-12,
        reason="tensor cores keep 14 bits of an fp8 sum over 128 of k: in units of the sum of |a| |b| and the scales",
    ),
    "attention": Tolerance(
        atol=2.0**-7, reason="probabilities are rounded to the value dtype before the second product"
    ),
    "softmax": Tolerance(ulp=2, atol=2.0**-20, reason="exp to 2 ulp in fp32 and one division, then one rounding"),
    "log_softmax": Tolerance(ulp=2, atol=2.0**-18, reason="x - max - log(sum) cancels: absolute in units of max |x|"),
    "penalties": Tolerance(ulp=1, reason="the reference's fp32 operations in its order, and one rounding to the dtype"),
    "mean": Tolerance(ulp=1, atol=2.0**-20, reason="fp32 sum by a tree: absolute in units of the mean of |x|"),
    "activation": Tolerance(ulp=2, reason="the activation is rounded to the dtype, and so is its product"),
    "rope": Tolerance(
        ulp=1, atol=2.0**-22, reason="two fp32 products and a difference that can cancel; then one rounding"
    ),
    "rope_and_cache": Tolerance(
        ulp=1, atol=4.0, reason="values of a norm, each off by 2 ulp, in a difference: in units of dtype eps max |x|"
    ),
}


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same storage read as integers, so that NaN equals NaN and -0 differs from +0."""
    if tensor.dtype.is_complex:
        raise ArgumentError(f"as_bits takes real tensors, got {tensor.dtype}")
    return tensor.contiguous().view(_BITS[tensor.element_size()])


def indexable(tensor: torch.Tensor) -> torch.Tensor:
    """The same storage in a dtype that every device can index, which fp8 is not everywhere; for fp8 its bytes."""
    return tensor.view(torch.uint8) if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(as_bits(a), as_bits(b)))


def first_mismatch(a: torch.Tensor, b: torch.Tensor) -> str | None:
    """A sentence about the first element whose bits differ and how many do, or None if none does."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{tuple(a.shape)} {a.dtype} against {tuple(b.shape)} {b.dtype}"
    differ = as_bits(a) != as_bits(b)
    count = int(differ.sum())
    if count == 0:
        return None
    index = tuple(int(i) for i in differ.nonzero()[0])
    return f"{count} of {a.numel()} elements differ, first at {index}: {a[index].item()!r} against {b[index].item()!r}"


def ulp_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Elementwise distance in units in the last place (int64), for tensors of one floating dtype.

    NaN is at distance 0 from NaN and at the largest distance from a number; -0 is at distance 0 from +0.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        raise ArgumentError(f"ulp_distance needs one shape and dtype, got {a.shape} {a.dtype} and {b.shape} {b.dtype}")
    left, right = _ordered(a), _ordered(b)
    distance = (left - right).abs()
    far = torch.full_like(distance, torch.iinfo(torch.int64).max)
    distance = torch.where((left // 2 - right // 2).abs() >= 2**62, far, distance)  # float64 of opposite signs
    distance = torch.where(a.isnan() != b.isnan(), far, distance)
    return torch.where(a.isnan() & b.isnan(), torch.zeros_like(distance), distance)


def _ordered(tensor: torch.Tensor) -> torch.Tensor:
    """The bits as int64 in the order of the numbers: negatives mirrored below zero, both zeros at 0."""
    bits = as_bits(tensor).to(torch.int64)
    lowest = -(1 << (8 * tensor.element_size() - 1))
    return torch.where(bits < 0, lowest - bits, bits)
