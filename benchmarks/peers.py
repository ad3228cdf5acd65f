"""The kernels ours are raced against: for each peer, how it is imported and how it is called, by op.

A loader imports its peer and returns its calls. A call takes a case's buffers (``norms.Case.buffers``) and returns what
the op of that name returns, at least its first output; a peer that takes preallocated outputs is given ``b.out`` and
``b.scales``. Calls under ``..._backward`` are differentiable forwards. A peer that has no entry for an op has no such
op; one whose loader raises is missing, and results say so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F

import contenders
from plain import BLOCK, PLAIN

Call = Callable[[Any], Any]
Calls = dict[str, Call]

STATIC = ("torch.compile",)  # compiled for one shape at a time, seconds each: a benchmark says for which tokens


def load(names: Iterable[str]) -> tuple[dict[str, Calls], dict[str, str]]:
    """Every peer's calls, and for those that cannot be imported the reason."""
    return contenders.load({name: PEERS[name] for name in names})


def versions(names: Iterable[str]) -> dict[str, str]:
    """The version of every peer that is a package of its own."""
    found = {}
    for name in names:
        if name in PACKAGES:
            try:
                found[name] = version(PACKAGES[name])
            except PackageNotFoundError:
                found[name] = "unknown"
    return found


def _returning(output: str, call: Call) -> Call:
    """A call that writes the buffer ``output`` as one that returns it."""

    def run(b: Any) -> Any:
        call(b)
        return getattr(b, output)

    return run


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, x.shape[-1])


def _vllm() -> Calls:
    importlib.import_module("vllm._custom_ops")  # registers torch.ops._C
    ops = torch.ops._C
    add = _returning("x", lambda b: ops.fused_add_rms_norm(b.x, b.residual, b.weight, b.eps))
    add_static, static = ops.fused_add_rms_norm_static_fp8_quant, ops.rms_norm_static_fp8_quant
    per_token, per_block = ops.rms_norm_dynamic_per_token_quant, ops.rms_norm_per_block_quant
    return {
        "fused_add_rms_norm": add,
        "add_rms_norm": add,
        "rms_norm": _returning("out", lambda b: ops.rms_norm(b.out, b.x, b.weight, b.eps)),
        "rms_norm_static_fp8_quant": _returning("out", lambda b: static(b.out, b.x, b.weight, b.scale, b.eps)),
        "add_rms_norm_static_fp8_quant": _returning(
            "out", lambda b: add_static(b.out, b.x, b.residual, b.weight, b.scale, b.eps)
        ),
        "rms_norm_dynamic_per_token_quant": _returning(
            "out", lambda b: per_token(b.out, b.x, b.weight, b.scales, b.eps, None, None)
        ),
        "add_rms_norm_dynamic_per_token_quant": _returning(
            "out", lambda b: per_token(b.out, b.x, b.weight, b.scales, b.eps, None, b.residual)
        ),
        "rms_norm_per_block_quant": _returning(
            "out", lambda b: per_block(b.out, b.x, b.weight, b.scales, b.eps, None, None, BLOCK, False)
        ),
        "add_rms_norm_per_block_quant": _returning(
            "out", lambda b: per_block(b.out, b.x, b.weight, b.scales, b.eps, None, b.residual, BLOCK, False)
        ),
    }


def _vllm_gated(module: str, function: str) -> Calls:
    gated = getattr(importlib.import_module(module), function)
    return {"rms_norm_gated": lambda b: gated(b.x, b.weight, None, b.gate, b.eps, b.group_size, b.norm_before_gate)}


def _vllm_invariant() -> Calls:
    norm = importlib.import_module("vllm.model_executor.layers.batch_invariant").rms_norm_batch_invariant

    def add(b: Any) -> Any:
        total = b.x + b.residual
        return norm(total, b.weight, b.eps), total

    return {
        "fused_add_rms_norm": add,
        "add_rms_norm": add,
        "rms_norm": lambda b: norm(b.x, b.weight, b.eps),
    }


def _flashinfer() -> Calls:
    norm = importlib.import_module("flashinfer.norm")  # each call decides on PDL itself: on, from Hopper
    add = _returning("x", lambda b: norm.fused_add_rmsnorm(b.x, b.residual, b.weight, b.eps))
    return {
        "fused_add_rms_norm": add,
        "add_rms_norm": add,
        "rms_norm": lambda b: norm.rmsnorm(b.x, b.weight, b.eps, out=b.out),
        "rms_norm_static_fp8_quant": _returning(
            "out", lambda b: norm.rmsnorm_quant(b.out, b.x, b.weight, b.scale, b.eps)
        ),
        "add_rms_norm_static_fp8_quant": _returning(
            "out", lambda b: norm.fused_add_rmsnorm_quant(b.out, b.x, b.residual, b.weight, b.scale, b.eps)
        ),
        "layer_norm": lambda b: norm.layernorm(b.x, b.weight32, b.bias32, b.eps),
    }


def _liger(implementation: str) -> Calls:
    liger = importlib.import_module("liger_kernel.functional")
    resolve = importlib.import_module("liger_kernel.backends.dispatch").resolve_impl
    for op in ("rms_norm", "fused_add_rms_norm", "layer_norm"):
        resolve(op, implementation)  # raises, and says why, where it cannot run

    def add(b: Any) -> Any:
        return liger.fused_add_rms_norm(b.x, b.residual, b.weight, b.eps, impl=implementation)

    def norm(b: Any) -> Any:
        return liger.rms_norm(b.x, b.weight, b.eps, impl=implementation)

    return {
        "fused_add_rms_norm": add,
        "add_rms_norm": add,
        "rms_norm": norm,
        "layer_norm": lambda b: liger.layer_norm(b.x, b.weight, b.bias, b.eps, impl=implementation),
        "rms_norm_backward": norm,
        "add_rms_norm_backward": add,
    }


def _quack() -> Calls:
    quack = importlib.import_module("quack.rmsnorm")

    def add(b: Any) -> Any:
        return quack.rmsnorm_fwd(b.x, b.weight, residual=b.residual, eps=b.eps)

    return {
        "fused_add_rms_norm": add,
        "add_rms_norm": add,
        "rms_norm": lambda b: quack.rmsnorm_fwd(_rows(b.x), b.weight, eps=b.eps),
        "layer_norm": lambda b: quack.layernorm_fwd(b.x, b.weight32, b.bias32, b.eps),
        "rms_norm_backward": lambda b: quack.rmsnorm(b.x, b.weight, eps=b.eps),
        "add_rms_norm_backward": lambda b: quack.rmsnorm(
            b.x, b.weight, residual=b.residual, eps=b.eps, prenorm=True
        ),
    }  # fmt: skip


def _sglang() -> Calls:
    norm = importlib.import_module("sglang.jit_kernel.norm")  # compiled from sources inside the sglang package
    add = _returning("x", lambda b: norm.fused_add_rmsnorm(b.x, b.residual, b.weight, b.eps))
    return {
        "fused_add_rms_norm": add,
        "add_rms_norm": add,
        "rms_norm": _returning("out", lambda b: norm.rmsnorm(_rows(b.x), b.weight, _rows(b.out), b.eps)),
    }


def _pytorch() -> Calls:
    def norm(b: Any) -> Any:
        return F.rms_norm(b.x, b.weight.shape, b.weight, b.eps)

    def add(b: Any) -> Any:
        total = b.x + b.residual
        return F.rms_norm(total, b.weight.shape, b.weight, b.eps), total

    return {
        "fused_add_rms_norm": add,
        "add_rms_norm": add,
        "rms_norm": norm,
        "layer_norm": lambda b: F.layer_norm(b.x, b.weight.shape, b.weight, b.bias, b.eps),
        "rms_norm_backward": norm,
        "add_rms_norm_backward": add,
    }


def _compiled() -> Calls:
    # Past its limit of shapes, torch.compile runs eagerly without a word; with fullgraph it raises instead.
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.accumulated_recompile_limit = 1000
    torch._functorch.config.donated_buffer = False  # a backward is run more than once
    return {op: _compile(function, names) for op, (function, names) in PLAIN.items()}


def _compile(function: Callable[..., Any], names: str) -> Call:
    compiled, arguments = torch.compile(function, fullgraph=True, dynamic=False), names.split()
    return lambda b: compiled(*(getattr(b, name) for name in arguments))


PEERS: dict[str, Callable[[], Calls]] = {
    "vLLM": _vllm,
    "vLLM batch-invariant": _vllm_invariant,
    "vLLM Mamba-2": lambda: _vllm_gated("vllm.model_executor.layers.mamba.ops.layernorm_gated", "rms_norm_gated"),
    "vLLM FLA": lambda: _vllm_gated("vllm.third_party.flash_linear_attention.ops.layernorm_guard", "rmsnorm_fn"),
    "FlashInfer": _flashinfer,
    "Liger": lambda: _liger("nvidia-triton"),
    "Liger CuTe": lambda: _liger("nvidia-cutedsl"),
    "Quack": _quack,
    "SGLang": _sglang,
    "torch.compile": _compiled,
    "PyTorch": _pytorch,
}
PACKAGES = {
    "vLLM": "vllm",
    "FlashInfer": "flashinfer-python",
    "Liger": "liger-kernel",
    "Quack": "quack-kernels",
    "SGLang": "sglang",
}
