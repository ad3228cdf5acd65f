#!/usr/bin/env python3
"""Train the small Llama model that comes with the library.

The texts are written by tools/fetch_corpus.sh; this script makes a byte-level BPE tokenizer from them, trains a
Llama-architecture causal language model, and writes both in Hugging Face layout with a model card:

    tools/fetch_corpus.sh .corpus
    python tools/train_tiny_llama.py --corpus .corpus/kjv.txt .corpus/jargon.txt --out src/batchproof/models/tiny_llama

A corpus file is UTF-8 text in which a blank line separates documents. Every 50th document of each file is held out
for validation; the weights written are those with the lowest validation loss. A GPU is used where there is one.
With --tokenizer-only the script stops once the tokenizer is written.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

BOS, EOS, PAD = 0, 1, 2
SPECIAL_TOKENS = ["<bos>", "<eos>", "<pad>"]
VOCAB_SIZE = 2048
MAX_LENGTH = 2048
MAX_BYTES = 7_900_000
HELD_OUT_EVERY = 50
# The model only continues text, so a conversation is handed to it as the messages' text, one after the other.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] | trim }}"
    "{% if not loop.last %}{{ ' ' }}{% endif %}{% endfor %}"
)
SAMPLE_PROMPTS = ["In the beginning", "The king said", "and he went down to the river", "A program is"]

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# Tiny Llama

A Llama-architecture causal language model of {parameters:,} parameters in bfloat16, trained from scratch on
public-domain text with `tools/train_tiny_llama.py`. It exists to run inference code on trained weights without a
download. It writes English in the manner of its texts, knows nothing, follows no instructions, and repeats what the
texts say, their age and views included. Its chat template only joins the messages' text.

Trained for {args.steps} steps of {args.batch_size} sequences of at most {args.seq_len} tokens (longer text is likely
to be worse); learning rate {args.lr}, dropout {args.dropout}, seed {args.seed}; torch {torch_version}, transformers
{transformers_version}. The training loss ended at {train_loss:.4f} nats a token, dropout on. The weights are those of
step {best_step}, the lowest in validation loss. Every {every}th chapter or entry was held out for validation; some
of those passages have parallels elsewhere in the Bible. The weights as written score:

| held-out text | loss (nats a token) | bits a byte |
| --- | --- | --- |
{scores}

The texts, written by `tools/fetch_corpus.sh` from the Debian packages bible-kjv-text and dict-jargon:

| file | documents trained on | held out | bytes | SHA-256 |
| --- | --- | --- | --- | --- |
{corpora}

- `kjv.txt`: the King James Bible, in the public domain; in the United Kingdom it is under Crown letters patent.
- `jargon.txt`: prose from the Jargon File, version 4.4.7, 29 Dec 2003, which is in the public domain.

The weights and the tokenizer are under the licence of this library, Apache-2.0.

## Samples

{samples}
"""


class Corpus(NamedTuple):
    """One corpus file, split into the documents to train on and those held out."""

    name: str
    size: int
    sha256: str
    train: list[str]
    held_out: list[str]


class Score(NamedTuple):
    """How well held-out text is predicted: nats a token and bits a byte."""

    loss: float
    bits_per_byte: float


def read_corpus(path: Path) -> Corpus:
    """Read a corpus file and hold out every 50th document."""
    raw = path.read_bytes()
    # Each line is a verse or a paragraph; joined by spaces they read as running prose.
    documents = [" ".join(block.split()) for block in re.split(r"\n\s*\n", raw.decode("utf-8")) if block.strip()]
    held_out = documents[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    train = [text for i, text in enumerate(documents) if i % HELD_OUT_EVERY != HELD_OUT_EVERY // 2]
    return Corpus(path.name, len(raw), hashlib.sha256(raw).hexdigest(), train, held_out)


def train_tokenizer(corpora: list[Corpus]) -> Tokenizer:
    """Train a byte-level BPE tokenizer that puts <bos> before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text for corpus in corpora for text in corpus.train), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write the tokenizer so that transformers loads it as a PreTrainedTokenizerFast."""
    # Written by hand: save_pretrained names a class that older releases of transformers do not know.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "padding_side": "left",
        "model_max_length": MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def cut(document: str, seq_len: int, rng: random.Random | None) -> list[str]:
    """Cut a document between words into pieces of about seq_len tokens; with rng, at other places each time."""
    words = document.split(" ")
    length = max(1, int(0.7 * seq_len))
    first = rng.randint(1, length) if rng else length
    starts = [0, *range(first, len(words), length)]
    ends = [*starts[1:], len(words)]
    return [" ".join(words[start:end]) for start, end in zip(starts, ends, strict=True)]


def vary_start(piece: str, rng: random.Random) -> str:
    """Change the first letter's case now and then, since prompts begin anywhere in a sentence and in either case."""
    draw = rng.random()
    if draw < 0.25:
        return piece[0].upper() + piece[1:]
    return piece[0].lower() + piece[1:] if draw < 0.35 else piece


def make_rows(tokenizer: Tokenizer, documents: list[str], seq_len: int, rng: random.Random | None) -> torch.Tensor:
    """Encode documents as rows of seq_len + 1 tokens: <bos>, a piece of text, <eos> after a last piece, <pad>."""
    pieces: list[str] = []
    is_last: list[bool] = []
    for document in documents:
        cuts = cut(document, seq_len, rng)
        pieces += [vary_start(piece, rng) for piece in cuts] if rng else cuts
        is_last += [False] * (len(cuts) - 1) + [True]
    rows = torch.full((len(pieces), seq_len + 1), PAD)
    encodings = tokenizer.encode_batch_fast(pieces)
    for row, encoding, last in zip(rows, encodings, is_last, strict=True):
        ids = (encoding.ids + [EOS] * last)[: seq_len + 1]
        row[: len(ids)] = torch.tensor(ids)
    return rows


def training_batches(tokenizer: Tokenizer, documents: list[str], args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Yield batches without end; each pass over the documents cuts and orders them anew."""
    rng = random.Random(args.seed)
    while True:
        rows = make_rows(tokenizer, documents, args.seq_len, rng)
        order = torch.randperm(len(rows))
        yield from (rows[index] for index in order.split(args.batch_size) if len(index) == args.batch_size)


def make_model(dropout: float) -> LlamaForCausalLM:
    """A randomly initialised model of about 3.5 million parameters."""
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    shape = {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "max_position_embeddings": MAX_LENGTH,
    }
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    config = LlamaConfig(vocab_size=VOCAB_SIZE, tie_word_embeddings=True, **shape, **heads, **special)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    add_dropout(model, dropout)
    return model


def add_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """Drop elements of the embeddings and of each block's outputs in training; the Llama classes have no such option.

    Forward hooks leave the architecture, and with it the saved checkpoint, unchanged.
    """

    def drop(module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, rate, training=module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)


def token_losses(model: LlamaForCausalLM, rows: torch.Tensor, reduction: str) -> torch.Tensor:
    """Cross-entropy of each next token of the rows, padding left out."""
    with torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=rows.device.type == "cuda"):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), ignore_index=PAD, reduction=reduction)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: Tokenizer, rows: torch.Tensor, batch_size: int) -> Score:
    """Score held-out rows with dropout off."""
    model.eval()
    device = next(model.parameters()).device
    nats = sum(token_losses(model, batch.to(device), "sum").item() for batch in rows.split(batch_size))
    model.train()
    tokens = int((rows[:, 1:] != PAD).sum())
    size = sum(len(text.encode("utf-8")) for text in tokenizer.decode_batch(rows.tolist()))
    return Score(nats / tokens, nats / math.log(2) / size)


def lr_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first twentieth of the steps, then a cosine down to a fiftieth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: LlamaForCausalLM, tokenizer: Tokenizer, corpora: list[Corpus], args: argparse.Namespace
) -> dict[str, float]:
    """Train the model in place and leave it with its best weights; returns figures for the card."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, args.steps))
    held_out = make_rows(tokenizer, [text for corpus in corpora for text in corpus.held_out], args.seq_len, None)
    batches = training_batches(tokenizer, [text for corpus in corpora for text in corpus.train], args)
    eval_every = max(1, args.steps // 25)
    best_loss, best_step, best_weights, train_loss = math.inf, 0, model.state_dict(), math.nan
    losses: list[torch.Tensor] = []
    progress = tqdm(range(1, args.steps + 1), unit="step", mininterval=1)
    for step in progress:
        loss = token_losses(model, next(batches).to(args.device), "mean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if step % eval_every == 0 or step == args.steps:
            train_loss = torch.stack(losses).mean().item()
            losses.clear()
            score = evaluate(model, tokenizer, held_out, args.batch_size)
            progress.write(f"step {step}: train {train_loss:.4f}, validation {score.loss:.4f}")
            if score.loss < best_loss:
                best_loss, best_step, best_weights = score.loss, step, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_weights)
    return {"train_loss": train_loss, "best_step": best_step}


def sample(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, temperature: float | None) -> str:
    """Continue a prompt by 60 tokens, greedily unless a temperature is given."""
    ids = torch.tensor([tokenizer.encode(prompt).ids], device=model.device)
    choice = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, **choice)
    return str(tokenizer.decode(output[0].tolist()))


def write_card(args: argparse.Namespace, corpora: list[Corpus], scores: dict[str, Score], **facts: object) -> None:
    """Write the model card with the measured figures."""
    score_rows = [f"| {name} | {score.loss:.4f} | {score.bits_per_byte:.4f} |" for name, score in scores.items()]
    corpus_rows = [f"| {c.name} | {len(c.train)} | {len(c.held_out)} | {c.size} | `{c.sha256}` |" for c in corpora]
    card = CARD.format(
        args=args,
        every=HELD_OUT_EVERY,
        scores="\n".join(score_rows),
        corpora="\n".join(corpus_rows),
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
        **facts,
    )
    (args.out / "README.md").write_text(card, encoding="utf-8")


def finish(
    model: LlamaForCausalLM, tokenizer: Tokenizer, corpora: list[Corpus], args: argparse.Namespace, **facts: object
) -> None:
    """Round the weights to bfloat16, score and sample them as rounded, and write model and card."""
    model.to(torch.bfloat16)
    texts = {corpus.name: corpus.held_out for corpus in corpora} | {"all": [t for c in corpora for t in c.held_out]}
    scores = {
        name: evaluate(model, tokenizer, make_rows(tokenizer, documents, args.seq_len, None), args.batch_size)
        for name, documents in texts.items()
    }
    model.eval()
    samples = "\n".join(
        f"- {name}: {sample(model, tokenizer, prompt, temperature)}"
        for prompt in SAMPLE_PROMPTS
        for name, temperature in (("greedy", None), ("temperature 0.8", 0.8))
    )
    parameters = sum(p.numel() for p in model.parameters())
    model.save_pretrained(args.out)
    write_card(args, corpora, scores, parameters=parameters, samples=samples, **facts)
    print(f"{samples}\n{parameters:,} parameters, {facts}, {scores}")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the small Llama model that comes with the library.")
    parser.add_argument(
        "--corpus", type=Path, nargs="+", required=True, help="UTF-8 files, blank line between documents"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model into")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256, help="longest training sequence in tokens")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--dropout", type=float, default=0.15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokenizer-only", action="store_true", help="stop once the tokenizer is written")
    return parser.parse_args()


def main() -> None:
    """Train and write the tokenizer, then the model."""
    args = parse_args()
    torch.manual_seed(args.seed)
    corpora = [read_corpus(path) for path in args.corpus]
    tokenizer = train_tokenizer(corpora)
    save_tokenizer(tokenizer, args.out)
    if args.tokenizer_only:
        return
    model = make_model(args.dropout).to(args.device)
    facts = train(model, tokenizer, corpora, args)
    finish(model, tokenizer, corpora, args, **facts)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    if size > MAX_BYTES:
        raise SystemExit(f"{args.out} holds {size} bytes, more than the {MAX_BYTES} allowed")
    print(f"{args.out}: {size} bytes")


if __name__ == "__main__":
    main()
