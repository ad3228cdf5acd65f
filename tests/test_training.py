"""Training with the norms: autograd and the compiler over them; nets learn what they learn with stock norms."""

import pytest
import torch
from torch import nn

import batchproof
from batchproof.errors import LayoutError, UnsupportedError
from batchproof.numerics import first_mismatch
from batchproof.ops._library import FLOAT_DTYPES
from batchproof.ops.rms_norm import add_rms_norm, fused_add_rms_norm, rms_norm
from batchproof.ops.rms_norm_backward import rms_norm_backward

FORMS = [
    pytest.param(False, True, id="llama"),
    pytest.param(True, True, id="gemma"),
    pytest.param(False, False, id="unweighted"),
]


def randn(generator, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)


def leaves(generator, *shapes, dtype=torch.float32):
    return [randn(generator, *shape, dtype=dtype).requires_grad_() for shape in shapes]


def in_place(x, residual, *rest, **form):
    """The in-place norm over tensors that were computed."""
    return fused_add_rms_norm(x * 1, residual * 1, *rest, **form)


def assert_same(found, wanted):
    for i, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert (mine is None) == (theirs is None), i
        assert mine is None or first_mismatch(mine, theirs) is None, f"{i}: {first_mismatch(mine, theirs)}"


# What autograd may ask.


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("gemma", "weighted"), FORMS)
def test_autograd_has_the_bits_of_the_op(gemma, weighted, dtype, generator):
    x, residual, scale = leaves(generator, (5, 100), (5, 100), (100,), dtype=dtype)
    grads = [randn(generator, 5, 100, dtype=dtype) for _ in range(2)]
    weight, wanted_of = (scale, (x, residual, scale)) if weighted else (None, (x, residual))
    frozen = scale.detach() if weighted else None
    out = rms_norm(x, weight, gemma=gemma)
    wanted = rms_norm_backward(grads[0], None, x.detach(), frozen, gemma=gemma)[: 1 + weighted]
    assert_same(torch.autograd.grad(out, wanted_of[::2], grads[0]), wanted)
    for op in (add_rms_norm, in_place):
        outputs = op(x, residual, weight, gemma=gemma)
        grad_x, grad_weight = rms_norm_backward(*grads, outputs[1].detach(), frozen, gemma=gemma)
        assert_same(torch.autograd.grad(outputs, wanted_of, grads), (grad_x, grad_x, grad_weight)[: 2 + weighted])


@pytest.mark.parametrize("op", [add_rms_norm, in_place])
def test_outputs_and_inputs_that_nobody_asks_about(op, generator):
    x, residual, weight = leaves(generator, (3, 8), (3, 8), (8,))
    grad = randn(generator, 3, 8)
    (only_out,) = torch.autograd.grad(op(x, residual, weight)[0], x, grad)
    total = (x + residual).detach()
    assert_same((only_out,), rms_norm_backward(grad, None, total, weight.detach())[:1])
    of_sum = torch.autograd.grad(op(x, residual, weight)[1], (x, residual, weight), grad, allow_unused=True)
    assert_same(of_sum[:2], (grad, grad))
    assert of_sum[2] is None or not of_sum[2].any()
    (frozen,) = torch.autograd.grad(op(x, residual, weight.detach())[0], residual, grad)
    assert first_mismatch(frozen, only_out) is None
    out, total = op(x.detach(), residual.detach(), weight)
    assert_same(
        torch.autograd.grad(out, weight, grad), rms_norm_backward(grad, None, total.detach(), weight.detach())[1:]
    )


def test_nothing_is_recorded_where_nothing_is_asked(generator):
    x, residual, weight = leaves(generator, (3, 8), (3, 8), (8,))
    expected = rms_norm(x, weight).detach()
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            out = rms_norm(x, weight)
            outs = [out, *add_rms_norm(x, residual, weight), *fused_add_rms_norm(x.clone(), residual.clone(), weight)]
            assert not any(t.requires_grad for t in outs)
            assert first_mismatch(out, expected) is None
    assert not rms_norm(x.detach(), weight.detach()).requires_grad


@pytest.mark.parametrize("op", [lambda x, r, w: rms_norm(x, w), add_rms_norm, in_place])
def test_a_second_derivative_is_refused(op, generator):
    x, residual, weight = leaves(generator, (3, 8), (3, 8), (8,))
    outputs = op(x, residual, weight)
    out = outputs[0] if isinstance(outputs, tuple) else outputs
    (grad_x,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="no derivative of its own"):
        grad_x.sum().backward()


def test_what_is_overwritten_must_have_been_computed(generator):
    x, residual, weight = leaves(generator, (3, 8), (3, 8), (8,))
    kept, kept_residual = x.detach().clone(), residual.detach().clone()
    cases = [
        (UnsupportedError, "x is overwritten, but it is a leaf", (x, residual * 1)),
        (UnsupportedError, "residual is overwritten, but it is a leaf", (x * 1, residual)),
        (UnsupportedError, "x is overwritten, but it is a leaf that requires grad or a view", (x[:], residual * 1)),
        (LayoutError, "overlap", ((both := x * 1), both)),
    ]
    for error, match, arguments in cases:
        with pytest.raises(error, match=match):
            fused_add_rms_norm(*arguments, weight)
    assert first_mismatch(x.detach(), kept) is None
    assert first_mismatch(residual.detach(), kept_residual) is None


def test_in_place_norms_in_a_row_have_the_gradients_of_functional_ones(generator):
    """Each norm writes over the residual that the norm before it has normalised."""
    x, residual, *weights = leaves(generator, (4, 64), (4, 64), (64,), (64,), (64,))
    grads = [randn(generator, 4, 64) for _ in range(2)]

    def chain(op, x, residual):
        for weight in weights:
            x, residual = op(x * 3, residual, weight)
        return x, residual

    computed = residual * 1
    outputs = chain(fused_add_rms_norm, x, computed)
    assert outputs[1] is computed, "over the residual"
    wanted = chain(add_rms_norm, x, residual)
    assert_same(outputs, wanted)
    inputs = (x, residual, *weights)
    assert_same(torch.autograd.grad(outputs, inputs, grads), torch.autograd.grad(wanted, inputs, grads))


def test_a_written_input_is_seen(generator):
    x, weight = leaves(generator, (3, 8), (8,))
    computed = x * 1
    out = rms_norm(computed, weight)
    computed += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# The dispatcher and the compiler.


@pytest.mark.parametrize(("gemma", "weighted"), FORMS)
def test_registered_gradients(gemma, weighted, generator):
    x, residual, scale = leaves(generator, (4, 24), (4, 24), (24,))
    weight = scale if weighted else None
    torch.library.opcheck(torch.ops.batchproof.rms_norm.default, (x, weight, 1e-6, gemma))
    torch.library.opcheck(torch.ops.batchproof.add_rms_norm.default, (x, residual, weight, 1e-6, gemma))


def step(compile_with, op, inputs, grads, gemma):
    """Outputs and gradients of a block of norms and exact products, compiled or not."""

    def block(x, residual, weight):
        normed, residual = op(x * 2, residual, weight, gemma=gemma)
        return rms_norm(normed * 0.5, weight, gemma=gemma), residual

    run = torch.compile(block, backend=compile_with, fullgraph=True) if compile_with else block
    outputs = run(*inputs)
    return (*outputs, *torch.autograd.grad(outputs, inputs, grads))


BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", [add_rms_norm, in_place])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_step_has_the_bits_of_eager(backend, op, dtype, generator):
    torch._dynamo.reset()
    for rows in (1, 5, 40):
        inputs = leaves(generator, (rows, 64), (rows, 64), (64,), dtype=dtype)
        grads = [randn(generator, rows, 64, dtype=dtype) for _ in range(2)]
        eager = step(None, op, inputs, grads, gemma=rows == 5)
        compiled = step(backend, op, inputs, grads, gemma=rows == 5)
        assert_same(compiled, eager)


def test_compiled_without_gradients_after_training(generator):
    """One function, recorded and not: the compiler has to tell them apart."""
    x, weight = leaves(generator, (3, 64), (64,))
    compiled = torch.compile(lambda x, w: rms_norm(x, w), backend="aot_eager", fullgraph=True)
    recorded = compiled(x, weight)
    assert recorded.requires_grad
    with torch.no_grad():
        assert_same((compiled(x, weight),), (recorded.detach(),))
    with torch.inference_mode():
        assert_same((compiled(x, weight),), (recorded.detach(),))


# Nets.


class Block(nn.Module):
    """A pre-norm MLP; ``norm(x)`` and ``norm(x, residual)`` as batchproof's and vLLM's layer have them."""

    def __init__(self, norms):
        super().__init__()
        self.norms = nn.ModuleList(norms)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        residual = x * 1
        out = self.down(self.up(self.norms[0](x)).relu())
        out, _ = self.norms[1](out, residual)
        return out


class Stock(batchproof.RMSNorm):
    """The same formula in plain torch."""

    def forward(self, x, residual=None):
        total = x if residual is None else x + residual
        y = (total * torch.rsqrt(total.square().mean(-1, keepdim=True) + self.eps)) * (self.weight + self.gemma)
        return y if residual is None else (y, total)


def trained(kind, gemma, x, target):
    torch.manual_seed(0)
    net = Block([kind(32, 1e-5, gemma=gemma) for _ in range(2)]).to(x.device)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = (net(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("gemma", [False, True])
def test_a_net_learns_what_it_learns_with_stock_norms(gemma, generator):
    x, target = randn(generator, 200, 32), randn(generator, 200, 32)
    losses, parameters = trained(batchproof.RMSNorm, gemma, x, target)
    stock_losses, stock_parameters = trained(Stock, gemma, x, target)
    assert losses[-1] < losses[0] * 0.9
    torch.testing.assert_close(losses, stock_losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parameters, stock_parameters, rtol=1e-3, atol=1e-5)
    again, same = trained(batchproof.RMSNorm, gemma, x, target)
    assert again == losses
    assert_same(same, parameters)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_a_transformers_model_trains_with_its_norms_swapped(family, device):
    """``make_invariant`` swaps linear layers and attention too, and those have no backward pass: norms alone here."""
    transformers = pytest.importorskip("transformers")
    from batchproof.integrations.transformers.swap import _replacement

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model(
        family, num_hidden_layers=2, vocab_size=100, head_dim=8, max_position_embeddings=64, **sizes
    )
    model = transformers.AutoModelForCausalLM.from_config(config).to(device)
    ids = torch.randint(100, (2, 20), device=device)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    stock = gradients()
    norms = {name: module for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")}
    for name, module in norms.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _replacement(module))
    assert len(norms) >= 5
    mine = gradients()
    assert all(mine[f"{name}.weight"].any() for name in norms)
    for name, gradient in stock.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_a_model_that_cannot_train_says_so(device):
    """The ops without a backward pass refuse by name, rather than give a gradient that is none."""
    layer = nn.Sequential(batchproof.RMSNorm(16), batchproof.layers.Linear(nn.Parameter(torch.randn(4, 16)))).to(device)
    with pytest.raises(UnsupportedError, match="linear has no backward pass"):
        layer(torch.randn(2, 16, device=device))
    layer[0](torch.randn(2, 16, device=device)).sum().backward()
    assert layer[0].weight.grad.any()


def test_a_backward_pass_notices_what_the_in_place_norm_overwrote(generator):
    """On a GPU the kernel writes past autograd's back: versions have to be counted by hand."""
    weight = torch.ones(8, device=generator.device, requires_grad=True)
    x, residual = (torch.randn(2, 8, generator=generator, device=generator.device) for _ in range(2))
    product = weight * x  # keeps x for its backward pass
    fused_add_rms_norm(x, residual, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        fused_add_rms_norm(x.clone(), residual.clone(), None)  # tensors that have no version to count
