"""Norms on a GPU: every launch variant has the bits of every other, quantised or not, and none is chosen by layout."""

import dataclasses

import pytest
import torch

from batchproof.numerics import first_mismatch
from batchproof.ops import _rms_norm_quant_kernel as quant_kernel
from batchproof.ops import rms_norm as norm_module
from batchproof.ops._quantize import (
    quantize_per_block_reference,
    quantize_per_token_reference,
    quantize_static_fp8_reference,
)
from batchproof.ops._row_launch import VARIANTS, row_plan, use_dependent_launch
from batchproof.ops.rms_norm import add_rms_norm, rms_norm
from batchproof.ops.rms_norm_quant import rms_norm_dynamic_per_token_quant
from invariance import assert_same

pytestmark = pytest.mark.gpu
HALVES = [torch.float16, torch.bfloat16]


NORM_WIDTHS = [7, 64, 100, 128, 512, 1000, 1024, 2048, 4096, 5120, 8192, 16384, 20000, 65536]


def hostile_rows(rows, width, dtype, device, kind):
    """(x, residual): fp16 shows a sum that differs in its last bit most often, rows that cancel in the sum as well."""
    generator = torch.Generator(device).manual_seed(rows + width)
    x, residual = (torch.randn(rows, width, generator=generator, device=device) for _ in range(2))
    if kind == "wide exponents":
        x = x * 2.0 ** torch.randint(-12, 10, x.shape, generator=generator, device=device)
    elif kind == "cancelling":
        residual = -x * (1.0 + 2.0**-9 * torch.randint(-2, 3, x.shape, generator=generator, device=device))
    return x.to(dtype), residual.to(dtype)


def variants(width, dtype):
    """Those of every kind of kernel: they share the tree, so that a quantised norm has the bits of the norm."""
    plans = [row_plan(width, dtype, kind) for kind in VARIANTS]
    return list(dict.fromkeys(variant for plan in plans for _, variant in plan.variants))


def run_variant(x, residual, weight, gemma, variant):
    out, total = (torch.full_like(x, float("nan")) for _ in range(2))
    norm_module.launch(x, residual, weight, out, total, 1e-6, gemma, variant)
    return out, total


@pytest.mark.parametrize("kind", ["random", "wide exponents", "cancelling"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("width", NORM_WIDTHS)
def test_every_variant_has_the_bits_of_every_other(width, dtype, kind, device):
    x, residual = hostile_rows(1200, width, dtype, device, kind)
    weight = torch.randn(width, device=device).to(dtype)
    for gemma in (False, True):
        launches = variants(width, dtype)
        expected = run_variant(x, residual, weight, gemma, launches[0])
        for variant in launches:
            assert_same(run_variant(x, residual, weight, gemma, variant), expected, f"{variant}")
            for rows in (slice(0, 1), slice(599, 600), slice(1000, 1200)):
                few = run_variant(x[rows], residual[rows], weight, gemma, variant)
                assert_same(few, tuple(t[rows] for t in expected), f"{variant}, rows {rows}")


@pytest.mark.parametrize("width", [1024, 4096])
def test_a_variant_with_another_tree_would_be_seen(width, device, monkeypatch):
    """The control: vectors of 8 bytes rather than 16, all else the same."""
    x, residual = hostile_rows(1200, width, torch.float16, device, "wide exponents")
    expected = run_variant(x, residual, None, False, None)
    other = dataclasses.replace(row_plan(width, torch.float16), vec=4)
    monkeypatch.setattr(norm_module, "row_plan", lambda *_: other)
    assert first_mismatch(run_variant(x, residual, None, False, None)[0], expected[0]) is not None


@pytest.mark.parametrize("rows", [1, 2, 255, 256, 257, 767, 768, 769, 1535, 1536, 1537, 6143, 6144, 6145, 9000])
@pytest.mark.parametrize("width", [128, 4096, 8192])
def test_norms_across_every_threshold_of_the_table(width, rows, device):
    x, residual = hostile_rows(rows, width, torch.float16, device, "wide exponents")
    weight = torch.randn(width, device=device).half()
    whole = add_rms_norm(x, residual, weight)
    for row in {0, rows // 2, rows - 1}:
        alone = add_rms_norm(x[row : row + 1], residual[row : row + 1], weight)
        assert_same(alone, tuple(t[row : row + 1] for t in whole), f"row {row} of {rows}")


@pytest.mark.parametrize("rows", [1, 256, 257, 7000])
@pytest.mark.parametrize("width", [128, 1024, 4096])
def test_dependent_launch_changes_no_bit(width, rows, device):
    """Chained, so that each kernel is let in while the one that makes its input still runs."""
    x, residual = hostile_rows(rows, width, torch.bfloat16, device, "wide exponents")
    found = []
    try:
        for use, at_once in ((False, False), (True, False), (True, True)):
            use_dependent_launch(use, at_once)
            y, total = x, residual
            for _ in range(20):
                y, total = add_rms_norm(y, total, None)
            found.append((y, total))
    finally:
        use_dependent_launch(True)
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_layout_compiles_no_other_binary(dtype, device):
    """M == 1, odd strides and unaligned pointers must not be specialised on."""
    kernel = norm_module._rms_norm_kernel
    for width in (100, 4096):
        x = torch.randn(64, width, device=device).to(dtype)
        rms_norm(x)
        before = _variants(kernel)
        wide = torch.randn(64, 2 * width + 3, device=device).to(dtype)
        for same in (x[:1], x[1:2], x[::2], wide[:, 1 : width + 1], wide[:, :width], x.view(2, 32, width), x[:33]):
            rms_norm(same, eps=1e-5)
        assert _variants(kernel) == before


def _variants(kernel):
    """How many binaries Triton has made of a kernel on this device."""
    caches = kernel.device_caches[torch.cuda.current_device()]
    return len(caches[0])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("width", [64, 128, 512, 1024, 4096, 5120, 8192, 20096])
def test_quantised_norms_have_the_bits_of_the_norm_then_quantised(width, dtype, device):
    """Every variant of the fused kernel, against the norm of any variant and the definitions of quantisation."""
    x, residual = hostile_rows(700, width, dtype, device, "wide exponents")
    x[3], residual[3], x[4, 5], x[5, -1], x[6] = 0.0, 0.0, float("nan"), float("inf"), torch.finfo(dtype).max
    weight = torch.randn(width, device=device).to(dtype)
    y, total = add_rms_norm(x, residual, weight)
    scale = torch.full((1,), 0.03, device=device)
    fp8, group = torch.float8_e4m3fn, 128 if width % 128 == 0 else 64
    cases = {
        ("static", fp8): (quantize_static_fp8_reference(y, scale), None),
        ("token", fp8): quantize_per_token_reference(y),
        ("token", torch.int8): quantize_per_token_reference(y, torch.int8),
        ("block", fp8): quantize_per_block_reference(y, group),
    }
    for (mode, out_dtype), (expected, expected_scales) in cases.items():
        for variant in variants(width, dtype):
            out, sums = torch.full_like(y, 7.0).to(out_dtype), torch.full_like(y, float("nan"))
            scales = None if expected_scales is None else torch.full_like(expected_scales, float("nan"))
            quant_kernel.launch(
                x, residual, weight, out, sums, scale if mode == "static" else None, scales, None,
                1e-6, False, mode, group, variant,
            )  # fmt: skip
            assert_same((out, sums), (expected, total), f"{mode}, {out_dtype}, {variant}")
            assert scales is None or first_mismatch(scales, expected_scales) is None, f"scales of {mode}, {variant}"


@pytest.mark.parametrize("spread", [0, 8, 40])
def test_the_quotient_is_that_of_ieee_division(spread, device):
    """Per-token fp8 of 2**26 values against a correctly rounded division, scales over ``spread`` powers of two."""
    generator = torch.Generator(device).manual_seed(spread)
    x = torch.randn(16384, 4096, generator=generator, device=device)
    x = x * 2.0 ** torch.randint(-spread, spread + 1, (16384, 1), generator=generator, device=device)
    weight = torch.exp2(torch.randn(4096, generator=generator, device=device) * 3)
    for dtype in (torch.float32, torch.bfloat16):
        y = rms_norm(x.to(dtype), weight.to(dtype), 0.0)
        out, scales = rms_norm_dynamic_per_token_quant(x.to(dtype), weight.to(dtype), 0.0)
        assert_same((out, scales), quantize_per_token_reference(y))
