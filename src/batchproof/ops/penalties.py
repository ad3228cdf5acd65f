"""Penalties on the logits of tokens that a request has already: repetition, frequency and presence.

    x   = logits[t, i]
    x   = x / repetition[t] if x > 0 else x * repetition[t]      where i is in t's prompt or output
    out = (x - frequency[t] * count[t, i]) - presence[t]         where i is in t's output, count times

Only the logits of tokens in the row's lists are touched: each is gathered, changed and put back, so that the work goes
with the lists and not with the vocabulary. All others keep their bits, and so does a row of neutral penalties.

Invariance: counts are integers, differences of places in the row's sorted output; the rest is elementwise in fp32, one
IEEE operation at a time, without FMA, and rounded once to the logits' dtype. A token that is in the lists twice is put
back twice, with one value. A place of padding repeats a token of the row's own, or touches nothing, so no bit depends
on how far the lists are padded.

Source: Keskar et al., CTRL, 2019 (repetition); OpenAI's API reference (frequency, presence); the order and the lists
are those of vLLM's ``apply_penalties``, which for repetition multiplies by the rounded reciprocal where this divides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ShapeError
from ..registry import Inputs, OpSpec, register_spec
from . import _exact
from ._library import check_device, check_dtype, register_op, require_no_grad
from ._sample_checks import check_rows_of, check_values, validate_argmax

__all__ = ["apply_penalties", "apply_penalties_reference", "check_penalties"]


def apply_penalties_reference(
    logits: Tensor,
    prompt_tokens: Tensor,
    output_tokens: Tensor,
    repetition_penalty: Tensor,
    frequency_penalty: Tensor,
    presence_penalty: Tensor,
) -> Tensor:
    """The formula token by token, in fp32 as it stands, over each row's tokens as sets and counts."""
    out, vocab_size = logits.clone(), logits.shape[1]
    for row in range(logits.shape[0]):
        repetition, frequency, presence = (p[row] for p in (repetition_penalty, frequency_penalty, presence_penalty))
        if repetition == 1 and frequency == 0 and presence == 0:
            continue
        output = [i for i in output_tokens[row].tolist() if 0 <= i < vocab_size]
        prompt = [i for i in prompt_tokens[row].tolist() if 0 <= i < vocab_size]
        for i in {*prompt, *output}:
            x = logits[row, i].float()
            if repetition != 1:
                x = x / repetition if x > 0 else x * repetition
            if i in output:
                x = (x - frequency * output.count(i)) - presence
            out[row, i] = x.to(logits.dtype)
    return out


def _apply_penalties_cuda(
    logits: Tensor,
    prompt_tokens: Tensor,
    output_tokens: Tensor,
    repetition_penalty: Tensor,
    frequency_penalty: Tensor,
    presence_penalty: Tensor,
) -> Tensor:
    penalties = (repetition_penalty, frequency_penalty, presence_penalty)
    _validate(logits, prompt_tokens, output_tokens, *penalties)
    repetition, frequency, presence = (p.unsqueeze(1) for p in penalties)
    refused = ~((repetition > 0) & repetition.isfinite() & frequency.isfinite() & presence.isfinite())
    out = logits.contiguous().masked_fill(refused, math.nan)
    tokens, vocab_size = torch.cat((prompt_tokens, output_tokens), 1), logits.shape[1]
    if tokens.numel() == 0:
        return out
    tokens = tokens.masked_fill((tokens < 0) | (tokens >= vocab_size), vocab_size)  # one kind of padding
    first = tokens.amin(1, keepdim=True)
    place = torch.where(tokens < vocab_size, tokens, first)
    there = place < vocab_size
    place.clamp_(max=vocab_size - 1)  # in a row without tokens, of which nothing is touched
    output = output_tokens.sort(dim=1).values.contiguous()
    count = torch.searchsorted(output, place, right=True) - torch.searchsorted(output, place)
    touched = there & ((repetition != 1) | ((count > 0) & ((frequency != 0) | (presence != 0))))
    before = out.gather(1, place)
    x = before.float()
    x = torch.where(repetition == 1, x, torch.where(x > 0, x / repetition, x * repetition))
    x = torch.where(count > 0, (x - frequency * count) - presence, x)
    after = _exact.canonical_nan(x.to(logits.dtype))
    return out.scatter_(1, place, torch.where(touched, after, before))


def _apply_penalties_cpu(
    logits: Tensor,
    prompt_tokens: Tensor,
    output_tokens: Tensor,
    repetition_penalty: Tensor,
    frequency_penalty: Tensor,
    presence_penalty: Tensor,
) -> Tensor:
    penalties = (repetition_penalty, frequency_penalty, presence_penalty)
    _validate(logits, prompt_tokens, output_tokens, *penalties)
    check_penalties(*penalties)
    return _apply_penalties_cuda(logits, prompt_tokens, output_tokens, *penalties)


def _apply_penalties_fake(
    logits: Tensor,
    prompt_tokens: Tensor,
    output_tokens: Tensor,
    repetition_penalty: Tensor,
    frequency_penalty: Tensor,
    presence_penalty: Tensor,
) -> Tensor:
    _validate(logits, prompt_tokens, output_tokens, repetition_penalty, frequency_penalty, presence_penalty)
    return logits.new_empty(logits.shape)


def _validate(
    logits: Tensor,
    prompt_tokens: Tensor,
    output_tokens: Tensor,
    repetition_penalty: Tensor,
    frequency_penalty: Tensor,
    presence_penalty: Tensor,
) -> None:
    op, num_tokens = "apply_penalties", logits.shape[0] if logits.dim() else 0
    validate_argmax(logits, op, "logits")
    for name, tokens in (("prompt_tokens", prompt_tokens), ("output_tokens", output_tokens)):
        check_dtype(op, name, tokens, (torch.int64,))
        check_device(op, name, tokens, "logits", logits)
        if tokens.dim() != 2 or tokens.shape[0] != num_tokens:
            raise ShapeError(f"{op}: {name} has shape {tuple(tokens.shape)}, want ({num_tokens}, longest list)")
    check_rows_of(
        op, num_tokens, logits.device, repetition_penalty=repetition_penalty, frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
    )  # fmt: skip


def check_penalties(repetition_penalty: Tensor, frequency_penalty: Tensor, presence_penalty: Tensor) -> None:
    """ArgumentError unless all are finite and repetition_penalty is positive.

    For the host's copy of them, before they go to a GPU, where ``apply_penalties`` does not wait to read them.
    """
    op, positive = "apply_penalties", (repetition_penalty > 0) & repetition_penalty.isfinite()
    check_values("repetition_penalty", repetition_penalty, positive, "finite and positive (1 is neutral)", op)
    for name, value in (("frequency_penalty", frequency_penalty), ("presence_penalty", presence_penalty)):
        check_values(name, value, value.isfinite(), "finite (0 is neutral)", op)


_apply_penalties = register_op(
    "apply_penalties(Tensor logits, Tensor prompt_tokens, Tensor output_tokens, Tensor repetition_penalty, "
    "Tensor frequency_penalty, Tensor presence_penalty) -> Tensor",
    cpu=_apply_penalties_cpu, cuda=_apply_penalties_cuda, fake=_apply_penalties_fake,
)  # fmt: skip


def apply_penalties(
    logits: Tensor,
    prompt_tokens: Tensor,
    output_tokens: Tensor,
    repetition_penalty: Tensor,
    frequency_penalty: Tensor,
    presence_penalty: Tensor,
) -> Tensor:
    """``logits`` with the tokens that each row has already penalised: repetition, then frequency, then presence.

    Args:
        logits: [num_tokens, vocab_size], fp32, fp16 or bf16, any strides; before temperature and filters.
        prompt_tokens: int64 [num_tokens, longest prompt], padded with vocab_size; -1, or anything else that is no
            token, is padding as well, wherever it stands. No columns if no row wants it.
        output_tokens: int64 [num_tokens, longest output], likewise: what has been generated so far.
        repetition_penalty: fp32 [num_tokens], finite and positive: logits above 0 of tokens in prompt or output are
            divided by it, others multiplied; 1 is neutral.
        frequency_penalty: fp32 [num_tokens], finite: taken from a logit for each time the token is in the output; 0 is
            neutral.
        presence_penalty: fp32 [num_tokens], finite: taken once if the token is in the output; 0 is neutral.

    Returns:
        A new contiguous tensor of the shape and dtype of ``logits``; a row with neutral penalties has its bits.

    Invariance: a row's bits depend on its row of each argument alone, and on the tokens in its lists but neither their
    order nor their padding; see the module docstring.

    Raises:
        ShapeError, DtypeError, DeviceError: before anything is computed.
        ArgumentError: a penalty out of range, on the CPU. On a GPU reading one would wait for the device, so there the
            row is NaN; ``check_penalties`` is for the host's copy.
        UnsupportedError: autograd would record the call.

    Source: Keskar et al., CTRL, 2019; OpenAI's API reference.
    """
    penalties = (repetition_penalty, frequency_penalty, presence_penalty)
    require_no_grad("apply_penalties", logits, *penalties)
    result: Tensor = _apply_penalties(logits, prompt_tokens, output_tokens, *penalties)
    return result


def _inputs(num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (num_tokens, *shape), generator=generator, device=device)

    def lists(longest: int) -> Tensor:
        """Tokens, half of the vocabulary's first eight so that some repeat, padded from a random length on."""
        tokens = torch.where(integers(2, longest) > 0, integers(8, longest), integers(499, longest))
        return tokens.masked_fill(torch.arange(longest, device=device) >= integers(longest + 1, 1), 499)

    def choice(*values: float) -> Tensor:
        return torch.tensor(values, device=device)[integers(len(values))]

    return {
        "logits": (torch.randn(num_tokens, 499, generator=generator, device=device) * 4.0).to(dtype),
        "prompt_tokens": lists(40),
        "output_tokens": lists(23),
        "repetition_penalty": choice(1.0, 1.3, 0.7),
        "frequency_penalty": choice(0.0, 0.1, -0.3),
        "presence_penalty": choice(0.0, 0.6, -1.7),
    }


_AXES = dict.fromkeys(
    ("logits", "prompt_tokens", "output_tokens", "repetition_penalty", "frequency_penalty", "presence_penalty"), 0
)

register_spec(
    OpSpec("apply_penalties", apply_penalties, apply_penalties_reference, _inputs, _AXES, tolerance="penalties")
)
