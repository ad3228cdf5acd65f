"""RMSNorm with quantisation: the bits of the norm, then of vLLM's quantisation, rounding by rounding."""

import dataclasses

import numpy as np
import pytest
import torch

import batchproof
from batchproof.errors import ArgumentError, DeviceError, DtypeError, ShapeError, UnsupportedError
from batchproof.numerics import first_mismatch
from batchproof.ops._library import FLOAT_DTYPES
from batchproof.ops._quantize import (
    quantize_per_block_reference,
    quantize_per_token_reference,
    quantize_static_fp8_reference,
)
from batchproof.ops.rms_norm import add_rms_norm, rms_norm
from batchproof.registry import get_spec
from invariance import violations

FP8 = torch.float8_e4m3fn
INF, NAN = float("inf"), float("nan")
# A value times 7/64 is midway between two of the grid, until it is multiplied by the rounded 64/7.
# mode: (the op's name without add_, its keyword arguments, the quantisation)
MODES = {
    "static": ("rms_norm_static_fp8_quant", {"scale": 7 / 64}, quantize_static_fp8_reference),
    "token": ("rms_norm_dynamic_per_token_quant", {}, quantize_per_token_reference),
    "token-ub": ("rms_norm_dynamic_per_token_quant", {"scale_ub": 1.7}, quantize_per_token_reference),
    "token-int8": ("rms_norm_dynamic_per_token_quant", {"dtype": torch.int8}, quantize_per_token_reference),
    "block": ("rms_norm_per_block_quant", {}, quantize_per_block_reference),
    "block-64": ("rms_norm_per_block_quant", {"group_size": 64}, quantize_per_block_reference),
}
FORMS = [
    pytest.param(False, True, id="llama"),
    pytest.param(True, True, id="gemma"),
    pytest.param(False, False, id="unweighted"),
]
# 1, 7: less than a vector; 192, 5120, 20096: no power of two; 20096: wider than a norm keeps in registers
WIDTHS = {"block": [128, 4096, 5120, 20096], "block-64": [64, 192, 4096, 20096]}
MODES_AND_WIDTHS = [(mode, width) for mode in MODES for width in WIDTHS.get(mode, [1, 7, 100, 128, 4096, 5120, 20096])]


def randn(generator, *shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, generator=generator, device=generator.device) * scale).to(dtype)


def options(mode, device):
    """The keyword arguments of a mode, its scales as tensors."""
    return {
        name: torch.tensor([value], device=device) if isinstance(value, float) else value
        for name, value in MODES[mode][1].items()
    }


def run(mode, x, weight=None, residual=None, **kwargs):
    """(out, scales, residual_out) of a mode's op, None for what there is none of."""
    name = ("" if residual is None else "add_") + MODES[mode][0]
    inputs = {"x": x, "weight": weight, **options(mode, x.device), **kwargs}
    results = getattr(batchproof, name)(**inputs, **({} if residual is None else {"residual": residual}))
    results = list(results) if isinstance(results, tuple) else [results]
    total = results.pop() if residual is not None else None
    return results[0], results[1] if len(results) == 2 else None, total


def quantized(mode, y, **kwargs):
    """(out, scales) of a mode's quantisation of ``y``."""
    result = MODES[mode][2](y, **{**options(mode, y.device), **kwargs})
    return result if isinstance(result, tuple) else (result, None)


def assert_same(got, wanted, label=""):
    for name, a, b in zip(("out", "scales", "sum"), got, wanted, strict=False):
        assert (a is None) == (b is None), f"{label} {name}"
        assert a is None or first_mismatch(a, b) is None, f"{label} {name}: {first_mismatch(a, b)}"


# The quantisations, against scalar fp32 arithmetic of numpy and the grid of fp8 itself.

GRID = torch.arange(127, dtype=torch.uint8).view(FP8).double().numpy()  # 0 to 448
MIDDLES = (GRID[:-1] + GRID[1:]) / 2
F = np.float32


def fp8_oracle(q, nan):
    """The nearest of GRID for every fp32 ``q``, of two equally near ones the even."""
    q = np.where(np.isnan(q), F(nan), q)
    magnitude = np.abs(q).astype(np.float64)
    below, above = np.searchsorted(MIDDLES, magnitude, "left"), np.searchsorted(MIDDLES, magnitude, "right")
    code = np.where(below % 2 == 0, below, above).astype(np.uint8) | np.where(np.signbit(q), 128, 0).astype(np.uint8)
    return torch.from_numpy(code).view(FP8)


def oracle(mode, y):
    """(out, scales) of fp32 ``y`` [rows, hidden_size] by the formulas at the head of ``_quantize``."""
    kwargs = MODES[mode][1]
    with np.errstate(all="ignore"):
        if mode == "static":
            return fp8_oracle(y * (F(1) / F(kwargs["scale"])), 448.0), None
        if mode == "token-int8":
            amax = np.fmax.reduce(np.abs(y), -1, keepdims=True, initial=F(0))
            q = y * np.where(amax == 0, F(0), F(127) / amax)
            code = np.clip(np.rint(np.where(np.isnan(q), F(0), q)), -128, 127).astype(np.int8)
            return torch.from_numpy(code), torch.from_numpy(amax / F(127))
        if mode.startswith("token"):
            amax = np.fmax.reduce(np.abs(y), -1, keepdims=True, initial=F(0))
            scales = np.fmax(np.fmin(amax, F(kwargs.get("scale_ub", INF))) / F(448), F(1) / F(448 * 512))
            return fp8_oracle(y / scales, 448.0), torch.from_numpy(scales)
        blocks = y.reshape(*y.shape[:-1], -1, kwargs.get("group_size", 128))
        scales = np.fmax.reduce(np.abs(blocks), -1, keepdims=True, initial=F(1e-10)) / F(448)
        return fp8_oracle(blocks / scales, -448.0).reshape(y.shape), torch.from_numpy(scales[..., 0])


def awkward_rows(dtype, generator):
    """[rows, 256] of a dtype: what a norm may hand on, and what it should not."""
    info = torch.finfo(dtype)
    bits = 9 if dtype == torch.float16 else 40
    rows = randn(generator, 24, 256)
    powers = torch.randint(-bits, bits, (4, 256), generator=generator, device=generator.device)
    rows[1:5] *= 2.0**powers
    rows[5], rows[6] = 0.0, -0.0
    rows[7], rows[8] = info.smallest_normal / 4, -info.tiny * info.eps  # subnormal, the least of them
    rows[9] *= 2e-6  # some per-token scales at their smallest
    rows[10:12] *= info.max / 8
    rows[12, ::2], rows[13, 1], rows[14] = NAN, -NAN, NAN
    rows[15, 3], rows[16, 5], rows[17, ::2], rows[17, 1::2] = INF, -INF, INF, -INF
    rows[18, :128], rows[19, 128:] = 0.0, 1e-12
    rows[20, 0], rows[20, 1] = INF, NAN
    rows[21] = info.max
    middles = torch.from_numpy(MIDDLES).to(rows)
    rows[22] = torch.cat((middles, -middles, middles.new_tensor([448.0, 0.0, 1.0, -448.0]))) * (7 / 64)
    rows[23] = (torch.arange(-128, 128, device=rows.device) + 0.5).clamp(-127, 127) * (7 / 64)
    return rows.clamp(-info.max, info.max).where(rows.isfinite(), rows).to(dtype)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_quantisation_is_single_roundings(mode, dtype, generator):
    y = awkward_rows(dtype, generator)
    out, scales = quantized(mode, y)
    wanted, wanted_scales = oracle(mode, y.float().cpu().numpy())
    assert_same((out.cpu(), None if scales is None else scales.cpu()), (wanted, wanted_scales))
    assert out.shape == y.shape
    for row in (0, 9, 12):
        assert_same(quantized(mode, y[row]), (out[row], None if scales is None else scales[row]), f"row {row}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_quantisation_of_every_16_bit_value(mode, dtype, device):
    y = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device).view(dtype).view(-1, 128)
    y = torch.cat((y, y.t().reshape(-1, 128)))
    out, scales = quantized(mode, y)
    assert_same((out.cpu(), None if scales is None else scales.cpu()), oracle(mode, y.float().cpu().numpy()))


def test_fp8_is_rounded_to_nearest_even_and_saturates(device):
    grid, middles = torch.from_numpy(GRID).float(), torch.from_numpy(MIDDLES).float()
    up, down = (torch.nextafter(middles, torch.tensor(limit)) for limit in (INF, -INF))
    beyond = torch.tensor([463.0, 464.0, 465.0, 479.0, 480.0, 512.0, 3e38, INF])
    y = torch.cat((grid, middles, up, down, beyond)).repeat(3)[:-1]  # an odd length: vectors and a tail
    y = torch.cat((y, -y))
    out = quantize_static_fp8_reference(y.to(device), torch.ones((), device=device)).cpu()
    assert first_mismatch(out, fp8_oracle(y.numpy(), 448.0)) is None
    values = dict(zip(y.tolist(), out.float().tolist(), strict=True))
    assert [values[tie] for tie in (17.0, 19.0, 2.0**-10, 1.5 * 2.0**-9, 464.0, -INF)] == [
        16.0, 20.0, 0.0, 2.0**-8, 448.0, -448.0,
    ]  # fmt: skip


def test_what_becomes_of_nan_infinity_and_zero(device):
    """By hand, so that oracle and definition cannot be wrong together."""
    y = torch.zeros(4, 64, device=device)
    y[1, 0], y[2, 0], y[2, 1], y[3, 0], y[3, 1] = NAN, INF, 1.0, -INF, NAN
    one = torch.ones((), device=device)
    assert quantize_static_fp8_reference(y, one)[:, :2].tolist() == [[0, 0], [448, 0], [448, 1], [-448, 448]]
    out, scales = quantize_per_token_reference(y)
    assert out[:, :3].tolist() == [[0, 0, 0], [448, 0, 0], [448, 0, 0], [448, 448, 0]]
    smallest = F(1) / F(448 * 512)
    assert scales.flatten().tolist() == [smallest, smallest, INF, INF]
    out, scales = quantize_per_token_reference(y, torch.int8)
    assert not out.any()
    assert scales.flatten().tolist() == [0.0, 0.0, INF, INF]
    out, scales = quantize_per_block_reference(y, 64)
    assert out[:, :3].tolist() == [[0, 0, 0], [-448, 0, 0], [-448, 0, 0], [-448, -448, 0]]
    assert scales.flatten().tolist() == [F(1e-10) / F(448), F(1e-10) / F(448), INF, INF]


def test_a_product_is_no_quotient(device):
    """The control: with the other of the two, ties of scale 7/64 round elsewhere, and the comparisons see it."""
    middles = torch.from_numpy(MIDDLES).float().to(device)
    y, scale = torch.cat((middles, middles.new_tensor([448.0]))) * (7 / 64), torch.tensor([7 / 64], device=device)
    quotients, products = (y / scale).to(FP8), (y * (torch.ones_like(scale) / scale)).to(FP8)
    assert first_mismatch(quantize_static_fp8_reference(y, scale), products) is None
    out, scales = quantize_per_token_reference(y)
    assert scales.item() == 7 / 64
    assert first_mismatch(out, quotients) is None
    assert first_mismatch(quotients, products) is not None
    y = (torch.arange(128, device=device) + 0.5).clamp(max=127) * (7 / 64)
    out, scales = quantize_per_token_reference(y, torch.int8)
    assert scales.item() == 7 / 64
    assert first_mismatch(out, (y / scale).round().to(torch.int8)) is not None


# The fused ops: the norm's bits, then those of the quantisation.


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("gemma", "weighted"), FORMS)
@pytest.mark.parametrize(("mode", "width"), MODES_AND_WIDTHS)
def test_norm_then_quantise_has_the_same_bits(mode, width, gemma, weighted, dtype, generator):
    x, residual = (randn(generator, 5, width, dtype=dtype) for _ in range(2))
    weight = randn(generator, width, dtype=dtype) if weighted else None
    kept = [t.clone() for t in (x, residual)]
    got = run(mode, x, weight, gemma=gemma)
    assert_same(got, (*quantized(mode, rms_norm(x, weight, gemma=gemma)), None), "plain")
    y, total = add_rms_norm(x, residual, weight, gemma=gemma)
    assert_same(run(mode, x, weight, residual, gemma=gemma), (*quantized(mode, y), total), "residual")
    assert_same((x, residual), kept, "inputs")
    groups = {"static": 0, "block": width // 128, "block-64": width // 64}.get(mode, 1)
    assert got[0].dtype == (torch.int8 if mode == "token-int8" else FP8)
    assert got[1] is None if mode == "static" else got[1].shape == (5, groups)
    assert got[1] is None or got[1].dtype == torch.float32


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_awkward_rows_and_only_those(mode, dtype, generator):
    """Zeros, subnormals, huge values, NaN and infinities; every row has the bits it has alone."""
    x, residual = awkward_rows(dtype, generator), randn(generator, 24, 256, dtype=dtype)
    weight = randn(generator, 256, dtype=dtype)
    for eps in (1e-6, 0.0):
        got, plain = run(mode, x, weight, residual, eps=eps), run(mode, x, weight, eps=eps)
        y, total = add_rms_norm(x, residual, weight, eps)
        assert_same(got, (*quantized(mode, y), total), f"residual, eps {eps}")
        assert_same(plain, (*quantized(mode, rms_norm(x, weight, eps)), None), f"plain, eps {eps}")
    for row in range(24):
        alone = run(mode, x[row : row + 1], weight, residual[row : row + 1], eps=0.0)
        assert_same(alone, [None if t is None else t[row : row + 1] for t in got], f"row {row}")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_ties_and_saturation_through_the_norm(dtype, device):
    """A row of ones has norm 1, so that the weight is what is quantised."""
    x, one = torch.ones(1, 6, dtype=dtype, device=device), torch.ones((), device=device)
    weight = torch.tensor([17.0, 19.0, 2.0**-10, -1.5 * 2.0**-9, 500.0, -60000.0], dtype=dtype, device=device)
    wanted = [[16.0, 20.0, 0.0, -(2.0**-8), 448.0, -448.0]]
    assert batchproof.rms_norm_static_fp8_quant(x, weight, one, 0.0).tolist() == wanted
    weight = torch.tensor([127.0, 2.5, -2.5, 3.5, 126.5, -0.5], dtype=dtype, device=device)
    out, scales = batchproof.rms_norm_dynamic_per_token_quant(x, weight, 0.0, dtype=torch.int8)
    assert (out.tolist(), scales.tolist()) == ([[127, 2, -2, 4, 126, 0]], [[1.0]])


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch(mode, device):
    for shape in ((0, 256), (2, 0, 256)):
        x = torch.empty(shape, device=device)
        out, scales, total = run(mode, x, None, x)
        assert out.shape == total.shape == shape
        assert scales is None or scales.shape[:-1] == shape[:-1]


def layouts(x):
    """Views with the values of ``x`` [rows, width]: shifted, strided rows, strided columns, transposed, in 3 axes."""
    rows, width = x.shape

    def poison(*shape):
        return torch.full(shape, NAN, dtype=x.dtype, device=x.device)

    yield "unaligned", poison(x.numel() + 1)[1:].view_as(x).copy_(x)
    yield "strided rows", poison(rows, 2 * width)[:, :width].copy_(x)
    yield "odd pitch", poison(rows, width + 3)[:, 2 : width + 2].copy_(x)
    yield "strided columns", poison(rows, 2 * width)[:, ::2].copy_(x)
    yield "transposed", x.t().contiguous().t()
    yield "three axes", x.view(rows // 2, 2, width)
    yield "three axes, swapped", x.view(rows // 2, 2, width).transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_layout_leaves_the_bits_alone(mode, dtype, generator):
    x, residual = (randn(generator, 6, 256, dtype=dtype) for _ in range(2))
    weight = randn(generator, 256, dtype=dtype)
    expected = run(mode, x, weight, residual)
    for (name, same), (_, sums) in zip(layouts(x), layouts(residual), strict=True):
        got = run(mode, same, weight.repeat_interleave(2)[::2], sums)
        for result, wanted in zip(got, expected, strict=True):
            if result is not None:
                assert result.is_contiguous(), name
                assert first_mismatch(result.view(6, -1), wanted) is None, name
    row = run(mode, x[2], weight, residual[2])
    assert_same(row, [None if t is None else t[2] for t in expected], "one axis")


def test_scale_ub_bounds_amax_and_saturates(generator, device):
    x, weight = randn(generator, 40, 256), None
    bound = torch.tensor(3.0, device=device)
    amax = rms_norm(x, weight).abs().amax(-1, keepdim=True)
    assert bool((amax > 3).any()), "some tokens are bounded"
    assert bool((amax < 3).any()), "some are not"
    free, scales = batchproof.rms_norm_dynamic_per_token_quant(x, weight)
    out, bounded = batchproof.rms_norm_dynamic_per_token_quant(x, weight, scale_ub=bound)
    assert first_mismatch(bounded, scales.clamp(max=(bound / torch.full_like(bound, 448.0)).item())) is None
    for row in range(40):
        assert (first_mismatch(out[row], free[row]) is None) == bool(amax[row] <= 3)
    assert bool((out.float().abs().amax(-1) == 448).all())


# Invariance beyond the registry's samples.


@pytest.mark.parametrize("mode", ["token-ub", "token-int8", "block-64"])
def test_other_options_are_batch_invariant(mode, device):
    for name in (MODES[mode][0], "add_" + MODES[mode][0]):
        spec = get_spec(name)

        def sample(num_tokens, dtype, device, generator, spec=spec):
            return {**spec.sample_inputs(num_tokens, dtype, device, generator), **options(mode, device)}

        changed = dataclasses.replace(spec, sample_inputs=sample)
        assert violations(changed, torch.bfloat16, device, (1, 2, 3, 17, 33, 64, 65)) == []


def test_a_scale_of_the_batch_is_caught(device):
    """Why there is no dynamic scale per tensor: the planted op takes one."""

    def per_tensor(x, weight, eps):
        y = rms_norm(x, weight, eps)
        return quantize_static_fp8_reference(y, y.float().abs().amax() / 448.0)

    spec = get_spec("rms_norm_dynamic_per_token_quant")
    assert any("M=2" in line for line in violations(dataclasses.replace(spec, op=per_tensor), FLOAT_DTYPES[2], device))


# Errors: the value seen, the value wanted, nothing computed.


def test_errors_name_the_value(generator, device):
    x, weight, scale = randn(generator, 3, 256), randn(generator, 256), torch.ones(1, device=device)
    cases = [
        ("static", ShapeError, r"weight has shape \(7,\), want \(256,\)", {"weight": weight[:7]}),
        ("static", DtypeError, "x is torch.float64, want one of torch.float32", {"x": x.double()}),
        ("static", DtypeError, "scale is torch.float16, want torch.float32", {"scale": scale.half()}),
        ("static", DeviceError, "scale is on meta, want", {"scale": scale.to("meta")}),
        ("static", ShapeError, r"scale has shape \(3, 1\), want one element", {"scale": scale.expand(3, 1)}),
        ("static", ShapeError, r"scale has shape \(0,\), want one element", {"scale": scale[:0]}),
        ("token", DtypeError, "dtype is torch.float16, want torch.float8_e4m3fn or torch.int8", {"dtype": torch.half}),
        ("token", DtypeError, "scale_ub is torch.float64, want torch.float32", {"scale_ub": scale.double()}),
        ("token", DeviceError, "scale_ub is on meta, want", {"scale_ub": scale.to("meta")}),
        ("token", ShapeError, r"scale_ub has shape \(2,\), want one element", {"scale_ub": scale.expand(2)}),
        ("token-int8", ArgumentError, "scale_ub is given with dtype torch.int8, want None", {"scale_ub": scale}),
        ("block", ShapeError, r"x has shape \(3, 192\), want a hidden_size that 128 divides", {"x": x[:, :192]}),
        ("block", ArgumentError, r"group_size is 32, want one of \(64, 128\)", {"group_size": 32}),
        ("block", ArgumentError, r"group_size is 0, want one of \(64, 128\)", {"group_size": 0}),
        ("token", ArgumentError, "eps is -1.0, want a finite number that is not negative", {"eps": -1.0}),
    ]
    for mode, error, match, wrong in cases:
        arguments = {"x": x, "weight": wrong.get("weight", weight if "x" not in wrong else None), **wrong}
        for residual in (None, arguments["x"]):
            with pytest.raises(error, match=match):
                run(mode, residual=residual, **arguments)
    for mode in MODES:
        with pytest.raises(ShapeError, match=r"residual has shape \(2, 256\), want \(3, 256\)"):
            run(mode, x, weight, x[:2])
        with pytest.raises(ShapeError, match=r"want \[..., hidden_size\] with hidden_size at least 1"):
            run(mode, x[:, :0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="reading a scale on a GPU would wait for the device")
@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF])
def test_scales_are_positive(value, generator):
    x, wrong = randn(generator, 3, 256), torch.tensor([value])
    for mode, name in (("static", "scale"), ("token", "scale_ub")):
        with pytest.raises(ArgumentError, match=f"{name} is {value}, want a finite positive number"):
            run(mode, x, **{name: wrong})


@pytest.mark.parametrize("mode", MODES)
def test_autograd_is_refused(mode, generator):
    x, weight = randn(generator, 3, 256), randn(generator, 256).requires_grad_()
    for residual in (None, x):
        with pytest.raises(UnsupportedError, match="has no backward pass"):
            run(mode, x, weight, residual)
        with torch.no_grad():
            assert_same(run(mode, x, weight, residual), run(mode, x, weight.detach(), residual))


# The dispatcher and the compiler.


@pytest.mark.parametrize("weighted", [True, False])
def test_registered_ops(weighted, generator, device):
    x, residual = (randn(generator, 4, 3, 256, dtype=torch.float16) for _ in range(2))
    weight = randn(generator, 256, dtype=torch.float16) if weighted else None
    scale, ops = torch.full((1,), 0.01, device=device), torch.ops.batchproof
    for view, other in ((x, residual), (x.transpose(0, 1), residual.transpose(0, 1))):
        for tail, op in (
            ((scale, 1e-6, False), "rms_norm_static_fp8_quant"),
            ((1e-6, True, FP8, scale), "rms_norm_dynamic_per_token_quant"),
            ((1e-6, False, torch.int8, None), "rms_norm_dynamic_per_token_quant"),
            ((1e-6, False, 128), "rms_norm_per_block_quant"),
        ):
            torch.library.opcheck(getattr(ops, op).default, (view, weight, *tail))
            torch.library.opcheck(getattr(ops, f"add_{op}").default, (view, other, weight, *tail))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", MODES)
def test_compiled_equals_eager(mode, backend, generator):
    weight = randn(generator, 256, dtype=torch.bfloat16)

    torch._dynamo.reset()

    def block(x, residual):
        out, scales, total = run(mode, x, weight, residual)
        plain, plain_scales, _ = run(mode, total * 2, weight, gemma=True)
        return [t for t in (out, scales, total, plain, plain_scales) if t is not None]

    compiled = torch.compile(block, backend=backend, fullgraph=True)
    for rows in (1, 5):
        x, residual = (randn(generator, rows, 256, dtype=torch.bfloat16) for _ in range(2))
        for mine, theirs in zip(compiled(x, residual), block(x, residual), strict=True):
            assert first_mismatch(mine, theirs) is None


# vLLM's own ops.


def vllm_quantized(mode, y):
    """(out, scales) of contiguous ``y`` [rows, hidden_size] by vLLM's standalone CUDA op."""
    ops = pytest.importorskip("vllm._custom_ops", reason="vLLM is not installed: its ops are the other side")
    kwargs = options(mode, y.device)
    if mode == "static":
        return ops.scaled_fp8_quant(y, kwargs["scale"])[0], None
    if mode == "token-int8":
        return ops.scaled_int8_quant(y)[:2]
    if mode.startswith("token"):
        return ops.scaled_fp8_quant(y, scale_ub=kwargs.get("scale_ub"), use_per_token_if_dynamic=True)
    size = kwargs.get("group_size", 128)
    out, scales = torch.empty_like(y, dtype=FP8), y.new_empty(len(y), y.shape[1] // size, dtype=torch.float32)
    torch.ops._C.per_token_group_fp8_quant(y, out, scales, size, 1e-10, -448.0, 448.0, False, False, False)
    return out, scales


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_quantisation_has_the_bits_of_vllm(mode, dtype, generator):
    rows = awkward_rows(dtype, generator)
    assert_same(quantized(mode, rows), vllm_quantized(mode, rows), "awkward")
    rows = randn(generator, 300, 4096, dtype=dtype)
    assert_same(quantized(mode, rows), vllm_quantized(mode, rows), "random")
    if dtype != torch.float32:
        rows = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=rows.device).view(dtype).view(-1, 256)
        rows = torch.cat((rows, rows.t().reshape(-1, 256)))
        assert_same(quantized(mode, rows), vllm_quantized(mode, rows), "every 16-bit value")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("gemma", "weighted"), FORMS)
@pytest.mark.parametrize("mode", MODES)
def test_fused_has_the_bits_of_our_norm_and_vllm(mode, gemma, weighted, dtype, generator):
    for width in (256, 4096, 5120):
        x, residual = (randn(generator, 300, width, dtype=dtype) for _ in range(2))
        weight = randn(generator, width, dtype=dtype) if weighted else None
        y, total = add_rms_norm(x, residual, weight, gemma=gemma)
        got = run(mode, x, weight, residual, gemma=gemma)
        assert_same(got, (*vllm_quantized(mode, y), total), f"{width} columns")
