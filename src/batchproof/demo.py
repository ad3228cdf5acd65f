"""``batchproof demo``: whose logits change with the batch, measured here and now, and answers that prove theirs do not.

Every request is run alone, then among others in batches of each size and in another order. A request counts as
changed if any bit differs: of its logits at any step for ``generate`` and batchproof, of its tokens or their log
probabilities for ``generate_batch``, which gives no logits.
"""

from __future__ import annotations

import gc
import hashlib
import json
import random
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import group_layers_by_attn_type
from transformers.utils import logging

from .errors import RecordError
from .generation.model import Generator, load_stock
from .generation.records import AnswerFile, PromptRecord, parse_prompt, read_lines
from .generation.verify import HOLDS, read_answers, verify

__all__ = ["run"]

_PAGE = 16  # tokens
_BATCH_TOKENS = 512  # tokens in a step of generate_batch and of batchproof
_EQUAL = 24  # tokens of each prompt where all have the same length
_BEGINNINGS = """
In the beginning / And it came to pass, when the king heard these words, that he / A program is / The LORD is my /
hacker: n. A person who / Blessed are they that / Behold, I send / The compiler printed an error message and /
And he went up into the mountain, / bug: n. An unwanted / Then said the woman unto her son, / See also / Wherefore /
Many users of the network / Now these are the names of the children of Israel, / And David took / foo: interj. /
Hear, O my people, and I will speak; / The wise man's heart / To crash the system by accident is /
And Moses said unto Pharaoh, / In those days there was no king, and every man did that which was right /
This term is used of a machine that / And the angel of the LORD appeared / Let us go down to the river and /
The sons of Judah were / Old programmers tell of a computer which / He that keepeth the gate of the city shall /
Originally, at the laboratory, this was / And there was a great famine in the land: / Praise ye the LORD. /
The word of the prophet came the second time, saying,
"""
_SHORT = " ".join(_BEGINNINGS.split()).split(" / ")
_PROMPTS = (*_SHORT, *(" ".join(_SHORT[:count]) for count in (2, 4, 8, 32)))


@dataclass(frozen=True)
class _Plan:
    """What is measured. ``answers`` of the prompts are answered with ``answer_tokens`` tokens each."""

    prompts: Sequence[str] = _PROMPTS
    batch_sizes: Sequence[int] = (1, 2, 3, 8, 33, len(_PROMPTS))
    steps: int = 3
    answers: int = 6
    answer_tokens: int = 24


@dataclass
class _Column:
    """Requests changed, and seconds taken, by batch size; empty, with a reason, if it could not be measured."""

    name: str
    how: str
    color: str  # of Okabe and Ito's colour-blind-safe palette
    changed: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failure: str = ""


# Runs requests, given by number, in batches of a size; returns each one's bits, or a hash of them.
_Run = Callable[[Sequence[int], int], dict[int, Any]]


def run(model: str | None, out: Path, device: str = "auto") -> int:
    """Measure, print, and write ``demo.png``, ``demo.json`` and ``answers.jsonl`` into ``out``.

    Args:
        model: a folder or a hub id; None for the built-in model.
        out: a folder, made if need be. Answers of an earlier demo in it are overwritten.
        device: "cpu", "cuda", "cuda:1"; "auto" for the GPU if there is one.

    Returns:
        0 if batchproof's bits never changed and every receipt holds, else 1.

    Raises:
        RecordError: ``out`` holds an ``answers.jsonl`` that no demo wrote.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return _demo(model, out, device, _Plan())
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _demo(model: str | None, out: Path, device: str, plan: _Plan) -> int:
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    answers = out / "answers.jsonl"
    lines = read_lines(answers) if answers.exists() else ()
    if not all(isinstance(value, dict) and str(value.get("id")).startswith("demo-") for _, value in lines):
        raise RecordError(f"{answers} was not written by the demo; choose another folder with --out")
    answers.unlink(missing_ok=True)
    with tqdm(total=4 * (1 + len(plan.batch_sizes)), unit="run", leave=False, disable=None) as bar:
        columns = _measure_stock(model, device, plan, bar)
        gc.collect()  # the stock model, before another is loaded
        generator = Generator.load(model, device)
        columns.append(_measure_ours(generator, plan, bar))
    setting = f"{generator.name} model, {generator.environment['device']}, {generator.environment['dtype']}"
    _print_measured(columns, plan, setting)
    holding = _answer_and_verify(generator, answers, plan)
    _plot(columns, plan, setting, out / "demo.png")
    _write_figures(columns, plan, generator, holding, out / "demo.json")
    options = [*(["--model", model] if model else []), *(["--device", device] if device != "auto" else [])]
    print(f"Next: batchproof verify {shlex.join([str(answers), *options])}")
    invariant = holding and not any(columns[-1].changed)
    verdict = "batchproof's bits never changed" if invariant else "FAILED: batchproof's bits changed, please report it"
    print(f"{verdict} ({time.perf_counter() - start:.0f} s)")
    return 0 if invariant else 1


def _write_figures(columns: list[_Column], plan: _Plan, generator: Generator, holding: bool, path: Path) -> None:
    """What was measured, as JSON: for each way, the requests changed by batch size."""
    ways = {column.name: {"how": column.how, "changed": column.changed or column.failure} for column in columns}
    figures = {"requests": len(plan.prompts), "steps": plan.steps, "batch_sizes": list(plan.batch_sizes)}
    where = {"model": generator.name, "digest": generator.digest, "environment": generator.environment}
    path.write_text(json.dumps({**where, **figures, "receipts_hold": holding, "ways": ways}, indent=1) + "\n")


def _record(number: int, prompt: str, max_tokens: int, temperature: float = 0.0) -> PromptRecord:
    value = {"id": f"demo-{number}", "prompt": prompt, "max_tokens": max_tokens, "temperature": temperature}
    return parse_prompt({**value, "seed": number}, "")


def _measure(column: _Column, run_requests: _Run, plan: _Plan, bar: Any) -> _Column:
    """Fill ``column``: every request alone, then in each batch size among neighbours drawn anew."""
    numbers = list(range(len(plan.prompts)))
    bar.set_description(column.name)
    run_requests(numbers[:2], 2)  # compiles and allocates what later runs are timed with
    alone = run_requests(numbers, 1)
    bar.update()
    for size in plan.batch_sizes:
        order = random.Random(size).sample(numbers, len(numbers))
        start = time.perf_counter()
        together = run_requests(order, size)
        column.seconds.append(time.perf_counter() - start)
        column.changed.append(sum(alone[number] != together[number] for number in numbers))
        bar.update()
    return column


def _measure_ours(generator: Generator, plan: _Plan, bar: Any) -> _Column:
    requests = [generator.request(_record(number, prompt, plan.steps)) for number, prompt in enumerate(plan.prompts)]

    def receipts(order: Sequence[int], size: int) -> dict[int, Any]:
        completions = generator.engine(size, _BATCH_TOKENS).run([requests[number] for number in order])
        return {requests.index(completion.request): completion.chain.hexdigest for completion in completions}

    how = "continuous batching, no padding; a request's receipt hashes its logits at every step"
    return _measure(_Column("batchproof", how, "#0072B2"), receipts, plan, bar)


def _measure_stock(name: str | None, device: str, plan: _Plan, bar: Any) -> list[_Column]:
    """Three ways to run stock transformers, as its users do."""
    model, tokenizer = load_stock(name, device)
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    # Greedy and nothing else: a checkpoint's own penalties and end-of-text tokens would only cloud the comparison.
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=pad, max_new_tokens=plan.steps)
    prompts = [list(tokenizer(prompt)["input_ids"]) for prompt in plan.prompts]
    equal = [(ids * _EQUAL)[:_EQUAL] for ids in prompts]
    attention = model.config._attn_implementation
    same = f"every prompt cut or repeated to {_EQUAL} tokens, no padding"
    paged = "continuous batching, no padding; it gives no\n    logits: tokens and their log probabilities are compared"
    columns = [
        _Column("generate, padded", f"model.generate, {attention} attention, padding on the left", "#D55E00"),
        _Column("generate, equal lengths", f"model.generate, {attention} attention, {same}", "#E69F00"),
        _Column("generate_batch", f"model.generate_batch, paged {attention} attention, {paged}", "#CC79A7"),
    ]
    ways = (_generate(model, prompts), _generate(model, equal), _generate_batch(model, prompts, plan))
    for column, run_requests in zip(columns, ways, strict=True):
        try:
            _measure(column, run_requests, plan, bar)
        except Exception as error:  # a model that one way cannot run is still worth the others
            column.changed, column.seconds, column.failure = [], [], f"{type(error).__name__}: {error}"
    return columns


def _generate(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> _Run:
    """Stock ``generate`` on padded batches; a request's bits are its logits at every step."""
    pad = model.generation_config.pad_token_id

    def run_requests(order: Sequence[int], size: int) -> dict[int, Any]:
        found: dict[int, Any] = {}
        for first in range(0, len(order), size):
            ids = [prompts[number] for number in order[first : first + size]]
            longest = max(map(len, ids))
            rows = [[pad] * (longest - len(row)) + list(row) for row in ids]
            mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
            inputs, keep = (torch.tensor(value, device=model.device) for value in (rows, mask))
            out = model.generate(inputs, attention_mask=keep, return_dict_in_generate=True, output_logits=True)
            logits = torch.stack(out.logits, dim=1).cpu().contiguous().view(torch.uint8)
            for number, row in zip(order[first : first + size], logits, strict=True):
                found[number] = hashlib.sha256(row.numpy().data).digest()
        return found

    return run_requests


def _generate_batch(model: PreTrainedModel, prompts: Sequence[Sequence[int]], plan: _Plan) -> _Run:
    """Stock continuous batching; a request's bits are its tokens and their log probabilities."""
    groups = len(group_layers_by_attn_type(model.config)[0])
    pages = (max(map(len, prompts)) + plan.steps) // _PAGE + 2
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=plan.steps)

    def run_requests(order: Sequence[int], size: int) -> dict[int, Any]:
        config = ContinuousBatchingConfig(
            block_size=_PAGE, num_blocks=groups * pages * size + size, allow_block_sharing=False,
            max_batch_tokens=_BATCH_TOKENS, max_requests_per_batch=size,
            use_cuda_graph=False, use_async_batching=False, return_logprobs=True,
        )  # fmt: skip
        outputs = model.generate_batch([prompts[number] for number in order], greedy, config)
        submitted = sorted(outputs.items(), key=lambda item: int(item[0].rpartition("_")[2]))
        bits = [(output.generated_tokens, repr(output.logprobs)) for _, output in submitted]
        return dict(zip(order, bits, strict=True))

    return run_requests


def _labels(plan: _Plan) -> list[str]:
    total = len(plan.prompts)
    return ["1 (again)" if size == 1 else f"all {total}" if size == total else str(size) for size in plan.batch_sizes]


def _print_measured(columns: Sequence[_Column], plan: _Plan, setting: str) -> None:
    def grid(cells: Sequence[Sequence[object]]) -> None:
        print(f"{'batch size':>12}" + "".join(f"{column.name:>25}" for column in columns))
        for i, label in enumerate(_labels(plan)):
            print(f"{label:>12}" + "".join(f"{cell[i] if cell else 'failed':>25}" for cell in cells))

    total = len(plan.prompts)
    print(f"{setting}\n\nOf {total} requests, those whose logits changed in any bit against the same request alone")
    print(f"({plan.steps} tokens each, greedy; {len(columns) - 1} ways to run stock transformers, then batchproof):\n")
    grid([column.changed for column in columns])
    print("\nHow each was run, every batch size with an order of its own:")
    for column in columns:
        print(f"  {column.name}: {column.failure or column.how}")
    if (counts := [count for column in columns[:-1] for count in column.changed]) and not any(counts):
        print("Stock transformers never changed a bit here either: these kernels happen not to look at the batch.")
    print("\nNew tokens a second, start and prefill of every run included:\n")
    grid([[f"{total * plan.steps / seconds:.0f}" for seconds in column.seconds] for column in columns])


def _answer_and_verify(generator: Generator, path: Path, plan: _Plan) -> bool:
    """Write answers, every other one sampled, show some, and check their receipts; whether all hold."""
    prompts = enumerate(plan.prompts[: plan.answers])
    records = [_record(number, prompt, plan.answer_tokens, 0.8 * (number % 2)) for number, prompt in prompts]
    requests = {generator.request(record): record for record in records}
    print(f"\n{len(records)} answers, generated in one batch; some of them:\n")
    with AnswerFile(path) as file:
        for completion in generator.engine(len(records)).run(list(requests)):
            record = requests[completion.request]
            file.append(generator.answer(record, completion))
            if record in records[:4]:
                how = f"temperature {record.parameters.temperature:g}, receipt {completion.chain.hexdigest}"
                print(f"  {record.prompt} | {' '.join(completion.text.split())}\n    {how}")
    answers, unreadable = read_answers(path)
    with tqdm(total=2 * len(answers), desc="verify", unit="check", leave=False, disable=None) as bar:
        verdicts = unreadable + verify(generator, answers, on_record=lambda stage, verdict: bar.update())
    for verdict in verdicts:
        if verdict.outcome != HOLDS:
            print(f"  {verdict.id}: {verdict.outcome}: {verdict.reason}")
    holding = sum(verdict.outcome == HOLDS for verdict in verdicts)
    again = "recomputed alone, and among strangers in another order and batch size"
    print(f"\nReceipts {again}: {holding} of {len(verdicts)} hold.\n")
    return holding == len(records) == len(verdicts)


def _plot(columns: Sequence[_Column], plan: _Plan, setting: str, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No plot: matplotlib is not installed (pip install 'batchproof[bench]').")
        return
    total, width = len(plan.prompts), 0.8 / len(columns)
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for i, column in enumerate(columns):
        places = [group + (i - (len(columns) - 1) / 2) * width for group in range(len(column.changed))]
        label = column.name if column is columns[-1] else f"transformers {column.name}"
        bars = axes.bar(places, column.changed, width * 0.9, color=column.color, label=label)
        axes.bar_label(bars, color=column.color, fontweight="bold", fontsize=9, padding=1)
    axes.set_xticks(range(len(plan.batch_sizes)), _labels(plan))
    axes.set(xlabel="batch size", ylabel=f"requests changed, of {total}", ylim=(0, total * 1.08))
    axes.set_title("Requests whose logits change bits with the batch", loc="left", fontweight="bold", pad=22)
    axes.text(0, 1.02, setting, transform=axes.transAxes, color="0.35", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)
    print(f"Plot: {path}")
