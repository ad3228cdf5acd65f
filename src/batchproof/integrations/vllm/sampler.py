"""vLLM's sampler over batchproof's ``sample``: the one of its model runner V2, which runs all dense models.

vLLM's own takes another algorithm for top-k and top-p below 8 rows, so that a request's token may depend on how many
others there are; here a token is a function of its request's row of logits, parameters, seed and position, as in
``generate``, whose noise it shares. A decode step without filters is two launches, and what vLLM copies to the GPU in
every step for the sampler, though it changes with the requests alone, is copied when one is added: in vLLM the host
takes longer to prepare a decode step than the GPU to run it.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from typing import Any

import numpy as np
import torch

from ...ops._gumbel_max import launch_best_of_requests
from ...ops._sample_filters import filter_logits, scaled
from .log import say_that_it_stays_vllms
from .oot import lacks

__all__ = ["Asked", "call_over_ours", "install_sampler", "probe_sampler", "why_vllms"]

_SAMPLER = "vllm.v1.worker.gpu.sample.sampler"
_METHODS = {
    "__call__": ["self", "logits", "input_batch"],
    "add_request": ["self", "req_idx", "prompt_len", "sampling_params"],
    "apply_staged_writes": ["self"],
}
# All that a sampler has: one with more has more to do than is done here.
_STATES = {
    "logprobs_mode", "compute_nans", "use_fp64_gumbel", "req_states", "sampling_states", "penalties_state",
    "logit_bias_state", "bad_words_state", "logprob_token_ids_state", "num_speculative_tokens", "use_flashinfer",
}  # fmt: skip
_OF_BATCH = {
    "idx_mapping", "idx_mapping_np", "expanded_local_pos", "positions", "logits_indices", "input_ids", "seq_lens",
    "num_reqs", "is_prefilling_np", "cu_num_logits",
}  # fmt: skip
_OF_OUTPUT = ["sampled_token_ids", "logprobs_tensors", "num_nans", "num_sampled", "num_rejected"]
_OF_SCORES = [
    "logits", "num_logprobs", "sampled_token_ids", "cu_num_logits", "logprob_token_ids_state", "expanded_idx_mapping",
    "max_per_req_token_ids", "logits_mode",
]  # fmt: skip

FILTER, EDIT, SCORE = 1, 2, 4  # what a request asks for: top-k, top-p or min-p; other logits; logprobs


class Asked:
    """What the requests of a sampler ask for, kept on the host; and constants that a step hands on."""

    def __init__(self, max_num_reqs: int, device: torch.device) -> None:
        self.of_request = np.zeros(max_num_reqs, dtype=np.uint8)
        self.staged = True  # whether a request was added since the parameters were last copied
        self.ones = torch.ones(max_num_reqs, dtype=torch.int32, device=device)
        self.zeros = torch.zeros_like(self.ones)

    def note(self, sampler: Any, request: int) -> None:
        """A request was added."""
        states, bad_words = sampler.sampling_states, sampler.bad_words_state.num_bad_words.np
        cuts = states.top_k.np[request] != states.vocab_size or states.top_p.np[request] != 1.0
        cuts = cuts or states.min_p.np[request] != 0.0
        edits = sampler.logit_bias_state.use_logit_bias[request] or sampler.penalties_state.use_penalty[request]
        tokens = sampler.logprob_token_ids_state.num_token_ids.np[request]
        self.of_request[request] = (
            FILTER * bool(cuts and states.temperature.np[request] != 0.0)
            | EDIT * bool(edits or bad_words[request] > 0)
            | SCORE * bool(states.num_logprobs[request] >= 0 or tokens > 0)
        )
        self.staged = True

    def by(self, requests: Any) -> int:
        """What any of them asks for."""
        return int(np.bitwise_or.reduce(self.of_request[requests], initial=0))


def why_vllms(sampler: Any) -> str | None:
    """Why an engine's sampler stays vLLM's, in a few words; None if it is ours. No answer follows the batch."""
    if sampler.use_fp64_gumbel:
        return "its noise is asked for in fp64"
    if sampler.num_speculative_tokens != 1:
        return "tokens are drafted, and vLLM's rejection of drafts has noise of its own"
    return None


def call_over_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's ``Sampler.__call__`` that draws with ours, unless ``why_vllms``; then ``original``."""
    scores = import_module("vllm.v1.worker.gpu.sample.logprob").compute_topk_scores
    count_sampled = import_module("vllm.v1.worker.gpu.input_batch").get_num_sampled_and_rejected
    count_nans = import_module("vllm.v1.worker.gpu.metrics.logits").get_num_nans
    output = import_module("vllm.v1.worker.gpu.sample.output").SamplerOutput

    @functools.wraps(original)
    def call(self: Any, logits: torch.Tensor, input_batch: Any) -> Any:
        reason = why_vllms(self)
        if reason is not None:
            say_that_it_stays_vllms("sampling stays", reason)
            return original(self, logits, input_batch)
        asked: Asked = self.batchproof
        of, requests, states = input_batch.idx_mapping_np, input_batch.idx_mapping, self.sampling_states
        by = asked.by(of)
        num_nans = count_nans(logits) if self.compute_nans else None
        raw = self.logprobs_mode.startswith("raw_")
        kept = logits
        if by & EDIT:
            kept = _edited(self, logits.clone() if by & SCORE and raw else logits, input_batch)
        if by & FILTER:
            kept = _filtered(states, kept, requests)
        tokens = launch_best_of_requests(kept, states.seeds.gpu, input_batch.seq_lens, states.temperature.gpu, requests)
        logprobs = None
        if by & SCORE:
            logprobs = scores(
                logits if raw else scaled(kept, states.temperature.gpu[requests]),
                max(states.max_num_logprobs(of), 0), tokens, None,
                logprob_token_ids_state=self.logprob_token_ids_state, expanded_idx_mapping=requests,
                max_per_req_token_ids=self.logprob_token_ids_state.max_num_token_ids(of),
                logits_mode=self.logprobs_mode.endswith("_logits"),
            )  # fmt: skip
        if input_batch.is_prefilling_np.any():  # some may have prompt left, and no token yet
            num_sampled, num_rejected = count_sampled(
                input_batch.seq_lens.new_ones(input_batch.num_reqs), input_batch.seq_lens, input_batch.cu_num_logits,
                requests, self.req_states.prefill_len.gpu,
            )  # fmt: skip
        else:
            num_sampled, num_rejected = asked.ones[: input_batch.num_reqs], asked.zeros[: input_batch.num_reqs]
        return output(
            sampled_token_ids=tokens.view(-1, 1), logprobs_tensors=logprobs, num_nans=num_nans,
            num_sampled=num_sampled, num_rejected=num_rejected,
        )  # fmt: skip

    return call


def _edited(sampler: Any, logits: torch.Tensor, batch: Any) -> torch.Tensor:
    """``logits``, in place, with vLLM's biases, penalties and bad words, each of a row by its request alone."""
    at = batch.logits_indices
    positions, input_ids = batch.positions[at], batch.input_ids[at]
    rows = (logits, batch.idx_mapping, batch.idx_mapping_np)
    sampler.logit_bias_state.apply_logit_bias(*rows, positions)
    sampler.penalties_state.apply_penalties(*rows, input_ids, batch.expanded_local_pos)
    sampler.bad_words_state.apply_bad_words(*rows, input_ids, batch.expanded_local_pos)
    return logits


def _filtered(states: Any, logits: torch.Tensor, requests: torch.Tensor) -> torch.Tensor:
    """``logits`` with -inf at what min-p, top-k and top-p remove of each row."""
    temperature, top_k, top_p, min_p = (
        parameter.gpu[requests] for parameter in (states.temperature, states.top_k, states.top_p, states.min_p)
    )
    return filter_logits(logits, temperature, top_k.long(), top_p, min_p)


def probe_sampler() -> str | None:
    """What is missing of vLLM's sampler, or more than known; None if all is as it should be."""
    module = import_module(_SAMPLER)
    sampler = module.Sampler
    for name, wanted in _METHODS.items():
        found = list(inspect.signature(getattr(sampler, name)).parameters)
        if found != wanted:
            return f"Sampler.{name} takes {found}, want {wanted}"
    states = set(re.findall(r"self\.(\w+)(?::[^=\n]+)? = ", inspect.getsource(sampler.__init__)))
    if states != _STATES:
        return f"Sampler has {sorted(states - _STATES)} more and {sorted(_STATES - states)} less than is known"
    from vllm.v1.worker.gpu import input_batch
    from vllm.v1.worker.gpu.sample import logprob
    from vllm.v1.worker.gpu.sample.output import SamplerOutput

    found = [field.name for field in fields(SamplerOutput)]
    if found != _OF_OUTPUT:
        return f"SamplerOutput has {found}, want {_OF_OUTPUT}"
    absent = _OF_BATCH - {field.name for field in fields(input_batch.InputBatch)}
    if absent:
        return f"InputBatch has no {', '.join(sorted(absent))}"
    found = list(inspect.signature(logprob.compute_topk_scores).parameters)
    if found != _OF_SCORES:
        return f"compute_topk_scores takes {found}, want {_OF_SCORES}"
    return lacks(input_batch, "get_num_sampled_and_rejected")


def install_sampler() -> None:
    """Ours under vLLM's ``Sampler``."""
    sampler = import_module(_SAMPLER).Sampler
    if hasattr(sampler.__call__, "__wrapped__"):
        return
    init, add, apply = sampler.__init__, sampler.add_request, sampler.apply_staged_writes

    @functools.wraps(init)
    def build(self: Any, *arguments: Any, **named: Any) -> None:
        given = inspect.signature(init).bind(self, *arguments, **named).arguments
        init(self, *arguments, **named)
        self.batchproof = Asked(given["max_num_reqs"], given["device"])

    @functools.wraps(add)
    def add_request(self: Any, req_idx: int, prompt_len: int, sampling_params: Any) -> None:
        add(self, req_idx, prompt_len, sampling_params)
        self.batchproof.note(self, req_idx)

    @functools.wraps(apply)
    def apply_staged_writes(self: Any) -> None:
        if self.batchproof.staged:
            apply(self)
            self.batchproof.staged = False

    sampler.__init__, sampler.add_request = build, add_request
    sampler.apply_staged_writes, sampler.__call__ = apply_staged_writes, call_over_ours(sampler.__call__)
