"""make_invariant: what it swaps, what it refuses, and whole models whose logits do not depend on the batch."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, DynamicCache  # noqa: E402

from batchproof import layers  # noqa: E402
from batchproof.errors import NotInvariantError, UnsupportedError  # noqa: E402
from batchproof.generation.model import load_stock  # noqa: E402
from batchproof.integrations.transformers import attention, make_invariant  # noqa: E402
from batchproof.numerics import first_mismatch  # noqa: E402

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYERS = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16, "layer_types": LAYERS},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 16, "layer_types": LAYERS},
}
DTYPES = [torch.float32, torch.bfloat16]


def build(family, dtype=torch.float32, device="cpu", **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # far from the initial ones: logits that tell tokens apart, norms that scale
        parameter.data.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.5))
    return model.to(device, dtype)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def models():
    """Invariant models by family, dtype and device: built once, never changed."""
    kept = {}

    def get(family, dtype, device):
        key = (family, dtype, device.type)
        if key not in kept:
            model = (
                load_stock(None, str(device), str(dtype)[6:])[0]
                if family == "built-in"
                else build(family, dtype, device)
            )
            make_invariant(model)
            kept[key] = model
        return kept[key]

    return get


def tokens(count, device, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (1, count), generator=generator).to(device)


# What it does to a model.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_close_to_stock(family, dtype, device):
    stock = build(family, dtype, device)
    stock.set_attn_implementation("eager")  # the one that applies the soft cap
    model = copy.deepcopy(stock)
    make_invariant(model)
    ids = tokens(40, device)
    theirs, mine = stock(ids).logits.float(), model(ids).logits.float()
    scale = theirs.abs().max().item()
    error = (mine - theirs).abs().max().item() / scale
    assert error < (2e-5 if dtype == torch.float32 else 0.04)
    if dtype == torch.bfloat16:  # no further from the truth than stock is, give or take
        truth = stock.float()(ids).logits
        assert (mine - truth).abs().mean() < 1.5 * (theirs - truth).abs().mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_report_lists_what_was_swapped(family, device):
    model = build(family, device=device)
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    norms = {name for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")}
    report = make_invariant(model)
    assert set(report.swapped["Linear"]) == linears
    assert set(report.swapped["RMSNorm"]) == norms
    assert len(report.swapped["RotaryTable"]) == 1
    assert sum(len(report.swapped.get(kind, ())) for kind in ("SiLU", "GELUTanh")) >= 1
    assert report.allowed == ()
    assert f"{len(linears):4d} x Linear" in str(report)
    assert "attention: batchproof" in str(report)
    for names in report.swapped.values():
        assert all(type(model.get_submodule(name)).__module__ == layers.__name__ for name in names)
    everything = {type(m) for m in model.modules()}
    assert not everything & {nn.Linear, nn.SiLU}
    assert "lm_head" in report.swapped["Linear"]
    assert isinstance(model.lm_head, layers.Linear)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_shared_and_the_state_dict_is_the_same(family, device):
    model = build(family, device=device)
    before = dict(model.named_parameters())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    make_invariant(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    assert tied is bool(model.config.tie_word_embeddings)
    assert list(model.state_dict()) == list(state)
    assert all(first_mismatch(t, state[name]) is None for name, t in model.state_dict().items())
    model.load_state_dict(state)


@pytest.mark.parametrize("family", FAMILIES)
def test_twice_is_once(family, device):
    model = build(family, device=device)
    make_invariant(model)
    ids = tokens(12, device)
    modules, logits = dict(model.named_modules()), model(ids).logits
    assert make_invariant(model).swapped == {}
    assert dict(model.named_modules()) == modules
    assert first_mismatch(model(ids).logits, logits) is None


class Stranger(nn.Module):
    """Centres over the batch."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x - 0.0 * x.mean(0, keepdim=True))


def test_a_stranger_is_refused_by_name_and_the_model_left_alone(device):
    model = build("llama", device=device)
    model.model.layers[1].mlp.down_proj = Stranger(model.model.layers[1].mlp.down_proj)
    model.model.layers[0].post_attention_layernorm = nn.LayerNorm(64).to(device)
    modules, implementation = dict(model.named_modules()), model.config._attn_implementation
    with pytest.raises(NotInvariantError) as error:
        make_invariant(model)
    assert "model.layers.1.mlp.down_proj" in str(error.value)
    assert "Stranger" in str(error.value)
    assert "model.layers.0.post_attention_layernorm (torch.nn.modules.normalization.LayerNorm)" in str(error.value)
    assert dict(model.named_modules()) == modules
    assert model.config._attn_implementation == implementation
    with pytest.raises(NotInvariantError, match="post_attention_layernorm") as error:
        make_invariant(model, allow=["model.layers.1.mlp.down_proj"])
    assert "down_proj" not in str(error.value)


def test_a_stranger_is_allowed_by_name(device):
    model = build("llama", device=device)
    model.model.layers[1].mlp.down_proj = Stranger(model.model.layers[1].mlp.down_proj)
    report = make_invariant(model, allow=["model.layers.1.mlp.down_proj"])
    assert report.allowed == ("model.layers.1.mlp.down_proj",)
    assert "not vouched for, allowed by name: model.layers.1.mlp.down_proj" in str(report)
    assert model(tokens(5, device)).logits.isfinite().all()


def test_a_subclass_of_a_known_module_is_a_stranger(device):
    class Linear(nn.Linear):
        pass

    class LlamaRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(64)), 1e-6

    for name, module in (("self_attn.q_proj", Linear(64, 64)), ("input_layernorm", LlamaRMSNorm())):
        model = build("llama", device=device)
        model.model.layers[0].set_submodule(name, module)
        with pytest.raises(NotInvariantError, match=f"model.layers.0.{name}"):
            make_invariant(model)


def test_other_families_are_refused(device):
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCAB)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(NotInvariantError, match="GPT2"):
        make_invariant(model)


def test_rope_that_follows_the_batch_is_refused(device):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(NotInvariantError, match="rotary_emb"):
        make_invariant(build("llama", device=device, rope_parameters=rope))


def test_training_mode_and_unknown_names_are_refused(device):
    model = build("llama", device=device)
    with pytest.raises(UnsupportedError, match=r"training mode.*call model.eval\(\)"):
        make_invariant(model.train())
    with pytest.raises(UnsupportedError, match=r"allow names model\.nothing"):
        make_invariant(model.eval(), allow=["model.nothing"])
    assert type(model.lm_head) is nn.Linear


def test_a_mask_with_holes_is_refused(models, device):
    mask = torch.ones(1, 6, dtype=torch.int64, device=device)
    mask[0, 3] = 0
    with pytest.raises(UnsupportedError, match="mask with holes"):
        models("llama", torch.float32, device)(tokens(6, device), attention_mask=mask)


# Whole models, in bits.

WHOLE = [*[(family, dtype) for family in FAMILIES for dtype in DTYPES], *[("built-in", dtype) for dtype in DTYPES]]


def chunked(model, ids, sizes):
    """The logits of ``ids`` [1, T] given in chunks to one cache."""
    cache, out, start = DynamicCache(config=model.config), [], 0
    for size in sizes:
        out.append(model(ids[:, start : start + size], past_key_values=cache, use_cache=True).logits)
        start += size
    assert start == ids.shape[1]
    return torch.cat(out, dim=1)


@pytest.mark.parametrize(("family", "dtype"), WHOLE)
def test_prefill_at_once_in_chunks_and_token_by_token(family, dtype, models, device):
    model, ids = models(family, dtype, device), tokens(21, device)
    whole = model(ids).logits
    for sizes in ([8, 13], [1, 19, 1], [5, 7, 9], [1] * 21):
        assert first_mismatch(chunked(model, ids, sizes), whole) is None, f"in chunks of {sizes}"
    assert first_mismatch(model(ids[:, :14]).logits, whole[:, :14]) is None, "what follows does not show"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("with_positions", [True, False])
@pytest.mark.parametrize(("family", "dtype"), WHOLE)
def test_alone_and_among_others_in_a_padded_batch(family, dtype, with_positions, side, models, device):
    if side == "left" and not with_positions:
        pytest.skip("left padding moves the positions, and so the logits, unless they are given")
    model = models(family, dtype, device)
    prompts = [tokens(n, device, seed=n)[0] for n in (7, 1, 30, 12, 23)]
    width = max(map(len, prompts))
    pads = [(width - len(p), 0) if side == "left" else (0, width - len(p)) for p in prompts]
    ids = torch.stack([nn.functional.pad(p, pad) for p, pad in zip(prompts, pads, strict=True)])
    mask = torch.stack([nn.functional.pad(torch.ones_like(p), pad) for p, pad in zip(prompts, pads, strict=True)])
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if with_positions else {}
    logits = model(ids, attention_mask=mask, **positions).logits
    for row, prompt in enumerate(prompts):
        alone = model(prompt[None]).logits[0]
        assert first_mismatch(logits[row][mask[row].bool()], alone) is None, f"prompt {row}"
    two = model(ids[[2, 0]], attention_mask=mask[[2, 0]], **{k: v[[2, 0]] for k, v in positions.items()}).logits
    assert first_mismatch(two[0][mask[2].bool()], logits[2][mask[2].bool()]) is None


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "built-in"])
def test_greedy_generation_in_batches_is_that_alone(family, models, device):
    model = models(family, torch.bfloat16, device)
    prompts = [tokens(n, device, seed=n)[0] for n in (3, 9, 1, 14)]
    options = {"max_new_tokens": 16, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= {"pad_token_id": 0, "eos_token_id": None}
    width = max(map(len, prompts))
    ids = torch.stack([nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    mask = torch.stack([nn.functional.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts])
    together = model.generate(ids, attention_mask=mask, **options)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **options)
        assert torch.equal(alone.sequences[0, len(prompt) :], together.sequences[row, width:])
        for step, (mine, theirs) in enumerate(zip(alone.logits, together.logits, strict=True)):
            assert first_mismatch(mine[0], theirs[row]) is None, f"prompt {row}, step {step}"


def test_stock_logits_do_change(device):
    """The control: the same comparison on the stock built-in model finds differences, so it can find them in ours."""
    model, _ = load_stock(None, str(device), "float32")
    prompts = torch.cat([tokens(24, device, seed=s) for s in range(33)])
    differ = 0
    for length in (1, 3, 24):
        together = model(prompts[:, :length]).logits
        alone = [model(prompts[i : i + 1, :length]).logits[0] for i in range(33)]
        differ += sum(first_mismatch(a, b) is not None for a, b in zip(alone, together, strict=True))
    assert differ > 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("explicit", [True, False])
def test_padding_does_not_move_a_sequence_off_its_absolute_positions(side, explicit, monkeypatch, device):
    """Tiles lie at absolute positions: a window's k_start must be that of the sequence, not of its padding."""
    if side == "left" and not explicit:
        pytest.skip("left padding moves the positions unless they are given")
    seen = {}

    def record(q, *caches, **arguments):
        seen.update(arguments)
        return torch.zeros_like(q)

    monkeypatch.setattr(attention, "paged_attention", record)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], device=device)
    mask = mask.flip(1) if side == "left" else mask
    positions = (mask.cumsum(-1) - 1).clamp_min(0) if explicit else torch.arange(5, device=device)[None]
    q, kv = torch.zeros(2, 4, 5, 16, device=device), torch.zeros(2, 2, 5, 16, device=device)
    module = SimpleNamespace(is_causal=True)
    attention._padded_attention(module, q, kv, kv, mask, sliding_window=4, position_ids=positions)
    k_start = seen["k_start"]
    assert k_start is None or k_start.tolist() == [0, 0]
    assert seen["seqused_k"].tolist() == [3, 5]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_are_those_of_gpt_oss(dtype):
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 16, generator=generator).to(dtype) for heads in (4, 2, 2))
    sinks = torch.tensor([-1.0, 0.5, 3.0, 20.0], dtype=dtype)
    module = SimpleNamespace(sinks=sinks, num_key_value_groups=2, training=False, is_causal=True)
    hidden = torch.full((9, 9), torch.finfo(dtype).min, dtype=dtype).triu(1)
    expected, _ = eager_attention_forward(module, q, k, v, hidden, 0.25)
    out, _ = attention._padded_attention(module, q, k, v, None, scaling=0.25, s_aux=sinks)
    torch.testing.assert_close(out, expected, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=0.02)
    alone, _ = attention._padded_attention(module, q[1:, :, -1:], k[1:], v[1:], None, scaling=0.25, s_aux=sinks)
    assert first_mismatch(alone[0], out[1, -1:]) is None
