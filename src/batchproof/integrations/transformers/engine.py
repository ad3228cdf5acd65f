"""Generation by transformers' continuous batching, with what it cannot carry added through its own classes.

A request brings its seed, temperature, filters, penalties and stop strings; every sampled row of logits is hashed into
the request's receipt. Tokens are drawn by ``ops.sample``, whose noise is keyed by (seed, position). Requests join and
leave the batch as they come and go, are prefilled in chunks and evicted when the cache is full: none of it shows in
the bits, because every op under it is batch-invariant.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import group_layers_by_attn_type
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState, RequestStatus

from ...errors import ArgumentError, RecordError
from ...ops.penalties import check_penalties
from ...ops.sample import check_sampling
from .attention import NAME
from .runner import Runner

__all__ = ["Completion", "Engine", "Request"]

PAGE_SIZE = 16  # tokens


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    ``temperature`` 0 is greedy; ``top_p`` 1, ``top_k`` 0 and ``min_p`` 0 filter nothing; a ``repetition_penalty`` of 1
    and the other two of 0 are neutral. ``logprobs`` and ``prompt_logprobs`` are how many of the most probable tokens to
    tell at each token drawn and each of the prompt; None tells nothing.
    """

    id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass
class Completion:
    """What a request became; ``chain`` is the receipt.

    ``logprobs`` are of the unpenalised, unscaled, unfiltered distribution. ``top_logprobs`` has an entry a token drawn,
    and ``prompt_logprobs`` one a token of the prompt but the first, which nothing predicts: {"logprob", "rank", "top":
    [[id, logprob], ...]}, if the request asked for them.
    """

    request: Request
    chain: Any
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[str, Any]] = field(default_factory=list)
    prompt_logprobs: list[dict[str, Any] | None] = field(default_factory=lambda: [None])
    finish_reason: str = "length"
    text: str = ""


@dataclass
class _State(RequestState):
    """A request inside continuous batching; it reaches the sampler with the batch it is in."""

    completion: Completion | None = None
    engine: Any = None

    def update_and_check_completion(self, token_id: int, logprob: float | None) -> bool:
        done: bool = super().update_and_check_completion(token_id, logprob)
        assert self.completion is not None
        if self.engine.is_stopped(self.completion):
            self.completion.finish_reason = "stop"
            self.status = RequestStatus.FINISHED
            return True
        return done

    def create_equivalent_initial_request(self) -> _State:
        """What is queued again when the cache was full: the prompt with what was generated, one completion."""
        plain = super().create_equivalent_initial_request()
        config = {**self.get_request_config(), "max_new_tokens": plain.max_new_tokens}
        return _State(
            request_id=plain.request_id,
            initial_tokens=plain.initial_tokens,
            _true_initial_tokens=plain._true_initial_tokens,
            completion=self.completion,
            engine=self.engine,
            **config,
        )

    def to_generation_output(self) -> GenerationOutput:
        output: GenerationOutput = super().to_generation_output()
        output.completion = self.completion
        return output


class _Manager(ContinuousBatchingManager):
    """The manager, driven step by step on the caller's thread, with ``Runner`` and ``_State``."""

    on_tokens: Callable[[int], None]

    def _create_batch_processor(self) -> Any:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # it seeds torch's global generator
            processor = super()._create_batch_processor()
        io = processor.inputs_and_outputs
        if io.compute_stream is not None:  # inputs are copied on the default stream: compute there as well
            io.compute_stream = None
            processor.offloading_manager._compute_stream = None
        processor.model_runner = Runner(
            logit_processor=processor.logit_processor,
            cb_config=processor.cb_config,
            inputs_and_outputs=io,
            cache=processor.cache,
            do_sample=False,
            return_logprobs=False,
        )
        processor.model_runner.model_dtype = self.model.dtype
        processor.model_runner.on_tokens = self.on_tokens
        return processor

    def submit(self, state: _State) -> None:
        self.input_queue.put(state)
        self._has_new_requests.set()

    @torch.inference_mode()
    def outputs(self) -> Iterator[GenerationOutput]:
        """Run until nothing is pending; yields each request's output when it ends."""
        self.batch_processor = self._create_batch_processor()
        self.current_batch = 0
        finished = self.output_router.output_queue
        try:
            while True:
                ready = self.batch_processor.prepare_next_batch()
                if ready:
                    self._generation_step()
                    self.batch_processor.update_batch()
                    self.current_batch += 1
                while not finished.empty():
                    yield finished.get_nowait()
                if not ready and not self.batch_processor.has_pending_requests() and self.input_queue.empty():
                    return
        finally:
            with _old_objects_uncollected(self.model.device):
                self.batch_processor = None


@contextmanager
def _old_objects_uncollected(device: torch.device) -> Iterator[None]:
    """Keep a garbage collection short: a batch processor that goes makes one, which takes as long as tens of steps.

    On a GPU it may free memory of the device and is left alone, as it is where somebody has frozen objects.
    """
    if device.type != "cpu" or gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Engine:
    """Generates with a model that ``make_invariant`` has been through.

    Args:
        model: the model; its attention is set to the paged form while requests run.
        tokenizer: decodes tokens, for text and stop strings.
        new_chain: makes an empty receipt chain for a request; see ``generation.receipt``.
        batch_size: most requests in a step.
        max_batch_tokens: most tokens in a step; longer prompts are prefilled in chunks.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, new_chain: Any, batch_size: int = 32, max_batch_tokens: int = 512
    ) -> None:
        if batch_size < 1 or max_batch_tokens < 1:
            raise ArgumentError(f"batch_size {batch_size}, max_batch_tokens {max_batch_tokens}; want at least 1")
        self.model = model
        self.tokenizer = tokenizer
        self.new_chain = new_chain
        self.batch_size = batch_size
        self.max_batch_tokens = max(max_batch_tokens, batch_size)
        eos = model.generation_config.eos_token_id if model.generation_config else None
        self.eos_token_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    def check(self, request: Request) -> None:
        """RecordError if the model cannot take the request, ArgumentError if a sampling parameter is out of range."""
        limit = self.model.config.max_position_embeddings
        vocab = self.model.config.vocab_size
        if not request.prompt_ids:
            raise RecordError("the prompt has no tokens, want at least one")
        if len(request.prompt_ids) + request.max_tokens > limit:
            raise RecordError(
                f"the prompt has {len(request.prompt_ids)} tokens and max_tokens is {request.max_tokens}; "
                f"want at most {limit} together, the model's max_position_embeddings"
            )
        if not all(0 <= token < vocab for token in request.prompt_ids):
            raise RecordError(f"the prompt has token ids outside 0 to {vocab - 1}, the model's vocabulary")
        for name in ("logprobs", "prompt_logprobs"):
            if not 0 <= (getattr(request, name) or 0) <= vocab:
                raise RecordError(f"{name} is {getattr(request, name)}, want 0 to {vocab}, the model's vocabulary")
        # here, for on a GPU the ops do not wait to look
        floats = (request.temperature, request.top_p, request.min_p)
        temperature, top_p, min_p = torch.tensor(floats, dtype=torch.float32).split(1)
        check_sampling(temperature, torch.tensor([request.top_k]), top_p, min_p)
        penalties = (request.repetition_penalty, request.frequency_penalty, request.presence_penalty)
        check_penalties(*torch.tensor(penalties, dtype=torch.float32).split(1))

    def is_stopped(self, completion: Completion) -> bool:
        """Whether the last token ended the text: an end-of-sequence token, or the end of a stop string."""
        if completion.token_ids[-1] in self.eos_token_ids:
            return True
        if not completion.request.stop:
            return False
        text = self.decode(completion.token_ids)
        return any(stop in text for stop in completion.request.stop)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, without the special ones."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def run(
        self, requests: Sequence[Request], on_tokens: Callable[[int], None] = lambda count: None
    ) -> Iterator[Completion]:
        """Completions in the order they finish; ``on_tokens`` is told the number of new tokens after every step.

        Every request is checked before the first is run.
        """
        for request in requests:
            self.check(request)
        if not requests:
            return
        previous = self.model.config._attn_implementation
        self.model.set_attn_implementation(f"paged|{NAME}")
        try:
            manager = self._manager(requests)
            manager.on_tokens = on_tokens
            for number, request in enumerate(requests):
                manager.submit(self._state(str(number), request))
            for output in manager.outputs():
                if output.error is not None:
                    raise RuntimeError(f"request {output.request_id} failed: {output.error}")
                yield self._finish(output.completion)
        finally:
            self.model.set_attn_implementation(previous)

    def _finish(self, completion: Completion) -> Completion:
        text = self.decode(completion.token_ids)
        ends = [text.index(stop) for stop in completion.request.stop if stop in text]
        completion.text = text[: min(ends)] if ends else text
        return completion

    def _state(self, internal_id: str, request: Request) -> _State:
        return _State(
            request_id=internal_id,
            initial_tokens=list(request.prompt_ids),
            max_new_tokens=request.max_tokens,
            eos_token_id=-1,  # is_stopped decides
            completion=Completion(request, self.new_chain(request)),
            engine=self,
        )

    def _manager(self, requests: Sequence[Request]) -> _Manager:
        """A manager whose cache holds ``batch_size`` of the longest requests."""
        groups = len(group_layers_by_attn_type(self.model.config)[0])
        # One page more than the tokens need: the scheduler asks for a page before it counts what is there.
        needs = sorted((-(-(len(r.prompt_ids) + r.max_tokens) // PAGE_SIZE) + 1 for r in requests), reverse=True)
        config = ContinuousBatchingConfig(
            block_size=PAGE_SIZE,
            num_blocks=groups * sum(needs[: self.batch_size]) + self.batch_size,
            max_batch_tokens=self.max_batch_tokens,
            max_requests_per_batch=self.batch_size,
            max_blocks_per_request=0,
            allow_block_sharing=False,
            use_cuda_graph=False,
            use_async_batching=False,
            default_compile_level=0,
            scheduler_type="fifo",
            return_logprobs=False,
            cpu_offload_space=0.0,
            max_memory_percent=0.9,
        )
        # A fresh one: the checkpoint's own temperature or penalties must not build logits processors.
        generation = GenerationConfig(do_sample=False, eos_token_id=None, max_new_tokens=1)
        return _Manager(model=self.model, generation_config=generation, continuous_batching_config=config)
