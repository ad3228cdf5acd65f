r"""Receipts: a hash chain over a model, a prompt, its parameters, and every step's logits and chosen token.

    h[0]     = SHA-256("batchproof receipt 1\n" + canonical JSON of {logits_dtype, model, parameters, prompt_ids})
    h[t + 1] = SHA-256(h[t] + bytes of the logits row of step t + token of step t as 4 bytes, little-endian)

The receipt is the last h in hexadecimal. Whoever recomputes the text with the same bits gets the same receipt, and
nobody gets it without computing every row of logits to the bit. ``environment`` says where the bits are the same.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .._version import __version__

__all__ = ["ReceiptChain", "environment", "model_digest"]

_HEADER = b"batchproof receipt 1\n"
# What names or describes a checkpoint, but changes no logit.
_NOT_HASHED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "_attn_implementation")


class ReceiptChain:
    """The chain of one request; ``add`` is called once a step.

    Args:
        model: the model's digest, hexadecimal.
        prompt_ids: the prompt's tokens.
        parameters: what else decides the answer; JSON values.
        logits_dtype: the dtype of the rows that ``add`` is given.
    """

    def __init__(
        self, model: str, prompt_ids: Sequence[int], parameters: Mapping[str, Any], logits_dtype: torch.dtype
    ) -> None:
        header = {
            "logits_dtype": str(logits_dtype).removeprefix("torch."),
            "model": model,
            "parameters": dict(parameters),
            "prompt_ids": list(prompt_ids),
        }
        canonical = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        self._hash = hashlib.sha256(_HEADER + canonical.encode()).digest()

    def add(self, logits: bytes | memoryview, token: int) -> None:
        """Extend the chain by one step: the bytes of its row of logits and the token chosen from it."""
        step = hashlib.sha256(self._hash)
        step.update(logits)
        step.update(token.to_bytes(4, "little"))
        self._hash = step.digest()

    @property
    def hexdigest(self) -> str:
        """The receipt so far."""
        return self._hash.hex()


def model_digest(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> str:
    """SHA-256 of a model: its configuration, and name, dtype, shape and bytes of every tensor, in order of names."""
    kept = {key: value for key, value in config.items() if key not in _NOT_HASHED}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Where a receipt holds: device, dtype, and the versions whose kernels or compilers decide bits."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}",
        "dtype": str(dtype).removeprefix("torch."),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "batchproof": __version__,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
