"""Log-probabilities of tokens, their ranks, and the most probable tokens, for drawn tokens and for those of a prompt.

    logprob[t] = log_softmax(logits[t])[token[t]]
    rank[t]    = 1 + entries greater than logits[t, token[t]] + equal ones of a lower index
    top[t]     = the first top_n entries in the order of the ranks

Invariance: the logarithm is ``log_softmax``, ours. Ranks and top come from integer keys that order a row by value, then
by lower index; no two are equal, so how many are greater, and which are the top_n, has one answer whatever algorithm
counts and selects. They order the logits, which log_softmax, as it rounds, may make equal.

Source: vLLM's ``gather_logprobs`` for what is returned; its ranks count equal entries of any index.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..registry import Inputs, OpSpec, register_spec
from ._library import register_op, require_no_grad
from ._sample_checks import check_rows_of, check_values, validate_argmax
from .softmax import log_softmax, log_softmax_reference

__all__ = ["token_logprobs", "token_logprobs_reference"]

_LOW_WORD = 0xFFFFFFFF
_LAST = 0x7FFFFFFF  # an index is stored as its distance from here, so that the lower one is the greater

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def token_logprobs_reference(logits: Tensor, tokens: Tensor, top_n: int = 0) -> Outputs:
    """log_softmax in float64, rounded to fp32; ranks from a stable sort, NaN as -inf."""
    logprobs = log_softmax_reference(logits.float())
    values = logits.float().nan_to_num(-torch.inf, torch.inf, -torch.inf) + 0.0
    ranked = values.sort(dim=-1, descending=True, stable=True).indices
    ranks = (ranked == tokens.unsqueeze(1)).int().argmax(-1) + 1
    top = ranked[:, :top_n]
    return logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1), ranks, top.contiguous(), logprobs.gather(1, top)


def _keys(logits: Tensor) -> Tensor:
    """int64 of the shape of ``logits`` that orders each row by value, then by lower index; no two are equal."""
    values = logits.float().nan_to_num(-torch.inf, torch.inf, -torch.inf) + 0.0  # -0 ties with +0
    bits = values.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    return (ordered << 32) | (_LAST - torch.arange(logits.shape[1], device=logits.device))


def _token_logprobs_cuda(logits: Tensor, tokens: Tensor, top_n: int) -> Outputs:
    _validate(logits, tokens, top_n)
    there = (tokens >= 0) & (tokens < logits.shape[1])
    place = torch.where(there, tokens, torch.zeros_like(tokens)).unsqueeze(1)
    keys = _keys(logits)
    ranks = (keys > keys.gather(1, place)).sum(-1) + 1
    top = _LAST - (keys.topk(top_n, dim=-1).values & _LOW_WORD)
    logprobs = log_softmax(logits, dtype=torch.float32)
    chosen = logprobs.gather(1, place).squeeze(1)
    return chosen.masked_fill_(~there, math.nan), ranks.masked_fill_(~there, 0), top, logprobs.gather(1, top)


def _token_logprobs_cpu(logits: Tensor, tokens: Tensor, top_n: int) -> Outputs:
    _validate(logits, tokens, top_n)
    good = (tokens >= 0) & (tokens < logits.shape[1])
    check_values("tokens", tokens, good, f"from 0 to {logits.shape[1] - 1}", "token_logprobs")
    return _token_logprobs_cuda(logits, tokens, top_n)


def _token_logprobs_fake(logits: Tensor, tokens: Tensor, top_n: int) -> Outputs:
    _validate(logits, tokens, top_n)
    num_tokens = logits.shape[0]
    return (
        logits.new_empty(num_tokens, dtype=torch.float32),
        logits.new_empty(num_tokens, dtype=torch.int64),
        logits.new_empty(num_tokens, top_n, dtype=torch.int64),
        logits.new_empty(num_tokens, top_n, dtype=torch.float32),
    )


def _validate(logits: Tensor, tokens: Tensor, top_n: int) -> None:
    validate_argmax(logits, "token_logprobs", "logits")
    check_rows_of("token_logprobs", logits.shape[0], logits.device, tokens=tokens)
    if not 0 <= top_n <= logits.shape[1]:
        raise ArgumentError(f"token_logprobs: top_n is {top_n}, want 0 to {logits.shape[1]}, the vocabulary")


_token_logprobs = register_op(
    "token_logprobs(Tensor logits, Tensor tokens, int top_n) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_token_logprobs_cpu, cuda=_token_logprobs_cuda, fake=_token_logprobs_fake,
)  # fmt: skip


def token_logprobs(logits: Tensor, tokens: Tensor, top_n: int = 0) -> Outputs:
    """Log-probability and rank of one token a row, and the ``top_n`` most probable tokens with theirs.

    For drawn tokens the rows they were drawn from; for a prompt, the row of each position with the token that follows.

    Args:
        logits: [num_tokens, vocab_size], fp32, fp16 or bf16, any strides; widened to fp32 first.
        tokens: int64 [num_tokens], from 0 to vocab_size - 1.
        top_n: how many of the most probable, 0 to vocab_size. More begin with the fewer.

    Returns:
        logprobs: fp32 [num_tokens], of the unscaled, unfiltered distribution; NaN in a row that holds NaN or +inf, or
            only -inf, as ``log_softmax`` has it.
        ranks: int64 [num_tokens], 1 for the row's ``argmax``. NaN ranks as -inf, -0 equals +0, and of equal logits the
            lower index is ahead.
        top_ids: int64 [num_tokens, top_n], of rank 1 to top_n.
        top_logprobs: fp32 [num_tokens, top_n], theirs.

    Invariance: a row's outputs depend on that row, its token and top_n alone; see the module docstring.

    Raises:
        ShapeError, DtypeError, DeviceError: before anything is computed.
        ArgumentError: top_n out of range; a token out of range, on the CPU. On a GPU reading one would wait for the
            device, so there its logprob is NaN and its rank 0, which is none.
        UnsupportedError: autograd would record the call.

    Source: vLLM's ``gather_logprobs``; the module docstring says what differs.
    """
    require_no_grad("token_logprobs", logits)
    result: Outputs = _token_logprobs(logits, tokens, top_n)
    return result


def _inputs(num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    logits = (torch.randn(num_tokens, 4099, generator=generator, device=device) * 4.0).to(dtype)
    tokens = torch.randint(4099, (num_tokens,), generator=generator, device=device)
    return {"logits": logits, "tokens": tokens, "top_n": 5}


register_spec(
    OpSpec(
        "token_logprobs",
        token_logprobs,
        token_logprobs_reference,
        _inputs,
        {"logits": 0, "tokens": 0},
        "log_softmax",
    )
)
