"""What Triton compiles the row kernels to, for sm_90 and without a GPU: the layouts of everything that is added up.

``tl.sum`` adds in an order that its operand's layout decides, and the layout is the compiler's to choose: a store, a
reshape or a scale elsewhere in a kernel can change it. Run as a program, because the tests' own process interprets
kernels; it prints a JSON object from "kernel, width, dtype, variant" to the layouts.
"""

from __future__ import annotations

import ast
import json
import math
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from batchproof.ops import _rms_norm_quant_kernel as quant
from batchproof.ops import layer_norm, softmax
from batchproof.ops import rms_norm as norm
from batchproof.ops import rms_norm_gated as gated
from batchproof.ops._row_launch import RowPlan, row_plan
from batchproof.ops._rows import MAX_BLOCK, NUM_WARPS

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
Bases = list[list[int]]


def compiled(kernel: Any, pointers: dict[str, str | None], constants: dict[str, Any], warps: int) -> Any:
    """A kernel's binary; pointers that are None are left out, as a launch without that tensor leaves them."""
    constants = constants | {name: None for name, kind in pointers.items() if kind is None}
    types = {name: f"*{kind}" for name, kind in pointers.items()}
    types |= {name: "i64" for name in kernel.arg_names if name.endswith(("_outer", "_inner"))}
    types |= {"num_rows": "i32", "num_inner": "i32", "eps": "fp64", "num_vectors": "i64"}
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


Form = tuple[str, str, Any, dict[str, str | None], tuple[Any, ...]]


def forms(kind: str, plan: RowPlan) -> Iterator[Form]:
    """(name, plan's kind, kernel, pointers, constants after the plan's): each kernel in the form with most to do."""
    row = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "out_ptr", "residual_out_ptr"), kind)
    yield "norm", "norm", norm._rms_norm_kernel, row, (False, True, True)
    group = min(128, plan.hidden_size)
    for name, mode, out in (
        ("static", "static", "fp8e4nv"),
        ("token", "token", "fp8e4nv"),
        ("token int8", "token", "i8"),
        ("block", "block", "fp8e4nv"),
    ):
        static = mode == "static"
        scales = {"out_ptr": out, "scale_ptr": "fp32" if static else None, "scales_ptr": None if static else "fp32"}
        tail = (False, True, quant.MODES[mode], out == "i8", group if mode == "block" else None, True)
        yield name, "static" if static else "dynamic", quant._rms_norm_quant_kernel, row | scales, tail
    parameters = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), kind) | {"mean_ptr": "fp32"}
    yield "layer_norm", "layer_norm", layer_norm._layer_norm_kernel, parameters | {"rstd_ptr": "fp32"}, (True, True)
    gate = dict.fromkeys(("x_ptr", "gate_ptr", "weight_ptr", "out_ptr"), kind)
    for first in (True, False):
        name = "norm, then gate" if first else "gate, then norm"
        yield name, "gated", gated._rms_norm_gated_kernel, gate, (first, 1, True, True)


def softmaxes() -> dict[str, Any]:
    """Softmax over rows wider than a block, which is walked, or shared out."""
    found = {}
    for dtype, kind in TYPES.items():
        for vec in (16 // dtype.itemsize, 1):
            constants = {"BLOCK": MAX_BLOCK, "VEC": vec}
            row = constants | {"ONE_BLOCK": False, "LOG": True}
            walked = compiled(softmax._row_kernel, dict.fromkeys(("x_ptr", "out_ptr"), kind), row, NUM_WARPS[-1][1])
            pointers: dict[str, str | None] = {"x_ptr": kind, "peaks_ptr": "fp32", "totals_ptr": "fp32"}
            shared = compiled(softmax._parts_kernel, pointers, constants | {"PDL": True}, NUM_WARPS[-1][1])
            found |= {f"softmax, {kind}, {vec}, {name}": sums(b) for name, b in (("walk", walked), ("share", shared))}
    return found


def main(widths: list[int]) -> None:
    """Every variant of every kernel of these widths; softmax if there are none."""
    if not widths:
        print(json.dumps(softmaxes()))
        return
    found = {}
    for width in widths:
        for dtype in (torch.bfloat16, torch.float32) if width == 4096 else (torch.bfloat16,):
            for name, kind, kernel, pointers, tail in forms(TYPES[dtype], row_plan(width, dtype)):
                plan = row_plan(width, dtype, kind)
                for _, variant in plan.variants:
                    constants = plan.constants(variant)
                    chunk = constants[2]  # what quantises no blocks has one as wide as a chunk
                    values = (*constants, *(chunk if value is None else value for value in tail))
                    named = dict(zip(kernel.arg_names[-len(values) :], values, strict=True))
                    binary = compiled(kernel, pointers, named, variant.warps)
                    entry = {"warps": variant.warps, "vec": plan.vec, "rows": plan.rows, "sums": sums(binary)}
                    found[f"{name}, {width}, {TYPES[dtype]}, {variant}"] = entry
    print(json.dumps(found))


if __name__ == "__main__":
    main([int(width) for width in sys.argv[1:]])
