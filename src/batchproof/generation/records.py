"""Prompt and answer records: one JSON object a line.

A prompt record has ``prompt`` (a string) or ``messages`` (a chat), and may have ``id``, ``max_tokens``,
``temperature``, ``top_p``, ``top_k``, ``min_p``, ``repetition_penalty``, ``frequency_penalty``, ``presence_penalty``,
``seed``, ``stop``, ``logprobs`` and ``prompt_logprobs``. An answer record carries the prompt record it answers.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import RecordError

__all__ = ["AnswerFile", "Parameters", "PromptRecord", "digest_of", "parse_prompt", "read_lines", "read_prompts"]

# What every receipt has held from the first on. Other parameters are left out where they are neutral: an answer made
# before they were there has the receipt that it would be given now.
_ALWAYS = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")


@dataclass(frozen=True)
class Parameters:
    """How a prompt is continued, and what is told about it; the defaults are greedy and neutral. See ``Request``."""

    max_tokens: int = 64
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

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, less the neutral ones of those that are not ``_ALWAYS`` there."""
        kept = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name in _ALWAYS or getattr(self, field.name) != field.default
        }
        return {**kept, "stop": list(self.stop)}


@dataclass(frozen=True)
class PromptRecord:
    """A prompt record: an id, a string or a chat, and parameters."""

    id: str
    prompt: str | None
    messages: tuple[Mapping[str, Any], ...] | None
    parameters: Parameters

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values, without the id: what an answer carries as its request."""
        text = {"prompt": self.prompt} if self.messages is None else {"messages": [dict(m) for m in self.messages]}
        return {**text, **self.parameters.to_json()}


_Check = tuple[Callable[[Any], bool], str]


def _integer(low: int, high: int) -> _Check:
    return (
        lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high,
        f"an integer from {low} to {high}",
    )


def _number(low: float, high: float, zero: bool = False) -> _Check:
    def good(v: Any) -> bool:
        return isinstance(v, int | float) and not isinstance(v, bool) and (low <= v <= high or (zero and v == 0))

    return good, f"{'0 or ' if zero else ''}a number from {low:g} to {high:g}"


_CHECKS: dict[str, _Check] = {
    "max_tokens": _integer(1, 2**31 - 1),
    # They are used in fp32: what would round to zero, or divide logits to infinity, is refused.
    "temperature": _number(1e-6, 1e6, zero=True),
    "top_p": _number(1e-6, 1.0),
    "top_k": _integer(0, 2**31 - 1),
    "min_p": _number(1e-6, 1.0, zero=True),
    "repetition_penalty": _number(1e-3, 1e3),
    "frequency_penalty": _number(-2.0, 2.0),
    "presence_penalty": _number(-2.0, 2.0),
    "seed": _integer(-(2**63), 2**63 - 1),
    "stop": (
        lambda v: isinstance(v, list) and all(isinstance(s, str) and s for s in v),
        "a string or a list of strings, none empty",
    ),
    "logprobs": _integer(0, 2**31 - 1),
    "prompt_logprobs": _integer(0, 2**31 - 1),
}
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")


def parse_prompt(value: Any, default_id: str) -> PromptRecord:
    """A prompt record from a decoded line; RecordError says which field is wrong, what it holds and what it should."""
    if not isinstance(value, dict):
        raise RecordError(f"the line holds {type(value).__name__}, want a JSON object")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"the line holds half of a surrogate pair, want whole characters: {error}") from error
    unknown = sorted(set(value) - {"id", "prompt", "messages", *_CHECKS})
    if unknown:
        raise RecordError(f"unknown field {', '.join(unknown)}; want id, prompt or messages, {', '.join(_CHECKS)}")
    if ("prompt" in value) == ("messages" in value):
        raise RecordError("want either prompt or messages" + (", got both" if "prompt" in value else ", got neither"))
    prompt, messages = value.get("prompt"), value.get("messages")
    if "prompt" in value and not isinstance(prompt, str):
        raise RecordError(f"prompt is {prompt!r}, want a string")
    if "messages" in value and not _is_chat(messages):
        raise RecordError(f"messages is {messages!r}, want a list of objects with role and content strings")
    record_id = value.get("id", default_id)
    if not isinstance(record_id, str | int) or isinstance(record_id, bool) or record_id == "":
        raise RecordError(f"id is {record_id!r}, want a string or an integer")
    given = {name: value[name] for name in _CHECKS if value.get(name) is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    for name, field in given.items():
        good, wanted = _CHECKS[name]
        if not good(field):
            raise RecordError(f"{name} is {field!r}, want {wanted}")
    for name in set(_NUMBERS) & set(given):
        given[name] = float(given[name])
        if name not in _ALWAYS:
            given[name] += 0.0  # -0 is 0, and neutral
    parameters = Parameters(**{**given, "stop": tuple(given.get("stop", ()))})
    return PromptRecord(str(record_id), prompt, None if messages is None else tuple(messages), parameters)


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
        and all(isinstance(m.get("content"), str) for m in messages)
    )


def read_lines(path: Path) -> Iterator[tuple[int, Any | RecordError]]:
    """(line number from 1, decoded value or what is wrong with the line) of every line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:  # also a number or nesting past Python's limits
                yield number, RecordError(f"not JSON: {error}")


def read_prompts(path: Path) -> tuple[list[tuple[int, PromptRecord]], list[tuple[int, RecordError]]]:
    """The records of a file by line number, and what is wrong with the lines that are none."""
    good: list[tuple[int, PromptRecord]] = []
    bad: list[tuple[int, RecordError]] = []
    seen: dict[str, int] = {}
    for number, value in read_lines(path):
        try:
            if isinstance(value, RecordError):
                raise value
            record = parse_prompt(value, default_id=f"line-{number}")
            if record.id in seen:
                raise RecordError(f"id {record.id!r} is taken by line {seen[record.id]}")
            seen[record.id] = number
            good.append((number, record))
        except RecordError as error:
            bad.append((number, error))
    return good, bad


def _is_foreign(line: bytes) -> bool:
    """Whether a line without its end is whole JSON, but no answer: a prompt record, say."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return not isinstance(value, dict) or "receipt" not in value


def digest_of(answer: Mapping[str, Any]) -> Any:
    """The digest of the model that an answer record names; None if it names none."""
    model = answer.get("model")
    return model.get("digest") if isinstance(model, dict) else None


class AnswerFile:
    """Answers, appended whole: a line is one write to the kernel, so a killed process leaves no half line behind.

    Opening takes a lock, so that two runs cannot write one file, and cuts off an unfinished last line if another
    cause (a full disk, a lost host) left one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise RecordError(f"{path} is being written by another process") from error
        try:
            self._cut_unfinished_line()
        except BaseException:
            os.close(self._descriptor)
            raise

    def _cut_unfinished_line(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        tail = content[whole:]
        if not tail:
            return
        if not tail.startswith(b"{") or _is_foreign(tail):  # no part of an answer: not ours to cut
            number = content.count(b"\n") + 1
            raise self._not_an_answer(number)
        os.ftruncate(self._descriptor, whole)

    def read(self) -> dict[str, dict[str, Any]]:
        """The answers that are there, by id."""
        answers: dict[str, dict[str, Any]] = {}
        for number, value in read_lines(self.path):
            if not isinstance(value, dict) or not isinstance(value.get("id"), str) or "receipt" not in value:
                raise self._not_an_answer(number)
            answers[value["id"]] = value
        return answers

    def _not_an_answer(self, number: int) -> RecordError:
        return RecordError(f"{self.path} line {number} is not an answer record; move the file away to start anew")

    def append(self, answer: Mapping[str, Any]) -> None:
        """Write one answer and have the kernel keep it."""
        text = json.dumps(answer, ensure_ascii=False)
        for separator in ("\x85", "\u2028", "\u2029"):  # which some readers take for the end of a line
            text = text.replace(separator, f"\\u{ord(separator):04x}")
        line = text.encode() + b"\n"
        written = os.write(self._descriptor, line)
        while written < len(line):  # a full disk raises; a signal can shorten a write
            written += os.write(self._descriptor, line[written:])

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.fsync(self._descriptor)
        os.close(self._descriptor)
