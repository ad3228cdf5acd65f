"""Audit of an OpenAI-compatible server, from outside: does an answer depend on what else is asked meanwhile?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ..._version import __version__
from ...errors import ArgumentError
from ..report import Report, Series
from .client import Bounded, Client
from .dialect import CHAT, COMPLETIONS, TOP_LOGPROBS
from .relations import RELATIONS, Relations
from .storm import reproduction

__all__ = ["audit_server"]


def audit_server(
    base_url: str,
    model: str,
    *,
    max_concurrency: int = 300,
    max_requests: int = 4000,
    limit_s: float = 600.0,
    max_tokens: int = 16,
    chat: bool = False,
    allow_remote: bool = False,
    require: Sequence[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
    api_key: str | None = None,
    seed: int = 0,
) -> Report:
    """Audit a running server: its answers alone, repeated, and among others, compared exactly.

    A request that fails is never sent again: its relation is not exercised, and the audit cannot hold.

    Args:
        base_url: such as "http://127.0.0.1:8000/v1", with or without "/v1"; it answers with logprobs.
        model: the name the server knows it by.
        max_concurrency: the most requests at once, from 2.
        max_requests: completions asked for in all.
        limit_s: seconds for the whole audit.
        max_tokens: tokens of an answer.
        chat: ask ``chat/completions``, each prompt as a user's message, rather than ``completions``.
        allow_remote: whether the server may be on another machine.
        require: relations without which the audit fails; "concurrency" always is one.
        progress: called with (relation, completions asked for so far, ``max_requests``).
        api_key: sent as a bearer token; no report contains it.
        seed: of the prompts. A server with a cache remembers them: for a cold one, take another seed.

    Raises:
        ArgumentError: a URL that is none or is remote, a bound out of range, a relation that does not exist.
    """
    _check_bounds(max_concurrency, max_requests, max_tokens, limit_s)
    unknown = sorted(set(require) - set(RELATIONS))
    if unknown:
        raise ArgumentError(f"require names {', '.join(unknown)}, want of {', '.join(RELATIONS)}")
    began = time.monotonic()
    client = Client(base_url, model, api_key, allow_remote, CHAT if chat else COMPLETIONS)
    bounded = Bounded(client, max_requests, began + limit_s, progress)
    described, error = client.look(limit_s)
    relations = Relations(bounded, max_concurrency, max_tokens, described.get("max_model_len"), seed)
    if error is None:
        relations.run()
    if bounded.failures:  # whatever held: an answer that did not come is not an equal one
        error = f"{len(bounded.failures)} of {bounded.sent} requests were not answered: {bounded.failures[0].reason}"
    cause = next((finding for finding in relations.findings if finding.difference), None)
    shown = None
    if cause and cause.storm:
        shown = reproduction(client.url, model, cause.storm, max_tokens, cause.scene, client.dialect)
    return Report(
        "server",
        f"{model} at {base_url}",
        tuple(finding.check() for finding in relations.findings),
        not_observed=_not_observed(relations, client),
        series=_series(relations),
        reproduction=shown,
        required=tuple(dict.fromkeys(("concurrency", *require))),
        settings={
            "base_url": base_url, "model": model, "max_concurrency": max_concurrency, "max_requests": max_requests,
            "limit_s": limit_s, "max_tokens": max_tokens, "chat": chat, "allow_remote": allow_remote, "seed": seed,
        },
        environment={"server": str(described.get("owned_by", "unknown")), "batchproof": __version__},
        seconds=time.monotonic() - began,
        error=error,
    )  # fmt: skip


def _check_bounds(max_concurrency: int, max_requests: int, max_tokens: int, limit_s: float) -> None:
    least = {"max_concurrency": (max_concurrency, 2), "max_requests": (max_requests, 1), "max_tokens": (max_tokens, 1)}
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise ArgumentError(f"{name} is {value}, want at least {smallest}")
    if not limit_s > 0:
        raise ArgumentError(f"limit_s is {limit_s}, want more than 0")


def _not_observed(relations: Relations, client: Client) -> tuple[str, ...]:
    """What the answers lack."""
    answers = [answer for trials in relations.trials.values() for answer in trials]
    if not answers:
        return ()
    gaps = []
    if not any(answer.content["top logprobs"] for answer in answers):
        gaps.append("logprobs of tokens other than the answer's: the server sends none")
    if any(answer.degenerate for answer in answers):
        gaps.append(f"small differences: the {TOP_LOGPROBS} best logprobs of a token are all equal (dummy weights?)")
    if client.running is None:
        gaps.append("batches as the server forms them: it has no metric vllm:num_requests_running")
    return tuple(gaps)


def _series(relations: Relations) -> tuple[Series, ...]:
    """Classes of an answer over the concurrency: of a probe that has more than one, if any has."""
    probes = sorted(relations.classes, key=lambda probe: -len(relations.seen[probe]))
    if not probes:
        return ()
    points = {1: 0} | relations.classes[probes[0]]
    x, y = zip(*sorted(points.items()), strict=True)
    title = f"answers to the {probes[0].name} probe"
    return (Series(title, "classes", "requests at once", "class of the answer (0: alone)", x, y),)
