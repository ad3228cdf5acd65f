"""The two ways of asking an OpenAI-compatible server for a continuation with logprobs: completions, and chat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["CHAT", "COMPLETIONS", "TOP_LOGPROBS", "Dialect", "Said"]

TOP_LOGPROBS = 5  # what OpenAI's own completions allow


class Said(NamedTuple):
    """What an answer holds: for every token itself, its logprob, and the best logprobs at its place by token."""

    text: object
    tokens: tuple[Any, ...]
    logprobs: tuple[Any, ...]
    tops: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Dialect:
    """One of the two.

    Attributes:
        path: below /v1.
        ask: what a request's body has for a prompt, besides what both have in common.
        read: a choice of an answer; None if it has no logprobs. KeyError, TypeError: it is none.
        asked: ``ask`` as arguments of a Python call, in a reproduction.
        text: where a choice has its text, as a Python expression.
    """

    path: str
    ask: Callable[[str], dict[str, Any]]
    read: Callable[[dict[str, Any]], Said | None]
    asked: str
    text: str


def _read_completion(choice: dict[str, Any]) -> Said | None:
    found = choice["logprobs"]
    if not isinstance(found, dict) or not found.get("token_logprobs"):
        return None
    tops = tuple(top or {} for top in found.get("top_logprobs") or ())
    return Said(choice["text"], tuple(found["tokens"]), tuple(found["token_logprobs"]), tops)


def _read_chat(choice: dict[str, Any]) -> Said | None:
    found = (choice["logprobs"] or {}).get("content")
    if not found:
        return None
    tokens, logprobs = (tuple(entry[name] for entry in found) for name in ("token", "logprob"))
    tops = ({top["token"]: top["logprob"] for top in entry.get("top_logprobs") or ()} for entry in found)
    return Said(choice["message"]["content"], tokens, logprobs, tuple(top for top in tops if top))


COMPLETIONS = Dialect(
    "completions",
    lambda prompt: {"prompt": prompt, "logprobs": TOP_LOGPROBS},
    _read_completion,
    f"prompt=prompt, logprobs={TOP_LOGPROBS}",
    'choice["text"]',
)
CHAT = Dialect(
    "chat/completions",
    lambda prompt: {
        "messages": [{"role": "user", "content": prompt}], "logprobs": True, "top_logprobs": TOP_LOGPROBS,
    },
    _read_chat,
    f'messages=[dict(role="user", content=prompt)], logprobs=True, top_logprobs={TOP_LOGPROBS}',
    'choice["message"]["content"]',
)  # fmt: skip
