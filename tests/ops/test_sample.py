"""Noise by address, argmax with a rule for ties, and sampling that does not see the batch."""

import math

import pytest
import torch
from torch.library import opcheck

from batchproof.errors import ArgumentError, DeviceError, DtypeError, ShapeError, UnsupportedError
from batchproof.numerics import bits_equal, first_mismatch
from batchproof.ops import sample as module
from batchproof.ops._gumbel import noise_block, random_words_block
from batchproof.ops._gumbel_max import launch_best_of_requests
from batchproof.ops._triton import tl, triton
from batchproof.ops.sample import (
    argmax,
    argmax_reference,
    check_sampling,
    filter_logits,
    gumbel_noise,
    gumbel_noise_reference,
    launch_best,
    launch_filter,
    launch_noise,
    noise_of_words,
    philox4x32,
    random_words,
    sample,
    sample_reference,
)
from batchproof.registry import get_spec

INF, NAN = math.inf, math.nan
# one row, two, an odd few, a decode batch, a row past a warp, and both sides of the 256 where vLLM's norm changes
BATCHES = (1, 2, 3, 8, 33, 255, 256, 257)


@triton.jit
def words_kernel(seeds_ptr, positions_ptr, out_ptr, first, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    words = random_words_block(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), first, BLOCK)
    tl.store(out_ptr + row * BLOCK + tl.arange(0, BLOCK), words.to(tl.int64))


@triton.jit
def noise_of_words_kernel(words_ptr, out_ptr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(out_ptr + columns, noise_block(tl.load(words_ptr + columns).to(tl.uint32)))


def philox_of_ints(counter, key):
    """Philox4x32-10 as the paper has it, one counter of Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def hex_words(text):
    return tuple(int(word, 16) for word in text.split())


def rows(device, *values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=device)


def addresses(device, *pairs):
    seeds, positions = zip(*pairs, strict=True)
    return rows(device, *seeds), rows(device, *positions)


ADDRESSES = ((0, 0), (1, 0), (0, 1), (-1, -1), (2**63 - 1, 2**40 + 3), (-(2**63), 2**31), (12345678901234567, 131071))


# Random123's kat_vectors for philox4x32, 10 rounds
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (" ".join(["ffffffff"] * 4), "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert philox_of_ints(hex_words(counter), hex_words(key)) == hex_words(answer)
    words = philox4x32(*(tuple(torch.tensor(w) for w in hex_words(text)) for text in (counter, key)))
    assert tuple(int(w) for w in words) == hex_words(answer)


def test_words_are_at_the_documented_address():
    seeds, positions = addresses("cpu", *ADDRESSES)
    words = random_words(seeds, positions, 11)
    for row, (seed, position) in enumerate(ADDRESSES):
        key = (seed % 2**32, (seed >> 32) % 2**32)
        for i in range(11):
            counter = (i // 4, 0, position % 2**32, (position >> 32) % 2**32)
            assert int(words[row, i]) == philox_of_ints(counter, key)[i % 4]


@pytest.mark.parametrize("first", [0, 2048, 126976])
def test_kernel_and_cpu_have_the_same_random_integers(device, first):
    seeds, positions = addresses(device, *ADDRESSES)
    out = torch.empty(len(ADDRESSES), 256, dtype=torch.int64, device=device)
    words_kernel[(len(ADDRESSES),)](seeds, positions, out, first, BLOCK=256)
    assert torch.equal(out.cpu(), random_words(seeds.cpu(), positions.cpu(), first + 256)[:, first:])


def test_noise_is_finite_at_the_ends_and_accurate_around_the_series(device):
    eighth = 2**29
    words = torch.tensor([0, 1, 2**23, 2**24 + 1, eighth - 1, eighth, 2**31, 2**32 - 2**8, 2**32 - 2, 2**32 - 1])
    words = torch.cat((words, torch.arange(1, 55) * 78000001))
    wanted = [-math.log(-math.log1p(-min((w + 0.5) / 2**32, 1 - 2**-24))) for w in words.tolist()]
    wanted = torch.tensor(wanted, dtype=torch.float64)
    assert wanted.min() > -2.82
    assert wanted.max() < 22.88
    out = torch.empty(64, device=device)
    noise_of_words_kernel[(1,)](words.to(device), out, BLOCK=64, enable_fp_fusion=False)
    for noise in (out.cpu(), noise_of_words(words)):
        assert bool(((noise - wanted).abs() <= 2.0**-20 * wanted.abs().clamp_min(1.0)).all())


def test_noise_is_within_a_few_ulp_of_the_reference(device):
    seeds, positions = addresses(device, *ADDRESSES)
    wanted = gumbel_noise_reference(seeds, positions, 5000)
    for noise in (gumbel_noise(seeds, positions, 5000), launch_noise(seeds, positions, 5000)):
        assert noise.dtype == torch.float32
        assert noise.shape == (len(ADDRESSES), 5000)
        assert bool(((noise - wanted).abs() <= 2.0**-20 * wanted.abs().clamp_min(1.0)).all())


def test_noise_depends_on_its_address_alone(device, generator):
    inputs = get_spec("gumbel_noise").sample_inputs(257, torch.float32, device, generator)
    seeds, positions = inputs["seeds"], inputs["positions"]
    whole = gumbel_noise(seeds, positions, 300)
    for m in BATCHES:
        order = torch.randperm(257, generator=generator, device=device)[:m]
        assert bits_equal(gumbel_noise(seeds[order], positions[order], 300), whole[order])
    assert bits_equal(gumbel_noise(seeds[:3], positions[:3], 2500)[:, :300], whole[:3])
    assert bits_equal(launch_noise(seeds[:3], positions[:3], 2500)[1:2], launch_noise(seeds[1:2], positions[1:2], 2500))


def test_noise_is_gumbel_distributed_and_uncorrelated(device):
    n = 2**17
    noise = gumbel_noise(*addresses(device, (7, 0), (7, 1), (8, 0)), n).double()
    assert abs(noise.mean() - 0.5772157) < 0.01  # 4.7 standard errors over 3n
    assert abs(noise.var() - math.pi**2 / 6) < 0.03
    steps = torch.arange(1, n + 1, device=device) / n
    for row in noise:
        distance = ((-(-row.sort().values).exp()).exp() - steps).abs().max()
        assert distance < 1.95 / math.sqrt(n) + 1 / n  # Kolmogorov's bound at 0.001
    assert bool((torch.corrcoef(noise) - torch.eye(3, device=device)).abs().max() < 0.012)


def test_argmax_takes_the_lowest_of_equal_values(device):
    x = torch.zeros(9, 4100, device=device)
    x[1, [2047, 2048]] = 1.0
    x[2, [4099, 5]] = 3.0
    x[3] = -INF
    x[4] = NAN
    x[5] = NAN
    x[5, 4098] = -INF
    x[6, [17, 4000]] = INF
    x[7, :] = -1.0
    x[7, 8], x[7, 3000] = -0.0, 0.0
    x[8, 0], x[8, 4099] = NAN, 1e-45
    wanted = rows(device, 0, 2047, 5, 0, 0, 0, 17, 8, 4099)
    for out in (argmax(x), launch_best(x), argmax_reference(x)):
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_argmax_equals_its_reference_among_many_ties(device, generator, dtype):
    x = torch.randint(-2, 3, (12, 2500), generator=generator, device=device).to(dtype)
    x[0, :3], x[1, 2400] = NAN, INF
    wide = torch.randn(2500, 12, generator=generator, device=device).to(dtype)
    for rows_in in (x, wide.T, wide.T[::2], x[:1].expand(4, -1)):
        for out in (argmax(rows_in), launch_best(rows_in)):
            assert out.dtype == torch.int64
            assert torch.equal(out, argmax_reference(rows_in))


def mixed(m, vocab, device, generator, dtype=torch.float32):
    """``sample``'s own inputs, at another vocabulary size."""
    inputs = get_spec("sample").sample_inputs(m, dtype, device, generator)
    return {**inputs, "logits": inputs["logits"][:, :vocab].contiguous()}


def subset(inputs, index):
    return {name: value[index] for name, value in inputs.items()}


def invariance_failure(inputs, generator, run):
    """A sentence about the first row whose token depends on the batch it is in, or None."""
    count = inputs["logits"].shape[0]
    alone = torch.cat([run(**subset(inputs, slice(i, i + 1))) for i in range(count)])
    for m in (m for m in BATCHES if m <= count):
        order = torch.randperm(count, generator=generator, device=alone.device)[:m]
        mismatch = first_mismatch(run(**subset(inputs, order)), alone[order])
        if mismatch:
            return f"batch of {m}: {mismatch}"
    return None


def with_hostile_rows(inputs):
    inputs["logits"][0::7, ::3] = NAN
    inputs["logits"][1::7, 5] = INF
    inputs["logits"][2::7] = -INF
    inputs["logits"][3::7] = NAN
    inputs["logits"][4::7, 1:] = -INF
    return inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_do_not_depend_on_the_batch(device, generator, dtype):
    inputs = mixed(257, 301, device, generator, dtype)
    assert invariance_failure(inputs, generator, sample) is None
    assert invariance_failure(with_hostile_rows(inputs), generator, sample) is None


def test_tokens_of_the_kernels_do_not_depend_on_the_batch(device, generator):
    inputs = with_hostile_rows(mixed(33, 2100, device, generator, torch.float16))
    assert invariance_failure(inputs, generator, module._sample_cuda) is None


@pytest.mark.parametrize("length", [torch.int32, torch.int64])
def test_parameters_may_be_in_tables_of_requests(device, generator, length):
    inputs = with_hostile_rows(mixed(33, 2100, device, generator))
    del inputs["top_k"], inputs["top_p"], inputs["min_p"]
    inputs["positions"] %= 2**31
    wanted = sample(**inputs)
    request = torch.randperm(64, generator=generator, device=device)[:33].to(length)
    tables = {name: torch.full((64,), -7, dtype=inputs[name].dtype, device=device) for name in ("seeds", "temperature")}
    for name, table in tables.items():
        table[request.long()] = inputs[name]
    positions = torch.cat([inputs["positions"], request.long()]).to(length)  # longer, as for a padded batch
    found = launch_best_of_requests(inputs["logits"], positions=positions, requests=request, **tables)
    assert torch.equal(found, wanted)


def test_the_check_catches_noise_that_is_keyed_by_row(device, generator):
    def keyed_by_row(positions, **inputs):
        return sample(positions=torch.arange(len(positions), device=device), **inputs)

    inputs = mixed(33, 301, device, generator)
    assert invariance_failure(inputs, generator, keyed_by_row).startswith("batch of")


def test_kernels_and_cpu_choose_the_same_tokens(device, generator):
    inputs = with_hostile_rows(mixed(21, 2100, device, generator))
    on_cpu = {name: value.cpu() for name, value in inputs.items()}
    assert torch.equal(module._sample_cuda(**inputs).cpu(), sample(**on_cpu))


@pytest.mark.parametrize("vocab", [1, 2, 7, 2048, 50257])
def test_sample_equals_its_reference(device, generator, vocab):
    m = 4 if vocab > 4099 else 64
    inputs = mixed(m, vocab, device, generator)
    if vocab > 4099:
        inputs["logits"] = torch.randn(m, vocab, generator=generator, device=device) * 3
        inputs["temperature"][:] = rows(device, 0.8, 1.2, 0.6, 1.0, dtype=torch.float32)
    assert torch.equal(sample(**inputs), sample_reference(**inputs))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(0.7, 0, 1, 0), (1, 0, 1, 0), (1, 3, 1, 0), (1.3, 0, 0.7, 0), (1, 4, 0.9, 0), (1, 0, 1, 0.2), (1.3, 0, 0.7, 0.4)],
)
def test_frequencies_follow_softmax(device, temperature, top_k, top_p, min_p):
    n = 20000
    logits = torch.tensor([0.5, 2.0, -1.0, 1.5, 0.0], device=device)
    p = (logits.double() / temperature).softmax(0)
    ranked = p.argsort(descending=True)
    p[p < min_p * p.max()] = 0
    p /= p.sum()
    if top_k:
        p[ranked[top_k:]] = 0
        p /= p.sum()
    mass = p[ranked].cumsum(0) - p[ranked]
    p[ranked[mass >= top_p]] = 0
    p /= p.sum()
    tokens = sample(
        logits.expand(n, -1),
        torch.full((n,), 42, device=device),
        torch.arange(n, device=device),
        torch.full((n,), float(temperature), device=device),
        torch.full((n,), top_k, device=device),
        torch.full((n,), float(top_p), device=device),
        torch.full((n,), float(min_p), device=device),
    )
    counts = tokens.bincount(minlength=5).double()
    assert bool((counts[p == 0] == 0).all())
    kept = p > 0
    chi_square = ((counts - n * p)[kept] ** 2 / (n * p[kept])).sum()
    assert chi_square < 18.5  # 0.001 at 4 degrees of freedom


def kept_by(device, row, top_k=0, top_p=1.0, temperature=1.0, min_p=0.0):
    """The indices that the filters leave of one row, by the kernel and by the device's implementation alike."""
    logits = torch.tensor([row], device=device)
    temperature, top_p, min_p = (rows(device, value, dtype=torch.float32) for value in (temperature, top_p, min_p))
    out = filter_logits(logits, temperature, rows(device, top_k), top_p, min_p)
    assert bits_equal(launch_filter(logits, temperature, rows(device, top_k), top_p, min_p), out)
    if top_k == 0 and top_p == 1.0:  # min_p alone, without a sort
        assert bits_equal(filter_logits(logits, temperature, None, None, min_p), out)
    return (out[0] > -INF).nonzero().flatten().tolist()


def test_top_k_keeps_exactly_k_and_ties_go_to_the_lowest_index(device):
    row = [1.0, 2.0, 1.0, 2.0, 1.0, 0.0]
    assert [kept_by(device, row, top_k=k) for k in (1, 2, 3, 4, 5, 6, 7, 10**6, 0)] == [
        [1], [1, 3], [0, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4], *[[0, 1, 2, 3, 4, 5]] * 4,
    ]  # fmt: skip
    assert kept_by(device, [0.0, -0.0, 0.0, -0.0], top_k=2) == [0, 1]  # -0 is not below +0
    assert kept_by(device, [NAN, 1.0, -INF, 2.0], top_k=3) == [1, 3]
    assert kept_by(device, [0.0] * 5000, top_k=4097) == list(range(4097))


def test_top_p_keeps_the_shortest_prefix_that_reaches_it(device):
    row = [0.0] * 4  # a quarter each, exactly
    above = 0.75 + 2.0**-24
    assert [len(kept_by(device, row, top_p=p)) for p in (1e-45, 0.2, 0.25, 0.26, 0.5, 0.75, above, 1.0)] == [
        1, 1, 1, 2, 2, 3, 4, 4,
    ]  # fmt: skip
    assert kept_by(device, row, top_p=0.5) == [0, 1]
    assert kept_by(device, row, top_k=2, top_p=0.5) == [0]  # of what top-k left
    assert kept_by(device, [-1.0, 3.0, 1.0], top_p=0.9, temperature=1.0) == [1, 2]
    assert kept_by(device, [-1.0, 3.0, 1.0], top_p=0.9, temperature=0.5) == [1]  # of the scaled logits
    assert kept_by(device, [0.0, -200.0], top_p=1.0) == [0, 1]  # 1 keeps even what has no probability
    assert kept_by(device, [5.0, INF, 7.0, INF], top_p=0.6) == [1, 3]
    assert kept_by(device, [5.0, INF, 7.0, INF], top_p=0.5) == [1]


def test_min_p_keeps_what_has_its_share_of_the_largest_probability(device):
    p = torch.tensor([0.1, 0.8, 0.05, 0.4, 0.8])
    row = p.log().tolist()
    shares = (0.0, 1e-45, 0.06, 0.0626, 0.12, 0.126, 0.49, 0.51, 1.0)
    assert [kept_by(device, row, min_p=share) for share in shares] == [
        [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 3, 4], [0, 1, 3, 4], [1, 3, 4], [1, 3, 4], [1, 4],
        [1, 4],
    ]  # fmt: skip
    assert kept_by(device, [0.0, math.log(0.4)], min_p=0.3, temperature=0.5) == [0]  # of the scaled logits: 0.16
    assert kept_by(device, [0.0, math.log(0.4)], min_p=0.3, temperature=2.0) == [0, 1]
    assert kept_by(device, [0.0, -200.0], min_p=1e-45) == [0]
    assert kept_by(device, [0.0, -0.0, -1e-45], min_p=1.0) == [0, 1]  # -0 is not below +0
    assert kept_by(device, [5.0, INF, NAN, -INF, INF], min_p=0.5) == [1, 4]
    assert kept_by(device, [5.0, INF, 7.0, 1.0], min_p=0.0) == [0, 1, 2, 3]
    assert kept_by(device, [-INF, NAN, -INF], min_p=0.5) == []
    assert kept_by(device, [5.0, -3.0], min_p=1.0, temperature=0.0) == [0, 1]  # greedy rows need no filter


def test_the_threshold_of_min_p_is_not_rounded_to_fp32(device):
    """Of two neighbouring fp32 logits the threshold parts those that it lies between, at any magnitude."""
    share = 0.3
    for top in (0.0, 1.0, 3.7, 100.25, -50.5):
        floor = top + math.log(rows("cpu", share, dtype=torch.float32).item())
        near = torch.tensor(floor)
        around = [near.nextafter(torch.tensor(-INF)).item(), near.item(), near.nextafter(torch.tensor(INF)).item()]
        wanted = [0, *(i + 1 for i, x in enumerate(around) if x >= floor)]
        assert kept_by(device, [top, *around], min_p=share) == wanted


def test_min_p_comes_before_the_other_filters(device):
    row = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    assert kept_by(device, row, top_p=0.65) == [0, 1]
    assert kept_by(device, row, min_p=0.7, top_p=0.55) == [0]  # 0.4 is 4/7 of what min_p leaves
    assert kept_by(device, row, min_p=0.7, top_p=0.6) == [0, 1]
    assert kept_by(device, row, min_p=0.4, top_k=2) == [0, 1]
    assert kept_by(device, row, min_p=0.7, top_k=3) == [0, 1]


def test_min_p_alone_sorts_nothing_and_equals_itself_with_the_sort(device, generator, monkeypatch):
    inputs = with_hostile_rows(mixed(33, 301, device, generator))
    del inputs["top_k"], inputs["top_p"]
    every = torch.full((33,), 301, device=device)
    one = torch.ones(33, device=device)
    wanted = sample(**inputs, top_k=every, top_p=one)
    assert not torch.equal(sample(**{**inputs, "min_p": None}), wanted)
    monkeypatch.setattr(torch.Tensor, "sort", None, raising=False)
    assert torch.equal(sample(**inputs), wanted)
    assert torch.equal(module._sample_cuda(**inputs, top_k=None, top_p=None), wanted)
    assert torch.equal(module._sample_cuda(**inputs, top_k=every, top_p=one), wanted)  # the kernel never sorts


def test_filters_leave_alone_the_rows_that_ask_for_nothing(device, generator):
    inputs = with_hostile_rows(mixed(16, 301, device, generator))
    del inputs["seeds"], inputs["positions"]
    inputs["temperature"][:4], inputs["top_k"][4:], inputs["top_p"][4:], inputs["min_p"][4:] = 0.0, 0, 1.0, 0.0
    for asked in (inputs, {**inputs, "top_k": None, "top_p": None}, {**inputs, "min_p": None}):
        for kept in (filter_logits(**asked), launch_filter(**asked)):
            assert bits_equal(kept[4:], inputs["logits"][4:])
            assert bits_equal(kept[:4], inputs["logits"][:4])  # greedy rows need no filter


def test_asking_for_all_by_any_name_is_the_same_and_sorts_nothing(device, generator, monkeypatch):
    inputs = mixed(33, 301, device, generator)
    del inputs["top_k"], inputs["top_p"], inputs["min_p"]
    zero, one = torch.zeros(33, dtype=torch.int64, device=device), torch.ones(33, device=device)
    every = torch.full_like(zero, 301)
    wanted = sample(**inputs, top_k=every, top_p=one)
    assert torch.equal(sample(**inputs, top_k=every), wanted)
    assert torch.equal(sample(**inputs, top_p=one), wanted)
    assert torch.equal(sample(**inputs, min_p=zero.float()), wanted)
    monkeypatch.delattr(module, "filter_logits")
    monkeypatch.delattr(module, "launch_filter")
    assert torch.equal(sample(**inputs), wanted)
    on_cpu = {name: value.cpu() for name, value in inputs.items()}  # where the values can be looked at
    assert torch.equal(sample(**on_cpu, top_k=zero.cpu(), top_p=one.cpu(), min_p=zero.cpu().float()), sample(**on_cpu))


def test_temperature_0_and_top_k_1_are_argmax(device, generator):
    inputs = mixed(64, 301, device, generator, torch.bfloat16)
    greedy = argmax(inputs["logits"])
    assert torch.equal(sample(**{**inputs, "temperature": torch.zeros(64, device=device)}), greedy)
    assert torch.equal(sample(**{**inputs, "top_k": torch.ones(64, dtype=torch.int64, device=device)}), greedy)
    assert torch.equal(sample(**{**inputs, "top_p": torch.full((64,), 1e-9, device=device)}), greedy)


def test_min_p_1_draws_among_the_largest(device, generator):
    inputs = mixed(64, 301, device, generator, torch.bfloat16)
    inputs["logits"][:, 7] = inputs["logits"][:, 250] = 30.0
    inputs.update(top_k=None, top_p=None, min_p=torch.ones(64, device=device))
    tokens = sample(**inputs)
    assert set(tokens.tolist()) == {7, 250}
    assert bool((tokens[inputs["temperature"] == 0] == 7).all())


def test_same_seed_same_position_same_token(device):
    logits = torch.zeros(4, 1000, device=device)
    one = torch.ones(4, device=device)
    tokens = sample(logits, *addresses(device, (1, 5), (1, 6), (2, 5), (1, 5)), one).tolist()
    assert tokens[0] == tokens[3]
    assert len(set(tokens)) == 3


def test_empty_batch(device):
    logits = torch.empty(0, 10, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    floats = torch.empty(0, device=device)
    assert argmax(logits).shape == sample(logits, none, none, floats, none, floats, floats).shape == (0,)
    assert gumbel_noise(none, none, 10).shape == (0, 10)
    assert launch_best(logits).shape == (0,)
    assert launch_filter(logits, floats, none, floats, floats).shape == (0, 10)
    assert launch_noise(none, none, 10).shape == (0, 10)


OUT_OF_RANGE = [
    ("temperature", -1.0),
    ("temperature", NAN),
    ("temperature", INF),
    ("top_k", -1),
    ("top_p", 0.0),
    ("top_p", -0.5),
    ("top_p", 1.5),
    ("top_p", NAN),
    ("min_p", -0.1),
    ("min_p", 1.5),
    ("min_p", NAN),
]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_parameters_out_of_range(generator, device, name, value):
    inputs = mixed(3, 50, device, generator)
    good = module._sample_cuda(**inputs).tolist()
    inputs[name][1] = value
    assert module._sample_cuda(**inputs).tolist() == [good[0], -1, good[2]]  # a GPU does not wait: no token
    on_cpu = {key: tensor.cpu() for key, tensor in inputs.items()}
    seen = str(on_cpu[name][1].item()).replace(".", r"\.")
    with pytest.raises(ArgumentError, match=rf"{name}\[1\] is {seen}, want it"):
        sample(**on_cpu)
    with pytest.raises(ArgumentError, match=name):
        check_sampling(on_cpu["temperature"], on_cpu["top_k"], on_cpu["top_p"], on_cpu["min_p"])


def test_wrong_arguments(device, generator):
    inputs = mixed(3, 50, device, generator)
    with pytest.raises(DtypeError, match=r"logits is torch\.float64"):
        sample(**{**inputs, "logits": inputs["logits"].double()})
    with pytest.raises(DtypeError, match=r"seeds is torch\.int32"):
        sample(**{**inputs, "seeds": inputs["seeds"].int()})
    with pytest.raises(DtypeError, match=r"temperature is torch\.float64"):
        sample(**{**inputs, "temperature": inputs["temperature"].double()})
    with pytest.raises(ShapeError, match=r"top_p has shape \(2,\), want \(3,\)"):
        sample(**{**inputs, "top_p": inputs["top_p"][:2]})
    with pytest.raises(DtypeError, match=r"min_p is torch\.int64"):
        sample(**{**inputs, "min_p": inputs["top_k"]})
    with pytest.raises(ShapeError, match=r"logits has shape \(50,\)"):
        sample(**{**inputs, "logits": inputs["logits"][0]})
    with pytest.raises(ShapeError, match="vocabulary has 0"):
        argmax(torch.empty(3, 0, device=device))
    with pytest.raises(ShapeError, match="vocabulary has 0"):
        gumbel_noise(inputs["seeds"], inputs["positions"], 0)
    with pytest.raises(ShapeError, match="seeds has shape"):
        gumbel_noise(inputs["seeds"][0], inputs["positions"], 5)
    with pytest.raises(DeviceError, match="positions is on meta"):
        sample(**{**inputs, "positions": inputs["positions"].to("meta")})
    with pytest.raises(UnsupportedError, match="no backward"):
        sample(**{**inputs, "logits": inputs["logits"].requires_grad_()})


@pytest.mark.parametrize("name", ["gumbel_noise", "argmax", "sample"])
def test_opcheck(device, generator, name):
    inputs = get_spec(name).sample_inputs(3, torch.float32, device, generator)
    opcheck(getattr(torch.ops.batchproof, name).default, tuple(inputs.values()))
