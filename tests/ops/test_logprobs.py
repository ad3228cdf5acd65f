"""Log-probabilities, ranks and the most probable tokens, with one answer where logits are equal."""

import math

import pytest
import torch
from torch.library import opcheck

from batchproof.errors import ArgumentError, DeviceError, DtypeError, ShapeError, UnsupportedError
from batchproof.numerics import bits_equal, first_mismatch
from batchproof.ops import logprobs as module
from batchproof.ops.logprobs import token_logprobs, token_logprobs_reference
from batchproof.ops.sample import argmax
from batchproof.ops.softmax import log_softmax
from batchproof.registry import get_spec

INF, NAN = math.inf, math.nan


def tokens_of(device, *values):
    return torch.tensor(values, dtype=torch.int64, device=device)


def ranked(device, row):
    """The rank of every token of one row, and the ids of all of them in the order of top."""
    row = torch.tensor([row], device=device)
    every = torch.arange(row.shape[1], device=device)
    _, ranks, top, _ = token_logprobs(row.expand(row.shape[1], -1), every, row.shape[1])
    assert bool((top == top[0]).all())
    assert torch.equal(ranks[top[0]], every + 1)  # rank r is place r of top
    return ranks.tolist(), top[0].tolist()


def test_ranks_and_top_order_by_value_and_then_by_lower_index(device):
    assert ranked(device, [1.0, 3.0, 2.0, 3.0, 1.0]) == ([4, 1, 3, 2, 5], [1, 3, 2, 0, 4])
    assert ranked(device, [-1.0, -3.0, -2.0, -3.0]) == ([1, 3, 2, 4], [0, 2, 1, 3])
    assert ranked(device, [-0.0, 0.0, -0.0, 1e-45, -1e-45]) == ([2, 3, 4, 1, 5], [3, 0, 1, 2, 4])
    assert ranked(device, [NAN, -INF, -3e38, INF, NAN, INF]) == ([4, 5, 3, 1, 6, 2], [3, 5, 2, 0, 1, 4])
    assert ranked(device, [-INF, -INF, -INF]) == ([1, 2, 3], [0, 1, 2])
    assert ranked(device, [7.0]) == ([1], [0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_among_many_ties_it_is_the_reference(device, generator, dtype):
    x = torch.randint(-3, 4, (40, 2500), generator=generator, device=device).to(dtype)
    x[0, :3], x[1, 2400], x[2], x[3] = NAN, INF, -INF, NAN
    chosen = torch.randint(2500, (40,), generator=generator, device=device)
    wide = torch.randn(2500, 40, generator=generator, device=device).to(dtype)
    for logits in (x, wide.T, wide.T[::2], x[:1].expand(40, -1), x[:, ::3]):
        tokens = chosen[: logits.shape[0]] % logits.shape[1]
        _, ranks, top, _ = token_logprobs(logits, tokens, 30)
        _, wanted_ranks, wanted_top, _ = token_logprobs_reference(logits, tokens, 30)
        assert torch.equal(ranks, wanted_ranks)
        assert torch.equal(top, wanted_top)


def test_logits_that_log_softmax_makes_equal_keep_their_order(device):
    x = torch.full((1, 64), -200.0, device=device)
    x[0, 40], x[0, 9], x[0, 50] = 1000.0, 2.0**-20, 2.0**-19  # less the maximum, the last two are one fp32 number
    _, rank, top, top_logprobs = token_logprobs(x, tokens_of(device, 50), 3)
    assert top_logprobs[0, 1] == top_logprobs[0, 2]
    assert (rank.tolist(), top.tolist()) == ([2], [[40, 50, 9]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logprobs_are_those_of_log_softmax_in_fp32(device, generator, dtype):
    inputs = get_spec("token_logprobs").sample_inputs(9, dtype, device, generator)
    logprobs, ranks, top, top_logprobs = token_logprobs(**inputs)
    whole = log_softmax(inputs["logits"].float())
    assert bits_equal(logprobs, whole.gather(1, inputs["tokens"].unsqueeze(1)).squeeze(1))
    assert bits_equal(top_logprobs, whole.gather(1, top))
    assert (logprobs.dtype, ranks.dtype, top.dtype) == (torch.float32, torch.int64, torch.int64)
    best = argmax(inputs["logits"])
    assert torch.equal(top[:, 0], best)
    assert token_logprobs(inputs["logits"], best)[1].tolist() == [1] * 9


def test_more_of_the_most_probable_begin_with_the_fewer(device, generator):
    inputs = get_spec("token_logprobs").sample_inputs(5, torch.bfloat16, device, generator)
    most = token_logprobs(**{**inputs, "top_n": 4099})
    assert bool((most[2].sort(1).values == torch.arange(4099, device=device)).all())
    for n in (0, 1, 2, 17, 1000):
        out = token_logprobs(**{**inputs, "top_n": n})
        assert bits_equal(out[0], most[0])
        assert bits_equal(out[1], most[1])
        for fewer, more in zip(out[2:], most[2:], strict=True):
            assert bits_equal(fewer, more[:, :n])


@pytest.mark.parametrize("place", [0, 16, 32])
@pytest.mark.parametrize("value", [0.0, INF, -INF, NAN, 3e38])
def test_a_row_among_hostile_neighbours_is_the_row_alone(device, generator, place, value):
    inputs = get_spec("token_logprobs").sample_inputs(33, torch.float32, device, generator)
    probe = slice(place, place + 1)
    hostile = torch.full_like(inputs["logits"], value)
    hostile[probe] = inputs["logits"][probe]
    alone = token_logprobs(inputs["logits"][probe], inputs["tokens"][probe], 5)
    for out, wanted in zip(token_logprobs(hostile, inputs["tokens"], 5), alone, strict=True):
        assert first_mismatch(out[probe], wanted) is None


def test_empty_batch(device):
    logits, none = torch.empty(0, 10, device=device), tokens_of(device)
    assert [tuple(t.shape) for t in token_logprobs(logits, none, 3)] == [(0,), (0,), (0, 3), (0, 3)]


@pytest.mark.parametrize("token", [-1, -(2**40), 50, 2**40])
def test_a_token_out_of_range(device, generator, token):
    logits = torch.randn(3, 50, generator=generator, device=device)
    good = token_logprobs(logits, tokens_of(device, 4, 0, 49), 2)
    tokens = tokens_of(device, 4, token, 49)
    logprobs, ranks, top, top_logprobs = module._token_logprobs_cuda(logits, tokens, 2)  # a GPU does not wait
    assert ranks.tolist() == [good[1][0], 0, good[1][2]]
    assert math.isnan(logprobs[1])
    assert bits_equal(logprobs[::2], good[0][::2])
    assert bits_equal(top, good[2])
    assert bits_equal(top_logprobs, good[3])
    with pytest.raises(ArgumentError, match=rf"tokens\[1\] is {token}, want it from 0 to 49"):
        token_logprobs(logits.cpu(), tokens.cpu(), 2)


def test_wrong_arguments(device):
    logits, tokens = torch.zeros(2, 50, device=device), tokens_of(device, 1, 2)
    with pytest.raises(DtypeError, match=r"logits is torch\.float64"):
        token_logprobs(logits.double(), tokens)
    with pytest.raises(DtypeError, match=r"tokens is torch\.int32"):
        token_logprobs(logits, tokens.int())
    with pytest.raises(ShapeError, match=r"tokens has shape \(1,\), want \(2,\)"):
        token_logprobs(logits, tokens[:1])
    with pytest.raises(ShapeError, match=r"logits has shape \(50,\)"):
        token_logprobs(logits[0], tokens)
    with pytest.raises(DeviceError, match="tokens is on meta"):
        token_logprobs(logits, tokens.to("meta"))
    for n in (-1, 51):
        with pytest.raises(ArgumentError, match=rf"top_n is {n}, want 0 to 50"):
            token_logprobs(logits, tokens, n)
    with pytest.raises(UnsupportedError, match="no backward"):
        token_logprobs(logits.requires_grad_(), tokens)


@pytest.mark.parametrize("top_n", [0, 5])
def test_opcheck(device, generator, top_n):
    inputs = get_spec("token_logprobs").sample_inputs(3, torch.float32, device, generator)
    opcheck(torch.ops.batchproof.token_logprobs.default, (inputs["logits"], inputs["tokens"], top_n))
