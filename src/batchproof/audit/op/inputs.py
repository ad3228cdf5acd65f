"""The arguments of an audited callable, from a short notation, so that any batch of the same rows can be made.

    randn[M,4096]:bf16      one row a request: M marks the axis of the batch; 8*M is eight rows a request
    randn[4096]:bf16        no M: a weight, the same in every batch
    randint(0,100)[M]:int64, rand, zeros, ones, full(0.5)[1]
    arange[M+1]:int32       numbers of places in the batch, made anew for every batch, such as cu_seqlens
    empty[M,4096]:bf16      an output to be written; full of NaN, or of the largest integer, before every call
    M                       the batch size, as an int
    1e-6, True, None, 'x'   anything else is a Python literal; torch.bfloat16 is the dtype

The values of a tensor are made by a few lines of Python (``Argument.recipe``), which the audit runs and the report's
reproduction quotes.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import ArgumentError

__all__ = ["KINDS", "Argument", "parse", "poison"]

KINDS = ("normal", "cancelling", "wide exponents", "subnormal")
DTYPES = {
    "fp64": "float64", "f64": "float64", "fp32": "float32", "f32": "float32", "fp16": "float16", "f16": "float16",
    "bf16": "bfloat16", "fp8": "float8_e4m3fn", "i64": "int64", "i32": "int32", "i8": "int8", "u8": "uint8",
}  # fmt: skip
_DRAWN = {
    "randn": "torch.randn({shape}, generator=g)",
    "rand": "torch.rand({shape}, generator=g)",
    "randint": "torch.randint({values}, ({shape},), generator=g)",
    "zeros": "torch.zeros({shape})",
    "ones": "torch.ones({shape})",
    "full": "torch.full(({shape},), {values})",
}
_MADE_ANEW = ("arange", "empty")
_TENSOR = re.compile(
    r"(?P<maker>[a-z]+)(?:\((?P<values>[^()]*)\))?\[(?P<dims>[^\[\]]*)\](?::(?P<dtype>\w+))?", re.ASCII
)
_BATCH_DIM = re.compile(r"(?:(\d+)\*)?M(?:\*(\d+))?(?:\+(\d+))?")


@dataclass(frozen=True)
class Argument:
    """One argument. ``maker`` is None for a literal, and "M" for the batch size itself.

    Attributes:
        name: of a keyword; None if it goes by position.
        variable: an identifier for it in recipes.
        maker: how its values are made.
        values: in brackets after the maker.
        dims: sizes; None where the batch is.
        each: rows a request has along that axis.
        extra: places more than the batch has (M+1).
        dtype: of the tensor.
        literal: the value of a literal.
    """

    name: str | None
    variable: str
    maker: str | None
    values: str = ""
    dims: tuple[int | None, ...] = ()
    each: int = 1
    extra: int = 0
    dtype: torch.dtype = torch.float32
    literal: Any = None

    @property
    def axis(self) -> int | None:
        """The axis of the batch."""
        return self.dims.index(None) if None in self.dims else None

    @property
    def is_drawn(self) -> bool:
        """Whether its values are drawn once, for all rows."""
        return self.maker in _DRAWN

    @property
    def is_activation(self) -> bool:
        """Whether it holds numbers of requests, which a hostile neighbour may choose."""
        return self.is_drawn and self.axis is not None and self.dtype.is_floating_point

    def recipe(self, rows: int, seed: int, kind: str, alike: str | None = None) -> list[str]:
        """Lines of Python that make the tensor of ``rows`` requests on the CPU.

        Args:
            rows: requests there are in all.
            seed: of its generator.
            kind: of ``KINDS``; only activations follow it.
            alike: an earlier activation of the same shape, which "cancelling" then cancels.
        """
        assert self.maker is not None
        shape = ", ".join(str(self.each * rows if dim is None else dim) for dim in self.dims)
        x = self.variable
        lines = [f"g = torch.Generator().manual_seed({seed})"]
        drawn = _DRAWN[self.maker].format(shape=shape, values=self.values)
        lines.append(f"{x} = {drawn}")
        if self.is_activation:
            lines += _change(kind, x, alike, self)
        if self.dtype == torch.float8_e4m3fn:  # what is larger becomes NaN
            lines.append(f"{x} = {x}.clamp(-448, 448)")
        return [*lines, f"{x} = {x}.to({self.dtype})"]

    def make_anew(self, batch: int, device: torch.device) -> torch.Tensor:
        """An argument that no request owns: places, or an output to be written."""
        shape = [self.each * batch + self.extra if dim is None else dim for dim in self.dims]
        if self.maker == "arange":
            return torch.arange(math.prod(shape), dtype=self.dtype, device=device).view(shape)
        return poison(torch.empty(shape, dtype=self.dtype, device=device))


def parse(arguments: Mapping[str, Any] | Sequence[Any]) -> list[Argument]:
    """Arguments in the notation above, by name or by position; other values than strings pass as they are.

    A name that the function does not know only labels an argument: then all go by place, in the order given.

    Raises:
        ArgumentError: malformed, or no argument has an axis M.
    """
    pairs: list[tuple[str | None, Any]] = (
        list(arguments.items()) if isinstance(arguments, Mapping) else [(None, value) for value in arguments]
    )
    parsed = [_parse(name, f"a{i}" if name is None else name, value) for i, (name, value) in enumerate(pairs)]
    if not any(argument.axis is not None and argument.is_drawn for argument in parsed):
        raise ArgumentError(f"no argument has an axis M among {list(pairs)!r}, want one such as x=randn[M,4096]:bf16")
    return parsed


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` filled with what no op leaves there by chance."""
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).fill_(0x7F).view(tensor.dtype)  # its NaN
    value = math.nan if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).max
    return tensor.fill_(value)


def _parse(name: str | None, variable: str, value: Any) -> Argument:
    if not variable.isidentifier():
        raise ArgumentError(f"argument name is {variable!r}, want a Python identifier")
    if not isinstance(value, str):
        return Argument(name, variable, None, literal=value)
    text = value.replace(" ", "")
    if text == "M":
        return Argument(name, variable, "M")
    match = _TENSOR.fullmatch(text)
    if match and (match["maker"] in _DRAWN or match["maker"] in _MADE_ANEW):
        return _parse_tensor(name, variable, match, value)
    if value.startswith("torch.") and isinstance(getattr(torch, value[6:], None), torch.dtype):
        return Argument(name, variable, None, literal=getattr(torch, value[6:]))
    try:
        return Argument(name, variable, None, literal=ast.literal_eval(value))
    except (ValueError, SyntaxError):
        makers = ", ".join([*_DRAWN, *_MADE_ANEW])
        raise ArgumentError(
            f"argument {variable} is {value!r}, want a tensor such as randn[M,4096]:bf16 ({makers}), M, a dtype such "
            "as torch.bfloat16, or a Python literal"
        ) from None


def _parse_tensor(name: str | None, variable: str, match: re.Match[str], value: str) -> Argument:
    maker, values = match["maker"], match["values"] or ""
    word = match["dtype"] or ("int64" if maker in ("randint", "arange") else "float32")
    dtype = getattr(torch, DTYPES.get(word, word), None)
    if not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"dtype of {variable} is {word!r} in {value!r}, want {', '.join(DTYPES)} or torch's name")
    if (maker in ("randint", "full")) != bool(values):
        raise ArgumentError(f"{variable} is {value!r}, want randint(low,high)[...], full(value)[...], others bare")
    dims: list[int | None] = []
    each, extra = 1, 0
    for dim in filter(None, match["dims"].split(",")):
        batch = _BATCH_DIM.fullmatch(dim)
        if batch:
            dims.append(None)
            each, extra = int(batch[1] or 1) * int(batch[2] or 1), int(batch[3] or 0)
        elif dim.isdigit():
            dims.append(int(dim))
        else:
            raise ArgumentError(f"a size of {variable} is {dim!r} in {value!r}, want a number, M, 8*M or M+1")
    if dims.count(None) > 1 or (extra and maker not in _MADE_ANEW):
        raise ArgumentError(f"{variable} is {value!r}, want M once, and M+1 for arange and empty only")
    return Argument(name, variable, maker, values, tuple(dims), each, extra, dtype)


def _change(kind: str, x: str, alike: str | None, argument: Argument) -> list[str]:
    """Lines that make a drawn activation adversarial."""
    last = (argument.axis != len(argument.dims) - 1 and argument.dims[-1]) or 0
    noise = "torch.randint(-2, 3, {like}.shape, generator=g)"
    if kind == "wide exponents":
        return [f"{x} = {x} * 2.0 ** torch.randint(-12, 10, {x}.shape, generator=g)"]
    if kind == "subnormal":
        return [f"{x} = {x} * {torch.finfo(argument.dtype).tiny / 2!r}"]
    if kind == "cancelling" and alike is not None:
        return [f"{x} = -{alike} * (1 + 2.0**-9 * {noise.format(like=alike)})"]
    if kind == "cancelling" and last > 1:
        half = f"{x}[..., :{last // 2}]"
        return [f"{x}[..., {last // 2}:{last // 2 * 2}] = -{half} * (1 + 2.0**-7 * {noise.format(like=half)})"]
    return []
