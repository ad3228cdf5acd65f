"""paged_attention: accuracy, and bits that neither batch, chunks, pages nor what lies unused in the cache can move."""

from dataclasses import replace

import pytest
import torch

from batchproof.errors import (
    ArgumentError,
    BatchproofError,
    DeviceError,
    DtypeError,
    ShapeError,
    UnsupportedError,
)
from batchproof.numerics import first_mismatch
from batchproof.ops import _attention_kernels as kernels
from batchproof.ops import _attention_plan as plans
from batchproof.ops import attention as module
from batchproof.ops._hopper import is_hopper
from batchproof.ops._library import FLOAT_DTYPES
from batchproof.ops._quantize import quantize_static_fp8_reference
from batchproof.ops._triton import tl, triton
from batchproof.ops.attention import paged_attention
from paged import Cache, assert_accurate, launched

INF, NAN = float("inf"), float("nan")
# heads, key heads, head_dim
GROUPS = [(4, 4, 64), (8, 2, 32), (6, 2, 80), (8, 1, 128), (1, 1, 16), (2, 1, 256), (40, 2, 24)]
VARIANTS = [{}, {"window": 70}, {"causal": False}, {"window": 9, "softcap": 5.0}]
SHORT = 128  # keys of a split, for the interpreter's sake
SPLIT_VARIANTS = [*VARIANTS, {"window": 30}, {"window": 200}, {"softcap": 3.0}, {"causal": False, "window": 150}]
WORKERS = (2, 5)
hostile = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's in the interpreter, about NaN
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself runs in the other tests")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), GROUPS)
def test_accuracy(heads, kv_heads, head_dim, options, dtype, generator):
    cache = Cache(generator, [1, 40, 97], heads, kv_heads, head_dim, dtype)
    arguments = cache.arguments({0: (0, 1), 1: (0, 40), 2: (90, 97)}, **options)
    assert_accurate(paged_attention(**arguments), arguments)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_accuracy_of_adversarial_scores(dtype, generator):
    cache = Cache(generator, [50, 50, 50], dtype=dtype)
    cache.q[0] *= 30  # one key takes all
    cache.k[1].zero_()  # a plain mean
    cache.v[2] *= 2.0 ** torch.randint(-12, 10, cache.v[2].shape, generator=generator, device=cache.v[2].device)
    for sequence in range(3):
        arguments = cache.arguments({sequence: (0, 50)})
        assert_accurate(paged_attention(**arguments), arguments)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_sequence_has_one_result(options, dtype, generator):
    lengths = [37, 1, 5, 130, 64, 65, 17]
    cache = Cache(generator, lengths, dtype=dtype)
    whole = {i: (0, n) for i, n in enumerate(lengths)}
    together = cache.attend(whole, **options)
    for i, span in whole.items():
        assert first_mismatch(cache.attend({i: span}, **options)[0], together[i]) is None, f"sequence {i}"
    backwards = cache.attend(dict(reversed(whole.items())), **options)[::-1]
    mixed = cache.attend({3: (129, 130), 0: (36, 37), 5: (0, 65), 1: (0, 1)}, **options)
    for i, span in whole.items():
        assert first_mismatch(backwards[i], together[i]) is None, f"sequence {i} of {span}"
    for out, i in zip(mixed, (3, 0, 5, 1), strict=True):
        assert first_mismatch(out, together[i][-len(out) :]) is None, f"sequence {i}, mixed"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("options", [o for o in VARIANTS if o.get("causal", True)], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 32), (6, 2, 80)])
def test_prefill_chunks_and_decode_have_the_same_bits(heads, kv_heads, head_dim, options, dtype, generator):
    cache = Cache(generator, [131, 20], heads, kv_heads, head_dim, dtype)
    whole = cache.attend({0: (0, 131)}, **options)[0]
    for sizes in ([64, 67], [1, 63, 65, 2]):
        ends = torch.tensor(sizes).cumsum(0).tolist()
        parts = [
            cache.attend({0: (end - n, end), 1: (5, 20)}, **options)[0] for n, end in zip(sizes, ends, strict=True)
        ]
        assert first_mismatch(torch.cat(parts), whole) is None, f"in chunks of {sizes}"
    for end in (1, 17, 63, 64, 65, 128, 129, 131):
        assert first_mismatch(cache.attend({0: (end - 1, end)}, **options)[0], whole[end - 1 : end]) is None, f"{end}"


def test_more_than_a_thousand_keys(generator):
    """Past a chunk of the CPU's exact product."""
    cache = Cache(generator, [2100], 2, 1, 16)
    arguments = cache.arguments({0: (2090, 2100)})
    whole = paged_attention(**arguments)
    assert_accurate(whole, arguments)
    for first, end in ((2090, 2091), (2091, 2098), (2099, 2100)):
        assert first_mismatch(cache.attend({0: (first, end)})[0], whole[first - 2090 : end - 2090]) is None
    edge = cache.attend({0: (1020, 1030)}, window=1000)[0]
    for end in (1021, 1024, 1025, 1026, 1030):
        assert first_mismatch(cache.attend({0: (end - 1, end)}, window=1000)[0], edge[end - 1021 : end - 1020]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_pages_leave_the_bits_alone(options, dtype, generator):
    cache = Cache(generator, [70, 33, 16], dtype=dtype)
    spans = {0: (60, 70), 1: (0, 33), 2: (15, 16)}
    expected = torch.cat(cache.attend(spans, page_size=1, **options))
    for page_size in (1, 2, 7, 16, 64, 256):
        for index in (torch.int32, torch.int64):
            out = torch.cat(cache.attend(spans, page_size=page_size, dtype=index, **options))
            assert first_mismatch(out, expected) is None, f"pages of {page_size}"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("fill", [NAN, INF, -INF, 3e38])
def test_unused_slots_and_pages_are_not_read(fill, dtype, generator):
    fill = min(fill, torch.finfo(dtype).max) if fill == 3e38 else fill
    cache = Cache(generator, [37, 5, 64, 1], dtype=dtype)
    spans = {0: (30, 37), 1: (0, 5), 2: (63, 64), 3: (0, 1)}
    expected = torch.cat(cache.attend(spans))
    assert first_mismatch(torch.cat(cache.attend(spans, fill=fill)), expected) is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_hostile_sequence_is_alone_in_it(value, dtype, generator):
    cache = Cache(generator, [37, 50, 5], dtype=dtype)
    spans = {0: (0, 37), 1: (0, 50), 2: (4, 5)}
    expected = cache.attend(spans)
    for tensors in (cache.q, cache.k, cache.v):
        tensors[1][::3] = value
    out = cache.attend(spans)
    assert not out[1].isfinite().all()
    for i in (0, 2):
        assert first_mismatch(out[i], expected[i]) is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_what_a_query_may_not_see_does_not_count(value, which, dtype, generator):
    """A later token's NaN, or one a window has let go of, is not there in a decode step: nor may it be in a prefill."""
    cache = Cache(generator, [40], dtype=dtype)
    causal, windowed = cache.attend({0: (0, 40)})[0], cache.attend({0: (0, 40)}, window=6)[0]
    getattr(cache, which)[0][20] = value
    assert first_mismatch(cache.attend({0: (0, 40)})[0][:20], causal[:20]) is None
    out = cache.attend({0: (0, 40)}, window=6)[0]
    assert first_mismatch(out[:20], windowed[:20]) is None
    assert first_mismatch(out[26:], windowed[26:]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gone", [1, 16, 64, 70, 100])
def test_a_table_that_starts_late_has_the_same_bits(gone, dtype, generator):
    """A sliding window may have let go of the first keys; k_start says how many."""
    cache = Cache(generator, [120, 30], dtype=dtype)
    options = {"window": 12}
    expected = cache.attend({0: (112, 120), 1: (0, 30)}, **options)
    cache.k[0], cache.v[0], cache.lengths = cache.k[0][gone:], cache.v[0][gone:], [120 - gone, 30]
    spans = {0: (112 - gone, 120 - gone), 1: (0, 30)}
    cache.q[0] = cache.q[0][gone:]
    k_start = torch.tensor([gone, 0], dtype=torch.int32, device=generator.device)
    out = cache.attend(spans, k_start=k_start, **options)
    for mine, wanted in zip(out, expected, strict=True):
        if gone <= 100:
            assert first_mismatch(mine, wanted) is None


def test_empty_sequences(generator):
    cache = Cache(generator, [20, 0, 9, 0])
    expected = cache.attend({0: (10, 20), 2: (0, 9)})
    out = cache.attend({1: (0, 0), 0: (10, 20), 3: (0, 0), 2: (0, 9)})
    assert first_mismatch(out[1], expected[0]) is None
    assert first_mismatch(out[3], expected[1]) is None
    nothing = cache.arguments({1: (0, 0), 3: (0, 0)})
    assert paged_attention(**nothing).shape == (0, 4, 32)
    none = {**nothing, "seqused_k": nothing["seqused_k"][:0], "block_table": nothing["block_table"][:0]}
    assert paged_attention(**{**none, "cu_seqlens_q": nothing["cu_seqlens_q"][:1]}).shape == (0, 4, 32)


def test_a_prefill_among_many_sequences_of_one_query(generator):
    """Of more sequences than are looked at together, and some without a query: every program finds its own."""
    lengths = [3] * 140 + [70] + [5] * 120
    cache = Cache(generator, lengths, heads=1, kv_heads=1, head_dim=16)
    spans = {i: (n if i % 50 == 7 else n - 1, n) for i, n in enumerate(lengths)} | {140: (0, 70)}
    arguments = cache.arguments(spans)
    out = launched(arguments)
    assert_accurate(out, arguments)
    first = int(arguments["cu_seqlens_q"][140])
    for sequence, rows in ((140, out[first : first + 70]), (260, out[-1:])):
        assert first_mismatch(rows, launched(cache.arguments({sequence: spans[sequence]}))) is None


def test_a_query_that_sees_no_key_is_zero(generator):
    arguments = Cache(generator, [4]).arguments({0: (3, 4)})
    arguments["seqused_k"].zero_()
    assert torch.equal(paged_attention(**arguments), torch.zeros_like(arguments["q"]))


def test_max_seqlen_q_bounds_the_launch_and_changes_no_bits(generator):
    arguments = Cache(generator, [40, 3]).arguments({0: (0, 40), 1: (0, 3)})
    expected = paged_attention(**arguments)
    assert first_mismatch(paged_attention(**{**arguments, "max_seqlen_q": 1000}), expected) is None


def test_layout_leaves_the_bits_alone(generator):
    arguments = Cache(generator, [40, 9]).arguments({0: (0, 40), 1: (2, 9)})
    expected = paged_attention(**arguments)

    def check(**changes):
        assert first_mismatch(paged_attention(**{**arguments, **changes}), expected) is None, str(list(changes))

    q, k, v = (arguments[name] for name in ("q", "k_cache", "v_cache"))
    check(q=q.transpose(0, 1).contiguous().transpose(0, 1))
    check(q=q.repeat_interleave(2, -1)[..., ::2])
    both = torch.stack((k, v), dim=1)  # [pages, 2, ...], as vLLM has it
    check(k_cache=both[:, 0], v_cache=both[:, 1])
    check(k_cache=k.transpose(1, 2).contiguous().transpose(1, 2))
    check(v_cache=v.repeat_interleave(2, -1)[..., ::2])
    check(block_table=arguments["block_table"].t().contiguous().t())
    check(seqused_k=arguments["seqused_k"].repeat_interleave(2)[::2])
    check(cu_seqlens_q=arguments["cu_seqlens_q"].repeat_interleave(2)[::2])


def wrong_arguments(good):
    """(error, what it says, what is wrong) for arguments that are otherwise ``good``."""
    q, k, v = good["q"], good["k_cache"], good["v_cache"]
    return {
        "2-D q": (ShapeError, r"q has shape \(13, 128\)", {"q": q.flatten(1)}),
        "heads no multiple": (ShapeError, r"q has shape \(13, 3, 32\)", {"q": q[:, :3]}),
        "head_dim of k": (ShapeError, r"k_cache \(\d+, 16, 2, 16\)", {"k_cache": k[..., :16]}),
        "head_dim of v": (ShapeError, r"v_cache \(\d+, 16, 2, 16\)", {"v_cache": v[..., :16]}),
        "heads of v": (ShapeError, "v_cache", {"v_cache": torch.cat((v, v), 2)}),
        "pages of v": (ShapeError, "v_cache", {"v_cache": v[:-1]}),
        "page size of v": (ShapeError, "v_cache", {"v_cache": v[:, :8]}),
        "short cu_seqlens_q": (ShapeError, r"cu_seqlens_q \(2,\)", {"cu_seqlens_q": good["cu_seqlens_q"][:-1]}),
        "short block_table": (ShapeError, r"block_table \(1, \d+\)", {"block_table": good["block_table"][:1]}),
        "short k_start": (ShapeError, r"k_start has shape \(1,\), want \(2,\)", {"k_start": good["seqused_k"][:1]}),
        "dtype of q": (DtypeError, "q is torch.float64", {"q": q.double()}),
        "dtype of k": (DtypeError, "k_cache is torch.float16, want torch.float32", {"k_cache": k.half()}),
        "dtype of seqused_k": (DtypeError, "seqused_k is torch.float32", {"seqused_k": good["seqused_k"].float()}),
        "dtype of k_start": (
            DtypeError,
            "k_start is torch.float32",
            {"k_start": good["seqused_k"].float(), "window": 4},
        ),
        "device of k": (BatchproofError, "k_cache is on meta, want", {"k_cache": k.to("meta")}),
        "device of block_table": (
            BatchproofError,
            "block_table is on meta, want",
            {"block_table": good["block_table"].to("meta")},
        ),
        "scale": (ArgumentError, "softmax_scale nan", {"softmax_scale": NAN}),
        "no scale": (ArgumentError, "softmax_scale 0.0", {"softmax_scale": 0.0}),
        "negative scale": (ArgumentError, "softmax_scale -0.125", {"softmax_scale": -0.125}),
        "window": (ArgumentError, "window -1", {"window": -1}),
        "softcap": (ArgumentError, "softcap -1.0", {"softcap": -1.0}),
        "infinite softcap": (ArgumentError, "softcap inf", {"softcap": INF}),
        "max_seqlen_q": (ArgumentError, "max_seqlen_q -1", {"max_seqlen_q": -1}),
        "dtype of v": (
            DtypeError,
            "v_cache is torch.float8_e4m3fn, want torch.float32 as k_cache is",
            {"v_cache": good["v_cache"].to(torch.float8_e4m3fn)},
        ),
        "sinks": (ShapeError, r"sinks has shape \(1,\), want \(4,\)", {"sinks": torch.zeros(1)}),
        "dtype of sinks": (DtypeError, "sinks is torch.int64", {"sinks": torch.zeros(4, dtype=torch.int64)}),
        "shape of a scale": (ShapeError, r"k_scale has shape \(2,\), want one element", {"k_scale": torch.ones(2)}),
        "dtype of a scale": (DtypeError, "v_scale is torch.float16", {"v_scale": torch.ones(1).half()}),
        "device of a scale": (DeviceError, "v_scale is on meta, want", {"v_scale": torch.ones(1, device="meta")}),
        "autograd": (UnsupportedError, "no backward pass", {"q": q.clone().requires_grad_()}),
    }


WRONG = list(wrong_arguments(Cache(torch.Generator(), [9, 4]).arguments({0: (0, 9), 1: (0, 4)})))


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_value(case, generator):
    good = Cache(generator, [9, 4]).arguments({0: (0, 9), 1: (0, 4)})
    error, match, changes = wrong_arguments(good)[case]
    with pytest.raises(error, match=match):
        paged_attention(**{**good, **changes})


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_registered_op(options, generator):
    none = dict.fromkeys(("k_start", "sinks", "k_scale", "v_scale", "out_scale"))
    arguments = {"causal": True, "window": 0, "softcap": 0.0, **none, **options}
    arguments = Cache(generator, [9, 4], dtype=torch.float16).arguments({0: (0, 9), 1: (3, 4)}, **arguments)
    op = torch.ops.batchproof.paged_attention.default
    torch.library.opcheck(op, tuple(arguments.values()))
    scale = torch.full((1,), 0.02, device=generator.device)
    torch.library.opcheck(op, tuple({**arguments, "out_scale": scale}.values()))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_kernel_in_the_interpreter(options, dtype, generator):
    cache = Cache(generator, [70, 5], 6, 2, 24, dtype)
    arguments = cache.arguments({0: (64, 70), 1: (0, 5)}, page_size=8, fill=NAN, **options)
    out = launched(arguments)
    assert_accurate(
        out, {**arguments, "k_cache": arguments["k_cache"].nan_to_num(), "v_cache": arguments["v_cache"].nan_to_num()}
    )
    for end in (65, 67, 70):
        if options.get("causal", True):
            alone = launched(cache.arguments({0: (end - 1, end)}, page_size=3, **options))
            torch.testing.assert_close(alone[0], out[end - 65], rtol=0.0, atol=2e-6 if dtype == torch.float32 else 2e-3)


@interpreted
def test_kernel_reads_strided_indices(generator):
    arguments = Cache(generator, [40, 9]).arguments({0: (36, 40), 1: (7, 9)}, page_size=4)
    expected = launched(arguments)
    for name in ("block_table", "seqused_k", "cu_seqlens_q"):
        strided = arguments[name].repeat_interleave(2, -1)[..., ::2]
        assert first_mismatch(launched({**arguments, name: strided}), expected) is None, name


@hostile
@interpreted
@pytest.mark.parametrize("value", [NAN, INF])
def test_kernel_does_not_count_what_a_query_may_not_see(value, generator):
    cache = Cache(generator, [12], 2, 1, 16)
    expected = launched(cache.arguments({0: (0, 12)}))
    cache.v[0][9] = value
    assert first_mismatch(launched(cache.arguments({0: (0, 12)}))[:9], expected[:9]) is None


@pytest.fixture
def short_splits(monkeypatch):
    monkeypatch.setattr(module, "SPLIT", SHORT)


@pytest.fixture
def row_by_row(monkeypatch):
    """Products in the interpreter whose rows' bits do not depend on their place, which BLAS does not promise."""
    if torch.cuda.is_available():
        return
    import numpy as np
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, *unused):
        rows = [np.matmul(row[None], b.data, dtype=d.data.dtype) for row in a.data]
        return interpreter.TensorHandle(np.concatenate(rows) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def long_cache(generator, dtype=torch.float32):
    return Cache(generator, [300, 5, 129, 128, 0], dtype=dtype)


LONG_SPANS = {0: (282, 300), 1: (0, 5), 4: (0, 0), 2: (128, 129), 3: (120, 128)}


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", SPLIT_VARIANTS, ids=str)
def test_programs_that_share_splits_change_no_bits(options, dtype, generator):
    arguments = long_cache(generator, dtype).arguments(LONG_SPANS, **options)
    expected = launched(arguments, workers=1)
    assert_accurate(expected, arguments)
    for workers in WORKERS:
        assert first_mismatch(launched(arguments, workers), expected) is None, f"{workers} workers"


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("gone", [1, 64, 127, 128, 200])
def test_splits_are_at_absolute_positions(gone, generator):
    """Where a window has let go of the first keys, k_start leaves the splits where they were."""
    cache = Cache(generator, [300, 130])
    options = {"window": 90}
    whole = cache.arguments({0: (292, 300), 1: (126, 130)}, **options)
    expected = launched(whole, workers=1)
    cache.q[0], cache.k[0], cache.v[0], cache.lengths = (
        cache.q[0][gone:],
        cache.k[0][gone:],
        cache.v[0][gone:],
        [
            300 - gone,
            130,
        ],
    )
    k_start = torch.tensor([gone, 0], device=generator.device)
    late = cache.arguments({0: (292 - gone, 300 - gone), 1: (126, 130)}, k_start=k_start, **options)
    for workers in (1, 3):
        assert first_mismatch(launched(late, workers), expected) is None, f"{workers} workers"
        assert first_mismatch(launched(whole, workers), expected) is None, f"{workers} workers"


@pytest.mark.usefixtures("short_splits", "row_by_row")
@pytest.mark.parametrize("options", [{}, {"window": 150, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_prefill_chunks_and_decode_have_the_same_bits_across_splits(options, dtype, generator):
    cache = Cache(generator, [270, 40], 2, 1, dtype=dtype)
    whole = launched(cache.arguments({0: (0, 270)}, **options), workers=1)
    for first, end, workers in ((0, 100, 1), (100, 257, 2), (257, 270, 3)):
        chunk = launched(cache.arguments({1: (39, 40), 0: (first, end)}, page_size=7, **options), workers)
        assert first_mismatch(chunk[1:], whole[first:end]) is None, f"chunk {first}:{end}"
    for end in (1, 127, 128, 129, 256, 270):
        for workers in (1, 3):
            decoded = launched(cache.arguments({0: (end - 1, end), 1: (0, 3)}, **options), workers)
            assert first_mismatch(decoded[:1], whole[end - 1 : end]) is None, f"{end}, {workers} workers"


@pytest.mark.usefixtures("short_splits", "row_by_row")
@pytest.mark.parametrize("workers", [1, 3])
def test_neighbours_and_pages_do_not_move_a_split(workers, generator):
    cache = long_cache(generator)
    expected = {i: launched(cache.arguments({i: span}), 1) for i, span in LONG_SPANS.items()}
    for page_size in (7, 256):
        for spans in (LONG_SPANS, dict(reversed(LONG_SPANS.items()))):
            out = launched(cache.arguments(spans, page_size=page_size), workers)
            parts = out.split([end - first for first, end in spans.values()])
            for i, part in zip(spans, parts, strict=True):
                assert first_mismatch(part, expected[i]) is None, f"sequence {i}, pages of {page_size}"


@hostile
@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_hostile_values_stay_where_they_are_seen(value, workers, generator):
    cache = Cache(generator, [300, 270, 40])
    spans = {0: (250, 260), 1: (260, 270), 2: (30, 40)}
    expected = launched(cache.arguments(spans), workers=1)
    for tensors in (cache.k, cache.v):
        tensors[0][255:] = value  # the first five queries do not see it, nor the split that begins at 256
    cache.v[1][3, 0, 0] = value
    cache.v[1][200, 0, 1], cache.v[1][100, 0, 1] = INF, -INF
    out = launched(cache.arguments(spans, fill=NAN), workers)
    assert first_mismatch(out[:5], expected[:5]) is None
    assert not out[5:10].isfinite().any()
    assert first_mismatch(out[20:], expected[20:]) is None
    second = out[10:20, :2]  # the query heads of the first key head
    assert first_mismatch(second[..., 2:], expected[10:20, :2, 2:]) is None
    assert second[..., 1].isnan().all()
    torch.testing.assert_close(second[..., 0], torch.full_like(second[..., 0], value), equal_nan=True)
    assert first_mismatch(out[10:20, 2:], expected[10:20, 2:]) is None


@hostile
@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 100}], ids=str)
def test_programs_that_share_splits_agree_on_hostile_values(options, generator):
    cache = Cache(generator, [300])
    cache.q[0][297] = NAN
    cache.k[0][10], cache.k[0][140] = INF, NAN
    cache.v[0][::29], cache.v[0][250:, :, :8], cache.v[0][5] = 3e38, -INF, NAN
    arguments = cache.arguments({0: (296, 300)}, **options)
    expected = launched(arguments, workers=1)
    for workers in WORKERS:
        torch.testing.assert_close(launched(arguments, workers), expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("workers", [1, 2])
def test_sequences_without_queries_or_keys_among_splits(workers, generator):
    cache = Cache(generator, [200, 0, 0])
    expected = launched(cache.arguments({0: (198, 200)}), workers=1)
    arguments = cache.arguments({1: (0, 0), 0: (198, 200), 2: (0, 0)})
    assert first_mismatch(launched(arguments, workers), expected) is None
    arguments["seqused_k"].zero_()
    assert torch.equal(launched(arguments, workers), torch.zeros_like(expected))


@pytest.mark.usefixtures("short_splits")
def test_lengths_past_the_bounds_of_a_launch_write_nowhere_else(generator):
    """The launch has room for what max_seqlen_q and the table say; a wrong one must not reach another row's place."""
    cache = Cache(generator, [263, 40])
    arguments = cache.arguments({0: (255, 263), 1: (39, 40)}, window=129)  # the first has keys in three splits
    expected = launched(arguments, workers=3)
    short = launched({**arguments, "max_seqlen_q": 1}, workers=3)  # of which one query has room for two
    assert first_mismatch(short[[0, 8]], expected[[0, 8]]) is None


def test_a_context_of_one_split_is_one_softmax(generator, monkeypatch):
    arguments = Cache(generator, [128, 100]).arguments({0: (124, 128), 1: (99, 100)})
    expected = launched(arguments)
    monkeypatch.setattr(module, "SPLIT", SHORT)
    assert first_mismatch(launched(arguments), expected) is None
    monkeypatch.setattr(module, "SPLIT", 64)
    assert first_mismatch(launched(arguments), expected) is not None, "the splits are no part of the order"


@pytest.mark.usefixtures("short_splits")
def test_splits_merged_in_another_order_are_found(generator, monkeypatch):
    """A planted variance: where several programs share the splits, the last comes first."""
    arguments = Cache(generator, [384]).arguments({0: (380, 384)}, page_size=64)
    arguments["block_table"] = arguments["block_table"][:, :6]
    expected = launched(arguments, workers=1)
    assert first_mismatch(launched(arguments, workers=3), expected) is None
    merge = module._MERGE

    def backwards(grid, like, arguments, keywords):
        for part in arguments[:3]:
            part.copy_(part.flip(2))
        merge(grid, like, arguments, keywords)

    monkeypatch.setattr(module, "_MERGE", backwards)
    assert first_mismatch(launched(arguments, workers=3), expected) is not None


@triton.jit
def _merged(left_ptr, right_ptr, out_ptr, WIDTH: tl.constexpr):
    """Rows of (largest, normaliser, total [WIDTH - 2]), padded to WIDTH."""
    rows, columns = tl.arange(0, 4), tl.arange(0, WIDTH)
    places = rows[:, None] * (WIDTH + 2) + columns[None, :] + 2
    largest, normaliser, total = kernels._merge(
        tl.load(left_ptr + rows * (WIDTH + 2)), tl.load(left_ptr + rows * (WIDTH + 2) + 1), tl.load(left_ptr + places),
        tl.load(right_ptr + rows * (WIDTH + 2)), tl.load(right_ptr + rows * (WIDTH + 2) + 1),
        tl.load(right_ptr + places),
    )  # fmt: skip
    tl.store(out_ptr + rows * (WIDTH + 2), largest)
    tl.store(out_ptr + rows * (WIDTH + 2) + 1, normaliser)
    tl.store(out_ptr + places, total)


def test_a_split_of_which_nothing_is_visible_changes_nothing(generator):
    device = generator.device
    some = torch.randn(4, 10, generator=generator, device=device)
    some[:, 1] = some[:, 1].abs() + 1.0
    some[1, 2:5] = torch.tensor([INF, -INF, NAN])  # what was seen in values stays
    some[2, 1:] = NAN
    some[3, 0], some[3, 1:] = -INF, 0.0  # nothing either
    nothing = torch.zeros_like(some)
    nothing[:, 0] = -INF
    for left, right in ((some, nothing), (nothing, some)):
        out = torch.empty_like(some)
        _merged[(1,)](left, right, out, WIDTH=8)
        torch.testing.assert_close(out, some, rtol=0.0, atol=0.0, equal_nan=True)


def test_a_masked_key_does_not_move_the_sign_of_a_zero(generator):
    """A total that underflows to -0 stays -0 over keys of -0, and would be 0 past a masked key of 1."""
    cache = Cache(generator, [131], 2, 1, 16)
    cache.q[0].fill_(1.0)
    cache.k[0][:64], cache.k[0][64:] = 0.0, 100.0
    cache.v[0][:64], cache.v[0][64:128], cache.v[0][128:] = -1e-38, -0.0, 1.0
    alone = cache.attend({0: (127, 128)})[0]
    assert first_mismatch(cache.attend({0: (123, 131)})[0][4:5], alone) is None


@pytest.mark.parametrize("has_start", [False, True])
@pytest.mark.parametrize("window", [0, 1, 5, 40])
def test_a_launch_has_room_for_every_split(window, has_start, monkeypatch):
    monkeypatch.setattr(module, "SPLIT", 8)
    for context in range(40):
        for queries in range(1, context + 1):
            found = 0
            for start in range(8) if has_start else (0,):
                first = max(start, start + context - queries - window + 1) if window else start
                found = max(found, -(-(start + context) // 8) - first // 8)
            bound = module.splits_for(context, queries, window, has_start)
            assert found <= bound <= found + (window > 0), f"{queries} of {context}"


@pytest.mark.parametrize(
    ("programs", "splits", "scratch", "workers"),
    [
        (8, 1, 2**20, 1),  # one split
        (8, 16, 2**20, 16),  # a decode step of one sequence
        (8, 256, 2**20, 66),  # as many as the GPU takes
        (200, 64, 2**20, 2),
        (265, 64, 2**20, 1),  # enough without
        (4096, 64, 2**20, 1),  # a prefill
        (8, 256, 2**28 + 1, 1),  # too much memory
        (8, 0, 0, 1),  # no keys
    ],
)
def test_few_programs_get_workers(programs, splits, scratch, workers):
    assert plans.workers_for(programs, splits, scratch, multiprocessors=132) == workers


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_graph_of_shared_splits_has_the_bits_of_a_prefill(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    cache = Cache(generator, [3000, 700], 8, 2, 128, dtype)
    whole = cache.attend({0: (0, 3000)})[0]
    arguments = cache.arguments({0: (2999, 3000), 1: (699, 700)})
    graph = torch.cuda.CUDAGraph()
    paged_attention(**arguments)
    with torch.cuda.graph(graph):
        out = paged_attention(**arguments)
    for end in (1, 512, 513, 2048, 2999, 3000):
        arguments["q"][0], arguments["seqused_k"][0] = cache.q[0][end - 1], end
        graph.replay()
        assert first_mismatch(out[:1], whole[end - 1 : end]) is None, f"{end}"


@pytest.mark.gpu
@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_and_warps_change_no_bits(dtype, head_dim, options, generator):
    """On the tensor cores of Hopper a tile has one result for every number of rows and warps."""
    if not is_hopper(generator.device):
        pytest.skip("there is one block for all elsewhere than on Hopper")
    cache = Cache(generator, [1200, 40], 8, 2, head_dim, dtype)
    cache.q[0] *= 4.0  # scores of a wide range
    arguments = cache.arguments({0: (1100, 1200), 1: (30, 40)}, **options)
    expected = launched(arguments, 1, plans.DECODE)
    assert_accurate(expected, arguments)
    blocks = [*plans.WIDE_BLOCKS] if head_dim > 128 else [*plans.BLOCKS, plans.DECODES, plans.Block(32, 2, 3)]
    for block in blocks:
        for workers in (1, 2):
            assert first_mismatch(launched(arguments, workers, block), expected) is None, f"{block}, {workers} workers"
    whole = launched(cache.arguments({0: (0, 1200)}, **options))
    assert first_mismatch(whole[1100:], expected[:100]) is None, "the whole sequence"


@pytest.mark.parametrize(
    ("rows", "group", "head_dim", "expected"),
    [
        (4, 4, 128, plans.DECODE),
        (4, 4, 256, plans.WIDE_BLOCKS[0]),
        (17, 1, 64, plans.BLOCKS[1]),
        (4096, 4, 128, plans.BLOCKS[2]),
        (4096, 4, 256, plans.WIDE_BLOCKS[1]),
        (256, 256, 64, replace(plans.BLOCKS[2], rows=256)),
    ],
)
def test_a_block_has_room_for_a_sequence_or_is_the_largest(rows, group, head_dim, expected):
    assert plans.block_for(rows, group, head_dim, True) == expected
    assert plans.block_for(rows, group, head_dim, False) == plans.Block(max(16, group), 4, 2)


@hostile
def test_an_infinity_whose_weight_is_zero_is_nan_in_prefill_as_in_decode(generator):
    """What a query sees is multiplied as it is: zero times infinity. What it does not see is not."""
    cache = Cache(generator, [40], 2, 1, 16)
    expected = launched(cache.arguments({0: (0, 40)}))
    cache.k[0][30] = -1e4 * cache.q[0][39, 0]  # a score so low that the last query gives it no weight
    cache.v[0][30] = INF
    whole = launched(cache.arguments({0: (0, 40)}))
    decoded = launched(cache.arguments({0: (39, 40)}))
    assert first_mismatch(whole[:30], expected[:30]) is None
    assert whole[39, 0].isnan().all()
    assert first_mismatch(decoded[0], whole[39]) is None


SINKS = [-INF, -3.0, 0.0, 2.5, 40.0, 0.5]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_sinks(options, dtype, generator):
    cache = Cache(generator, [97, 1, 40], 6, 2, 24, dtype)
    sinks = torch.tensor(SINKS, device=generator.device)
    arguments = cache.arguments({0: (80, 97), 1: (0, 1), 2: (0, 40)}, sinks=sinks, **options)
    whole = paged_attention(**arguments)
    assert_accurate(whole, arguments)
    without = paged_attention(**{**arguments, "sinks": None})
    assert first_mismatch(whole[:, 0], without[:, 0]) is None, "a sink of -inf is none"
    assert first_mismatch(whole[:, 3], without[:, 3]) is not None
    if options.get("causal", True):
        decoded = cache.attend({0: (96, 97)}, sinks=sinks, **options)[0]
        assert first_mismatch(decoded, whole[16:17]) is None


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sink_counts_once_among_shared_splits(dtype, generator):
    sinks = torch.tensor(SINKS[:4], device=generator.device, dtype=dtype)
    arguments = long_cache(generator, dtype).arguments(LONG_SPANS, sinks=sinks)
    expected = launched(arguments, workers=1)
    assert_accurate(expected, arguments)
    for workers in WORKERS:
        assert first_mismatch(launched(arguments, workers), expected) is None, f"{workers} workers"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_cache_in_fp8(dtype, workers, generator, monkeypatch):
    monkeypatch.setattr(module, "SPLIT", 64)
    cache = Cache(generator, [97, 40], 4, 2, 32, dtype)
    arguments = cache.arguments({0: (80, 97), 1: (0, 40)})
    for name in ("k_cache", "v_cache"):
        arguments[name] = (arguments[name].float() * 8.0).to(torch.float8_e4m3fn)
    arguments |= {
        f"{name}_scale": torch.tensor([s], device=generator.device) for name, s in (("k", 0.25), ("v", 0.125))
    }
    out = paged_attention(**arguments)
    assert_accurate(out, arguments)
    if dtype != torch.bfloat16 or torch.cuda.is_available():  # which the interpreter has not
        assert_accurate(launched(arguments, workers), arguments)
    wide = {name: arguments[name].to(dtype) for name in ("k_cache", "v_cache")}
    assert first_mismatch(paged_attention(**{**arguments, **wide}), out) is None, "the same numbers, stored wider"
    for name in ("k_scale", "v_scale"):
        other = paged_attention(**{**arguments, name: None})
        assert first_mismatch(other, out) is not None, name


@hostile
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_an_output_in_fp8_is_the_quantised_output(dtype, workers, generator, monkeypatch):
    """Large, small, infinite and NaN values; a sequence without keys, and rows that no sequence has."""
    monkeypatch.setattr(module, "SPLIT", 64)
    cache = Cache(generator, [197, 40, 1], 4, 2, 32, dtype)
    for i, value in enumerate((INF, NAN, 3e4, 1e-6, 0.0)):
        cache.v[0][:, 0, i] = value
    arguments = cache.arguments({0: (180, 197), 1: (0, 40), 2: (0, 1)}, page_size=16, sinks=cache.randn(4))
    arguments["seqused_k"][2] = 0
    arguments["q"] = torch.cat([arguments["q"], arguments["q"][:3]])
    scale = torch.full((1,), 0.013, device=generator.device)
    runs = {"the op": lambda **more: paged_attention(**arguments, **more)}
    if dtype != torch.bfloat16 or torch.cuda.is_available():  # which the interpreter has not
        runs["the kernel"] = lambda **more: launched({**arguments, **more}, workers)
    for name, run in runs.items():
        out = run(out_scale=scale)
        assert out.dtype == torch.float8_e4m3fn
        expected = quantize_static_fp8_reference(run(), scale)
        assert first_mismatch(out.view(torch.uint8), expected.view(torch.uint8)) is None, name


@pytest.mark.parametrize(
    ("sequences", "queries", "splits", "block", "grid", "workers", "each"),
    [
        (8, 1, 1, plans.DECODE, (8, 8), 1, 1),
        (8, 1, 8, plans.DECODE, (8, 8), 8, 1),
        (1, 1, 64, plans.DECODE, (1, 8), 64, 1),
        (64, 1, 4, plans.DECODES, (64, 8), 1, 1),
        (1, 4, 1, plans.DECODE, (1 * 8, 1), 1, 1),
        (1, 8192, 16, plans.BLOCKS[2], (256 * 8, 1), 1, 256),
    ],
)
def test_a_plan_is_made_of_shapes(sequences, queries, splits, block, grid, workers, each):
    shape = (sequences * queries, 32, 128)
    plan = plans.plan_for(shape, sequences, 8, queries, splits, True, multiprocessors=132)
    tokens = 1 if queries == 1 else block.rows // 4
    assert plan == plans.Plan(block, 4, tokens, grid, workers, each=each)


@pytest.mark.parametrize(
    ("queries", "consumers", "programs"),
    [(8192, 3, 171), (3168, 3, 66), (3120, 2, 98), (512, 2, 16), (192, 2, 6), (128, 0, 4), (64, 0, 2)],
)
def test_the_kernel_for_hopper_needs_no_workers_unless_its_programs_are_few(queries, consumers, programs):
    """Of 8 key heads and 4 query heads each, 16 tokens are a consumer's; a program has three if there are many."""
    shape, splits = (queries, 32, 128), 16
    plan = plans.plan_for(shape, 1, 8, queries, splits, True, multiprocessors=132, hopper=True)
    assert plan.consumers == consumers
    assert (plan.workers == 1) == bool(consumers)
    assert plan.grid == (8 * programs * max(1, consumers), 1)
    assert plan.block == (plans.CONSUMER if consumers else plans.PREFILL)
    assert plans.plan_for(shape, 1, 8, queries, splits, True, multiprocessors=132).consumers == 0


def test_one_token_each_has_one_consumer_unless_there_are_many():
    few, many = (plans.plan_for((n, 32, 128), n, 8, 1, 8, True, multiprocessors=132, hopper=True) for n in (8, 64))
    assert few == plans.Plan(plans.DECODE, 4, 1, (8, 8), 2, 1)
    assert many == plans.Plan(plans.DECODES, 4, 1, (64, 8), 1, 0, each=1)
    of = {n: plans.plan_for((n, 16, 256), n, 8, 1, 8, True, multiprocessors=132, hopper=True) for n in (16, 32)}
    assert [of[n].consumers for n in of] == [1, 0], "a multiprocessor has room for one program of wide heads"


def test_where_lengths_differ_a_program_has_two_consumers():
    plan = plans.plan_for((8192 + 255, 32, 128), 256, 8, 8192, 16, True, multiprocessors=132, hopper=True)
    assert (plan.consumers, plan.each) == (2, 0), "255 blocks have one token"


def test_a_wide_head_has_two_consumers():
    plan = plans.plan_for((8192, 16, 256), 1, 8, 8192, 16, True, multiprocessors=132, hopper=True)
    assert (plan.block, plan.consumers, plan.grid) == (plans.WIDE_BLOCKS[1], 2, (8192 // 64 * 8 * 2, 1))


@pytest.mark.parametrize(
    ("lengths", "tokens", "expected"),
    [((512, 512), 32, (32, 16)), ((512, 1), 32, (18, 0)), ((4, 4, 4), 4, (3, 1)), ((1,) * 64 + (2048,), 32, (131, 0))],
)
def test_blocks_are_enough_for_all_sequences(lengths, tokens, expected):
    """As many for each as the longest needs; or those of ``_locate``, if they are fewer."""
    found = plans.blocks_for(sum(lengths), len(lengths), max(lengths), tokens)
    assert found == expected
    assert found[0] >= sum(-(-n // tokens) for n in lengths)


def test_a_token_of_more_rows_than_a_consumer_is_not_for_the_kernel_for_hopper():
    plan = plans.plan_for((512, 128, 128), 1, 1, 512, 16, True, multiprocessors=132, hopper=True)
    assert (plan.block, plan.consumers) == (plans.PREFILL, 0)
