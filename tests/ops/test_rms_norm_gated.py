"""rms_norm_gated: the roundings of the models, groups, layouts, errors, and bits that depend on a row alone."""

import dataclasses

import pytest
import torch

from batchproof.errors import ArgumentError, DeviceError, DtypeError, ShapeError, UnsupportedError
from batchproof.numerics import TOLERANCES, as_bits, first_mismatch, ulp_distance
from batchproof.ops import rms_norm_gated as module
from batchproof.ops._library import FLOAT_DTYPES
from batchproof.ops._row_launch import row_plan
from batchproof.ops.rms_norm import rms_norm
from batchproof.ops.rms_norm_gated import rms_norm_gated, rms_norm_gated_reference
from batchproof.registry import get_spec
from invariance import violations

# 1, 7: less than a vector; 100, 1000, 20000: no power of two; 16384: the widest in registers; beyond: read twice
WIDTHS = [1, 7, 64, 100, 128, 512, 1000, 4096, 5120, 16384, 20000, 65536]
INF, NAN = float("inf"), float("nan")
ORDERS = [pytest.param(True, id="norm-before-gate"), pytest.param(False, id="gate-before-norm")]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself runs in the other tests")


def randn(generator, *shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, generator=generator, device=generator.device) * scale).to(dtype)


def tensors(generator, rows, width, dtype, weighted=True):
    """x, gate, weight."""
    x, gate = randn(generator, rows, width, dtype=dtype), randn(generator, rows, width, dtype=dtype, scale=2.0)
    return x, gate, randn(generator, width, dtype=dtype) if weighted else None


def assert_accurate(out, x, gate, weight, eps=1e-6, **form):
    expected = rms_norm_gated_reference(x, gate, weight, eps, **form)
    most = TOLERANCES["rms_norm_gated" if form["norm_before_gate"] else "rms_norm"].ulp  # one product less
    distance = ulp_distance(out, expected)
    assert distance.numel() == 0 or int(distance.max()) <= most, (
        f"{int((distance > most).sum())} of {out.numel()} off by up to {int(distance.max())} ulp"
    )


# Accuracy.


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("norm_before_gate", ORDERS)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_accuracy(width, weighted, norm_before_gate, dtype, generator):
    x, gate, weight = tensors(generator, 2 if width > 10000 else 5, width, dtype, weighted)
    out = rms_norm_gated(x, gate, weight, norm_before_gate=norm_before_gate)
    assert_accurate(out, x, gate, weight, norm_before_gate=norm_before_gate)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("norm_before_gate", ORDERS)
@pytest.mark.parametrize("name", ["one dominates", "shut gates", "open gates", "zeros", "small"])
def test_accuracy_of_adversarial_rows(name, norm_before_gate, dtype, generator):
    x, gate, weight = tensors(generator, 3, 512, dtype)
    if name == "one dominates":
        x, gate = x * 1e-3, gate.clone()
        x[:, 7], gate[:, 7] = 100.0, 50.0
    elif name == "shut gates":
        gate = -gate.abs() - 3.0
    elif name == "open gates":
        gate = gate.abs() * 20.0
    elif name == "zeros":
        x[0], gate[1] = 0.0, 0.0
    elif name == "small":
        x, gate = x * 2.0**-8, gate * 2.0**-8
    out = rms_norm_gated(x, gate, weight, norm_before_gate=norm_before_gate)
    assert_accurate(out, x, gate, weight, norm_before_gate=norm_before_gate)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("norm_before_gate", ORDERS)
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1.0, 1e30])
def test_accuracy_for_any_eps(eps, norm_before_gate, dtype, generator):
    x, gate, _ = tensors(generator, 4, 300, dtype)
    out = rms_norm_gated(x, gate, None, eps, norm_before_gate=norm_before_gate)
    assert_accurate(out, x, gate, None, eps, norm_before_gate=norm_before_gate)


# The models' modules: (path, class, its arguments beside hidden_size, norm_before_gate, group_size).
MODELS = {
    "mamba2": ("mamba2", "MambaRMSNormGated", {}, False, None),
    "bamba": ("bamba", "BambaRMSNormGated", {}, False, None),
    "granitemoehybrid": ("granitemoehybrid", "GraniteMoeHybridRMSNormGated", {}, False, None),
    "zamba2": ("zamba2", "Zamba2RMSNormGated", {"group_size": 256}, False, 256),
    "qwen3_next": ("qwen3_next", "Qwen3NextRMSNormGated", {}, True, None),
    "qwen3_5": ("qwen3_5", "Qwen3_5RMSNormGated", {}, True, None),
    "olmo_hybrid": ("olmo_hybrid", "OlmoHybridRMSNormGated", {}, True, None),
}
FALCON = {
    "norm before gate": ("falcon_h1", "FalconH1RMSNormGated", {"n_groups": 4}, True, 256),
    "gate before norm": ("falcon_h1", "FalconH1RMSNormGated", {"n_groups": 4, "norm_before_gate": False}, False, 256),
}


def share_of_equal_bits(model, dtype, generator):
    """How many of 64 rows' elements have the bits of a model's own module, which computes in fp32 for every dtype."""
    path, name, arguments, norm_before_gate, group_size = model
    modeling = pytest.importorskip(f"transformers.models.{path}.modeling_{path}")
    x, gate, weight = tensors(generator, 64, 1024, dtype)
    theirs = getattr(modeling, name)(1024, eps=1e-5, **arguments).to(x.device, dtype)
    theirs.weight.data.copy_(weight)
    with torch.no_grad():
        expected = theirs(x, gate)
    out = rms_norm_gated(x, gate, weight, 1e-5, norm_before_gate=norm_before_gate, group_size=group_size)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=2.0**-5, atol=1e-5)
    return (as_bits(out) == as_bits(expected)).double().mean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS)
def test_rounds_where_the_models_do(model, dtype, generator):
    assert share_of_equal_bits(MODELS[model], dtype, generator) > 0.99


@pytest.mark.parametrize("order", FALCON)
def test_falcon_h1_rounds_elsewhere(order, generator):
    """As the docstring says; and the test above would see it."""
    assert share_of_equal_bits(FALCON[order], torch.bfloat16, generator) < 0.9


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_an_open_gate_leaves_the_norm(dtype, generator):
    """silu(64) is 64 in every dtype, and a power of two moves no bit of the norm."""
    x, _, weight = tensors(generator, 5, 300, dtype)
    out = rms_norm_gated(x, torch.full_like(x, 64.0), weight, norm_before_gate=True)
    assert first_mismatch(out, rms_norm(x, weight) * 64.0) is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("norm_before_gate", ORDERS)
def test_rows_that_are_not_finite_are_alone_in_it(norm_before_gate, dtype, generator):
    x, gate, weight = tensors(generator, 8, 100, dtype)
    clean = rms_norm_gated(x, gate, weight, norm_before_gate=norm_before_gate)
    x[1, 3], x[3, 99], gate[4, 0], gate[5], gate[6, 1] = NAN, INF, NAN, INF, -INF
    out = rms_norm_gated(x, gate, weight, norm_before_gate=norm_before_gate)
    expected = rms_norm_gated_reference(x, gate, weight, norm_before_gate=norm_before_gate)
    assert torch.equal(out.isnan(), expected.isnan())
    for row in (0, 2, 7):
        assert first_mismatch(out[row], clean[row]) is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("norm_before_gate", ORDERS)
@pytest.mark.parametrize("width", [7, 64, 100])
def test_a_nan_row_has_one_result(width, norm_before_gate, dtype, generator):
    x, gate, weight = tensors(generator, 1, width, dtype)
    x[0, ::2], gate[0, 1] = NAN, -NAN
    alone = rms_norm_gated(x, gate, weight, norm_before_gate=norm_before_gate)
    for rows in (2, 3, 33, 257, 1000):
        batch = rms_norm_gated(x.repeat(rows, 1), gate.repeat(rows, 1), weight, norm_before_gate=norm_before_gate)
        assert first_mismatch(batch, alone.expand_as(batch)) is None, f"{rows} rows"


# Groups.


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("norm_before_gate", ORDERS)
@pytest.mark.parametrize(("width", "group_size"), [(12, 1), (96, 24), (300, 100), (2048, 256), (4096, 1024)])
def test_a_group_is_a_row_of_its_own(width, group_size, norm_before_gate, dtype, generator):
    x, gate, weight = tensors(generator, 5, width, dtype)
    form = {"norm_before_gate": norm_before_gate}
    out = rms_norm_gated(x, gate, weight, group_size=group_size, **form)
    assert_accurate(out, x, gate, weight, group_size=group_size, **form)
    pieces = (t.split(group_size, dim=-1) for t in (x, gate, weight))
    alone = [rms_norm_gated(a, b, c, **form) for a, b, c in zip(*pieces, strict=True)]
    assert first_mismatch(torch.cat(alone, -1), out) is None
    whole = rms_norm_gated(x, gate, weight, group_size=width, **form)
    assert first_mismatch(whole, rms_norm_gated(x, gate, weight, **form)) is None


# Layouts.


def projected(x, gate, extra=0):
    """(x, gate) as columns of one projection, ``extra`` columns before and between them."""
    pad = x.new_full((*x.shape[:-1], extra), NAN)
    wide = torch.cat((pad, gate, pad, x), -1)
    return wide[..., -x.shape[-1] :], wide[..., extra : extra + x.shape[-1]]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("norm_before_gate", ORDERS)
@pytest.mark.parametrize("group_size", [None, 24])
def test_layout_leaves_the_bits_alone(group_size, norm_before_gate, dtype, generator):
    x, gate, weight = tensors(generator, 6, 96, dtype)
    form = {"norm_before_gate": norm_before_gate, "group_size": group_size}
    expected = rms_norm_gated(x, gate, weight, **form)
    loose = weight.repeat_interleave(2)[::2]
    for name, (same_x, same_gate) in {
        "columns of a projection": projected(x, gate),
        "with others between": projected(x, gate, 8),
        "unaligned": projected(x, gate, 3),
        "x alone": (projected(x, gate)[0], gate),
        "the gate alone": (x, projected(x, gate, 16)[1]),
        "transposed": (x.t().contiguous().t(), gate),
        "strided columns": (x, gate.repeat_interleave(2, 1)[:, ::2]),
    }.items():
        for out, wanted in (
            (rms_norm_gated(same_x, same_gate, weight, **form), expected),
            (rms_norm_gated(same_x, same_gate, loose, **form), expected),
            (rms_norm_gated(same_x[3:4], same_gate[3:4], weight, **form), expected[3:4]),
            (rms_norm_gated(same_x[3], same_gate[3], weight, **form), expected[3]),
            (
                rms_norm_gated(same_x.unflatten(0, (2, 3)), same_gate.unflatten(0, (2, 3)), weight, **form),
                expected.view(2, 3, 96),
            ),
        ):
            assert out.is_contiguous()
            assert first_mismatch(out, wanted) is None, name
    heads = [t.view(6, 4, 24) for t in (x, gate)]
    turned = rms_norm_gated(*(t.transpose(0, 1) for t in heads), weight[:24], norm_before_gate=norm_before_gate)
    straight = rms_norm_gated(*heads, weight[:24], norm_before_gate=norm_before_gate)
    assert first_mismatch(turned.transpose(0, 1), straight) is None


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (0, 4, 8)])
@pytest.mark.parametrize("group_size", [None, 4])
def test_an_empty_batch(shape, group_size, device):
    x = torch.empty(shape, device=device)
    for norm_before_gate in (True, False):
        assert rms_norm_gated(x, x, norm_before_gate=norm_before_gate, group_size=group_size).shape == shape


# Bits that depend on a row alone: the forms that the registry's sample is not of.


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(
    ("norm_before_gate", "group_size", "shape"),
    [(True, None, (512,)), (True, None, (4, 128)), (False, 64, (512,)), (True, 100, (300,))],
)
def test_bits_depend_on_the_request_alone(norm_before_gate, group_size, shape, dtype, device):
    def sample(num_tokens, dtype, device, generator):
        x, gate = (randn(generator, num_tokens, *shape, dtype=dtype) for _ in range(2))
        weight = randn(generator, shape[-1], dtype=dtype)
        return {
            "x": x, "gate": gate, "weight": weight,
            "norm_before_gate": norm_before_gate, "group_size": group_size,
        }  # fmt: skip

    spec = dataclasses.replace(get_spec("rms_norm_gated"), sample_inputs=sample)
    assert violations(spec, dtype, device, (1, 2, 3, 8, 16, 17, 33, 65, 129, 257)) == []


# Errors: the value seen, the value wanted.


def test_errors_name_the_value(generator, device):
    x, gate, weight = tensors(generator, 3, 8, torch.float32)
    empty = torch.zeros(3, 0, device=device)
    cases = [
        (ShapeError, r"gate has shape \(2, 8\), want \(3, 8\) as x has", (x, gate[:2], weight), {}),
        (ShapeError, r"gate has shape \(3, 1\), want \(3, 8\) as x has", (x, gate[:, :1], weight), {}),
        (ShapeError, r"weight has shape \(7,\), want \(8,\)", (x, gate, weight[:7]), {}),
        (ShapeError, r"weight has shape \(4,\), want \(8,\)", (x, gate, weight[:4]), {"group_size": 4}),
        (ShapeError, r"want a hidden_size that group_size 3 divides", (x, gate, weight), {"group_size": 3}),
        (ShapeError, r"want a hidden_size that group_size 16 divides", (x, gate, weight), {"group_size": 16}),
        (ArgumentError, r"group_size is 0, want None or at least 1", (x, gate, weight), {"group_size": 0}),
        (ArgumentError, r"group_size is -4, want None or at least 1", (x, gate, weight), {"group_size": -4}),
        (DtypeError, r"x is torch.float64, want one of torch.float32", (x.double(), gate, weight), {}),
        (DtypeError, r"gate is torch.float16, want torch.float32", (x, gate.half(), weight), {}),
        (DtypeError, r"weight is torch.bfloat16, want torch.float32", (x, gate, weight.bfloat16()), {}),
        (DeviceError, "gate is on meta, want", (x, gate.to("meta"), weight), {}),
        (DeviceError, "weight is on meta, want", (x, gate, weight.to("meta")), {}),
        (ShapeError, r"x has shape \(3, 0\), want \[..., hidden_size\]", (empty, empty), {}),
        (ShapeError, r"x has shape \(\), want \[..., hidden_size\]", (x[0, 0], gate[0, 0]), {}),
        *(
            (ArgumentError, f"eps is {eps}, want a finite number that is not negative", (x, gate, weight, eps), {})
            for eps in (-1e-6, -INF, NAN, INF)
        ),
    ]
    for error, match, arguments, options in cases:
        with pytest.raises(error, match=match):
            rms_norm_gated(*arguments, norm_before_gate=True, **options)


@pytest.mark.parametrize("which", range(3))
def test_autograd_is_refused(which, generator):
    arguments = tensors(generator, 3, 8, torch.float32)
    arguments[which].requires_grad_()
    with pytest.raises(UnsupportedError, match="rms_norm_gated has no backward pass"):
        rms_norm_gated(*arguments, norm_before_gate=False)


# The dispatcher and the compiler.


@pytest.mark.parametrize("norm_before_gate", ORDERS)
@pytest.mark.parametrize("group_size", [None, 8])
def test_registered_op(group_size, norm_before_gate, generator):
    x, gate = (randn(generator, 4, 3, 24, dtype=torch.float16) for _ in range(2))
    for view in (x, x.transpose(0, 1)):
        other = gate.view(view.shape)
        for weight in (randn(generator, 24, dtype=torch.float16), None):
            torch.library.opcheck(
                torch.ops.batchproof.rms_norm_gated.default, (view, other, weight, 1e-6, norm_before_gate, group_size)
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(dtype, generator):
    weight = randn(generator, 64, dtype=dtype)

    def block(projection):
        x, gate = projection.chunk(2, -1)
        return rms_norm_gated(x, gate * 2, weight, norm_before_gate=False, group_size=16)

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for rows in (1, 5):
        projection = randn(generator, rows, 128, dtype=dtype)
        assert first_mismatch(compiled(projection), block(projection)) is None


# The Triton kernel, in the interpreter: every launch variant.


def variants(width, dtype):
    return list(dict.fromkeys(variant for _, variant in row_plan(width, dtype, "gated").variants))


def launch(x, gate, weight, norm_before_gate, group_size=None, variant=None):
    out = torch.full_like(x, NAN, memory_format=torch.contiguous_format)
    module.launch(x, gate, weight, out, 1e-6, norm_before_gate, group_size, variant)
    return out


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("norm_before_gate", ORDERS)
@pytest.mark.parametrize(
    ("width", "group_size"),
    [
        (1, None), (7, None), (64, None), (100, None), (512, None), (1000, None), (1024, None), (2048, None),
        (5120, None), (8192, None), (16384, None), (20000, None), (96, 24), (300, 100), (2048, 512), (8192, 2048),
    ],
)  # fmt: skip
def test_kernel_in_the_interpreter(width, group_size, norm_before_gate, dtype, generator):
    rows = 19 if width <= 512 else 3  # more than a program takes
    for weighted in (True, False):
        x, gate, weight = tensors(generator, rows, width, dtype, weighted)
        for variant in variants(group_size or width, dtype):
            out = launch(x, gate, weight, norm_before_gate, group_size, variant)
            assert_accurate(out, x, gate, weight, norm_before_gate=norm_before_gate, group_size=group_size)
            alone = launch(x[2:3], gate[2:3], weight, norm_before_gate, group_size, variant)
            assert first_mismatch(alone, out[2:3]) is None


@interpreted
@pytest.mark.parametrize("norm_before_gate", ORDERS)
@pytest.mark.parametrize(("width", "group_size"), [(40, None), (96, 24), (300, 100), (2048, None), (18000, 9000)])
def test_kernel_over_columns_of_a_projection(width, group_size, norm_before_gate, generator):
    x, gate, weight = tensors(generator, 6, width, torch.float32)
    for variant in variants(group_size or width, torch.float32):
        expected = launch(x, gate, weight, norm_before_gate, group_size, variant)
        for extra in (0, 3, 8):
            views = projected(x, gate, extra)
            assert first_mismatch(launch(*views, weight, norm_before_gate, group_size, variant), expected) is None
            views = projected(x.view(2, 3, width), gate.view(2, 3, width), extra)
            out = launch(*views, weight, norm_before_gate, group_size, variant)
            assert first_mismatch(out.view(6, width), expected) is None


# The kernel on a GPU: one tree.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("norm_before_gate", ORDERS)
@pytest.mark.parametrize("group_size", [None, 8])  # of all columns, and an eighth of them
@pytest.mark.parametrize("width", WIDTHS[2:])
def test_every_variant_has_the_bits_of_every_other(width, group_size, norm_before_gate, dtype, generator):
    """Powers of two make every order of a sum round elsewhere."""
    if group_size is not None:
        if width % group_size:
            pytest.skip(f"{group_size} groups do not divide {width}")
        group_size = width // group_size
    powers = torch.randint(-12, 10, (1200, width), generator=generator, device=generator.device)
    x, gate, weight = tensors(generator, 1200, width, torch.float32)
    x, gate, weight = ((x * 2.0**powers).to(dtype), gate.to(dtype), weight.to(dtype))
    expected = launch(x, gate, weight, norm_before_gate, group_size)
    columns = projected(x, gate, 8)
    for variant in variants(group_size or width, dtype):
        for views in ((x, gate), columns):
            out = launch(*views, weight, norm_before_gate, group_size, variant)
            assert first_mismatch(out, expected) is None, variant
        for rows in (slice(0, 1), slice(599, 600), slice(1000, 1200)):
            few = launch(x[rows], gate[rows], weight, norm_before_gate, group_size, variant)
            assert first_mismatch(few, expected[rows]) is None, (variant, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("norm_before_gate", ORDERS)
def test_layout_compiles_no_other_binary(norm_before_gate, dtype, generator):
    """One row, odd strides and unaligned pointers must not be specialised on."""
    for width in (100, 4096):
        x, gate, weight = tensors(generator, 64, width, dtype)
        rms_norm_gated(x, gate, weight, norm_before_gate=norm_before_gate)
        before = len(module._rms_norm_gated_kernel.device_caches[torch.cuda.current_device()][0])
        for a, b in ((x[:1], gate[:1]), (x[::2], gate[::2]), projected(x, gate), projected(x, gate, 3)):
            rms_norm_gated(a, b, weight, 1e-5, norm_before_gate=norm_before_gate)
        assert len(module._rms_norm_gated_kernel.device_caches[torch.cuda.current_device()][0]) == before
