"""Launches that skip Triton's analysis of arguments: what tells one binary from another."""

import pytest
import torch

from batchproof.ops._fast_launch import FastKernel, View, _kind
from batchproof.ops._triton import tl, triton


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, step, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at * step, mask=at < n)
    tl.store(out_ptr + at, x if y_ptr is None else x + tl.load(y_ptr + at, mask=at < n), mask=at < n)


def test_what_a_binary_depends_on_is_told_apart():
    x = torch.zeros(64)
    different = [
        [1, 16, 17, 2**31, 2**31 + 1],
        [x, x.half(), x[1:], None, 1.0, True],
        [View(x, [4, 16], [16, 1], block, None) for block in ([4, 16], [2, 16])],
    ]
    for arguments in different:
        kinds = [_kind(argument) for argument in arguments]
        assert len(set(kinds)) == len(kinds), kinds
    for same in ([2, 3, 2**31 - 1], [16, 32, -16], [x, torch.ones(8), x[4:]], [0.5, -3.0]):
        assert len({_kind(argument) for argument in same}) == 1, same


@pytest.mark.parametrize("n", [1, 2, 16, 33, 48, 1000])
def test_every_launch_is_right_the_first_time_and_again(n, device):
    """Numbers of 1, of multiples of 16 and others, aligned and not, with a pointer and without: in turns."""
    kernel = FastKernel(add_kernel)
    memory = torch.arange(4096, dtype=torch.float32, device=device)
    for _ in range(2):
        for first, step in ((0, 1), (1, 1), (0, 2), (4, 3)):
            x = memory[first : first + n * step : step]
            for y in (None, memory[-n:], memory[7 : 7 + n]):
                out = torch.full((n,), float("nan"), device=device)
                kernel((triton.cdiv(n, 64),), out, (x, y, out, n, step), {"BLOCK": 64, "num_warps": 2})
                assert torch.equal(out, x if y is None else x + y), (first, step)
