"""Rotary embedding of queries and keys and the write of keys and values to a paged cache, in one kernel.

    q_out                  = rope(q)        or rope(rms_norm(q, q_weight, eps))
    k_cache[page, offset]  = rope(k)        or rope(rms_norm(k, k_weight, eps))
    v_cache[page, offset]  = v              where page, offset = divmod(slot_mapping[token], page_size)

Invariance: an element depends on its head and its token's row of the table, and where it goes on the token's slot. The
operations are those of ``rope``; with a weight they follow those of ``rms_norm`` over the head, whose sum is taken by
the tree of ``_row_tree``, a function of (head_dim, dtype) alone: a head's halves are two chunks of its row where they
are loaded as such, and else the row is read a second time in one piece. How many heads a program takes and how many
warps follow the number of tokens, and move no addition: a vector is a thread's, a row of vectors at most two warps'.
Heads that are not whole vectors, of whose sums the compiler would choose the order, and those of more vectors than that
are normalised by ``rms_norm``'s kernel before.

Source: vLLM's ``rotary_embedding`` and ``reshape_and_cache_flash``; Qwen3 for the norms.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, LayoutError, ShapeError
from ..registry import Inputs, OpSpec, register_spec
from ._library import (
    check_device,
    check_dtype,
    check_parameter,
    check_positive,
    check_same,
    check_writable,
    register_op,
    require_no_grad,
)
from ._rope_cache_kernel import launch
from .rms_norm import rms_norm, rms_norm_reference
from .rope import check_positions, check_table, rope, rope_cos_sin, rope_reference

__all__ = ["rope_and_cache", "rope_and_cache_reference"]


def rope_and_cache_reference(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos_sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    slot_mapping: Tensor, interleaved: bool = False, q_weight: Tensor | None = None, k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``rms_norm_reference`` if there is a weight, then ``rope_reference``: q, and what the caches get of k and v."""
    if q_weight is not None:
        q = rms_norm_reference(q, q_weight, eps)
    if k_weight is not None:
        k = rms_norm_reference(k, k_weight, eps)
    q, k = (rope_reference(x, positions, cos_sin, interleaved) for x in (q, k))
    return q, k, v.contiguous()


def _validate(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos_sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    slot_mapping: Tensor, interleaved: bool, q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
) -> None:  # fmt: skip
    op = "rope_and_cache"
    check_table(op, "q", q, positions, cos_sin)
    for name, x in (("k", k), ("v", v)):
        check_same(op, name, x, "q", q)
        if x.dim() != 3 or x.shape != k.shape or x.shape[::2] != q.shape[::2]:
            raise ShapeError(
                f"{op}: {name} has shape {tuple(x.shape)}, want [{q.shape[0]}, num_kv_heads, {q.shape[2]}], as q "
                f"has {tuple(q.shape)}, and k and v alike"
            )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_same(op, name, cache, "q", q)
        if cache.dim() != 4 or cache.shape[:2] != k_cache.shape[:2] or cache.shape[2:] != k.shape[1:]:
            raise ShapeError(
                f"{op}: {name} has shape {tuple(cache.shape)}, want [num_pages, page_size, {k.shape[1]}, {k.shape[2]}],"
                " and k_cache and v_cache alike"
            )
        if cache.stride(3) != 1 and cache.shape[3] > 1:
            raise LayoutError(f"{op}: {name} has stride {cache.stride()}, want 1 for the last axis")
    check_dtype(op, "slot_mapping", slot_mapping, (torch.int64, torch.int32))
    check_device(op, "slot_mapping", slot_mapping, "q", q)
    if slot_mapping.dim() != 1:
        raise ShapeError(f"{op}: slot_mapping has shape {tuple(slot_mapping.shape)}, want one axis, a slot a token")
    check_parameter(op, "q_weight", q_weight, q)
    check_parameter(op, "k_weight", k_weight, q)
    check_positive(op, "eps", eps)


def _check_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    check_writable("rope_and_cache", "k_cache", k_cache)
    check_writable("rope_and_cache", "v_cache", v_cache)
    if k_cache.numel() and k_cache.data_ptr() == v_cache.data_ptr():
        raise LayoutError("rope_and_cache: k_cache and v_cache are the same memory, want two caches")


def _cpu(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos_sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    slot_mapping: Tensor, interleaved: bool, q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    _validate(q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping, interleaved, q_weight, k_weight, eps)
    _check_caches(k_cache, v_cache)
    check_positions("rope_and_cache", positions, cos_sin)
    slots = slot_mapping[: len(k)].long()
    num_pages, page_size = k_cache.shape[:2]
    beyond = slots[slots >= num_pages * page_size]
    if beyond.numel():
        raise ArgumentError(
            f"rope_and_cache: slot_mapping holds {int(beyond[0])}, want less than {num_pages * page_size}, the caches' "
            f"{num_pages} pages of {page_size}"
        )
    tokens = (slots >= 0).nonzero().flatten()
    places = slots[tokens] // max(page_size, 1), slots[tokens] % max(page_size, 1)
    q = q if q_weight is None else rms_norm(q, q_weight, eps)
    k = k if k_weight is None else rms_norm(k, k_weight, eps)
    k_cache[places] = rope(k, positions, cos_sin, interleaved)[tokens]
    v_cache[places] = v[tokens]
    return rope(q, positions, cos_sin, interleaved)


def _cuda(*arguments: Any) -> Tensor:
    _validate(*arguments)
    k_cache, v_cache = arguments[5:7]
    _check_caches(k_cache, v_cache)
    q_out = torch.empty_like(arguments[0], memory_format=torch.contiguous_format)
    launch(q_out, *arguments)
    for written in (k_cache, v_cache):  # as ``copy_`` does: what has kept one of them for later has to notice
        if not written.is_inference():
            torch.autograd.graph.increment_version(written)
    return q_out


def _fake(*arguments: Any) -> Tensor:
    _validate(*arguments)
    return torch.empty_like(arguments[0], memory_format=torch.contiguous_format)


_rope_and_cache = register_op(
    "rope_and_cache(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor cos_sin, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor slot_mapping, bool interleaved, Tensor? q_weight, Tensor? k_weight, float eps) "
    "-> Tensor",
    cpu=_cpu, cuda=_cuda, fake=_fake,
)  # fmt: skip


def rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    interleaved: bool = False,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Rotate queries and keys by their tokens' positions, and write keys and values to their slots of the caches.

    Args:
        q: [num_tokens, num_heads, head_dim], fp32, fp16 or bf16, any strides: a view of a q, k, v tensor is not copied.
        k: [num_tokens, num_kv_heads, head_dim], as q.
        v: as k.
        positions: [num_tokens], int64 or int32, each a row of cos_sin.
        cos_sin: [num_positions, rot], fp32 or q's dtype; see ``rope``.
        k_cache: [num_pages, page_size, num_kv_heads, head_dim] of q's dtype, unit stride along head_dim; written.
        v_cache: as k_cache, sharing no memory with it.
        slot_mapping: [n], int64 or int32: ``page * page_size + offset`` of each token, no slot twice. A token of a
            negative slot, or past the end of slot_mapping, is not written; slots past the last token are not read.
        interleaved: pairs are neighbours (GPT-J) rather than half of rot apart (NeoX, Llama).
        q_weight: [head_dim] of q's dtype: each head is normalised first, ``rms_norm(q, q_weight, eps)``, as Qwen3 has
            it; None for no norm.
        k_weight: as q_weight, for k.
        eps: added to the mean square; finite, not negative.

    Returns:
        The queries, new and contiguous, of q's shape and dtype. Bits are those of ``rms_norm`` and ``rope``. On a GPU,
        where looking would cost a synchronisation, a position outside the table makes its token's rotated elements
        NaN, and a slot outside the caches is not written.

    Invariance: a token's bits depend on its q, k and v, its position, cos_sin, the weights and eps alone; see the
    module docstring.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: before anything is written.
        LayoutError: a cache overlaps itself, is the other one, or is not packed along head_dim.
        ArgumentError: on the CPU, a position outside the table or a slot outside the caches.
        UnsupportedError: autograd would record the call.

    Source: vLLM's ``rotary_embedding`` and ``reshape_and_cache_flash``.
    """
    require_no_grad("rope_and_cache", q, k, v, cos_sin, k_cache, v_cache, q_weight, k_weight)
    result: Tensor = _rope_and_cache(
        q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping, interleaved, q_weight, k_weight, eps
    )
    return result


@functools.wraps(rope_and_cache)
def _with_rows(k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
    """The op, and what it has written for each token, so that all outputs have a row a token."""
    q_out = rope_and_cache(k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping, **inputs)
    places = slot_mapping // k_cache.shape[1], slot_mapping % k_cache.shape[1]
    return q_out, k_cache[places], v_cache[places]


def _sample(num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    """Views of one tensor of 8 + 2 + 2 heads, and slots at random in pages of 16."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    pages = num_tokens // 16 + 2
    q, k, v = randn(num_tokens, 12, 64).split((8, 2, 2), dim=1)
    inv_freq = 500000.0 ** -(torch.arange(32, dtype=torch.float64, device=device) / 32.0)
    k_cache, v_cache = torch.zeros(2, pages, 16, 2, 64, dtype=dtype, device=device)
    return {
        "q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache,
        "positions": torch.randint(2048, (num_tokens,), generator=generator, device=device),
        "cos_sin": rope_cos_sin(inv_freq.float(), 2048),
        "slot_mapping": torch.randperm(pages * 16, generator=generator, device=device)[:num_tokens],
        "q_weight": randn(64) * 0.1 + 1.0, "k_weight": randn(64) * 0.1 + 1.0,
    }  # fmt: skip


register_spec(
    OpSpec(
        "rope_and_cache",
        _with_rows,
        rope_and_cache_reference,
        _sample,
        batch_axes=dict.fromkeys(("q", "k", "v", "positions", "slot_mapping"), 0),
        tolerance="rope_and_cache",
        in_place=("k_cache", "v_cache"),
    )
)
