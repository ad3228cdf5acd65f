"""Linear layers against other libraries' at the shapes of known models: fp8 and bf16, every number of tokens.

Weights are read from memory: the sets a graph goes over exceed the L2 cache twice, and each has a weight of its own.
vLLM's CUTLASS product reads VLLM_BATCH_INVARIANT once a process: run it both ways, with --out, for both its modes.
"ours, static weights": launched so that weights are read while the launch before still runs, as in vLLM.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

import batchproof
import timing
from batchproof.numerics import first_mismatch
from batchproof.ops._hopper import use_static_weights
from batchproof.ops._quantize import quantize_static_fp8_reference
from batchproof.ops.scaled_mm import scaled_mm_reference
from contenders import distance, load, sift
from errors import Refused
from linear_tables import EARLY, full
from tables import OURS

Product = Callable[[Any], torch.Tensor]

# By model and tensor-parallel size: N x K of a layer's products, as vLLM merges them.
MODELS = {
    "Llama-8B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "Llama-8B TP4": ((1536, 4096), (4096, 1024), (7168, 4096), (4096, 3584)),
    "Llama-70B TP4": ((2560, 8192), (8192, 2048), (14336, 8192), (8192, 7168)),
    "Llama-70B TP8": ((1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584)),
    "Qwen3-8B": ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)),
    "Qwen3-32B TP4": ((2560, 5120), (5120, 2048), (12800, 5120), (5120, 6400)),
    "Llama-8B lm_head": ((128256, 4096),),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
FORMATS = ("fp8", "fp8 per token", "fp8 blocks", "bf16")
ROUNDS = 10
ERROR = 0.05  # of the norm of the output: a peer that is further off computes something else
BLOCK = 128


@dataclass
class Operands:
    """One product's tensors: a [M, K], the weight [N, K], and for fp8 their scales."""

    a: torch.Tensor
    weight: torch.Tensor
    scale_a: torch.Tensor | None = None
    scale_b: torch.Tensor | None = None

    @property
    def b(self) -> torch.Tensor:
        """[K, N], as products take it."""
        return self.weight.t()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that narrow the benchmark."""
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["Llama-8B"], metavar="MODEL",
                        help=f"default: Llama-8B; of {', '.join(MODELS)}")  # fmt: skip
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["fp8", "bf16"], metavar="FORMAT",
                        help=f"default: fp8, bf16; of {', '.join(FORMATS)}")  # fmt: skip
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), metavar="M")
    parser.add_argument("--shapes", nargs="+", metavar="NxK", help="instead of a model's")
    parser.add_argument("--rounds", type=int, default=ROUNDS)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Gate and race every format, shape and number of tokens; the result file's contents."""
    shapes = {name: MODELS[name] for name in options.models}
    if options.shapes:
        shapes = {"shapes": tuple(_shape(text) for text in options.shapes)}
    device = "cuda" if timing.has_gpu() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    rows: list[dict[str, Any]] = []
    with timing.side_stream(), torch.no_grad():
        copy_gbps = timing.copy_gbps()
        cases = [(f, model, n, k) for f in options.formats for model, found in shapes.items() for n, k in found]
        for form, model, n, k in tqdm(cases, "race", unit="matrix"):
            products, missing = contenders(form)
            _gate(form, n, k, max(options.tokens), generator)
            for m in options.tokens:
                rows.append(_race(form, model, m, n, k, products, missing, copy_gbps, options.rounds, generator))
    result = {
        "how": __doc__, "copy_gbps": round(copy_gbps, 1), "rounds": options.rounds,
        "vllm_batch_invariant": os.environ.get("VLLM_BATCH_INVARIANT", "0"), "rows": rows,
    }  # fmt: skip
    print(full([result]))
    return result


def operands(form: str, m: int, n: int, k: int, generator: torch.Generator) -> Operands:
    """Random operands of a format: activations of unit size, weights of a size that keeps the output so."""
    device = generator.device
    a = torch.randn(m, k, generator=generator, device=device, dtype=torch.bfloat16)
    weight = torch.randn(n, k, generator=generator, device=device, dtype=torch.bfloat16) * k**-0.5
    if form == "bf16":
        return Operands(a, weight)
    one_a, one_b = (torch.full((1,), scale, device=device) for scale in (0.02, 0.02 * k**-0.5))
    a, weight = quantize_static_fp8_reference(a, one_a), quantize_static_fp8_reference(weight, one_b)
    if form == "fp8":
        return Operands(a, weight, one_a, one_b)

    def vary(scale: torch.Tensor, *shape: int) -> torch.Tensor:
        return scale * (0.5 + torch.rand(shape, generator=generator, device=device))

    if form == "fp8 per token":
        return Operands(a, weight, vary(one_a, m, 1), vary(one_b, 1, n))
    # In the layouts that CUTLASS and DeepGEMM want: scales of one group of K side by side, those of a weight's rows not
    return Operands(a, weight, vary(one_a, k // BLOCK, m).t(), vary(one_b, n // BLOCK, k // BLOCK).t())


def contenders(form: str) -> tuple[dict[str, Product], dict[str, str]]:
    """Ours and the peers of a format; why those that are missing are."""
    if form == "bf16":
        loaders: dict[str, Callable[[], Product]] = {
            OURS: lambda: lambda o: batchproof.linear(o.a, o.weight),
            "torch": lambda: lambda o: torch.mm(o.a, o.b),
            "vLLM batch-invariant": _vllm_persistent,
        }
    else:
        loaders = {OURS: lambda: lambda o: batchproof.scaled_mm(o.a, o.b, o.scale_a, o.scale_b)}
        if form != "fp8 blocks":
            loaders["torch"] = _torch_scaled_mm
        else:
            loaders |= {"DeepGEMM": _deep_gemm, "vLLM Triton": _vllm_blocks}
        loaders["vLLM CUTLASS"] = _vllm_cutlass
    found, missing = load(loaders)
    return found | {EARLY: partial(_early, found[OURS])}, missing


def _early(product: Product, o: Operands) -> torch.Tensor:
    """A product launched as ``EARLY`` says."""
    use_static_weights(True)
    try:
        return product(o)
    finally:
        use_static_weights(False)


def _torch_scaled_mm() -> Product:
    return lambda o: torch._scaled_mm(o.a, o.b, scale_a=o.scale_a, scale_b=o.scale_b, out_dtype=torch.bfloat16)


def _vllm_cutlass() -> Product:
    ops = importlib.import_module("vllm._custom_ops")
    return lambda o: ops.cutlass_scaled_mm(o.a, o.b, o.scale_a, o.scale_b, torch.bfloat16)


def _vllm_blocks() -> Product:
    utils = importlib.import_module("vllm.model_executor.layers.quantization.utils.fp8_utils")

    def product(o: Operands) -> torch.Tensor:
        scales = (o.scale_a, o.scale_b.t())  # type: ignore[union-attr]
        out: torch.Tensor = utils.w8a8_triton_block_scaled_mm(o.a, o.weight, *scales, [BLOCK, BLOCK], torch.bfloat16)
        return out

    return product


def _vllm_persistent() -> Product:
    invariant = importlib.import_module("vllm.model_executor.layers.batch_invariant")
    return lambda o: invariant.matmul_persistent(o.a, o.b)


def _deep_gemm() -> Product:
    gemm = importlib.import_module("deep_gemm")

    def product(o: Operands) -> torch.Tensor:
        out = torch.empty(len(o.a), len(o.weight), dtype=torch.bfloat16, device=o.a.device)
        gemm.fp8_gemm_nt((o.a, o.scale_a), (o.weight, o.scale_b.t()), out)  # type: ignore[union-attr]
        return out

    return product


def reference(o: Operands, rows: slice) -> torch.Tensor:
    """Rows of the product in float64."""
    if o.scale_a is None or o.scale_b is None:
        return o.a[rows].double() @ o.b.double()
    scale_a = o.scale_a[rows] if o.scale_a.numel() > 1 else o.scale_a
    return scaled_mm_reference(o.a[rows], o.b, scale_a, o.scale_b, None, torch.float32).double()


def _gate(form: str, n: int, k: int, most: int, generator: torch.Generator) -> None:
    """Ours has one result for a row whatever the batch, near the reference; otherwise nothing is timed."""
    o, ours = operands(form, most, n, k, generator), contenders(form)[0]
    whole = ours[OURS](o)
    first = slice(0, min(most, 32))
    error = distance(whole[first], reference(o, first))
    if not error < ERROR / 5:
        raise Refused(f"{form} {n}x{k}: ours is off by {error:.2g} of the norm")
    for m in (size for size in (1, 2, 8, 15, 16, 17, 32, 33, 64, 65, 127, 128, 257, 1024) if size < most):
        for rows in (slice(0, m), slice(most - m, most)):
            scale_a = o.scale_a if o.scale_a is None or o.scale_a.numel() == 1 else o.scale_a[rows]
            some = Operands(o.a[rows], o.weight, scale_a, o.scale_b)
            for name in (OURS, EARLY):
                differs = first_mismatch(ours[name](some), whole[rows])
                if differs:
                    raise Refused(f"{form} {n}x{k}, {name}: rows {rows} of {most} in a batch of {m}: {differs}")


def _race(
    form: str, model: str, m: int, n: int, k: int, products: Mapping[str, Product], missing: Mapping[str, str],
    copy_gbps: float, rounds: int, generator: torch.Generator,
) -> dict[str, Any]:  # fmt: skip
    """Time every contender on one product; its row."""
    width = 2 if form == "bf16" else 1
    moved = width * (n * k + m * k) + 2 * m * n
    count = timing.rotations(moved, timing.l2_bytes())["cold"]
    timing.release_memory()
    sets = [operands(form, m, n, k, generator) for _ in range(count)]
    some = slice(0, min(m, 32))
    wanted = reference(sets[0], some)
    errors, failed = sift(products, lambda name: products[name](sets[0])[some], wanted, ERROR)
    prepared = {name: partial(partial, product) for name, product in products.items() if name not in failed}
    times, more = timing.race(prepared, sets, timing.passes(count, moved), rounds)
    return {
        "format": form, "model": model, "tokens": m, "n": n, "k": k, "sets": count,
        "floor_us": round(moved / copy_gbps / 1e3, 3), "missing": {**missing, **failed, **more}, "times": times,
        "errors": {name: round(error, 8) for name, error in errors.items()},
    }  # fmt: skip


def _shape(text: str) -> tuple[int, int]:
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdigit() and int(size) for size in sizes):
        raise Refused(f"--shapes has {text!r}, want NxK such as 6144x4096")
    return int(sizes[0]), int(sizes[1])
