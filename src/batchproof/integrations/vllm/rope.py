"""vLLM's rotary embedding over batchproof's ``rope``, and with the write of the KV cache as ``rope_and_cache``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention.attention import Attention, get_attention_context
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name, direct_register_custom_op
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

from ...ops import rms_norm as _rms_norm  # noqa: F401 - defines the ops
from ...ops import rope as _rope  # noqa: F401 - defines the op
from ...ops import rope_cache as _rope_cache  # noqa: F401 - defines the op
from .graph import fuse_output_quant, fuse_rope_and_cache, writes_in_graphs
from .log import logger

__all__ = ["FUSED", "fuse", "invariant", "why_apart"]

FUSED = "batchproof::rope_and_unified_kv_cache_update"
_ops = torch.ops.batchproof
_library = torch.library.Library("batchproof", "FRAGMENT")


def _forward(self: Any, positions: Tensor, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """[num_tokens, heads * head_size] or [num_tokens, heads, head_size]: the queries and keys, rotated, new tensors."""
    positions = positions.flatten()
    table = self._match_cos_sin_cache_dtype(query)

    def turned(x: Tensor) -> Tensor:
        heads = x.view(positions.shape[0], -1, self.head_size)
        out: Tensor = _ops.rope.default(heads, positions, table, not self.is_neox_style)
        return out.view(x.shape)

    return turned(query), None if key is None else turned(key)


def invariant(base: type[RotaryEmbedding]) -> type[RotaryEmbedding]:
    """A class of vLLM's that makes its table in its own way and rotates as ``RotaryEmbedding`` does, with our op."""
    members = {"forward_native": _forward, "forward_cuda": _forward, "__doc__": f"vLLM's {base.__name__}, rotating so."}
    return type(f"Invariant{base.__name__}", (base,), members)


def rope_and_unified_kv_cache_update(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    layer_name: LayerNameType,
) -> torch.Tensor:
    """The queries [num_tokens, num_heads, head_size], normalised and rotated; keys and values go to the layer's cache.

    The layer and its slots are those of vLLM's forward context. Without slots, as vLLM runs to see how much memory is
    taken, nothing is written.
    """
    _, layer, kv_cache, slots = get_attention_context(_resolve_layer_name(layer_name))
    if slots is None:
        query = query if q_weight is None else _ops.rms_norm.default(query, q_weight, eps, False)
        out: Tensor = _ops.rope.default(query, positions, cos_sin, interleaved)
        return out
    k_cache, v_cache = kv_cache.transpose(1, 2).split(layer.impl.head_size, dim=-1)
    out = _ops.rope_and_cache.default(
        query, key, value, positions, cos_sin, k_cache, v_cache, slots, interleaved, q_weight, k_weight, eps
    )
    return out


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    layer_name: LayerNameType,
) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


direct_register_custom_op(
    op_name=FUSED.split("::")[1],
    op_func=rope_and_unified_kv_cache_update,
    mutates_args=[],  # as vLLM has it of its own: the cache is no argument
    fake_impl=_fake,
    target_lib=_library,
)


def why_apart(config: Any) -> str | None:
    """Why rope and the cache write of a model are to stay two kernels, in a few words; None if they are to be one."""
    compilation = config.compilation_config
    if compilation.use_inductor_graph_partition or not compilation.splitting_ops:
        return "vLLM does not split the graph before it is compiled"
    for name, layer in compilation.static_forward_context.items():
        if not isinstance(layer, Attention):
            continue
        if type(layer.impl) is not TritonAttentionImpl or layer.attn_type != AttentionType.DECODER:
            return f"{name} is no decoder's attention of the Triton backend"
        if layer.kv_cache_torch_dtype != config.model_config.dtype:
            return f"{name} has a cache of {layer.kv_cache_torch_dtype}"
        if layer.kv_sharing_target_layer_name is not None:
            return f"{name} has the cache of another layer"
    return None


def fuse(graph: torch.fx.GraphModule, config: Any) -> None:
    """Rewrite a graph that Dynamo has given to vLLM, and have it split at the new op too where it has to be."""
    reason = why_apart(config)
    if reason is not None:
        logger.info("batchproof leaves rope and the cache write apart: %s", reason)
        return
    count = fuse_rope_and_cache(graph.graph, _ops.rope_and_unified_kv_cache_update.default)
    quantised = fuse_output_quant(graph.graph)
    graph.recompile()
    operators = config.compilation_config.splitting_ops
    inside = writes_in_graphs(config, hoisted=LayerNameType is not str)
    if count and not inside and FUSED not in operators:
        operators.append(FUSED)
    where = "in vLLM's CUDA graphs" if inside else "between vLLM's CUDA graphs"
    logger.info("batchproof made rope and the cache write one kernel in %d layers, %s", count, where)
    logger.info("batchproof has attention quantise its output in %d layers", quantised)
