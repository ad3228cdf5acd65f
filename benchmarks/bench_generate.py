"""Tokens a second of a model with transformers as it is and with batchproof, at the same batch sizes.

Stock runs twice: ``generate`` with left padding (``padded``) and ``generate_batch`` (``continuous``), both with SDPA.
All of them decode the same prompts greedily for the same number of tokens, interleaved, best of ``--repeats``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from batchproof.generation.model import Generator, load_stock
from batchproof.integrations.transformers import Request

NAME = "generate"
PROMPTS = ("In the beginning", "The king said unto him,", "A program is", "And it came to pass in those days that")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--model", help="folder or hub id; default: the built-in model")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded for each prompt")
    parser.add_argument("--repeats", type=int, default=3)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Time the contenders at every batch size; the result file's rows."""
    stock, tokenizer = load_stock(options.model)
    tokenizer.padding_side = "left"
    generator = Generator.load(options.model)
    rows = []
    for batch_size in options.batch_sizes:
        texts = [PROMPTS[i % len(PROMPTS)] for i in range(batch_size)]
        ids = [tokenizer(text)["input_ids"] for text in texts]
        contenders: dict[str, Callable[[], int]] = {
            "padded": lambda texts=texts: _padded(stock, tokenizer, texts, options.tokens),
            "continuous": lambda ids=ids: _continuous(stock, ids, options.tokens),
            "batchproof": lambda ids=ids: _batchproof(generator, ids, options.tokens),
        }
        best = dict.fromkeys(contenders, 0.0)
        for contender in contenders.values():
            contender()
        for _ in range(options.repeats):
            for name, contender in contenders.items():
                start = time.perf_counter()
                count = contender()
                best[name] = max(best[name], count / (time.perf_counter() - start))
        rates = {f"{name}_tokens_per_s": round(rate, 1) for name, rate in best.items()}
        rows.append({"batch_size": batch_size, **rates})
        print(rows[-1], flush=True)
    return {"model": generator.name, "digest": generator.digest, "tokens": options.tokens, "rows": rows}


def _padded(model: Any, tokenizer: Any, texts: list[str], tokens: int) -> int:
    model.set_attn_implementation("sdpa")
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
    out = model.generate(**batch, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=2)
    return int(out.shape[0]) * tokens


def _continuous(model: Any, ids: list[list[int]], tokens: int) -> int:
    config = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=None)
    batching = ContinuousBatchingConfig(
        block_size=16, num_blocks=len(ids) * 8 + 8, max_batch_tokens=512, max_requests_per_batch=len(ids),
        allow_block_sharing=False, use_cuda_graph=False, use_async_batching=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        outputs = model.generate_batch(
            ids, generation_config=config, continuous_batching_config=batching, progress_bar=False
        )
    return sum(len(output.generated_tokens) for output in outputs.values())


def _batchproof(generator: Generator, ids: list[list[int]], tokens: int) -> int:
    engine = generator.engine(len(ids))
    engine.eos_token_ids = []
    requests = [Request(str(i), tuple(prompt), tokens) for i, prompt in enumerate(ids)]
    return sum(len(completion.token_ids) for completion in engine.run(requests))
