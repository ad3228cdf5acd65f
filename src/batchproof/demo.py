"""``batchproof demo``: whose logits change with the batch, measured here and now, and answers that prove theirs do not.

Every request is run alone, then among others in batches of each size and in another order. A request counts as
changed if any bit differs: of its logits at any step for ``generate`` and batchproof, of its tokens or their log
probabilities for ``generate_batch``, which gives no logits.
"""

from __future__ import annotations

import gc
import hashlib
import random
import shlex
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
_SHORT = """
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
_PROMPTS = (
    *" ".join(_SHORT.split()).split(" / "),
    "And they gathered the stones of the wall, and built. " * 2,
    "It was the first day of the month. " * 3,
    "The priests blew the trumpets before the ark. " * 4,
    "In the code there was a loop, and in the loop a test. " * 5,
    "Day unto day and night unto night. " * 8,
    "And the evening and the morning were another day. " * 10,
    "To the north and to the south, to the east and to the west. " * 8,
    "The disk was full and the daemon slept. " * 16,
)


@dataclass(frozen=True)
class _Plan:
    """What is measured. ``answers`` of the prompts are answered with ``answer_tokens`` tokens each."""

    prompts: Sequence[str] = _PROMPTS
    batch_sizes: Sequence[int] = (1, 2, 3, 8, 33, len(_PROMPTS))
    steps: int = 4
    answers: int = 12
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


# Runs requests, given by number, in batches of a size; returns each one's bits, whatever stands for them.
_Run = Callable[[Sequence[int], int], dict[int, Any]]


def run(model: str | None, out: Path, device: str = "auto") -> int:
    """Measure, print, and write ``demo.png`` and ``answers.jsonl`` into ``out``.

    Args:
        model: a folder or a hub id; None for the built-in model.
        out: a folder, made if need be. Answers of an earlier demo in it are overwritten.
        device: "cpu", "cuda", "cuda:1"; "auto" for the GPU if there is one.

    Returns:
        0 if batchproof's bits never changed and every receipt holds, else 1.

    Raises:
        RecordError: ``out`` holds an ``answers.jsonl`` that no demo wrote.
    """
    with _quiet_transformers():
        return _demo(model, out, device, _Plan())


def _demo(model: str | None, out: Path, device: str, plan: _Plan) -> int:
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    answers = out / "answers.jsonl"
    _remove_earlier(answers)
    with tqdm(
        total=4 * (1 + len(plan.batch_sizes)) * len(plan.prompts), unit="request", leave=False, disable=None
    ) as bar:
        columns = _measure_stock(model, device, plan, bar)
        gc.collect()  # the stock model, before another is loaded
        generator = Generator.load(model, device)
        columns.append(_measure_ours(generator, plan, bar))
    setting = f"{generator.name} model, {generator.environment['device']}, {generator.environment['dtype']}"
    _print_table(columns, plan, setting)
    _print_speed(columns, plan)
    holding = _answer_and_verify(generator, answers, plan)
    _plot(columns, plan, setting, out / "demo.png")
    options = "".join(f" {flag} {shlex.quote(value)}" for flag, value in _next_options(model, device))
    print(f"\nNext: batchproof verify {shlex.quote(str(answers))}{options}")
    varied = sum(columns[-1].changed)
    print(f"Took {time.perf_counter() - start:.0f} s.", end=" ")
    if varied or not holding:
        print("FAILED: batchproof's bits changed with the batch. This is a bug; please report it.")
        return 1
    print("batchproof's bits never changed.")
    return 0


def _next_options(model: str | None, device: str) -> Iterator[tuple[str, str]]:
    if model is not None:
        yield "--model", model
    if device != "auto":
        yield "--device", device


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bars and advice, which would stand between ours."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _remove_earlier(answers: Path) -> None:
    if not answers.exists():
        return
    values = [value for _, value in read_lines(answers)]
    if not all(isinstance(value, dict) and str(value.get("id", "")).startswith("demo-") for value in values):
        raise RecordError(f"{answers} was not written by the demo; choose another folder with --out")
    answers.unlink()


def _record(number: int, prompt: str, max_tokens: int, temperature: float = 0.0) -> PromptRecord:
    value = {"id": f"demo-{number}", "prompt": prompt, "max_tokens": max_tokens, "temperature": temperature}
    return parse_prompt({**value, "seed": number}, "")


def _measure(column: _Column, run_requests: _Run, plan: _Plan) -> _Column:
    """Fill ``column``: every request alone, then in each batch size among neighbours drawn anew."""
    numbers = list(range(len(plan.prompts)))
    run_requests(numbers[:2], 2)  # compiles and allocates what later runs are timed with
    alone = run_requests(numbers, 1)
    for size in plan.batch_sizes:
        order = random.Random(size).sample(numbers, len(numbers))
        start = time.perf_counter()
        together = run_requests(order, size)
        column.seconds.append(time.perf_counter() - start)
        column.changed.append(sum(alone[number] != together[number] for number in numbers))
    return column


def _measure_ours(generator: Generator, plan: _Plan, bar: Any) -> _Column:
    requests = [generator.request(_record(i, prompt, plan.steps)) for i, prompt in enumerate(plan.prompts)]
    numbers = {request.id: i for i, request in enumerate(requests)}

    def receipts(order: Sequence[int], size: int) -> dict[int, Any]:
        found = {}
        for completion in generator.engine(size, _BATCH_TOKENS).run([requests[number] for number in order]):
            found[numbers[completion.request.id]] = completion.chain.hexdigest
            bar.update()
        return found

    bar.set_description("batchproof")
    how = "continuous batching, prompts of differing lengths; a receipt hashes the logits of every step"
    return _measure(_Column("batchproof", how, "#0072B2"), receipts, plan)


def _measure_stock(name: str | None, device: str, plan: _Plan, bar: Any) -> list[_Column]:
    """Three ways to run stock transformers, as its users do."""
    model, tokenizer = load_stock(name, device)
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    # Greedy and nothing else: a checkpoint's own penalties and end-of-text tokens would only cloud the comparison.
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=pad, max_new_tokens=plan.steps)
    prompts = [list(tokenizer(prompt)["input_ids"]) for prompt in plan.prompts]
    equal = [(ids * _EQUAL)[:_EQUAL] for ids in prompts]
    attention = model.config._attn_implementation
    same = f"prompts cut or repeated to {_EQUAL} tokens each: no padding"
    paged = "continuous batching, prompts of differing lengths: no padding"
    columns = [
        _Column("generate, padded", f"model.generate, {attention} attention, padded on the left", "#D55E00"),
        _Column("generate, equal lengths", f"model.generate, {attention} attention, {same}", "#E69F00"),
        _Column("generate_batch", f"model.generate_batch, paged {attention} attention, {paged}", "#CC79A7"),
    ]
    ways = (_generate(model, prompts, bar), _generate(model, equal, bar), _generate_batch(model, prompts, plan, bar))
    for column, run_requests in zip(columns, ways, strict=True):
        bar.set_description(f"transformers {column.name}")
        try:
            _measure(column, run_requests, plan)
        except Exception as error:  # a model that one way cannot run is still worth the others
            column.changed, column.seconds, column.failure = [], [], f"{type(error).__name__}: {error}"
    return columns


def _generate(model: PreTrainedModel, prompts: Sequence[Sequence[int]], bar: Any) -> _Run:
    """Stock ``generate`` on padded batches; a request's bits are a hash of its logits at every step."""
    config = model.generation_config

    def batch(ids: list[Sequence[int]]) -> list[bytes]:
        longest = max(map(len, ids))
        padding = [longest - len(row) for row in ids]
        rows = [[config.pad_token_id] * n + list(row) for n, row in zip(padding, ids, strict=True)]
        mask = [[0] * n + [1] * (longest - n) for n in padding]
        inputs = {"input_ids": rows, "attention_mask": mask}
        out = model.generate(
            **{key: torch.tensor(value, device=model.device) for key, value in inputs.items()},
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits = torch.stack(out.logits, dim=1).cpu().contiguous().view(torch.uint8)
        return [hashlib.sha256(row.numpy().data).digest() for row in logits]

    def run_requests(order: Sequence[int], size: int) -> dict[int, Any]:
        found: dict[int, Any] = {}
        for first in range(0, len(order), size):
            numbers = order[first : first + size]
            found.update(zip(numbers, batch([prompts[number] for number in numbers]), strict=True))
            bar.update(len(numbers))
        return found

    return run_requests


def _generate_batch(model: PreTrainedModel, prompts: Sequence[Sequence[int]], plan: _Plan, bar: Any) -> _Run:
    """Stock continuous batching; a request's bits are its tokens and their log probabilities."""
    groups = len(group_layers_by_attn_type(model.config)[0])
    pages = max(len(ids) + plan.steps for ids in prompts) // _PAGE + 2

    def run_requests(order: Sequence[int], size: int) -> dict[int, Any]:
        config = ContinuousBatchingConfig(
            block_size=_PAGE,
            num_blocks=groups * pages * size + size,
            max_batch_tokens=_BATCH_TOKENS,
            max_requests_per_batch=size,
            allow_block_sharing=False,
            use_cuda_graph=False,
            use_async_batching=False,
            return_logprobs=True,
        )
        outputs = model.generate_batch([prompts[number] for number in order], continuous_batching_config=config)
        if len(outputs) != len(order):
            raise RuntimeError(f"{len(outputs)} answers to {len(order)} requests")
        bar.update(len(order))
        by_submission = sorted(outputs.items(), key=lambda item: int(item[0].rpartition("_")[2]))
        return {
            number: (tuple(output.generated_tokens), array("d", output.logprobs).tobytes())
            for number, (_, output) in zip(order, by_submission, strict=True)
        }

    return run_requests


def _labels(plan: _Plan) -> list[str]:
    named = {1: "1 (again)", len(plan.prompts): f"all {len(plan.prompts)}"}
    return [named.get(size, str(size)) for size in plan.batch_sizes]


def _print_table(columns: Sequence[_Column], plan: _Plan, setting: str) -> None:
    total = len(plan.prompts)
    print(f"{setting}\n\nOf {total} requests, those whose logits changed in any bit against the same request alone")
    print(f"({plan.steps} tokens each, greedy; every batch size has its own order of the requests):\n")
    _print_grid(columns, plan, [[str(count) for count in column.changed] for column in columns])
    print()
    for column in columns:
        print(f"  {column.name}: {column.failure or column.how}")
    print("  (generate_batch gives no logits: its tokens and their log probabilities are compared)")
    if not any(sum(column.changed) for column in columns[:-1]):
        print("Stock transformers did not change a bit here either: its kernels happen not to see this batch.")


def _print_speed(columns: Sequence[_Column], plan: _Plan) -> None:
    print("\nNew tokens a second, prefill included:\n")
    tokens = len(plan.prompts) * plan.steps
    _print_grid(columns, plan, [[f"{tokens / seconds:.0f}" for seconds in column.seconds] for column in columns])


def _print_grid(columns: Sequence[_Column], plan: _Plan, cells: Sequence[Sequence[str]]) -> None:
    print(f"{'batch size':>12}" + "".join(f"{column.name:>25}" for column in columns))
    for i, label in enumerate(_labels(plan)):
        print(f"{label:>12}" + "".join(f"{cell[i] if cell else 'failed':>25}" for cell in cells))


def _answer_and_verify(generator: Generator, path: Path, plan: _Plan) -> bool:
    """Write answers, every other one sampled, show some, and check their receipts; whether all hold."""
    records = [
        _record(number, prompt.strip(), plan.answer_tokens, temperature=0.8 * (number % 2))
        for number, prompt in enumerate(plan.prompts[: plan.answers])
    ]
    by_id = {record.id: record for record in records}
    print(f"\n{len(records)} answers, generated in one batch; some of them:\n")
    with AnswerFile(path) as file:
        for completion in generator.engine(len(records)).run([generator.request(record) for record in records]):
            record = by_id[completion.request.id]
            answer = generator.answer(record, completion)
            file.append(answer)
            if record in records[:4]:
                how = f"temperature {record.parameters.temperature:g}"
                print(f"  [{record.id}, {how}] {record.prompt} >> {' '.join(completion.text.split())}")
                print(f"      receipt {answer['receipt']}")
    answers, unreadable = read_answers(path)
    with tqdm(total=2 * len(answers), desc="verify", unit="check", leave=False, disable=None) as bar:
        verdicts = unreadable + verify(generator, answers, on_record=lambda stage, verdict: bar.update())
    for verdict in verdicts:
        if verdict.outcome != HOLDS:
            print(f"  {verdict.id}: {verdict.outcome}: {verdict.reason}")
    holding = sum(verdict.outcome == HOLDS for verdict in verdicts)
    print(
        f"\nRecomputed alone, and among strangers in another order and batch size: {holding} of {len(verdicts)} hold."
    )
    return holding == len(verdicts) == len(records)


def _plot(columns: Sequence[_Column], plan: _Plan, setting: str, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nNo plot: matplotlib is not installed (pip install 'batchproof[bench]').")
        return
    figure = Figure(figsize=(10, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(columns)
    for i, column in enumerate(columns):
        places = [group + (i - (len(columns) - 1) / 2) * width for group in range(len(column.changed))]
        owner = "" if column is columns[-1] else "transformers "
        bars = axes.bar(places, column.changed, width * 0.9, color=column.color, label=owner + column.name)
        axes.bar_label(bars, color=column.color, fontweight="bold", fontsize=9, padding=1)
    total = len(plan.prompts)
    axes.set_xticks(range(len(plan.batch_sizes)), _labels(plan))
    axes.set_ylim(0, total * 1.08)
    axes.axhline(total, color="0.7", linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xlabel("batch size")
    axes.set_ylabel(f"requests changed, of {total}")
    axes.set_title("Requests whose logits change bits when they are batched", loc="left", fontweight="bold", pad=24)
    axes.text(0, 1.02, setting, transform=axes.transAxes, color="0.35", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(columns), frameon=False)
    figure.savefig(path)
    print(f"\nPlot: {path}")
