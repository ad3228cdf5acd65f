"""Rope and the cache write of a graph become one op, if the graph looks as vLLM's layers make it; else it stays."""

import operator
from types import SimpleNamespace

import pytest
import torch
from torch import fx

from batchproof.integrations.vllm.graph import FP8, fuse_output_quant, fuse_rope_and_cache, writes_in_graphs
from batchproof.ops import rms_norm as _rms_norm  # noqa: F401 - defines the ops
from batchproof.ops import rope as _rope  # noqa: F401 - defines the op

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 5, 4, 2, 16
SIZES = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
_library = torch.library.Library("vllm", "FRAGMENT")  # vLLM's two ops, by name; it is not installed where tests run
if not hasattr(torch.ops.vllm, "unified_kv_cache_update"):
    _library.define("unified_kv_cache_update(Tensor key, Tensor value, str layer_name) -> Tensor")
    _library.define(
        "unified_attention_with_output(Tensor query, Tensor key, Tensor value, Tensor(a!) output, str layer_name, "
        "Tensor? output_scale=None, Tensor? output_block_scale=None, Tensor? kv_cache_dummy_dep=None) -> ()"
    )


def fused(*arguments):
    raise AssertionError("the graph is looked at, not run")


def traced(norms=False, other_table=False, quantised=False):
    """Two layers' attention as vLLM's models have it in Dynamo's graph.

    ``norms``: of q and k, as Qwen3 has them. ``quantised``: the output, to a static scale, as before a product in fp8.
    """
    graph = fx.Graph()
    scale = graph.placeholder("scale")
    scale.meta["example_value"] = torch.ones(())
    qkv, positions, table, other, weight = map(graph.placeholder, ("qkv", "positions", "table", "other", "weight"))

    def view(x, *shape):
        node = graph.call_method("view", (x, *shape))
        node.meta["example_value"] = torch.empty(TOKENS, *[n for n in shape if n != -1])
        return node

    def turned(x, heads, table):
        if norms is True or norms == heads:
            by_head = view(x, -1, heads, HEAD_DIM)
            x = graph.call_function(torch.ops.batchproof.rms_norm.default, (by_head, weight, 1e-6, False))
            x = view(x, -1, heads * HEAD_DIM)
        rotated = graph.call_function(
            torch.ops.batchproof.rope.default, (view(x, -1, heads, HEAD_DIM), positions, table, False)
        )
        return view(view(rotated, -1, heads * HEAD_DIM), -1, heads, HEAD_DIM)

    for i in range(2):
        parts = graph.call_method("split", (qkv, SIZES, -1))
        q, k, v = (graph.call_function(operator.getitem, (parts, j)) for j in range(3))
        q, k = turned(q, HEADS, table), turned(k, KV_HEADS, other if other_table else table)
        v = view(v, -1, KV_HEADS, HEAD_DIM)
        output = graph.call_function(torch.empty, (TOKENS, SIZES[0]), {"dtype": torch.bfloat16})
        output.meta["example_value"] = torch.empty(TOKENS, SIZES[0], dtype=torch.bfloat16)
        out = view(output, -1, HEADS, HEAD_DIM)
        done = graph.call_function(torch.ops.vllm.unified_kv_cache_update, (k, v, f"layer.{i}"))
        attend = torch.ops.vllm.unified_attention_with_output
        graph.call_function(attend, (q, k, v, out, f"layer.{i}"), {"kv_cache_dummy_dep": done})
        if quantised:
            flat = view(view(out, -1, SIZES[0]), -1, SIZES[0])
            reciprocal = graph.call_method("reciprocal", (graph.call_method("to", (scale, torch.float32)),))
            product = graph.call_function(operator.mul, (graph.call_method("to", (flat, torch.float32)), reciprocal))
            clamped = graph.call_method("clamp", (product, -448.0, 448.0))
            output = graph.call_method("to", (clamped, torch.float8_e4m3fn))
        qkv = graph.call_function(torch.cat, ([output, output], -1))
    graph.output(qkv)
    graph.lint()
    return graph


def calls(graph):
    return [str(node.target).removesuffix(".default") for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("norms", [False, True])
def test_each_layer_has_one_op_for_rope_and_the_cache(norms):
    graph = traced(norms=norms)
    assert fuse_rope_and_cache(graph, fused) == 2
    graph.lint()
    found = calls(graph)
    assert not any(name in ("batchproof.rope", "batchproof.rms_norm", "vllm.unified_kv_cache_update") for name in found)
    new = [node for node in graph.nodes if node.target is fused]
    attention = [node for node in graph.nodes if "unified_attention" in str(node.target)]
    for i, (node, attend) in enumerate(zip(new, attention, strict=True)):
        q, k, v, positions, table, interleaved, q_weight, k_weight, eps, layer = node.args
        assert (positions.name, table.name, interleaved, layer) == ("positions", "table", False, f"layer.{i}")
        if norms:
            assert (q_weight.name, k_weight.name, eps) == ("weight", "weight", 1e-6)
        else:
            assert (q_weight, k_weight) == (None, None)
        assert [part.args[0].args[1] for part in (q, k, v)] == [0, 1, 2], "q, k and v before anything is done to them"
        assert attend.args[:3] == (node, k, v)
        assert attend.kwargs == {"kv_cache_dummy_dep": None}
        assert "example_value" not in node.meta or node.meta["example_value"].shape == (TOKENS, HEADS, HEAD_DIM)


def test_another_table_for_keys_stays_as_it_is():
    graph = traced(other_table=True)
    before = calls(graph)
    assert fuse_rope_and_cache(graph, fused) == 0
    assert calls(graph) == before


def test_what_others_read_stays():
    """A layer below may want the rotated keys: they are made beside the fused op then."""
    graph = traced()
    rope = [node for node in graph.nodes if str(node.target).startswith("batchproof.rope")]
    keys = rope[1]
    last = next(iter(reversed(graph.nodes)))
    with graph.inserting_before(last):
        graph.call_function(torch.sum, (keys,))
    assert fuse_rope_and_cache(graph, fused) == 2
    graph.lint()
    assert [node for node in graph.nodes if str(node.target).startswith("batchproof.rope")] == [keys]


@pytest.mark.parametrize("change", ["no dependency", "two readers", "no rope"])
def test_a_graph_that_looks_otherwise_stays_as_it_is(change):
    graph = traced()
    update, attention = (
        next(node for node in graph.nodes if name in str(node.target)) for name in ("kv_cache_update", "_attention_")
    )
    if change == "no dependency":
        attention.kwargs = {}
    elif change == "two readers":
        with graph.inserting_after(update):
            graph.call_function(torch.sum, (update,))
    else:
        update.args = (update.args[1], *update.args[1:])
    before = calls(graph)
    assert fuse_rope_and_cache(graph, fused) == 1, "the other layer"
    assert calls(graph).count("vllm.unified_kv_cache_update") == 1
    assert len(calls(graph)) < len(before)


def test_a_norm_of_keys_alone_keeps_its_epsilon():
    graph = traced(norms=KV_HEADS)
    assert fuse_rope_and_cache(graph, fused) == 2
    for node in graph.nodes:
        if node.target is fused:
            q_weight, k_weight, eps = node.args[6:9]
            assert (q_weight, k_weight.name, eps) == (None, "weight", 1e-6)


def test_attention_writes_its_output_quantised():
    graph = traced(quantised=True)
    assert fuse_output_quant(graph) == 2
    graph.lint()
    attention = [node for node in graph.nodes if "unified_attention" in str(node.target)]
    for node in attention:
        out = node.args[3]
        assert node.kwargs["output_scale"].name == "scale"
        assert out.args[0].kwargs["dtype"] == FP8
        assert out.args[0].meta["example_value"].dtype == FP8
    cat = [node for node in graph.nodes if node.target is torch.cat]
    assert [node.args[0][0].args[0].args[0] for node in cat] == [node.args[3] for node in attention], "a view of it"
    left = [str(node.target) for node in graph.nodes]
    assert not any(name in left for name in ("clamp", "reciprocal", "to"))
    assert fuse_output_quant(graph) == 0, "again"
    assert fuse_rope_and_cache(graph, fused) == 2, "the other fusion finds what it looks for"


def nodes_of(graph, target):
    return [node for node in graph.nodes if node.target == target]


def another_reader(graph, at):
    with graph.inserting_after(at):
        graph.call_function(torch.sum, (at,))


BREAKS = {
    "read before it is quantised": lambda graph: another_reader(graph, nodes_of(graph, "to")[1].args[0]),
    "read as it was made": lambda graph: another_reader(graph, nodes_of(graph, torch.empty)[0]),
    "clamped closer": lambda graph: nodes_of(graph, "clamp")[0].update_arg(1, -240.0),
    "cast to another dtype": lambda graph: nodes_of(graph, "clamp")[0].next.update_arg(1, torch.float8_e5m2),
    "widened to another dtype": lambda graph: nodes_of(graph, "to")[1].update_arg(1, torch.float64),
    "rounded": lambda graph: setattr(nodes_of(graph, "clamp")[0], "target", "round"),
    "divided": lambda graph: setattr(nodes_of(graph, operator.mul)[0], "target", operator.truediv),
    "a scale for each token": lambda graph: nodes_of(graph, "scale")[0].meta.update(
        example_value=torch.ones(TOKENS, 1)
    ),
    "a scale that is computed": lambda graph: nodes_of(graph, "to")[0].update_arg(0, nodes_of(graph, "split")[0]),
    "a scale that is no reciprocal": lambda graph: setattr(nodes_of(graph, "reciprocal")[0], "target", "sqrt"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_an_output_that_is_read_otherwise_stays(what):
    graph = traced(quantised=True)
    BREAKS[what](graph)
    before = calls(graph)
    layers = 0 if what == "a scale for each token" else 1  # both layers have that scale
    assert fuse_output_quant(graph) == layers
    assert (calls(graph) == before) == (layers == 0)
    first = next(node for node in graph.nodes if "unified_attention" in str(node.target))
    assert "output_scale" not in first.kwargs
    assert nodes_of(graph, torch.empty)[0].kwargs["dtype"] == torch.bfloat16


@pytest.mark.parametrize("change", ["nothing", "names", "runner", "drafts", "context parallel"])
def test_the_cache_is_written_in_graphs_where_slots_stay_in_one_buffer(change):
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(prefill_context_parallel_size=2 if change == "context parallel" else 1),
        speculative_config=object() if change == "drafts" else None,
        use_v2_model_runner=change != "runner",
    )
    assert writes_in_graphs(config, hoisted=change != "names") is (change == "nothing")
