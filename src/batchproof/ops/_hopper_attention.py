"""Launches Hopper's attention kernel (``_hopper_attention_kernel``) for the batches and caches that it is for."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ._attention_plan import Plan
from ._fast_launch import FastKernel, View
from ._hopper_attend import BOX, COLUMNS, SIDE
from ._hopper_attention_kernel import hopper_attention_kernel
from ._row_launch import launch_options
from ._triton import processors

__all__ = ["HEAD_DIMS", "launch", "places_for"]

HEAD_DIMS = (64, 128, 256)
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
PAGE = BOX.value  # a page has a multiple of so many keys
ROWS = SIDE.value  # of a consumer


def _places(cache: torch.Tensor) -> tuple[int, int, int] | None:
    """A cache [pages, page_size, kv_heads, head_dim] as rows of slots: where pages and heads are in it.

    Returns:
        Rows from a page to the next, and rows and columns from a head to the next; None if they are no whole numbers,
        or not as the TMA needs them, in multiples of 16 bytes.
    """
    pages, page_size, heads, _ = cache.shape
    page, slot, head, one = cache.stride()
    head = 0 if heads == 1 else head
    in_rows = head >= slot  # a head's slots are together; else a slot's heads
    width = cache.element_size()
    fits = slot > 0 and one == 1 and page % slot == 0 and page_size % PAGE == 0 and (not in_rows or head % slot == 0)
    aligned = slot * width % 16 == 0 and cache.data_ptr() % 16 == 0 and (in_rows or head * width % 16 == 0)
    if not (fits and aligned and pages > 0):
        return None
    return page // slot, head // slot if in_rows else 0, 0 if in_rows else head


def _view(cache: torch.Tensor, places: tuple[int, int, int]) -> View:
    """What the TMA is to know of a cache, which it reads in boxes of PAGE slots."""
    pages, page_size, heads, head_dim = cache.shape
    page_rows, head_rows, head_columns = places
    rows = (pages - 1) * page_rows + (heads - 1) * head_rows + page_size
    columns = (heads - 1) * head_columns + head_dim
    return View(cache, [rows, columns], [cache.stride(1), 1], [PAGE, COLUMNS.value], _layout(cache.dtype))


@lru_cache
def _layout(dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for([PAGE, COLUMNS.value], DTYPES[dtype])


def _describe(view: View) -> Any:
    return TensorDescriptor(view.base, view.shape, view.strides, view.block_shape, view.layout)


_KERNEL = FastKernel(hopper_attention_kernel, _describe)


def places_for(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple[int, int, int] | None:
    """``_places`` of both caches; None if the kernel is not for these dtypes, head size and caches."""
    if q.dtype not in DTYPES or k_cache.dtype != q.dtype or q.shape[2] not in HEAD_DIMS:
        return None
    places = _places(k_cache)
    if places is None or _places(v_cache) != places or k_cache.shape[0] * places[0] >= 2**31:
        return None
    return places


def stages_for(consumers: int, head_dim: int) -> int:
    """Tiles of keys, and of values, that shared memory has room for beside the rest."""
    return 3 if head_dim <= 64 or (consumers == 2 and head_dim <= 128) else 2


def registers_for(consumers: int, head_dim: int) -> int | None:
    """Of a thread at most, so that two programs of one consumer are beside one another; else they have them all."""
    return 128 if consumers == 1 and head_dim <= 128 else None


def launch(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, places: tuple[int, int, int], out: torch.Tensor,
    cu_seqlens_q: torch.Tensor, seqused_k: torch.Tensor, block_table: torch.Tensor, sinks: torch.Tensor | None,
    out_scale: torch.Tensor | None, softmax_scale: float, causal: bool, window: int, softcap: float,
    plan: Plan, parts: list[torch.Tensor | None], splits: int, tile: int, split: int,
) -> torch.Tensor | None:  # fmt: skip
    """Write the outputs of a plan that has consumers to ``out``, or its splits' results to ``parts``.

    ``places``: as ``places_for`` gives them. Everything else is as ``attention.launch`` has it.

    Returns:
        [blocks, consumers, key heads] int32, what is to be computed again; see ``hopper_attention_kernel``. None if no
        sequence has two queries: then nothing is.
    """
    consumers, one_token = plan.consumers, plan.consumers == 1
    walk = not one_token or (plan.workers == 1 and splits > 1)
    merged = odd = None
    if q.shape[2] > 128 and walk:
        merged = q.new_empty(processors(q.device), consumers, ROWS, q.shape[2], dtype=torch.float32)
    if not one_token:
        odd = torch.empty(plan.grid[0], dtype=torch.int32, device=q.device)
    keywords = {
        "WALK": walk, "ONE_TOKEN": one_token, "CONSUMERS": consumers, "NUM_HEADS": q.shape[1],
        "GROUP": q.shape[1] // k_cache.shape[2], "GROUP_PADDED": plan.group, "HEAD_DIM": q.shape[2], "TILE": tile,
        "SPLIT": split, "STAGES": stages_for(consumers, q.shape[2]), "PAGE_SIZE": k_cache.shape[1],
        "CAUSAL": causal, "HAS_WINDOW": window > 0, "HAS_SOFTCAP": softcap > 0.0,
        "num_warps": 4, "maxnreg": registers_for(consumers, q.shape[2]), **launch_options(q),
    }  # fmt: skip
    _KERNEL(
        (*plan.grid, plan.workers) if one_token else (plan.grid[0] // consumers, 1, 1), q,
        (
            _view(k_cache, places), _view(v_cache, places), q, out, merged, odd, *parts, sinks, out_scale,
            cu_seqlens_q, seqused_k, block_table, seqused_k.shape[0], plan.each, block_table.shape[1],
            *q.stride()[:2], block_table.stride(0), *places, softmax_scale, softcap, window, plan.workers, splits,
            q.shape[0],
        ),
        keywords,
    )  # fmt: skip
    return odd
