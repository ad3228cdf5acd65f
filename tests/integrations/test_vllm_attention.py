"""vLLM's attention over ours: which calls are taken, with what arguments, and what is left to vLLM."""

import dataclasses
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from batchproof.integrations.vllm import hooks, log
from batchproof.integrations.vllm.attention import NEUTRAL, OF_IMPL, OF_STEP, attention_over_ours, forward_over_ours
from batchproof.integrations.vllm.attention_hooks import triton_first
from batchproof.integrations.vllm.hooks import HOOKS
from batchproof.numerics import first_mismatch
from batchproof.ops._quantize import quantize_static_fp8_reference
from batchproof.ops.attention import FP8, launch

HOOK = next(hook for hook in HOOKS if hook.name == "attention")
PAGE, HEADS, KV_HEADS, HEAD_DIM = 16, 4, 2, 16


@pytest.fixture
def call():
    """The arguments of vLLM's ``unified_attention``: one query of 20 keys and two of 3, in a cache as vLLM lays it."""
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(4, KV_HEADS, PAGE, 2 * HEAD_DIM, generator=generator).transpose(1, 2)
    k, v = cache.split(HEAD_DIM, dim=-1)
    q = torch.randn(3, HEADS, HEAD_DIM, generator=generator)
    scale = torch.ones(2, KV_HEADS)
    return {
        "q": q, "k": k, "v": v, "out": torch.full_like(q, float("nan")), "cu_seqlens_q": torch.tensor([0, 1, 3]),
        "max_seqlen_q": 2, "seqused_k": torch.tensor([20, 3]), "max_seqlen_k": 20, "softmax_scale": 0.25,
        "causal": True, "window_size": (-1, -1), "block_table": torch.tensor([[2, 0], [3, 0]]), "softcap": 0.0,
        "sinks": None, "k_descale": scale, "v_descale": scale, "seq_threshold_3D": 16, "kv_quant_mode": 0,
        "use_td": False, **NEUTRAL,
    }  # fmt: skip


@pytest.fixture
def vllms():
    """Calls that vLLM's own kernel got."""
    return []


@pytest.fixture
def attend(vllms):
    return attention_over_ours(lambda *arguments, **named: vllms.append((arguments, named)), lambda: True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"window_size": (4, 0)}, {"window": 5}),
        ({"softcap": 3.0}, {"softcap": 3.0}),
        ({"causal": False}, {"causal": False}),
        ({"max_seqlen_q": 7}, {}),
        ({"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])}, {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])}),
    ],
)
def test_paged_attention_is_ours(call, attend, vllms, changes, expected):
    call |= changes
    attend(**call)
    options = {"causal": True, "window": 0, "softcap": 0.0} | expected
    wanted = launch(
        *(call[name] for name in ("q", "k", "v", "cu_seqlens_q", "seqused_k", "block_table")), 2, 0.25,
        **options,
    )  # fmt: skip
    assert first_mismatch(call["out"], wanted) is None
    assert not vllms


def test_an_output_that_is_quantised_is_ours(call, attend, vllms):
    call |= {"out": torch.zeros(call["q"].shape, dtype=FP8), "output_scale": torch.tensor(0.02)}
    attend(**call)
    plain = [call[name] for name in ("q", "k", "v", "cu_seqlens_q", "seqused_k", "block_table")]
    wanted = quantize_static_fp8_reference(
        launch(*plain, 2, 0.25, causal=True, window=0, softcap=0.0), torch.tensor(0.02)
    )
    assert first_mismatch(call["out"].view(torch.uint8), wanted.view(torch.uint8)) is None
    assert not vllms


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("out", torch.zeros(3, HEADS, HEAD_DIM, dtype=FP8), "its output is torch.float8_e4m3fn, not to be quantised"),
        ("output_scale", torch.tensor(0.02), "its output is torch.float32, to be quantised"),
        ("alibi_slopes", torch.zeros(HEADS), "asked for alibi_slopes"),
        ("chunk_lookback", 2, "asked for chunk_lookback"),
        ("kv_quant_mode", 1, "the cache is quantised, 1"),
        ("causal", torch.tensor([True, False]), "causal is a tensor"),
        ("window_size", (4, 4), "the window is (4, 4)"),
        ("k", torch.zeros(4, PAGE, KV_HEADS, HEAD_DIM, dtype=torch.float8_e4m3fn), "the cache torch.float8_e4m3fn"),
        ("out", torch.zeros(HEADS, 3, HEAD_DIM).transpose(0, 1), "its output is not contiguous"),
    ],
)
def test_what_is_asked_beyond_that_stays_vllms_and_the_log_says_so(call, attend, vllms, caplog, name, value, reason):
    log.say_that_it_stays_vllms.cache_clear()
    call[name] = value
    with caplog.at_level("WARNING", logger="vllm.batchproof"):
        attend(**call)
        attend(**call)
    assert len(vllms) == 2
    assert caplog.text.count(reason) == 1
    given = dict(zip(list(call)[: len(vllms[0][0])], vllms[0][0], strict=True)) | vllms[0][1]
    assert given.keys() == call.keys()
    assert all(given[key] is call[key] for key in call)


class Impl:
    """What vLLM's ``TritonAttentionImpl`` has of a layer."""

    def __init__(self):
        self.__dict__ |= OF_IMPL
        self.head_size, self.scale, self.logits_soft_cap, self.sinks = HEAD_DIM, 0.25, 0.0, None
        self.sliding_window = (-1, -1)


def forwarded(call, vllms, ours=True, impl=None, kv_cache=None, given=None, **changes):
    """A call of ``forward``: three tokens, of which the last pads the batch."""
    step = OF_STEP | {
        "num_actual_tokens": 3, "max_query_len": 2, "query_start_loc": call["cu_seqlens_q"],
        "seq_lens": call["seqused_k"], "block_table": call["block_table"],
    } | changes  # fmt: skip
    forward = forward_over_ours(lambda *arguments: vllms.append(arguments) or "vllm", lambda: ours)
    query = torch.cat((call["q"], torch.full_like(call["q"][:1], float("nan"))))
    out = torch.full(query.shape, 7.0).to(call["out"].dtype)
    kv_cache = torch.cat((call["k"], call["v"]), -1).transpose(1, 2) if kv_cache is None else kv_cache
    returned = forward(impl or Impl(), None, query, None, None, kv_cache, SimpleNamespace(**step), out, *(given or ()))
    return returned, out


@pytest.mark.parametrize(("window", "softcap"), [((-1, -1), 0.0), ((4, 0), 3.0)])
def test_a_layer_goes_straight_to_ours(call, vllms, window, softcap):
    impl = Impl()
    impl.sliding_window, impl.logits_soft_cap = window, softcap
    plain = [call[name] for name in ("q", "k", "v", "cu_seqlens_q", "seqused_k", "block_table")]
    wanted = launch(*plain, 2, 0.25, causal=True, window=window[0] + 1, softcap=softcap)
    returned, out = forwarded(call, vllms, impl=impl)
    assert returned is out
    assert first_mismatch(out[:3], wanted) is None
    assert bool((out[3] == 7.0).all()), "the token that pads the batch"
    other = dict(call, k=call["k"] * 2.0)
    assert first_mismatch(forwarded(other, vllms, impl=impl)[1][:3], wanted) is not None, "another cache"
    assert not vllms


def test_a_layer_may_quantise_its_output(call, vllms):
    scale = torch.tensor(0.02)
    plain = [call[name] for name in ("q", "k", "v", "cu_seqlens_q", "seqused_k", "block_table")]
    wanted = quantize_static_fp8_reference(launch(*plain, 2, 0.25, causal=True, window=0, softcap=0.0), scale)
    call["out"] = call["out"].to(FP8)
    _, out = forwarded(call, vllms, given=(scale,))
    assert first_mismatch(out[:3].view(torch.uint8), wanted.view(torch.uint8)) is None
    assert not vllms


def test_a_step_that_measures_memory_has_no_cache_yet(vllms):
    forward = forward_over_ours(lambda *arguments: vllms.append(arguments) or "vllm", lambda: True)
    q = torch.zeros(2, 4, HEAD_DIM)
    assert forward(Impl(), None, q, q, q, torch.tensor([]), None, torch.empty_like(q)) == "vllm"
    assert len(vllms) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"ours": False}, {"use_cascade": True}, {"causal": False}, {"causal": torch.tensor([True, False])},
        {"mm_prefix_range_tensor": torch.zeros(2)}, {"rswa_prefix_lens": torch.zeros(2)}, {"rswa_window": 4},
        {"given": (torch.tensor(0.02),)}, {"given": (None, torch.ones(1))},
        {"given": (torch.tensor([0.02, 0.02]),), "out": FP8}, {"given": (torch.tensor(0.02).double(),), "out": FP8},
        {"kv_cache": torch.zeros(4, KV_HEADS, PAGE, 2 * HEAD_DIM).to(FP8)},
        {"kv_cache": torch.zeros(4, KV_HEADS, PAGE, 2 * HEAD_DIM).bfloat16()},
        *({"impl": name} for name in (*OF_IMPL, "sliding_window")),
    ],
    ids=lambda change: " ".join(map(str, change)) + (f" {change['impl']}" if "impl" in change else ""),
)  # fmt: skip
def test_what_a_layer_asks_beyond_that_goes_vllms_way(call, vllms, change):
    if "out" in change:
        call["out"] = call["out"].to(change["out"])
        change = {"given": change["given"]}
    if "impl" in change:
        impl = Impl()
        setattr(impl, change["impl"], (4, 4) if change["impl"] == "sliding_window" else "other")
        change = {"impl": impl}
    assert forwarded(call, vllms, **change)[0] == "vllm"
    assert len(vllms) == 1
    assert len(vllms[0]) == 10


def priorities(use_mla, device_capability, num_heads=None, kv_cache_dtype=None, use_non_causal=False):
    return [SimpleNamespace(name=name) for name in ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION")]


@pytest.mark.parametrize(
    ("asked", "first"),
    [
        ({}, "TRITON_ATTN"),
        ({"kv_cache_dtype": "auto"}, "TRITON_ATTN"),
        ({"kv_cache_dtype": "fp8"}, "FLASH_ATTN"),
        ({"use_mla": True}, "FLASH_ATTN"),
        ({"use_non_causal": True}, "FLASH_ATTN"),
    ],
    ids=str,
)
def test_the_triton_backend_is_tried_first_where_ours_is_for_a_layer(asked, first, monkeypatch):
    utils = ModuleType("torch_utils")
    utils.is_quantized_kv_cache = lambda dtype: dtype.startswith("fp8")
    monkeypatch.setitem(sys.modules, "vllm.utils.torch_utils", utils)
    for package in ("vllm", "vllm.utils"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    asked = {"use_mla": False, "device_capability": (9, 0)} | asked
    found = [backend.name for backend in triton_first(priorities)(**asked)]
    assert found[0] == first
    others = [name for name in found if name != "TRITON_ATTN"]
    assert others == ["FLASH_ATTN", "FLASHINFER", "FLEX_ATTENTION"], "in their order"
    assert len(found) == 4


def test_the_hook_notes_models_that_see_prompts_both_ways(call, monkeypatch, vllms):
    """A batch without such a prompt looks like any other: the model decides, not the batch."""

    class Builder:
        def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
            self.device = device

    def unified_attention(
        q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal, window_size,
        block_table, softcap, q_descale, k_descale, v_descale, seq_threshold_3D=None, alibi_slopes=None,
        output_scale=None, qq_bias=None, sinks=None, mm_prefix_range=None, rswa_prefix_lens=None, rswa_window=None,
        use_alibi_sqrt=False, kv_quant_mode=0, k_scale_cache=None, v_scale_cache=None, chunk_lookback=-1, use_td=False,
    ):  # fmt: skip
        vllms.append(out)

    @dataclasses.dataclass
    class Metadata:
        use_cascade: bool
        causal: bool
        mm_prefix_range_tensor: None
        rswa_prefix_lens: None
        rswa_window: None

    class TritonAttentionImpl:
        def __init__(self):
            self.attn_type = None
            self.alibi_slopes = None
            self.use_alibi_sqrt = None
            self.chunk_lookback = None
            self._kv_quant_mode = None
            self._is_per_token_head_quant = None

        def forward(
            self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
        ):
            raise AssertionError

    backend = ModuleType("triton_attn")
    backend.TritonAttentionImpl, backend.TritonAttentionMetadata = TritonAttentionImpl, Metadata
    backend.unified_attention, backend.TritonAttentionMetadataBuilder = unified_attention, Builder
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.triton_attn", backend)
    platform = ModuleType("cuda")
    platform._get_backend_priorities = priorities
    monkeypatch.setitem(sys.modules, "vllm.platforms.cuda", platform)
    for package in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends", "vllm.platforms"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    assert HOOK.probe() is None
    HOOK.install()
    HOOK.install()
    assert backend.unified_attention.__wrapped__ is unified_attention
    assert platform._get_backend_priorities.__wrapped__ is priorities
    assert HOOK.probe() is None
    platform._get_backend_priorities = lambda use_mla: []
    assert "_get_backend_priorities takes ['use_mla'], want" in HOOK.probe()

    def build(both_ways):
        config = SimpleNamespace(model_config=SimpleNamespace(is_mm_prefix_lm=both_ways))
        assert Builder(None, [], vllm_config=config, device="cpu").device == "cpu"

    build(False)
    backend.unified_attention(**call)
    assert not vllms
    build(True)
    backend.unified_attention(**call)
    assert len(vllms) == 1


def test_the_hook_is_for_hopper_or_on_request(monkeypatch):
    monkeypatch.delenv("BATCHPROOF_ATTENTION", raising=False)
    assert HOOK.is_wanted() == (hooks._on_hopper() == "1")
    monkeypatch.setenv("BATCHPROOF_ATTENTION", "0")
    assert not HOOK.is_wanted()
    monkeypatch.setenv("BATCHPROOF_ATTENTION", "1")
    assert HOOK.is_wanted()
    if not importlib.util.find_spec("vllm"):
        assert "No module named 'vllm'" in HOOK.missing()
