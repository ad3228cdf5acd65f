"""Checking answers again: each record is recomputed alone and in hostile company, and compared to the bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RecordError
from ..integrations.transformers import Request
from .model import Generator
from .records import PromptRecord, digest_of, parse_prompt, read_lines

__all__ = ["DIFFERS", "ELSEWHERE", "HOLDS", "UNREADABLE", "Verdict", "read_answers", "verify"]

HOLDS = "holds"
DIFFERS = "differs"
ELSEWHERE = "made elsewhere"  # another environment: its receipt says nothing here
UNREADABLE = "unreadable"
_COMPARED = ("receipt", "token_ids", "logprobs", "finish_reason", "text")
_IF_ASKED_FOR = ("top_logprobs", "prompt_logprobs")


@dataclass(frozen=True)
class Verdict:
    """What became of one record: its id, the outcome, and why."""

    id: str
    outcome: str
    reason: str = ""


@dataclass(frozen=True)
class _Answer:
    record: PromptRecord
    value: dict[str, Any]


def read_answers(path: Path) -> tuple[list[_Answer], list[Verdict]]:
    """The answers of a file, and a verdict on each line that is none."""
    answers: list[_Answer] = []
    verdicts: list[Verdict] = []
    seen: set[str] = set()
    for number, value in read_lines(path):
        try:
            if isinstance(value, RecordError):
                raise value
            if not isinstance(value, dict) or not isinstance(value.get("request"), dict):
                raise RecordError("not an answer record: want a JSON object with the field request")
            missing = [key for key in ("id", "environment", "model", *_COMPARED) if key not in value]
            if missing:
                raise RecordError(f"not an answer record: {', '.join(missing)} missing")
            if not isinstance(value["id"], str) or not isinstance(value["token_ids"], list):
                raise RecordError("not an answer record: want id to be a string and token_ids a list")
            if value["id"] in seen:
                raise RecordError(f"id {value['id']!r} is there twice")
            seen.add(value["id"])
            answers.append(_Answer(parse_prompt({**value["request"], "id": value["id"]}, ""), value))
        except RecordError as error:
            verdicts.append(Verdict(f"line {number}", UNREADABLE, str(error)))
    return answers, verdicts


def verify(
    generator: Generator,
    answers: Sequence[_Answer],
    seed: int = 0,
    on_record: Callable[[str, Verdict | None], None] = lambda stage, verdict: None,
) -> list[Verdict]:
    """Recompute ``answers`` alone and in company; a record holds if both give its every bit.

    Args:
        generator: the model to recompute with.
        answers: what ``read_answers`` gave, or a sample of it.
        seed: of the order, the neighbours and the batch sizes.
        on_record: called with ("alone" or "in company", its verdict so far) as each record is recomputed.
    """
    failures: dict[str, str] = {}
    runnable: dict[str, tuple[_Answer, Request]] = {}
    alone = generator.engine(batch_size=1)
    for answer in answers:
        digest = digest_of(answer.value)
        if digest != generator.digest:
            failures[answer.record.id] = (
                f"it was made by a model with digest {digest}, this one's is {generator.digest}"
            )
            continue
        try:
            request = generator.request(answer.record)
            alone.check(request)
            runnable[answer.record.id] = (answer, request)
        except RecordError as error:
            failures[answer.record.id] = str(error)
    for stage, engine, requests in _stages(generator, [request for _, request in runnable.values()], seed):
        for completion in engine.run(requests):
            found = runnable.get(completion.request.id)
            if found is None or found[1] is not completion.request:  # a neighbour
                continue
            answer, _ = found
            difference = _difference(answer.value, generator.answer(answer.record, completion))
            if difference:
                failures.setdefault(answer.record.id, f"{difference} {stage}")
            on_record(stage, _verdict(answer, failures, generator))
    return [_verdict(answer, failures, generator) for answer in answers]


def _stages(generator: Generator, requests: list[Request], seed: int) -> list[tuple[str, Any, list[Request]]]:
    """Alone; then shuffled, among neighbours of other lengths, in a batch of another size with short prefill chunks."""
    if not requests:
        return []
    rng = random.Random(seed)
    vocab = generator.model.config.vocab_size
    room = generator.model.config.max_position_embeddings - 40  # for what a neighbour generates
    crowd = list(requests)
    for number in range(max(8, len(requests) // 4)):
        length = min(rng.choice((1, 2, 15, 16, 17, 33, 100, 257)), max(room, 1))
        prompt = tuple(rng.randrange(vocab) for _ in range(length))
        crowd.append(
            Request(
                f"\0neighbour {number}", prompt, rng.randint(1, 40), rng.choice((0.0, 1.5)), seed=rng.getrandbits(32),
                min_p=rng.choice((0.0, 0.1)), repetition_penalty=rng.choice((1.0, 1.5)),
                prompt_logprobs=rng.choice((None, 3)),
            )
        )  # fmt: skip
    rng.shuffle(crowd)
    size = min(len(crowd), rng.randint(9, 48))
    return [
        ("alone", generator.engine(batch_size=1), requests),
        ("in company", generator.engine(size, max_batch_tokens=rng.randint(size, 4 * size)), crowd),
    ]


def _difference(given: dict[str, Any], computed: dict[str, Any]) -> str:
    """Which field of the answer differs, in the order that says most; empty if none does."""
    ours, theirs = computed["token_ids"], given["token_ids"]
    if theirs != ours:
        same = next(
            (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
        )
        return f"token {same} differs"
    wrong = [field for field in (*_COMPARED, *_IF_ASKED_FOR) if given.get(field) != computed.get(field)]
    return f"{', '.join(wrong)} differ{'s' if len(wrong) == 1 else ''}" if wrong else ""


def _verdict(answer: _Answer, failures: dict[str, str], generator: Generator) -> Verdict:
    there, here = answer.value["environment"], generator.environment
    failure = failures.get(answer.record.id, "")
    if there != here:
        changed = [
            f"{k} {there.get(k) if isinstance(there, dict) else there} there, {v} here"
            for k, v in here.items()
            if not isinstance(there, dict) or there.get(k) != v
        ]
        found = f"recomputed here, {failure}" if failure else "recomputed here, every bit is the same"
        return Verdict(answer.record.id, ELSEWHERE, f"{'; '.join(changed)}; {found}")
    return Verdict(answer.record.id, DIFFERS if failure else HOLDS, failure)
