"""Dynamo's graph of a model, before vLLM splits it at attention, which no later pass sees over.

Rope of a layer and its cache write become one op. They are recognised by batchproof's own names for rope and norms,
which its layers put there. q, k and v stay what they are; the layer's attention gets the rotated queries from the new
op, and reads keys from the cache alone.

Where nothing but a static fp8 quantisation reads what attention writes, attention writes that.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

__all__ = ["fuse_output_quant", "fuse_rope_and_cache", "writes_in_graphs"]

FP8 = torch.float8_e4m3fn
_ATTENTION = "vllm::unified_attention_with_output"
_VIEWS = ("view", "reshape")
_REPLACED = ("vllm::unified_kv_cache_update", "batchproof::rope", "batchproof::rms_norm")


class _Rotated(NamedTuple):
    """What is rotated, after a norm if there is a weight, and by what."""

    node: fx.Node
    x: Any
    weight: Any
    eps: float
    by: tuple[Any, ...]  # positions, table, interleaved


def fuse_rope_and_cache(graph: fx.Graph, fused: Callable[..., Any]) -> int:
    """Replace each layer's rope of q and k and the write of its cache; how many layers.

    ``fused(q, k, v, positions, cos_sin, interleaved, q_weight, k_weight, eps, layer_name)`` is called in their place,
    and returns the queries as ``rope`` does. What does not look as expected stays as it is.
    """
    count = 0
    for update in [node for node in graph.nodes if _name(node) == "vllm::unified_kv_cache_update"]:
        found = _layer(update)
        if found is None:
            continue
        attention, q, k = found
        _, value, layer_name = update.args
        weights = (q.weight, k.weight, k.eps if q.weight is None else q.eps)
        with graph.inserting_before(update):
            new = graph.call_function(fused, (q.x, k.x, value, *q.by, *weights, layer_name))
        new.meta.update(q.node.meta)
        old_q = attention.args[0]
        attention.args = (new, k.x, *attention.args[2:])
        attention.kwargs = {**attention.kwargs, "kv_cache_dummy_dep": None}
        _erase(graph, update)
        _erase(graph, old_q)
        count += 1
    return count


def writes_in_graphs(config: Any, hoisted: bool) -> bool:
    """Whether the write of the cache may be in the CUDA graphs of vLLM's pieces, rather than between them.

    It may where each step's slots are in one buffer, of -1 past the step's tokens, as vLLM's model runner V2 has them.

    Args:
        config: vLLM's.
        hoisted: whether a layer's name is an input of a piece, so that layers share one compiled piece.
    """
    parallel = config.parallel_config
    alone = config.speculative_config is None and parallel.prefill_context_parallel_size == 1
    return bool(hoisted and alone and config.use_v2_model_runner)


def fuse_output_quant(graph: fx.Graph) -> int:
    """Have attention quantise its output where that is all that is read of it; how many layers.

    As vLLM's layers have it, ``output.to(float32) * scale.to(float32).reciprocal()``, clamped and cast, of a buffer
    that is made for attention. The buffer is then fp8, and attention gets the scale. What looks otherwise stays.
    """
    count = 0
    for attention in [node for node in graph.nodes if _name(node) == _ATTENTION]:
        if len(attention.args) != 5 or attention.kwargs.get("output_scale") is not None:
            continue
        written = attention.args[3]
        views = _views_of(_beneath(written), attention)
        found = None if views is None else _quantised(views[-1])
        if views is None or found is None:
            continue
        out, scale, dead = found
        views[0].kwargs = {**views[0].kwargs, "dtype": FP8}
        for node in views:
            if "example_value" in node.meta:
                node.meta["example_value"] = node.meta["example_value"].to(FP8)
        attention.kwargs = {**attention.kwargs, "output_scale": scale}
        out.replace_all_uses_with(views[-1])
        for node in dead:
            if not node.users:
                graph.erase_node(node)
        count += 1
    return count


def _views_of(buffer: Any, attention: fx.Node) -> list[fx.Node] | None:
    """An empty buffer and the views of it, the last one that which something reads; None if it is read elsewhere."""
    if not isinstance(buffer, fx.Node) or buffer.target is not torch.empty or "dtype" not in buffer.kwargs:
        return None
    views = [buffer]
    while True:
        users = [user for user in views[-1].users if user is not attention]
        if len(users) != 1:
            return None
        if users[0].op != "call_method" or users[0].target not in _VIEWS:
            return views
        views.append(users[0])


def _quantised(x: fx.Node) -> tuple[fx.Node, fx.Node, list[fx.Node]] | None:
    """The static fp8 quantisation that alone reads ``x``, its scale of one fp32 element, and its nodes, the last first.

    The scale is one of the graph's inputs, so that it is there wherever it is read.
    """
    limit = torch.finfo(FP8).max
    nodes: list[Any] = [x]
    steps = (("to", (torch.float32,)), (operator.mul, None), ("clamp", (-limit, limit)), ("to", (FP8,)))
    for target, arguments in steps:
        users = list(nodes[0].users)
        if len(users) != 1 or not _is_call(users[0], target, arguments) or users[0].args[0] is not nodes[0]:
            return None
        nodes.insert(0, users[0])
    product = nodes[2]
    behind: list[Any] = [product.args[1]]
    for step in (("reciprocal", ()), ("to", (torch.float32,))):
        node = behind[-1]
        if not _is_call(node, *step):
            return None
        behind.append(node.args[0])
    scale = behind.pop()
    if not isinstance(scale, fx.Node) or scale.op not in ("placeholder", "get_attr"):
        return None
    example = scale.meta.get("example_value")
    if example is None or example.dtype != torch.float32 or example.numel() != 1:
        return None
    return nodes[0], scale, [*nodes[:-1], *behind]


def _is_call(node: Any, target: Any, arguments: tuple[Any, ...] | None) -> bool:
    """Whether a node calls ``target`` with these arguments behind the first; None for any."""
    if not isinstance(node, fx.Node) or node.target != target or node.kwargs:
        return False
    return arguments is None or node.args[1:] == arguments


def _layer(update: fx.Node) -> tuple[fx.Node, _Rotated, _Rotated] | None:
    """A cache write's attention, queries and keys."""
    if len(update.args) != 3 or update.kwargs or len(update.users) != 1:
        return None
    (attention,) = update.users
    if _name(attention) != _ATTENTION or len(attention.args) < 5:
        return None
    if attention.kwargs.get("kv_cache_dummy_dep") is not update or attention.args[1] is not update.args[0]:
        return None
    q, k = _rotated(attention.args[0]), _rotated(update.args[0])
    if q is None or k is None or q.by != k.by or (q.weight is not None and k.weight is not None and q.eps != k.eps):
        return None
    return attention, q, k


def _rotated(node: Any) -> _Rotated | None:
    """The rope that a view shows."""
    rope = _beneath(node)
    if _name(rope) != "batchproof::rope":
        return None
    x, *by = rope.args
    norm = _beneath(x)
    if _name(norm) == "batchproof::rms_norm" and norm.args[1] is not None and norm.args[3] is False:
        inner, weight, eps, _ = norm.args
        shape, wanted = (_shape(n) for n in (inner, x))
        if shape is not None and shape == wanted:
            return _Rotated(rope, inner, weight, eps, tuple(by))
    return _Rotated(rope, x, None, 0.0, tuple(by))


def _shape(node: Any) -> Any:
    example = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return None if example is None else example.shape


def _beneath(node: Any) -> Any:
    """What a chain of views is of."""
    while isinstance(node, fx.Node) and node.op == "call_method" and node.target in _VIEWS:
        node = node.args[0]
    return node


def _name(node: Any) -> str | None:
    """The name of the op that a node calls, whatever overload."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.name().split(".")[0]
    return target._qualified_op_name if isinstance(target, torch._ops.OpOverloadPacket) else None


def _erase(graph: fx.Graph, node: Any) -> None:
    """A node without users, and what it alone used of views, ropes and norms."""
    if not isinstance(node, fx.Node) or node.users:
        return
    if node.target not in _VIEWS and (_name(node) or "") not in _REPLACED:
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for used in inputs:
        _erase(graph, used)
