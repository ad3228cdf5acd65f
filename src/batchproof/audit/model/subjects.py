"""What a model audit can run: a causal language model, or any module on batches of inputs.

A subject turns a relation into steps: a recording of the request alone, how a tensor of it corresponds to one of the
step's, and the call to compare.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ...errors import ArgumentError
from .align import Chunk, Company, Layout, Span
from .observe import Recording

__all__ = ["CausalLM", "Inputs", "Module", "Step"]

Step = tuple[Recording, Layout, Callable[[], object]]
Inputs = Callable[[Sequence[int]], Any]
CHUNK = 8  # tokens
PREFIX_LEAVES = 3  # tokens that are new after a cached prefix
ALONE = Company()


def place_of(batch: int) -> int:
    """Where the request is in a batch: neither first nor, in larger ones, last."""
    return batch * 2 // 3


class Module:
    """A plain module on the arguments that ``inputs`` makes for a batch of numbered requests; the audited one is 0."""

    requests = 1

    def __init__(self, model: nn.Module, inputs: Inputs, vary: bool) -> None:
        self._model, self._inputs, self.vary = model, inputs, vary
        self._alone: Recording | None = None

    def refusal(self, relation: str) -> str | None:
        """Why a relation cannot be exercised."""
        return None if relation in ("repeat", "batch") else "inputs= makes batches only: nothing else is known of them"

    def describe(self, relation: str, request: int, batch: int) -> str:
        """A step in words."""
        return "a request alone" if relation == "repeat" else f"a request among {batch}"

    def steps(self, relation: str, request: int, batch: int, vary: bool = True) -> Iterator[Step]:
        """The steps of a relation; see the module."""
        if self._alone is None:
            self._alone, call = Recording(self._model), self._call([0])
            with self._alone:
                call()
        place = place_of(batch) if relation == "batch" else 0
        numbers = [i + 1 if self.vary and vary else 0 for i in range(batch)]
        numbers[place] = 0
        yield self._alone, Company(batch, place), self._call(numbers)

    def _call(self, numbers: Sequence[int]) -> Callable[[], object]:
        arguments = self._inputs(numbers)  # made here, where nobody watches
        if isinstance(arguments, dict):
            return partial(self._model, **arguments)
        return partial(self._model, *(arguments if isinstance(arguments, tuple) else (arguments,)))


@dataclass
class _Session:
    """Calls of a language model that share a cache."""

    model: nn.Module
    accepted: frozenset[str]
    cache: Any = None

    def feed(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [batch, tokens, vocabulary] of new tokens ``ids`` [batch, tokens], after what is cached."""
        given = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": self.cache,
            "use_cache": True,
        }
        out = self.model(**{name: v for name, v in given.items() if v is not None and name in self.accepted})
        self.cache = getattr(out, "past_key_values", None)
        logits: torch.Tensor = getattr(out, "logits", out)
        return logits


class CausalLM:
    """A causal language model with transformers' signature.

    Args:
        model: in eval mode.
        prompts: token ids of the requests; None for two random ones, the second shorter than 10 tokens, as kernels that
            change their tile there want it.
        vary: whether neighbours are other random prompts, or copies.
        max_tokens: tokens decoded.
        seed: of all random tokens.
    """

    def __init__(
        self, model: nn.Module, prompts: Sequence[Sequence[int]] | None, vary: bool, max_tokens: int, seed: int
    ) -> None:
        parameters = inspect.signature(model.forward).parameters
        if "input_ids" not in parameters:
            raise ArgumentError(
                f"{type(model).__name__}.forward takes {', '.join(parameters)}, want input_ids; or inputs="
            )
        self.model, self.vary, self.max_tokens, self.seed = model, vary, max_tokens, seed
        self.accepted = frozenset(parameters)
        self.device = next(model.parameters()).device
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        self.prompts = [self.random(1, n)[0] for n in (23, 9)] if prompts is None else list(map(self._ids, prompts))
        self.requests = len(self.prompts)
        self._alone: dict[int, list[Recording]] = {}
        self._decoded: dict[int, list[int]] = {}

    def random(self, batch: int, tokens: int) -> torch.Tensor:
        """Token ids [batch, tokens], the same for the same arguments."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(self.vocabulary, (batch, tokens), generator=generator).to(self.device)

    def refusal(self, relation: str) -> str | None:
        """Why a relation cannot be exercised."""
        if relation == "padding" and "attention_mask" not in self.accepted:
            return "the model takes no attention_mask"
        if relation in ("repeat", "batch", "padding"):
            return None
        if "past_key_values" not in self.accepted:
            return "the model takes no past_key_values, so it has no cache"
        cache = self._prefilled(0).cache
        if cache is None:
            return "the model returns no past_key_values"
        if relation == "decode" and not hasattr(cache, "batch_repeat_interleave"):
            return f"its cache, {type(cache).__name__}, has no batch_repeat_interleave"
        if relation != "decode" and max(map(len, self.prompts)) < 2:
            return "prompts of one token cannot be cut"
        return None

    def describe(self, relation: str, request: int, batch: int) -> str:
        """A step in words."""
        length = len(self.prompts[request])
        if relation == "padding":
            return f"{length} tokens among {batch} requests of {sum(self.lengths(request, batch))} tokens"
        if relation == "decode":
            return f"after {length} tokens, among {batch} requests of 1 token each"
        if relation == "batch":
            return f"{length} tokens among {batch} requests of {batch * length} tokens"
        return f"{length} tokens" + ("" if relation == "repeat" else f" in chunks of {self._sizes(relation, length)}")

    def steps(self, relation: str, request: int, batch: int, vary: bool = True) -> Iterator[Step]:
        """The steps of a relation; see the module."""
        alone = self._recordings(request)
        session = _Session(self.model, self.accepted)
        if relation == "repeat":
            yield alone[0], ALONE, partial(session.feed, self.prompts[request][None])
        elif relation == "batch":
            layout = Company(batch, place_of(batch))
            yield alone[0], layout, partial(session.feed, self.rows(request, batch, vary))
        elif relation == "padding":
            yield from self._padded(request, batch, vary)
        elif relation == "decode":
            yield from self._decode(request, batch, vary)
        else:
            length = len(self.prompts[request])
            for start, end in self.cuts(relation, length):
                ids = self.prompts[request][None, start:end]
                yield alone[0], Chunk(start, end, length), partial(session.feed, ids)

    def rows(self, request: int, batch: int, vary: bool = True) -> torch.Tensor:
        """Ids [batch, tokens] of the request and its neighbours, of the same length."""
        prompt = self.prompts[request]
        rows = self.random(batch, len(prompt)) if self.vary and vary else prompt.repeat(batch, 1)
        rows[place_of(batch)] = prompt
        return rows

    def lengths(self, request: int, batch: int) -> list[int]:
        """Lengths of the requests of a padded batch: some longer than the audited one, some shorter."""
        own = len(self.prompts[request])
        lengths = [max(own + 7 - 5 * (i % 3), 1) for i in range(batch)]
        lengths[place_of(batch)] = own
        return lengths

    def padded(self, request: int, batch: int, vary: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, mask) [batch, longest], padded on the left."""
        lengths = self.lengths(request, batch)
        longest, own = max(lengths), self.prompts[request]
        place = place_of(batch)
        fill = longest - torch.tensor(lengths, device=self.device)
        mask = (torch.arange(longest, device=self.device) >= fill[:, None]).long()
        ids = self.random(batch, longest) * mask
        if not (self.vary and vary):
            ids = own.repeat(batch, -(-longest // len(own)))[:, -longest:] * mask
        ids[place, -len(own) :] = own
        return ids, mask

    def next_tokens(self, request: int, batch: int, vary: bool, step: int) -> torch.Tensor:
        """One token each [batch, 1]: the request's own, and the neighbours'."""
        own = self._decoded[request][step]
        ids = self.random(batch, step + 1)[:, -1:] if self.vary and vary else torch.full((batch, 1), own)
        ids = ids.to(self.device)
        ids[place_of(batch)] = own
        return ids

    def cuts(self, relation: str, length: int) -> list[tuple[int, int]]:
        """Start and end of the chunks that a relation feeds a prompt in."""
        size = {"chunked prefill": CHUNK, "token by token": 1, "cached prefix": length - min(PREFIX_LEAVES, length - 1)}
        step = min(size[relation], max(length - 1, 1))
        return [(start, min(start + step, length)) for start in range(0, length, step)]

    def _sizes(self, relation: str, length: int) -> str:
        sizes = [end - start for start, end in self.cuts(relation, length)]
        return f"{sizes[0]}" if relation == "token by token" else ", ".join(map(str, sizes))

    def _padded(self, request: int, batch: int, vary: bool) -> Iterator[Step]:
        """The padded prefill, then one token each."""
        alone, session, place = self._recordings(request), _Session(self.model, self.accepted), place_of(batch)
        lengths, (ids, mask) = self.lengths(request, batch), self.padded(request, batch, vary)
        for step in range(2 if "past_key_values" in self.accepted else 1):
            now = [n + step for n in lengths]
            span = Span(now[place], max(now), sum(now[:place]), sum(now))
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            yield alone[step], Company(batch, place, (span,)), partial(session.feed, ids, mask, positions)
            ids = self.next_tokens(request, batch, vary, step)
            mask = torch.cat((mask, torch.ones_like(ids)), -1)

    def _decode(self, request: int, batch: int, vary: bool) -> Iterator[Step]:
        """Requests with the same prompt, prefilled alone, that continue differently: only decode steps are batched."""
        session = self._prefilled(request)
        session.cache.batch_repeat_interleave(batch)
        for step in range(self.max_tokens):
            ids = self.next_tokens(request, batch, vary, step)
            layout = Company(batch, place_of(batch))
            yield self._recordings(request)[step + 1], layout, partial(session.feed, ids)

    def _prefilled(self, request: int) -> _Session:
        session = _Session(self.model, self.accepted)
        session.feed(self.prompts[request][None])
        return session

    def _recordings(self, request: int) -> list[Recording]:
        """The request alone: its prefill, then each token it decodes, greedily."""
        if request not in self._alone:
            session = _Session(self.model, self.accepted)
            ids, self._alone[request], self._decoded[request] = self.prompts[request][None], [], []
            for _ in range(1 + (self.max_tokens if "past_key_values" in self.accepted else 0)):
                recording = Recording(self.model)
                with recording:
                    logits = session.feed(ids)
                ids = logits[:, -1:].argmax(-1)
                self._alone[request].append(recording)
                self._decoded[request].append(int(ids))
        return self._alone[request]

    def _ids(self, prompt: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor(list(prompt), dtype=torch.int64)
        if ids.dim() != 1 or ids.numel() == 0 or ids.min() < 0 or ids.max() >= self.vocabulary:
            raise ArgumentError(f"prompt is {list(prompt)!r}, want one or more token ids below {self.vocabulary}")
        return ids.to(self.device)
