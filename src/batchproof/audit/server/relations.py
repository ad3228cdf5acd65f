"""The relations of a server's audit: a probe is asked alone, then among others, and its answers are compared."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..report import HOLDS, NOT_EXERCISED, VARIES, Check, Difference
from .client import Answer, Bounded, Request, StoppedError, difference
from .storm import PLACES, WORDS, Probe, Storm

__all__ = ["RELATIONS", "Finding", "Relations"]

RELATIONS = (
    "repeat", "cache", "concurrency", "long neighbours", "short neighbours", "staggered arrivals", "seeded sampling",
)  # fmt: skip
_BRIEF = 4  # words of a neighbour's prompt: fewer than any probe's, so that its length is not what changes an answer
_LENGTHS = (16, 64, 256, 512)  # words of long neighbours' prompts
_TRIALS = 3  # of a probe alone: the first may be cold, two warm ones tell repetition from a cache
_CONFIRM = 2  # more tries on either side of a threshold: a batch may form by chance
_ROUNDS = 3  # bisections, if such a try shows the threshold to be lower
_SERIAL = 0.7  # a group that takes this share of its requests' time one by one is not said to have been a batch


@dataclass
class Finding:
    """What one relation has shown so far.

    Attributes:
        relation: its name.
        cases: answers compared.
        notes: for its detail.
        difference: of the smallest case that differs.
        storm: that case.
        scene: how it is to be shown: "storm", or what was done with the probe alone.
        threshold, unit: as in a ``Check``.
        failed: whether a request was not answered.
        largest: requests sent together, at most.
        peak: how many of them were unanswered at once, at most.
    """

    relation: str
    cases: int = 0
    notes: list[str] = field(default_factory=list)
    difference: Difference | None = None
    storm: Storm | None = None
    scene: str = ""
    threshold: int | None = None
    unit: str = "requests"
    failed: bool = False
    largest: int = 0
    peak: int = 0

    def compare(self, storm: Storm, expected: Answer, found: Answer, scene: str = "storm") -> bool:
        """Whether the probe's answer is another; the smallest case in which it is is kept."""
        self.cases += 1
        differs = difference(storm.probe.name, expected, found)
        if differs is None:
            return False
        if self.storm is None or (storm.size, storm.words) < (self.storm.size, self.storm.words):
            self.difference, self.storm, self.scene = differs, storm, scene
        return True

    def check(self) -> Check:
        """The report's line."""
        exercised = self.cases > 0 and not self.failed
        verdict = VARIES if self.difference else HOLDS if exercised else NOT_EXERCISED
        detail = "; ".join(self.notes)
        return Check(self.relation, verdict, self.cases, detail, self.threshold, self.unit, difference=self.difference)


class Relations:
    """An audit's probes, their answers alone, and what each relation found.

    Args:
        bounded: what to ask with.
        max_concurrency: the most requests at once.
        max_tokens: of an answer.
        max_model_len: tokens of prompt and answer that the model takes, if known.
        seed: of prompts.

    Attributes:
        findings: one for each of ``RELATIONS``, in their order, after ``run``.
        trials: a probe's answers alone.
        seen: the different contents of a probe's answers; the first is the one alone.
        classes: for a probe, at each concurrency, which of these.
    """

    def __init__(self, bounded: Bounded, max_concurrency: int, max_tokens: int, max_model_len: object, seed: int):
        self._bounded, self._max_concurrency, self._max_tokens = bounded, max_concurrency, max_tokens
        self._rng = random.Random(seed)
        self._longest = _LENGTHS[-1]
        if isinstance(max_model_len, int):
            self._longest = min(self._longest, max(1, (max_model_len - max_tokens) // 2))  # a word may be two tokens
        lengths = {"short": 5, "medium": 40, "long": min(300, self._longest)}
        self._probes = [Probe(name, self._text(words)) for name, words in lengths.items()]
        self._probes.append(Probe("seeded", self._text(12), 0.8, self._rng.getrandbits(31)))
        self.findings: list[Finding] = []
        self.trials: dict[Probe, list[Answer]] = {}
        self.seen: dict[Probe, list[dict[str, Any]]] = {}
        self.classes: dict[Probe, dict[int, int]] = {}
        self._cold: set[Probe] = set()  # whose answer from a cache is another
        self._formed = False  # whether any storm was faster than its requests one by one
        self._neighbour_tokens: dict[int, int] = {}  # for words of a neighbour's prompt, what the server makes of them

    def run(self) -> None:
        """Look at every relation, each as far as bounds and answers allow."""
        steps = (
            self._repeat, self._cache, self._concurrency, self._long, self._short, self._staggered, self._seeded,
        )  # fmt: skip
        for relation, step in zip(RELATIONS, steps, strict=True):
            finding = Finding(relation)
            self.findings.append(finding)
            try:
                step(finding)
            except StoppedError as stopped:
                finding.notes.append(f"stopped: {stopped}")
                finding.failed = stopped.failed
            self._conclude(finding)

    def _text(self, words: int) -> str:
        return " ".join(self._rng.choices(WORDS, k=words))

    def _alone(self, finding: Finding, probe: Probe) -> Answer:
        request = Request(probe.prompt, self._max_tokens, probe.temperature, probe.seed)
        return self._bounded.ask(finding.relation, [request])[0]

    def _steady(self, seeded: bool = False) -> list[Probe]:
        """Probes whose answer alone is the same again: of the others', nothing can be said of the batch."""
        return [
            probe
            for probe, trials in self.trials.items()
            if len(trials) == _TRIALS
            and trials[-2].content == trials[-1].content
            and (probe.seed is not None) == seeded
        ]

    def _repeat(self, finding: Finding) -> None:
        """Each probe alone, and again; an answer from a cache is left to the relation "cache"."""
        for probe in self._probes:
            trials = self.trials.setdefault(probe, [])
            for _ in range(_TRIALS):
                trials.append(self._alone(finding, probe))
            self.seen[probe] = [trials[-1].content]
            like = [(a, b) for a, b in itertools.pairwise(trials) if a.cached_tokens == b.cached_tokens]
            if sum(finding.compare(Storm(probe), a, b, "repeat") for a, b in like):
                finding.notes.append(f"the {probe.name} probe alone, asked again, has another answer, batch or not")
        if finding.difference and all(trials[0].cached_tokens is None for trials in self.trials.values()):
            finding.notes.append("the server reports no cached_tokens, so that this may also be its cache")

    def _cache(self, finding: Finding) -> None:
        """A cold prompt's answer against one from the cache; one with a part of it in the cache against the whole."""
        steady = self._steady() + self._steady(seeded=True)
        for probe in steady:
            cold, warm = self.trials[probe][0], self.trials[probe][-1]
            if cold.cached_tokens != 0 or not warm.cached_tokens:
                continue
            if finding.compare(Storm(probe), cold, warm, "cache"):
                self._cold.add(probe)
                finding.notes.append(f"{warm.cached_tokens} cached tokens change the {probe.name} probe's answer")
        if self._probes[2] in steady:
            words = self._text(len(self._probes[2].prompt.split())).split()
            probe = replace(self._probes[2], prompt=" ".join(words))
            self._alone(finding, replace(probe, prompt=" ".join(words[: len(words) * 2 // 3])))
            part, whole = self._alone(finding, probe), self._alone(finding, probe)
            counts = (part.cached_tokens or 0, whole.cached_tokens or 0)
            if 0 < counts[0] < counts[1] and finding.compare(Storm(probe), part, whole, "part"):
                finding.notes.append("{} and {} cached tokens of one prompt give different answers".format(*counts))
        if not finding.cases:
            counted = {answer.cached_tokens for trials in self.trials.values() for answer in trials}
            finding.notes.append(
                "the server reports no usage.prompt_tokens_details.cached_tokens" if counted <= {None}
                else "the first answers already came from the cache: take another seed" if counted - {None, 0}
                else "no prompt came from a cache"
            )  # fmt: skip

    def _concurrency(self, finding: Finding) -> None:
        self._climb(finding, self._steady())

    def _seeded(self, finding: Finding) -> None:
        self._climb(finding, self._steady(seeded=True))

    def _climb(self, finding: Finding, probes: Sequence[Probe]) -> None:
        """Rising concurrency, each probe in turn first, middle and last; then the threshold of the first change."""
        sizes = sorted({*(2**n for n in range(1, self._max_concurrency.bit_length())), self._max_concurrency})
        for i, (before, size) in enumerate(zip([1, *sizes], sizes, strict=False)):
            for j, probe in enumerate(probes):
                storm = Storm(probe, size, PLACES[(i + j) % 3], _BRIEF, self._max_tokens)
                if self._changes(finding, storm):
                    self._bisect(finding, storm, "size", before, floor=1)
                    for larger in sizes[i + 1 :]:  # for the plot: which answers there are above the threshold
                        self._changes(finding, replace(storm, size=larger))
                    return

    def _long(self, finding: Finding) -> None:
        """A few neighbours with ever longer prompts; then the length from which on they change the answer."""
        lengths = sorted({min(words, self._longest) for words in _LENGTHS})
        for i, (before, words) in enumerate(zip([_BRIEF, *lengths], lengths, strict=False)):
            for j, probe in enumerate(self._steady()):
                storm = Storm(probe, min(4, self._max_concurrency), PLACES[(i + j) % 3], words, self._max_tokens)
                if self._changes(finding, storm):
                    finding.unit = "prompt tokens a neighbour"
                    self._bisect(finding, storm, "words", before, floor=0)
                    if finding.threshold is not None:
                        finding.threshold = self._neighbour_tokens[finding.threshold]
                    return

    def _short(self, finding: Finding) -> None:
        """Neighbours of one word, who leave after their first token: the batch shrinks around the probe."""
        for i, size in enumerate(sorted({min(size, self._max_concurrency) for size in (4, 32)})):
            for j, probe in enumerate(self._steady()):
                if self._changes(finding, Storm(probe, size, PLACES[(i + j) % 3], words=1, max_tokens=1)):
                    return

    def _staggered(self, finding: Finding) -> None:
        """Neighbours who arrive one by one, with prompts to be worked on while the probe is decoded."""
        for probe in self._steady():
            alone = self.trials[probe][-1]
            size, time_alone = min(5, self._max_concurrency), alone.done - alone.sent
            if self._changes(finding, Storm(probe, size, "first", 40, self._max_tokens, time_alone)):
                return

    def _changes(self, finding: Finding, storm: Storm) -> bool:
        """Ask the probe among its neighbours; whether its answer is another than alone."""
        probe, requests = storm.probe, []
        for i in range(storm.size):
            delay = storm.spread_s * i / storm.size
            if i == storm.index:
                requests.append(Request(probe.prompt, self._max_tokens, probe.temperature, probe.seed, delay))
            else:
                seed = None if probe.seed is None else self._rng.getrandbits(31)
                prompt = self._text(storm.words)
                requests.append(Request(prompt, storm.max_tokens, probe.temperature, seed, delay))
        answers = self._bounded.ask(finding.relation, requests)
        found = answers.pop(storm.index)
        self._neighbour_tokens[storm.words] = max(answer.prompt_tokens for answer in answers)
        self._measure(finding, storm, found, answers)
        alone = self.trials[probe][-1]
        if probe in self._cold and found.cached_tokens != alone.cached_tokens:
            return False  # its cache, which changes this answer anyway, held another part of it
        if finding.relation in ("concurrency", "seeded sampling"):
            seen = self.seen[probe]
            if found.content not in seen:
                seen.append(found.content)
            self.classes.setdefault(probe, {})[storm.size] = seen.index(found.content)
        return finding.compare(storm, alone, found)

    def _measure(self, finding: Finding, storm: Storm, probe: Answer, others: Sequence[Answer]) -> None:
        """How many requests were unanswered at once with the probe, and whether they went faster than one by one."""
        everyone = [probe, *others]
        moments = [answer.sent for answer in everyone if probe.sent <= answer.sent < probe.done]
        finding.peak = max(finding.peak, *(sum(a.sent <= t < a.done for a in everyone) for t in moments))
        finding.largest = max(finding.largest, storm.size)
        if storm.max_tokens == self._max_tokens and not storm.spread_s:
            one = min(a.done - a.sent for trials in self.trials.values() for a in trials)
            took = max(a.done for a in everyone) - min(a.sent for a in everyone)
            self._formed |= took < _SERIAL * storm.size * one

    def _bisect(self, finding: Finding, storm: Storm, number: Literal["size", "words"], low: int, floor: int) -> None:
        """The smallest number from which the answer changes, tried again on both sides, since batches form by chance.

        Args:
            finding: gets the threshold if it is the same each time, else a note.
            storm: a case in which it was seen to change.
            number: which of its numbers to change.
            low: at which it was seen not to change.
            floor: at which it cannot change: that is the answer alone.
        """

        def changes(value: int) -> bool:
            case = replace(storm, size=value) if number == "size" else replace(storm, words=value)
            return self._changes(finding, case)

        high: int = getattr(storm, number)
        above = below = 0
        for turn in range(_ROUNDS):
            if turn:  # below it the answer changed too
                low, high = floor, low
            middle = low + 1  # kernels often change just above a power of two, and large storms are dear
            while high - low > 1:
                low, high = (low, middle) if changes(middle) else (middle, high)
                middle = (low + high) // 2
            above = sum(changes(high) for _ in range(_CONFIRM))
            below = 0 if low == floor else sum(changes(low) for _ in range(_CONFIRM))
            if not below:
                break
        if above == _CONFIRM and not below:
            finding.threshold = high
        else:
            finding.notes.append(
                f"not the same each time: tried {_CONFIRM} times more, it changed {above} times with {number} {high}, "
                f"{below} times with {low}"
            )

    def _conclude(self, finding: Finding) -> None:
        """A relation whose batches were never formed was not exercised, however many answers were equal."""
        running = self._bounded.client.running
        if not finding.largest:  # nothing was sent together
            if finding.relation not in ("repeat", "cache") and not finding.notes:
                finding.notes.append("no probe has the same answer twice alone, so a batch cannot be told from chance")
            return
        count = "" if running is None else f", so far at most {running:g} running by the server's own count"
        finding.notes.append(f"up to {finding.largest} sent together, at most {finding.peak} unanswered at once{count}")
        if finding.storm is not None:
            finding.notes.insert(0, f"another answer than alone to {finding.storm}")
        elif finding.peak < 2:
            finding.cases = 0
            finding.notes.append("no two were ever with the server at once")
        elif (running or 0) <= 1 if running is not None else not self._formed:
            finding.cases = 0
            finding.notes.append("they were served one after another: it took no less time than one by one")
