"""Answers do not depend on the batch, and a file of them survives malformed lines, other runs, SIGKILL and Ctrl-C."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from batchproof.errors import ArgumentError, RecordError
from batchproof.generation.generate import generate
from batchproof.generation.records import parse_prompt
from batchproof.integrations.transformers import Engine, Request
from batchproof.integrations.transformers.engine import PAGE_SIZE, _State
from batchproof.ops.logprobs import token_logprobs
from batchproof.ops.penalties import apply_penalties_reference
from batchproof.ops.sample import sample_reference
from batchproof.ops.softmax import log_softmax

HALF_WAY = 3  # answers after which a run is killed
GROW = ("greedy", "seed 1", "seed 2", "top_p", "both", "penalties", "prompt_logprobs")


@pytest.mark.parametrize(
    ("batch_size", "max_batch_tokens"),
    [(1, 20), (3, 20), (8, 512), (10, 20), (10, 512)],
    ids=str,
)
def test_receipts_tokens_and_logprobs_do_not_depend_on_batch_size_or_chunks(
    outcomes, requests, alone, batch_size, max_batch_tokens
):
    assert outcomes(requests, batch_size, max_batch_tokens) == alone


def test_receipts_do_not_depend_on_the_order_of_requests(outcomes, requests, alone):
    shuffled = random.Random(0).sample(requests, len(requests))
    assert outcomes(shuffled, batch_size=4, max_batch_tokens=40) == alone


@pytest.mark.parametrize(("num_blocks", "max_batch_tokens"), [(5, 512), (9, 20)], ids=str)
def test_receipts_do_not_depend_on_being_evicted_from_a_full_cache(
    outcomes, requests, monkeypatch, num_blocks, max_batch_tokens
):
    # all of them outgrow their first page, at about the same time
    grow = [replace(request, prompt_logprobs=1) for request in requests if request.id in GROW]
    alone = outcomes(grow, 1)
    manager, again, evicted = Engine._manager, _State.create_equivalent_initial_request, []

    def small(engine, requests):
        made = manager(engine, requests)
        assert made.continuous_batching_config.num_blocks > 2 * num_blocks
        made.continuous_batching_config.num_blocks = num_blocks
        return made

    def evict(state):
        evicted.append((state.request_id, len(state.generated_tokens)))
        return again(state)

    monkeypatch.setattr(Engine, "_manager", small)
    monkeypatch.setattr(_State, "create_equivalent_initial_request", evict)
    crowd = [replace(request, id=f"{request.id}/{n}") for n in range(2) for request in grow]
    for key, got in outcomes(crowd, len(crowd), max_batch_tokens).items():
        assert got == alone[key.partition("/")[0]], key
    assert sum(tokens > 0 for _, tokens in evicted) >= 2  # in the middle of an answer, or this tests nothing


def test_the_cache_is_large_enough_that_no_request_is_evicted(outcomes, requests, monkeypatch):
    def evict(state):
        raise AssertionError(f"request {state.request_id} was evicted")

    monkeypatch.setattr(_State, "create_equivalent_initial_request", evict)
    grown = [Request("page", (5,) * (PAGE_SIZE - 1), 3), Request("pages", (5,) * (2 * PAGE_SIZE), 2)]
    outcomes([*grown, *requests[-3:]] * 2, batch_size=5, max_batch_tokens=60)


def test_equal_requests_in_one_batch_get_equal_answers(outcomes, built_in, make_request):
    request = make_request(temperature=1.0, seed=3, max_tokens=3)
    completions = list(built_in.engine(4).run([request] * 4))
    assert len({completion.chain.hexdigest for completion in completions}) == 1
    assert len(completions) == 4


def test_other_seeds_give_other_tokens(alone):
    assert alone["seed 1"][0] != alone["seed 2"][0]


def test_greedy_tokens_are_those_of_generate_on_the_same_model(built_in, completions_alone):
    completion = completions_alone["greedy"]
    ids = torch.tensor([completion.request.prompt_ids], device=built_in.model.device)
    out = built_in.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=completion.request.max_tokens
    )
    assert out[0, ids.shape[1] :].tolist() == completion.token_ids


def test_logprobs_are_those_of_a_plain_forward_at_temperature_1_unfiltered(built_in, completions_alone):
    completion = completions_alone["top_p"]  # temperature 1.5 and top_p 0.7 must not show
    start = len(completion.request.prompt_ids) - 1
    ids = torch.tensor([[*completion.request.prompt_ids, *completion.token_ids]], device=built_in.model.device)
    with torch.no_grad():
        logits = built_in.model(ids).logits[0, start:-1].float()
        chosen = ids[0, start + 1 :, None]
        assert completion.logprobs == log_softmax(logits).gather(1, chosen)[:, 0].tolist()
    expected = logits.double().log_softmax(-1).gather(1, chosen)[:, 0].tolist()
    assert completion.logprobs == pytest.approx(expected, abs=1e-5)


def plain_logits(built_in, completion):
    """fp32 logits of a plain forward over prompt and answer, and the row that gives the first token of the answer."""
    ids = torch.tensor([[*completion.request.prompt_ids, *completion.token_ids]], device=built_in.model.device)
    with torch.no_grad():
        return built_in.model(ids).logits[0].float(), len(completion.request.prompt_ids) - 1


@pytest.mark.parametrize("key", ["penalties", "prompt_logprobs", "min_p"])
def test_tokens_are_those_of_the_references_on_a_plain_forward(built_in, completions_alone, key):
    completion = completions_alone[key]
    request = completion.request
    logits, start = plain_logits(built_in, completion)

    def one(value, dtype=torch.float32):
        return torch.tensor([value], dtype=dtype, device=logits.device)

    plain = []
    for step, token in enumerate(completion.token_ids):
        drawn = [
            sample_reference(
                row, one(request.seed, torch.int64), one(start + 1 + step, torch.int64), one(request.temperature),
                min_p=one(min_p),
            ).item()
            for row, min_p in (
                (logits[start + step, None], 0.0),
                (
                    apply_penalties_reference(
                        logits[start + step, None], one(request.prompt_ids, torch.int64),
                        one(completion.token_ids[:step], torch.int64), one(request.repetition_penalty),
                        one(request.frequency_penalty), one(request.presence_penalty),
                    ),
                    request.min_p,
                ),
            )
        ]  # fmt: skip
        plain.append(drawn[0])
        assert drawn[1] == token
    assert plain != completion.token_ids  # what was asked for made a difference


def notes(logits, tokens, n):
    """What an answer tells of ``tokens`` [rows], of their rows of logits."""
    tokens = torch.tensor(tokens, device=logits.device)
    values = (t.tolist() for t in token_logprobs(logits, tokens, n))
    return [
        {"logprob": logprob, "rank": rank, "top": [list(pair) for pair in zip(ids, top, strict=True)]}
        for logprob, rank, ids, top in zip(*values, strict=True)
    ]


@pytest.mark.parametrize("key", ["penalties", "prompt_logprobs"])
def test_logprobs_asked_for_are_those_of_a_plain_forward_before_penalties(built_in, completions_alone, key):
    completion = completions_alone[key]
    request = completion.request
    logits, start = plain_logits(built_in, completion)
    assert completion.top_logprobs == notes(logits[start:-1], completion.token_ids, request.logprobs)
    assert completion.logprobs == [note["logprob"] for note in completion.top_logprobs]
    first, *others = completion.prompt_logprobs
    assert first is None
    wanted = [] if request.prompt_logprobs is None else notes(logits[:start], request.prompt_ids[1:], 2)
    assert others == wanted


def test_what_nobody_asked_for_is_not_told(completions_alone):
    completion = completions_alone["greedy"]
    assert (completion.top_logprobs, completion.prompt_logprobs) == ([], [None])


def test_rows_for_prompts_and_neighbours_that_ask_for_more_change_nothing(outcomes, requests, alone, make_request):
    crowd = [
        make_request("Wherefore " * 12, max_tokens=4, prompt_logprobs=2048, logprobs=2048, repetition_penalty=900.0),
        *requests,
        replace(make_request("x", max_tokens=3, prompt_logprobs=5), id="a prompt of one token"),
    ]
    for batch_size, max_batch_tokens in ((len(crowd), 512), (4, 7)):
        got = outcomes(crowd, batch_size, max_batch_tokens)
        assert {key: got[key] for key in alone} == alone


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_more_logprobs_than_tokens_are_refused(built_in, name):
    built_in.engine(1).check(Request("x", (5,), 1, **{name: 2048}))
    for count in (2049, -1):
        with pytest.raises(RecordError, match=f"^{name} is {count}, want 0 to 2048, the model's vocabulary"):
            built_in.engine(1).check(Request("x", (5,), 1, **{name: count}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", float("nan")),
        ("presence_penalty", float("inf")),
    ],
)
def test_parameters_out_of_range_are_refused_before_anything_runs(built_in, name, value):
    with pytest.raises(ArgumentError, match=rf"{name}\[0\] is {value}, want it"):
        next(built_in.engine(1).run([Request("x", (5,), 1, **{name: value})]))


def test_an_answer_holds_what_was_asked_for_and_no_more(answer_lines, completions_alone):
    plain, told = answer_lines(
        {"prompt": "x", "max_tokens": 2}, {"prompt": "See also", "max_tokens": 2, "logprobs": 1, "prompt_logprobs": 0}
    )
    assert set(told) - set(plain) == {"top_logprobs", "prompt_logprobs"}
    assert set(plain["request"]) == {"prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop"}
    assert [len(note["top"]) for note in told["top_logprobs"]] == [1, 1]
    assert told["prompt_logprobs"][0] is None
    assert all(note["top"] == [] and note["rank"] >= 1 for note in told["prompt_logprobs"][1:])
    assert len(told["prompt_logprobs"]) > 1


def test_a_request_that_uses_its_tokens_up_finishes_by_length(completions_alone):
    for key in ("greedy", "long prompt", "one token"):
        completion = completions_alone[key]
        assert completion.finish_reason == "length"
        assert len(completion.token_ids) == len(completion.logprobs) == completion.request.max_tokens


def test_an_end_of_sequence_token_stops_and_is_kept_among_the_tokens(built_in, requests, completions_alone):
    full = completions_alone["greedy"]
    engine = built_in.engine(1)
    assert engine.eos_token_ids == [built_in.tokenizer.eos_token_id]
    end = full.token_ids[3]
    engine.eos_token_ids = [end]
    [completion] = engine.run([full.request])
    assert completion.finish_reason == "stop"
    assert completion.token_ids == full.token_ids[: full.token_ids.index(end) + 1]


def test_special_tokens_are_not_in_the_text(built_in):
    engine = built_in.engine(1)
    ids = built_in.tokenizer("one")["input_ids"]
    assert engine.decode([*ids, built_in.tokenizer.eos_token_id]) == "one"


@pytest.mark.parametrize("stops", [1, 2])
def test_a_stop_string_ends_the_text_before_it_even_across_tokens(built_in, completions_alone, stops):
    full = completions_alone["greedy"]
    engine = built_in.engine(1)
    boundary = len(engine.decode(full.token_ids[:5]))
    stop = full.text[boundary - 2 : boundary + 2]
    index = full.text.index(stop)
    others = ["never there", full.text[-3:]][: stops - 1]
    [completion] = engine.run([Request("x", full.request.prompt_ids, 14, stop=(*others, stop))])
    assert completion.finish_reason == "stop"
    assert completion.text == full.text[:index]
    assert completion.token_ids == full.token_ids[: len(completion.token_ids)]
    assert stop in engine.decode(completion.token_ids)
    assert stop not in engine.decode(completion.token_ids[:-1])


def test_the_earliest_of_several_stop_strings_cuts_the_text(built_in, completions_alone):
    full = completions_alone["greedy"]
    text = built_in.engine(1).decode(full.token_ids[:1])
    stops = (text[-1], text[-2])  # one token ends in both, and the second is earlier
    [completion] = built_in.engine(1).run([Request("x", full.request.prompt_ids, 14, stop=stops)])
    assert completion.text == text[: min(text.index(stop) for stop in stops)]


def test_a_stop_string_in_the_last_token_allowed_is_a_stop(built_in, completions_alone):
    full = completions_alone["greedy"]
    text = built_in.engine(1).decode(full.token_ids[:1])
    [completion] = built_in.engine(1).run([Request("x", full.request.prompt_ids, 1, stop=(text,))])
    assert (completion.finish_reason, completion.text) == ("stop", "")


def test_a_stop_string_in_the_prompt_does_not_stop(built_in, make_request):
    [completion] = built_in.engine(1).run([make_request("the the the", max_tokens=2, stop=["the the"])])
    assert len(completion.token_ids) == 2


@pytest.mark.parametrize(
    ("prompt_ids", "max_tokens", "message"),
    [
        ((), 1, "the prompt has no tokens, want at least one"),
        ((5,) * 2000, 49, "the prompt has 2000 tokens and max_tokens is 49; want at most 2048 together"),
        ((5,), 2048, "the prompt has 1 tokens and max_tokens is 2048; want at most 2048 together"),
        ((5, 2048), 1, "token ids outside 0 to 2047"),
        ((-1,), 1, "token ids outside 0 to 2047"),
    ],
    ids=["empty", "too long", "too many new", "past the vocabulary", "negative"],
)
def test_a_request_the_model_cannot_take_is_refused_with_what_it_could(built_in, prompt_ids, max_tokens, message):
    request = Request("x", prompt_ids, max_tokens)
    with pytest.raises(RecordError, match=message):
        built_in.engine(1).check(request)
    with pytest.raises(RecordError, match=message):  # before any other has run
        next(built_in.engine(1).run([Request("good", (5,), 1), request]))


def test_a_request_that_just_fits_is_taken(built_in):
    built_in.engine(1).check(Request("x", (0, 2047) * 1000, 48))


@pytest.mark.parametrize(("batch_size", "max_batch_tokens"), [(0, 512), (4, 0), (-1, 512)])
def test_an_engine_of_no_size_is_refused(built_in, batch_size, max_batch_tokens):
    with pytest.raises(ArgumentError, match=f"batch_size {batch_size}, max_batch_tokens {max_batch_tokens}; want"):
        built_in.engine(batch_size, max_batch_tokens)


def test_no_requests_give_no_completions(built_in):
    assert list(built_in.engine(4).run([])) == []


def test_a_run_leaves_the_model_and_torchs_generator_as_they_were_even_when_it_is_dropped(built_in, make_request):
    before, state = built_in.model.config._attn_implementation, torch.get_rng_state()
    run = built_in.engine(2).run([make_request(max_tokens=n, temperature=1.0) for n in (1, 8)])
    first = next(run)
    run.close()
    assert built_in.model.config._attn_implementation == before
    assert torch.equal(torch.get_rng_state(), state)
    [again] = built_in.engine(2).run([first.request])
    assert again.chain.hexdigest == first.chain.hexdigest


def test_on_tokens_hears_of_every_token(built_in, make_request):
    counts = []
    requests = [make_request(max_tokens=n) for n in (1, 3)]
    completions = list(built_in.engine(2).run(requests, counts.append))
    assert sum(counts) == sum(len(completion.token_ids) for completion in completions) == 4
    assert counts == [2, 1, 1]


def test_a_chat_goes_through_the_models_template(built_in, make_request):
    chat = [{"role": "user", "content": " Hello "}, {"role": "user", "content": "there"}]
    request = built_in.request(parse_prompt({"messages": chat}, "x"))
    assert request.prompt_ids == make_request("Hello there").prompt_ids


@pytest.mark.parametrize("template", [None, "{{ raise_exception('roles must alternate') }}", "{{ 1 / 0 }}"], ids=str)
def test_a_chat_that_the_template_does_not_take_is_a_malformed_record(built_in, write_lines, monkeypatch, template):
    monkeypatch.setattr(built_in.tokenizer, "chat_template", template)
    prompts = write_lines("p", {"messages": [{"role": "user", "content": "x"}]}, {"prompt": "x", "max_tokens": 1})
    summary = generate(built_in, prompts, prompts.with_name("a"), 2)
    [(number, reason)] = summary.malformed
    assert number == 1
    assert "chat template" in reason
    assert summary.written == 1


def read(path):
    """The lines of an answer file by id; each must be whole."""
    lines = path.read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") for line in lines)
    by_id = {json.loads(line)["id"]: line for line in lines}
    assert len(by_id) == len(lines)
    return by_id


def test_an_answer_holds_the_documented_fields(built_in, answer_lines):
    value = {"id": "a", "prompt": "See also", "max_tokens": 2, "temperature": 0.5, "seed": 3, "stop": ["zzz"]}
    [answer] = answer_lines(value)
    assert list(answer) == [
        "id", "text", "token_ids", "logprobs", "finish_reason", "receipt", "environment", "model", "request"
    ]  # fmt: skip
    assert answer["environment"] == built_in.environment
    assert answer["model"] == {"name": "built-in", "digest": built_in.digest}
    assert {**answer["request"], "id": "a"} == {**value, "top_k": 0, "top_p": 1.0}
    assert len(answer["token_ids"]) == len(answer["logprobs"]) == 2


def test_malformed_lines_are_reported_by_number_and_the_others_answered(built_in, write_lines):
    prompts = write_lines(
        "p",
        {"id": "a", "prompt": "x", "max_tokens": 1},
        b"{",
        {"prompt": "x", "max_tokens": 0},
        {"prompt": "x" * 3000},
        {"id": "a", "prompt": "y"},
        {"prompt": "x", "max_tokens": 1},
    )
    answers = prompts.with_name("a")
    heard = []
    summary = generate(
        built_in, prompts, answers, 4,
        on_start=lambda *counts: heard.append(counts),
        on_tokens=lambda count: heard.append(count),
        on_answer=lambda: heard.append("answer"),
    )  # fmt: skip
    assert sorted(read(answers)) == ["a", "line-6"]
    assert (summary.written, summary.found) == (2, 0)
    assert [number for number, _ in summary.malformed] == [2, 3, 4, 5]
    for (_, reason), part in zip(summary.malformed, ("not JSON", "max_tokens is 0", "tokens", "line 1"), strict=True):
        assert part in reason
    assert heard == [(2, 0), 2, "answer", "answer"]


def test_a_second_run_answers_only_what_is_missing_with_the_same_bytes(built_in, write_lines):
    values = [{"id": str(i), "prompt": "x", "max_tokens": 2, "temperature": 1.0, "seed": i} for i in range(6)]
    prompts = write_lines("p", *values)
    answers = prompts.with_name("a")
    generate(built_in, prompts, answers, 6)
    whole = read(answers)
    lines = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(b"".join(lines[::2]) + lines[1][:50])  # half of them, and an unfinished one
    summary = generate(built_in, prompts, answers, 2)
    assert (summary.written, summary.found, summary.malformed) == (3, 3, [])
    assert read(answers) == whole
    before = answers.read_bytes()
    summary = generate(built_in, prompts, answers, 2)
    assert (summary.written, summary.found) == (0, 6)
    assert answers.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [{"prompt": "y"}, {"seed": 1}, {"max_tokens": 2}, {"temperature": 0.5}, {"stop": "e"}, {"top_k": 1}],
    ids=str,
)
def test_resuming_with_another_request_under_an_id_is_refused(built_in, write_lines, change):
    value = {"id": "a", "prompt": "x", "max_tokens": 1}
    prompts = write_lines("p", value)
    answers = prompts.with_name("a")
    generate(built_in, prompts, answers, 1)
    before = answers.read_bytes()
    write_lines("p", {"id": "new", "prompt": "x", "max_tokens": 1}, {**value, **change})
    with pytest.raises(RecordError, match="another prompt or other parameters under id 'a'"):
        generate(built_in, prompts, answers, 1)
    assert answers.read_bytes() == before


def test_resuming_with_another_model_is_refused_with_both_digests(built_in, write_lines, monkeypatch):
    prompts = write_lines("p", {"id": "a", "prompt": "x", "max_tokens": 1})
    answers = prompts.with_name("a")
    generate(built_in, prompts, answers, 1)
    before = answers.read_bytes()
    there = built_in.digest
    monkeypatch.setattr(built_in, "digest", "00" * 32)
    with pytest.raises(RecordError, match=f"a model with digest {there}, this one's is {'00' * 32}"):
        generate(built_in, prompts, answers, 1)
    assert answers.read_bytes() == before


def test_a_prompt_file_given_as_the_answer_file_is_refused_and_left_alone(built_in, write_lines):
    prompts = write_lines("p", {"id": "a", "prompt": "x", "max_tokens": 1})
    before = prompts.read_bytes()
    with pytest.raises(RecordError, match="line 1 is not an answer record"):
        generate(built_in, prompts, prompts, 1)
    assert prompts.read_bytes() == before


def test_text_of_any_script_survives_the_file(built_in, answer_lines):
    value = {"prompt": "\u4e2d\u6587 \U0001f600 \u0000 \u2028 caf\u00e9", "max_tokens": 1, "stop": ["\u2028"]}
    [answer] = answer_lines(value)
    assert answer["request"]["prompt"] == value["prompt"]


def start(prompts, answers):
    """The command line, in batches of 2, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("VLLM_BATCH_INVARIANT", None)
    program = "import sys; from batchproof.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "generate", "--in", prompts, "--out", answers, "--batch-size", "2"]
    with answers.with_name("stderr").open("wb") as stderr:
        return subprocess.Popen(command, stderr=stderr, env=environment)


def kill_half_way(process, answers):
    deadline = time.monotonic() + 120
    while not answers.exists() or answers.read_bytes().count(b"\n") < HALF_WAY:
        assert process.poll() is None, f"it ended before it was killed: {answers.with_name('stderr').read_text()}"
        assert time.monotonic() < deadline, "the run wrote no answers"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL


def test_a_killed_run_leaves_whole_lines_and_resumes_to_the_bytes_of_an_uninterrupted_one(built_in, write_lines):
    values = [
        {"id": f"r{i}", "prompt": "And it" if i % 2 else "x", "max_tokens": 4 + i % 5, "temperature": i % 3 / 2}
        for i in range(32)
    ]
    prompts = write_lines("p", *values)
    answers, uninterrupted = prompts.with_name("killed"), prompts.with_name("uninterrupted")
    process = start(prompts, answers)
    try:
        generate(built_in, prompts, uninterrupted, 16)  # while the other starts
        kill_half_way(process, answers)
    finally:
        process.kill()
        process.wait()
    there = read(answers)
    assert HALF_WAY <= len(there) < len(values)
    summary = generate(built_in, prompts, answers, 8)
    assert (summary.found, summary.written) == (len(there), len(values) - len(there))
    assert read(answers) == read(uninterrupted)
    assert len(read(answers)) == len(values)
