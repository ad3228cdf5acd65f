"""rms_norm, add_rms_norm, fused_add_rms_norm: roundings, layouts, errors, and bits that depend on a row alone."""

import pytest
import torch

from batchproof.errors import ArgumentError, DeviceError, DtypeError, LayoutError, ShapeError
from batchproof.numerics import TOLERANCES, as_bits, first_mismatch, ulp_distance
from batchproof.ops import rms_norm as module
from batchproof.ops._library import FLOAT_DTYPES
from batchproof.ops._row_launch import row_plan
from batchproof.ops.rms_norm import (
    add_rms_norm,
    add_rms_norm_reference,
    fused_add_rms_norm,
    rms_norm,
    rms_norm_reference,
)

# 1-7: less than a vector; 100, 1000, 20000: no power of two; 16384: the widest in registers; beyond: read twice
WIDTHS = [1, 2, 3, 7, 64, 100, 128, 512, 1000, 4096, 5120, 16384, 20000, 65536]
INF, NAN = float("inf"), float("nan")
FORMS = [
    pytest.param(False, True, id="llama"),
    pytest.param(True, True, id="gemma"),
    pytest.param(False, False, id="unweighted"),
]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself runs in the other tests")


def randn(generator, *shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, generator=generator, device=generator.device) * scale).to(dtype)


def weight_for(generator, width, dtype, weighted=True):
    return randn(generator, width, dtype=dtype) if weighted else None


def assert_accurate(out, expected, weighted=True):
    most = TOLERANCES["rms_norm" if weighted else "rms_norm_unweighted"].ulp
    distance = ulp_distance(out, expected)
    assert distance.numel() == 0 or int(distance.max()) <= most, (
        f"{int((distance > most).sum())} of {out.numel()} off by up to {int(distance.max())} ulp"
    )


def poisoned_like(tensors, step=1, offset=0, dtype=None):
    """A flat NaN buffer of ``step`` times the room, from ``offset`` on."""
    return torch.full((tensors.numel() * step + offset,), NAN, dtype=dtype or tensors.dtype, device=tensors.device)


# The unit test of the change this project starts from (vLLM PR 40413).


@pytest.mark.parametrize("hidden_size", [512, 4096])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_row_alone_and_in_a_batch_of_four(hidden_size, dtype, generator):
    x, residual = (randn(generator, 4, hidden_size, dtype=dtype) for _ in range(2))
    weight = randn(generator, hidden_size, dtype=dtype)
    out, total = fused_add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
    for row in range(4):
        alone, alone_total = fused_add_rms_norm(x[row : row + 1].clone(), residual[row : row + 1].clone(), weight, 1e-6)
        assert first_mismatch(alone[0], out[row]) is None
        assert first_mismatch(alone_total[0], total[row]) is None
    assert first_mismatch(total, x + residual) is None
    unfused = (x + residual).float()
    unfused = (unfused * torch.rsqrt(unfused.square().mean(-1, keepdim=True) + 1e-6)).to(dtype) * weight
    torch.testing.assert_close(out, unfused, rtol=2.0**-7, atol=0.0)


# Accuracy.


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("gemma", "weighted"), FORMS)
@pytest.mark.parametrize("width", WIDTHS)
def test_accuracy(width, gemma, weighted, dtype, generator):
    rows = 2 if width > 10000 else 5
    x, residual = (randn(generator, rows, width, dtype=dtype) for _ in range(2))
    weight = weight_for(generator, width, dtype, weighted)
    assert_accurate(rms_norm(x, weight, gemma=gemma), rms_norm_reference(x, weight, gemma=gemma), weighted)
    out, total = add_rms_norm(x, residual, weight, gemma=gemma)
    expected, expected_total = add_rms_norm_reference(x, residual, weight, gemma=gemma)
    assert first_mismatch(total, expected_total) is None
    assert_accurate(out, expected, weighted)


def adversarial(name, dtype, generator):
    """(x, residual), each [3, 512]."""
    info = torch.finfo(dtype)
    x, residual = (randn(generator, 3, 512) for _ in range(2))
    if name == "residual cancels":
        residual = -x * (1.0 + info.eps * torch.randint(-2, 3, x.shape, generator=generator, device=x.device))
    elif name == "wide exponents":
        bits = 12 if dtype == torch.float16 else 60
        x = x * 2.0 ** torch.randint(-bits, bits, x.shape, generator=generator, device=x.device)
    elif name == "one dominates":
        x = x * 1e-3
        x[:, 7] = info.max / 4 if dtype == torch.float16 else 1e15
    elif name == "subnormal":
        x, residual = (t.sign() * info.smallest_normal / 4 for t in (x, residual))
    elif name == "zeros":
        x, residual = torch.zeros_like(x), torch.zeros_like(x)
    elif name == "huge":
        x, residual = x.sign() * (info.max / 4), residual.sign() * (info.max / 4)
    return x.to(dtype), residual.to(dtype)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("gemma", "weighted"), FORMS)
@pytest.mark.parametrize("name", ["residual cancels", "wide exponents", "one dominates", "subnormal", "zeros", "huge"])
def test_accuracy_of_adversarial_rows(name, gemma, weighted, dtype, generator):
    x, residual = adversarial(name, dtype, generator)
    weight = weight_for(generator, 512, dtype, weighted)
    out, total = add_rms_norm(x, residual, weight, gemma=gemma)
    expected, expected_total = add_rms_norm_reference(x, residual, weight, gemma=gemma)
    assert first_mismatch(total, expected_total) is None
    if name == "huge" and dtype == torch.bfloat16 and x.is_cuda:
        assert not out.any(), "fp32 squares overflow, as documented, and the row is zero"
        return
    assert_accurate(out, expected, weighted)
    assert_accurate(rms_norm(x, weight, gemma=gemma), rms_norm_reference(x, weight, gemma=gemma), weighted)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1.0, 1e30])
def test_accuracy_for_any_eps(eps, dtype, generator):
    x = randn(generator, 4, 300, dtype=dtype)
    assert_accurate(rms_norm(x, eps=eps), rms_norm_reference(x, eps=eps), weighted=False)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_small_row_without_eps_is_normalised(dtype, generator):
    """Squares of small numbers must not underflow: nothing else holds the divisor up."""
    small = {torch.float16: 2.0**-20, torch.bfloat16: 2.0**-50, torch.float32: 2.0**-115}[dtype]
    x = randn(generator, 2, 64, scale=small, dtype=dtype)
    assert_accurate(rms_norm(x, eps=0.0), rms_norm_reference(x, eps=0.0), weighted=False)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_rows_that_are_not_finite_are_alone_in_it(dtype, generator):
    x, residual = (randn(generator, 6, 100, dtype=dtype) for _ in range(2))
    weight = randn(generator, 100, dtype=dtype)
    clean = add_rms_norm(x, residual, weight)
    x[1, 3], x[3, 99], residual[4] = NAN, INF, torch.finfo(dtype).max
    residual[5] = -INF
    out, total = add_rms_norm(x, residual, weight)
    expected, expected_total = add_rms_norm_reference(x, residual, weight)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(total.isnan(), expected_total.isnan())
    for row in (0, 2):
        assert first_mismatch(out[row], clean[0][row]) is None
        assert first_mismatch(total[row], clean[1][row]) is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("gemma", "weighted"), FORMS)
@pytest.mark.parametrize("width", [7, 64, 100])
def test_a_nan_row_has_one_result(width, gemma, weighted, dtype, generator):
    """The payload of a NaN is part of the bits: vector code and tail code may make different ones."""
    x, residual = (randn(generator, 1, width, dtype=dtype) for _ in range(2))
    x[0, ::2], residual[0, 1] = NAN, -NAN
    weight = weight_for(generator, width, dtype, weighted)
    alone = add_rms_norm(x, residual, weight, gemma=gemma)
    for rows in (2, 3, 33, 257, 1000):
        batch = add_rms_norm(x.repeat(rows, 1), residual.repeat(rows, 1), weight, gemma=gemma)
        for name, one, many in zip(("out", "sum"), alone, batch, strict=True):
            assert first_mismatch(many, one.expand_as(many)) is None, f"{name} of {rows} rows"
            kinds = as_bits(many)[many.isnan()].unique()
            assert many.is_cuda or len(kinds) == 1, f"{name} of {rows} rows has {len(kinds)} kinds of NaN"


# Layouts.


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 33])
def test_qk_norm_over_views_of_a_packed_qkv(head_dim, dtype, generator):
    tokens, heads, kv_heads = 9, 6, 2
    qkv = randn(generator, tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    weight = randn(generator, head_dim, dtype=dtype)
    q, k, _ = (
        t.unflatten(1, (-1, head_dim)) for t in qkv.split([n * head_dim for n in (heads, kv_heads, kv_heads)], 1)
    )
    for view in (q, k, q.transpose(0, 1)):
        out = rms_norm(view, weight)
        assert out.is_contiguous()
        assert first_mismatch(out, rms_norm(view.contiguous(), weight)) is None
        assert_accurate(out, rms_norm_reference(view, weight))


def layouts(x):
    """Views with the values of ``x`` [rows, width]: shifted, strided rows, strided columns, transposed."""
    rows, width = x.shape
    yield "unaligned", poisoned_like(x, offset=1)[1:].view_as(x).copy_(x)
    yield "strided rows", poisoned_like(x, 2).view(rows, 2 * width)[:, :width].copy_(x)
    odd = poisoned_like(x, offset=3 * rows).view(rows, width + 3)
    yield "odd pitch", odd[:, 2 : width + 2].copy_(x)
    yield "strided columns", poisoned_like(x, 2).view(rows, 2 * width)[:, ::2].copy_(x)
    yield "transposed", x.t().contiguous().t()
    yield "every other row", poisoned_like(x, 2).view(2 * rows, width)[::2].copy_(x)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 100, 4096])
def test_layout_leaves_the_bits_alone(width, dtype, generator):
    x, residual = (randn(generator, 5, width, dtype=dtype) for _ in range(2))
    weight = randn(generator, width, dtype=dtype)
    expected, (fused, total) = rms_norm(x, weight), add_rms_norm(x, residual, weight)
    loose_weight = weight.repeat_interleave(2)[::2]
    for (name, same), (_, same_residual) in zip(layouts(x), layouts(residual), strict=True):
        for out, wanted in (
            (rms_norm(same, weight), expected),
            (rms_norm(same, loose_weight), expected),
            (rms_norm(same[3:4], weight), expected[3:4]),
            (rms_norm(same[3], weight), expected[3]),
            *zip(add_rms_norm(same, same_residual, weight), (fused, total), strict=True),
            *zip(add_rms_norm(x, same_residual, weight), (fused, total), strict=True),
        ):
            assert out.is_contiguous()
            assert first_mismatch(out, wanted) is None, name
    expanded = x[:1].expand(4, -1)
    assert first_mismatch(rms_norm(expanded, weight), expected[:1].expand(4, -1)) is None
    assert first_mismatch(rms_norm(x.view(5, 1, 1, width), weight).view_as(x), expected) is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("width", [7, 64, 100, 4096])
def test_in_place_writes_the_view_and_nothing_beside_it(width, dtype, generator):
    x, residual = (randn(generator, 5, width, dtype=dtype) for _ in range(2))
    weight = randn(generator, width, dtype=dtype)
    expected = add_rms_norm(x, residual, weight)
    for (name, mine), (_, sums) in zip(layouts(x), layouts(residual), strict=True):
        views = [mine, sums]
        returned = fused_add_rms_norm(mine, sums, weight)
        assert returned[0] is mine
        assert returned[1] is sums
        for view, wanted in zip(views, expected, strict=True):
            assert first_mismatch(view, wanted) is None, name
            whole = torch.empty(0, dtype=dtype, device=view.device).set_(view.untyped_storage())
            assert int((~whole.isnan()).sum()) == view.numel(), f"{name}: wrote beside the view"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("width", [8, 100])
def test_interleaved_halves_are_not_an_overlap(width, dtype, generator):
    both = randn(generator, 5, 2 * width, dtype=dtype)
    weight = randn(generator, width, dtype=dtype)
    expected = add_rms_norm(both[:, :width], both[:, width:], weight)
    for flip in (False, True):
        wide = both.clone() if not flip else both.roll(width, 1)
        halves = (wide[:, width:], wide[:, :width]) if flip else (wide[:, :width], wide[:, width:])
        for out, wanted in zip(fused_add_rms_norm(*halves, weight), expected, strict=True):
            assert first_mismatch(out, wanted) is None


def test_rows_of_one_tensor_may_be_x_and_residual(generator):
    both = randn(generator, 6, 64)
    expected = add_rms_norm(both[:3], both[3:], None)
    for out, wanted in zip(fused_add_rms_norm(both[:3], both[3:], None), expected, strict=True):
        assert first_mismatch(out, wanted) is None


def test_the_functional_form_takes_one_tensor_twice(generator):
    x = randn(generator, 3, 64)
    kept = x.clone()
    out, total = add_rms_norm(x, x, None)
    assert first_mismatch(total, kept + kept) is None
    assert first_mismatch(out, rms_norm(kept + kept)) is None
    assert first_mismatch(x, kept) is None


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (0, 4, 7)])
def test_an_empty_batch(shape, device):
    x, residual = torch.empty(shape, device=device), torch.empty(shape, device=device)
    weight = torch.ones(shape[-1], device=device)
    assert rms_norm(x, weight).shape == shape
    assert [t.shape for t in add_rms_norm(x, residual, weight)] == [shape, shape]
    assert [t.shape for t in fused_add_rms_norm(x, residual, weight)] == [shape, shape]


# The three ops are one.


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("gemma", "weighted"), FORMS)
@pytest.mark.parametrize("width", [1, 100, 4096, 20000])
def test_fused_functional_and_two_steps_have_the_same_bits(width, gemma, weighted, dtype, generator):
    x, residual = (randn(generator, 3, width, dtype=dtype) for _ in range(2))
    weight = weight_for(generator, width, dtype, weighted)
    out, total = add_rms_norm(x, residual, weight, gemma=gemma)
    assert first_mismatch(total, x + residual) is None
    assert first_mismatch(rms_norm(x + residual, weight, gemma=gemma), out) is None
    in_place, in_place_total = fused_add_rms_norm(x.clone(), residual.clone(), weight, gemma=gemma)
    assert first_mismatch(in_place, out) is None
    assert first_mismatch(in_place_total, total) is None


# Errors: the value seen, the value wanted, nothing written.


def refused(error, match, call, *tensors):
    """``call`` raises ``error`` and writes none of ``tensors``."""
    before = [t.clone() for t in tensors]
    with pytest.raises(error, match=match):
        call()
    for t, kept in zip(tensors, before, strict=True):
        assert first_mismatch(t, kept) is None


def test_errors_name_the_value_and_write_nothing(generator, device):
    x, residual, weight = randn(generator, 3, 8), randn(generator, 3, 8), randn(generator, 8)
    cases = [
        (ShapeError, r"weight has shape \(7,\), want \(8,\)", (x, residual, weight[:7])),
        (ShapeError, r"weight has shape \(1, 8\), want \(8,\)", (x, residual, weight[None])),
        (ShapeError, r"residual has shape \(2, 8\), want \(3, 8\)", (x, residual[:2], weight)),
        (ShapeError, r"residual has shape \(1, 8\), want \(3, 8\)", (x, residual[:1], weight)),
        (DtypeError, r"x is torch.float64, want one of torch.float32", (x.double(), residual, weight)),
        (DtypeError, r"x is torch.int32, want one of torch.float32", (x.int(), residual, weight)),
        (DtypeError, r"residual is torch.float16, want torch.float32", (x, residual.half(), weight)),
        (DtypeError, r"weight is torch.bfloat16, want torch.float32", (x, residual, weight.bfloat16())),
        (DeviceError, "residual is on meta, want", (x, residual.to("meta"), weight)),
        (DeviceError, "weight is on meta, want", (x, residual, weight.to("meta"))),
    ]
    for error, match, arguments in cases:
        for op in (add_rms_norm, fused_add_rms_norm):
            refused(error, match, lambda op=op, arguments=arguments: op(*arguments), x, residual)
    for shape in ((), (3, 0)):
        with pytest.raises(ShapeError, match=r"want \[..., hidden_size\] with hidden_size at least 1"):
            rms_norm(torch.zeros(shape, device=device))
    for error, match, arguments in cases:
        if "residual" not in match:
            with pytest.raises(error, match=match):
                rms_norm(arguments[0], arguments[2])


@pytest.mark.parametrize("eps", [-1e-6, -INF, NAN, INF])
def test_eps_must_be_finite_and_not_negative(eps, generator):
    x, residual, weight = randn(generator, 3, 8), randn(generator, 3, 8), randn(generator, 8)
    match = f"eps is {eps}, want a finite number that is not negative"
    refused(ArgumentError, match, lambda: rms_norm(x, weight, eps), x)
    refused(ArgumentError, match, lambda: add_rms_norm(x, residual, weight, eps), x, residual)
    refused(ArgumentError, match, lambda: fused_add_rms_norm(x, residual, weight, eps), x, residual)


def overlapping(base):
    """(x, residual, weight) of ``base`` [128], x and residual [4, 8] fp32, one of which would be written twice."""
    flat = base[:32].view(4, 8)
    apart = base.new_ones(4, 8)
    yield "the same tensor", (flat, flat, None)
    yield "a view of it", (flat, base[:32].view(8, 4).view(4, 8), None)
    yield "shifted by one element", (flat, base[1:33].view(4, 8), None)
    yield "shifted by half a row", (flat, base[4:36].view(4, 8), None)
    yield "shifted by a row", (flat, base[8:40].view(4, 8), None)
    yield "columns that meet", (base.view(8, 16)[:4, :8], base.view(8, 16)[:4, 7:15], None)
    yield "the weight in x", (flat, apart, base[:8])
    yield "the weight in the residual", (apart, flat, base[28:36])
    yield "stride 0 in x", (base[:8].expand(4, 8), apart, None)
    yield "stride 0 in the residual", (apart, base[:8].expand(4, 8), None)
    yield "rows of x that overlap", (base.as_strided((4, 8), (4, 1)), apart, None)
    yield "rows of the residual that overlap", (apart, base.as_strided((4, 8), (4, 1)), None)


@pytest.mark.parametrize("case", range(12))
def test_overlap_is_refused_and_nothing_written(case, generator):
    base = randn(generator, 128)
    name, (x, residual, weight) = list(overlapping(base))[case]
    refused(LayoutError, "overlap|share memory", lambda: fused_add_rms_norm(x, residual, weight), base)
    assert name


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory from elsewhere is CPU memory")
def test_overlap_is_seen_between_storages_over_the_same_memory():
    memory = bytearray(4 * 64)
    x = torch.frombuffer(memory, dtype=torch.float32, count=32).view(4, 8)
    residual = torch.frombuffer(memory, dtype=torch.float32, count=32, offset=64).view(4, 8)
    refused(LayoutError, "overlap", lambda: fused_add_rms_norm(x, residual, None), x, residual)


# The dispatcher and the compiler.


@pytest.mark.parametrize("weighted", [True, False])
def test_registered_ops(weighted, generator):
    x, residual = (randn(generator, 4, 3, 24, dtype=torch.float16) for _ in range(2))
    weight = weight_for(generator, 24, torch.float16, weighted)
    ops = torch.ops.batchproof
    for view, other in ((x, residual), (x.transpose(0, 1), residual.transpose(0, 1))):
        torch.library.opcheck(ops.rms_norm.default, (view, weight, 1e-6, False))
        torch.library.opcheck(ops.add_rms_norm.default, (view, other, weight, 1e-6, True))
        torch.library.opcheck(ops.fused_add_rms_norm.default, (view.clone(), other.clone(), weight, 1e-6, False))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(backend, dtype, generator):
    weight = randn(generator, 64, dtype=dtype)

    def block(x, residual):
        normed, residual = add_rms_norm(x, residual, weight)
        normed, residual = fused_add_rms_norm(normed * 2, residual.clone(), weight, gemma=True)
        return rms_norm(normed, weight), residual

    compiled = torch.compile(block, backend=backend, fullgraph=True)
    for rows in (1, 5):
        x, residual = (randn(generator, rows, 64, dtype=dtype) for _ in range(2))
        for mine, theirs in zip(compiled(x, residual), block(x, residual), strict=True):
            assert first_mismatch(mine, theirs) is None


# The Triton kernel, in the interpreter: every launch variant.


def launch(x, residual, weight, eps=1e-6, gemma=False, variant=None):
    out = torch.full_like(x, NAN, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.full_like(out, NAN)
    module.launch(x, residual, weight, out, total, eps, gemma, variant)
    return out, total


def variants(width, dtype):
    return [variant for _, variant in row_plan(width, dtype).variants]


KERNEL_WIDTHS = [1, 7, 64, 100, 512, 1000, 1024, 2048, 5120, 8192, 16384, 20000]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("gemma", "weighted"), FORMS)
@pytest.mark.parametrize("width", KERNEL_WIDTHS)
def test_kernel_in_the_interpreter(width, gemma, weighted, dtype, generator):
    rows = 19 if width <= 512 else 3  # more than a program takes
    x, residual = (randn(generator, rows, width, dtype=dtype) for _ in range(2))
    weight = weight_for(generator, width, dtype, weighted)
    expected, expected_total = add_rms_norm_reference(x, residual, weight, gemma=gemma)
    for variant in variants(width, dtype):
        out, total = launch(x, residual, weight, gemma=gemma, variant=variant)
        assert first_mismatch(total, expected_total) is None
        assert_accurate(out, expected, weighted)
        plain, _ = launch(total, None, weight, gemma=gemma, variant=variant)
        assert first_mismatch(plain, out) is None
        alone, alone_total = launch(x[2:3], residual[2:3], weight, gemma=gemma, variant=variant)
        assert first_mismatch(alone, out[2:3]) is None
        assert first_mismatch(alone_total, total[2:3]) is None


@interpreted
@pytest.mark.parametrize("width", [40, 2048, 18000])
def test_kernel_in_place_into_awkward_views(width, generator):
    x, residual, weight = randn(generator, 5, width), randn(generator, 5, width), randn(generator, width)
    expected, expected_total = launch(x, residual, weight)
    for variant in variants(width, torch.float32):
        for (name, mine), (_, sums) in zip(layouts(x), layouts(residual), strict=True):
            module.launch(mine, sums, weight, mine, sums, 1e-6, False, variant)
            for view, wanted in ((mine, expected), (sums, expected_total)):
                assert first_mismatch(view, wanted) is None, name
                whole = torch.empty(0).set_(view.untyped_storage())
                assert int((~whole.isnan()).sum()) == view.numel(), f"{name}: wrote beside the view"


@interpreted
def test_kernel_over_heads_of_a_packed_qkv(generator):
    qkv, weight = randn(generator, 4, 5 * 24), randn(generator, 24)
    for view in (qkv.view(4, 5, 24)[:, 1:4], qkv.view(2, 2, 5, 24)[:, :, :3], qkv.view(4, 5, 24).transpose(0, 1)):
        out, _ = launch(view, None, weight)
        assert_accurate(out, rms_norm_reference(view, weight))


# Launch variants: one tree. tests/gpu compares their bits; here the layouts they compile to.


def test_the_plan_is_a_function_of_the_weight_side():
    for dtype in FLOAT_DTYPES:
        for width in (*WIDTHS, 500_000):
            plan = row_plan(width, dtype)
            assert [most for most, _ in plan.variants] == sorted({most for most, _ in plan.variants})
            for rows in (1, 255, 256, 257, 769, 100_000, 2**31 - 1):
                chunk, chunks, chunks_2 = plan.shape(plan.variant(rows))
                assert chunk * (chunks - 1) < width <= chunk * chunks
                assert chunks <= chunks_2 < 2 * chunks
    with pytest.raises(ShapeError, match="2147483648 rows in one call, want at most 2147483647"):
        row_plan(64, torch.float16).variant(2**31)
    wide = row_plan(2_000_000, torch.float16)
    with pytest.raises(ShapeError, match="hidden_size is 2000000, want at most 1048576"):
        wide.shape(wide.variant(1))
