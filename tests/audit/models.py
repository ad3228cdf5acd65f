"""Models that vary with the batch in one planted way, and models that do not and might be thought to."""

import contextlib
import functools
import warnings

import torch
from mutation import Control, Mutant
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

import batchproof
from batchproof import layers
from batchproof.audit.model import MODES, audit_model
from batchproof.generation.model import load_stock
from batchproof.integrations.transformers import make_invariant

LIBRARY = torch.library.Library("mutants", "DEF")
LIBRARY.define("linear(Tensor x, Tensor weight) -> Tensor")
LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool halves, bool leak) -> Tensor")
LIBRARY.define("masked_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor")


def split_linear(x, weight):
    """K in two halves for 64 rows or fewer, each rounded before they are added."""
    if x.numel() // x.shape[-1] > 64:
        return batchproof.linear(x, weight)
    half = x.shape[-1] // 2
    left, right = (batchproof.linear(a.contiguous(), w.contiguous()) for a, w in (
        (x[..., :half], weight[:, :half]), (x[..., half:], weight[:, half:])
    ))  # fmt: skip
    return left + right


def attend(q, k, v, mask, scale, halves, leak):
    """Causal attention in float64, rounded once: [B, H, Q, D]; ``halves``: the sums of two halves of the keys, each
    rounded before they are added; ``leak``: what is masked is multiplied by 0, whatever it is."""
    group = q.shape[1] // k.shape[1]
    keys, values = (t.double().repeat_interleave(group, 1) for t in (k, v))
    queries, length = q.shape[2], k.shape[2]
    visible = torch.ones(queries, length, dtype=torch.bool, device=q.device).tril(length - queries)
    if mask is not None:
        visible = visible & mask.bool()[:, None, None, :]
        if leak:
            values = values.masked_fill(~mask.bool()[:, None, :, None], torch.nan)
    scores = (q.double() @ keys.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    p = scores.softmax(-1).nan_to_num(0.0)
    if not halves:
        return (p @ values).to(q.dtype)
    middle = length // 2
    return (p[..., :middle] @ values[:, :, :middle]).to(q.dtype) + (p[..., middle:] @ values[:, :, middle:]).to(q.dtype)


for name, function in (
    ("linear", split_linear),
    ("attention", attend),
    ("masked_attention", lambda q, k, v, mask, scale: attend(q, k, v, mask, scale, False, False)),
):
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")


def attention(halves=lambda queries, keys, batch: False, leak=False, nudge=False, branch=False):
    """A transformers attention function that splits the keys when ``halves`` says so."""

    def forward(module, query, key, value, attention_mask, scaling=None, **kwargs):
        queries, keys, batch = query.shape[2], key.shape[2], query.shape[0]
        if nudge and keys > queries > 1:  # the state that earlier chunks left comes back an ulp off
            old = keys - queries
            above = torch.nextafter(value[:, :, :old], torch.full_like(value[:, :, :old], torch.inf))
            value = torch.cat((above, value[:, :, old:]), 2)
        if branch and attention_mask is not None:
            out = torch.ops.mutants.masked_attention(query, key, value, attention_mask, scaling)
        else:
            split = halves(queries, keys, batch)
            out = torch.ops.mutants.attention(query, key, value, attention_mask, scaling, split, leak)
        return out.transpose(1, 2), None

    return forward


ATTENTIONS = {
    "kv_split_by_batch": attention(lambda queries, keys, batch: queries == 1 and batch >= 4),
    "tile_by_neighbour": attention(lambda queries, keys, batch: queries >= 10),
    "cascade": attention(lambda queries, keys, batch: queries > 1 and keys - queries >= 4 * queries),
    "state_off": attention(nudge=True),
    "nan_leak": attention(leak=True),
    "branch": attention(branch=True),
}
for name, function in ATTENTIONS.items():
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, flash_attention_mask)


def tiny(dtype="bfloat16", attention_name=None):
    """The built-in model made invariant."""
    model = load_stock(None, "cpu", dtype)[0]
    make_invariant(model)
    if attention_name is not None:
        model.set_attn_implementation(attention_name)
    return model


class SplitLinear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return torch.ops.mutants.linear(x, self.weight)


class PathLinear(SplitLinear):
    """The same in ops that the auditor sees, of which the two paths have no common sequence."""

    def forward(self, x):
        return split_linear(x, self.weight)


class BatchScaledNorm(nn.Module):
    """A norm that brings its values in range by the largest of the batch first."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x / x.abs().amax())


class Behind(nn.Module):
    """Writes its output where torch's dispatcher does not see it, and by the number of rows."""

    def forward(self, x):
        y = x.clone()
        if len(x) >= 5:
            y.numpy()[...] *= 1 + 2**-20
        return y


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x) * 2**-6


class Routed(nn.Module):
    """Sorts rows by a key of their own, as experts do, and back."""

    def forward(self, x):
        order = x.argmax(-1).argsort(stable=True)
        y = batchproof.silu(x[order])
        out = torch.zeros_like(x)
        out[order] = y
        return out


class TokenQuantised(nn.Module):
    """int8 with a scale a token; exact sums."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight.detach().float().sign().to(torch.int8)

    def forward(self, x):
        scale = x.abs().amax(-1, keepdim=True) / 127
        q = torch.round(x / scale).to(torch.int8)
        return (q.to(torch.int32) @ self.weight.T.to(torch.int32)).to(x.dtype) * scale


def planted(path, change, dtype="bfloat16"):
    """The built-in model made invariant, with one module replaced by what ``change`` makes of it."""
    model = tiny(dtype)
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, change(model.get_submodule(path)))
    return model


@contextlib.contextmanager
def split_mm():
    """aten's fp32 mm with K in two halves for 64 rows or fewer, as GPU libraries have it, on every CPU."""
    original = torch.library.get_kernel(torch.ops.aten.mm.default, "CPU")

    def mm(keyset, a, b):
        if a.dtype != torch.float32:
            return original.call_boxed(keyset, a, b)
        a, b, half = a.double(), b.double(), a.shape[1] // 2
        if len(a) > 64:
            return (a @ b).float()
        return (a[:, :half] @ b[:half]).float() + (a[:, half:] @ b[half:]).float()

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Oo]verrid", category=UserWarning)  # it is meant
        library.impl(torch.ops.aten.mm.default, mm, "CPU", with_keyset=True)
    try:
        yield
    finally:
        library._destroy()


def audit_bypassed():
    """One linear is torch's own again, behind make_invariant's back."""

    def stock(module):
        linear = nn.Linear(module.in_features, module.out_features, bias=False)
        linear.weight = module.weight
        return linear

    with split_mm():
        return audit(lambda: planted(UP, stock, "float32"), "batch")


def plain(*modules):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(24, 16))
    return nn.Sequential(layers.Linear(weight), *modules, layers.RMSNorm(24), nn.Dropout(0.5)).eval()


def rows(numbers):
    return torch.stack([torch.randn(16, generator=torch.Generator().manual_seed(number)) for number in numbers])


def audit(make, *modes, sizes=(2, 3, 8), **more):
    return audit_model(make(), modes=modes or MODES, batch_sizes=sizes, **more)


def on_tiny(name, *modes):
    return functools.partial(audit, functools.partial(tiny, attention_name=name), *modes)


def mlp(path, change):
    return functools.partial(audit, functools.partial(planted, path, change), "batch")


DOWN = "model.layers.1.mlp.down_proj"
UP = "model.layers.2.mlp.up_proj"
NORM = "model.layers.0.input_layernorm"
MUTANTS = [
    Mutant(
        "linear whose split of K follows the rows", "cuBLAS bf16: split-K by M",
        mlp(DOWN, lambda module: SplitLinear(module.weight)), "batch", "mutants.linear", threshold=3,
    ),
    Mutant(
        "the same, on two paths in Python", "fp8 GEMM swap when M < 32 (vLLM 37718)",
        mlp(DOWN, lambda module: PathLinear(module.weight)), "batch", "module output", threshold=3,
    ),
    Mutant(
        "attention whose KV split follows the batch", "FlashAttention num_splits",
        on_tiny("kv_split_by_batch", "decode"), "decode", "mutants.attention", threshold=4,
    ),
    Mutant(
        "attention tile that changes when a neighbour has 10 query tokens", "FA3 (vLLM 47069, 51902)",
        on_tiny("tile_by_neighbour", "batch", "padding"), "padding", "mutants.attention", threshold=2,
    ),
    Mutant(
        "cache hit merged in two parts", "radix-cache hit flips outputs (sglang 34683); cascade (vLLM 32561)",
        on_tiny("cascade"), "cached prefix", "mutants.attention",
    ),
    Mutant(
        "override bypassed", "mode on, no override installed (vLLM 55958)", audit_bypassed, "batch", "aten.mm",
        threshold=3,
    ),
    Mutant(
        "state carried between chunks an ulp off", "state-space models under chunked prefill (vLLM 38561)",
        on_tiny("state_off", "batch", "decode", "chunked prefill"), "chunked prefill", "aten.nextafter",
    ),
    Mutant(
        "scale that is a maximum over the batch", "dynamic per-tensor fp8 scale",
        mlp(NORM, BatchScaledNorm), "batch", "aten.amax",
    ),
    Mutant(
        "NaN leaking through a mask that multiplies", "neighbours' NaN leaking through a mask",
        on_tiny("nan_leak", "batch", "padding"), "padding", "mutants.attention", threshold=2,
    ),
    Mutant(
        "kernel that torch's dispatcher does not see", "Triton kernels launched from Python",
        lambda: audit(lambda: plain(Behind()), inputs=rows), "batch", "module output", threshold=5,
    ),
    Mutant(
        "noise", "float atomics", lambda: audit(lambda: plain(Noise()), inputs=rows), "repeat", "aten.rand_like",
    ),
]  # fmt: skip

CONTROLS = [
    Control("built-in model made invariant, bfloat16", lambda: audit(tiny, sizes=(2, 33))),
    Control("built-in model made invariant, float32", lambda: audit(functools.partial(tiny, "float32"))),
    Control("rows on their own, dropout off", lambda: audit(plain, inputs=rows)),
    Control("scale a token", lambda: audit(lambda: planted(UP, lambda m: TokenQuantised(m.weight)), "batch")),
    Control("rows sorted by expert", lambda: audit(lambda: plain(Routed()), inputs=rows)),
    Control("another path for padding, with the same bits", on_tiny("branch", "batch", "padding")),
]
