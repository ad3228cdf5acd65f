"""An OpenAI-compatible server as seen from outside: requests sent together, and their answers, compared exactly."""

from __future__ import annotations

import http.client
import ipaddress
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any
from urllib.parse import SplitResult, urlsplit

from ...errors import ArgumentError
from ..report import Difference
from .dialect import Dialect

__all__ = ["Answer", "Bounded", "Client", "Failure", "Request", "StoppedError", "difference"]

_TIMEOUT_S = 120.0  # for one answer; the audit's own limit may leave less
_POLL_S = 0.02
_RUNNING = re.compile(r"^vllm:num_requests_running(?:\{[^}]*\})?\s+([0-9.eE+-]+)", re.MULTILINE)


@dataclass(frozen=True)
class Request:
    """A completion to ask for, ``delay_s`` after the first one of its group."""

    prompt: str
    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    delay_s: float = 0.0


@dataclass(frozen=True)
class Answer:
    """A completion, and when it was asked for and received (seconds of the monotonic clock).

    Attributes:
        content: field: elements, in the order in which they are compared.
        prompt_tokens: as the server counts them; 0 if it does not say.
        cached_tokens: how many of them came from a cache; None if the server does not say.
        degenerate: whether a position's best logprobs are all equal, as random or dummy weights may give.
    """

    content: dict[str, tuple[Any, ...]]
    prompt_tokens: int
    cached_tokens: int | None
    degenerate: bool
    sent: float
    done: float


@dataclass(frozen=True)
class Failure:
    """A request that was not answered, or not with a completion that can be compared."""

    reason: str


class Client:
    """Sends requests to one model of one server."""

    def __init__(self, base_url: str, model: str, api_key: str | None, allow_remote: bool, dialect: Dialect) -> None:
        parts = _checked(base_url, allow_remote)
        secure = parts.scheme == "https"
        self._connection = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._host, self._port = parts.hostname or "", parts.port or (443 if secure else 80)
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        self._key = api_key
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._model, self.dialect = model, dialect
        self.url = f"{parts.scheme}://{parts.netloc}{self._root}/v1/{dialect.path}"
        self.running: float | None = None  # the most that the server's own metric counted while requests were sent

    def look(self, limit_s: float) -> tuple[dict[str, Any], str | None]:
        """What the server says of the model, and why it cannot be audited, if so; looks for a metric of its load."""
        try:
            status, text = self._get(f"{self._root}/v1/models", limit_s)
            if status == 404:  # not every server lists its models
                return {}, None
            if status != 200:
                return {}, self._hide(f"GET /v1/models answered HTTP {status}: {text[:200]}")
            served = {str(model["id"]): model for model in json.loads(text)["data"]}
            with suppress(OSError, http.client.HTTPException):
                self.running = _count_running(self._get(f"{self._root}/metrics", limit_s)[1])
        except (OSError, http.client.HTTPException) as error:
            return {}, f"no answer from {self.url}: {error or type(error).__name__}"
        except (KeyError, TypeError, ValueError) as error:
            return {}, f"GET /v1/models answered something else than a list of models: {error!r}"
        if self._model not in served:
            return {}, f"model is {self._model!r}, want one that the server has: {', '.join(sorted(served))}"
        return served[self._model], None

    def send(self, requests: Sequence[Request], limit_s: float) -> list[Answer | Failure]:
        """Send requests in their order, without waiting for answers in between; then wait for all answers.

        Args:
            requests: by rising ``delay_s``. Those without one have their connections opened beforehand, so that they
                arrive as close together as they can.
            limit_s: time after which what has not come is a failure.
        """
        deadline = time.monotonic() + limit_s
        links = [self._connection(self._host, self._port, timeout=min(limit_s, _TIMEOUT_S)) for _ in requests]
        over = threading.Event()
        with ThreadPoolExecutor(len(requests) + 1) as pool:
            if self.running is not None and len(requests) > 1:
                pool.submit(self._watch, over)
            for link, request in zip(links, requests, strict=True):
                if not request.delay_s:
                    with suppress(OSError):  # said by whoever sends on it
                        link.connect()
            try:
                pending = self._send_all(pool, links, requests, deadline)
                wait(pending, max(0.0, deadline - time.monotonic()))
            finally:  # also when interrupted: nobody is to wait for answers any longer
                over.set()
                for link in links:
                    with suppress(OSError):
                        if link.sock is not None:
                            link.sock.shutdown(socket.SHUT_RDWR)
            return [future.result() for future in pending]

    def _send_all(
        self,
        pool: ThreadPoolExecutor,
        links: Sequence[http.client.HTTPConnection],
        requests: Sequence[Request],
        deadline: float,
    ) -> list[Future[Answer | Failure]]:
        begin = time.monotonic()
        pending = []
        for link, request in zip(links, requests, strict=True):
            time.sleep(max(0.0, min(begin + request.delay_s, deadline) - time.monotonic()))
            sent = time.monotonic()
            failure = self._ask(link, request)
            pending.append(pool.submit(self._receive, link, sent, failure))
        return pending

    def _ask(self, link: http.client.HTTPConnection, request: Request) -> Failure | None:
        body: dict[str, Any] = {
            "model": self._model, "max_tokens": request.max_tokens, "temperature": request.temperature,
            **self.dialect.ask(request.prompt),
        }  # fmt: skip
        if request.seed is not None:
            body["seed"] = request.seed
        try:
            link.request("POST", f"{self._root}/v1/{self.dialect.path}", json.dumps(body), self._headers)
        except (OSError, http.client.HTTPException) as error:
            return Failure(f"not sent: {error or type(error).__name__}")
        return None

    def _receive(self, link: http.client.HTTPConnection, sent: float, failure: Failure | None) -> Answer | Failure:
        try:
            if failure is not None:
                return failure
            response = link.getresponse()
            text = response.read().decode()
            done = time.monotonic()
            answer = _read(text, sent, done, self.dialect)
            if response.status != 200:
                answer = Failure(f"HTTP {response.status}: {text[:200]}")
            return Failure(self._hide(answer.reason)) if isinstance(answer, Failure) else answer
        except (OSError, http.client.HTTPException, UnicodeDecodeError) as error:
            after = time.monotonic() - sent
            return Failure(f"no whole answer after {after:.1f} s: {error or type(error).__name__}")
        finally:
            link.close()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(_POLL_S):
            with suppress(OSError, http.client.HTTPException):
                count = _count_running(self._get(f"{self._root}/metrics", 1.0)[1])
                self.running = max(self.running or 0.0, count or 0.0)

    def _get(self, path: str, limit_s: float) -> tuple[int, str]:
        link = self._connection(self._host, self._port, timeout=min(limit_s, 10.0))
        try:
            link.request("GET", path, headers=self._headers)
            response = link.getresponse()
            return response.status, response.read().decode(errors="replace")
        finally:
            link.close()

    def _hide(self, text: str) -> str:
        """A server may repeat the key in its complaint about it."""
        return text.replace(self._key, "(the key)") if self._key else text


class StoppedError(Exception):
    """Why a relation can be looked at no further: a bound, or a request that was not answered."""

    def __init__(self, reason: str, failed: bool = False) -> None:
        super().__init__(reason)
        self.failed = failed


@dataclass
class Bounded:
    """A client, and how much of it may be used.

    Attributes:
        client: what sends.
        max_requests: completions in all.
        deadline: seconds of the monotonic clock.
        progress: called with (stage, completions asked for so far, ``max_requests``).
        sent: completions asked for so far.
        failures: those not answered.
    """

    client: Client
    max_requests: int
    deadline: float
    progress: Callable[[str, int, int], None] | None
    sent: int = 0
    failures: list[Failure] = field(default_factory=list)
    _slowest: float = 0.0  # seconds that a group took

    def ask(self, stage: str, requests: Sequence[Request]) -> list[Answer]:
        """Send requests together; StoppedError if a bound forbids it, or unless all are answered."""
        left, count = self.deadline - time.monotonic(), len(requests)
        if self.sent + count > self.max_requests:
            raise StoppedError(f"max_requests is {self.max_requests}, {self.sent} were sent and {count} come next")
        if left <= 3 * self._slowest:  # what is cut off in the middle would count as not answered
            raise StoppedError(f"limit_s leaves {max(left, 0.0):.1f} s, and a group took up to {self._slowest:.1f} s")
        began = time.monotonic()
        replies = self.client.send(requests, left)
        self._slowest = max(self._slowest, time.monotonic() - began)
        self.sent += count
        if self.progress is not None:
            self.progress(stage, self.sent, self.max_requests)
        answers = [reply for reply in replies if isinstance(reply, Answer)]
        failures = [reply for reply in replies if isinstance(reply, Failure)]
        self.failures += failures
        if failures:
            reason = f"{len(failures)} of {count} requests sent together were not answered: {failures[0].reason}"
            raise StoppedError(reason, failed=True)
        return answers


def difference(probe: str, expected: Answer, found: Answer) -> Difference | None:
    """How two answers differ, exactly: the first of their fields that does, and where; None if none does."""
    for name, wanted in expected.content.items():
        pairs = list(zip_longest(wanted, found.content[name], fillvalue="(absent)"))
        differ = [index for index, (a, b) in enumerate(pairs) if a != b]
        if not differ:
            continue
        (a, b), numbers = pairs[differ[0]], [(_number(a), _number(b)) for a, b in pairs]
        largest = max((abs(a - b) for a, b in numbers if a is not None and b is not None), default=None)
        return Difference(
            f"{name} of the {probe} probe", (differ[0],), _plain(a), _plain(b), len(differ), len(pairs), None, largest
        )
    return None


def _number(element: object) -> float | None:
    """The logprob that an element is or carries; None for tokens and other text."""
    value = element[1] if isinstance(element, tuple) else element
    return float(value) if isinstance(value, (int, float)) else None


def _plain(element: object) -> float | str:
    """An element as a report holds it."""
    if isinstance(element, tuple):
        return f"{element[0]!r}: {element[1]}"
    return element if isinstance(element, (float, str)) else json.dumps(element)


def _checked(base_url: str, allow_remote: bool) -> SplitResult:
    """The URL's parts; ArgumentError if it is none, carries a secret, or leaves this machine without leave to."""
    try:
        parts = urlsplit(base_url)
        port = parts.port
    except ValueError as error:
        raise ArgumentError(f"base_url is {base_url!r}: {error}") from error
    if parts.username is not None or parts.password is not None:
        raise ArgumentError("base_url carries a user or a password; want api_key, which no report repeats")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ArgumentError(f"base_url is {base_url!r}, want such as 'http://127.0.0.1:8000/v1'")
    if allow_remote:
        return parts
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise ArgumentError(f"base_url's host {parts.hostname!r} has no address: {error}") from error
    remote = sorted(a for a in found if not ipaddress.ip_address(a.partition("%")[0]).is_loopback)
    if remote:
        raise ArgumentError(
            f"base_url is {base_url!r}, at {', '.join(remote)}; want this machine (localhost, 127.0.0.0/8, ::1), or "
            "allow_remote=True"
        )
    return parts


def _read(text: str, sent: float, done: float, dialect: Dialect) -> Answer | Failure:
    """An answer's JSON; NaN and infinities are read as their names, which compare equal to themselves."""
    try:
        body = json.loads(text, parse_constant=str)
        (choice,) = body["choices"]
        said = dialect.read(choice)
        if said is None:
            return Failure(f"an answer without logprobs: {json.dumps(choice['logprobs'])[:200]}")
        content = {
            "tokens": said.tokens,
            "logprobs": said.logprobs,
            "top logprobs": tuple(pair for top in said.tops for pair in sorted(top.items())),  # JSON has no order
            "text": (said.text,),
            "finish reason": (choice["finish_reason"],),
        }
        usage = body.get("usage") or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        flat = any(len(top) > 1 and len(set(top.values())) == 1 for top in said.tops)
        return Answer(content, int(usage.get("prompt_tokens") or 0), cached, flat, sent, done)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return Failure(f"not a completion ({error!r}): {text[:200]}")


def _count_running(metrics: str) -> float | None:
    """Requests that all engines behind the server run now, by vLLM's gauge; None if there is no such gauge."""
    found = _RUNNING.findall(metrics)
    return sum(map(float, found)) if found else None
