"""What a step's rows of logits become: the next token of each request, and what it asked to know of its prompt's.

Every row is looked at as the model gave it for logprobs and the receipt; penalties, temperature and filters come after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers.generation.continuous_batching.model_runner import ModelRunner

from ...ops.logprobs import token_logprobs
from ...ops.penalties import apply_penalties
from ...ops.sample import sample

__all__ = ["Runner"]


class Runner(ModelRunner):
    """The model runner with our sampler in the place of softmax and multinomial over the whole batch."""

    model_dtype: torch.dtype
    on_tokens: Callable[[int], None]
    _prompt_rows: Sequence[tuple[Any, int]] = ()  # (completion, position of the token that the row gives)
    _first_prompt_row = 0  # of the step's rows of logits

    def compute_batch(self, model: torch.nn.Module, batch_data: dict[str, Any]) -> None:
        """Run a step, with a row of logits for every prompt token whose logprob is wanted after those that draw."""
        self._prompt_rows, columns = self._find_prompt_rows()
        indices = batch_data["logits_indices"]
        self._first_prompt_row = indices.shape[0]
        if columns:
            batch_data["logits_indices"] = torch.cat((indices, indices.new_tensor(columns)))
        super().compute_batch(model, batch_data)

    def _find_prompt_rows(self) -> tuple[list[tuple[Any, int]], list[int]]:
        """The prompt tokens that this step predicts and whose logprobs are wanted, and at which of its own tokens.

        A request that was evicted computes its prompt again; what is known already is not asked for twice.
        """
        rows: list[tuple[Any, int]] = []
        columns: list[int] = []
        start = 0
        for future in self.inputs_and_outputs.requests_in_batch:
            completion, end = future.state.completion, future.state.position_offset
            request, begin = completion.request, end - future.query_length
            if request.prompt_logprobs is not None:
                predicted = range(
                    max(begin + 1, len(completion.prompt_logprobs)), min(end + 1, len(request.prompt_ids))
                )
                rows += [(completion, position) for position in predicted]
                columns += [start + position - 1 - begin for position in predicted]
            start += future.query_length
        return rows, columns

    def _sample(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        """Draw a token for every row of ``scores`` [1, rows, vocab] fp32 that belongs to a request with a new token."""
        if self._prompt_rows:
            self._note_prompt(scores[0, self._first_prompt_row :])
        states = [f.state for f in self.inputs_and_outputs.requests_in_batch if f.has_new_token]
        if not states:
            return
        logits = scores[0, : len(states)]
        completions = [state.completion for state in states]
        tokens = _draw(logits, completions, [state.position_offset for state in states])
        output_ids[0, : len(states)] = tokens.to(output_ids.dtype)
        notes = _notes(logits, tokens, [completion.request.logprobs for completion in completions])
        # The model computed the logits in its own dtype and they were widened since: this takes them back exactly.
        bits = logits.to(self.model_dtype).cpu().contiguous().view(torch.uint8).numpy()
        for i, (completion, token, note) in enumerate(zip(completions, tokens.tolist(), notes, strict=True)):
            completion.token_ids.append(token)
            completion.logprobs.append(note["logprob"])
            if completion.request.logprobs is not None:
                completion.top_logprobs.append(note)
            completion.chain.add(bits[i].data, token)
        self.on_tokens(len(states))

    def _note_prompt(self, logits: torch.Tensor) -> None:
        """Note the logprobs of prompt tokens, of their rows of logits [rows, vocab]."""
        tokens = logits.new_tensor([c.request.prompt_ids[i] for c, i in self._prompt_rows], dtype=torch.int64)
        notes = _notes(logits, tokens, [c.request.prompt_logprobs for c, _ in self._prompt_rows])
        for (completion, position), note in zip(self._prompt_rows, notes, strict=True):
            assert len(completion.prompt_logprobs) == position
            completion.prompt_logprobs.append(note)


def _notes(logits: torch.Tensor, tokens: torch.Tensor, wanted: Sequence[int | None]) -> list[dict[str, Any]]:
    """Of each row its token's logprob and rank, and the ``wanted`` most probable tokens as [id, logprob]."""
    logprobs, ranks, top_ids, top_logprobs = token_logprobs(logits, tokens, max(n or 0 for n in wanted))
    rows = zip(logprobs.tolist(), ranks.tolist(), top_ids.tolist(), top_logprobs.tolist(), wanted, strict=True)
    return [
        {"logprob": logprob, "rank": rank, "top": [[*pair] for pair in zip(ids[: n or 0], of_ids, strict=False)]}
        for logprob, rank, ids, of_ids, n in rows
    ]


def _draw(logits: torch.Tensor, completions: Sequence[Any], positions: Sequence[int]) -> torch.Tensor:
    """The next token of each completion, from its row of ``logits`` [num_tokens, vocab] fp32."""
    requests = [completion.request for completion in completions]

    def row(values: Iterable[Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(list(values), dtype=dtype, device=logits.device)

    def padded(lists: list[Sequence[int]]) -> torch.Tensor:
        longest = max(map(len, lists))
        return row(([*tokens] + [logits.shape[1]] * (longest - len(tokens)) for tokens in lists), torch.int64)

    asking = [(r.repetition_penalty, r.frequency_penalty, r.presence_penalty) != (1.0, 0.0, 0.0) for r in requests]
    if any(asking):
        logits = apply_penalties(
            logits,
            padded([r.prompt_ids if asks else () for r, asks in zip(requests, asking, strict=True)]),
            padded([c.token_ids if asks else () for c, asks in zip(completions, asking, strict=True)]),
            row(r.repetition_penalty for r in requests),
            row(r.frequency_penalty for r in requests),
            row(r.presence_penalty for r in requests),
        )
    filters = any(r.top_k > 0 or r.top_p < 1.0 for r in requests)
    return sample(
        logits,
        row((r.seed for r in requests), torch.int64),
        row(positions, torch.int64),
        row(r.temperature for r in requests),
        row((r.top_k for r in requests), torch.int64) if filters else None,
        row(r.top_p for r in requests) if filters else None,
        row(r.min_p for r in requests) if any(r.min_p > 0.0 for r in requests) else None,
    )
