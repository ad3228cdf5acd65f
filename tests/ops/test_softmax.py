"""softmax and log_softmax: accuracy, torch's semantics, and bits that depend on a row alone."""

import pytest
import torch

from batchproof.errors import ArgumentError, DtypeError, UnsupportedError
from batchproof.numerics import TOLERANCES, first_mismatch, ulp_distance
from batchproof.ops import softmax as module
from batchproof.ops._library import FLOAT_DTYPES
from batchproof.ops.softmax import log_softmax, log_softmax_reference, softmax, softmax_reference
from batchproof.registry import get_spec

OPS = [
    pytest.param(softmax, softmax_reference, id="softmax"),
    pytest.param(log_softmax, log_softmax_reference, id="log"),
]
# 1: no sum; 33, 193: masked blocks; 512: a full one; 4099: odd, two warps' worth of tail; 20000: walked in blocks
WIDTHS = [1, 2, 33, 193, 512, 4099, 20000]
BATCHES = [1, 2, 3, 8, 31, 32, 33, 255, 256, 257, 1000]
INF, NAN = float("inf"), float("nan")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself runs in the other tests")


def randn(generator, *shape, dtype=torch.float32, scale=4.0):
    return (torch.randn(*shape, generator=generator, device=generator.device) * scale).to(dtype)


def assert_accurate(op, x, out, expected, dim=-1):
    """Within the table's ulps, or its atol in units of the largest probability or the largest |x| of the row."""
    tolerance = TOLERANCES[op.__name__]
    values = expected if op is softmax else x.nan_to_num(0.0, 0.0, 0.0)
    scale = values.double().abs().amax(dim, keepdim=True)
    near = (out.double() - expected.double()).abs() <= tolerance.atol * scale
    bad = ~(near | (ulp_distance(out, expected) <= tolerance.ulp))
    assert not bad.any(), f"{int(bad.sum())} off, first {out[bad][0].item()} against {expected[bad][0].item()}"


def hostile(generator, rows, width, dtype):
    """Neighbours that would show in a row that read them."""
    x = randn(generator, rows, width, dtype=dtype)
    x[0::4] = NAN
    x[1::4, -1] = INF
    x[2::4] = torch.finfo(dtype).max
    return x


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("op", "reference"), OPS)
def test_accuracy(op, reference, width, dtype, generator):
    x = randn(generator, 5, width, dtype=dtype)
    assert_accurate(op, x, op(x), reference(x))


def adversarial_rows(dtype):
    """[rows, 64]: equal, dominated, far apart, huge, subnormal, masked."""
    info = torch.finfo(dtype)
    rows = torch.zeros(9, 64, dtype=dtype)
    rows[1, 7] = 80.0
    rows[2] = torch.linspace(-110.0, 0.0, 64).to(dtype)
    rows[3, ::2] = info.max
    rows[4, ::2] = -info.max
    rows[5, 3], rows[5, 4] = info.max, info.min
    rows[6] = info.smallest_normal / 4
    rows[7, 1:] = -INF
    rows[8] = 1000.0 + torch.linspace(0.0, 4.0, 64).to(dtype)
    return rows


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("op", "reference"), OPS)
def test_accuracy_of_adversarial_rows(op, reference, dtype, device):
    x = adversarial_rows(dtype).to(device)
    assert_accurate(op, x, op(x), reference(x))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("op", "reference"), OPS)
def test_rows_without_a_softmax_are_nan_and_alone_in_it(op, reference, dtype, device):
    x = torch.zeros(6, 40, dtype=dtype, device=device)
    x[1, 5], x[2, 5], x[3] = NAN, INF, -INF
    x[4, :2] = torch.tensor([INF, NAN])
    x[5], x[5, 0] = -INF, NAN
    out = op(x)
    assert torch.equal(out.isnan(), torch.softmax(x.float(), -1).isnan())
    assert out[1:].isnan().all()
    assert first_mismatch(out[:1], op(x[:1])) is None


def test_a_wide_tail_counts(device):
    """2**18 probabilities of 2**-36 are 2**-18 together: a fixed-point sum of the whole row would drop them."""
    x = torch.full((1, 2**18), -25.0, device=device)
    x[0, 12345] = 0.0
    error = (softmax(x).double() - softmax_reference(x).double()).abs().max()
    assert error < 2.0**-22


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("op", "reference"), OPS)
def test_dtype_casts_first(op, reference, dtype, generator):
    for source in FLOAT_DTYPES:
        x = randn(generator, 3, 50, dtype=source)
        out = op(x, dtype=dtype)
        assert out.dtype == dtype
        if dtype != torch.float32:  # the cast to it is made by the kernel, in a layout of its own
            assert first_mismatch(out, op(x.to(dtype))) is None
        assert_accurate(op, x, out, reference(x, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("width", [193, 40000])  # 40000: torch shares a lone row of that out over threads
@pytest.mark.parametrize(("op", "reference"), OPS)
def test_a_row_has_one_result(op, reference, width, dtype, generator):
    probe = randn(generator, 1, width, dtype=dtype)
    alone = op(probe)
    for rows in BATCHES if width < 1000 else (2, 9):
        for place in sorted({0, rows // 2, rows - 1}):
            batch = hostile(generator, rows, width, dtype)
            batch[place] = probe
            assert first_mismatch(op(batch)[place], alone[0]) is None, f"row {place} of {rows}"


@pytest.mark.parametrize(("op", "reference"), OPS)
def test_a_batch_is_its_parts(op, reference, generator):
    x = randn(generator, 1000, 65)
    whole = op(x)
    for rows in (1, 3, 32, 257, 999):
        assert first_mismatch(torch.cat([op(part) for part in x.split(rows)]), whole) is None, f"in parts of {rows}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 65])
@pytest.mark.parametrize(("op", "reference"), OPS)
def test_layout_leaves_the_bits_alone(op, reference, width, dtype, generator):
    x = randn(generator, 6, width, dtype=dtype)
    expected = op(x)
    shifted = torch.empty(x.numel() + 1, dtype=dtype, device=x.device)[1:].view_as(x).copy_(x)
    wider = torch.full((6, 2 * width + 1), NAN, dtype=dtype, device=x.device)
    spaced = wider[:, 1::2].copy_(x)
    for same in (shifted, spaced, x.t().contiguous().t()):
        assert first_mismatch(op(same), expected) is None
        assert first_mismatch(op(same[3:4]), expected[3:4]) is None
    assert first_mismatch(op(x[:1].expand(4, -1)), expected[:1].expand(4, -1)) is None


@pytest.mark.parametrize(("op", "reference"), OPS)
def test_any_dim(op, reference, generator):
    x = randn(generator, 3, 5, 7)
    for dim in (0, 1, 2, -1, -2, -3):
        out = op(x, dim)
        assert out.is_contiguous()
        assert first_mismatch(out, op(x.movedim(dim, -1)).movedim(-1, dim)) is None
        assert_accurate(op, x, out, reference(x, dim), dim)


@pytest.mark.parametrize(("op", "reference"), OPS)
def test_empty_and_scalar(op, reference, device):
    for shape in ((0, 8), (4, 0), (0,), (2, 0, 3)):
        assert op(torch.empty(shape, device=device)).shape == shape
    for dim in (0, -1):
        assert op(torch.tensor(3.0, device=device), dim).item() == (1.0 if op is softmax else 0.0)


def test_threads_leave_the_bits_alone(generator):
    x, threads = randn(generator, 64, 1000), torch.get_num_threads()
    expected = softmax(x)
    try:
        torch.set_num_threads(1)
        assert first_mismatch(softmax(x), expected) is None
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("op", "reference"), OPS)
def test_errors_name_the_value(op, reference, device):
    x = torch.zeros(2, 3, device=device)
    with pytest.raises(ArgumentError, match=r"dim is 2, want one of -2 to 1 for x of shape \(2, 3\)"):
        op(x, 2)
    with pytest.raises(DtypeError, match=r"x is torch.float64, want one of torch.float32"):
        op(x.double())
    with pytest.raises(DtypeError, match=r"dtype is torch.float64, want one of torch.float32"):
        op(x, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="no backward pass"):
        op(x.requires_grad_())


@pytest.mark.parametrize(("op", "reference"), OPS)
def test_registered_op(op, reference, generator):
    overload = getattr(torch.ops.batchproof, op.__name__).default
    x = randn(generator, 3, 4, 5, dtype=torch.float16)
    for arguments in ((x, -1, None), (x, 1, torch.float32), (x.transpose(0, 2), 0, torch.bfloat16)):
        torch.library.opcheck(overload, arguments)


@pytest.mark.parametrize(("op", "reference"), OPS)
def test_aten_signature(op, reference, generator):
    name = f"_{op.__name__}"
    x = randn(generator, 3, 40, dtype=torch.float16)
    for half_to_float, dtype in ((False, torch.float16), (True, torch.float32)):
        out = get_spec(op.__name__).aten[name](x, -1, half_to_float)
        assert first_mismatch(out, op(x, dtype=dtype)) is None
    x = x.float()
    theirs = getattr(torch.ops.aten, name)(x, -1, False)
    torch.testing.assert_close(get_spec(op.__name__).aten[name](x, -1, False), theirs, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 40, 65, 8200])  # masked, unaligned, in blocks
@pytest.mark.parametrize(("op", "reference"), OPS)
def test_kernel_in_the_interpreter(op, reference, width, dtype, generator):
    x = randn(generator, 2, width, dtype=dtype)
    out = torch.empty_like(x)
    module.launch(x, out, op is log_softmax)
    assert_accurate(op, x, out, reference(x))
    alone = torch.empty_like(x[1:])
    module.launch(x[1:], alone, op is log_softmax)
    assert first_mismatch(alone, out[1:]) is None


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_kernel_rows_without_a_softmax(device):
    x = torch.zeros(5, 40)
    x[1, 5], x[2, 5], x[3], x[4, :20] = NAN, INF, -INF, -INF
    out = torch.empty_like(x)
    module.launch(x, out, False)
    assert out[1:4].isnan().all()
    assert_accurate(softmax, x[::4], out[::4], softmax_reference(x[::4]))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("width", [8192, 8193, 8200, 40000])  # a block; unaligned; aligned; five
@pytest.mark.parametrize(("op", "reference"), OPS)
def test_who_has_a_block_leaves_the_bits_alone(op, reference, width, dtype, generator):
    if dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("the interpreter has no bf16")
    x = randn(generator, 5, width, dtype=dtype)
    x[1] *= 2.0 ** torch.randint(-12, 4, (width,), generator=generator, device=x.device)
    x[2, : width // 2], x[3, width // 2 :] = -INF, -INF  # whole blocks of nothing
    x[4, width - 1] = 60.0
    walked, shared = (torch.full_like(x, NAN) for _ in range(2))
    module.launch(x, walked, op is log_softmax, shared=False)
    module.launch(x, shared, op is log_softmax, shared=True)
    assert_accurate(op, x, walked, reference(x))
    assert first_mismatch(shared, walked) is None


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("shared", [True, False])
def test_wide_rows_without_a_softmax_are_nan_and_alone_in_it(shared, generator):
    x = randn(generator, 5, 9000)
    expected = torch.empty_like(x)
    module.launch(x, expected, True)
    x[1, 8999], x[2, 5], x[3] = NAN, INF, -INF
    out = torch.empty_like(x)
    module.launch(x, out, True, shared=shared)
    assert out[1:4].isnan().all()
    assert first_mismatch(out[::4], expected[::4]) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_row_of_many_has_the_bits_of_one_alone(dtype, generator):
    x = randn(generator, 700, 32000, dtype=dtype)
    whole = log_softmax(x)
    for rows in (1, 8, 263, 264, 265):
        assert first_mismatch(log_softmax(x[-rows:]), whole[-rows:]) is None, f"{rows} rows"
