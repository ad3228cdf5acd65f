"""How attention and the rotary embedding before it are taken over: what vLLM has to have, and how it is put in place.

As in ``hooks``, everything of vLLM is imported inside the functions.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

from .oot import lacks, register, taken_by_another

__all__ = ["install_attention", "install_rope", "probe_attention", "probe_rope", "triton_first"]

_ATTENTION = "vllm.v1.attention.backends.triton_attn"  # which calls unified_attention by its own name
_ATTENDS = [
    "q", "k", "v", "out", "cu_seqlens_q", "max_seqlen_q", "seqused_k", "max_seqlen_k", "softmax_scale", "causal",
    "window_size", "block_table", "softcap",
]  # fmt: skip
_FORWARD = [
    "self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output", "output_scale",
    "output_block_scale",
]  # fmt: skip
_PLATFORM = "vllm.platforms.cuda"  # which tries backends by _get_backend_priorities, unless one is asked for
_CHOOSES_BY = ["use_mla", "device_capability", "num_heads", "kv_cache_dtype", "use_non_causal"]


def probe_attention() -> str | None:
    """What is missing of the Triton backend, or of how vLLM chooses it; None if nothing."""
    from .attention import NEUTRAL, OF_IMPL, OF_STEP

    module = import_module(_ATTENTION)
    names = ("unified_attention", "TritonAttentionMetadataBuilder", "TritonAttentionImpl", "TritonAttentionMetadata")
    absent = lacks(module, *names)
    if absent:
        return absent
    found = list(inspect.signature(module.TritonAttentionImpl.forward).parameters)
    if found != _FORWARD:
        return f"TritonAttentionImpl.forward takes {found}, want {_FORWARD}"
    of_impl = set(re.findall(r"self\.(\w+) = ", inspect.getsource(module.TritonAttentionImpl.__init__)))
    of_step = {field.name for field in dataclasses.fields(module.TritonAttentionMetadata)}
    missing = (OF_IMPL.keys() - of_impl) | (OF_STEP.keys() - of_step)
    if missing:
        return f"TritonAttentionImpl or its metadata has no {', '.join(sorted(missing))}"
    takes = list(inspect.signature(module.unified_attention).parameters)
    if takes[: len(_ATTENDS)] != _ATTENDS:
        return f"unified_attention begins with {takes[: len(_ATTENDS)]}, want {_ATTENDS}"
    unknown = [name for name in (*NEUTRAL, "sinks", "output_scale") if name not in takes]
    if unknown:
        return f"unified_attention has no {', '.join(unknown)}"
    if "vllm_config" not in inspect.signature(module.TritonAttentionMetadataBuilder.__init__).parameters:
        return "its builder takes no vllm_config"
    platform = import_module(_PLATFORM)
    absent = lacks(platform, "_get_backend_priorities")
    if absent:
        return absent
    by = list(inspect.signature(platform._get_backend_priorities).parameters)
    return None if by == _CHOOSES_BY else f"_get_backend_priorities takes {by}, want {_CHOOSES_BY}"


def install_attention() -> None:
    """Ours under the Triton backend's ``unified_attention``, and that backend before others where none is asked for."""
    from .attention import attention_over_ours, forward_over_ours

    module: Any = import_module(_ATTENTION)
    if hasattr(module.unified_attention, "__wrapped__"):
        return
    prefixes: list[bool] = []  # whether a model sees some of its prompt both ways, in batches that have such a prompt
    builder = module.TritonAttentionMetadataBuilder
    build = builder.__init__

    @functools.wraps(build)
    def note_and_build(self: Any, *arguments: Any, **named: Any) -> None:
        given = inspect.signature(build).bind(self, *arguments, **named).arguments["vllm_config"]
        prefixes.append(bool(getattr(given.model_config, "is_mm_prefix_lm", False)))
        build(self, *arguments, **named)

    builder.__init__ = note_and_build
    module.unified_attention = attention_over_ours(module.unified_attention, lambda: not any(prefixes))
    impl = module.TritonAttentionImpl
    impl.forward = forward_over_ours(impl.forward, lambda: not any(prefixes))
    platform: Any = import_module(_PLATFORM)
    platform._get_backend_priorities = triton_first(platform._get_backend_priorities)


def triton_first(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """vLLM's order of attention backends, with Triton's first where our attention is for a layer."""

    @functools.wraps(original)
    def priorities(*arguments: Any, **named: Any) -> list[Any]:
        from vllm.utils.torch_utils import is_quantized_kv_cache

        bound = inspect.signature(original).bind(*arguments, **named)
        bound.apply_defaults()
        asked = bound.arguments
        cache, backends = asked["kv_cache_dtype"], original(*arguments, **named)
        if asked["use_mla"] or asked["use_non_causal"] or (cache is not None and is_quantized_kv_cache(cache)):
            return backends
        return sorted(backends, key=lambda backend: backend.name != "TRITON_ATTN")  # the others as they were

    return priorities


def _rotary_classes() -> list[Any]:
    """vLLM's rotary embeddings that differ from ``RotaryEmbedding`` in their table alone."""
    from vllm.model_executor.layers import rotary_embedding as module

    base = module.RotaryEmbedding
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, base)]
    same = ("forward_native", "forward_cuda", "_match_cos_sin_cache_dtype")
    return [c for c in classes if all(getattr(c, name) is getattr(base, name) for name in same)]


def probe_rope() -> str | None:
    """What is missing of the rotary embeddings, of the cache write and of vLLM's compiler; None if nothing."""
    from vllm.compilation.backends import VllmBackend
    from vllm.model_executor.layers.attention import attention
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    for name in ("forward_native", "forward_cuda"):
        found = list(inspect.signature(getattr(RotaryEmbedding, name)).parameters)
        if found != ["self", "positions", "query", "key"]:
            return f"RotaryEmbedding.{name} takes {found}, want ['self', 'positions', 'query', 'key']"
    for base in _rotary_classes():
        taken = taken_by_another(base.__name__)
        if taken:
            return taken
    found = list(inspect.signature(attention.unified_kv_cache_update).parameters)
    if found != ["key", "value", "layer_name"]:
        return f"unified_kv_cache_update takes {found}, want ['key', 'value', 'layer_name']"
    steps = ("self.graph = graph", "self.configure_post_pass()", "split_graph(")
    source = inspect.getsource(VllmBackend.__call__)
    places = [source.find(step) for step in steps]
    if -1 in places or places != sorted(places):
        return f"VllmBackend.__call__ does not have {', then '.join(steps)}"
    return lacks(RotaryEmbedding, "register_oot", "_match_cos_sin_cache_dtype")


def install_rope() -> None:
    """Ours for the rotary embeddings, and one op for them and the cache write in graphs that vLLM compiles."""
    from vllm.compilation.backends import VllmBackend

    from . import rope

    for base in _rotary_classes():
        register(base, rope.invariant(base))
    configure = VllmBackend.configure_post_pass
    if hasattr(configure, "__wrapped__"):
        return

    @functools.wraps(configure)
    def configure_and_fuse(self: Any) -> None:
        configure(self)
        rope.fuse(self.graph, self.vllm_config)

    VllmBackend.configure_post_pass = configure_and_fuse
