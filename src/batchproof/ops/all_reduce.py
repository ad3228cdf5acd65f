"""A sum over ranks whose bits depend neither on the size of the message nor on the library's algorithm.

    out = ((rank 0 + rank 1) + (rank 2 + rank 3)) + ...        in fp32, rounded once

Invariance: every rank gathers all ranks' tensors, which moves bits and adds nothing, and adds them up by one binary
tree over ranks, element by element. Libraries choose rings, trees and one-shot kernels by the size of the message, that
is by the number of tokens. The tree is that of ``linear``'s pieces: with fp32 partial products of equal parts of K,
each of as many times fewer pieces as there are ranks, the bits are those of one rank.

Cost: each rank receives all others' tensors, where a ring moves twice one tensor's size. A decode step's messages are
small, and latency is what counts there.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..errors import UnsupportedError
from ._library import check_dtype
from .linear import add_pieces

__all__ = ["all_reduce"]


def all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The sum of every rank's ``tensor``, a new tensor, the same on all ranks.

    Args:
        tensor: fp32, fp16 or bf16, of one shape and dtype on all ranks.
        group: the ranks; default all.

    Invariance: an element's bits depend on that element of every rank, and on the number of ranks.

    Raises:
        DtypeError: another dtype.
        UnsupportedError: torch.distributed is not initialised.
    """
    check_dtype("all_reduce", "tensor", tensor)
    if not dist.is_available() or not dist.is_initialized():
        raise UnsupportedError("all_reduce: torch.distributed has no process group, want init_process_group first")
    gathered = tensor.new_empty((dist.get_world_size(group), *tensor.shape))
    dist.all_gather(list(gathered.unbind(0)), tensor.contiguous(), group=group)
    return add_pieces([part.float() for part in gathered.unbind(0)]).to(tensor.dtype)
