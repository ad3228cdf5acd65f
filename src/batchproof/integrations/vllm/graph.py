"""Dynamo's graph of a model, before vLLM splits it: rope of a layer and its cache write become one op.

The ops are recognised by batchproof's own names for rope and norms, which its layers put there. q, k and v stay what
they are; the layer's attention gets the rotated queries from the new op, and reads keys from the cache alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

__all__ = ["fuse_rope_and_cache"]

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


def _layer(update: fx.Node) -> tuple[fx.Node, _Rotated, _Rotated] | None:
    """A cache write's attention, queries and keys."""
    if len(update.args) != 3 or update.kwargs or len(update.users) != 1:
        return None
    (attention,) = update.users
    if _name(attention) != "vllm::unified_attention_with_output" or len(attention.args) < 5:
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
