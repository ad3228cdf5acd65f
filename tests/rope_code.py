"""What ``rope_and_cache`` compiles to, for sm_90 and without a GPU: its instructions, and where its sums' operands are.

Run as a program, because the tests' own process interprets kernels; it prints a JSON object from cases to facts.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from batchproof.ops import _rope_cache_kernel as module
from layouts import sums

KERNEL = module._rope_and_cache_kernel
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PATTERNS = {
    "wide loads": r"ld\.global\.(?:v4\.b32|v2\.b64)",
    "narrow loads": r"ld\.global\.(?!v4\.b32|v2\.b64|b64)",  # b64: positions and slots
    "wide stores": r"st\.global\.(?:v4\.b32|v2\.b64)",
    "narrow stores": r"st\.global\.(?!v4\.b32|v2\.b64)",
    "fma": r"\bfma\.",
    "local": r"\.local\b",
    "barriers": r"\bbar\.sync",
    "wait": r"griddepcontrol\.wait",
    "launch": r"griddepcontrol\.launch_dependents",
}


def compiled(kind: str, tokens: int, head_dim: int, rot: int, interleaved: bool, normed: bool, pdl: bool) -> Any:
    """The binary of 32 heads over 8, in pages of 16."""
    vec = 16 // DTYPES[kind].itemsize
    blocks, warps = module._plan(tokens, head_dim, rot // 2)
    constants: dict[str, Any] = {
        "NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HEAD_DIM": head_dim, "HALF": rot // 2, "PAGE_SIZE": 16,
        "INTERLEAVED": interleaved, "VEC": vec, "CACHE_VEC": vec, "PDL": pdl,
        "ACC": tl.float64 if kind == "fp32" else tl.float32,
        **dict(zip(("HEADS", "BLOCK_HALF", "BLOCK_DIM", "BLOCK_REST"), blocks, strict=True)),
    }  # fmt: skip
    constants |= {} if normed else {"q_weight_ptr": None, "k_weight_ptr": None}
    types = {"positions_ptr": "*i64", "slot_mapping_ptr": "*i64", "cos_sin_ptr": "*fp32", "eps": "fp64"}
    types |= {name: f"*{kind}" for name in KERNEL.arg_names if name.endswith("_ptr") and name not in types}
    signature = {name: "constexpr" if name in constants else types.get(name, "i64") for name in KERNEL.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name].startswith("*")}
    options = {"num_warps": warps, "enable_fp_fusion": False} | ({"launch_pdl": True} if pdl else {})
    source = ASTSource(KERNEL, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def main() -> None:
    """Few tokens and many, halves of a head and whole rows, with PDL and without."""
    found = {}
    for kind, head_dim, rot, interleaved in (
        ("bf16", 128, 128, False), ("bf16", 64, 64, False), ("bf16", 8, 8, False), ("bf16", 256, 256, False),
        ("bf16", 128, 128, True), ("bf16", 96, 96, False), ("bf16", 128, 64, False), ("bf16", 512, 128, False),
        ("fp32", 128, 128, False), ("fp32", 256, 64, False),
    ):  # fmt: skip
        for tokens in (8, 8192):
            for normed in (False, True):
                binary = compiled(kind, tokens, head_dim, rot, interleaved, normed, tokens == 8)
                code = binary.asm["ptx"]
                facts = {name: len(re.findall(pattern, code)) for name, pattern in PATTERNS.items()}
                facts |= {"sums": sums(binary), "shared": binary.metadata.shared}
                name = f"{kind}, {head_dim}, {rot}, {interleaved=}, {tokens=}, {normed=}"
                found[name] = facts | {"vec": 16 // DTYPES[kind].itemsize, "pdl": tokens == 8, "normed": normed}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
