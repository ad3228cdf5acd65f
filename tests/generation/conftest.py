"""One generator of the built-in model for all these tests, and prompts that together exercise every parameter."""

import json

import pytest

from batchproof.generation.generate import generate
from batchproof.generation.model import Generator
from batchproof.generation.records import parse_prompt

# Greedy and sampled, every filter, prompts over and under a page and a prefill chunk, a stop string, a chat; two
# differ by their seed alone. Several need a second page of the cache in the middle of their answer.
PROMPTS = (
    {"id": "greedy", "prompt": "In the beginning God created the heaven and the earth.", "max_tokens": 14},
    {
        "id": "long prompt",
        "prompt": "And it came to pass, when the king heard these words, that he rent his clothes, and went into the "
        "house of the LORD, and",
        "max_tokens": 4,
    },
    {"id": "seed 1", "prompt": "A program is a list of instructions", "max_tokens": 12, "temperature": 0.8, "seed": 1},
    {"id": "seed 2", "prompt": "A program is a list of instructions", "max_tokens": 12, "temperature": 0.8, "seed": 2},
    {"id": "top_k", "prompt": "See also", "max_tokens": 6, "temperature": 1.0, "seed": 2**63 - 1, "top_k": 5},
    {
        "id": "top_p",
        "prompt": "The LORD is my shepherd.",
        "max_tokens": 8,
        "temperature": 1.5,
        "seed": -3,
        "top_p": 0.7,
    },
    {"id": "both", "prompt": "Wherefore", "max_tokens": 14, "temperature": 1.0, "seed": 4, "top_k": 50, "top_p": 0.9},
    {"id": "min_p", "prompt": "Wherefore", "max_tokens": 6, "temperature": 1.2, "seed": 5, "min_p": 0.05},
    {
        "id": "penalties",
        "prompt": "In the beginning God created the heaven and the earth.",
        "max_tokens": 14,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.3,
        "logprobs": 3,
    },
    {
        "id": "prompt_logprobs",
        "prompt": "And David took the cloth from off his face, and said unto the king,",
        "max_tokens": 10,
        "temperature": 0.9,
        "seed": 6,
        "repetition_penalty": 0.6,
        "logprobs": 0,
        "prompt_logprobs": 2,
    },
    {"id": "one token", "prompt": "x", "max_tokens": 1, "temperature": 2.0},
    {"id": "stop", "prompt": "And David took", "max_tokens": 12, "stop": ["hand", "the"]},
    {"id": "chat", "messages": [{"role": "user", "content": "bug: n."}], "max_tokens": 6, "temperature": 0.3},
)


def outcome(completion):
    """Everything of a completion that must not depend on the batch."""
    c = completion
    told = repr((c.top_logprobs, c.prompt_logprobs))
    return tuple(c.token_ids), tuple(c.logprobs), c.finish_reason, c.text, c.chain.hexdigest, told


@pytest.fixture(scope="session")
def built_in():
    return Generator.load()


@pytest.fixture(scope="session")
def make_request(built_in):
    """A request from the fields of a prompt record."""

    def make(prompt="In the beginning", **fields):
        return built_in.request(parse_prompt({"prompt": prompt, **fields}, "x"))

    return make


@pytest.fixture(scope="session")
def requests(built_in):
    return [built_in.request(parse_prompt(dict(value), "")) for value in PROMPTS]


@pytest.fixture(scope="session")
def outcomes(built_in):
    """Runs requests; gives what became of each, by id."""

    def run(requests, batch_size, max_batch_tokens=512):
        engine = built_in.engine(batch_size, max_batch_tokens)
        return {completion.request.id: outcome(completion) for completion in engine.run(requests)}

    return run


@pytest.fixture(scope="session")
def completions_alone(built_in, requests):
    """The completion of every request, by id, each alone in every step."""
    return {completion.request.id: completion for completion in built_in.engine(1).run(requests)}


@pytest.fixture(scope="session")
def alone(completions_alone):
    return {key: outcome(completion) for key, completion in completions_alone.items()}


@pytest.fixture
def write_lines(tmp_path):
    """Writes values (JSON) and byte strings (as they are), one a line, to a file in ``tmp_path``."""

    def write(name, *lines):
        path = tmp_path / name
        encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"".join(line + b"\n" for line in encoded))
        return path

    return write


@pytest.fixture(scope="session")
def answer_lines(built_in, tmp_path_factory):
    """Generates answers to prompt values and returns them decoded, in the order of the values."""

    def answer(*values, batch_size=8):
        folder = tmp_path_factory.mktemp("answers")
        prompts, answers = folder / "prompts.jsonl", folder / "answers.jsonl"
        prompts.write_text("".join(json.dumps(value) + "\n" for value in values))
        assert generate(built_in, prompts, answers, batch_size).malformed == []
        by_id = {value["id"]: value for value in map(json.loads, answers.read_bytes().splitlines())}
        return [by_id[value.get("id", f"line-{number}")] for number, value in enumerate(values, 1)]

    return answer
