"""Requests sent together: what a probe is asked among, in words, and as a program that shows what it changed."""

from __future__ import annotations

from dataclasses import dataclass

from .dialect import Dialect

__all__ = ["PLACES", "WORDS", "Probe", "Storm", "reproduction"]

PLACES = ("first", "middle", "last")
_WORDS = (
    "time year day man world life hand part child eye woman place work week case point group fact home water room "
    "month lot right study book word side head door"
)
WORDS = tuple(_WORDS.split())


@dataclass(frozen=True)
class Probe:
    """A prompt whose answer is looked at."""

    name: str
    prompt: str
    temperature: float = 0.0
    seed: int | None = None


@dataclass(frozen=True)
class Storm:
    """A probe among ``size - 1`` neighbours.

    Attributes:
        probe: what is compared.
        size: requests in all.
        place: the probe's, in the order of arrival: one of ``PLACES``.
        words: of a neighbour's prompt, fresh ones each time, so that no cache makes it shorter.
        max_tokens: of a neighbour's answer.
        spread_s: time over which the requests arrive.
    """

    probe: Probe
    size: int = 1
    place: str = "first"
    words: int = 0
    max_tokens: int = 0
    spread_s: float = 0.0

    @property
    def index(self) -> int:
        """The probe's place as a number."""
        return {"first": 0, "middle": self.size // 2, "last": self.size - 1}[self.place]

    def __str__(self) -> str:
        over = f", over {self.spread_s:.2f} s" if self.spread_s else ""
        return (
            f"the {self.probe.name} probe, {self.place} of {self.size} requests{over}; words in the others' prompts: "
            f"{self.words}, tokens in their answers: {self.max_tokens}"
        )


def reproduction(url: str, model: str, storm: Storm, max_tokens: int, scene: str, dialect: Dialect) -> str:
    """A Python program, without dependencies, that prints whether the probe's answer "differs" or is "the same".

    Args:
        url: of the server's completions.
        model: the name the server knows it by.
        storm: the case that differed.
        max_tokens: of the probe's answer.
        scene: "storm", or what was done with the probe alone: "repeat", "cache" or "part".
        dialect: how the server is asked.
    """
    probe = storm.probe
    seed = None if probe.seed is None else "i"
    done = _SCENES[scene].format(storm=storm, length=len(probe.prompt.split()), neighbour_seed=seed)
    return _PROGRAM.format(
        url=url, model=model, probe=probe, max_tokens=max_tokens, dialect=dialect, words=_WORDS, scene=done
    )


_PROGRAM = """\
import http.client, json, os, random, time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

URL = urlsplit({url!r})
PROBE = {probe.prompt!r}
WORDS = {words!r}.split()

def fresh(words):  # that no cache knows
    return " ".join(random.choices(WORDS, k=words))

def ask(prompt, max_tokens={max_tokens}, seed={probe.seed}, delay=0.0):
    time.sleep(delay)
    kind = http.client.HTTPSConnection if URL.scheme == "https" else http.client.HTTPConnection
    link = kind(URL.hostname, URL.port)
    body = dict(
        model={model!r}, max_tokens=max_tokens, temperature={probe.temperature}, {dialect.asked},
        **({{}} if seed is None else dict(seed=seed)),
    )
    key = os.environ.get("OPENAI_API_KEY", "none")
    headers = {{"Content-Type": "application/json", "Authorization": "Bearer " + key}}
    link.request("POST", URL.path, json.dumps(body), headers)
    choice = json.loads(link.getresponse().read(), parse_constant=str)["choices"][0]
    return {dialect.text}, choice["logprobs"], choice["finish_reason"]

{scene}
print("the same" if again == alone else "differs:", alone, again, sep="\\n")
"""
_SCENES = {
    "repeat": """\
answers = [ask(PROBE) for _ in range(10)]
alone = answers[0]
again = next((answer for answer in answers if answer != alone), alone)""",
    "cache": """\
PROBE = fresh({length})
alone, again = ask(PROBE), ask(PROBE)  # cold, then from the cache""",
    "part": """\
PROBE = fresh({length})
ask(" ".join(PROBE.split()[: {length} * 2 // 3]))
alone, again = ask(PROBE), ask(PROBE)  # in part from the cache, then wholly""",
    "storm": """\
ask(PROBE)
alone = ask(PROBE)  # from a warm cache, as the one below
with ThreadPoolExecutor({storm.size}) as pool:
    answers = []
    for i in range({storm.size}):
        delay = i * {storm.spread_s} / {storm.size}
        if i == {storm.index}:
            answers.append(pool.submit(ask, PROBE, delay=delay))
        else:
            answers.append(pool.submit(ask, fresh({storm.words}), {storm.max_tokens}, {neighbour_seed}, delay))
again = answers[{storm.index}].result()""",
}
