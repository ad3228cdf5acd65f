"""How the norms' kernels are launched: by which variant, at which addresses, and without work done before.

A variant says how many warps take a row and in which order they read it. It may follow the number of rows, because
all variants of a width sum a row by one tree (see ``_row_tree``).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..errors import ShapeError
from ._row_tree import AT_ONCE, LATER
from ._rows import readable, row_strides, writable
from ._triton import device_guard, tl, triton

__all__ = [
    "CachedKernel",
    "RowPlan",
    "RowVariant",
    "address_rows",
    "launch_options",
    "row_plan",
    "use_dependent_launch",
]

VECTOR_BYTES = 16
MAX_ROWS = 2**31 - 1
MAX_CHUNKS = 256
ANY = MAX_ROWS


class RowVariant(NamedTuple):
    """One way of launching a row kernel.

    Attributes:
        warps: warps of a program, which takes one row or, where a row is narrow, several.
        ahead: every load is issued before the first is used: least latency. If not, chunk after chunk is read, added
            and written, which keeps HBM busiest when there are rows enough to hide the latency.
        late: the next kernel's programs are let in once this one's loads are used, rather than once they are issued.
        hold: the row stays in registers; if not, it is read again once its statistics are known.
    """

    warps: int
    ahead: bool = True
    late: bool = False
    hold: bool = True


late = functools.partial(RowVariant, late=True)
stream = functools.partial(RowVariant, ahead=False)
early = RowVariant

# For each kind of kernel: (widest row in vectors of 16 bytes, ((most rows, variant), ...)), bf16 sizes beside it.
# "static" is the norm with static quantisation, "dynamic" with scales made of the row. These three were measured on an
# H200, few rows of 4096 between matrix products, where the weight and the residual come from memory; "layer_norm" and
# "gated", which hold a bias or a gate as well, follow from the registers of a thread.
Variants = tuple[tuple[int, tuple[tuple[int, RowVariant], ...]], ...]
PACKED = (32, ((ANY, early(8)),))  # up to 256: several rows a program
WIDE = (MAX_ROWS, ((ANY, RowVariant(16, False, hold=False)),))
VARIANTS: dict[str, Variants] = {
    "norm": (
        PACKED,
        (64, ((ANY, early(2)),)),  # 512
        (128, ((ANY, late(2)),)),  # 1024
        (256, ((1536, late(4)), (6144, early(2)), (ANY, early(8)))),  # 2048
        (512, ((96, early(8)), (3072, late(4)), (ANY, stream(8)))),  # 4096
        (640, ((96, early(8)), (6144, late(4)), (ANY, early(16)))),  # 5120
        (1024, ((384, late(8)), (1536, late(4)), (6144, early(16)), (ANY, stream(8)))),
        (2048, ((384, late(16)), (6144, late(8)), (ANY, stream(16)))),
        WIDE,
    ),
    "static": (
        PACKED,
        (64, ((ANY, early(2)),)),
        (128, ((ANY, late(2)),)),
        (256, ((ANY, late(4)),)),
        (640, ((96, early(8)), (1536, late(4)), (ANY, late(8)))),
        (1024, ((96, early(4)), (384, late(8)), (ANY, late(16)))),
        (2048, ((ANY, late(16)),)),
        WIDE,
    ),
    "dynamic": (
        PACKED,
        (64, ((ANY, early(2)),)),
        (128, ((ANY, late(4)),)),
        (640, ((ANY, late(8)),)),
        (2048, ((ANY, late(16)),)),
        WIDE,
    ),
    "layer_norm": (
        PACKED,
        (64, ((ANY, early(2)),)),
        (128, ((ANY, late(2)),)),
        (256, ((ANY, late(4)),)),
        (640, ((3072, late(4)), (ANY, stream(8)))),
        (1024, ((3072, late(8)), (ANY, stream(8)))),
        (2048, ((3072, late(16)), (ANY, stream(16)))),
        WIDE,
    ),
    "gated": (
        PACKED,
        (64, ((ANY, early(2)),)),
        (128, ((ANY, late(2)),)),
        (256, ((ANY, late(4)),)),
        (640, ((3072, late(8)), (ANY, stream(8)))),
        (1024, ((3072, late(16)), (ANY, stream(8)))),
        (2048, ((ANY, stream(16)),)),
        WIDE,
    ),
}  # fmt: skip
PACKED_VECTORS = 256  # of all the rows of a program that takes several: one a thread, so that there is one layout


@dataclass(frozen=True, eq=False)
class RowPlan:
    """What the launches of one (hidden_size, dtype) share.

    Attributes:
        hidden_size: elements of a row.
        vec: elements of a vector.
        align: elements that row starts and strides are multiples of: ``vec``, or 1 if it does not divide the row.
        rows: rows of a program.
        accumulator: dtype of the sums.
        variants: ((most rows, variant), ...), one tree.
    """

    hidden_size: int
    vec: int
    align: int
    rows: int
    accumulator: Any
    variants: tuple[tuple[int, RowVariant], ...]
    _constants: dict[RowVariant, tuple[Any, ...]] = field(default_factory=dict, init=False)

    def variant(self, num_rows: int) -> RowVariant:
        """The fastest variant for this many rows."""
        for most, variant in self.variants:
            if num_rows <= most:
                return variant
        raise ShapeError(f"{num_rows} rows in one call, want at most {MAX_ROWS}: split the batch")

    def shape(self, variant: RowVariant) -> tuple[int, int, int]:
        """(elements of a chunk, chunks of a row, the power of two not below those)."""
        vectors = variant.warps * 32 if self.rows == 1 else PACKED_VECTORS // self.rows
        chunk = vectors * self.vec
        chunks = -(-self.hidden_size // chunk)
        if chunks > MAX_CHUNKS:
            raise ShapeError(f"hidden_size is {self.hidden_size}, want at most {chunk * MAX_CHUNKS} for this dtype")
        return chunk, chunks, triton.next_power_of_2(chunks)

    def constants(self, variant: RowVariant) -> tuple[Any, ...]:
        """HIDDEN, ROWS, CHUNK, CHUNKS, CHUNKS_2, VEC, ALIGN, ACC, AHEAD, HOLD, LATE: what every row kernel takes."""
        found = self._constants.get(variant)
        if found is None:
            chunk, chunks, chunks_2 = self.shape(variant)
            found = self._constants[variant] = (
                self.hidden_size, self.rows, chunk, chunks, chunks_2, self.vec, self.align, self.accumulator,
                chunks if variant.ahead else 0, variant.hold, variant.late,
            )  # fmt: skip
        return found


@functools.cache
def row_plan(hidden_size: int, dtype: torch.dtype, kind: str = "norm") -> RowPlan:
    """The plan for rows of this size and dtype: a function of the weight side alone."""
    vec = VECTOR_BYTES // dtype.itemsize
    align = vec if hidden_size % vec == 0 else 1
    vectors = -(-hidden_size // vec)
    variants = next(found for widest, found in VARIANTS[kind] if vectors <= widest)
    if align == 1 or torch.version.hip is not None:
        # Loads that are not whole vectors are laid out otherwise, and so are warps of 64: one variant, one tree
        norms = next(found for widest, found in VARIANTS["norm"] if vectors <= widest)
        variants = ((ANY, norms[0][1]),)
    packed = vectors <= PACKED[0]
    rows = PACKED_VECTORS // triton.next_power_of_2(max(vectors, 1)) if packed else 1
    return RowPlan(hidden_size, vec, align, rows, tl.float64 if dtype == torch.float32 else tl.float32, variants)


class RowAddresses(NamedTuple):
    """Tensors a row kernel can address, and how.

    Attributes:
        tensors: the tensors or copies of them, None where there was None.
        strides: outer and inner stride of each, in units of the plan's ``align``.
        num_rows: all rows.
        num_inner: rows of an inner axis; row i is row i % num_inner of outer row i // num_inner.
        pending: (tensor, copy) for those outputs that have to be copied back.
    """

    tensors: tuple[torch.Tensor | None, ...]
    strides: tuple[int, ...]
    num_rows: int
    num_inner: int
    pending: list[tuple[torch.Tensor, torch.Tensor]]


def address_rows(
    plan: RowPlan, sources: tuple[torch.Tensor | None, ...], targets: tuple[torch.Tensor | None, ...]
) -> RowAddresses:
    """Addresses of tensors of one shape [..., hidden_size]; what a kernel cannot address is replaced by a copy."""
    first = sources[0]
    assert first is not None
    num_rows = first.numel() // plan.hidden_size
    tensors = (*sources, *targets)
    if all(t is None or (t.is_contiguous() and t.data_ptr() % VECTOR_BYTES == 0) for t in tensors):
        return RowAddresses(tensors, (plan.hidden_size // plan.align, 0) * len(tensors), num_rows, 1, [])
    copies = (*(readable(t, plan.align) for t in sources), *(writable(t, plan.align) for t in targets))
    pending = [
        (t, copy)
        for t, copy in zip(targets, copies[len(sources) :], strict=True)
        if t is not None and copy is not None and copy is not t
    ]
    strides = tuple(step // plan.align for t in copies for step in row_strides(t))
    return RowAddresses(copies, strides, num_rows, first.shape[-2] if first.dim() > 2 else 1, pending)


@functools.cache
def has_dependent_launch(device: int) -> bool:
    """Whether a GPU can let a kernel's programs in before the kernel ahead of it ends (sm_90 and later)."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


_dependent_launch = LATER.value


def use_dependent_launch(use: bool, at_once: bool = False) -> None:
    """Whether this process's kernels are let in before the kernel ahead ends, where the GPU can; at first they are.

    It pays between kernels that let one another in, as these do. Among kernels that do not, such as vLLM's matrix
    products, it costs half a microsecond a launch in a CUDA graph instead. No bit depends on it.

    ``at_once``: a kernel lets the next one in before it waits itself, rather than once its loads are on their way. It
    pays where products read weights ahead: the next one's may then be read while the last one still runs.
    """
    global _dependent_launch
    _dependent_launch = (AT_ONCE.value if at_once else LATER.value) if use else 0


def dependent_launch(device: int) -> int:
    """What kernels on a GPU are told in PDL; see ``_row_tree``."""
    return _dependent_launch if has_dependent_launch(device) else 0


def launch_options(like: torch.Tensor, at_once: bool = True) -> dict[str, Any]:
    """What a kernel with a constant PDL is launched with, where ``like`` is; ``at_once``: whether it may let in so."""
    pdl = min(dependent_launch(like.get_device()), AT_ONCE.value if at_once else LATER.value) if like.is_cuda else 0
    return {"PDL": pdl, "enable_fp_fusion": False, **({"launch_pdl": True} if pdl else {})}


class CachedKernel:
    """A jitted kernel whose launches skip Triton's analysis of the arguments once it was made.

    The analysis costs more than the rest of a call. Its result is a function of the constants, of dtypes, and of the
    alignment of pointers, which the callers pin to 16 bytes; no integer is specialised on.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.compiled: dict[Any, Any] = {}

    def __call__(
        self, key: tuple[Any, ...], programs: int, like: torch.Tensor, arguments: tuple[Any, ...],
        constants: tuple[Any, ...], warps: int,
    ) -> None:  # fmt: skip
        """Launch ``programs`` programs on the GPU of ``like``.

        Args:
            key: what the binary depends on, in few hashable words: the plan and variant, and which pointers there are.
            programs: size of the grid.
            like: a tensor on the device.
            arguments: the kernel's arguments, in order, up to the constants.
            constants: its constexpr arguments but the last, PDL, which is added here.
            warps: num_warps.
        """
        if not like.is_cuda:  # Triton's interpreter
            self.function[(programs,)](*arguments, *constants, 0)
            return
        device = like.get_device()
        if device != torch.cuda.current_device():
            with device_guard(like):
                return self(key, programs, like, arguments, constants, warps)
        pdl = dependent_launch(device)
        compiled = self.compiled.get((device, pdl, key))
        if compiled is None:
            options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
            if pdl:
                options["launch_pdl"] = True
            compiled = self.function[(programs,)](*arguments, *constants, pdl, **options)
            self.compiled[device, pdl, key] = compiled
        elif triton.knobs.runtime.launch_enter_hook.calls or triton.knobs.runtime.launch_exit_hook.calls:
            compiled[(programs, 1, 1)](*arguments, *constants, pdl)  # a profiler listens
        else:
            stream = torch._C._cuda_getCurrentRawStream(device)
            compiled.run(
                programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
                *arguments, *constants, pdl,
            )  # fmt: skip
