"""The switch: what it routes, that nothing else changes, and that everything comes back as it was."""

import os
import random
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchproof
from batchproof import mode
from batchproof.errors import BatchproofError, ModeError, UnsupportedError
from batchproof.numerics import bits_equal, first_mismatch
from batchproof.ops import layer_norm, linear, reduce, softmax
from batchproof.ops._library import FLOAT_DTYPES


@pytest.fixture(autouse=True)
def switch_left_as_found():
    assert not mode.is_enabled(), "an earlier test left the switch on"
    before = surroundings()
    yield
    mode.disable()
    assert not mode.is_enabled()
    assert surroundings() == before


def surroundings():
    """What the switch touches beside the dispatcher's kernels."""
    sdp = torch.backends.cuda
    from torch._dynamo import eval_frame

    return (
        sdp.flash_sdp_enabled(),
        sdp.mem_efficient_sdp_enabled(),
        sdp.math_sdp_enabled(),
        sdp.cudnn_sdp_enabled(),
        eval_frame._stance.stance,
    )


@pytest.fixture
def tensors(generator):
    """(x [33, 300], w [40, 300]) whose stock products vary with the batch on most machines."""
    device = generator.device
    return torch.randn(33, 300, generator=generator, device=device), torch.randn(
        40, 300, generator=generator, device=device
    )


# The environment variable.


@pytest.mark.parametrize(("value", "wanted"), [(None, False), ("0", False), ("1", True)])
def test_environment_variable(value, wanted, monkeypatch):
    monkeypatch.delenv(mode.ENVIRONMENT_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", value)
    assert mode.requested_by_environment() is wanted


@pytest.mark.parametrize("value", ["", "true", "True", "2", "01", " 1", "1 ", "yes", "-1", "1.0"])
def test_environment_variable_is_read_strictly(value, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", value)
    with pytest.raises(ModeError, match=f"VLLM_BATCH_INVARIANT is {value!r}, want 0 or 1"):
        mode.requested_by_environment()


def test_import_loads_nothing_and_patches_nothing():
    program = """
import sys, warnings
warnings.simplefilter("error")
import batchproof
loaded = [m for m in ("torch", "triton", "transformers", "vllm") if m in sys.modules and m != "torch"]
assert not loaded, loaded
import torch
x = torch.randn(3, 5)
assert not batchproof.is_enabled()
def kernels(): return torch._C._dispatch_dump("aten::mm")
before = kernels()
import batchproof.ops.linear, batchproof.ops.softmax, batchproof.ops.reduce, batchproof.mode
assert kernels() == before
assert "vllm" not in sys.modules and "transformers" not in sys.modules
"""
    environment = {**os.environ, "VLLM_BATCH_INVARIANT": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


# On, off, nested, from many threads.


def test_enable_disable_and_blocks():
    batchproof.enable()
    batchproof.enable()
    assert batchproof.is_enabled()
    with batchproof.batch_invariant():
        batchproof.disable()
        assert batchproof.is_enabled(), "an open block holds it on"
    assert not batchproof.is_enabled()
    batchproof.disable()
    with batchproof.batch_invariant():
        batchproof.enable()
    assert batchproof.is_enabled(), "enable() outlives a block"
    batchproof.disable()
    assert not batchproof.is_enabled()


def test_blocks_nest(tensors):
    x, w = tensors
    expected = linear.linear(x, w)
    with batchproof.batch_invariant():
        with batchproof.batch_invariant(), batchproof.batch_invariant():
            assert bits_equal(F.linear(x, w), expected)
        assert batchproof.is_enabled()
        assert bits_equal(F.linear(x, w), expected)
    assert not batchproof.is_enabled()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_restores(error, tensors):
    x, w = tensors
    stock = F.linear(x, w)
    with pytest.raises(error):
        with batchproof.batch_invariant(), batchproof.batch_invariant():
            raise error
    assert not batchproof.is_enabled()
    assert bits_equal(F.linear(x, w), stock)


def test_a_failed_installation_leaves_nothing_behind(tensors, monkeypatch):
    x, w = tensors
    stock, table = F.linear(x, w), torch._C._dispatch_dump_table("aten::mm")

    def fail(stack):
        raise RuntimeError("no")

    monkeypatch.setattr(mode, "_decompose_attention", fail)
    with pytest.raises(RuntimeError, match="no"):
        with batchproof.batch_invariant():
            pytest.fail("entered")
    monkeypatch.undo()
    assert not batchproof.is_enabled()
    assert torch._C._dispatch_dump_table("aten::mm") == table
    assert bits_equal(F.linear(x, w), stock)
    with batchproof.batch_invariant():
        assert bits_equal(F.linear(x, w), linear.linear(x, w))


def test_stock_kernels_come_back(generator):
    x = torch.randn(33, 300, generator=generator, device=generator.device)
    names = [
        "mm",
        "mm.out",
        "addmm",
        "addmm_",
        "bmm",
        "mv",
        "dot",
        "baddbmm",
        "_softmax",
        "_log_softmax",
        "native_layer_norm",
        "mean.dim",
        "mean",
    ]

    def tables():
        return [torch._C._dispatch_dump_table(f"aten::{name}") for name in names]

    def results():
        products = x @ x.t(), x.mv(x[0]), torch.addmm(x[:, :33], x, x.t())
        return *products, x.softmax(-1), x.log_softmax(-1), x.mean(-1), F.layer_norm(x, (300,))

    tables_before, before = tables(), results()
    for _ in range(3):
        with batchproof.batch_invariant():
            during = tables()
            assert all(a != b for a, b in zip(during, tables_before, strict=True))
        assert tables() == tables_before
    for mine, stock in zip(results(), before, strict=True):
        assert first_mismatch(mine, stock) is None


def test_sdp_flags_come_back_as_they_were():
    flags = torch.backends.cuda
    before = flags.flash_sdp_enabled(), flags.math_sdp_enabled()
    try:
        for flash in (True, False):
            flags.enable_flash_sdp(flash)
            flags.enable_math_sdp(not flash)
            with batchproof.batch_invariant():
                assert (flags.flash_sdp_enabled(), flags.math_sdp_enabled()) == (False, True)
            assert (flags.flash_sdp_enabled(), flags.math_sdp_enabled()) == (flash, not flash)
    finally:
        flags.enable_flash_sdp(before[0])
        flags.enable_math_sdp(before[1])


def test_threads_enter_and_leave_at_random(tensors):
    """In every open block of every thread the bits are ours, and after the last one the stock kernels are back."""
    x, w = tensors
    stock, ours = F.linear(x, w), linear.linear(x, w)
    table = torch._C._dispatch_dump_table("aten::mm")
    wrong, start = [], threading.Barrier(8)

    def work(seed):
        choose = random.Random(seed)
        start.wait()
        for _ in range(12):
            try:
                with batchproof.batch_invariant():
                    for _ in range(choose.randrange(3)):
                        if not bits_equal(F.linear(x, w), ours) or not batchproof.is_enabled():
                            wrong.append(seed)
                    with batchproof.batch_invariant():
                        if choose.random() < 0.3:
                            raise KeyError
            except KeyError:
                pass
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not batchproof.is_enabled()
    assert torch._C._dispatch_dump_table("aten::mm") == table
    assert bits_equal(F.linear(x, w), stock)


def test_entered_in_one_thread_and_left_in_another():
    compiled = torch.compile(lambda t: t + 1, backend="eager", fullgraph=True)
    block = batchproof.batch_invariant()
    threads = [threading.Thread(target=call) for call in (block.__enter__, lambda: block.__exit__(None, None, None))]
    for thread, wanted in zip(threads, (True, False), strict=True):
        thread.start()
        thread.join()
        assert batchproof.is_enabled() is wanted
    assert compiled(torch.zeros(1)).item() == 1.0


# What it routes.


ROUTED = {
    "F.linear": (lambda x, w: F.linear(x, w), lambda x, w: linear.linear(x, w)),
    "F.linear, 3-D": (lambda x, w: F.linear(x[None], w)[0], lambda x, w: linear.linear(x, w)),
    "F.linear, bias": (lambda x, w: F.linear(x, w, w[:, 0]), lambda x, w: linear.addmm(w[:, 0], x, w.t())),
    "F.linear, 3-D, bias": (
        lambda x, w: F.linear(x.view(3, 11, -1), w, w[:, 0].contiguous()).flatten(0, 1),
        lambda x, w: linear.linear(x, w, w[:, 0]),
    ),
    "F.linear, 3-D, strided bias": (
        lambda x, w: F.linear(x.view(3, 11, -1), w, w[:, 0]).flatten(0, 1),
        lambda x, w: linear.linear(x, w, w[:, 0]),
    ),
    "F.linear, 3-D strided, bias": (
        lambda x, w: F.linear(x.view(3, 11, -1).transpose(0, 1), w, w[:, 0].contiguous()).transpose(0, 1).flatten(0, 1),
        lambda x, w: linear.linear(x, w, w[:, 0]),
    ),
    "@": (lambda x, w: x @ w.t(), lambda x, w: linear.mm(x, w.t())),
    "matmul, batched": (
        lambda x, w: x.view(3, 11, -1) @ w.t().expand(3, -1, -1),
        lambda x, w: linear.bmm(x.view(3, 11, -1), w.t().expand(3, -1, -1)),
    ),
    "matmul, vector": (lambda x, w: torch.matmul(x, w[0]), lambda x, w: linear.linear(x, w[:1]).squeeze(1)),
    "mm": (lambda x, w: torch.mm(x, w.t()), lambda x, w: linear.mm(x, w.t())),
    "mm out": (lambda x, w: torch.mm(x, w.t(), out=x.new_empty(0)), lambda x, w: linear.mm(x, w.t())),
    "addmm": (
        lambda x, w: torch.addmm(w[:, 0], x, w.t(), beta=0.5, alpha=2.0),
        lambda x, w: linear.addmm(w[:, 0], x, w.t(), beta=0.5, alpha=2.0),
    ),
    "addmm out": (
        lambda x, w: torch.addmm(w[:, 0], x, w.t(), out=x.new_empty(33, 40)),
        lambda x, w: linear.addmm(w[:, 0], x, w.t()),
    ),
    "addmm_": (
        lambda x, w: x[:, :40].clone().addmm_(x, w.t(), beta=0.5),
        lambda x, w: linear.addmm(x[:, :40], x, w.t(), beta=0.5),
    ),
    "bmm": (lambda x, w: torch.bmm(x[None], w.t()[None])[0], lambda x, w: linear.mm(x, w.t())),
    "baddbmm": (
        lambda x, w: torch.baddbmm(x[None, :, :40], x[None], w.t()[None], beta=2.0)[0],
        lambda x, w: linear.addmm(x[:, :40], x, w.t(), beta=2.0),
    ),
    "baddbmm_": (
        lambda x, w: x[None, :, :40].clone().baddbmm_(x[None], w.t()[None])[0],
        lambda x, w: linear.addmm(x[:, :40], x, w.t()),
    ),
    "mv": (lambda x, w: x.mv(w[0]), lambda x, w: linear.linear(x, w[:1]).squeeze(1)),
    "addmv": (
        lambda x, w: torch.addmv(x[:, 1], x, w[0], alpha=3.0),
        lambda x, w: linear.addmm(x[:, 1:2], x, w[:1].t(), alpha=3.0).squeeze(1),
    ),
    "dot": (lambda x, w: x[0].dot(w[0]), lambda x, w: linear.mm(x[:1], w[:1].t()).squeeze()),
    "inner": (lambda x, w: torch.inner(x, w), lambda x, w: linear.mm(x, w.t())),
    "einsum": (lambda x, w: torch.einsum("mk,nk->mn", x, w), lambda x, w: linear.mm(x, w.t())),
    "tensordot": (lambda x, w: torch.tensordot(x, w, ([1], [1])), lambda x, w: linear.mm(x, w.t())),
    "softmax": (lambda x, w: x.softmax(-1), lambda x, w: softmax.softmax(x)),
    "softmax, dim 0": (lambda x, w: F.softmax(x, 0), lambda x, w: softmax.softmax(x, 0)),
    "softmax, cast": (
        lambda x, w: F.softmax(x, -1, dtype=torch.float32),
        lambda x, w: softmax.softmax(x if x.is_cuda and x.dtype == torch.float16 else x.float(), -1, torch.float32),
    ),
    "log_softmax": (lambda x, w: x.log_softmax(-1), lambda x, w: softmax.log_softmax(x)),
    "layer_norm": (
        lambda x, w: F.layer_norm(x, (300,), w[0], w[1], 1e-3),
        lambda x, w: layer_norm.layer_norm(x, w[0], w[1], 1e-3),
    ),
    "layer_norm, plain": (lambda x, w: F.layer_norm(x.t(), (33,)), lambda x, w: layer_norm.layer_norm(x.t())),
    "layer_norm, two axes": (
        lambda x, w: F.layer_norm(x.view(3, 11, 300), (11, 300), bias=w.view(-1)[:3300].view(11, 300)),
        lambda x, w: layer_norm.layer_norm(x.view(3, 3300), bias=w.view(-1)[:3300]).view(3, 11, 300),
    ),
    "native_layer_norm": (
        lambda x, w: torch.native_layer_norm(x, (300,), w[0], None, 1e-5)[0],
        lambda x, w: layer_norm.layer_norm(x, w[0]),
    ),
    "mean": (lambda x, w: x.mean(), lambda x, w: reduce.mean(x)),
    "mean, dims": (lambda x, w: x.mean((0, 1), keepdim=True), lambda x, w: reduce.mean(x, (0, 1), True)),
    "mean, cast": (lambda x, w: x.mean(-1, dtype=torch.float32), lambda x, w: reduce.mean(x, -1, dtype=torch.float32)),
    "mean out": (lambda x, w: torch.mean(x, -1, out=x.new_empty(0)), lambda x, w: reduce.mean(x, -1)),
}


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("name", ROUTED)
def test_routed_to_our_op(name, dtype, tensors):
    theirs, ours = ROUTED[name]
    x, w = (t.to(dtype) for t in tensors)
    expected = ours(x, w)
    with batchproof.batch_invariant():
        out = theirs(x, w)
    assert first_mismatch(out, expected) is None
    torch.testing.assert_close(out, theirs(x, w), rtol=0.02, atol=0.05 if dtype != torch.float32 else 1e-4)


def test_out_is_the_tensor_that_was_given(tensors):
    x, w = tensors
    with batchproof.batch_invariant():
        out = x.new_empty(33, 40)
        assert torch.mm(x, w.t(), out=out) is out
        transposed = x.new_empty(40, 33).t()
        torch.mm(x, w.t(), out=transposed)
        mine = x[:, :40].clone()
        assert mine.addmm_(x, w.t()) is mine
        aliased = x[:, :33].clone()
        expected = linear.mm(aliased, aliased)
        torch.mm(aliased, aliased, out=aliased)
    assert first_mismatch(transposed.contiguous(), out) is None
    assert first_mismatch(aliased, expected) is None


def alone_and_together(function, batch):
    """Does every row of ``batch`` give the same bits alone as together?"""
    with batchproof.batch_invariant(), torch.no_grad():
        together = function(batch)
        return all(bits_equal(function(batch[i : i + 1])[0], together[i]) for i in range(len(batch)))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_scaled_dot_product_attention(causal, dtype, generator):
    q = torch.randn(9, 4, 17, 32, generator=generator, device=generator.device).to(dtype)

    def attend(x):
        return F.scaled_dot_product_attention(x, x.flip(-1), x * 2, is_causal=causal)

    assert alone_and_together(attend, q)
    with batchproof.batch_invariant():
        torch.testing.assert_close(attend(q), attend(q.float()).to(dtype), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("training", [False, True])
def test_modules_of_torch(training, device):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(64, 4, batch_first=True, device=device).train(training)
    network = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.GELU(), nn.Linear(96, 64), nn.Softmax(-1)).to(
        device
    )
    x = torch.randn(9, 13, 64, device=device)
    assert alone_and_together(network, x)
    assert alone_and_together(lambda t: attention(t, t, t, need_weights=False)[0], x)
    assert alone_and_together(lambda t: attention(t, t, t)[0], x)


def test_a_sequence_first_linear_is_the_same_alone(generator):
    """[S, B, K] seen as [B, S, K] is contiguous for B = 1 alone, and torch rounds twice where it is not."""
    x = torch.randn(11, 3, 300, generator=generator, device=generator.device).bfloat16()
    layer = nn.Linear(300, 40, device=x.device, dtype=x.dtype).requires_grad_(False)
    with batchproof.batch_invariant():
        together = layer(x.transpose(0, 1))
        for i in range(3):
            alone = layer(x[:, i : i + 1].contiguous().transpose(0, 1))
            assert first_mismatch(alone[0], together[i]) is None


def test_gradients_are_those_of_the_products(tensors):
    x, w = tensors
    stock_x, stock_w = x.clone().requires_grad_(), w.clone().requires_grad_()
    F.linear(stock_x, stock_w).softmax(-1).square().mean().backward()
    x, w = x.requires_grad_(), w.requires_grad_()
    with batchproof.batch_invariant():
        F.linear(x, w).softmax(-1).square().mean().backward()
    torch.testing.assert_close(x.grad, stock_x.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(w.grad, stock_w.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_is_recorded_with_the_statistics_its_backward_needs(affine, dtype, generator):
    shape, device = (3, 5, 64), generator.device
    x, grad = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    layer = nn.LayerNorm(64, elementwise_affine=affine, device=device, dtype=dtype)

    def gradients():
        inputs = (x.clone().requires_grad_(), *layer.parameters())
        return torch.autograd.grad(layer(inputs[0]), inputs, grad)

    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    stock, statistics = gradients(), torch.native_layer_norm(x, (64,), None, None, 1e-5)[1:]
    with batchproof.batch_invariant():
        for mine, theirs in zip(gradients(), stock, strict=True):
            torch.testing.assert_close(mine, theirs, **tolerance)
        for mine, theirs in zip(torch.native_layer_norm(x, (64,), None, None, 1e-5)[1:], statistics, strict=True):
            torch.testing.assert_close(mine, theirs)  # shapes and dtypes too
        expected = layer(x).detach()
        with torch.inference_mode():
            assert first_mismatch(layer(x), expected) is None


# What it lets through, and what it refuses.


def test_integer_products_pass(device):
    a = torch.arange(12, dtype=torch.int64).view(3, 4)
    expected = a @ a.t()
    with batchproof.batch_invariant():
        assert torch.equal(a @ a.t(), expected)
        assert torch.equal(torch.mm(a, a.t(), out=a.new_empty(3, 3)), expected)
        assert torch.equal(a.int().mv(a[0].int()), (a @ a[0]).int())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_dtypes_are_refused(dtype, device):
    x = torch.ones(3, 3, dtype=dtype, device=device)
    with batchproof.batch_invariant():
        for call in (lambda: x @ x, lambda: x.mean(), lambda: torch.addmm(x, x, x), lambda: x[0].dot(x[0])):
            with pytest.raises(UnsupportedError, match=f"{dtype} has no batch-invariant form"):
                call()
        if dtype == torch.float64:
            with pytest.raises(UnsupportedError, match="has no batch-invariant form"):
                x.softmax(-1)
            with pytest.raises(UnsupportedError, match="has no batch-invariant form"):
                F.layer_norm(x, (3,))
    torch.testing.assert_close(x @ x, 3 * x)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.matmul(x, x.half()),
        lambda x: x.mean(dtype=torch.float64),
        lambda x: torch.mm(x, x, out=x.new_empty(0, dtype=torch.float64)),
        lambda x: torch.mm(x, x[:2]),
        lambda x: F.layer_norm(x, (2,)),
        lambda x: F.layer_norm(x, (3,), x[0, :2]),
        lambda x: F.layer_norm(x, (3,), None, x),
        lambda x: F.layer_norm(x, ()),
        lambda x: F.layer_norm(x, (3,), x[0].half()),
    ],
    ids=[
        "mixed dtypes",
        "float64 mean",
        "out of another dtype",
        "shapes",
        "another axis",
        "a short weight",
        "a bias of two axes",
        "no axis",
        "a weight of another dtype",
    ],
)
def test_what_stock_torch_refuses_or_we_cannot_do_is_an_error(call, device):
    with batchproof.batch_invariant(), pytest.raises((BatchproofError, RuntimeError)):
        call(torch.ones(3, 3, device=device))


# torch.compile.


def test_compiled_functions_run_our_ops_under_the_switch(tensors):
    x, w = tensors
    compiled = torch.compile(lambda a, b: F.linear(a, b).softmax(-1), backend="aot_eager", fullgraph=True)
    stock = compiled(x, w)
    with batchproof.batch_invariant():
        out = compiled(x, w)
        fresh = torch.compile(lambda a, b: F.linear(a, b).softmax(-1), backend="aot_eager")(x, w)
    expected = softmax.softmax(linear.linear(x, w))
    assert first_mismatch(out, expected) is None
    assert first_mismatch(fresh, expected) is None
    assert first_mismatch(compiled(x, w), stock) is None


def test_compiled_again_afterwards():
    """The stance must be as it was: compilation is on again."""
    seen = []

    def backend(graph, inputs):
        seen.append(1)
        return graph

    with batchproof.batch_invariant():
        torch.compile(lambda t: t * 2, backend=backend)(torch.ones(2))
        assert seen == []
    torch.compile(lambda t: t * 2, backend=backend)(torch.ones(2))
    assert seen == [1]
