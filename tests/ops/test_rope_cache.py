"""rope_and_cache: the bits of its ops one after another, in q and in the caches, and caches untouched elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from batchproof.errors import ArgumentError, DeviceError, DtypeError, LayoutError, ShapeError, UnsupportedError
from batchproof.numerics import as_bits, first_mismatch
from batchproof.ops import _rope_cache_kernel as module
from batchproof.ops import rms_norm as norm_module
from batchproof.ops import rope as rope_module
from batchproof.ops._library import FLOAT_DTYPES
from batchproof.ops.rms_norm import rms_norm
from batchproof.ops.rope import rope, rope_cos_sin
from batchproof.ops.rope_cache import rope_and_cache

PROGRAM = Path(__file__).parent.parent / "rope_code.py"
BATCHES = [1, 2, 3, 8, 31, 32, 33, 255, 256, 257, 300]
POSITIONS = 50
INF, NAN = float("inf"), float("nan")
# head_dim, rot: halves of vectors, no power of two, partial, odd rest, wide, no rotation, no vectors
DIMS = [(64, 64), (128, 128), (80, 80), (96, 96), (128, 32), (256, 256), (64, 6), (16, 0), (33, 6), (10, 10)]
LAYOUTS = ["apart", "pairs of pages", "one after another", "k and v in turn", "heads before offsets", "odd rows"]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself runs in the other tests")


def caches(layout, pages, page_size, heads, head_dim, dtype, generator):
    """Two caches of random bytes, so that what is written beside a slot shows."""
    shapes = {
        "apart": (2, pages, page_size, heads, head_dim + 8),
        "pairs of pages": (pages, 2, page_size, heads, head_dim),
        "one after another": (2, pages, page_size, heads, head_dim),
        "k and v in turn": (pages, page_size, heads, 2 * head_dim),
        "heads before offsets": (2, pages, heads, page_size, head_dim),
        "odd rows": (2, pages, page_size, heads, head_dim + 1),
    }
    shape = (*shapes[layout][:-1], shapes[layout][-1] * dtype.itemsize)
    memory = torch.randint(0, 256, shape, generator=generator, device=generator.device, dtype=torch.uint8).view(dtype)
    if layout == "k and v in turn":
        return memory, *memory.chunk(2, dim=-1)
    if layout == "heads before offsets":
        return memory, *memory.transpose(2, 3)
    if layout == "apart":
        return memory, memory[0][..., 8:], memory[1][..., :-8]
    return memory, *(memory.unbind(1) if layout == "pairs of pages" else memory[..., :head_dim])


def inputs(
    generator, tokens=7, heads=4, kv_heads=2, dims=(64, 64), dtype=torch.float32, page_size=16, normed=True,
    layout="pairs of pages",
):  # fmt: skip
    """The op's arguments by name; q, k and v are views of one tensor; and the memory the caches are views of."""
    device, (head_dim, rot) = generator.device, dims

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    pages = tokens // page_size + 2
    q, k, v = randn(tokens, heads + 2 * kv_heads, head_dim).split((heads, kv_heads, kv_heads), dim=1)
    memory, k_cache, v_cache = caches(layout, pages, page_size, kv_heads, head_dim, dtype, generator)
    frequencies = (10000.0 ** -(torch.arange(rot // 2, dtype=torch.float64) * 2 / max(rot, 1))).float()
    weights = (randn(head_dim) * 0.3 + 1.0, randn(head_dim) * 0.3 + 1.0) if normed else (None, None)
    return {
        "q": q, "k": k, "v": v, "positions": torch.randint(POSITIONS, (tokens,), generator=generator, device=device),
        "cos_sin": rope_cos_sin(frequencies.to(device), POSITIONS), "k_cache": k_cache, "v_cache": v_cache,
        "slot_mapping": torch.randperm(pages * page_size, generator=generator, device=device)[:tokens],
        "q_weight": weights[0], "k_weight": weights[1],
    }, memory  # fmt: skip


def run(arguments, memory, op=rope_and_cache, **changed):
    """q_out and the caches' memory after a call, as bits; the memory is put back."""
    before = as_bits(memory).clone()
    q_out = op(**arguments | changed)
    after = as_bits(memory).clone()
    as_bits(memory).copy_(before)
    return q_out, after


def one_after_another(
    q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping, interleaved=False, q_weight=None, k_weight=None,
    eps=1e-6,
):  # fmt: skip
    if q_weight is not None:
        q = rms_norm(q, q_weight, eps)
    if k_weight is not None:
        k = rms_norm(k, k_weight, eps)
    k = rope(k, positions, cos_sin, interleaved)
    for token, slot in enumerate(slot_mapping[: len(k)].tolist()):
        if slot >= 0:
            k_cache[slot // k_cache.shape[1], slot % k_cache.shape[1]] = k[token]
            v_cache[slot // k_cache.shape[1], slot % k_cache.shape[1]] = v[token]
    return rope(q, positions, cos_sin, interleaved)


def kernel(q, interleaved=False, q_weight=None, k_weight=None, eps=1e-6, **rest):
    """The op by its kernel, also on the CPU."""
    out = torch.full(q.shape, NAN, dtype=q.dtype, device=q.device)
    names = ("k", "v", "positions", "cos_sin", "k_cache", "v_cache", "slot_mapping")
    module.launch(out, q, *(rest[name] for name in names), interleaved, q_weight, k_weight, eps)
    return out


def kernels(q, k, positions, cos_sin, interleaved=False, q_weight=None, k_weight=None, eps=1e-6, **rest):
    """The ops one after another by their kernels: norms, then rope, then what is cached by the CPU."""
    turned = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        if weight is not None:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
            norm_module.launch(x, None, weight, out, None, eps, False)
            x = out
        turned.append(torch.empty_like(x, memory_format=torch.contiguous_format))
        rope_module.launch(x, positions, cos_sin, turned[-1], interleaved)
    table = torch.zeros(1, 0, device=q.device)
    one_after_another(q, turned[1], positions=positions * 0, cos_sin=table, **rest)
    return turned[0]


def assert_same(found, expected):
    for name, a, b in zip(("q_out", "caches"), found, expected, strict=True):
        assert first_mismatch(a, b) is None, f"{name}: {first_mismatch(a, b)}"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dims", DIMS)
def test_it_has_the_bits_of_its_ops(dims, interleaved, normed, dtype, generator):
    case = inputs(generator, dims=dims, dtype=dtype, normed=normed)
    found, expected = (run(*case, op, interleaved=interleaved) for op in (rope_and_cache, one_after_another))
    assert_same(found, expected)
    assert found[0].is_contiguous()
    assert not torch.equal(found[1], as_bits(case[1])), "the caches are written"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (5, 1), (3, 3), (19, 19)])
def test_heads_pages_and_layouts_of_caches(heads, kv_heads, page_size, layout, generator):
    case = inputs(generator, 20, heads, kv_heads, page_size=page_size, layout=layout, dtype=torch.float16)
    assert_same(run(*case), run(*case, one_after_another))


@pytest.mark.parametrize("which", ["q_weight", "k_weight"])
def test_one_of_the_norms(which, generator):
    case = inputs(generator)
    assert_same(run(*case, **{which: None}), run(*case, one_after_another, **{which: None}))
    assert_same(run(*case, eps=0.5), run(*case, one_after_another, eps=0.5))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("normed", [False, True])
def test_a_token_has_one_result(normed, dtype, generator):
    """Whatever the batch's size, the token's place in it, and its neighbours."""
    arguments, memory = inputs(generator, max(BATCHES), dtype=dtype, normed=normed)
    batched = ("q", "k", "v", "positions", "slot_mapping")
    whole, written = run(arguments, memory)
    places = as_bits(memory)
    for tokens in BATCHES:
        some = arguments | {name: arguments[name][-tokens:] for name in batched}
        q_out, after = run(some, memory)
        assert first_mismatch(q_out, whole[-tokens:]) is None, f"{tokens} tokens"
        others = arguments["slot_mapping"][: len(whole) - tokens]
        expected = written.clone()
        expected[others // 16, :, others % 16] = places[others // 16, :, others % 16]
        assert first_mismatch(after, expected) is None, f"{tokens} tokens"
    slot = int(arguments["slot_mapping"][-1])
    for value in (NAN, INF, torch.finfo(dtype).max):
        hostile = {
            name: torch.cat((torch.full_like(x[:-1], value), x[-1:])) for name in "qkv" for x in [arguments[name]]
        }
        q_out, after = run(arguments | hostile, memory)
        assert first_mismatch(q_out[-1], whole[-1]) is None
        assert first_mismatch(after[slot // 16, :, slot % 16], written[slot // 16, :, slot % 16]) is None


@pytest.mark.parametrize("slot_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("op", [rope_and_cache, pytest.param(kernel, marks=interpreted)])
def test_tokens_without_a_slot_are_rotated_and_not_written(op, slot_dtype, generator):
    arguments, memory = inputs(generator, 9, normed=False)
    slots = arguments["slot_mapping"].to(slot_dtype)
    whole, _ = run(arguments, memory)
    padded = slots.clone()
    padded[[0, 3, 8]], padded[4] = -1, -300
    longer = torch.cat((slots, torch.tensor([3, 10**6], dtype=slot_dtype, device=slots.device)))
    for some in (padded, slots[:5], slots[:0], padded[:4], torch.full_like(slots, -1), longer):
        found = run(arguments, memory, op, slot_mapping=some)
        assert_same(found, run(arguments, memory, one_after_another, slot_mapping=some))
        assert first_mismatch(found[0], whole) is None


def test_nan_in_v_keeps_its_payload(generator):
    arguments, memory = inputs(generator, 3)
    payload = torch.full_like(as_bits(arguments["v"]), 0x7FA12345).view(torch.float32)
    run_bits = run(arguments, memory, v=payload)[1]
    slots = arguments["slot_mapping"]
    assert (run_bits[slots // 16, 1, slots % 16] == 0x7FA12345).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_table_in_the_activation_dtype(dtype, generator):
    arguments, memory = inputs(generator, dtype=dtype)
    table = arguments["cos_sin"].to(dtype)
    assert_same(run(arguments, memory, cos_sin=table), run(arguments, memory, cos_sin=table.float()))
    with pytest.raises(DtypeError, match=r"cos_sin is torch.float64, want one of torch.float32, torch"):
        rope_and_cache(**arguments | {"cos_sin": table.double()})


def test_layouts_of_inputs_leave_the_bits_alone(generator):
    arguments, memory = inputs(generator, dtype=torch.bfloat16)
    expected = run(arguments, memory)
    changes = (
        lambda x: x.contiguous(),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: torch.cat((x, x[..., :1]), -1)[..., :-1],
        lambda x: torch.cat((x[..., :1], x), -1)[..., 1:],
    )
    for change in changes:
        assert_same(run(arguments, memory, **{name: change(arguments[name]) for name in "qkv"}), expected)
    double = {name: arguments[name].repeat_interleave(2)[::2] for name in ("positions", "slot_mapping", "q_weight")}
    assert_same(run(arguments, memory, **double), expected)
    assert_same(run(arguments, memory, positions=arguments["positions"].int()), expected)
    assert_same(run(arguments, memory, cos_sin=arguments["cos_sin"].t().contiguous().t()), expected)


def test_empty(generator):
    for arguments, memory in (inputs(generator, 0), inputs(generator, 3, heads=0), inputs(generator, 3, kv_heads=0)):
        assert_same(run(arguments, memory), run(arguments, memory, one_after_another))
        assert rope_and_cache(**arguments).shape == arguments["q"].shape
    arguments, memory = inputs(generator, 2)
    nothing = {name: arguments[name][:0] for name in ("k_cache", "v_cache")}
    assert (
        rope_and_cache(**arguments | nothing | {"slot_mapping": torch.full_like(arguments["positions"], -1)})
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("slot", [32, 33, 10**6, 2**40])
def test_slots_outside_the_caches(slot, generator):
    """The caches are two pages of three, so that what is written just past them shows."""
    arguments, memory = inputs(generator, 20, normed=False)
    arguments |= {name: arguments[name][:2] for name in ("k_cache", "v_cache")}
    slots = torch.arange(20, device=memory.device)
    slots[5] = slot
    without = slots.clone()
    without[5] = -1
    expected = run(arguments, memory, one_after_another, slot_mapping=without)
    if memory.is_cuda:
        assert_same(run(arguments, memory, slot_mapping=slots), expected)
        return
    with pytest.raises(ArgumentError, match=rf"slot_mapping holds {slot}, want less than 32, the caches' 2 pages"):
        run(arguments, memory, slot_mapping=slots)
    assert_same(run(arguments, memory, kernel, slot_mapping=slots), expected)


@pytest.mark.parametrize("position", [-1, POSITIONS, 2**40])
def test_positions_outside_the_table(position, generator):
    arguments, memory = inputs(generator, 3, dims=(16, 8), normed=False)
    whole, written = run(arguments, memory)
    positions = arguments["positions"].clone()
    positions[1] = position
    if not memory.is_cuda:
        with pytest.raises(ArgumentError, match=rf"positions holds {position}, want 0 to {POSITIONS - 1}"):
            run(arguments, memory, positions=positions)
    out, after = run(arguments, memory, rope_and_cache if memory.is_cuda else kernel, positions=positions)
    assert out[1, :, :8].isnan().all()
    assert first_mismatch(out[1, :, 8:], whole[1, :, 8:]) is None
    assert first_mismatch(out[::2], whole[::2]) is None
    slot = int(arguments["slot_mapping"][1])
    key = after[slot // 16, 0, slot % 16]
    assert key.view(torch.float32)[:, :8].isnan().all()
    key.copy_(written[slot // 16, 0, slot % 16])
    assert first_mismatch(after, written) is None


def test_errors_name_the_value(generator):
    arguments, _ = inputs(generator, 5)

    def refused(error, match, **changed):
        with pytest.raises(error, match=match):
            rope_and_cache(**arguments | changed)

    q, k, k_cache = (arguments[name] for name in ("q", "k", "k_cache"))
    refused(ShapeError, r"q has shape \(5, 256\), want \[num_tokens, num_heads, head_dim\]", q=q.flatten(1))
    refused(ShapeError, r"k has shape \(4, 2, 64\), want \[5, num_kv_heads, 64\]", k=k[:4])
    refused(ShapeError, r"v has shape \(5, 1, 64\), want .* k and v alike", v=k[:, :1])
    refused(DtypeError, r"k is torch.float16, want torch.float32 as q is", k=k.half())
    refused(ShapeError, r"positions has shape \(4,\), want \(5,\)", positions=arguments["positions"][:4])
    refused(ShapeError, r"cos_sin has shape \(50, 64\), want .* at most 32, q's head_dim", q=q[..., :32])
    refused(
        ShapeError,
        r"k_cache has shape \(2, 16, 1, 64\), want \[num_pages, page_size, 2, 64\]",
        k_cache=k_cache[:, :, :1],
    )
    refused(ShapeError, r"v_cache has shape \(1, 16, 2, 64\), want .* alike", v_cache=k_cache[:1])
    refused(DtypeError, r"v_cache is torch.float16, want torch.float32", v_cache=k_cache.half())
    refused(LayoutError, r"k_cache has stride .*, want 1 for the last axis", k_cache=k_cache.mT.contiguous().mT)
    refused(LayoutError, r"k_cache is written in place", k_cache=k_cache[:1].expand(2, -1, -1, -1))
    refused(LayoutError, r"k_cache and v_cache are the same memory", v_cache=k_cache)
    refused(
        DtypeError, r"slot_mapping is torch.float32, want one of torch.int64", slot_mapping=torch.zeros_like(q[:, 0, 0])
    )
    refused(
        ShapeError, r"slot_mapping has shape \(5, 1\), want one axis", slot_mapping=arguments["slot_mapping"][:, None]
    )
    refused(DeviceError, r"slot_mapping is on meta, want", slot_mapping=arguments["slot_mapping"].to("meta"))
    refused(ShapeError, r"q_weight has shape \(63,\), want \(64,\)", q_weight=arguments["q_weight"][:63])
    refused(DtypeError, r"k_weight is torch.float16, want torch.float32", k_weight=arguments["k_weight"].half())
    refused(ArgumentError, r"eps is nan, want a finite number", eps=NAN)
    refused(UnsupportedError, "no backward pass", q=q.detach().clone().requires_grad_())


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("layout", ["apart", "pairs of pages"])
def test_registered_op(layout, normed, generator):
    arguments, _ = inputs(generator, dtype=torch.float16, normed=normed, layout=layout)
    weights = arguments.pop("q_weight"), arguments.pop("k_weight")
    order = ("q", "k", "v", "positions", "cos_sin", "k_cache", "v_cache", "slot_mapping")
    values = (*(arguments[name] for name in order), False, *weights, 1e-6)
    torch.library.opcheck(torch.ops.batchproof.rope_and_cache.default, values)


@pytest.fixture
def tree_sums(monkeypatch):
    """The interpreter's sums in the order of ``_row_tree``; numpy's depends on how wide what it adds is."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def by_tree(self, operand):
        data = np.moveaxis(operand.handle.data, self.axis, 0)
        if operand.handle.data.ndim == 3 and self.axis == 2:  # a vector: ascending
            while len(data) > 1:
                data = np.concatenate((data[:1] + data[1:2], data[2:]))
        while len(data) > 1:  # halves first
            data = data[: len(data) // 2] + data[len(data) // 2 :]
        total = data if self.keep_dims else data[0]
        return self.to_tensor(np.moveaxis(total, 0, self.axis) if self.keep_dims else total, operand.dtype)

    monkeypatch.setattr(interpreter.ReduceOps, "sum", by_tree)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dims", DIMS)
def test_kernel_in_the_interpreter(dims, interleaved, dtype, generator):
    case = inputs(generator, 3, 9, 2, dims=dims, dtype=dtype, normed=False)
    assert_same(run(*case, kernel, interleaved=interleaved), run(*case, interleaved=interleaved))


@interpreted
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dims", [*DIMS, (512, 512), (1024, 64)])
def test_kernel_with_norms_in_the_interpreter(dims, interleaved, dtype, tree_sums, generator):
    case = inputs(generator, 3, 9, 2, dims=dims, dtype=dtype)
    assert_same(run(*case, kernel, interleaved=interleaved), run(*case, kernels, interleaved=interleaved))


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_on_layouts_of_caches(layout, tree_sums, generator):
    case = inputs(generator, 5, layout=layout, page_size=64)
    assert_same(run(*case, kernel), run(*case, kernels))


@interpreted
@pytest.mark.parametrize("normed", [False, True])
def test_kernel_for_many_tokens_has_the_bits_of_that_for_few(normed, tree_sums, generator, monkeypatch):
    case = inputs(generator, 4, 19, 3, dims=(128, 128), dtype=torch.float16, normed=normed)
    few = run(*case, kernel)
    monkeypatch.setattr(module, "LAUNCHES", module.LAUNCHES[-1:])
    assert_same(run(*case, kernel), few)


@pytest.fixture(scope="module")
def code():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    output = subprocess.run([sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True, check=True)
    return json.loads(output.stdout)


def adds_by_the_tree(found, vec):
    """Whether vectors are threads' in ascending order, and what is left of a row is lanes' in order."""
    axis, shape = found["axis"], found["shape"]

    def along(part):
        return [base[axis] for base in found[part] if base[axis]]

    if axis == 2:
        powers = [1 << bit for bit in range(vec.bit_length() - 1)]
        return shape[2] == vec and along("register") == powers and along("lane") == along("warp") == []
    if len(shape) == 3:  # groups over warps: two, and a + b is b + a
        return shape[1] == 2
    lanes = [1 << bit for bit in range(shape[1].bit_length() - 1)]
    return shape[1] <= 32 and along("lane") == lanes and along("register") == along("warp") == []


@pytest.mark.skipif(torch.version.hip is not None, reason="compiles for NVIDIA GPUs")
def test_what_it_compiles_to(code):
    for name, facts in code.items():
        assert facts["fma"] == facts["local"] == 0, name
        assert (facts["wait"], facts["launch"]) == ((1, 1) if facts["pdl"] else (0, 0)), name
        assert bool(facts["sums"]) == facts["normed"], name
        assert all(adds_by_the_tree(found, facts["vec"]) for found in facts["sums"]), name
        if not facts["normed"] or "128, 128, interleaved=False" in name:
            assert facts["shared"] == facts["barriers"] == 0, name
        if "128, 128" in name or "64, 64" in name:
            assert facts["narrow loads"] == facts["narrow stores"] == 0 < facts["wide stores"], name


@pytest.mark.skipif(torch.version.hip is not None, reason="compiles for NVIDIA GPUs")
def test_another_order_would_be_seen(code):
    found = next(facts for name, facts in code.items() if "128, 128" in name and facts["normed"])
    vectors, lanes = (next(s for s in found["sums"] if s["axis"] == axis) for axis in (2, 1))
    assert not adds_by_the_tree(vectors, found["vec"] // 2)
    assert not adds_by_the_tree(vectors | {"register": vectors["register"][::-1]}, found["vec"])
    assert not adds_by_the_tree(lanes | {"lane": lanes["lane"][::-1]}, found["vec"])
