"""Every op of the registry: bits that depend on the request alone, accuracy, a checker that sees plants."""

import dataclasses

import pytest
import torch

from batchproof.numerics import TOLERANCES, ulp_distance
from batchproof.registry import all_specs, get_spec
from invariance import GPU_SIZES, SIZES, cancelling, scale_of, size_violations, violations, wide_exponents

SPECS = [pytest.param(spec, dtype, id=f"{name}-{dtype}") for name, spec in all_specs().items() for dtype in spec.dtypes]
HAS_GPU = torch.cuda.is_available()


@pytest.mark.parametrize(("spec", "dtype"), SPECS)
def test_bits_depend_on_the_request_alone(spec, dtype, device):
    sizes = SIZES if dtype == torch.float32 else SIZES[:-3]
    assert violations(spec, dtype, device, GPU_SIZES if HAS_GPU else sizes) == []


@pytest.mark.parametrize("change", [cancelling, wide_exponents])
@pytest.mark.parametrize(("spec", "dtype"), SPECS)
def test_bits_of_adversarial_requests_depend_on_the_request_alone(spec, dtype, change, device):
    sizes = GPU_SIZES if HAS_GPU else (1, 2, 16, 33, 129)
    assert violations(spec, dtype, device, sizes, change) == []


@pytest.mark.parametrize(("spec", "dtype"), SPECS)
def test_accuracy_is_within_the_table(spec, dtype, device, generator):
    inputs = spec.sample_inputs(33, dtype, device, generator)
    expected = spec.reference(**inputs)
    tolerance = TOLERANCES[spec.tolerance]
    for out, wanted in zip(spec.run(inputs), expected if isinstance(expected, tuple) else (expected,), strict=True):
        if not out.is_floating_point():
            assert torch.equal(out, wanted)
            continue
        near = (out.double() - wanted.double()).abs() <= tolerance.atol * scale_of(spec, inputs, wanted)
        bad = ~(near | (ulp_distance(out, wanted) <= tolerance.ulp))
        assert not bad.any(), f"{int(bad.sum())} off, first {out[bad][0].item()} against {wanted[bad][0].item()}"


# Plants: each is an op that varies in a way that shipped somewhere, and that the checker must name.


def in_blocks(x, block):
    """Sum of squares of [..., hidden] as ``block`` threads take it: every ``block``-th element each, then a tree."""
    squares = x.float().square().unflatten(-1, (-1, block))
    total = squares[..., 0, :]
    for i in range(1, squares.shape[-2]):
        total = total + squares[..., i, :]
    while total.shape[-1] > 1:
        total = sum(total.chunk(2, dim=-1))
    return total


def normalise(x, weight, eps, squares):
    return (x.float() * torch.rsqrt(squares / x.shape[-1] + eps)).to(x.dtype) * weight


def block_by_batch(x, weight, eps):
    """As vLLM's norm did (issue 48271): 1024 threads below 256 tokens, 256 from there on."""
    return normalise(x, weight, eps, in_blocks(x, 1024 if x.shape[0] < 256 else 256))


def row_classes(x, weight, eps):
    """Another order for rows past the last full 32 (Megatron 6521)."""
    full = x.shape[0] // 32 * 32
    squares = torch.cat((in_blocks(x[:full], 128), in_blocks(x[full:], 1024)))
    return normalise(x, weight, eps, squares)


def batch_scale(x, weight, eps):
    """Rounds to a grid whose unit is the largest value of the batch, as a dynamic per-tensor scale does."""
    unit = x.abs().amax().float() / 448.0
    return normalise((x / unit).round() * unit, weight, eps, in_blocks(x, 1024)).to(x.dtype)


def leaking_mask(x, weight, eps):
    """Masks the next row by a multiplication with 0, which NaN and inf survive."""
    return normalise(x, weight, eps, in_blocks(x, 1024) + 0.0 * x.roll(1, 0).float().sum(-1, keepdim=True))


def unwritten_tail(x, weight, eps):
    """Leaves the last row of an odd batch as the memory was."""
    out = torch.empty_like(x)
    rows = x.shape[0] if x.shape[0] < 9 else x.shape[0] // 2 * 2
    out[:rows] = normalise(x, weight, eps, in_blocks(x, 1024))[:rows]
    return out


def by_position(x, weight, eps):
    """Adds from the other end in the first row of a batch."""
    squares = torch.cat((in_blocks(x[:1].flip(-1), 256), in_blocks(x[1:], 256)))
    return normalise(x, weight, eps, squares)


def plant(op):
    def sample(num_tokens, dtype, device, generator):
        x = torch.randn(num_tokens, 2048, generator=torch.Generator().manual_seed(2)).to(dtype)  # the same everywhere
        return {"x": x.to(device), "weight": torch.ones(2048, dtype=dtype, device=device), "eps": 1e-6}

    return dataclasses.replace(get_spec("rms_norm"), name=op.__name__, op=op, sample_inputs=sample)


@pytest.mark.parametrize(
    ("op", "named"),
    [
        (block_by_batch, "M=256 against M=255"),
        (row_classes, "M=32 against M=31"),
        (batch_scale, "M=1 from the middle"),
        (leaking_mask, "among nan"),
        (leaking_mask, "among inf"),
        (unwritten_tail, "M=9 from the middle"),
        (by_position, "M=33 from the end"),
    ],
)
def test_planted_variance_is_caught(op, named, device):
    found = violations(plant(op), torch.float32, device)
    assert any(named in line for line in found), found[:5]


def test_planted_variance_is_named_where_it_starts(device, generator):
    """Of all sizes 256 alone is named: on either side of the threshold the bits agree."""
    spec = plant(block_by_batch)
    found = size_violations(spec, spec.sample_inputs(max(SIZES), torch.float32, device, generator), SIZES)
    assert [line.partition(":")[0] for line in found] == ["M=256 against M=255"]


def test_planted_variance_is_caught_through_rounding(device):
    """A 16-bit output hides most of it: few rows differ, and a handful of rows would miss it."""
    found = violations(plant(block_by_batch), torch.float16, device)
    assert any("M=256 against M=255" in line for line in found), found[:5]


def test_the_checker_finds_nothing_in_an_op_without_variance(device):
    def pinned(x, weight, eps):
        return normalise(x, weight, eps, in_blocks(x, 1024)).nan_to_num()

    assert violations(plant(pinned), torch.float32, device) == []
