"""Write a checkpoint of few layers, of the shapes of an 8B model, with well-scaled random weights.

For whatever compares bits in an engine: vLLM's dummy weights (``--load-format dummy``) make every logit come out equal,
so that no answer can change, and nothing is proved.

    python tools/random_checkpoint.py /tmp/llama --family llama --fp8
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_SCHEME = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
_COMMON: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "use_cache": True, "initializer_range": 0.02,
}  # fmt: skip
_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_8B, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False},
    "qwen3": {
        **_8B, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "intermediate_size": 12288,
        "rms_norm_eps": 1e-6,
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "rope_theta": 10000.0,
    },
}  # fmt: skip


def configuration(family: str, fp8: bool, layers: int, vocab: int, **sizes: int) -> dict[str, Any]:
    """What goes into config.json; ``sizes`` replaces entries of the family's."""
    config = _COMMON | FAMILIES[family] | {"num_hidden_layers": layers, "vocab_size": vocab} | sizes
    if fp8:
        group = {"targets": ["Linear"], "output_activations": None, "weights": _SCHEME, "input_activations": _SCHEME}
        config["quantization_config"] = {
            "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
            "ignore": ["lm_head"], "kv_cache_scheme": None, "config_groups": {"group_0": group},
        }  # fmt: skip
    return config


def tensors(config: dict[str, Any], randn: Callable[..., torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint, by the name Hugging Face gives it."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    gemma, fp8 = config["model_type"].startswith("gemma"), "quantization_config" in config
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if gemma else []
    linears = {
        "self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, heads), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip

    def norm(size: int) -> torch.Tensor:
        return (0.0 if gemma else 1.0) + 0.1 * randn(size)  # Gemma scales by 1 + weight

    # Gemma's embedding is its lm_head as well: unless it is small, each token predicts itself, and with certainty
    yield "model.embed_tokens.weight", randn(config["vocab_size"], hidden) * (0.001 if gemma else 1.0)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", randn(config["vocab_size"], hidden) * 0.05
    yield "model.norm.weight", norm(hidden) + (60.0 if gemma else 0.0)  # brings the logits back to a deviation of 3
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in norms:
            yield f"{prefix}{name}.weight", norm(hidden)
        if config["model_type"] == "qwen3":
            for name in ("q_norm", "k_norm"):
                yield f"{prefix}self_attn.{name}.weight", norm(config["head_dim"])
        for name, shape in linears.items():
            weight = randn(*shape) * 0.03
            if not fp8:
                yield f"{prefix}{name}.weight", weight
                continue
            scale = weight.abs().max() / 448.0
            yield f"{prefix}{name}.weight", (weight / scale).to(torch.float8_e4m3fn)
            yield f"{prefix}{name}.weight_scale", scale.reshape(1)
            within = 0.05 if name.endswith(("o_proj", "down_proj")) else 0.02  # what 448 steps of it have to hold
            yield f"{prefix}{name}.input_scale", torch.full((1,), within)


def write_checkpoint(
    folder: Path, family: str = "llama", fp8: bool = False, layers: int = 4, vocab: int = 32000, seed: int = 7,
    **sizes: int,
) -> None:  # fmt: skip
    """Write config.json and model.safetensors; the same on every machine of one kind."""
    config = configuration(family, fp8, layers, vocab, **sizes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    made = {}
    for name, tensor in tensors(config, lambda *shape: torch.randn(*shape, generator=generator, device=device)):
        kept = tensor.dtype == torch.float8_e4m3fn or name.endswith("_scale")
        made[name] = (tensor if kept else tensor.bfloat16()).cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--fp8", action="store_true", help="static per-tensor fp8, as compressed-tensors writes it")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32000, help="tokens of the vocabulary")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    write_checkpoint(options.folder, options.family, options.fp8, options.layers, options.vocab, options.seed)


if __name__ == "__main__":
    main()
