"""Sampling a token a row: Gumbel noise with an address, argmax with a rule for ties, and Gumbel-max over both.

    noise[t, i] = -log(-log(u(seed[t], position[t], i)))
    token[t]    = argmax over kept i of  logits[t, i] / temperature[t] + noise[t, i]

The noise is not drawn, it is looked up: 32 bits of Philox4x32-10 whose key is the seed (low word, high word) and whose
counter is (i // 4, 0, low word of the position, high word of the position); index i takes output i % 4. So a
request's token is a function of its seed, of how far it has come and of its logits, and there is no generator state
to share with anyone. With v = (r + 1/2) / 2**32 rounded to fp32 and at most 1 - 2**-24, u is 1 - v: an index is
chosen for a large noise, which is a u near 1, and v keeps 33 bits there where a u in fp32 would keep 24. With 24, the
largest noises over a vocabulary of 128k would tie once in a hundred rows.

Invariance: nothing floating is summed. Philox is integers; noise, scaling, noise added and the weights of top-p are
elementwise, without FMA; a maximum under "larger value, then lower index" is the same in any order, so a row may be cut
among programs in any way; min-p compares with a threshold that its row alone decides; and top-k and top-p compare sums
of counts and of int64 weights, which are exact: the GPU's search and the CPU's stable sort have one answer. Filters act
within a row, so whether a neighbour asks for one changes nothing. On the CPU exp and the logarithms are ``_exact``'s;
CPU and GPU share the random integers, and their noise and weights agree to a few ulp.

Source: Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011 (Philox, checked against the
known answers of Random123); Gumbel, 1954, for the maximum; Holtzman et al., 2020, for top-p; Nguyen et al., 2024, for
min-p, which comes first, as in vLLM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Inputs, OpSpec, register_spec
from ._filter_kernel import launch_filter
from ._gumbel import launch_noise, noise_of_words, philox4x32, random_words, survival
from ._gumbel_max import launch_best
from ._library import register_op, require_no_grad
from ._sample_checks import check_sampling, validate_argmax, validate_noise, validate_sample
from ._sample_filters import filter_logits, scaled

__all__ = [
    "argmax",
    "argmax_reference",
    "check_sampling",
    "gumbel_noise",
    "gumbel_noise_reference",
    "philox4x32",
    "sample",
    "sample_reference",
]


def gumbel_noise_reference(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """The formula in float64 with the library's logarithms, rounded to fp32."""
    v = survival(random_words(seeds, positions, vocab_size))
    return -(-torch.log1p(-v)).log().float()


def argmax_reference(x: Tensor) -> Tensor:
    """The first index of each row's largest value, by a stable sort; NaN as -inf."""
    values = x.float().nan_to_num(-torch.inf, torch.inf, -torch.inf)
    return values.sort(dim=-1, descending=True, stable=True).indices[:, 0]


def sample_reference(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """Row by row: rank the scaled logits, cut by min_p, then top_k, then top_p; the first best with noise added."""
    noise = gumbel_noise_reference(seeds, positions, logits.shape[1])
    tokens = argmax_reference(logits)
    for row in range(logits.shape[0]):
        if temperature[row] == 0:
            continue
        x = logits[row].float().nan_to_num(-torch.inf, torch.inf, -torch.inf) / temperature[row]
        ranked = x.sort(descending=True, stable=True).indices
        if min_p is not None and min_p[row] > 0:
            ranked = ranked[x[ranked] >= x.max().double() + min_p[row].double().log()]
        if top_k is not None and top_k[row] > 0:
            ranked = ranked[: int(top_k[row])]
        if top_p is not None and top_p[row] < 1 and x[ranked[0]] > -torch.inf:
            p = x[ranked].double().clamp_max(torch.finfo(torch.float32).max).softmax(0)
            ranked = ranked[p.cumsum(0) - p < top_p[row].double()]
        kept = ranked.sort().values
        tokens[row] = kept[argmax_reference((x + noise[row])[kept].unsqueeze(0))].squeeze(0)
    return tokens


def _gumbel_noise_cpu(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    validate_noise(seeds, positions, vocab_size)
    return noise_of_words(random_words(seeds, positions, vocab_size))


def _gumbel_noise_cuda(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    validate_noise(seeds, positions, vocab_size)
    return launch_noise(seeds, positions, vocab_size)


def _gumbel_noise_fake(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    validate_noise(seeds, positions, vocab_size)
    return seeds.new_empty(seeds.shape[0], vocab_size, dtype=torch.float32)


def _argmax_cpu(x: Tensor) -> Tensor:
    validate_argmax(x)
    x = x.masked_fill(x.isnan(), -torch.inf)
    columns = torch.arange(x.shape[1]).expand_as(x)
    return columns.masked_fill(x != x.amax(-1, keepdim=True), x.shape[1]).amin(-1)


def _argmax_cuda(x: Tensor) -> Tensor:
    validate_argmax(x)
    return launch_best(x)


def _argmax_fake(x: Tensor) -> Tensor:
    validate_argmax(x)
    return x.new_empty(x.shape[0], dtype=torch.int64)


def _sample_cpu(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None = None,
) -> Tensor:
    validate_sample(logits, seeds, positions, temperature, top_k, top_p, min_p)
    check_sampling(temperature, top_k, top_p, min_p)
    tokens = _argmax_cpu(logits)
    drawn = temperature > 0
    if not bool(drawn.any()):
        return tokens
    # only the rows that ask for noise, and of them only those that ask for a filter, are given one
    logits, temperature = logits[drawn], temperature[drawn]
    top_k, top_p, min_p = (None if t is None else t[drawn] for t in (top_k, top_p, min_p))
    filtered = torch.zeros_like(temperature, dtype=torch.bool)
    filtered = filtered if top_k is None else filtered | (top_k > 0)
    filtered = filtered if top_p is None else filtered | (top_p < 1)
    filtered = filtered if min_p is None else filtered | (min_p > 0)
    if bool(filtered.any()):
        chosen = (None if t is None else t[filtered] for t in (top_k, top_p, min_p))
        logits[filtered] = filter_logits(logits[filtered], temperature[filtered], *chosen)
    noise = _gumbel_noise_cpu(seeds[drawn], positions[drawn], logits.shape[1])
    tokens[drawn] = _argmax_cpu(scaled(logits, temperature).add_(noise))
    return tokens


def _sample_cuda(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None = None,
) -> Tensor:
    validate_sample(logits, seeds, positions, temperature, top_k, top_p, min_p)
    if logits.shape[0] and any(t is not None for t in (top_k, top_p, min_p)):
        logits = launch_filter(logits, temperature, top_k, top_p, min_p)
    return launch_best(logits, seeds, positions, temperature, top_k, top_p, min_p)


def _sample_fake(logits: Tensor, *rows: Tensor | None) -> Tensor:
    validate_sample(logits, *rows)
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


_gumbel_noise = register_op(
    "gumbel_noise(Tensor seeds, Tensor positions, SymInt vocab_size) -> Tensor",
    cpu=_gumbel_noise_cpu, cuda=_gumbel_noise_cuda, fake=_gumbel_noise_fake,
)  # fmt: skip
_argmax = register_op("argmax(Tensor x) -> Tensor", cpu=_argmax_cpu, cuda=_argmax_cuda, fake=_argmax_fake)
_sample = register_op(
    "sample(Tensor logits, Tensor seeds, Tensor positions, Tensor temperature, Tensor? top_k, Tensor? top_p, "
    "Tensor? min_p=None) -> Tensor",
    cpu=_sample_cpu, cuda=_sample_cuda, fake=_sample_fake,
)  # fmt: skip


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise at an address: a function of (seed, position, vocabulary index) and of nothing else.

    Args:
        seeds: int64 [num_tokens], the key of each request; all 64 bits count, and any value will do.
        positions: int64 [num_tokens], the absolute position in its sequence of the token the noise is for.
        vocab_size: entries of the vocabulary, at least 1. A longer row begins with the shorter one.

    Returns:
        fp32 [num_tokens, vocab_size] between -2.82 and 22.88, contiguous.

    Invariance: looked up, not drawn; see the module docstring.

    Raises:
        ShapeError, DtypeError, DeviceError: before anything is computed.

    Source: Salmon et al., SC 2011 (Philox4x32-10).
    """
    result: Tensor = _gumbel_noise(seeds, positions, vocab_size)
    return result


def argmax(x: Tensor) -> Tensor:
    """Index of each row's largest value; of equal values the lowest index, which ``torch.argmax`` does not promise.

    Args:
        x: [num_tokens, vocab_size], fp32, fp16 or bf16, any strides. NaN counts as -inf and -0 equals +0.

    Returns:
        int64 [num_tokens]; 0 for a row of nothing but -inf and NaN.

    Invariance: exact comparisons have no order; see the module docstring.

    Raises:
        ShapeError, DtypeError: before anything is computed.
        UnsupportedError: autograd would record the call.
    """
    require_no_grad("argmax", x)
    result: Tensor = _argmax(x)
    return result


def sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """Draw one token a row from ``softmax(logits / temperature)``, cut by min_p, then by top_k, then by top_p.

    Args:
        logits: [num_tokens, vocab_size], fp32, fp16 or bf16, any strides. NaN counts as -inf.
        seeds: int64 [num_tokens], see ``gumbel_noise``.
        positions: int64 [num_tokens], the absolute position in its sequence of the token being drawn.
        temperature: fp32 [num_tokens], finite; 0 is greedy: the row's ``argmax``, whatever its other parameters.
            A quotient that overflows ties with others that do.
        top_k: int64 [num_tokens], how many of the largest are kept, of equal ones the lowest indices; 0 keeps all.
            None if no row wants it.
        top_p: fp32 [num_tokens] in (0, 1]: the shortest run of the ranking whose probability, among what top_k left,
            is at least this, counted in multiples of 2**-40 of the largest probability; 1 keeps all. None if no row
            wants it.
        min_p: fp32 [num_tokens] in [0, 1]: kept is what has at least this share of the largest probability, before
            the other filters; 0 keeps all, 1 the largest and its equals. None if no row wants it.

    Returns:
        int64 [num_tokens]; 0 for a row of nothing but -inf and NaN.

    Invariance: a row's token depends on its own row of each argument alone; see the module docstring.

    Raises:
        ShapeError, DtypeError, DeviceError: before anything is computed.
        ArgumentError: a parameter out of range, on the CPU. On a GPU reading one would wait for the device, so there
            the row's token is -1, which is none; ``check_sampling`` is for the host's copy.
        UnsupportedError: autograd would record the call.

    Source: the Gumbel-max trick; top-p after Holtzman et al., 2020; min-p after Nguyen et al., 2024.
    """
    require_no_grad("sample", logits, temperature, top_p, min_p)
    result: Tensor = _sample(logits, seeds, positions, temperature, top_k, top_p, min_p)
    return result


def _noise_inputs(num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    def integers(high: int) -> Tensor:
        return torch.randint(high, (num_tokens,), generator=generator, device=device)

    return {"seeds": integers(2**62), "positions": integers(2**20), "vocab_size": 4099}


def _argmax_inputs(num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    return {"x": (torch.randn(num_tokens, 4099, generator=generator, device=device) * 4.0).to(dtype)}


def _sample_inputs(num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    def choice(*values: float) -> Tensor:
        index = torch.randint(len(values), (num_tokens,), generator=generator, device=device)
        return torch.tensor(values, device=device)[index]

    inputs = _noise_inputs(num_tokens, dtype, device, generator)
    return {
        "logits": _argmax_inputs(num_tokens, dtype, device, generator)["x"],
        "seeds": inputs["seeds"],
        "positions": inputs["positions"],
        "temperature": choice(0.0, 0.5, 1.0, 1.5),
        "top_k": choice(0, 1, 50, 4099),
        "top_p": choice(1.0, 0.95, 0.5, 1e-6),
        "min_p": choice(0.0, 0.05, 0.5, 1.0),
    }


_NOISE_AXES = {"seeds": 0, "positions": 0}
_SAMPLE_AXES = {"logits": 0, **_NOISE_AXES, "temperature": 0, "top_k": 0, "top_p": 0, "min_p": 0}

# two of the three return integers, which have no tolerance: they are compared exactly
register_spec(
    OpSpec(
        "gumbel_noise", gumbel_noise, gumbel_noise_reference, _noise_inputs, _NOISE_AXES, "softmax", (torch.float32,)
    )
)
register_spec(OpSpec("argmax", argmax, argmax_reference, _argmax_inputs, {"x": 0}, "softmax"))
register_spec(OpSpec("sample", sample, sample_reference, _sample_inputs, _SAMPLE_AXES, "softmax"))
