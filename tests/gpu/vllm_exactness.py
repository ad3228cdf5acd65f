"""One request, alone and in company, in one vLLM engine: are its tokens and logprobs the same to the bit?

``python tests/gpu/vllm_exactness.py JOB.json OUT.json``: JOB has ``engine``, the arguments of ``vllm.LLM``.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

LENGTHS = (40, 300, 700)  # tokens of the prompts that are compared
TOKENS = 12
VOCABULARY = 31000
DISTINCT = 4  # values among the best 20 logprobs: fewer, and the weights prove nothing. bf16 logits have ties.
Answer = dict[str, Any]


def company(kind: str, rng: random.Random) -> list[list[int]]:
    """The prompts of the neighbours in a scenario."""
    number, shortest, longest = {
        "among 3": (3, 5, 60),
        "among 40": (40, 5, 60),
        "among 300": (300, 5, 60),
        "prefill past 256 tokens": (7, 120, 120),
        "long neighbours": (6, 600, 600),
    }[kind]
    return [[rng.randrange(3, VOCABULARY) for _ in range(rng.randint(shortest, longest))] for _ in range(number)]


SCENARIOS = {
    "among 3": ("first", "middle", "last"),
    "among 40": ("first", "last"),
    "among 300": ("first", "middle", "last"),
    "prefill past 256 tokens": ("first", "last"),
    "long neighbours": ("first", "last"),
}


def answer_of(output: Any) -> Answer:
    """What vLLM returned for a request, floats written exactly."""
    done = output.outputs[0]
    prompt = [_exact(step) for step in output.prompt_logprobs or [] if step is not None]
    return {"tokens": list(done.token_ids), "logprobs": [_exact(step) for step in done.logprobs], "prompt": prompt}


def _exact(step: dict[int, Any]) -> list[list[Any]]:
    return sorted([int(token), float(entry.logprob).hex()] for token, entry in step.items())


def first_difference(answer: Answer, reference: Answer) -> str | None:
    """None if the two are the same; else where they part. Prompt logprobs are compared where both have them."""
    for kind in ("prompt", "logprobs"):
        pairs = list(itertools.zip_longest(answer[kind], reference[kind]))
        if kind == "prompt" and not (answer[kind] and reference[kind]):
            continue
        for i, (ours, wanted) in enumerate(pairs):
            if ours != wanted:
                where = "prompt logprobs" if kind == "prompt" else "logprobs of token"
                return f"{where} {i}: largest difference {largest_difference([ours], [wanted]):.3g}"
    if answer["tokens"] != reference["tokens"]:
        return f"tokens {answer['tokens']}, alone {reference['tokens']}"
    return None


def largest_difference(steps: Sequence[Any], reference: Sequence[Any]) -> float:
    """Of the logprobs of tokens that both list; infinite where the tokens are others."""
    worst = 0.0
    for ours, wanted in zip(steps, reference, strict=False):
        a, b = ({token: float.fromhex(value) for token, value in step or []} for step in (ours, wanted))
        if set(a) != set(b):
            return float("inf")
        worst = max([worst, *(abs(a[token] - b[token]) for token in a)])
    return worst


class Engine:
    """vLLM, asked for one request in a given company."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(**arguments)

    def ask(
        self, prompt: list[int], neighbours: Sequence[list[int]] = (), position: str = "first",
        prompt_logprobs: bool = True, **sampling: Any,
    ) -> Answer:  # fmt: skip
        """The answer to ``prompt`` among ``neighbours``, which decode longer than it does."""
        from vllm import SamplingParams

        common = {"max_tokens": TOKENS, "ignore_eos": True, "detokenize": False, "temperature": 0.0}
        own = SamplingParams(**common | {"logprobs": 20, "prompt_logprobs": 5 if prompt_logprobs else None} | sampling)
        at = {"first": 0, "middle": len(neighbours) // 2, "last": len(neighbours)}[position]
        prompts = [*neighbours[:at], prompt, *neighbours[at:]]
        other = SamplingParams(**common | {"max_tokens": TOKENS + 8})
        parameters = [own if i == at else other for i in range(len(prompts))]
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], sampling_params=parameters, use_tqdm=False
        )
        return answer_of(outputs[at])

    def preemptions(self) -> int:
        """How often a request was driven out of the cache, by vLLM's count."""
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == "vllm:num_preemptions")


def comparisons(engine: Engine, prompt: list[int], reference: Answer, caching: bool) -> Iterator[dict[str, Any]]:
    """The request again, and in every company, each compared with the reference."""

    def compare(scenario: str, position: str, answer: Answer, wanted: Answer, kind: str = "greedy") -> dict[str, Any]:
        difference = first_difference(answer, wanted)
        return {
            "prompt": len(prompt), "scenario": scenario, "position": position, "kind": kind,
            "equal": difference is None, "difference": difference,
        }  # fmt: skip

    rng = random.Random(len(prompt))
    yield compare("alone again", "first", engine.ask(prompt), reference)
    for scenario, positions in SCENARIOS.items():
        for position in positions:
            yield compare(scenario, position, engine.ask(prompt, company(scenario, rng), position), reference)
    if caching:  # a request with prompt logprobs does not read the cache
        engine.llm.reset_prefix_cache()
        yield compare("cache cold", "first", engine.ask(prompt, prompt_logprobs=False), reference)
        yield compare("cache hit", "first", engine.ask(prompt, prompt_logprobs=False), reference)
        crowd = company("among 300", rng)
        yield compare("cache hit among 300", "last", engine.ask(prompt, crowd, "last", False), reference)
        engine.llm.reset_prefix_cache()
        engine.ask([*prompt[: len(prompt) // 2], *company("among 3", rng)[0]], prompt_logprobs=False)
        yield compare("half of it cached", "first", engine.ask(prompt, prompt_logprobs=False), reference)
    seeded = {"temperature": 0.8, "seed": 1234}
    wanted = engine.ask(prompt, **seeded)
    answer = engine.ask(prompt, company("among 300", rng), "last", **seeded)
    yield compare("among 300", "last", answer, wanted, "seeded")


def is_degenerate(references: Sequence[Answer]) -> bool:
    """Whether the weights are such that no difference could show: logprobs all alike, or one answer to everything."""
    alike = any(len({value for _, value in step}) < DISTINCT for answer in references for step in answer["logprobs"])
    return alike or len({tuple(answer["tokens"]) for answer in references}) < len(references)


def main() -> None:
    """Run a job."""
    job, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    sys.argv = sys.argv[:1]  # the engine's process looks for flags of its own here
    engine = Engine(job["engine"])
    rng = random.Random(1)
    prompts = [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in LENGTHS]
    references = [engine.ask(prompt) for prompt in prompts]
    if is_degenerate(references):
        raise SystemExit(f"the answers are degenerate: {[answer['tokens'] for answer in references]}")
    found: list[dict[str, Any]] = []
    for prompt, reference in zip(prompts, references, strict=True):
        found += comparisons(engine, prompt, reference, job["engine"]["enable_prefix_caching"])
    import vllm

    result = {"vllm": vllm.__version__, "comparisons": found, "references": references}
    if job["engine"].get("disable_log_stats") is False:
        result["preemptions"] = engine.preemptions()
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    os.replace(partial, out)


if __name__ == "__main__":  # vLLM's engine is a child that may import this file again
    main()
