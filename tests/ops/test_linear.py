"""linear, mm, addmm, bmm, baddbmm: exactness, torch's semantics, and bits that depend on a row and a column alone."""

import threading
from fractions import Fraction

import pytest
import torch

from batchproof.errors import ArgumentError, DeviceError, DtypeError, ShapeError, UnsupportedError
from batchproof.numerics import TOLERANCES, first_mismatch, ulp_distance
from batchproof.ops import _packed_weights as packed
from batchproof.ops import linear as module
from batchproof.ops._library import FLOAT_DTYPES
from batchproof.ops.linear import add_pieces, addmm, baddbmm, bmm, linear, linear_reference, mm

BATCHES = [1, 2, 3, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 129, 257]
# N, K: one, odd, past a tile, past a chunk of the exact product
SHAPES = [(1, 1), (5, 1), (1, 7), (33, 100), (65, 1025), (7, 3000), (128, 256)]
INF, NAN = float("inf"), float("nan")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself runs in the other tests")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's exactness and its packed weights")


def randn(generator, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def assert_accurate(a, b, out, expected):
    """Within the table's ulps, or its atol in units of sum |a||b|."""
    tolerance = TOLERANCES["linear"]
    near = (out.double() - expected.double()).abs() <= tolerance.atol * (a.double().abs() @ b.double().abs())
    bad = ~(near | (ulp_distance(out, expected) <= tolerance.ulp))
    assert not bad.any(), f"{int(bad.sum())} off, first {out[bad][0].item()} against {expected[bad][0].item()}"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_accuracy(n, k, bias, dtype, generator):
    x, weight = randn(generator, 5, k, dtype=dtype), randn(generator, n, k, dtype=dtype)
    b = randn(generator, n, dtype=dtype) if bias else None
    assert_accurate(x, weight.t(), linear(x, weight, b), linear_reference(x, weight, b))


@on_cpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("k", [1, 7, 100, 1024, 1500])
def test_moderate_inputs_are_exact_and_rounded_once(k, dtype, generator):
    """Values of one size with 8 significant bits lose nothing: the result is the real one, correctly rounded."""
    x, weight = (randn(generator, n, k).clamp(-4, 4).mul(64).round().div(64).to(dtype) for n in (3, 4))
    bias = randn(generator, 4, dtype=dtype)
    out = linear(x, weight, bias)
    for i in range(3):
        for j in range(4):
            terms = zip(x[i].tolist(), weight[j].tolist(), strict=True)
            exact = sum((Fraction(a) * Fraction(b) for a, b in terms), Fraction(bias[j].item()))
            assert Fraction(float(exact)) == exact, "the case is not exact in float64"
            assert first_mismatch(out[i, j], torch.tensor(float(exact), dtype=torch.float64).to(dtype)) is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_accuracy_of_adversarial_rows(dtype, generator):
    x, weight = randn(generator, 5, 512), randn(generator, 40, 512, dtype=dtype)
    x[1] *= 2.0 ** torch.randint(-12, 10, (512,), generator=generator, device=x.device)
    x[2, 256:] = -x[2, :256]
    x[3] = torch.finfo(dtype).smallest_normal / 4
    x[4] = 0.0
    x = x.to(dtype)
    weight[:, 256:] = weight[:, :256]
    assert_accurate(x, weight.t(), linear(x, weight), linear_reference(x, weight))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("n", "k"), [(33, 100), (7, 3000)])
def test_a_row_has_one_result(n, k, dtype, generator):
    probe, weight, bias = (randn(generator, *s, dtype=dtype) for s in ((1, k), (n, k), (n,)))
    alone = linear(probe, weight, bias)
    for rows in BATCHES:
        for place in sorted({0, rows // 2, rows - 1}):
            x = randn(generator, rows, k, dtype=dtype)
            x[0::4], x[1::4, -1], x[2::4] = NAN, INF, torch.finfo(dtype).max
            x[place] = probe
            assert first_mismatch(linear(x, weight, bias)[place], alone[0]) is None, f"row {place} of {rows}"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_column_has_one_result(dtype, generator):
    x, weight = randn(generator, 9, 100, dtype=dtype), randn(generator, 65, 100, dtype=dtype)
    whole = linear(x, weight)
    for columns in (1, 2, 7, 33, 64):
        assert first_mismatch(linear(x, weight[-columns:]), whole[:, -columns:]) is None
    hostile = weight.clone()
    hostile[::2], hostile[1], hostile[3] = NAN, INF, torch.finfo(dtype).max
    assert first_mismatch(linear(x, hostile)[:, 5::2], whole[:, 5::2]) is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("k", [7, 100])
def test_what_is_not_finite_has_one_result(k, dtype, generator):
    x, weight, bias = (randn(generator, *s, dtype=dtype) for s in ((4, k), (5, k), (5,)))
    x[0, 0], x[1, 1], x[2, 2], weight[1, 3], bias[2] = NAN, INF, -NAN, INF, -NAN
    expected = linear_reference(x, weight, bias)
    out = linear(x, weight, bias)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    for rows in (1, 3, 33, 129):
        many = linear(x[rows % 4 :][:1].expand(rows, -1), weight, bias)
        assert first_mismatch(many, out[rows % 4 :][:1].expand(rows, -1)) is None, f"{rows} rows"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("k", [64, 101])
def test_layout_leaves_the_bits_alone(k, dtype, generator):
    x, weight, bias = (randn(generator, *s, dtype=dtype) for s in ((6, k), (10, k), (10,)))
    expected = linear(x, weight, bias)

    def views(t):
        flat = torch.full((2 * t.numel() + 1,), NAN, dtype=t.dtype, device=t.device)
        yield flat.clone()[1 : t.numel() + 1].view_as(t).copy_(t)
        yield t.t().contiguous().t()
        yield flat[:-1].view(t.shape[0], 2 * t.shape[1])[:, ::2].copy_(t)

    loose = bias.repeat_interleave(3)[::3]
    for same_x in (x, *views(x)):
        for same_weight in (weight, *views(weight)):
            assert first_mismatch(linear(same_x, same_weight, loose), expected) is None
            assert first_mismatch(linear(same_x[2:3], same_weight, loose), expected[2:3]) is None
    cube = x.view(2, 3, k)
    assert first_mismatch(linear(cube, weight, bias).view(6, 10), expected) is None
    assert first_mismatch(linear(cube.transpose(0, 1), weight, bias), expected.view(2, 3, 10).transpose(0, 1)) is None
    assert first_mismatch(linear(x[0], weight, bias), expected[0]) is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_the_forms_of_a_product_have_the_same_bits(dtype, generator):
    a, b, bias = (randn(generator, *s, dtype=dtype) for s in ((6, 100), (100, 9), (9,)))
    expected = linear(a, b.t())
    assert first_mismatch(mm(a, b), expected) is None
    assert first_mismatch(bmm(a.expand(3, -1, -1), b.expand(3, -1, -1)), expected.expand(3, -1, -1)) is None
    assert first_mismatch(addmm(bias, a, b), linear(a, b.t(), bias)) is None
    assert first_mismatch(baddbmm(bias, a[None], b[None])[0], linear(a, b.t(), bias)) is None
    assert first_mismatch(addmm(bias, a, b, beta=0.0), expected) is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(9,), (1,), (1, 1), (6, 1), (1, 9), (6, 9), ()])
def test_bias_broadcasts_and_is_scaled_as_in_torch(shape, dtype, generator):
    a, b, bias = (randn(generator, *s, dtype=dtype) for s in ((6, 100), (100, 9), shape))
    for beta, alpha in ((1.0, 1.0), (0.5, 2.0), (-1.0, 0.0), (0.0, 3.0)):
        truth = alpha * (a.double() @ b.double()) + beta * bias.double()
        scale = abs(alpha) * (a.double().abs() @ b.double().abs()) + abs(beta) * bias.double().abs()
        for out in (
            addmm(bias, a, b, beta=beta, alpha=alpha),
            baddbmm(bias, a[None], b[None], beta=beta, alpha=alpha)[0],
        ):
            near = (out.double() - truth).abs() <= 2.0**-21 * scale
            assert (near | (ulp_distance(out, truth.to(dtype)) <= 1)).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("value", [NAN, INF])
def test_with_beta_0_the_bias_is_not_read(value, dtype, generator):
    a, b = randn(generator, 6, 100, dtype=dtype), randn(generator, 100, 9, dtype=dtype)
    bias = torch.full((9,), value, dtype=dtype, device=a.device)
    assert addmm(bias, a, b, beta=0.0).isfinite().all()
    assert baddbmm(bias, a[None], b[None], beta=0.0).isfinite().all()
    assert not addmm(bias, a, b, beta=0.5).isfinite().any()


def test_empty(device):
    def zeros(*shape):
        return torch.zeros(shape, device=device)

    assert linear(zeros(0, 4), zeros(3, 4)).shape == (0, 3)
    assert linear(zeros(2, 0, 4), zeros(3, 4), zeros(3)).shape == (2, 0, 3)
    assert linear(zeros(2, 4), zeros(0, 4)).shape == (2, 0)
    assert mm(zeros(0, 4), zeros(4, 3)).shape == (0, 3)
    assert bmm(zeros(0, 2, 4), zeros(0, 4, 3)).shape == (0, 2, 3)
    bias = torch.arange(3.0, device=device)
    assert linear(zeros(2, 0), zeros(3, 0)).tolist() == [[0.0] * 3] * 2
    assert linear(zeros(2, 0), zeros(3, 0), bias).tolist() == [[0.0, 1.0, 2.0]] * 2
    assert mm(zeros(2, 0), zeros(0, 3)).tolist() == [[0.0] * 3] * 2
    assert addmm(bias, zeros(2, 0), zeros(0, 3), beta=2.0).tolist() == [[0.0, 2.0, 4.0]] * 2
    assert baddbmm(bias, zeros(1, 2, 0), zeros(1, 0, 3), beta=0.0).tolist() == [[[0.0] * 3] * 2]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_changed_weight_is_seen(dtype, generator):
    """Packed weights are kept: a write in place, through .data, an alias or numpy must not go unnoticed."""
    x, weight = randn(generator, 3, 40, dtype=dtype), torch.nn.Parameter(randn(generator, 7, 40, dtype=dtype))

    def change_alias():
        weight.detach()[2, 3] += 1

    def change_data():
        weight.data[1, 1] = 9.0

    def change_storage():
        weight.data = randn(generator, 7, 40, dtype=dtype)

    def change_sign_of_zero():
        weight.data.zero_()
        weight.data.neg_()

    with torch.no_grad():
        linear(x, weight)
        for change in (lambda: weight.mul_(2), change_alias, change_data, change_storage, change_sign_of_zero):
            change()
            assert first_mismatch(linear(x, weight), linear(x, weight.clone())) is None


@on_cpu
def test_packed_weights_die_with_their_weight(generator):
    cache, x = packed._packed_weights, randn(generator, 3, 40)
    weight = randn(generator, 7, 40)
    before = len(cache._kept)
    linear(x, weight)
    assert len(cache._kept) == before + 1
    del weight
    assert len(cache._kept) == before


@on_cpu
def test_weights_past_the_limit_are_packed_every_time(generator, monkeypatch):
    x, weight = randn(generator, 3, 40), randn(generator, 7, 40)
    expected = linear(x, weight.clone())
    monkeypatch.setattr(packed, "LIMIT", 0)
    before = len(packed._packed_weights._kept)
    assert first_mismatch(linear(x, weight), expected) is None
    assert len(packed._packed_weights._kept) == before


def test_threads_may_share_the_packed_weights(generator):
    """Weights are packed and dropped while other threads look theirs up."""
    x = randn(generator, 2, 8)
    shared = randn(generator, 4, 8)
    expected = linear(x, shared)
    wrong = []

    def work():
        try:
            for _ in range(150):
                fresh = [shared.clone() for _ in range(4)]
                wrong.extend(w for w in fresh if first_mismatch(linear(x, w), expected))
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_errors_name_the_value(device):
    x, weight = torch.zeros(2, 4, device=device), torch.zeros(3, 4, device=device)
    with pytest.raises(ShapeError, match=r"x has shape \(2, 4\) and weight \(4, 3\), want \[..., K\], \[N, K\]"):
        linear(x, weight.t())
    with pytest.raises(ShapeError, match=r"weight \(4,\)"):
        linear(x, weight[0])
    with pytest.raises(ShapeError, match=r"bias has shape \(4,\), want one that broadcasts to \(3,\)"):
        linear(x, weight, torch.zeros(4, device=device))
    with pytest.raises(ShapeError, match=r"mm: shapes \(2, 4\) and \(3, 4\), want \[M, K\] and \[K, N\]"):
        mm(x, weight)
    with pytest.raises(ShapeError, match=r"bmm: shapes \(2, 2, 4\) and \(1, 4, 3\), want \[B, M, K\] and \[B, K, N\]"):
        bmm(x.expand(2, -1, -1), weight.t()[None])
    with pytest.raises(ShapeError, match=r"bias has shape \(2, 4\), want one that broadcasts to"):
        addmm(x, x, weight.t())
    with pytest.raises(DtypeError, match=r"x is torch.float64, want one of torch.float32"):
        linear(x.double(), weight.double())
    with pytest.raises(DtypeError, match=r"weight is torch.float16, want torch.float32 as x is"):
        linear(x, weight.half())
    with pytest.raises(DtypeError, match=r"bias is torch.bfloat16, want torch.float32"):
        linear(x, weight, weight[:, 0].bfloat16())
    with pytest.raises(DeviceError, match="weight is on meta, want"):
        linear(x, weight.to("meta"))
    for call in (
        lambda w: linear(x, w),
        lambda w: mm(x, w.t()),
        lambda w: addmm(w[:, 0], x, w.t()),
        lambda w: bmm(x[None], w.t()[None]),
    ):
        with pytest.raises(UnsupportedError, match="no backward pass"):
            call(torch.zeros(3, 4, device=device, requires_grad=True))


def test_registered_ops(generator):
    x, weight, bias = (randn(generator, *s, dtype=torch.float16) for s in ((2, 3, 24), (5, 24), (5,)))
    ops = torch.ops.batchproof
    for view in (x, x.transpose(0, 1)):
        torch.library.opcheck(ops.linear.default, (view, weight, bias))
        torch.library.opcheck(ops.linear.default, (view, weight, None))
        torch.library.opcheck(ops.baddbmm.default, (bias, view, weight.t().expand(view.shape[0], -1, -1), 0.5, 2.0))
        torch.library.opcheck(ops.baddbmm.default, (None, view, weight.t().expand(view.shape[0], -1, -1), 0.0, 1.0))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_equals_eager(backend, generator):
    weight, bias = randn(generator, 9, 40), randn(generator, 9)

    def layer(x):
        return linear(linear(x, weight, bias), weight.t(), None) + addmm(bias[:1], x, weight.t() @ weight)

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for rows in (1, 5):
        x = randn(generator, rows, 40)
        torch.testing.assert_close(compiled(x), layer(x), rtol=0.0, atol=0.0)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 5, 7), (17, 65, 100), (33, 33, 33)])
def test_kernel_in_the_interpreter(m, n, k, dtype, generator):
    a, b, bias = (randn(generator, *s, dtype=dtype) for s in ((2, m, k), (2, k, n), (n,)))
    out = module.launch(a, b)
    assert_accurate(a, b, out, (a.double() @ b.double()).to(dtype))
    with_bias = module.launch(a, b, bias, beta=0.5, alpha=2.0)
    expected = (2.0 * (a.double() @ b.double()) + 0.5 * bias.double()).to(dtype)
    torch.testing.assert_close(with_bias, expected, rtol=2.0**-9, atol=1e-4 if dtype == torch.float32 else 2e-2)
    for tile in (t for tiles in (module.GENERIC_TILES, module.FP32_TILES) for _, t in tiles):
        assert_accurate(a, b, module.launch(a, b, tile=tile), (a.double() @ b.double()).to(dtype))
    alone = module.launch(a[:, -1:], b)
    assert_accurate(a[:, -1:], b, alone, (a[:, -1:].double() @ b.double()).to(dtype))


@interpreted
def test_kernel_reads_any_layout(generator):
    a, b = randn(generator, 2, 5, 40), randn(generator, 2, 40, 9)
    expected = module.launch(a, b)
    for same in (b.transpose(1, 2).contiguous().transpose(1, 2), b.repeat_interleave(2, -1)[..., ::2]):
        assert first_mismatch(module.launch(a.repeat_interleave(2, 1)[:, ::2], same), expected) is None
    for bias in (a[:, :1, :9], a[:1, :, :1], a[:, :, :9].transpose(0, 1).contiguous().transpose(0, 1)):
        torch.testing.assert_close(module.launch(a, b, bias), expected + bias, rtol=1e-6, atol=1e-6)


def of_ranks(x, weight, ranks, pieces):
    """The product as so many ranks compute it, each with a part of K, before its bias."""
    parts = zip(x.chunk(ranks, -1), weight.chunk(ranks, 1), strict=True)
    return add_pieces([linear(a, w, pieces=pieces // ranks, out_dtype=torch.float32) for a, w in parts])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("rows", [1, 17, 129])
def test_k_split_over_ranks_has_the_bits_of_one_rank(rows, dtype, generator):
    """Tensor-parallel sizes 2, 4 and 8, split by hand."""
    x, weight = (wide(generator, n, 2048, dtype) for n in (rows, 40))
    for pieces in (2, 4, 8):
        one = linear(x, weight, pieces=pieces, out_dtype=torch.float32)
        assert first_mismatch(linear(x, weight, pieces=pieces), one.to(dtype)) is None
        for ranks in (n for n in (1, 2, 4, 8) if n <= pieces):
            assert first_mismatch(of_ranks(x, weight, ranks, pieces), one) is None, f"{ranks} ranks, {pieces} pieces"


def test_without_pieces_ranks_would_differ(generator):
    """The control: a sum in one piece is no tree, and the comparison above can fail."""
    x, weight = (wide(generator, n, 2048, torch.float32) for n in (129, 40))
    assert first_mismatch(of_ranks(x, weight, 2, 2), linear(x, weight)) is not None
    parts = [a @ w.t() for a, w in zip(x.chunk(4, -1), weight.chunk(4, 1), strict=True)]
    in_order = parts[0] + parts[1] + parts[2] + parts[3]
    assert first_mismatch(add_pieces(parts), in_order) is not None


def wide(generator, rows, k, dtype):
    """Rows whose sums round differently in every order."""
    powers = torch.randint(-6, 6, (rows, k), generator=generator, device=generator.device)
    return (randn(generator, rows, k) * 2.0**powers).to(dtype)


@pytest.mark.parametrize("pieces", [2, 8])
def test_pieces_are_accurate_and_take_a_bias(pieces, generator):
    x, weight, bias = randn(generator, 5, 512), randn(generator, 33, 512), randn(generator, 33)
    assert_accurate(x, weight.t(), linear(x, weight, bias, pieces=pieces), linear_reference(x, weight, bias))


def test_k_that_cannot_be_cut_is_named(generator):
    x, weight = randn(generator, 2, 12), randn(generator, 3, 12)
    with pytest.raises(ArgumentError, match=r"pieces is 8 and K 12, want one of 1, 2, 4, 8, and K a multiple"):
        linear(x, weight, pieces=8)
    with pytest.raises(ArgumentError, match="pieces is 3 and K 12"):
        linear(x, weight, pieces=3)
    with pytest.raises(ArgumentError, match="add_pieces: no tensor, want one or more"):
        add_pieces([])
    with pytest.raises(DtypeError, match=r"add_pieces: a sum is torch\.float16"):
        add_pieces([x.half(), x.half()])


def test_an_odd_number_of_sums_carries_the_last(generator):
    a, b, c, d, e = (randn(generator, 3, 4) for _ in range(5))
    assert first_mismatch(add_pieces([a, b, c]), (a + b) + c) is None
    assert first_mismatch(add_pieces([a, b, c, d, e]), ((a + b) + (c + d)) + e) is None
    assert first_mismatch(add_pieces([a]), a) is None


@interpreted
def test_pieces_in_the_interpreter(generator):
    a, b = randn(generator, 1, 20, 256), randn(generator, 1, 256, 33)
    for pieces in (1, 2, 4, 8):
        out = module.launch(a, b, pieces=pieces)
        assert_accurate(a, b, out, (a.double() @ b.double()).float())
        parts = zip(a.chunk(pieces, -1), b.chunk(pieces, 1), strict=True)
        assert first_mismatch(add_pieces([module.launch(x, y) for x, y in parts]), out) is None
