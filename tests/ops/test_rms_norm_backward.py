"""rms_norm_backward and autograd of the norms: gradients, bits of a row, the tree over rows, what autograd may ask."""

import pytest
import torch

from batchproof.errors import ArgumentError, DeviceError, DtypeError, ShapeError, UnsupportedError
from batchproof.numerics import TOLERANCES, first_mismatch, ulp_distance
from batchproof.ops import _rms_norm_backward_kernel as kernel
from batchproof.ops._library import FLOAT_DTYPES
from batchproof.ops.rms_norm import add_rms_norm, fused_add_rms_norm, rms_norm
from batchproof.ops.rms_norm_backward import rms_norm_backward, rms_norm_backward_reference

NAN = float("nan")
# A launch each of LAUNCHES, odd and even; 16384: two blocks; 20000: the last of them not full; 65536: the widest
WIDTHS = [1, 2, 7, 64, 100, 128, 200, 512, 1000, 2048, 4096, 5120, 16384, 20000, 65536]
FORMS = [
    pytest.param(False, True, id="llama"),
    pytest.param(True, True, id="gemma"),
    pytest.param(False, False, id="unweighted"),
]
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, in the interpreter
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run in the other tests")


def randn(generator, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)


def case(generator, rows, width, dtype, weighted=True):
    """(grad_out, grad_residual_out, x, weight)"""
    grads = [randn(generator, rows, width, dtype=dtype) for _ in range(3)]
    return (*grads, randn(generator, width, dtype=dtype) if weighted else None)


def rounded(t, dtype):
    """``t`` float64 rounded to ``dtype``, which autograd is to see as the identity."""
    return t + (t.to(dtype).double() - t).detach()


def by_autograd(grad_out, grad_residual_out, x, weight, eps=1e-6, gemma=False):
    """Float64 gradients of the formula of the forward pass, in torch's autograd."""
    dtype, grad_residual_out = x.dtype, torch.zeros_like(x) if grad_residual_out is None else grad_residual_out
    x = x.double().requires_grad_()
    weight = torch.ones(x.shape[-1], device=x.device) if weight is None else weight
    w = weight.double().requires_grad_()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    y = y * (1.0 + w) if gemma else rounded(y, dtype) * w
    torch.autograd.backward((rounded(y, dtype), x), (grad_out.double(), grad_residual_out.double()))
    return x.grad, w.grad


def assert_accurate(gradients, grad_out, grad_residual_out, x, weight, eps=1e-6, gemma=False):
    exact_x, exact_weight = by_autograd(grad_out, grad_residual_out, x, weight, eps, gemma)
    rstd = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)
    scale = 1.0 if weight is None else weight.double().abs() + gemma
    row_terms = (grad_out.double().abs() * scale * rstd).amax(-1, keepdim=True)
    assert_within("rms_norm_backward_x", gradients[0], exact_x, row_terms)
    if weight is None:
        assert gradients[1] is None
        return
    column_terms = (grad_out.double() * x.double() * rstd).abs().flatten(0, -2).amax(0)
    assert_within("rms_norm_backward", gradients[1], exact_weight, column_terms * torch.finfo(x.dtype).eps)


def assert_within(entry, gradient, exact, unit):
    tolerance = TOLERANCES[entry]
    near = (gradient.double() - exact).abs() <= tolerance.atol * unit
    bad = ~(near | (ulp_distance(gradient, exact.to(gradient.dtype)) <= tolerance.ulp))
    assert not bad.any(), f"{entry}: {int(bad.sum())} off, {gradient[bad][0].item()} against {exact[bad][0].item()}"


def by_kernel(grad_out, grad_residual_out, x, weight, eps=1e-6, gemma=False):
    """What the Triton kernels make of it, on the GPU or in the interpreter, into poisoned memory."""
    grad_x = torch.full_like(x, NAN, memory_format=torch.contiguous_format)
    grad_weight = None if weight is None else torch.full_like(weight, NAN)
    kernel.launch(grad_out, grad_residual_out, x, weight, eps, gemma, grad_x, grad_weight)
    return grad_x, grad_weight


def assert_same(gradients, wanted, label=""):
    for name, mine, theirs in zip(("grad_x", "grad_weight"), gradients, wanted, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or first_mismatch(mine, theirs) is None, f"{label} {name}: {first_mismatch(mine, theirs)}"


# Gradients.


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("gemma", "weighted"), FORMS)
@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_are_those_of_float64_autograd(width, gemma, weighted, dtype, generator):
    for residual in (True, False):
        grad_out, grad_residual_out, x, weight = case(generator, 3 if width > 10000 else 37, width, dtype, weighted)
        arguments = (grad_out, grad_residual_out if residual else None, x, weight, 1e-6)
        gradients = rms_norm_backward(*arguments, gemma=gemma)
        assert_accurate(gradients, *arguments, gemma)
        for mine, theirs in zip(gradients, rms_norm_backward_reference(*arguments, gemma), strict=True):
            assert mine is None or (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1.0, 1e30])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_gradients_for_any_eps_and_cancelling_terms(dtype, eps, generator):
    grad_out, _, x, weight = case(generator, 20, 300, dtype)
    for grad in (grad_out, x, (x.double() * (1.0 + 0.01 * grad_out.double())).to(dtype)):  # g along x: all cancels
        assert_accurate(rms_norm_backward(grad, None, x, weight, eps), grad, None, x, weight, eps)
        unweighted = rms_norm_backward(grad, None, x, None, eps)
        assert_accurate(unweighted, grad, None, x, None, eps)


def numbers(generator, *shape):
    """Multiples of 2**-6, so that adding 2**-7 or taking it away is exact in fp32."""
    return (randn(generator, *shape) * 64).round() / 64


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # gradcheck would rather have float64, which ops do not take
@pytest.mark.parametrize(("gemma", "weighted"), FORMS)
def test_gradcheck(gemma, weighted, generator):
    """Differences of fp32 results carry 2**-24 / 2**-7 of rounding and 2**-14 of curvature: both are under 1e-3.

    Statistics of fp32 rows are float64, or the rounding would be larger. Bits of a repeated backward must be the same.
    """
    x, residual = (numbers(generator, 5, 6).requires_grad_() for _ in range(2))
    weight = numbers(generator, 6).requires_grad_() if weighted else None
    how = {"eps": 2.0**-7, "atol": 2e-3, "rtol": 2e-3, "nondet_tol": 0.0}
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 0.5, gemma=gemma), (x, weight), **how)
    for op in (add_rms_norm, lambda x, r, *rest, **form: fused_add_rms_norm(x.clone(), r.clone(), *rest, **form)):
        call = lambda x, r, w, op=op: op(x, r, w, 0.5, gemma=gemma)  # noqa: E731
        assert torch.autograd.gradcheck(call, (x, residual, weight), **how)


# Bits of a row.


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("width", [1, 64, 100, 512, 1000, 4096, 20000])
def test_bits_of_a_row_depend_on_the_row_alone(width, dtype, generator):
    rows = 70 if width < 10000 else 18
    grad_out, grad_residual_out, x, weight = case(generator, rows, width, dtype)
    for compute in (rms_norm_backward, by_kernel) if width < 1000 else (rms_norm_backward,):
        whole, _ = compute(grad_out, grad_residual_out, x, weight)
        for chosen in (slice(0, 1), slice(5, 6), slice(rows - 1, rows), slice(1, 18), slice(0, 17), slice(3, rows, 4)):
            part, _ = compute(grad_out[chosen], grad_residual_out[chosen], x[chosen], weight)
            assert first_mismatch(part, whole[chosen]) is None, f"{compute.__name__}, rows {chosen}"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("compute", [rms_norm_backward, by_kernel])
def test_rows_that_are_not_finite_are_alone_in_it(compute, dtype, generator):
    grad_out, grad_residual_out, x, weight = case(generator, 40, 100, dtype)
    clean = compute(grad_out, grad_residual_out, x, weight)
    x[1, 3], grad_out[3, 99], grad_residual_out[20] = NAN, float("inf"), NAN
    grad_x, grad_weight = compute(grad_out, grad_residual_out, x, weight)
    odd = [1, 3, 20]
    kept = torch.tensor([i not in odd for i in range(40)], device=x.device)
    assert first_mismatch(grad_x[kept], clean[0][kept]) is None
    assert not grad_x[odd].isfinite().all(-1).any()
    assert grad_weight.isnan().all(), "a row that is not finite is in every column's sum"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("width", [7, 64, 100, 4096])
def test_layout_leaves_the_bits_alone(width, dtype, generator):
    tensors = case(generator, 6, width, dtype)
    expected = rms_norm_backward(*tensors)
    grad_out, grad_residual_out, x, weight = tensors

    def views(t):
        padded = torch.full((6, 2 * width + 3), NAN, dtype=dtype, device=t.device)
        yield padded[:, 3 : width + 3].copy_(t)
        yield padded[:, : 2 * width : 2].copy_(t)
        yield t.t().contiguous().t()
        yield torch.cat((t[:1], t)).flatten()[width:].view_as(t)
        yield t.view(2, 3, width).transpose(0, 1).contiguous().transpose(0, 1)

    for same_grad, same_residual, same_x in zip(*(views(t) for t in (grad_out, grad_residual_out, x)), strict=True):
        strided_weight = weight.repeat_interleave(2)[::2]
        gradients = rms_norm_backward(same_grad, same_residual.view_as(same_grad), same_x, strided_weight)
        assert gradients[0].is_contiguous()
        assert_same((gradients[0].view_as(x), gradients[1]), expected)
    row = rms_norm_backward(grad_out[0], grad_residual_out[0], x[0], weight)
    assert first_mismatch(row[0], expected[0][0]) is None
    same = rms_norm_backward(grad_out[:1].expand(6, -1), None, x, weight)
    assert_same(same, rms_norm_backward(grad_out[:1].repeat(6, 1), None, x, weight))


# The tree over rows.


def wide_exponents(generator, rows, width, dtype):
    """Summands whose every order rounds elsewhere, also in fp64 if they are fp32; small enough to sum in fp16."""
    lowest = {torch.float32: -40, torch.float16: -12, torch.bfloat16: -24}[dtype]
    powers = torch.randint(lowest, 4, (rows, width), generator=generator, device=generator.device)
    return (randn(generator, rows, width) * 2.0**powers).to(dtype)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("compute", [rms_norm_backward, by_kernel])
@pytest.mark.parametrize(("width", "rows"), [(64, 1), (64, 127), (64, 1030), (512, 45), (1500, 17), (9000, 17)])
def test_rows_without_a_gradient_change_no_bit(width, rows, compute, dtype, generator, monkeypatch):
    monkeypatch.setattr(kernel, "COMBINE_LANES", 2)  # so that a lane has more than one chunk
    grad_out, x = (wide_exponents(generator, rows, width, dtype) for _ in range(2))
    weight = randn(generator, width, dtype=dtype)
    grad_x, grad_weight = compute(grad_out, None, x, weight)
    for more in (1, 2, 40) if width > 500 else (1, 2, 15, 16, 17, 127, 128, 129, 300):
        more_x = torch.cat((x, randn(generator, more, width, dtype=dtype)))
        padded = compute(torch.cat((grad_out, torch.zeros_like(more_x[rows:]))), None, more_x, weight)
        assert_same((padded[0][:rows], padded[1]), (grad_x, grad_weight), f"{more} rows more")
        assert not padded[0][rows:].any()


def fold(total):
    while len(total) > 1:
        total = total[: len(total) // 2] + total[len(total) // 2 :]
    return total[0]


def lanes_of(terms, lanes):
    """[lanes, width]: row r of ``terms`` is added to lane r % lanes, in ascending order."""
    total = torch.zeros_like(terms[:1]).repeat(lanes, 1)
    for r, term in enumerate(terms):
        total[r % lanes] += term
    return total


def written_out(terms, chunk, lanes, combine_lanes):
    """The sum of ``terms`` [rows, width] over rows by the tree that the module's docstring gives."""
    chunks = torch.stack([fold(lanes_of(rows, lanes)) for rows in terms.split(chunk)])
    return fold(lanes_of(chunks, combine_lanes))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(
    ("width", "rows", "combine_lanes"), [(64, 700, 2), (128, 300, 128), (1024, 70, 2), (4000, 20, 128), (9000, 40, 2)]
)
def test_the_tree_is_the_one_written_down(width, rows, combine_lanes, dtype, generator, monkeypatch):
    """x is 1 or -1 and eps 0, so that xhat is x; the sum is asked for before its rounding to 16 bits, which hides much.

    The control: trees that are nearly this one give other bits.
    """
    monkeypatch.setattr(kernel, "COMBINE_LANES", combine_lanes)
    x = randn(generator, rows, width).sign().to(dtype)
    grad_out = wide_exponents(generator, rows, width, dtype)
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    grad_x, grad_weight = torch.empty_like(x), torch.full((width,), NAN, dtype=wide, device=x.device)
    kernel.launch(grad_out, None, x, torch.ones_like(x[0]), 0.0, False, grad_x, grad_weight)
    terms = grad_out.to(wide) * x.to(wide)
    chunk, lanes, _ = next(launch for widest, *launch in kernel.LAUNCHES if min(width, 8192) <= widest)
    assert first_mismatch(grad_weight, written_out(terms, chunk, lanes, combine_lanes)) is None
    for other in ((chunk * 2, lanes, combine_lanes), (chunk, lanes * 2, combine_lanes), (rows, 1, 1)):
        assert first_mismatch(grad_weight, written_out(terms, *other)) is not None, f"{other} would go unnoticed"


def test_no_rows_have_no_gradient(device):
    for shape in ((0, 64), (2, 0, 7)):
        empty, weight = torch.empty(shape, device=device), torch.ones(shape[-1], device=device)
        grad_x, grad_weight = rms_norm_backward(empty, empty, empty, weight)
        assert grad_x.shape == shape
        assert first_mismatch(grad_weight, torch.zeros_like(weight)) is None
        assert rms_norm_backward(empty, None, empty, None)[1] is None


def test_rows_past_the_last_are_left_out(generator):
    """With eps 0 the lanes past the last row divide by zero; nothing of that may reach the sum."""
    for width in (64, 9000):
        grad_out, _, x, weight = case(generator, 3, width, torch.float16)
        assert_accurate(by_kernel(grad_out, None, x, weight, 0.0), grad_out, None, x, weight, 0.0)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter truncates to bf16
@pytest.mark.parametrize(("gemma", "weighted"), FORMS)
@pytest.mark.parametrize("width", [1, 7, 64, 100, 200, 512, 4096, 9000])
def test_kernels_in_the_interpreter(width, gemma, weighted, dtype, generator):
    tensors = case(generator, 18 if width < 9000 else 3, width, dtype, weighted)
    for residual in (tensors[1], None):
        arguments = (tensors[0], residual, *tensors[2:], 1e-6, gemma)
        assert_accurate(by_kernel(*arguments), *arguments)


# The op as torch has it.


def test_errors_name_the_value(generator):
    grad_out, _, x, weight = case(generator, 3, 8, torch.float32)
    cases = [
        (ShapeError, r"grad_out has shape \(2, 8\), want \(3, 8\)", (grad_out[:2], None, x, weight)),
        (ShapeError, r"grad_residual_out has shape \(3, 7\), want \(3, 8\)", (grad_out, x[:, :7], x, weight)),
        (ShapeError, r"weight has shape \(7,\), want \(8,\)", (grad_out, None, x, weight[:7])),
        (ShapeError, r"want \[..., hidden_size\]", (grad_out[:, :0], None, x[:, :0], weight[:0])),
        (DtypeError, "x is torch.float64", (grad_out, None, x.double(), weight)),
        (DtypeError, "grad_out is torch.float16, want torch.float32", (grad_out.half(), None, x, weight)),
        (DtypeError, "weight is torch.bfloat16, want torch.float32", (grad_out, None, x, weight.bfloat16())),
        (DeviceError, "grad_residual_out is on meta, want", (grad_out, x.to("meta"), x, weight)),
        (ArgumentError, "eps is -1.0, want a finite number", (grad_out, None, x, weight, -1.0)),
        (UnsupportedError, "no backward pass", (grad_out, None, x.clone().requires_grad_(), weight)),
    ]
    for error, match, arguments in cases:
        with pytest.raises(error, match=match):
            rms_norm_backward(*arguments)
    with pytest.raises(ArgumentError, match="weight_grad is True, but there is no weight"):
        torch.ops.batchproof.rms_norm_backward(grad_out, None, x, None, 1e-6, False, True)


@pytest.mark.parametrize(("gemma", "weighted"), FORMS)
def test_registered_op(gemma, weighted, generator):
    op = torch.ops.batchproof.rms_norm_backward.default
    *grads, x, weight = case(generator, 4, 24, torch.float16, weighted)
    for grad_residual_out in (grads[1], None):
        for view in (x, x.t().contiguous().t(), x.view(2, 2, 24)):
            tensors = [t if t is None else t.view_as(view) for t in (grads[0], grad_residual_out)]
            torch.library.opcheck(op, (*tensors, view, weight, 1e-6, gemma, weighted))
            torch.library.opcheck(op, (*tensors, view, weight, 1e-6, gemma, False))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_launches_are_one_binary_a_width(dtype, device):
    """One row, odd strides and unaligned pointers must not compile another tree; nor must a frozen weight."""
    weight_grads = {}
    for width in (64, 100, 4096, 4097, 9000):
        x, wide = (
            torch.randn(64, width, device=device).to(dtype),
            torch.randn(64, 2 * width + 3, device=device).to(dtype),
        )
        weight = torch.randn(width, device=device).to(dtype)
        grad_x, weight_grads[width] = rms_norm_backward(x, None, x, weight)
        before = [binaries(k) for k in (kernel._backward_kernel, kernel._combine_kernel)]
        for same in (x[:1], x[1:2], x[::2], wide[:, 1 : width + 1], wide[:, :width], x.view(2, 32, width), x[:33]):
            rms_norm_backward(same, None, same, weight, 1e-5)
        assert [binaries(k) for k in (kernel._backward_kernel, kernel._combine_kernel)] == before
        frozen = torch.ops.batchproof.rms_norm_backward(x, None, x, weight, 1e-6, False, False)[0]
        assert first_mismatch(frozen, grad_x) is None


def binaries(jitted):
    return len(jitted.device_caches[torch.cuda.current_device()][0])


@pytest.mark.gpu
def test_past_2_to_the_31_elements(device):
    """[600000, 4096] bf16 is 2.46e9 elements, 4.9 GB each of x, its gradient and grad_out."""
    free, _ = torch.cuda.mem_get_info()
    if free < 30 * 2**30:
        pytest.skip(f"needs 30 GiB of GPU memory, {free / 2**30:.0f} are free")
    x, grad_out = (torch.empty(600000, 4096, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
    weight = torch.randn(4096, device=device).bfloat16()
    grad_x, _ = rms_norm_backward(grad_out, None, x, weight)
    for s in (slice(0, 5), slice(2**31 // 4096 - 3, 2**31 // 4096 + 3), slice(599995, 600000)):
        assert first_mismatch(grad_x[s], rms_norm_backward(grad_out[s].clone(), None, x[s].clone(), weight)[0]) is None
    del grad_x
    last = grad_out[-20:].clone()
    grad_out[100:] = 0.0
    _, of_the_first = rms_norm_backward(grad_out[:100].clone(), None, x[:100].clone(), weight)
    assert first_mismatch(rms_norm_backward(grad_out, None, x, weight)[1], of_the_first) is None
    grad_out[:100], grad_out[-20:] = 0.0, last
    _, of_the_last = rms_norm_backward(grad_out, None, x, weight)
    assert_accurate((rms_norm_backward(last, None, x[-20:], weight)[0], of_the_last), last, None, x[-20:], weight)
