"""verify recomputes: an untouched answer holds, any change is found and named, and a planted variance is caught."""

import copy
import json
import math

import pytest
import torch

from batchproof import layers
from batchproof.generation import verify as module
from batchproof.generation.generate import generate
from batchproof.generation.verify import DIFFERS, ELSEWHERE, HOLDS, UNREADABLE, Verdict, read_answers, verify
from batchproof.integrations.transformers import Engine

VALUE = {"id": "base", "prompt": "See also", "max_tokens": 3, "temperature": 0.8, "seed": 7, "top_k": 50}
NEUTRAL = {
    "min_p": 0,
    "repetition_penalty": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "logprobs": None,
    "prompt_logprobs": None,
}
# the base answer with one thing changed: how, the outcome, and what the reason must name
TAMPERED = {
    "nothing": (lambda a: None, HOLDS, ""),
    "an unknown field": (lambda a: a.update(note="x"), HOLDS, ""),
    "first token": (lambda a: a["token_ids"].__setitem__(0, 5), DIFFERS, "token 0 differs"),
    "last token": (lambda a: a["token_ids"].__setitem__(2, 5), DIFFERS, "token 2 differs"),
    "token left out": (lambda a: a["token_ids"].pop(), DIFFERS, "token 2 differs"),
    "token added": (lambda a: a["token_ids"].append(5), DIFFERS, "token 3 differs"),
    "token of another type": (lambda a: a["token_ids"].__setitem__(1, "5"), DIFFERS, "token 1 differs"),
    "last bit of a logprob": (
        lambda a: a["logprobs"].__setitem__(1, math.nextafter(a["logprobs"][1], 0)),
        DIFFERS,
        "logprobs differs",
    ),
    "logprobs": (lambda a: a.update(logprobs=None), DIFFERS, "logprobs differs"),
    "text": (lambda a: a.update(text=a["text"] + " "), DIFFERS, "text differs"),
    "finish reason": (lambda a: a.update(finish_reason="stop"), DIFFERS, "finish_reason differs"),
    "receipt": (lambda a: a.update(receipt=a["receipt"][:-1] + "_"), DIFFERS, "receipt differs"),
    "text and receipt": (lambda a: a.update(text="", receipt=""), DIFFERS, "receipt, text differ"),
    "prompt": (lambda a: a["request"].update(prompt="See alsO"), DIFFERS, "token"),
    "prompt as a chat": (
        lambda a: a["request"].update(messages=[{"role": "user", "content": a["request"].pop("prompt") + "."}]),
        DIFFERS,
        "token",
    ),
    # tokens that the other parameter happens to give too: the receipt knows
    "temperature": (lambda a: a["request"].update(temperature=0.8000000000000002), DIFFERS, "receipt differs"),
    "top_p": (lambda a: a["request"].update(top_p=0.99999999), DIFFERS, "receipt differs"),
    "top_k": (lambda a: a["request"].update(top_k=51), DIFFERS, "receipt differs"),
    "stop": (lambda a: a["request"].update(stop=["never there"]), DIFFERS, "receipt differs"),
    "max_tokens": (lambda a: a["request"].update(max_tokens=4), DIFFERS, "token 3 differs"),
    "seed": (lambda a: a["request"].update(seed=8), DIFFERS, "differs"),
    "min_p": (lambda a: a["request"].update(min_p=1e-6), DIFFERS, "receipt differs"),
    "frequency_penalty": (lambda a: a["request"].update(frequency_penalty=1e-9), DIFFERS, "receipt differs"),
    "logprobs asked for later": (lambda a: a["request"].update(logprobs=1), DIFFERS, "receipt, top_logprobs differ"),
    "prompt_logprobs given unasked": (lambda a: a.update(prompt_logprobs=[None]), DIFFERS, "prompt_logprobs differs"),
    "neutral parameters": (lambda a: a["request"].update(NEUTRAL), HOLDS, ""),
    "impossible length": (lambda a: a["request"].update(max_tokens=5000), DIFFERS, "max_position_embeddings"),
    "model digest": (lambda a: a["model"].update(digest="00" * 32), DIFFERS, "made by a model with digest 0000"),
    "no model": (lambda a: a.update(model="mine"), DIFFERS, "made by a model with digest None"),
    "torch": (
        lambda a: a["environment"].update(torch="1.0"),
        ELSEWHERE,
        "torch 1.0 there, {torch} here; recomputed here, every bit is the same",
    ),
    "device and text": (
        lambda a: a["environment"].update(device="abacus") or a.update(text=""),
        ELSEWHERE,
        "device abacus there, {device} here; recomputed here, text differs alone",
    ),
    "environment of another kind": (lambda a: a.update(environment="here"), ELSEWHERE, "device here there"),
    "\0neighbour 0": (lambda a: None, HOLDS, ""),  # as verify calls one of the company
}


@pytest.fixture(scope="module")
def base(answer_lines):
    return answer_lines(VALUE)[0]


@pytest.fixture(scope="module")
def verdicts(built_in, base, tmp_path_factory):
    """What one verify says of every tampered copy, by id, and what it reported on the way."""
    path = tmp_path_factory.mktemp("tampered") / "answers"
    lines = []
    for key, (tamper, _, _) in TAMPERED.items():
        answer = {**copy.deepcopy(base), "id": key}
        tamper(answer)
        lines.append(json.dumps(answer) + "\n")
    path.write_text("".join(lines))
    answers, unreadable = read_answers(path)
    assert unreadable == []
    heard = []
    found = verify(built_in, answers, on_record=lambda stage, verdict: heard.append((stage, verdict)))
    assert [verdict.id for verdict in found] == list(TAMPERED)
    return {verdict.id: verdict for verdict in found}, heard


@pytest.mark.parametrize("key", TAMPERED, ids=ascii)
def test_what_was_changed_in_an_answer_is_found_and_named(built_in, verdicts, key):
    _, outcome, reason = TAMPERED[key]
    verdict = verdicts[0][key]
    assert verdict.outcome == outcome
    assert reason.format(**built_in.environment) in verdict.reason
    assert bool(verdict.reason) == (outcome != HOLDS)


ASKING = {**VALUE, "min_p": 0.01, "repetition_penalty": 1.2, "logprobs": 2, "prompt_logprobs": 1}
TOLD = (
    (lambda a: None, ""),
    (lambda a: a["top_logprobs"][1]["top"][0].__setitem__(0, 5), "top_logprobs differs"),
    (lambda a: a["top_logprobs"][2].update(rank=0), "top_logprobs differs"),
    (lambda a: a["prompt_logprobs"][1].update(rank=0), "prompt_logprobs differs"),
    (lambda a: a["prompt_logprobs"][1]["top"][0].__setitem__(1, -1.0), "prompt_logprobs differs"),
    (lambda a: a["prompt_logprobs"].pop(), "prompt_logprobs differs"),
    (lambda a: a.pop("top_logprobs"), "top_logprobs differs"),
    (lambda a: a["request"].update(logprobs=3), "receipt, top_logprobs differ"),
    (lambda a: a["request"].pop("prompt_logprobs"), "receipt, prompt_logprobs differ"),
    (lambda a: a["request"].update(logprobs=5000), "logprobs is 5000, want 0 to 2048"),
)


def test_logprobs_that_were_asked_for_are_checked(built_in, answer_lines, write_lines):
    [asking] = answer_lines(ASKING)
    answers = [{**copy.deepcopy(asking), "id": str(number)} for number in range(len(TOLD))]
    for answer, (tamper, _) in zip(answers, TOLD, strict=True):
        tamper(answer)
    verdicts = verify(built_in, read_answers(write_lines("answers", *answers))[0])
    for verdict, (_, reason) in zip(verdicts, TOLD, strict=True):
        assert (verdict.outcome == HOLDS) == (reason == ""), verdict
        assert verdict.reason.startswith(reason), verdict


def test_every_record_that_can_be_run_is_reported_alone_and_in_company(verdicts):
    by_id, heard = verdicts
    runnable = sorted(set(by_id) - {"impossible length", "model digest", "no model"})
    for stage in ("alone", "in company"):
        assert sorted(verdict.id for where, verdict in heard if where == stage) == runnable
    assert {where for where, _ in heard[: len(runnable)]} == {"alone"}


def test_the_company_has_other_sizes_places_lengths_and_short_chunks(built_in, requests):
    (_, alone, plain), (_, engine, crowd) = module._stages(built_in, requests, seed=0)
    assert alone.batch_size == 1
    assert plain == requests
    assert engine.batch_size > 8
    assert engine.max_batch_tokens < max(len(request.prompt_ids) for request in crowd) * 2
    neighbours = [request for request in crowd if request not in requests]
    assert len(neighbours) >= 8
    assert [request for request in crowd if request in requests] != requests
    assert len({len(request.prompt_ids) for request in neighbours}) > 2
    assert len({request.temperature for request in neighbours}) > 1


def test_the_company_differs_from_seed_to_seed_and_not_from_run_to_run(built_in, requests):
    crowds = [module._stages(built_in, requests, seed)[1] for seed in (0, 0, 1)]
    assert crowds[0][2] == crowds[1][2]
    assert crowds[0][2] != crowds[2][2]


def test_nothing_to_verify_is_no_verdict(built_in):
    assert verify(built_in, []) == []


@pytest.mark.parametrize("limit", [64, 300])
def test_the_company_fits_models_with_few_positions(built_in, requests, monkeypatch, limit):
    monkeypatch.setattr(built_in.model.config, "max_position_embeddings", limit)
    _, engine, crowd = module._stages(built_in, requests, seed=0)[1]
    for request in crowd:
        engine.check(request)


def test_answers_made_in_any_batch_hold(built_in, answer_lines, write_lines):
    values = [
        {"prompt": "x", "max_tokens": 2},
        {"prompt": "And David", "max_tokens": 5, "temperature": 1.2, "seed": 1},
        {"prompt": "Wherefore", "max_tokens": 8, "stop": ["e"]},
    ]
    path = write_lines("answers", *answer_lines(*values, batch_size=3))
    assert verify(built_in, read_answers(path)[0], seed=5) == [Verdict(f"line-{i}", HOLDS) for i in (1, 2, 3)]


def planted(self, x):
    """torch's product, an epsilon apart when the number of rows in the step is even."""
    out = torch.nn.functional.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())
    return (out + (1e-3 if x.shape[:-1].numel() % 2 == 0 else 0.0)).to(x.dtype)


def test_a_planted_variance_is_caught_in_company_though_everything_holds_alone(
    built_in, monkeypatch, tmp_path, write_lines
):
    monkeypatch.setattr(layers.Linear, "forward", planted)
    value = {"prompt": "See also, and then again", "max_tokens": 6}
    prompts = write_lines("p", *({**value, "id": str(i), "seed": i} for i in range(4)))
    generate(built_in, prompts, tmp_path / "answers", batch_size=1)
    heard = []
    answers, _ = read_answers(tmp_path / "answers")
    found = verify(built_in, answers, on_record=lambda stage, verdict: heard.append((stage, verdict.outcome)))
    assert [outcome for stage, outcome in heard if stage == "alone"] == [HOLDS] * 4
    assert [verdict.outcome for verdict in found] == [DIFFERS] * 4
    assert all(verdict.reason.endswith(" in company") for verdict in found)


def without(answer, key):
    return {name: value for name, value in answer.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: b"{", "not JSON"),
        (lambda a: b"\xff", "not JSON"),
        (lambda a: [a], "not an answer record: want a JSON object"),
        (lambda a: {"id": "p", "prompt": "x"}, "want a JSON object with the field request"),
        (lambda a: {**a, "request": "x"}, "want a JSON object with the field request"),
        (lambda a: without(a, "receipt"), "not an answer record: receipt missing"),
        (lambda a: without(without(a, "id"), "model"), "not an answer record: id, model missing"),
        (lambda a: {**a, "id": ["x"]}, "want id to be a string"),
        (lambda a: {**a, "id": 3}, "want id to be a string"),
        (lambda a: {**a, "id": ""}, "id is ''"),
        (lambda a: {**a, "token_ids": None}, "token_ids a list"),
        (lambda a: {**a, "token_ids": {"0": 1}}, "token_ids a list"),
        (lambda a: {**a, "request": {**a["request"], "max_tokens": 0}}, "max_tokens is 0"),
        (lambda a: {**a, "request": {**a["request"], "prompt": None}}, "prompt is None"),
        (lambda a: {**a, "request": {**a["request"], "n": 3}}, "unknown field n"),
        (lambda a: {**a, "request": {}}, "got neither"),
        (lambda a: {**a, "id": "first"}, "id 'first' is there twice"),
    ],
)
def test_a_line_that_is_no_answer_is_unreadable_and_says_why(base, write_lines, change, message):
    path = write_lines("answers", {**base, "id": "first"}, b"", change(base), {**base, "id": "last"})
    answers, [verdict] = read_answers(path)
    assert [answer.record.id for answer in answers] == ["first", "last"]
    assert (verdict.id, verdict.outcome) == ("line 3", UNREADABLE)
    assert message in verdict.reason


def test_verification_uses_no_engine_for_answers_of_another_model(built_in, base, write_lines, monkeypatch):
    monkeypatch.setattr(Engine, "run", lambda *args: pytest.fail("it ran"))
    path = write_lines("answers", {**base, "model": {"name": "other", "digest": "11" * 32}})
    [verdict] = verify(built_in, read_answers(path)[0])
    assert verdict.outcome == DIFFERS
    assert f"a model with digest {'11' * 32}, this one's is {built_in.digest}" in verdict.reason
