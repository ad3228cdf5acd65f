"""layer_norm: one rounding, layouts, statistics, errors, and bits that depend on a row alone."""

import pytest
import torch
import torch.nn.functional as F

from batchproof.errors import ArgumentError, DeviceError, DtypeError, ShapeError, UnsupportedError
from batchproof.numerics import TOLERANCES, as_bits, first_mismatch, ulp_distance
from batchproof.ops import layer_norm as module
from batchproof.ops._library import FLOAT_DTYPES
from batchproof.ops._row_launch import row_plan
from batchproof.ops.layer_norm import layer_norm, layer_norm_reference

# 1-7: less than a vector; 100, 1000, 20000: no power of two; 16384: the widest in registers; beyond: read three times
WIDTHS = [1, 2, 3, 7, 64, 100, 128, 512, 1000, 4096, 5120, 16384, 20000, 65536]
INF, NAN = float("inf"), float("nan")
FORMS = [
    pytest.param(True, True, id="weight-bias"),
    pytest.param(True, False, id="weight"),
    pytest.param(False, True, id="bias"),
    pytest.param(False, False, id="plain"),
]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself runs in the other tests")


def randn(generator, *shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, generator=generator, device=generator.device) * scale).to(dtype)


def parameters(generator, width, dtype, weighted=True, biased=True):
    return tuple(randn(generator, width, dtype=dtype) if wanted else None for wanted in (weighted, biased))


def assert_accurate(out, x, weight, bias, eps=1e-5):
    """Within ``TOLERANCES``, whose absolute part is in units of the largest |x|, normalised and scaled, plus |bias|."""
    expected, tolerance = layer_norm_reference(x, weight, bias, eps), TOLERANCES["layer_norm"]
    wide = x.double()
    unit = wide.abs().amax(-1, keepdim=True) / (wide.var(-1, correction=0, keepdim=True) + eps).sqrt()
    unit = unit if weight is None else unit * weight.double().abs()
    unit = unit if bias is None else unit + bias.double().abs()
    near = (out.double() - expected.double()).abs() <= tolerance.atol * unit
    bad = ~(near | (ulp_distance(out, expected) <= tolerance.ulp))
    assert not bad.any(), f"{int(bad.sum())} off, first {out[bad][0].item()} against {expected[bad][0].item()}"


# Accuracy.


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("weighted", "biased"), FORMS)
@pytest.mark.parametrize("width", WIDTHS)
def test_accuracy(width, weighted, biased, dtype, generator):
    x = randn(generator, 2 if width > 10000 else 5, width, dtype=dtype)
    weight, bias = parameters(generator, width, dtype, weighted, biased)
    assert_accurate(layer_norm(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("width", [64, 1000, 4096])
def test_rounds_once_as_torch_does(width, dtype, generator):
    """Were the normalised value rounded before it is scaled, a sixth of the elements would differ."""
    x, (weight, bias) = randn(generator, 9, width, dtype=dtype), parameters(generator, width, dtype)
    out = layer_norm(x, weight, bias)
    theirs = F.layer_norm(x.float(), (width,), weight.float(), bias.float()).to(dtype)
    torch.testing.assert_close(out, F.layer_norm(x, (width,), weight, bias), rtol=0.01, atol=0.02)
    if dtype != torch.float32:
        assert (as_bits(out) == as_bits(theirs)).double().mean() > 0.99


def adversarial(name, dtype, generator):
    """[3, 512]."""
    x, largest = randn(generator, 3, 512), torch.finfo(dtype).max
    if name == "a mean far from 0":
        x = x + 100.0
    elif name == "one dominates":
        x = x * 1e-3
        x[:, 7] = 1e4
    elif name == "halves cancel":
        x[:, 256:] = -x[:, :256]
    elif name == "constant":
        x = torch.full_like(x, 3.0)
    elif name == "zeros":
        x = torch.zeros_like(x)
    elif name == "large":
        x = x.sign() * min(largest / 4, 1e15)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("weighted", "biased"), FORMS)
@pytest.mark.parametrize("name", ["a mean far from 0", "one dominates", "halves cancel", "constant", "zeros", "large"])
def test_accuracy_of_adversarial_rows(name, weighted, biased, dtype, generator):
    x, (weight, bias) = adversarial(name, dtype, generator), parameters(generator, 512, dtype, weighted, biased)
    assert_accurate(layer_norm(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1.0, 1e30])
def test_accuracy_for_any_eps(eps, dtype, generator):
    x = randn(generator, 4, 300, dtype=dtype)
    assert_accurate(layer_norm(x, eps=eps), x, None, None, eps)


def test_the_variance_is_that_of_deviations(generator):
    """The difference of two moments would have no bit left of a variance of 1 around a mean of 10**5."""
    x = randn(generator, 3, 1000, scale=1.0) + 1e5
    torch.testing.assert_close(layer_norm(x), layer_norm_reference(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_rows_that_are_not_finite_are_alone_in_it(dtype, generator):
    x, (weight, bias) = randn(generator, 6, 100, dtype=dtype), parameters(generator, 100, dtype)
    clean = layer_norm(x, weight, bias)
    x[1, 3], x[3, 99], x[4, 0], x[5] = NAN, INF, -INF, INF
    out = layer_norm(x, weight, bias)
    assert torch.equal(out.isnan(), layer_norm_reference(x, weight, bias).isnan())
    for row in (0, 2):
        assert first_mismatch(out[row], clean[row]) is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("width", [7, 64, 100])
def test_a_nan_row_has_one_result(width, dtype, generator):
    x, (weight, bias) = randn(generator, 1, width, dtype=dtype), parameters(generator, width, dtype)
    x[0, ::2], x[0, 1] = NAN, -NAN
    alone = layer_norm(x, weight, bias)
    for rows in (2, 3, 33, 257, 1000):
        batch = layer_norm(x.repeat(rows, 1), weight, bias)
        assert first_mismatch(batch, alone.expand_as(batch)) is None, f"{rows} rows"


# Layouts.


def layouts(x):
    """Views with the values of ``x`` [rows, width]: shifted, strided rows, strided columns, transposed."""
    rows, width = x.shape
    yield "unaligned", x.new_full((x.numel() + 1,), NAN)[1:].view_as(x).copy_(x)
    yield "strided rows", x.new_full((rows, 2 * width), NAN)[:, :width].copy_(x)
    yield "odd pitch", x.new_full((rows, width + 3), NAN)[:, 2 : width + 2].copy_(x)
    yield "strided columns", x.new_full((rows, 2 * width), NAN)[:, ::2].copy_(x)
    yield "transposed", x.t().contiguous().t()
    yield "every other row", x.new_full((2 * rows, width), NAN)[::2].copy_(x)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 100, 4096])
def test_layout_leaves_the_bits_alone(width, dtype, generator):
    x, (weight, bias) = randn(generator, 6, width, dtype=dtype), parameters(generator, width, dtype)
    expected = layer_norm(x, weight, bias)
    loose = [t.repeat_interleave(2)[::2] for t in (weight, bias)]
    for name, same in layouts(x):
        for out, wanted in (
            (layer_norm(same, weight, bias), expected),
            (layer_norm(same, *loose), expected),
            (layer_norm(same[3:4], weight, bias), expected[3:4]),
            (layer_norm(same[3], weight, bias), expected[3]),
            (layer_norm(same.unflatten(0, (2, 3)), weight, bias), expected.view(2, 3, width)),
            (
                layer_norm(same.unflatten(0, (2, 3)).transpose(0, 1), weight, bias),
                expected.view(2, 3, width).transpose(0, 1),
            ),
        ):
            assert out.is_contiguous()
            assert first_mismatch(out, wanted) is None, name
    assert first_mismatch(layer_norm(x[:1].expand(4, -1), weight, bias), expected[:1].expand(4, -1)) is None
    assert first_mismatch(layer_norm(x.view(6, 1, 1, width), weight, bias).view_as(x), expected) is None


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (0, 4, 7)])
def test_an_empty_batch(shape, device):
    assert layer_norm(torch.empty(shape, device=device), torch.ones(shape[-1], device=device)).shape == shape


# Errors: the value seen, the value wanted.


def test_errors_name_the_value(generator, device):
    x, weight, bias = randn(generator, 3, 8), randn(generator, 8), randn(generator, 8)
    for error, match, arguments in (
        (ShapeError, r"weight has shape \(7,\), want \(8,\)", (x, weight[:7], bias)),
        (ShapeError, r"bias has shape \(1, 8\), want \(8,\)", (x, weight, bias[None])),
        (DtypeError, r"x is torch.float64, want one of torch.float32", (x.double(), weight, bias)),
        (DtypeError, r"x is torch.int32, want one of torch.float32", (x.int(), weight, bias)),
        (DtypeError, r"weight is torch.bfloat16, want torch.float32", (x, weight.bfloat16(), bias)),
        (DtypeError, r"bias is torch.float16, want torch.float32", (x, None, bias.half())),
        (DeviceError, "weight is on meta, want", (x, weight.to("meta"), bias)),
        (DeviceError, "bias is on meta, want", (x, weight, bias.to("meta"))),
        (ShapeError, r"x has shape \(\), want \[..., hidden_size\]", (torch.zeros((), device=device),)),
        (ShapeError, r"x has shape \(3, 0\), want \[..., hidden_size\]", (torch.zeros(3, 0, device=device),)),
        *(
            (ArgumentError, f"eps is {eps}, want a finite number that is not negative", (x, weight, bias, eps))
            for eps in (-1e-6, -INF, NAN, INF)
        ),
    ):
        with pytest.raises(error, match=match):
            layer_norm(*arguments)


def test_autograd_is_refused(generator):
    x, weight = randn(generator, 3, 8).requires_grad_(), randn(generator, 8)
    for arguments in ((x,), (x.detach(), weight.requires_grad_()), (x.detach(), None, weight)):
        with pytest.raises(UnsupportedError, match="layer_norm has no backward pass"):
            layer_norm(*arguments)
        with torch.no_grad():
            layer_norm(*arguments)


# The dispatcher and the compiler.


@pytest.mark.parametrize(("weighted", "biased"), FORMS)
def test_registered_op(weighted, biased, generator):
    x = randn(generator, 4, 3, 24, dtype=torch.float16)
    weight, bias = parameters(generator, 24, torch.float16, weighted, biased)
    for view in (x, x.transpose(0, 1)):
        torch.library.opcheck(torch.ops.batchproof.layer_norm.default, (view, weight, bias, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(dtype, generator):
    weight, bias = parameters(generator, 64, dtype)

    def block(x):
        return layer_norm(layer_norm(x, weight, bias) * 2, weight)

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for rows in (1, 5):
        x = randn(generator, rows, 64, dtype=dtype)
        assert first_mismatch(compiled(x), block(x)) is None


# The Triton kernel, in the interpreter: every launch variant.


def variants(width, dtype):
    return list(dict.fromkeys(variant for _, variant in row_plan(width, dtype, "layer_norm").variants))


def launch(x, weight, bias, variant=None, statistics=False):
    """(out, mean, rstd)."""
    out = torch.full_like(x, NAN, memory_format=torch.contiguous_format)
    mean, rstd = (x.new_full(x.shape[:-1], NAN, dtype=torch.float32) if statistics else None for _ in range(2))
    module.launch(x, weight, bias, out, mean, rstd, 1e-5, variant)
    return out, mean, rstd


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("weighted", "biased"), FORMS)
@pytest.mark.parametrize("width", [1, 7, 64, 100, 512, 1000, 1024, 2048, 5120, 8192, 16384, 20000])
def test_kernel_in_the_interpreter(width, weighted, biased, dtype, generator):
    rows = 19 if width <= 512 else 3  # more than a program takes
    x = randn(generator, rows, width, dtype=dtype) + 2.0
    weight, bias = parameters(generator, width, dtype, weighted, biased)
    wide = x.double()
    rstd_wanted = torch.rsqrt(wide.var(-1, correction=0) + 1e-5)
    for variant in variants(width, dtype):
        out, mean, rstd = launch(x, weight, bias, variant, statistics=True)
        assert_accurate(out, x, weight, bias)
        torch.testing.assert_close(mean, wide.mean(-1).float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rstd, rstd_wanted.float(), rtol=1e-6, atol=1e-6)
        assert first_mismatch(launch(x, weight, bias, variant)[0], out) is None, "statistics changed the bits"
        assert first_mismatch(launch(x[2:3], weight, bias, variant)[0], out[2:3]) is None


@interpreted
@pytest.mark.parametrize("width", [40, 100, 2048, 18000])
def test_kernel_over_awkward_views(width, generator):
    x, (weight, bias) = randn(generator, 6, width), parameters(generator, width, torch.float32)
    for variant in variants(width, torch.float32):
        expected = launch(x, weight, bias, variant)[0]
        for name, same in layouts(x):
            assert first_mismatch(launch(same, weight, bias, variant)[0], expected) is None, name
        turned = x.view(2, 3, width).transpose(0, 1)
        assert first_mismatch(launch(turned, weight, bias, variant)[0].transpose(0, 1).reshape(6, -1), expected) is None


# The kernel on a GPU: one tree.


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0.0, 100.0])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_variant_has_the_bits_of_every_other(width, dtype, shift, generator):
    """Also those with statistics, which the switch takes; powers of two make every order of a sum round elsewhere."""
    powers = torch.randint(-12, 10, (1200, width), generator=generator, device=generator.device)
    x = (randn(generator, 1200, width) * 2.0**powers + shift).to(dtype)
    weight, bias = parameters(generator, width, dtype)
    expected, *statistics = launch(x, weight, bias, statistics=True)
    for variant in variants(width, dtype):
        out, mean, rstd = launch(x, weight, bias, variant, statistics=True)
        plain = launch(x, weight, bias, variant)[0]
        for mine, wanted in ((out, expected), (plain, expected), (mean, statistics[0]), (rstd, statistics[1])):
            assert first_mismatch(mine, wanted) is None, variant
        for rows in (slice(0, 1), slice(599, 600), slice(1000, 1200)):
            assert first_mismatch(launch(x[rows], weight, bias, variant)[0], expected[rows]) is None, (variant, rows)


@pytest.mark.gpu
def test_another_tree_would_be_seen(generator, monkeypatch):
    """The control for the test above: vectors of 8 bytes rather than 16, all else the same."""
    powers = torch.randint(-12, 10, (1200, 4096), generator=generator, device=generator.device)
    x = (randn(generator, 1200, 4096) * 2.0**powers).half()
    expected = launch(x, None, None)[0]
    plan = row_plan(4096, torch.float16, "layer_norm")
    other = type(plan)(4096, 4, plan.align, plan.rows, plan.accumulator, plan.variants)
    monkeypatch.setattr(module, "row_plan", lambda *_: other)
    assert first_mismatch(launch(x, None, None)[0], expected) is not None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_layout_compiles_no_other_binary(dtype, generator):
    """One row, odd strides and unaligned pointers must not be specialised on."""
    for width in (100, 4096):
        wide = randn(generator, 64, 2 * width + 3, dtype=dtype)
        x = wide[:, :width].contiguous()
        layer_norm(x)
        before = len(module._layer_norm_kernel.device_caches[torch.cuda.current_device()][0])
        for same in (x[:1], x[1:2], x[::2], wide[:, 1 : width + 1], wide[:, :width], x.view(2, 32, width), x[:33]):
            layer_norm(same, eps=1e-6)
        assert len(module._layer_norm_kernel.device_caches[torch.cuda.current_device()][0]) == before
