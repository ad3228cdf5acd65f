"""From a file of prompts to a file of answers, resumable at any point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import RecordError
from ..integrations.transformers import Request
from .model import Generator
from .records import AnswerFile, PromptRecord, digest_of, read_prompts

__all__ = ["Summary", "generate"]


@dataclass
class Summary:
    """What a run did: answers written now and found there, and the malformed lines by number."""

    written: int = 0
    found: int = 0
    malformed: list[tuple[int, str]] = field(default_factory=list)


def generate(
    generator: Generator,
    prompts: Path,
    answers: Path,
    batch_size: int,
    max_batch_tokens: int = 512,
    on_start: Callable[[int, int], None] = lambda pending, found: None,
    on_tokens: Callable[[int], None] = lambda count: None,
    on_answer: Callable[[], None] = lambda: None,
) -> Summary:
    """Answer every prompt record that ``answers`` does not have an answer to yet.

    Each answer is appended as soon as it is finished, so stopping at any point loses none that was, and calling again
    does the rest. Malformed records are reported and the others still run.

    Raises:
        RecordError: ``answers`` is no answer file, is being written by another process, or holds an answer to
            another prompt, other parameters or another model under the same id.
    """
    records, bad = read_prompts(prompts)
    engine = generator.engine(batch_size, max_batch_tokens)
    summary = Summary(malformed=[(number, str(error)) for number, error in bad])
    with AnswerFile(answers) as file:
        there = file.read()
        pending: dict[str, PromptRecord] = {}
        requests: list[Request] = []
        for number, record in records:
            if record.id in there:
                _check_same(record, there[record.id], generator, answers)
                summary.found += 1
                continue
            try:
                request = generator.request(record)
                engine.check(request)
            except RecordError as error:
                summary.malformed.append((number, str(error)))
                continue
            pending[record.id] = record
            requests.append(request)
        on_start(len(requests), summary.found)
        for completion in engine.run(requests, on_tokens):
            file.append(generator.answer(pending[completion.request.id], completion))
            summary.written += 1
            on_answer()
    summary.malformed.sort()
    return summary


def _check_same(record: PromptRecord, answer: dict[str, object], generator: Generator, path: Path) -> None:
    """RecordError unless ``answer`` answers this very record by this very model."""
    if answer.get("request") != record.to_json():
        raise RecordError(
            f"{path} holds an answer to another prompt or other parameters under id {record.id!r}; "
            "give the record another id or write to another file"
        )
    digest = digest_of(answer)
    if digest != generator.digest:
        raise RecordError(
            f"{path} holds answers of a model with digest {digest}, this one's is {generator.digest}; "
            "write to another file"
        )
