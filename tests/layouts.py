"""What Triton compiles the row kernels to, for sm_90 and without a GPU: the layouts of everything that is added up.

``tl.sum`` adds in an order that its operand's layout decides, and the layout is the compiler's to choose: a store, a
reshape or a scale elsewhere in a kernel can change it. Run as a program, because the tests' own process interprets
kernels; it prints a JSON object from "kernel, width, dtype, variant" to the layouts, and to how many registers spill.
"""

from __future__ import annotations

import ast
import json
import math
import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from batchproof.ops import _rms_norm_quant_kernel as quant
from batchproof.ops import rms_norm as norm
from batchproof.ops._row_launch import RowPlan, RowVariant, row_plan

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
Bases = list[list[int]]


def compiled(kernel: Any, pointers: dict[str, str | None], constants: dict[str, Any], warps: int) -> Any:
    """A kernel's binary; pointers that are None are left out, as a launch without that tensor leaves them."""
    constants = constants | {name: None for name, kind in pointers.items() if kind is None}
    types = {name: f"*{kind}" for name, kind in pointers.items()}
    types |= {name: "i64" for name in kernel.arg_names if name.endswith(("_outer", "_inner"))}
    types |= {"num_rows": "i32", "num_inner": "i32", "eps": "fp64"}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def sums(binary: Any) -> list[dict[str, Any]]:
    """Every reduction by addition: its axis, its operand's shape, and where its elements are."""
    text = binary.asm["ttgir"]
    names = dict(re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE))
    found = []
    pattern = r'"tt\.reduce"\(.*?\) <\{axis = (\d+) : i32\}> \(\{(.*?)\}\) : \(tensor<([\dx]+)x(f\d+), (.*?)>\) ->'
    for axis, body, sizes, _, layout in re.findall(pattern, text, re.DOTALL):
        shape = [int(size) for size in sizes.split("x")]
        if "addf" in body and math.prod(shape) > 1:
            bases = linear(layout, shape, names)
            found.append({"axis": int(axis), "shape": shape, **bases})
    return found


def linear(layout: str, shape: list[int], names: dict[str, str]) -> dict[str, Bases]:
    """A layout as the index that each bit of register, lane and warp stands for."""
    layout = re.sub(r"#(?:blocked|linear)\d*", lambda match: names.get(match.group(), match.group()), layout)
    if inner := re.fullmatch(r"#ttg\.slice<\{dim = (\d+), parent = (.*)\}>", layout):
        dim = int(inner.group(1))
        parent = linear(inner.group(2), [*shape[:dim], 1, *shape[dim:]], names)
        bases = {key: [[*base[:dim], *base[dim + 1 :]] for base in found] for key, found in parent.items()}
    elif layout.startswith("#ttg.linear"):
        bases = {
            key: ast.literal_eval(found)
            for key, found in re.findall(r"(register|lane|warp) = (\[\]|\[\[.*?\]\])", layout)
        }
    else:
        bases = blocked(layout, shape)
    return {key: [base for base in found if any(base)] for key, found in bases.items()}


def blocked(layout: str, shape: list[int]) -> dict[str, Bases]:
    """A blocked layout: registers, lanes and warps in turn, along the fastest axis first; registers for the rest."""
    size, threads, warps, order = (
        ast.literal_eval(re.search(rf"{key} = (\[.*?\])", layout).group(1))  # type: ignore[union-attr]
        for key in ("sizePerThread", "threadsPerWarp", "warpsPerCTA", "order")
    )
    reach = [1] * len(shape)
    bases: dict[str, Bases] = {}
    for key, counts in (("register", size), ("lane", threads), ("warp", warps), ("rest", shape)):
        bases[key] = []
        for axis in order:
            count = counts[axis] if key != "rest" else max(1, shape[axis] // reach[axis])
            for _ in range(count.bit_length() - 1):
                bases[key].append([reach[axis] * (i == axis and reach[axis] < shape[axis]) for i in range(len(shape))])
                reach[axis] *= 2
    return {"register": bases["register"] + bases["rest"], "lane": bases["lane"], "warp": bases["warp"]}


def norm_binary(plan: RowPlan, variant: RowVariant, dtype: torch.dtype) -> Any:
    """``rms_norm`` with a residual."""
    kind = TYPES[dtype]
    pointers = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "out_ptr", "residual_out_ptr"), kind)
    return _compiled(norm._rms_norm_kernel, pointers, (*plan.constants(variant), False, True, True), variant)


def quant_binary(plan: RowPlan, variant: RowVariant, dtype: torch.dtype, mode: str, int8: bool) -> Any:
    """``rms_norm_quant`` with a residual."""
    kind, constants = TYPES[dtype], plan.constants(variant)
    pointers = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "residual_out_ptr"), kind)
    pointers |= {"out_ptr": "i8" if int8 else "fp8e4nv", "scale_ptr": "fp32" if mode == "static" else None}
    pointers |= {"scales_ptr": None if mode == "static" else "fp32"}
    group = min(128, plan.hidden_size) if mode == "block" else constants[2]
    values = (*constants, False, True, quant.MODES[mode], int8, group, True)
    return _compiled(quant._rms_norm_quant_kernel, pointers, values, variant)


def _compiled(kernel: Any, pointers: dict[str, str | None], values: tuple[Any, ...], variant: RowVariant) -> Any:
    return compiled(kernel, pointers, dict(zip(kernel.arg_names[-len(values) :], values, strict=True)), variant.warps)


def main(widths: list[int]) -> None:
    """Every variant of every kernel of these widths."""
    found = {}
    for width in widths:
        for dtype in (torch.bfloat16, torch.float32) if width == 4096 else (torch.bfloat16,):
            for name, kind, arguments in (
                ("norm", "norm", None),
                ("static", "static", ("static", False)),
                ("token", "dynamic", ("token", False)),
                ("token int8", "dynamic", ("token", True)),
                ("block", "dynamic", ("block", False)),
            ):
                plan = row_plan(width, dtype, kind)
                for _, variant in plan.variants:
                    if arguments is None:
                        binary = norm_binary(plan, variant, dtype)
                    else:
                        binary = quant_binary(plan, variant, dtype, *arguments)
                    key = f"{name}, {width}, {TYPES[dtype]}, {variant}"
                    found[key] = {"warps": variant.warps, "vec": plan.vec, "rows": plan.rows, "sums": sums(binary)}
    print(json.dumps(found))


if __name__ == "__main__":
    main([int(width) for width in sys.argv[1:]])
