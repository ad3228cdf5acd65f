"""``make_invariant``: replace, in a transformers model, every module whose result would depend on the batch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ... import layers
from ...errors import DeviceError, NotInvariantError, UnsupportedError
from .attention import NAME, register_attention

__all__ = ["FAMILIES", "Report", "make_invariant"]

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3")
_NORMS = {f"{family}RMSNorm": family.startswith("Gemma") for family in FAMILIES}
_ROTARY = {f"{family}RotaryEmbedding" for family in FAMILIES}
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # others derive their frequencies from the batch's positions
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "SiLUActivation": layers.SiLU,
    "SiLU": layers.SiLU,
    "GELUTanh": layers.GELUTanh,
}
# What computes nothing itself, or one value out of one value, or copies: its result cannot depend on the batch.
_PARTS = ("Model", "TextModel", "ForCausalLM", "DecoderLayer", "Attention", "MLP", "TextScaledWordEmbedding")
_VOUCHED = {f"{family}{part}" for family in FAMILIES for part in _PARTS}
_VOUCHED |= {"ModuleList", "Embedding", "Identity", "Dropout"}


@dataclass(frozen=True)
class Report:
    """What ``make_invariant`` did: module names by what they were swapped for, and what was let pass by name."""

    swapped: dict[str, tuple[str, ...]]
    allowed: tuple[str, ...] = ()
    attention: str = NAME
    unchanged: tuple[str, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        lines = [f"{len(names):4d} x {kind}" for kind, names in sorted(self.swapped.items())]
        lines.append(f"attention: {self.attention}")
        lines += [f"not vouched for, allowed by name: {name}" for name in self.allowed]
        return "\n".join(lines)


def make_invariant(model: PreTrainedModel, allow: Collection[str] = ()) -> Report:
    """Make a Llama, Mistral, Qwen2, Qwen3, Gemma-2 or Gemma-3 text model batch-invariant, in place.

    Norms, linear layers (lm_head included), activations, rotary tables and attention become batchproof's; parameters
    stay the same objects, so the state dict and tied weights do too.

    Args:
        model: on one CPU or GPU, in eval mode; fp32, fp16 or bf16.
        allow: names of modules (as ``model.named_modules()`` has them) that the caller vouches for.

    Returns:
        What was swapped.

    Raises:
        NotInvariantError: with every module whose invariance cannot be vouched for; the model is unchanged then.
        UnsupportedError: the model is in training mode, or ``allow`` names no module.
        DeviceError: a parameter is on a device without kernels.
    """
    unknown = set(allow) - {name for name, _ in model.named_modules()}
    if unknown:
        raise UnsupportedError(f"allow names {', '.join(sorted(unknown))}, but the model has no such module")
    if model.training:
        raise UnsupportedError("the model is in training mode, where dropout is random: call model.eval()")
    devices = {p.device.type for p in model.parameters()} - {"cpu", "cuda"}
    if devices:
        raise DeviceError(f"the model has parameters on {', '.join(sorted(devices))}, want cpu or cuda")

    replacements: dict[str, nn.Module] = {}
    unchanged: list[str] = []
    strangers: list[str] = []
    made: dict[int, nn.Module] = {}  # a module with two names is replaced by one
    for name, module in model.named_modules(remove_duplicate=False):
        replacement = made.get(id(module)) or _replacement(module)
        if replacement is not None:
            replacements[name] = made[id(module)] = replacement
        elif _vouched(module) or name in allow:
            unchanged.append(name)
        elif not any(name.startswith(f"{outer}.") for outer in (*replacements, *allow)):
            strangers.append(f"{name} ({type(module).__module__}.{type(module).__qualname__})")
    if strangers:
        raise NotInvariantError(
            "the batch invariance of these modules cannot be vouched for; pass allow=[name, ...] to take it on "
            "yourself:\n  " + "\n  ".join(strangers)
        )
    register_attention()
    model.set_attn_implementation(NAME)
    for name, module in replacements.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    kinds: dict[str, tuple[str, ...]] = {}
    for name, module in replacements.items():
        kinds[type(module).__name__] = (*kinds.get(type(module).__name__, ()), name)
    return Report(kinds, tuple(sorted(allow)), unchanged=tuple(unchanged))


def _from_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")


def _vouched(module: nn.Module) -> bool:
    ours = type(module).__module__ == layers.__name__
    known = _from_transformers(module) or type(module).__module__.startswith("torch.nn.")
    return ours or (known and type(module).__name__ in _VOUCHED)


def _replacement(module: Any) -> nn.Module | None:
    """The module of ours for one of torch's or transformers', or None if there is none."""
    name = type(module).__name__
    if type(module) is nn.Linear:
        linear: Any = module  # narrowed by the check, its parameters to plain tensors
        return layers.Linear(linear.weight, linear.bias)
    if name in _ACTIVATIONS and (_from_transformers(module) or type(module) is nn.SiLU):
        return _ACTIVATIONS[name]()
    if not _from_transformers(module):
        return None
    if name in _NORMS:
        eps = getattr(module, "variance_epsilon", None)
        eps = float(module.eps if eps is None else eps)
        return layers.RMSNorm(module.weight.shape[0], eps, gemma=_NORMS[name], weight=module.weight)
    return _rotary_table(module) if name in _ROTARY else None


def _rotary_table(module: Any) -> nn.Module | None:
    """The module's frequencies as tables; None if they follow the positions in the batch."""
    types = module.rope_type if isinstance(module.rope_type, dict) else {"": module.rope_type}
    if any(rope_type not in _STATIC_ROPE for rope_type in types.values()):
        return None
    frequencies: dict[str, tuple[torch.Tensor, float]] = {}
    for layer_type in types:
        prefix = f"{layer_type}_" if layer_type else ""
        inv_freq = getattr(module, f"{prefix}inv_freq").float()
        frequencies[layer_type] = (inv_freq, float(getattr(module, f"{prefix}attention_scaling")))
    return layers.RotaryTable(frequencies, int(module.config.max_position_embeddings))
