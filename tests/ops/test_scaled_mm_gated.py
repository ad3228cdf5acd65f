"""The product with its gated activation: the bits of the two ops; Hopper's kernel is in tests/gpu."""

import pytest
import torch

from batchproof.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError
from batchproof.numerics import first_mismatch
from batchproof.ops import scaled_mm_gated as module
from batchproof.ops.activation_quant import silu_and_mul_static_fp8_quant
from batchproof.ops.scaled_mm import scaled_mm
from batchproof.ops.scaled_mm_gated import scaled_mm_silu_and_mul_static_fp8_quant as fused

FP8 = torch.float8_e4m3fn


def inputs(generator, num_tokens, dtype=torch.bfloat16):
    return module._sample(num_tokens, dtype, generator.device, generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_tokens", [0, 1, 16, 33])
def test_it_has_the_bits_of_the_two(num_tokens, dtype, generator):
    given = inputs(generator, num_tokens, dtype)
    product = scaled_mm(*(given[name] for name in ("a", "b", "scale_a", "scale_b")), None, dtype)
    out = fused(**given)
    assert out.dtype == FP8
    assert first_mismatch(out, silu_and_mul_static_fp8_quant(product, given["scale"])) is None


def test_scales_may_be_of_the_tensor_or_of_blocks(generator):
    given = inputs(generator, 3)
    k, n = given["b"].shape
    for scale_a, scale_b in (((1,), (1,)), ((3, k // 128), (k // 128, n // 128))):
        given["scale_a"], given["scale_b"] = (
            torch.rand(size, generator=generator, device=generator.device) * 0.1 for size in (scale_a, scale_b)
        )
        product = scaled_mm(*(given[name] for name in ("a", "b", "scale_a", "scale_b")))
        assert first_mismatch(fused(**given), silu_and_mul_static_fp8_quant(product, given["scale"])) is None


def test_errors_name_the_value(generator):
    given = inputs(generator, 2)
    with pytest.raises(ShapeError, match=r"b has shape \(1024, 383\), want \[K, 2 \* d\]"):
        fused(**given | {"b": given["b"][:, :383], "scale_b": given["scale_b"][:, :383]})
    with pytest.raises(ShapeError, match=r"scaled_mm_silu_and_mul_static_fp8_quant: shapes \(2, 1024\)"):
        fused(**given | {"b": given["b"][:512]})
    with pytest.raises(DtypeError, match=r"a is torch\.float32"):
        fused(**given | {"a": given["a"].float()})
    with pytest.raises(ShapeError, match=r"scale has shape \(2,\), want one element"):
        fused(**given | {"scale": torch.ones(2, device=generator.device)})
    with pytest.raises(UnsupportedError, match="no backward pass"):
        fused(**given | {"scale": given["scale"].requires_grad_()})


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_not_positive_is_refused_on_the_cpu(value):
    given = module._sample(2, torch.bfloat16, torch.device("cpu"), torch.Generator().manual_seed(0))
    with pytest.raises(ArgumentError, match=r"scale is .*, want a finite positive number"):
        fused(**given | {"scale": torch.tensor([value])})


def test_registered_op(generator):
    op = torch.ops.batchproof.scaled_mm_silu_and_mul_static_fp8_quant.default
    # its check of the schema multiplies inputs, which fp8 cannot be
    torch.library.opcheck(op, tuple(inputs(generator, 3).values()), test_utils="test_faketensor")
