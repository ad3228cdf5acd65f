"""Loading a model for generation: the built-in one, a folder, or a name on the hub."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..errors import ArgumentError, DeviceError, RecordError
from ..integrations.transformers import Completion, Engine, Report, Request, make_invariant
from .receipt import ReceiptChain, environment, model_digest
from .records import Parameters, PromptRecord

__all__ = ["BUILT_IN", "Generator", "load_stock"]

BUILT_IN = Path(__file__).parent.parent / "models" / "tiny_llama"
_DTYPES = {"auto": "auto", "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_stock(name: str | None, device: str = "auto", dtype: str = "auto") -> tuple[PreTrainedModel, Any]:
    """A model as transformers loads it, and its tokenizer.

    Args:
        name: a folder or a hub id; None for the built-in model.
        device: "cpu", "cuda", "cuda:1"; "auto" for the GPU if there is one.
        dtype: "float32", "float16" or "bfloat16"; "auto" for the checkpoint's.
    """
    if dtype not in _DTYPES:
        raise ArgumentError(f"dtype is {dtype!r}, want one of {', '.join(_DTYPES)}")
    target = _device(device)
    source = name or str(BUILT_IN)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=_DTYPES[dtype])
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"model is {source!r}, want a folder or a hub id of a causal LM: {error}") from error
    return model.to(target).eval(), tokenizer


def _device(name: str) -> torch.device:
    """The device of that name, which must be there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"device is {name!r}, want auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device is {name!r}, but this torch sees {torch.cuda.device_count()} GPUs")
    return device


@dataclass
class Generator:
    """An invariant model with its tokenizer and digest: answers prompt records."""

    model: PreTrainedModel
    tokenizer: Any
    name: str
    digest: str
    report: Report

    @classmethod
    def load(cls, name: str | None = None, device: str = "auto", dtype: str = "auto") -> Generator:
        """Load a model (see ``load_stock``), take its digest and make it invariant."""
        model, tokenizer = load_stock(name, device, dtype)
        digest = model_digest(model.state_dict(), model.config.to_dict())
        report = make_invariant(model)
        return cls(model, tokenizer, name or "built-in", digest, report)

    @property
    def environment(self) -> dict[str, str]:
        """Where this generator's receipts hold."""
        return environment(self.model.device, self.model.dtype)

    def engine(self, batch_size: int, max_batch_tokens: int = 512) -> Engine:
        """Continuous batching with receipts; see ``Engine``."""
        return Engine(self.model, self.tokenizer, self._new_chain, batch_size, max_batch_tokens)

    def request(self, record: PromptRecord) -> Request:
        """A prompt record as tokens and parameters."""
        if record.messages is None:
            prompt_ids = self.tokenizer(record.prompt)["input_ids"]
        else:
            chat = [dict(m) for m in record.messages]
            try:
                prompt_ids = self.tokenizer.apply_chat_template(
                    chat, add_generation_prompt=True, tokenize=True, return_dict=False
                )
            except Exception as error:  # a template is a program of the model's, and may raise anything
                raise RecordError(f"messages: the model's chat template does not take them: {error}") from error
        return Request(record.id, tuple(prompt_ids), **vars(record.parameters))

    def answer(self, record: PromptRecord, completion: Completion) -> dict[str, Any]:
        """The answer record of a completion."""
        asked = {"top_logprobs": record.parameters.logprobs, "prompt_logprobs": record.parameters.prompt_logprobs}
        return {
            "id": record.id,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "logprobs": completion.logprobs,
            **{name: getattr(completion, name) for name, count in asked.items() if count is not None},
            "finish_reason": completion.finish_reason,
            "receipt": completion.chain.hexdigest,
            "environment": self.environment,
            "model": {"name": self.name, "digest": self.digest},
            "request": record.to_json(),
        }

    def _new_chain(self, request: Request) -> ReceiptChain:
        parameters = Parameters(**{field.name: getattr(request, field.name) for field in fields(Parameters)})
        return ReceiptChain(self.digest, request.prompt_ids, parameters.to_json(), self.model.dtype)
