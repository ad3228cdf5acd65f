"""What serves each family of ops in a Llama, Mistral, Qwen3 or Gemma step of vLLM, and what is known to vary there.

The texts describe vLLM 0.26 with VLLM_BATCH_INVARIANT=1. A number after "vLLM" is an issue of its repository.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["COVERAGE", "NORM_QUANT", "NOTHING", "Coverage"]

NOTHING = "nothing known"
_SPLIT = "Inductor chooses its split reductions by the number of tokens"


@dataclass(frozen=True)
class Coverage:
    """One family of ops.

    Attributes:
        op: what it is.
        hook: the name of the hook through which batchproof takes it over; None if it stays vLLM's.
        vllm: what vLLM runs by itself.
        varies: what is known to vary with the batch in vLLM's, and who says so.
    """

    op: str
    hook: str | None
    vllm: str
    varies: str


NORM_QUANT = Coverage(
    "norm + fp8 quantisation",
    "graph_passes",
    "with fuse_norm_quant, one _C kernel for both",
    "its launch, and so the order of summation, is chosen by the number of tokens (static and per-block scales)",
)
COVERAGE: tuple[Coverage, ...] = (
    Coverage(
        "RMSNorm",
        "rms_norm",
        "one Triton program a row; with a residual _C.fused_add_rms_norm",
        f"fused_add_rms_norm changes its order of summation at 256 tokens (vLLM 48271); compiled without +rms_norm, "
        f"{_SPLIT}",
    ),
    Coverage(
        "q and k norms (Qwen3)",
        "rms_norm",
        "RMSNorm without a residual: one Triton program a row",
        f"compiled without +rms_norm, {_SPLIT}",
    ),
    Coverage(
        "GemmaRMSNorm, with Gemma-3's q and k norms",
        "gemma_rms_norm",
        "vllm.ir's reference in torch: its C kernels do not take an fp32 weight with 16-bit tokens",
        f"compiled, {_SPLIT} and ignores the mode's mean",
    ),
    Coverage(
        "vllm.ir rms_norm and fused_add_rms_norm",
        "ir_ops",
        "the reference in torch where Inductor compiles; else C kernels",
        f"the C kernels change their order of summation at 256 tokens (vLLM 48271); {_SPLIT}",
    ),
    NORM_QUANT,
    Coverage(
        "fp8 linear",
        "fp8_linear",
        "one pinned CUTLASS configuration; per-tensor and per-channel weights of any other kernel class go to bf16",
        "nothing known: CUTLASS gave the same rows for M = 1 to 2048 at Llama-8B's shapes",
    ),
    Coverage(
        "fp8 linear, scales for blocks of 128 by 128",
        "fp8_block_linear",
        "DeepGEMM, without the change to FlashInfer below 32 tokens (vLLM 37718); CUTLASS for what DeepGEMM does not "
        "take; Triton without both",
        "nothing known of DeepGEMM and CUTLASS; Triton's tile is chosen by the number of tokens",
    ),
    Coverage(
        "unquantised linear, lm_head",
        "linear",
        "its persistent Triton matmul, one configuration a dtype",
        NOTHING,
    ),
    Coverage("attention, TRITON_ATTN", "attention", "always its kernel without KV segments", NOTHING),
    Coverage(
        "attention, FLASH_ATTN",
        None,
        "FlashAttention with num_splits=1",
        "on Hopper FA3's tile changes when a neighbour goes from 9 to 10 query tokens (vLLM 47069, 51902)",
    ),
    Coverage(
        "attention, FLASHINFER",
        None,
        "not chosen in this mode: the backend does not claim batch invariance",
        "does not run in this mode",
    ),
    Coverage("rope and cache write, TRITON_ATTN", "rope", "elementwise kernels", NOTHING),
    Coverage("SiLU + static fp8 quantisation", "graph_passes", "elementwise kernels of the compiler", NOTHING),
    Coverage(
        "softmax",
        "softmax",
        "its aten override: torch.amax, exp and torch.sum",
        "torch.sum changes its order at 2, 4, 8 and 16 rows (fp32, 32,000 wide; docs/what_varies.md)",
    ),
    Coverage("log_softmax, mean", None, "its aten overrides, in Triton", NOTHING),
    Coverage(
        "sampler, model runner V2",
        "sampler",
        "FlashInfer's or its own for top-k and top-p; Gumbel noise by (seed, position)",
        "FlashInfer's alters logprobs at 44 to 45 sequences (vLLM 51187); its own for top-k and top-p is another "
        "algorithm below 8 rows",
    ),
    Coverage(
        "sampler, model runner V1; with drafted tokens",
        None,
        "FlashInfer's for top-k and top-p; its own with VLLM_USE_FLASHINFER_SAMPLER=0",
        "the same; requests without a seed share a generator in V1",
    ),
    Coverage(
        "all-reduce",
        None,
        "NCCL, pinned to one tree and one channel; the custom and symmetric-memory ones are off",
        "nothing known with the batch; the bits depend on the tensor-parallel size",
    ),
    Coverage(
        "all-reduce + norm in one (batchproof leaves them two)",
        "graph_passes",
        "FlashInfer's kernel, with fuse_allreduce_rms",
        "what that kernel computes (vLLM 51290)",
    ),
    Coverage(
        "sequence-parallel fusion",
        None,
        "matches vLLM's own norms: does nothing where they are batchproof's",
        NOTHING,
    ),
)
