"""Sequences in a paged cache, for the tests of ``paged_attention``."""

import torch

from batchproof.numerics import TOLERANCES
from batchproof.ops import attention as module
from batchproof.ops.attention import paged_attention, paged_attention_reference

__all__ = ["Cache", "assert_accurate", "launched"]


class Cache:
    """Keys and values of sequences, laid out in pages of any size in any order."""

    def __init__(self, generator, lengths, heads=4, kv_heads=2, head_dim=32, dtype=torch.float32):
        self.generator, self.lengths = generator, lengths
        self.q, self.k, self.v = (
            [self.randn(n, h, head_dim).to(dtype) for n in lengths] for h in (heads, kv_heads, kv_heads)
        )

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def paged(self, order, page_size, fill=0.0):
        """(k_cache, v_cache, block_table) of the sequences in ``order``; unused slots and pages hold ``fill``."""
        device = self.generator.device
        pages = [-(-self.lengths[i] // page_size) for i in order]
        spare = 3
        ids = torch.randperm(sum(pages) + spare, generator=self.generator, device=device)
        table = torch.zeros(len(order), max([*pages, 1]) + 1, dtype=torch.int32, device=device)
        caches = []
        for tensors in (self.k, self.v):
            like = tensors[0]
            cache = torch.full((len(ids), page_size, *like.shape[1:]), fill, dtype=like.dtype, device=device)
            taken = 0
            for row, (i, count) in enumerate(zip(order, pages, strict=True)):
                mine = ids[taken : taken + count]
                taken += count
                table[row, :count] = mine
                flat = torch.full((count * page_size, *like.shape[1:]), fill, dtype=like.dtype, device=device)
                flat[: self.lengths[i]] = tensors[i]
                cache[mine] = flat.view(count, page_size, *like.shape[1:])
            caches.append(cache)
        return *caches, table

    def arguments(self, spans, page_size=16, fill=0.0, dtype=torch.int32, **options):
        """Arguments for the queries (first, end) of sequences ``{sequence: (first, end)}``, ``end`` keys each."""
        order = list(spans)
        k_cache, v_cache, table = self.paged(order, page_size, fill)
        counts = [end - first for first, end in spans.values()]
        starts = torch.tensor([0, *counts], device=self.generator.device).cumsum(0).to(dtype)
        return {
            "q": torch.cat([self.q[i][first:end] for i, (first, end) in spans.items()]),
            "k_cache": k_cache,
            "v_cache": v_cache,
            "cu_seqlens_q": starts,
            "seqused_k": torch.tensor([end for _, end in spans.values()], dtype=dtype, device=starts.device),
            "block_table": table.to(dtype),
            "max_seqlen_q": max([*counts, 0]),
            "softmax_scale": self.q[0].shape[-1] ** -0.5,
            **options,
        }

    def attend(self, spans, **options):
        """The outputs of ``spans``, one tensor a sequence."""
        arguments = self.arguments(spans, **options)
        return paged_attention(**arguments).split([end - first for first, end in spans.values()])


def assert_accurate(out, arguments):
    expected = paged_attention_reference(**arguments)
    largest = arguments["v_cache"].double().nan_to_num(0.0, 0.0, 0.0).abs().amax()
    atol = TOLERANCES["attention"].atol if out.dtype != torch.float32 else 2.0**-18
    error = (out.double() - expected.double()).abs().max()
    assert error <= atol * largest, f"off by {error / largest:.2e} of the largest value"


def launched(arguments, workers=None, block=None):
    defaults = {"causal": True, "window": 0, "softcap": 0.0, "k_start": None}
    return module.launch(**{**defaults, **arguments}, workers=workers, block=block)
