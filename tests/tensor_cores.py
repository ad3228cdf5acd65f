"""Which tensor core instructions the fp8 product compiles to, for sm_90 and without a GPU.

wgmma adds fp8 up otherwise than mma.sync does, and the compiler chooses between them by a tile's shape and by layouts.
Run as a program, because the tests' own process interprets kernels; it prints a JSON object from launches to counts.
"""

from __future__ import annotations

import json
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from batchproof.ops import scaled_mm

KERNEL = scaled_mm._scaled_mm_kernel
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
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def main() -> None:
    """Every tile, with one scale a row and with blocks, aligned and not."""
    found = {}
    for blocks, tiles in ((False, scaled_mm.HOPPER_TILES), (True, scaled_mm.HOPPER_BLOCK_TILES)):
        for _, tile in tiles:
            for aligned in (True, False):
                binary = compiled(tile, blocks, aligned)
                code = binary.asm["ptx"]
                found[f"{tile}, {blocks=}, {aligned=}"] = {
                    "wgmma": len(re.findall(r"wgmma\.mma_async\.\S*\.f32\.e4m3\.e4m3", code)),
                    "mma.sync": len(re.findall(r"\bmma\.sync", code)),
                    "fits": binary.metadata.shared <= MOST_SHARED,
                    "steps of 32 of k": tile.k // 32,
                }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
