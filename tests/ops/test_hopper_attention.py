"""Prefill and decode on Hopper: the bits of the kernel for all, and what it leaves to that."""

import itertools

import pytest
import torch

from batchproof.numerics import first_mismatch
from batchproof.ops import _attention_plan as plans
from batchproof.ops import _hopper_attention as hopper
from batchproof.ops import attention as module
from batchproof.ops._hopper import is_hopper, use_static_weights
from batchproof.ops._quantize import quantize_static_fp8_reference
from batchproof.ops._row_launch import use_dependent_launch
from batchproof.ops.linear import linear
from batchproof.ops.rope_cache import rope_and_cache
from paged import Cache, assert_accurate, launched

INF, NAN = float("inf"), float("nan")
VARIANTS = [
    {}, {"window": 70}, {"window": 700}, {"causal": False}, {"softcap": 5.0}, {"causal": False, "window": 300},
    {"window": 9, "softcap": 5.0},
]  # fmt: skip
CASES = [  # heads, key heads, head_dim, dtype: 4, 1, 8, 3 and 16 rows a token
    *((8, 2, 128, torch.bfloat16, options) for options in VARIANTS),
    *((heads, kv_heads, 128, torch.bfloat16, {}) for heads, kv_heads in ((4, 4), (8, 1), (6, 2), (16, 1))),
    *((6, 2, 64, torch.bfloat16, options) for options in VARIANTS[::3]),
    *((8, 2, 128, torch.float16, options) for options in VARIANTS[::3]),
    *((4, 2, 256, torch.bfloat16, options) for options in VARIANTS),
]
hostile = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's in the interpreter, about NaN
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself runs in the other tests")


def test_caches_are_rows_of_slots_for_the_tma():
    together = torch.zeros(6, 2, 16, 4, 64, dtype=torch.bfloat16)  # keys and values of a page after one another
    assert hopper._places(together[:, 0]) == (32, 0, 64), "rows of a page, none and 64 columns of a head"
    heads_first = torch.zeros(6, 4, 16, 64, dtype=torch.bfloat16).transpose(1, 2)
    assert hopper._places(heads_first) == (64, 16, 0)
    beside = torch.zeros(6, 16, 4, 128, dtype=torch.bfloat16)  # keys and values of a head beside one another
    assert hopper._places(beside[..., :64]) == (16, 0, 128)
    assert hopper._places(torch.zeros(6, 16, 1, 64, dtype=torch.bfloat16)) == (16, 0, 0)


def test_a_cache_that_the_tma_cannot_read_is_left_to_the_other_kernel():
    cache = torch.zeros(6, 16, 4, 64, dtype=torch.bfloat16)
    assert hopper._places(cache[:, :8]) is None, "pages of 8 keys"
    assert hopper._places(cache[:0]) is None, "no page"
    assert hopper._places(cache.transpose(2, 3)) is None, "heads are the fastest axis"
    assert hopper._places(torch.zeros(6, 16, 4, 65, dtype=torch.bfloat16)[..., 1:]) is None, "an odd address"
    assert hopper._places(torch.zeros(6, 16, 1, 68, dtype=torch.bfloat16)[..., :64]) is None, "rows of 136 bytes"
    assert hopper._places(torch.zeros(6, 16, 2, 68, dtype=torch.bfloat16)[..., :64]) is None, "heads of 136 bytes"
    ragged = torch.zeros(6 * 1030, dtype=torch.bfloat16).as_strided((6, 16, 1, 64), (1030, 64, 64, 1))
    assert hopper._places(ragged) is None, "a page is no whole number of slots"


def part(sequence, token, consumers):
    """Block and consumer of a token of the first or second sequence, of 200 and 70, if a consumer has 32."""
    tokens = 32 * consumers
    blocks = -(-(200, 70)[sequence] // tokens)
    begins = 200 * sequence // tokens + sequence
    return begins + blocks - 1 - token // tokens, token % tokens // 32


@hostile
@interpreted
@pytest.mark.parametrize("consumers", [2, 3])
def test_only_what_is_odd_is_computed_again(consumers, monkeypatch, generator):
    """The kernel for all writes the rows past what there is room for, and the programs that have a flag."""
    cache = Cache(generator, [200, 70], 4, 2, 16, torch.float16)
    arguments = cache.arguments({0: (0, 200), 1: (0, 70)})
    expected = launched(arguments, 1)
    programs = {}

    def launch(q, *rest):
        programs["of"], programs["out"] = rest[-5], rest[3].fill_(7.0)
        odd = torch.zeros(rest[-5].grid[0] // 2 // consumers, consumers, 2, dtype=torch.int32)
        odd[part(0, 160, consumers)][1] = odd[part(1, 64, consumers)][0] = 1
        return odd.flatten()

    monkeypatch.setattr(module, "processors", lambda device: 1 if consumers == 3 else 132)
    monkeypatch.setattr(module, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "places_for", lambda q, k_cache, v_cache: (1, 0, 0))
    monkeypatch.setattr(hopper, "launch", launch)
    out = launched(arguments, 1)
    assert programs["of"].consumers == consumers
    assert programs["of"].grid == ({2: 4 + 2, 3: 2 + 2}[consumers] * 2 * consumers, 1), "of 32 tokens a consumer"
    again = torch.zeros(270, 4, dtype=torch.bool)
    again[160:192, 2:] = again[200 + 64 : 270, :2] = True
    assert first_mismatch(out[again], expected[again]) is None
    assert bool((out[~again] == 7.0).all())


@hostile
@interpreted
@pytest.mark.parametrize("given", ["block", "k_start", "k_scale", "v_scale", "fp32"])
def test_what_the_kernel_for_hopper_is_not_asked_for(given, monkeypatch, generator):
    cache = Cache(generator, [200], 4, 2, 16, torch.float32 if given == "fp32" else torch.float16)
    arguments, block = cache.arguments({0: (0, 200)}), plans.PREFILL if given == "block" else None
    if given == "k_start":
        arguments["k_start"] = torch.zeros(1, dtype=torch.int32)
    elif given.endswith("scale"):
        arguments[given] = torch.ones(1)
    monkeypatch.setattr(module, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "places_for", lambda q, *caches: None if q.dtype == torch.float32 else (1, 0, 0))
    monkeypatch.setattr(hopper, "launch", pytest.fail)
    launched(arguments, 1, block)


def taken(monkeypatch):
    """Whether any flag was set, of every launch of the kernel for Hopper, in a list that grows."""
    flags, launch = [], hopper.launch

    def note(*arguments):
        odd = launch(*arguments)
        plan = arguments[-5]
        consumers, group = plan.consumers, plan.group
        if consumers == 1:
            assert odd is None
            flags.append("one token")
            return odd
        assert consumers == (plans.consumers_for() if arguments[0].shape[2] <= 128 else 2)
        if not torch.cuda.is_current_stream_capturing():
            tokens = consumers * plans.CONSUMER.rows // group
            starts, written = arguments[5].tolist(), []
            for i, (start, end) in enumerate(itertools.pairwise(starts)):
                first = (start - starts[0]) // tokens + i
                written += range(first, first - (start - end) // tokens)
            flags.append(bool(odd.unflatten(0, (-1, consumers * arguments[1].shape[2]))[written].any()))
        return odd

    monkeypatch.setattr(hopper, "launch", note)
    return flags


@pytest.fixture(params=[2, 3], ids="{} consumers".format)
def on_hopper(request, monkeypatch, generator):
    if not is_hopper(generator.device):
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setattr(plans, "MANY", 0 if request.param == 3 else 10**9)
    monkeypatch.setattr(plans, "consumers_for", lambda *_: request.param)
    plans.plan_for.cache_clear()
    yield
    plans.plan_for.cache_clear()


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "dtype", "options"), CASES)
def test_prefill_has_the_bits_of_decode(heads, kv_heads, head_dim, dtype, options, monkeypatch, generator):
    """Whole, a chunk behind a cached prefix, and among others: as the other kernel has them with 16 rows a program."""
    flags = taken(monkeypatch)
    cache = Cache(generator, [1500, 130, 5, 600], heads, kv_heads, head_dim, dtype)
    cache.q[0] *= 4.0  # scores of a wide range
    cache.v[0] *= 2.0 ** torch.randint(-9, 9, cache.v[0].shape, generator=generator, device=generator.device)
    options = {"sinks": cache.randn(heads), **options} if heads == 8 else options
    spans = {0: (0, 1500), 1: (0, 130), 2: (4, 5), 3: (513, 600)}
    arguments = cache.arguments(spans, page_size=16, fill=1.0, **options)
    expected = launched(arguments, 1, plans.DECODE)
    assert not flags
    assert_accurate(expected, arguments)
    for page_size in (16, 256):
        out = launched(cache.arguments(spans, page_size=page_size, fill=1.0, **options), 1)
        assert first_mismatch(out, expected) is None, f"pages of {page_size}"
    late = launched(cache.arguments({3: (0, 600), 0: (1055, 1500)}, page_size=16, **options), 1)
    assert first_mismatch(late[513:600], expected[-87:]) is None, "a chunk among others"
    assert first_mismatch(late[600:], expected[1055:1500]) is None, "the end of a sequence"
    assert len(flags) == 3
    assert not any(flags)


DECODES = [  # heads, key heads, head_dim, dtype
    *((8, 2, 128, torch.bfloat16, options) for options in VARIANTS),
    *((heads, kv_heads, 128, torch.float16, {}) for heads, kv_heads in ((4, 4), (8, 1), (6, 2), (16, 1), (64, 1))),
    *((4, 2, dim, torch.bfloat16, options) for dim in (64, 256) for options in VARIANTS[::3]),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "dtype", "options"), DECODES)
@hostile
def test_one_token_each_has_the_bits_of_decode(heads, kv_heads, head_dim, dtype, options, monkeypatch, generator):
    """By any number of workers, with anything in unused slots; the rows that no sequence has are zero."""
    if not is_hopper(generator.device):
        pytest.skip("needs a Hopper GPU")
    flags = taken(monkeypatch)
    lengths = [1, 64, 65, 160, 511, 512, 513, 700, 2049, 5000]
    cache = Cache(generator, lengths, heads, kv_heads, head_dim, dtype)
    for i, n in enumerate(lengths):
        cache.q[i][n - 1] *= 4.0
        cache.v[i] *= 2.0 ** torch.randint(-9, 9, cache.v[i].shape, generator=generator, device=generator.device)
    spans = {i: (n - 1, n) for i, n in enumerate(lengths)}
    options = {"sinks": cache.randn(heads), **options} if heads == 8 else options
    arguments = cache.arguments(spans, fill=1.0, **options)
    block = plans.DECODE if heads // kv_heads <= plans.DECODE.rows else plans.CONSUMER
    expected = launched(arguments, 1, block)
    assert_accurate(expected, arguments)
    scale = torch.full((1,), 0.013, device=generator.device)
    quantised = quantize_static_fp8_reference(expected, scale)
    for fill in (1.0, NAN, INF):
        for page_size in (16, 64):
            arguments = cache.arguments(spans, page_size=page_size, fill=fill, **options)
            for workers in (1, 2, 7, 64, None):
                assert first_mismatch(launched(arguments, workers), expected) is None, f"{fill}, {workers} workers"
    out = launched({**arguments, "out_scale": scale})
    assert first_mismatch(out.view(torch.uint8), quantised.view(torch.uint8)) is None
    for i in range(len(lengths)):
        alone = launched(cache.arguments({i: spans[i]}, **options))
        assert first_mismatch(alone, expected[i : i + 1]) is None, f"{lengths[i]} keys alone"
    arguments["seqused_k"][3] = 0
    padded = {**arguments, "q": torch.cat((arguments["q"], torch.full_like(arguments["q"][:3], NAN)))}
    out = launched(padded)
    assert bool((out[3] == 0.0).all())
    assert bool((out[len(lengths) :] == 0.0).all())
    assert first_mismatch(out[4 : len(lengths)], expected[4:]) is None
    assert set(flags) == {"one token"}


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("options", [{}, {"window": 90}, {"causal": False}], ids=str)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@hostile
def test_what_a_row_does_not_see_cannot_reach_it(bad, options, monkeypatch, generator):
    """Unused slots, later keys and other sequences may hold anything."""
    flags = taken(monkeypatch)
    cache = Cache(generator, [1100, 300], 8, 2, 128, torch.bfloat16)
    spans = {0: (0, 1100), 1: (0, 300)}
    clean = launched(cache.arguments(spans, **options), 1, plans.DECODE)
    unused = launched(cache.arguments(spans, fill=bad, **options), 1)
    assert first_mismatch(unused, clean) is None, "unused slots"
    assert flags[-1], "the tail of the last page is multiplied, and its program is to be done again"
    cache.v[0][700:703], cache.k[1][200] = bad, bad
    arguments = cache.arguments(spans, **options)
    out = launched(arguments, 1)
    torch.testing.assert_close(
        out, launched(arguments, 1, plans.DECODE), rtol=0.0, atol=0.0, equal_nan=True, msg="seen values"
    )
    if options.get("causal", True):
        assert first_mismatch(out[:700], clean[:700]) is None, "keys after a query"
        assert first_mismatch(out[1100:1300], clean[1100:1300]) is None
    assert not bool(out[700].isfinite().all())


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("options", [{}, {"window": 90, "softcap": 5.0}, {"causal": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@hostile
def test_an_output_in_fp8_is_the_quantised_output(dtype, options, monkeypatch, generator):
    """Small and large values, an infinity and NaN: what either kernel writes, and a sequence that sees no key."""
    flags = taken(monkeypatch)
    cache = Cache(generator, [900, 130, 40], 8, 2, 128, dtype)
    for i, value in enumerate((3e4, -3e4, 1e-6, 0.0)):
        cache.v[0][:, 0, i] = value
    scale = torch.full((1,), 0.013, device=generator.device)
    for odd in (False, True):
        if odd:
            cache.v[0][700, 1, 5], cache.v[1][100, 0, 7] = INF, NAN
        arguments = cache.arguments({0: (0, 900), 1: (0, 130), 2: (0, 40)}, sinks=cache.randn(8), **options)
        arguments["seqused_k"][2] = 0
        expected = quantize_static_fp8_reference(launched(arguments, 1, plans.DECODE), scale)
        out = launched({**arguments, "out_scale": scale}, 1)
        assert flags[-1] == odd
        assert first_mismatch(out.view(torch.uint8), expected.view(torch.uint8)) is None


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
def test_layouts_of_the_cache_and_of_queries(monkeypatch, generator):
    """As engines have them: keys and values of a page in one tensor, heads before slots; queries cut from qkv."""
    flags = taken(monkeypatch)
    cache = Cache(generator, [900], 8, 2, 128, torch.bfloat16)
    arguments = cache.arguments({0: (100, 900)})
    expected = launched(arguments, 1, plans.DECODE)
    pages = len(arguments["k_cache"])
    both = torch.stack([arguments["k_cache"], arguments["v_cache"]], dim=1)
    qkv = torch.full((800, 12, 128), NAN, dtype=torch.bfloat16, device=generator.device)
    qkv[:, :8] = arguments["q"]
    heads_first = {
        name: arguments[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("k_cache", "v_cache")
    }
    for change in ({"k_cache": both[:, 0], "v_cache": both[:, 1]}, heads_first, {"q": qkv[:, :8]}):
        out = launched({**arguments, **change}, 1)
        assert first_mismatch(out, expected) is None, [*change]
    assert len(flags) == 3
    odd = torch.zeros(pages, 16, 2, 129, dtype=torch.bfloat16, device=generator.device)[..., 1:]
    odd.copy_(arguments["k_cache"])
    assert first_mismatch(launched({**arguments, "k_cache": odd}, 1), expected) is None
    assert len(flags) == 3, "rows of 258 bytes are the other kernel's"


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
def test_a_graph_s_replay_and_wrong_lengths(monkeypatch, generator):
    taken(monkeypatch)
    cache = Cache(generator, [700, 300], 8, 2, 128, torch.bfloat16)
    arguments = cache.arguments({0: (0, 700), 1: (0, 300)})
    expected = launched(arguments, 1, plans.DECODE)
    graph = torch.cuda.CUDAGraph()
    launched(arguments, 1)
    with torch.cuda.graph(graph):
        out = launched(arguments, 1)
    out.fill_(NAN)
    graph.replay()
    assert first_mismatch(out, expected) is None
    arguments["seqused_k"][1] = 0  # an empty sequence whose queries see nothing
    graph.replay()
    assert first_mismatch(out[:700], expected[:700]) is None
    assert bool((out[700:] == 0.0).all())


@pytest.fixture
def in_an_engine(generator):
    """Whether kernels let one another in early, and products read weights ahead, as in vLLM."""
    if not is_hopper(generator.device):
        pytest.skip("needs a Hopper GPU")

    def choose(yes):
        use_dependent_launch(yes, at_once=True)
        use_static_weights(yes)

    yield choose
    use_dependent_launch(True)
    use_static_weights(False)


@pytest.mark.gpu
@pytest.mark.parametrize(("sequences", "running"), [(1, 1), (3, 3), (4, 3), (4, 4), (8, 5)])
@pytest.mark.parametrize("length", [41, 700])
def test_layers_in_a_graph_have_the_bits_of_ops_one_by_one(sequences, running, length, generator, in_an_engine):
    """Kernels that are let in early by those before them, beside products that read their weights ahead, many times."""
    device, dtype, heads, kv_heads, size, width, layers = generator.device, torch.bfloat16, 32, 8, 128, 4096, 6

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    into = [randn((heads + 2 * kv_heads) * size, width) * width**-0.5 for _ in range(layers)]
    back = [randn(width, heads * size) * width**-0.5 for _ in range(layers)]
    caches = [(randn(512, 16, kv_heads, size), randn(512, 16, kv_heads, size)) for _ in range(layers)]
    cos_sin, x = randn(1024, size), randn(sequences, width)
    pages = torch.randperm(512, generator=generator, device=device)[: 64 * sequences].view(sequences, 64).int()
    lengths = torch.tensor([length + 17 * i if i < running else 0 for i in range(sequences)], device=device)
    at = (lengths - 1).clamp(min=0)
    slots = pages.gather(1, at[:, None] // 16)[:, 0] * 16 + at % 16
    slots = torch.where(lengths > 0, slots, -1)
    bounds = torch.arange(sequences + 1, device=device).clamp(max=running).int()

    def step():
        hidden = x
        for i in range(layers):
            q, k, v = linear(hidden, into[i]).unflatten(1, (-1, size)).split([heads, kv_heads, kv_heads], 1)
            q = rope_and_cache(q, k, v, at, cos_sin, *caches[i], slots)
            out = module.paged_attention(q, *caches[i], bounds, lengths.int(), pages, 1, size**-0.5)
            hidden = linear(out.flatten(1), back[i])
        return hidden[:running]

    in_an_engine(False)
    expected = step()
    in_an_engine(True)
    assert first_mismatch(step(), expected) is None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for replay in range(100):
        graph.replay()
        assert first_mismatch(out, expected) is None, f"replay {replay}"
