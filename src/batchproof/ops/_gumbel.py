"""Random words and Gumbel noise keyed by (seed, position, vocabulary index): Philox4x32-10, on CPU and GPU alike.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011 (Random123).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _exact
from ._triton import device_guard, tl, triton

__all__ = [
    "launch_noise",
    "noise_block",
    "noise_of_words",
    "philox4x32",
    "random_words",
    "random_words_block",
    "survival",
]

BLOCK = 2048  # columns a program; any cut gives the same words and tokens, so this is for speed alone
NUM_WARPS = 4
_WORD = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor], rounds: int = 10) -> Words:
    """Philox4x32 of 32-bit words held in int64 tensors, which broadcast; the words in Random123's order.

    A product of two words wraps in int64, which keeps its 64 bits: the shift's copies of the sign are masked away.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((second >> 32) & _WORD) ^ c1 ^ k0, ((first >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = second & _WORD, first & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def random_words(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """The 32 random bits of each vocabulary index, int64 [num_tokens, vocab_size]."""
    group = torch.arange((vocab_size + 3) // 4, device=seeds.device).unsqueeze(0)
    seeds, positions = seeds.unsqueeze(1), positions.unsqueeze(1)
    counter = (group, torch.zeros_like(group), positions & _WORD, (positions >> 32) & _WORD)
    words = philox4x32(counter, (seeds & _WORD, (seeds >> 32) & _WORD))
    return torch.stack(words, dim=-1).flatten(1)[:, :vocab_size]


def survival(words: Tensor) -> Tensor:
    """The kernel's v = 1 - u, an fp32 number, in float64, where 1 - v is exact."""
    return ((words.float() + 0.5) * 2.0**-32).clamp_max_(1.0 - 2.0**-24).double()


def noise_of_words(words: Tensor) -> Tensor:
    """fp32 noise of int64 ``words`` in IEEE operations."""
    exponential = -_exact.log(1.0 - survival(words))
    return (-_exact.log(exponential)).float()


@triton.jit
def random_words_block(seed, position, first, BLOCK: tl.constexpr):
    """uint32 random words of BLOCK vocabulary indices from ``first``, a multiple of 4."""
    group = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, group, group * 0, low, high)
    return tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))


@triton.jit
def noise_block(words):
    """fp32 noise of uint32 ``words``: ``-log(-log1p(-v))``."""
    v = tl.minimum((words.to(tl.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    # 1 - v would round a small v away: below 1/8 the series v + v**2/2 + ... + v**8/8, within 2**-26 of log1p
    series = tl.zeros_like(v)
    for n in tl.static_range(8):
        series = series * v + 1.0 / (8 - n)
    return -tl.log(tl.where(v < 0.125, series * v, -tl.log(1.0 - v)))


@triton.jit(do_not_specialize=["vocab_size"])
def _gumbel_noise_kernel(seeds_ptr, positions_ptr, noise_ptr, vocab_size: tl.int64, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    words = random_words_block(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), first, BLOCK)
    tl.store(noise_ptr + row * vocab_size + columns, noise_block(words), mask=columns < vocab_size)


def launch_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Run the noise kernel: fp32 [num_tokens, vocab_size]."""
    noise = seeds.new_empty(seeds.shape[0], vocab_size, dtype=torch.float32)
    if seeds.numel():
        grid = (seeds.shape[0], triton.cdiv(vocab_size, BLOCK))
        with device_guard(seeds):
            _gumbel_noise_kernel[grid](
                seeds.contiguous(), positions.contiguous(), noise, vocab_size,
                BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return noise
