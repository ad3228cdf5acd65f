"""Rotary position embedding of queries and keys, with a table of cosines and sines.

    out1 = x1 * cos - x2 * sin
    out2 = x2 * cos + x1 * sin

(x1, x2) are elements i and i + rot / 2 of a head (half-split, as NeoX and Llama) or 2 i and 2 i + 1 (interleaved, as
GPT-J); cos and sin are of ``position * inv_freq[i]``. Elements from ``rot`` on are copied.

Invariance: an element of the output depends on two elements of x and one row of the table, in two products and one
difference in fp32. On a GPU contraction into FMA is off and every element takes the same instructions; on the CPU
the products are separate operations. A row of the table depends on its position and inv_freq alone: it is computed
in float64 by calls of one fixed shape, so that no element moves between a math library's vector and tail code when
the table grows.

Source: Su et al., RoFormer, 2021; vLLM's ``rotary_embedding`` for the table's layout. Hugging Face takes the angles
in fp32, which moves them by up to 2**-24 of the position.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ArgumentError, ShapeError
from ..registry import OpSpec, register_spec
from . import _exact
from ._library import check_device, check_dtype, check_positive, register_op, require_no_grad
from ._triton import device_guard, tl, triton

__all__ = ["check_positions", "check_table", "rope", "rope_cos_sin", "rope_reference", "rotated"]

BLOCK_ELEMENTS = 2048  # pairs a program, 4 warps; an element's bits do not depend on either
NUM_WARPS = 4
TABLE_ELEMENTS = 2048  # angles a call while the table is made: torch does not share so few out over threads


def rope_cos_sin(inv_freq: torch.Tensor, num_positions: int, scaling: float = 1.0) -> torch.Tensor:
    """The table that ``rope`` takes: the cosines and sines of positions 0 to ``num_positions - 1``.

    Args:
        inv_freq: [rot / 2] fp32, radians a position: ``theta ** -(2 i / rot)``, or what a long-context scheme makes
            of it. Hugging Face models have it as ``rotary_emb.inv_freq``.
        num_positions: rows of the table.
        scaling: factor of every cosine and sine (``attention_scaling`` in Hugging Face); finite, not negative.

    Returns:
        [num_positions, rot] fp32 on inv_freq's device, ``cat(cos, sin)`` of the fp32 angle, computed in float64.

    Invariance: a row depends on its position, inv_freq and scaling alone, not on ``num_positions``; the table is
    made on the CPU whatever the device.

    Raises:
        ShapeError, DtypeError: inv_freq is not [rot / 2] fp32.
        ArgumentError: num_positions is negative, or scaling negative or not finite.

    Source: vLLM's ``cos_sin_cache``.
    """
    check_dtype("rope_cos_sin", "inv_freq", inv_freq, (torch.float32,))
    if inv_freq.dim() != 1:
        raise ShapeError(f"rope_cos_sin: inv_freq has shape {tuple(inv_freq.shape)}, want (rot / 2,)")
    if num_positions < 0:
        raise ArgumentError(f"rope_cos_sin: num_positions is {num_positions}, want 0 or more")
    check_positive("rope_cos_sin", "scaling", scaling)
    frequencies = inv_freq.detach().cpu()
    half = frequencies.numel()
    table = torch.empty(num_positions, 2 * half, dtype=torch.float32)
    step = max(TABLE_ELEMENTS // max(half, 1), 1)
    for start in range(0, num_positions, step):
        positions = torch.arange(start, start + step, dtype=torch.float32)
        # The angle is rounded to fp32, as the models were trained with. Rows past the end are computed as well: the
        # shape is part of the arithmetic.
        angles = (positions[:, None] * frequencies).double()
        rows = table[start : start + step]
        rows[:, :half] = (angles.cos() * scaling)[: len(rows)]
        rows[:, half:] = (angles.sin() * scaling)[: len(rows)]
    return table.to(inv_freq.device)


def rope_reference(
    x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """The formula in float64 from the table as it is, rounded once."""
    first, second = _pairs(x.double(), cos_sin.shape[-1], interleaved)
    cos, sin = cos_sin.double()[positions].unsqueeze(1).chunk(2, dim=-1)
    out = x.double().clone()
    out_first, out_second = _pairs(out, cos_sin.shape[-1], interleaved)
    out_first.copy_(first * cos - second * sin)
    out_second.copy_(second * cos + first * sin)
    return out.to(x.dtype)


def _pairs(x: torch.Tensor, rot: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the first and the second elements of the pairs that are rotated."""
    if interleaved:
        return x[..., 0:rot:2], x[..., 1:rot:2]
    return x[..., : rot // 2], x[..., rot // 2 : rot]


@triton.jit
def rotated(x1, x2, cos, sin, dtype: tl.constexpr):
    """A pair's first and second elements turned, in fp32, each rounded once."""
    x1, x2, cos, sin = x1.to(tl.float32), x2.to(tl.float32), cos.to(tl.float32), sin.to(tl.float32)
    return (x1 * cos - x2 * sin).to(dtype), (x2 * cos + x1 * sin).to(dtype)


@triton.jit(do_not_specialize=["x_token", "x_head", "num_heads", "num_positions"])
def _rope_kernel(
    x_ptr, positions_ptr, cos_sin_ptr, out_ptr,
    x_token: tl.int64, x_head: tl.int64, num_heads: tl.int64, num_positions: tl.int64,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, VEC: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """BLOCK_HEADS heads of one token; x's strides are in units of VEC elements."""
    dtype = out_ptr.dtype.element_ty
    head_blocks = tl.cdiv(num_heads, BLOCK_HEADS).to(tl.int32)
    token = (tl.program_id(0) // head_blocks).to(tl.int64)
    heads = (tl.program_id(0) % head_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    is_head = heads < num_heads
    x_ptr += (token * x_token + heads * x_head) * VEC
    out_ptr += (token * num_heads + heads) * HEAD_DIM

    pairs = tl.arange(0, BLOCK_HALF)[None, :]
    is_pair = pairs < HALF
    position = tl.load(positions_ptr + token).to(tl.int64)
    in_table = (position >= 0) & (position < num_positions) & is_pair  # outside: not read, NaN
    cos = tl.load(cos_sin_ptr + position * (2 * HALF) + pairs, mask=in_table, other=float("nan"))
    sin = tl.load(cos_sin_ptr + position * (2 * HALF) + HALF + pairs, mask=in_table, other=float("nan"))
    first = pairs * 2 if INTERLEAVED else pairs
    second = pairs * 2 + 1 if INTERLEAVED else pairs + HALF
    mask = is_head & is_pair
    x1 = tl.load(x_ptr + first, mask=mask, other=0.0)
    x2 = tl.load(x_ptr + second, mask=mask, other=0.0)
    y1, y2 = rotated(x1, x2, cos, sin, dtype)
    tl.store(out_ptr + first, y1, mask=mask)
    tl.store(out_ptr + second, y2, mask=mask)
    if REST > 0:
        rest = tl.arange(0, BLOCK_REST)[None, :]
        mask = is_head & (rest < REST)
        tl.store(out_ptr + 2 * HALF + rest, tl.load(x_ptr + 2 * HALF + rest, mask=mask), mask=mask)


def launch(
    x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, out: torch.Tensor, interleaved: bool
) -> None:
    """Run the kernel; ``out`` is new and contiguous, of x's shape."""
    if x.numel() == 0:
        return
    num_tokens, num_heads, head_dim = x.shape
    vec = 16 // x.element_size()
    vec = vec if head_dim % vec == 0 else 1
    if x.data_ptr() % 16 or (x.stride(2) != 1 and head_dim > 1) or x.stride(0) % vec or x.stride(1) % vec:
        x = x.clone(memory_format=torch.contiguous_format)
    half = cos_sin.shape[1] // 2
    rest = head_dim - 2 * half
    block_half, block_rest = (triton.next_power_of_2(max(n, 1)) for n in (half, rest))
    block_heads = min(triton.next_power_of_2(num_heads), max(BLOCK_ELEMENTS // max(block_half, block_rest), 1))
    with device_guard(x):
        _rope_kernel[(num_tokens * triton.cdiv(num_heads, block_heads),)](
            x, positions.contiguous(), cos_sin.contiguous(), out,
            x.stride(0) // vec, x.stride(1) // vec, num_heads, cos_sin.shape[0],
            HEAD_DIM=head_dim, HALF=half, REST=rest, VEC=vec, INTERLEAVED=interleaved,
            BLOCK_HEADS=block_heads, BLOCK_HALF=block_half, BLOCK_REST=block_rest,
            num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def check_table(op: str, name: str, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
    """DtypeError, DeviceError or ShapeError unless ``x`` are heads that ``cos_sin`` can turn by ``positions``."""
    check_dtype(op, name, x)
    check_dtype(op, "positions", positions, (torch.int64, torch.int32))
    check_dtype(op, "cos_sin", cos_sin, tuple(dict.fromkeys((torch.float32, x.dtype))))
    for other, tensor in (("positions", positions), ("cos_sin", cos_sin)):
        check_device(op, other, tensor, name, x)
    if x.dim() != 3:
        raise ShapeError(f"{op}: {name} has shape {tuple(x.shape)}, want [num_tokens, num_heads, head_dim]")
    if positions.shape != x.shape[:1]:
        raise ShapeError(f"{op}: positions has shape {tuple(positions.shape)}, want ({x.shape[0]},), one a token")
    if cos_sin.dim() != 2 or cos_sin.shape[1] % 2 != 0 or cos_sin.shape[1] > x.shape[2]:
        raise ShapeError(
            f"{op}: cos_sin has shape {tuple(cos_sin.shape)}, want [num_positions, rot] with rot even and at most "
            f"{x.shape[2]}, {name}'s head_dim"
        )


def check_positions(op: str, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
    """ArgumentError unless every position is a row of ``cos_sin``. For the CPU: on a GPU, looking waits for it."""
    outside = positions[(positions < 0) | (positions >= cos_sin.shape[0])]
    if outside.numel():
        raise ArgumentError(
            f"{op}: positions holds {int(outside[0])}, want 0 to {cos_sin.shape[0] - 1}, the rows of cos_sin"
        )


def _rope_cpu(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    check_table("rope", "x", x, positions, cos_sin)
    check_positions("rope", positions, cos_sin)
    rot = cos_sin.shape[1]
    first, second = (t.float() for t in _pairs(x, rot, interleaved))
    cos, sin = cos_sin[positions.long()].float().unsqueeze(1).chunk(2, dim=-1)
    out = x.clone(memory_format=torch.contiguous_format)
    out_first, out_second = _pairs(out, rot, interleaved)
    out_first.copy_(_exact.canonical_nan(first * cos - second * sin))
    out_second.copy_(_exact.canonical_nan(second * cos + first * sin))
    return out


def _rope_cuda(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    check_table("rope", "x", x, positions, cos_sin)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch(x, positions, cos_sin, out, interleaved)
    return out


def _rope_fake(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    check_table("rope", "x", x, positions, cos_sin)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_rope = register_op(
    "rope(Tensor x, Tensor positions, Tensor cos_sin, bool interleaved) -> Tensor",
    cpu=_rope_cpu, cuda=_rope_cuda, fake=_rope_fake,
)  # fmt: skip


def rope(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotate the pairs of each head of ``x`` by its token's position.

    Args:
        x: [num_tokens, num_heads, head_dim], fp32, fp16 or bf16, any strides; queries or keys.
        positions: [num_tokens], int64 or int32, each a row of cos_sin.
        cos_sin: [num_positions, rot], fp32 from ``rope_cos_sin`` or x's dtype, as vLLM rounds its table; rot even and
            at most head_dim. The elements of a head from rot on are copied.
        interleaved: pairs are neighbours (GPT-J) rather than half of rot apart (NeoX, Llama).

    Returns:
        A new contiguous tensor of x's shape and dtype: fp32 arithmetic, one rounding. On a GPU, where looking would
        cost a synchronisation, a position outside the table makes its token's rotated elements NaN.

    Invariance: each token's bits depend on its row of x, its position and cos_sin alone; see the module docstring.

    Raises:
        ShapeError, DtypeError, DeviceError: before anything is computed.
        ArgumentError: on the CPU, a position outside the table.
        UnsupportedError: autograd would record the call.

    Source: Su et al., RoFormer, 2021.
    """
    require_no_grad("rope", x, cos_sin)
    result: torch.Tensor = _rope(x, positions, cos_sin, interleaved)
    return result


def _sample(num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    inv_freq = 500000.0 ** -(torch.arange(64, dtype=torch.float64, device=device) / 64.0)
    return {
        "x": torch.randn(num_tokens, 8, 128, generator=generator, device=device).to(dtype),
        "positions": torch.randint(2048, (num_tokens,), generator=generator, device=device),
        "cos_sin": rope_cos_sin(inv_freq.float(), 2048),
    }


register_spec(OpSpec("rope", rope, rope_reference, _sample, batch_axes={"x": 0, "positions": 0}, tolerance="rope"))
