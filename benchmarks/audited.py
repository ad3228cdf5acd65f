"""Adapters for what_varies.py: ops that the notation of ``batchproof audit op`` cannot call as they are.

Each takes tensors with one row a request and says in its body what is called.
"""

from __future__ import annotations

import importlib
import os

import torch
import torch.nn.functional as F


def cutlass_scaled_mm(a: torch.Tensor, weight: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor):
    """vLLM's fp8 product; ``weight`` [N, K] is the column-major operand it wants."""
    ops = importlib.import_module("vllm._custom_ops")
    return ops.cutlass_scaled_mm(a, weight.t(), scale_a, scale_b, torch.bfloat16)


def scaled_mm(a: torch.Tensor, weight: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor):
    """torch's fp8 product, by cuBLASLt."""
    return torch._scaled_mm(a, weight.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16)


def _vllm() -> object:
    importlib.import_module("vllm._custom_ops")  # registers torch.ops._C
    return torch.ops._C


def rms_norm_static_fp8_quant(out, x, weight, scale):
    """vLLM's norm with static quantisation."""
    _vllm().rms_norm_static_fp8_quant(out, x, weight, scale, 1e-6)


def fused_add_rms_norm_static_fp8_quant(out, x, residual, weight, scale):
    """vLLM's residual norm with static quantisation."""
    _vllm().fused_add_rms_norm_static_fp8_quant(out, x, residual, weight, scale, 1e-6)


def silu_and_mul(out, x):
    """vLLM's gated activation."""
    _vllm().silu_and_mul(out, x)


def silu_and_mul_quant(out, x, scale):
    """vLLM's gated activation with static quantisation."""
    _vllm().silu_and_mul_quant(out, x, scale)


def gumbel_sample(logits, index, pos, temperature, seed):
    """vLLM's sampler, noise keyed by (seed, position); the state of a request is looked up by its index."""
    sample = importlib.import_module("vllm.v1.worker.gpu.sample.gumbel").gumbel_sample
    return sample(logits, index, temperature, seed, pos, True)


def random_sample(logits):
    """vLLM's sampler without seeds of requests: exponential noise from the batch's stream, here reseeded."""
    sampler = importlib.import_module("vllm.v1.sample.ops.topk_topp_sampler")
    torch.manual_seed(0)
    return sampler.random_sample(logits.softmax(-1), {})


def flashinfer_sampling(logits):
    """FlashInfer's sampler with a seed and an offset for the batch."""
    return importlib.import_module("flashinfer.sampling").sampling_from_logits(logits, seed=0, offset=0)


def multinomial(logits):
    """torch's, from a stream that is reseeded before every call. It stops the process at NaN, which become 0 here."""
    torch.manual_seed(0)
    return torch.multinomial(logits.nan_to_num().softmax(-1), 1)


def sdpa_decode(query, key, value):
    """One query a request, 256 keys: [M, 8, 1, 64] and [M, 8, 256, 64]."""
    return F.scaled_dot_product_attention(query, key, value)


def cross_entropy(input, target):
    """A loss for every row."""
    return F.cross_entropy(input, target, reduction="none")


def mean(input):
    """Of every row."""
    return torch.mean(input, -1)


def total(input):
    """Of every row."""
    return torch.sum(input, -1)


def topk(input):
    """Values and places of a row's largest 8."""
    return torch.topk(input, 8)


def embedding(input, weight):
    """A lookup."""
    return F.embedding(input, weight)


def layer_norm(input, weight, bias):
    """Over the last axis."""
    return F.layer_norm(input, weight.shape, weight, bias)


def rms_norm(input, weight):
    """Over the last axis."""
    return F.rms_norm(input, weight.shape, weight)


def softmax(input):
    """Over the last axis."""
    return torch.softmax(input, -1)


def log_softmax(input):
    """Over the last axis."""
    return torch.log_softmax(input, -1)


def mm(input, mat2):
    """[M, K] by [K, N]."""
    return torch.mm(input, mat2)


def addmm(bias, input, mat2):
    """mm and a bias."""
    return torch.addmm(bias, input, mat2)


def bmm(input, mat2):
    """32 products of M rows."""
    return torch.bmm(input, mat2)


def mode_mm(input, mat2):
    """mm as vLLM's mode has it on Hopper and Blackwell: cuBLASLt with no workspace for split-K."""
    _starve_cublas()
    return torch.mm(input, mat2)


def mode_addmm(bias, input, mat2):
    """addmm, likewise."""
    _starve_cublas()
    return torch.addmm(bias, input, mat2)


def _starve_cublas() -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["CUBLASLT_WORKSPACE_SIZE"] = ":16:8", "1"
    matmul = torch.backends.cuda.matmul
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = (False, False)
    torch.backends.cuda.preferred_blas_library("cublaslt")


def quack_rmsnorm(x, residual, weight):
    """Quack's residual norm."""
    return importlib.import_module("quack.rmsnorm").rmsnorm_fwd(x, weight, residual=residual, eps=1e-6)


def quack_softmax(x):
    """Quack's softmax."""
    return importlib.import_module("quack.softmax").softmax_fwd(x)


def liger_rms_norm(x, weight):
    """Liger's norm, out of place."""
    return importlib.import_module("liger_kernel.transformers.functional").liger_rms_norm(
        x, weight, 1e-6, 0.0, "llama", False
    )


def liger_fused_add_rms_norm(x, residual, weight):
    """Liger's residual norm, out of place."""
    return importlib.import_module("liger_kernel.transformers.functional").liger_fused_add_rms_norm(
        x, residual, weight, 1e-6, 0.0, "llama", False
    )


def liger_layer_norm(x, weight, bias):
    """Liger's LayerNorm."""
    return importlib.import_module("liger_kernel.transformers.functional").liger_layer_norm(x, weight, bias, 1e-6)


def liger_softmax(x):
    """Liger's softmax."""
    return importlib.import_module("liger_kernel.transformers.functional").liger_softmax(x)


def liger_swiglu(a, b):
    """Liger's gated activation."""
    return importlib.import_module("liger_kernel.transformers.functional").liger_swiglu(a, b)
