"""The kernel that filters a row by search against the definition, which sorts: the same bits, whatever the batch."""

import math

import pytest
import torch

from batchproof.numerics import bits_equal, first_mismatch
from batchproof.ops import _filter_kernel as module
from batchproof.ops._filter_kernel import BLOCK, launch_filter
from batchproof.ops._sample_filters import filter_by_sort, filter_logits
from batchproof.ops._triton import tl, triton

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # numpy's, in the interpreter

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BELOW_1 = 1 - 2.0**-24
NOTHING = (0.0, 1.0, 0.0)
# top_k as a share of the vocabulary or the number itself, top_p, min_p
FILTERS = (
    *((k, 1.0, 0.0) for k in (1, 2, 0.5, 1.0, 7e6)),
    *((0, p, 0.0) for p in (1e-45, 0.3, 0.5, 0.9, BELOW_1)),
    *((0, 1.0, share) for share in (1e-45, 0.5, 1.0)),
    *((0.5, p, 0.0) for p in (1e-45, 0.5, 0.9, BELOW_1)),
    *((0, p, share) for p in (0.5, 0.9) for share in (1e-6, 0.5, 1.0)),
    *((k, p, share) for k in (3, 0.3) for p in (0.7, 1.0) for share in (1e-30, 0.1)),
    NOTHING,
    (1.0, 1.0, 0.0),
)


@triton.jit
def exp_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.exp(tl.load(x_ptr + at, mask=at < size, other=0.0)), mask=at < size)


def exp(x):
    """The kernel's own exp, which may be an ulp from the CPU's."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    grid = (triton.cdiv(x.numel(), 1024),)
    exp_kernel[grid](x.contiguous(), out, x.numel(), BLOCK=1024, enable_fp_fusion=False)
    return out


def parameters(vocab, device, triples, temperature=1.0):
    """temperature, top_k, top_p and min_p of one row a triple."""
    top_k = [k if isinstance(k, int) else math.ceil(k * vocab) if k <= 1 else int(k) for k, _, _ in triples]
    floats = ([temperature] * len(triples), [p for _, p, _ in triples], [share for _, _, share in triples])
    temperature, top_p, min_p = (torch.tensor(values, device=device, dtype=torch.float32) for values in floats)
    return {
        "temperature": temperature,
        "top_k": torch.tensor(top_k, device=device, dtype=torch.int64),
        "top_p": top_p,
        "min_p": min_p,
    }


def hostile(vocab, dtype, generator, device):
    """Rows of every kind that has something special to it: ties, infinities, NaN, zeros, denormals, any exponent."""

    def normal(scale):
        return torch.randn(vocab, generator=generator, device=device) * scale

    exponents = torch.randint(-45, 38, (vocab,), generator=generator, device=device)
    zeros = torch.zeros(vocab, device=device)
    infinite, holes, signed, masked = normal(4.0), normal(4.0), zeros.clone(), zeros - INF
    infinite[1::3] = INF
    holes[::3], holes[1::5] = NAN, -INF
    signed[::2] *= -1.0
    signed[1::7] = -1e-45
    masked[vocab // 2 :: 9] = normal(2.0)[vocab // 2 :: 9]
    rows = [
        normal(3.0), normal(0.01), normal(60.0), normal(2.0).round(), normal(20.0).round(), zeros + 2.5, zeros - INF,
        zeros + NAN, infinite, -infinite, holes, signed, masked, normal(1.0) * 10.0**exponents, normal(1.0) * 1e-44,
    ]  # fmt: skip
    return torch.stack(rows).to(dtype)


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory of the launch is NaN, or large integers, in place of the zeros that it often is."""
    empty_like = torch.empty_like

    def poison(*args, **options):
        out = empty_like(*args, **options)
        return out.fill_(NAN if out.is_floating_point() else 0x7F7F7F7F)

    monkeypatch.setattr(module.torch, "empty_like", poison)


def mismatch(logits, given):
    return first_mismatch(launch_filter(logits, **given), filter_by_sort(logits, **given, exp=exp))


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [*((vocab, torch.float32) for vocab in (1, 2, 127, 128, 129, 2048, 5000)), *((4099, dtype) for dtype in DTYPES)],
)
def test_search_and_sort_keep_the_same(device, generator, poisoned, vocab, dtype):
    x = hostile(vocab, dtype, generator, device)
    count = 2 * len(x)
    filters = torch.randperm(len(FILTERS), generator=generator, device=device).repeat(2)[:count]
    given = parameters(vocab, device, [FILTERS[i] for i in filters.tolist()])
    temperatures = torch.tensor((1.0, 0.7, 1e-3, 1.3, 0.0), device=device)
    given["temperature"] = temperatures[torch.randint(5, (count,), generator=generator, device=device)]
    assert mismatch(x.repeat(2, 1), given) is None


@pytest.mark.parametrize("row", [0, 3, 8, 10, 12, 13])
def test_every_filter_of_every_kind_of_row(device, generator, poisoned, row):
    x = hostile(129, torch.float32, generator, device)[row : row + 1].expand(len(FILTERS), -1)
    assert mismatch(x, parameters(129, device, FILTERS)) is None


def test_filters_that_are_not_given_are_those_that_keep_all(device, generator, poisoned):
    x = hostile(300, torch.bfloat16, generator, device)[::3]
    for chosen in range(8):
        given = parameters(300, device, [(40, 0.8, 0.01)] * len(x))
        absent = [name for bit, name in enumerate(("top_k", "top_p", "min_p")) if not chosen >> bit & 1]
        keep_all = parameters(300, device, [NOTHING] * len(x))
        out = launch_filter(x, **{**given, **dict.fromkeys(absent)})
        assert bits_equal(out, launch_filter(x, **{**given, **{name: keep_all[name] for name in absent}}))
        assert bits_equal(out, filter_by_sort(x, **{**given, **dict.fromkeys(absent)}, exp=exp))


def test_a_wide_row_and_a_long_list(device, generator, poisoned):
    x = torch.randn(4, 50257, generator=generator, device=device) * torch.tensor([[3.0], [1.0], [3.0], [0.5]]).to(
        device
    )
    x[2] = x[2].bfloat16()  # many ties
    given = parameters(50257, device, [(50, 0.95, 0.0), (0, 0.9, 0.0), (1000, 1.0, 0.0), (20000, 0.5, 0.01)])
    assert mismatch(x, given) is None


def test_lanes_of_the_list_may_be_as_long_as_the_row(device, poisoned):
    """All that top-k ranks is in one lane: columns that are BLOCK apart."""
    x = torch.full((2, 5 * BLOCK + 1), -30.0, device=device)
    x[:, 7::BLOCK] = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0], device=device)
    given = parameters(x.shape[1], device, [(3, 1.0, 0.0), (4, 0.85, 0.0)])
    assert mismatch(x, given) is None
    kept = [(row > -INF).nonzero().flatten().sub(7).div(BLOCK).tolist() for row in launch_filter(x, **given)]
    assert kept == [[1, 2, 3], [1, 2, 3]]  # of 3, 3, 2 and 2 the first two have 0.73 of the weight, and three 0.87


def test_top_p_counts_only_the_ties_that_top_k_left(device):
    row = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0, -50.0]], device=device)
    for top_k, top_p, wanted in (
        (5, BELOW_1, [0, 1, 2, 3, 4]),
        (3, BELOW_1, [0, 1, 2]),
        (3, 0.7, [0, 1]),  # of e + 2, e is 0.576 and e + 1 is 0.788
        (5, 0.7, [0, 1, 2]),  # of e + 4, e + 1 is 0.554 and e + 2 is 0.702
        (3, 0.57, [1]),
        (5, 0.57, [0, 1, 2]),
    ):
        given = parameters(6, device, [(top_k, top_p, 0.0)])
        kept = launch_filter(row, **given)
        assert (kept[0] > -INF).nonzero().flatten().tolist() == wanted
        assert bits_equal(filter_logits(row, **given), kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_at_any_stride(device, generator, poisoned, dtype):
    x = hostile(131, dtype, generator, device)[::3]
    given = parameters(131, device, FILTERS[12 : 12 + len(x)])
    wanted = launch_filter(x, **given)
    padded = torch.full((len(x), 140), NAN, dtype=dtype, device=device)
    padded[:, 5:136] = x
    columns = torch.full((131, len(x)), NAN, dtype=dtype, device=device).copy_(x.T).T
    for logits in (padded[:, 5:136], columns, x.repeat_interleave(2, 0)[::2]):
        out = launch_filter(logits, **given)
        assert out.is_contiguous()
        assert out.dtype == dtype
        assert bits_equal(out, wanted)
    expanded = x[:1].expand(len(x), -1)
    assert bits_equal(launch_filter(expanded, **given), launch_filter(expanded.contiguous(), **given))


def test_a_row_does_not_see_its_batch(device, generator):
    x = hostile(200, torch.float32, generator, device)
    given = parameters(200, device, [FILTERS[2 * i] for i in range(len(x))], temperature=0.8)
    alone = torch.cat(
        [launch_filter(x[i : i + 1], **{n: t[i : i + 1] for n, t in given.items()}) for i in range(len(x))]
    )
    for order in (torch.arange(15), torch.arange(15).roll(7), torch.arange(15).flip(0)):
        order = order.to(device)  # a row is first, last and in the middle
        out = launch_filter(x[order], **{name: value[order] for name, value in given.items()})
        assert bits_equal(out, alone[order])
    for neighbours in (NOTHING, (5, 0.5, 0.1)):
        others = parameters(200, device, [neighbours] * len(x), temperature=0.8)
        for name, value in given.items():
            others[name][::3] = value[::3]
        assert bits_equal(launch_filter(x, **others)[::3], alone[::3])


@pytest.mark.parametrize("block", [256, 4096])
def test_no_cut_of_the_row_changes_the_result(device, generator, monkeypatch, block):
    x = hostile(1000, torch.float32, generator, device)[::2]
    given = parameters(1000, device, FILTERS[-len(x) - 2 : -2])
    wanted = launch_filter(x, **given)
    monkeypatch.setattr(module, "BLOCK", block)
    assert bits_equal(launch_filter(x, **given), wanted)
