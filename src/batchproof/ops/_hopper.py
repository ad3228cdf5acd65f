"""Which products run by the kernel for Hopper (``_hopper_product``), and how their output is cut there.

Invariance: M chooses shapes, and no bit depends on a shape; see ``_hopper_product``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from ._triton import processors

__all__ = [
    "SIDE",
    "Part",
    "Shape",
    "gated_product",
    "is_hopper",
    "parts_for",
    "product",
    "shape_for",
    "takes",
    "use_static_weights",
]

SIDE = 64  # rows of a wgmma
BLOCK = 128  # columns of the weight with one scale
DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float16)
# What a wave of tiles costs by (consumers, width), one for each multiprocessor, in units of the first: measured on an
# H200 with 128 to 1024 tokens
COSTS = {(2, 128): 1.0, (1, 128): 0.8, (2, 64): 0.68, (1, 64): 0.55, (1, 32): 0.35, (1, 16): 0.3}
ANOTHER = 0.3  # what another launch costs, in the same units
MOST_WAVES = 8  # of tiles over the multiprocessors: with more, the last one hardly counts
LEAST_ROW = 4096  # bytes of a row of the weight: a product of fewer is over before another launch pays


@dataclass(frozen=True)
class Shape:
    """How the output is cut; no bit depends on it.

    A program's tile is ``consumers * 64`` by ``width``. ``swap`` puts the weight's columns on wgmma's side of
    64 and the tokens on its other, which may be as narrow as 16. ``stages``: depth of the ring, 0 for all that fits.
    ``group``: as many rows of tiles are worked on together.
    """

    consumers: int
    width: int
    swap: bool = False
    stages: int = 0
    group: int = 8

    @property
    def height(self) -> int:
        """Rows of a tile on wgmma's side of 64."""
        return self.consumers * SIDE

    def tiles(self, m: int, n: int) -> int:
        """Tiles of the output of m tokens by n columns."""
        left, right = (n, m) if self.swap else (m, n)
        return -(-left // self.height) * -(-right // self.width)

    def cost(self, m: int, n: int, multiprocessors: int) -> float:
        """Of all waves of tiles, of which a multiprocessor does one at a time, in the units of COSTS."""
        return -(-self.tiles(m, n) // multiprocessors) * COSTS[self.consumers, self.width]


# By the number of tokens, the largest tile first.
SHAPES = (
    (16, (Shape(1, 16, True, 12, 1),)),
    (32, (Shape(1, 32, True, 12, 1),)),
    (64, (Shape(1, 128, False, 8, 1), Shape(1, 64, False, 12, 1), Shape(1, 32, False, 16, 1))),
    (None, (Shape(2, 128), Shape(2, 64), Shape(1, 64), Shape(1, 32))),
)


def shape_for(m: int, n: int, multiprocessors: int) -> Shape:
    """How the output of m tokens by n columns is cut on a GPU of so many multiprocessors: so that waves cost least."""
    shapes = next(shapes for most, shapes in SHAPES if most is None or m <= most)
    return min(shapes, key=lambda shape: shape.cost(m, n, multiprocessors))


@dataclass(frozen=True)
class Part:
    """The columns [start, stop) of an output, and how they are cut."""

    start: int
    stop: int
    shape: Shape


@lru_cache(maxsize=4096)
def parts_for(m: int, n: int, row_bytes: int, multiprocessors: int) -> tuple[Part, ...]:
    """The launches that make the output of m tokens by n columns: one, or two if a wave of tiles would be half empty.

    A program takes a tile at a time. Where the last tiles leave many multiprocessors idle, their columns may be cut in
    smaller ones, in a launch of their own. ``row_bytes``: of the weight.
    """
    shape = shape_for(m, n, multiprocessors)
    tiles, down = shape.tiles(m, n), shape.tiles(m, 1)
    waves, left = divmod(tiles, multiprocessors)
    if row_bytes >= LEAST_ROW and shape.consumers == 2 and 1 <= waves <= MOST_WAVES and left > 0:
        start = waves * multiprocessors // down * shape.width // BLOCK * BLOCK
        rest = shape_for(m, n - start, multiprocessors) if start < n else shape
        costs = [shape.cost(m, start, multiprocessors), rest.cost(m, n - start, multiprocessors), ANOTHER]
        if sum(costs) < shape.cost(m, n, multiprocessors):
            return Part(0, start, shape), Part(start, n, rest)
    return (Part(0, n, shape),)


def takes(tokens: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, shape: Shape) -> bool:
    """Whether the TMA can read [M, K] and [N, K], k the fastest, and write [M, N]: sizes and strides of 16 bytes."""
    return (
        tokens.dtype in DTYPES
        and _is_readable(tokens)
        and _is_readable(weight)
        and (shape.swap or (out.shape[1] % 8 == 0 and out.element_size() == 2 and out.data_ptr() % 16 == 0))
    )


def _is_readable(operand: torch.Tensor) -> bool:
    row, one = operand.stride()
    aligned = row * operand.element_size() % 16 == 0 and operand.data_ptr() % 16 == 0
    return aligned and one == 1 and row >= operand.shape[1] > 0


@lru_cache
def is_hopper(device: torch.device) -> bool:
    """Whether its tensor cores are those whose bits do not depend on the tile."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


_static_weights = False


def use_static_weights(use: bool) -> None:
    """Whether this process's products on Hopper start while the kernel before still runs, and read weights even then.

    For an engine whose weights no kernel writes just before a product: it can be told so, it cannot be seen. It pays
    after kernels that let others in early, as batchproof's do. No bit depends on it.
    """
    global _static_weights
    _static_weights = use


@lru_cache
def _kernel() -> Callable[..., torch.Tensor] | None:
    """The kernel's launch; None with a Triton that has no Gluon, or another."""
    try:
        from ._hopper_product import launch
    except ImportError:
        return None
    return launch


def product(
    tokens: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, scale_a: torch.Tensor | None = None,
    scale_b: torch.Tensor | None = None, bias: torch.Tensor | None = None, blocks: bool = False,
) -> bool:  # fmt: skip
    """Write ``tokens [M, K] @ weight [N, K].T`` to ``out`` by the kernel for Hopper, if it can; whether it did.

    Scales, bias and blocks are as for ``_hopper_product.launch``.
    """
    if not is_hopper(tokens.device):
        return False
    row_bytes = tokens.shape[1] * tokens.element_size()
    parts = parts_for(out.shape[0], out.shape[1], row_bytes, processors(tokens.device))
    if not takes(tokens, weight, out, parts[0].shape):
        return False
    launch = _kernel()
    if launch is None:
        return False
    if len(parts) == 1:
        launch(tokens, weight, out, parts[0].shape, scale_a, scale_b, bias, blocks, _static_weights)
        return True
    for part in parts:
        columns = slice(part.start, part.stop)
        of_scales = slice(part.start // BLOCK, -(-part.stop // BLOCK)) if blocks else columns
        launch(
            tokens, weight[columns], out[:, columns], part.shape, scale_a,
            None if scale_b is None else scale_b[:, of_scales], None if bias is None else bias[columns],
            blocks, _static_weights,
        )  # fmt: skip
    return True


def gated_product(
    tokens: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor,
    dtype: torch.dtype, scale: torch.Tensor,
) -> bool:  # fmt: skip
    """Write what ``silu_and_mul_static_fp8_quant`` makes of a product to ``out`` [M, N / 2], if it can; whether it did.

    It can for so few tokens that the weight is on wgmma's side of 64. ``dtype``: of the product, 16 bits.
    """
    if not is_hopper(tokens.device) or dtype not in DTYPES:
        return False
    shape = shape_for(tokens.shape[0], weight.shape[0], processors(tokens.device))
    launch = _kernel() if shape.swap and takes(tokens, weight, out, shape) else None
    if launch is None:
        return False
    launch(tokens, weight, out, shape, scale_a, scale_b, None, False, _static_weights, (dtype, scale))
    return True
