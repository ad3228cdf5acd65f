"""Penalties: the documented arithmetic to the bit, on the tokens a row has and on nothing else."""

import math

import pytest
import torch
from torch.library import opcheck

from batchproof.errors import ArgumentError, DeviceError, DtypeError, ShapeError, UnsupportedError
from batchproof.numerics import bits_equal, first_mismatch
from batchproof.ops import penalties as module
from batchproof.ops.penalties import apply_penalties, apply_penalties_reference, check_penalties
from batchproof.registry import get_spec

INF, NAN = math.inf, math.nan
PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
LISTS = ("prompt_tokens", "output_tokens")


def penalised(device, row, prompt=(), output=(), repetition=1.0, frequency=0.0, presence=0.0, dtype=torch.float32):
    """One row through the op."""
    logits = torch.tensor([row], dtype=dtype, device=device)
    lists = (torch.tensor([list(tokens)], dtype=torch.int64, device=device) for tokens in (prompt, output))
    values = (torch.tensor([value], device=device) for value in (repetition, frequency, presence))
    return apply_penalties(logits, *lists, *values)[0]


def test_repetition_divides_what_is_positive_and_multiplies_the_rest_once_a_token(device):
    row = [6.0, -6.0, 3.0, 0.0, 5.0, -0.0]
    out = penalised(device, row, prompt=[0, 0, 1, 5], output=[2, 1, 3, 3], repetition=1.5)
    assert out.tolist() == [4.0, -9.0, 2.0, 0.0, 5.0, -0.0]
    assert math.copysign(1, out[5]) == -1


def test_frequency_and_presence_count_the_output_alone(device):
    row = [1.0, 1.0, 1.0, 1.0]
    out = penalised(device, row, prompt=[0, 0, 1], output=[1, 2, 2, 2], frequency=0.25, presence=0.5)
    assert out.tolist() == [1.0, 0.25, -0.25, 1.0]
    assert penalised(device, row, output=[1, 2, 2], frequency=-0.25).tolist() == [1.0, 1.25, 1.5, 1.0]


def test_the_order_is_repetition_frequency_presence_each_rounded_to_fp32(device):
    x, repetition, frequency, presence = 1.7, 1.1, 0.3, 0.7
    out = penalised(device, [0.0, x], output=[1] * 7, repetition=repetition, frequency=frequency, presence=presence)
    f = [torch.tensor(value) for value in (x, repetition, frequency, presence)]
    wanted = ((f[0] / f[1]).double() - (f[2] * 7).double()).float()  # the product rounded before the difference
    wanted = (wanted.double() - f[3].double()).float()
    assert bits_equal(out[1].cpu(), wanted)
    contracted = (f[0] / f[1]).double() - f[2].double() * 7
    assert wanted != (contracted.float().double() - f[3].double()).float()  # with an FMA it would not be that


def test_a_16_bit_logit_is_rounded_once(device):
    out = penalised(device, [1.0, 1.0], output=[1], frequency=2.0**-9, presence=2.0**-9, dtype=torch.bfloat16)
    assert out.tolist() == [1.0, 1.0 - 2.0**-8]  # each alone rounds to 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_the_reference_to_the_bit(device, generator, dtype):
    inputs = get_spec("apply_penalties").sample_inputs(64, dtype, device, generator)
    inputs["logits"][::4, :8] = 0.0
    inputs["logits"][1::4, :8:2] = INF
    inputs["logits"][2::4, :8:3] = -INF
    assert first_mismatch(apply_penalties(**inputs), apply_penalties_reference(**inputs)) is None
    strided = {**inputs, "logits": torch.stack((inputs["logits"],) * 2, -1).flatten(1)[:, ::2]}
    strided |= {name: inputs[name].T.contiguous().T for name in LISTS}
    strided |= {name: torch.stack((inputs[name],) * 2, 1)[:, 1] for name in PENALTIES}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    out = apply_penalties(**strided)
    assert out.is_contiguous()
    assert bits_equal(out, apply_penalties(**inputs))
    one = {**inputs, "logits": inputs["logits"][:1].expand(64, -1)}
    assert first_mismatch(apply_penalties(**one), apply_penalties_reference(**one)) is None


def special(device, dtype, m=1):
    """Logits whose bits arithmetic would change: zeros of both signs, NaN of two payloads, infinities."""
    row = torch.tensor([-0.0, 0.0, NAN, -NAN, INF, -INF, 1e-45, 1.0], dtype=torch.float32).to(dtype)
    integers = row.view({4: torch.int32, 2: torch.int16}[row.element_size()])
    integers[3] += 1  # another payload
    return row.repeat(m, 1).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_neutral_rows_and_tokens_that_are_not_there_keep_their_bits(device, dtype):
    logits = special(device, dtype, 4)
    tokens = torch.arange(8, device=device).repeat(4, 1)
    values = [torch.full((4,), value, device=device) for value in (1.0, 0.0, 0.0)]
    assert bits_equal(apply_penalties(logits, tokens, tokens, *values), logits)
    values[1][1], values[2][2] = -0.0, -0.0
    assert bits_equal(apply_penalties(logits, tokens, tokens, *values), logits)
    values = [torch.full((4,), value, device=device) for value in (1.5, -0.5, 0.5)]
    for lists in ((tokens[:, 7:], tokens[:, 7:]), (tokens[:, 6:7], tokens[:, 7:]), (tokens[:, 7:], tokens[:, :0])):
        out = apply_penalties(logits, *lists, *values)
        assert bits_equal(out[:, :6], logits[:, :6])
        assert not bits_equal(out[:, 7], logits[:, 7])
    for none in (tokens[:, :0], torch.full_like(tokens, 8)):
        assert bits_equal(apply_penalties(logits, none, none, *values), logits)
    # frequency and presence do not see the prompt
    assert bits_equal(apply_penalties(logits, tokens, tokens[:, :0], torch.ones_like(values[0]), *values[1:]), logits)


def test_of_equal_lists_the_order_and_the_padding_do_not_matter(device, generator):
    inputs = get_spec("apply_penalties").sample_inputs(17, torch.float32, device, generator)
    wanted = apply_penalties(**inputs)
    padded = dict(inputs)
    for name in LISTS:
        tokens = inputs[name]
        places = torch.stack(
            [torch.randperm(tokens.shape[1] + 9, generator=generator, device=device) for _ in range(17)]
        )
        kinds = torch.tensor([499, -1, 500, 2**62, -(2**62)], device=device)
        extra = kinds[torch.randint(5, (17, 9), generator=generator, device=device)]
        padded[name] = torch.cat((tokens, extra), 1).gather(1, places)
    assert first_mismatch(apply_penalties(**padded), wanted) is None


def test_counts_are_exact_and_of_the_row(device):
    output = torch.full((3, 5000), 7, device=device)
    output[1] = 9  # vocab_size: nothing
    output[2, ::2] = 0
    zero, one = torch.zeros(3, device=device), torch.ones(3, device=device)
    out = apply_penalties(torch.zeros(3, 9, device=device), output[:, :0], output, one, one, zero)
    wanted = torch.zeros(3, 9)
    wanted[0, 7], wanted[2, 7], wanted[2, 0] = -5000, -2500, -2500
    assert torch.equal(out.cpu(), wanted)


@pytest.mark.parametrize("place", [0, 16, 32])
@pytest.mark.parametrize("value", [0.0, INF, NAN, 3e38])
def test_a_row_among_hostile_neighbours_is_the_row_alone(device, generator, place, value):
    inputs = get_spec("apply_penalties").sample_inputs(33, torch.float32, device, generator)
    inputs |= {
        name: torch.full_like(inputs[name], penalty) for name, penalty in zip(PENALTIES, (1.3, 0.2, 0.4), strict=True)
    }
    probe = slice(place, place + 1)
    hostile = {name: tensor.clone() for name, tensor in inputs.items()}
    hostile["logits"][:] = value
    for name, penalty in zip(PENALTIES, (1e-30, -3e38, 3e38), strict=True):
        hostile[name][:] = penalty
    for name in LISTS:  # neighbours repeat one token, in longer lists
        hostile[name] = torch.cat((torch.full((33, 50), 3, device=device), hostile[name]), 1)
        hostile[name][probe, :50] = 499
    for name in ("logits", *PENALTIES):
        hostile[name][probe] = inputs[name][probe]
    alone = apply_penalties(**{name: tensor[probe] for name, tensor in inputs.items()})
    assert not bits_equal(alone, inputs["logits"][probe])
    assert first_mismatch(apply_penalties(**hostile)[probe], alone) is None


def test_the_input_is_left_as_it_was(device, generator):
    inputs = get_spec("apply_penalties").sample_inputs(5, torch.float32, device, generator)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    apply_penalties(**inputs)
    assert all(bits_equal(inputs[name], before[name]) for name in inputs)


def test_empty_batch(device):
    tokens, values = torch.empty(0, 4, dtype=torch.int64, device=device), [torch.empty(0, device=device)] * 3
    assert apply_penalties(torch.empty(0, 10, device=device), tokens, tokens, *values).shape == (0, 10)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", INF),
        ("repetition_penalty", NAN),
        ("frequency_penalty", INF),
        ("frequency_penalty", NAN),
        ("presence_penalty", -INF),
        ("presence_penalty", NAN),
    ],
)
def test_penalties_out_of_range(device, generator, name, value):
    inputs = get_spec("apply_penalties").sample_inputs(3, torch.float32, device, generator)
    good = apply_penalties(**inputs)
    inputs[name][1] = value
    out = module._apply_penalties_cuda(**inputs)  # a GPU does not wait
    assert bool(out[1].isnan().all())
    assert bits_equal(out[::2], good[::2])
    on_cpu = {key: tensor.cpu() for key, tensor in inputs.items()}
    with pytest.raises(ArgumentError, match=rf"apply_penalties: {name}\[1\] is {value}, want it finite"):
        apply_penalties(**on_cpu)
    with pytest.raises(ArgumentError, match=name):
        check_penalties(*(on_cpu[key] for key in PENALTIES))


def test_wrong_arguments(device, generator):
    inputs = get_spec("apply_penalties").sample_inputs(3, torch.float32, device, generator)
    with pytest.raises(DtypeError, match=r"logits is torch\.float64"):
        apply_penalties(**{**inputs, "logits": inputs["logits"].double()})
    with pytest.raises(DtypeError, match=r"output_tokens is torch\.int32"):
        apply_penalties(**{**inputs, "output_tokens": inputs["output_tokens"].int()})
    with pytest.raises(DtypeError, match=r"presence_penalty is torch\.float64"):
        apply_penalties(**{**inputs, "presence_penalty": inputs["presence_penalty"].double()})
    with pytest.raises(ShapeError, match=r"prompt_tokens has shape \(2, 40\), want \(3, longest list\)"):
        apply_penalties(**{**inputs, "prompt_tokens": inputs["prompt_tokens"][:2]})
    with pytest.raises(ShapeError, match=r"prompt_tokens has shape \(3,\)"):
        apply_penalties(**{**inputs, "prompt_tokens": inputs["prompt_tokens"][:, 0]})
    with pytest.raises(ShapeError, match=r"frequency_penalty has shape \(2,\), want \(3,\)"):
        apply_penalties(**{**inputs, "frequency_penalty": inputs["frequency_penalty"][:2]})
    for logits in (inputs["logits"][0], inputs["logits"][0, 0]):
        with pytest.raises(ShapeError, match=r"logits has shape \("):
            apply_penalties(**{**inputs, "logits": logits})
    with pytest.raises(DeviceError, match="output_tokens is on meta"):
        apply_penalties(**{**inputs, "output_tokens": inputs["output_tokens"].to("meta")})
    with pytest.raises(UnsupportedError, match="no backward"):
        apply_penalties(**{**inputs, "logits": inputs["logits"].requires_grad_()})


def test_opcheck(device, generator):
    inputs = get_spec("apply_penalties").sample_inputs(3, torch.float32, device, generator)
    opcheck(torch.ops.batchproof.apply_penalties.default, tuple(inputs.values()))
