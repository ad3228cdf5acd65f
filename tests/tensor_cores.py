"""Which tensor core instructions products compile to, for sm_90 and without a GPU.

wgmma adds fp8 up otherwise than mma.sync does, and the compiler chooses between them by a tile's shape and by layouts.
The kernels for Hopper are in Gluon, which Triton's interpreter does not run: that they compile is shown here.
Run as a program, because the tests' own process interprets kernels; it prints a JSON object from launches to counts.
"""

from __future__ import annotations

import json
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from batchproof.ops import (
    _hopper,
    _hopper_attend,
    _hopper_attention,
    _hopper_attention_kernel,
    _hopper_product,
    attention,
    scaled_mm,
)

KERNEL = scaled_mm._scaled_mm_kernel
PRODUCT = _hopper_product._product_kernel
ATTENTION = _hopper_attention_kernel.hopper_attention_kernel
TARGET = GPUTarget("cuda", 90, 32)
MOST_SHARED = 227 * 1024  # bytes of shared memory a program may have on Hopper


def compiled(tile: scaled_mm.Tile, blocks: bool, aligned: bool) -> Any:
    """A tile's binary; ``aligned``: addresses, sizes and strides are multiples of 16, as Triton then specialises on."""
    constants: dict[str, Any] = {
        "HAS_BIAS": True, "PIECES": 1, "BLOCKS": blocks, "SWAP": tile.swap, "GROUP_K": scaled_mm.GROUP,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
    }  # fmt: skip
    types = {"a_ptr": "*fp8e4nv", "b_ptr": "*fp8e4nv", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    types |= {"scale_a_ptr": "*fp32", "scale_b_ptr": "*fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in KERNEL.arg_names}
    multiples = {*types, "N", "span", "a_row", "b_column"} if aligned else set()
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in multiples}
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
    source = ASTSource(KERNEL, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGET, options=options)


def compiled_product(shape: _hopper.Shape, fp8: bool, blocks: bool, static_weights: bool, gated: bool = False) -> Any:
    """The binary of the kernel for Hopper; scales for tokens and columns, or for blocks, and a bias."""
    name, dtype, step = ("fp8e4nv", gl.float8e4nv, 128) if fp8 else ("bf16", gl.bfloat16, 64)

    def descriptor(rows: int, columns: int, of: str, dtype: Any) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)
        return f"tensordesc<{of}[{rows}, {columns}],{layout!r}>"

    right = descriptor(shape.width, step, name, dtype)
    out = right if shape.swap else descriptor(64, shape.width, "bf16", gl.bfloat16)
    staged = shape.consumers * (shape.width * 128 if shape.swap else 64 * shape.width * 2)
    constants: dict[str, Any] = {
        "CONSUMERS": shape.consumers, "WIDTH": shape.width, "STEP": step,
        "STAGES": _hopper_product.stages_for(shape, staged, gated), "GROUP": shape.group,
        "HAS_SCALES": fp8, "BLOCKS": blocks, "PER_TOKEN": True,
        "PER_COLUMN": True, "HAS_BIAS": not gated, "SWAP": shape.swap, "PDL": static_weights,
        "GATED": gl.bfloat16 if gated else None, "num_warps": 4,
    }  # fmt: skip
    types = {"left_desc": descriptor(64, step, name, dtype), "right_desc": right, "out_desc": out}
    types |= {"scale_a_ptr": "*fp32", "scale_b_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    types |= {"gated_scale_ptr": "*fp32", "out_ptr": "*fp8e4nv"} if gated else {}
    constants |= {} if gated else {"gated_scale_ptr": None}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in PRODUCT.arg_names}
    aligned = {*types, "num_columns", "k"} - {"left_desc", "right_desc", "out_desc"}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(signature) if n in aligned}
    options = {"num_warps": 4, "enable_fp_fusion": False, "maxnreg": _hopper_product.registers_for(shape, gated)}
    source = GluonASTSource(PRODUCT, signature, constants, attributes)
    return triton.compile(source, target=TARGET, options=options)


def compiled_attention(name: str, dtype: Any, head_dim: int, page_size: int, options: bool, consumers: int) -> Any:
    """The binary of attention's kernel for Hopper; ``options``: with a window, a soft cap and sinks, and not causal."""
    box = [_hopper_attention.PAGE, _hopper_attend.COLUMNS.value]
    descriptor = f"tensordesc<{name}{box},{gl.NVMMASharedLayout.get_default_for(box, dtype)!r}>"
    constants: dict[str, Any] = {
        "CONSUMERS": consumers, "NUM_HEADS": 32, "GROUP": 4, "GROUP_PADDED": 4, "HEAD_DIM": head_dim,
        "TILE": attention.TILE, "SPLIT": attention.SPLIT, "STAGES": _hopper_attention.stages_for(consumers, head_dim),
        "PAGE_SIZE": page_size, "CAUSAL": not options, "HAS_WINDOW": options, "HAS_SOFTCAP": options, "num_warps": 4,
    }  # fmt: skip
    types = {"k_desc": descriptor, "v_desc": descriptor, "q_ptr": f"*{name}", "out_ptr": f"*{name}"}
    types |= {"odd_ptr": "*i32", "cu_seqlens_q_ptr": "*i32", "seqused_k_ptr": "*i32", "block_table_ptr": "*i32"}
    types |= {"softmax_scale": "fp32", "softcap": "fp32"} | ({"sinks_ptr": "*fp32"} if options else {})
    types |= {"out_scale_ptr": "*fp32", "out_ptr": "*fp8e4nv"} if options else {}
    constants |= {} if options else {"sinks_ptr": None, "out_scale_ptr": None}
    parts = ("largest_ptr", "normaliser_ptr", "total_ptr")
    types |= dict.fromkeys(parts, "*fp32") if consumers == 1 else {}
    constants |= {"odd_ptr": None} if consumers == 1 else dict.fromkeys(parts)
    constants |= {"WALK": consumers > 1, "ONE_TOKEN": consumers == 1, "PDL": consumers == 1}
    types |= {"merged_ptr": "*fp32"} if head_dim > 128 and consumers > 1 else {}
    constants |= {} if head_dim > 128 and consumers > 1 else {"merged_ptr": None}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in ATTENTION.arg_names}
    aligned = {"q_ptr", "out_ptr", "odd_ptr", "merged_ptr", "q_token", "q_head"}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(signature) if n in aligned}
    source = GluonASTSource(ATTENTION, signature, constants, attributes)
    registers = _hopper_attention.registers_for(consumers, head_dim)
    return triton.compile(
        source, target=TARGET, options={"num_warps": 4, "enable_fp_fusion": False, "maxnreg": registers}
    )


def main() -> None:
    """Every tile and shape, with one scale a row and with blocks, aligned and not; and the kernel of attention."""
    found = {}
    for name, dtype, head_dim, page_size, options, consumers in (
        ("bf16", gl.bfloat16, 128, 16, False, 2), ("bf16", gl.bfloat16, 128, 64, True, 3),
        ("fp16", gl.float16, 128, 256, False, 3), ("bf16", gl.bfloat16, 64, 32, True, 2),
        ("bf16", gl.bfloat16, 256, 16, True, 2), ("bf16", gl.bfloat16, 128, 16, False, 1),
    ):  # fmt: skip
        binary = compiled_attention(name, dtype, head_dim, page_size, options, consumers)
        # scores of the first tile; then sums of rows, totals and scores of each
        steps = consumers * (2 * head_dim // 16 + 2 * attention.TILE // 16)
        found[f"attention, {name}, {head_dim=}, {page_size=}, {options=}, {consumers=}"] = counts(binary, steps)
    for shape in (shape for _, shapes in _hopper.SHAPES for shape in shapes):
        for fp8, blocks, static in ((True, False, True), (True, True, False), (False, False, True)):
            binary = compiled_product(shape, fp8, blocks, static)
            found[f"{shape}, {fp8=}, {blocks=}"] = counts(binary, 4)
    for shape in (shape for _, shapes in _hopper.SHAPES for shape in shapes if shape.swap):
        found[f"{shape}, gated"] = counts(compiled_product(shape, True, False, True, gated=True), 8)
    for blocks, tiles in ((False, scaled_mm.HOPPER_TILES), (True, scaled_mm.HOPPER_BLOCK_TILES)):
        for _, tile in tiles:
            for aligned in (True, False):
                binary = compiled(tile, blocks, aligned)
                found[f"{tile}, {blocks=}, {aligned=}"] = counts(binary, tile.k // 32)
    print(json.dumps(found))


def counts(binary: Any, steps: int) -> dict[str, Any]:
    """What a binary is made of; ``steps``: wgmmas that a step along k has at least."""
    code = binary.asm["ptx"]
    return {
        "wgmma": len(re.findall(r"wgmma\.mma_async\.\S*\.f32\.(?:e4m3\.e4m3|bf16\.bf16|f16\.f16)", code)),
        "mma.sync": len(re.findall(r"\bmma\.sync", code)),
        "fits": binary.metadata.shared <= MOST_SHARED,
        "barriers lost": barriers_lost(binary),
        "steps of k": steps,
    }


def barriers_lost(binary: Any) -> list[str]:
    """Barriers in shared memory that are not handed to a kernel's warps: what they are handed may get the same place.

    The unit that keeps barriers writes them late; one that is not invalidated may undo what was written there since.
    """
    code = binary.asm["ttgir"]
    barriers = re.findall(r"(%\w+) = ttg\.local_alloc\b.*memdesc<\d+x1xi64", code)
    handed = " ".join(re.findall(r"ttg\.warp_specialize\((.*?)\)", code))
    return [name for name in barriers if not re.search(re.escape(name) + r"\b", handed)]


if __name__ == "__main__":
    main()
