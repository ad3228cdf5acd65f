"""batchproof: LLM inference whose bits do not depend on what else is in the batch.

Importing this package patches nothing and loads neither triton, vllm nor transformers: every public name is
imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from ._version import __version__

_HOMES = {
    "RMSNorm": "layers",
    "add_pieces": "ops.linear",
    "add_rms_norm": "ops.rms_norm",
    "add_rms_norm_dynamic_per_token_quant": "ops.rms_norm_quant",
    "add_rms_norm_per_block_quant": "ops.rms_norm_quant",
    "add_rms_norm_static_fp8_quant": "ops.rms_norm_quant",
    "addmm": "ops.linear",
    "all_reduce": "ops.all_reduce",
    "apply_penalties": "ops.penalties",
    "argmax": "ops.sample",
    "assert_batch_invariant": "audit.op",
    "audit_model": "audit.model",
    "audit_op": "audit.op",
    "audit_server": "audit.server",
    "baddbmm": "ops.linear",
    "batch_invariant": "mode",
    "bmm": "ops.linear",
    "disable": "mode",
    "enable": "mode",
    "enable_if_requested": "mode",
    "fused_add_rms_norm": "ops.rms_norm",
    "gelu_tanh": "ops.activation",
    "gelu_tanh_and_mul": "ops.activation",
    "gumbel_noise": "ops.sample",
    "is_enabled": "mode",
    "layer_norm": "ops.layer_norm",
    "linear": "ops.linear",
    "log_softmax": "ops.softmax",
    "make_invariant": "integrations.transformers",
    "mean": "ops.reduce",
    "mm": "ops.linear",
    "paged_attention": "ops.attention",
    "rms_norm": "ops.rms_norm",
    "rms_norm_backward": "ops.rms_norm_backward",
    "rms_norm_dynamic_per_token_quant": "ops.rms_norm_quant",
    "rms_norm_gated": "ops.rms_norm_gated",
    "rms_norm_per_block_quant": "ops.rms_norm_quant",
    "rms_norm_static_fp8_quant": "ops.rms_norm_quant",
    "rope": "ops.rope",
    "rope_and_cache": "ops.rope_cache",
    "rope_cos_sin": "ops.rope",
    "sample": "ops.sample",
    "scaled_mm": "ops.scaled_mm",
    "scaled_mm_silu_and_mul_static_fp8_quant": "ops.scaled_mm_gated",
    "silu": "ops.activation",
    "silu_and_mul": "ops.activation",
    "silu_and_mul_static_fp8_quant": "ops.activation_quant",
    "softmax": "ops.softmax",
    "token_logprobs": "ops.logprobs",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'batchproof' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
