"""Prompt records say what is wrong with them; answer files lose nothing and destroy nothing."""

import json
import os
from dataclasses import fields

import pytest

from batchproof.errors import RecordError
from batchproof.generation import records
from batchproof.generation.records import AnswerFile, Parameters, parse_prompt, read_lines, read_prompts

ANSWER = {"id": "a", "text": "word \u00e9\u4e2d", "receipt": "00"}


def refusal(value):
    with pytest.raises(RecordError) as caught:
        parse_prompt(value, "line-1")
    return str(caught.value)


def test_a_prompt_alone_gets_the_documented_defaults():
    record = parse_prompt({"prompt": "Hello"}, "line-7")
    assert (record.id, record.prompt, record.messages) == ("line-7", "Hello", None)
    assert record.parameters == Parameters(
        max_tokens=64, temperature=0.0, top_p=1.0, top_k=0, seed=0, stop=(), min_p=0.0, repetition_penalty=1.0,
        frequency_penalty=0.0, presence_penalty=0.0, logprobs=None, prompt_logprobs=None,
    )  # fmt: skip


def test_null_in_a_parameter_is_its_default():
    value = {"prompt": "", **dict.fromkeys(field.name for field in fields(Parameters))}
    assert parse_prompt(value, "x").parameters == Parameters()


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 1},
        {"max_tokens": 2**31 - 1},
        {"temperature": 0},
        {"temperature": 0.0},
        {"temperature": 1e-6},
        {"temperature": 1e6},
        {"top_p": 1e-6},
        {"top_p": 1},
        {"top_k": 0},
        {"top_k": 2**31 - 1},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"stop": []},
        {"stop": ["\n", "\u4e2d"]},
        {"min_p": 1e-6},
        {"min_p": 1},
        {"repetition_penalty": 1e-3},
        {"repetition_penalty": 1e3},
        {"frequency_penalty": -2},
        {"frequency_penalty": 2},
        {"presence_penalty": -2},
        {"presence_penalty": 2},
        {"logprobs": 0},
        {"logprobs": 2**31 - 1},
        {"prompt_logprobs": 0},
        {"prompt_logprobs": 2**31 - 1},
    ],
    ids=str,
)
def test_the_ends_of_every_range_are_taken(fields):
    parsed = parse_prompt({"prompt": "x", **fields}, "x").parameters.to_json()
    assert {key: parsed[key] for key in fields} == fields


NEUTRAL = {
    "min_p": (0, 0.0, -0.0, None),
    "repetition_penalty": (1, 1.0, None),
    "frequency_penalty": (0, 0.0, -0.0, None),
    "presence_penalty": (0, 0.0, -0.0, None),
    "logprobs": (None,),
    "prompt_logprobs": (None,),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_parameter_is_not_in_the_record_which_is_what_it_was_before_there_were_any(name):
    before = {"prompt": "x", "max_tokens": 64, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0, "stop": []}
    for value in NEUTRAL[name]:
        record = parse_prompt({"prompt": "x", name: value}, "x")
        assert json.dumps(record.to_json()) == json.dumps(before)
        assert record == parse_prompt({"prompt": "x"}, "x")
    assert set(NEUTRAL) == {field.name for field in fields(Parameters)} - set(before)


def test_a_temperature_of_minus_zero_stays_as_receipts_have_always_had_it():
    assert str(parse_prompt({"prompt": "x", "temperature": -0.0}, "x").to_json()["temperature"]) == "-0.0"


def test_a_stop_string_is_a_list_of_one():
    assert parse_prompt({"prompt": "x", "stop": "end"}, "x").parameters.stop == ("end",)


def test_integers_for_numbers_give_the_same_record_as_floats():
    whole, floating = ({"prompt": "x", "temperature": one, "top_p": one} for one in (1, 1.0))
    assert json.dumps(parse_prompt(whole, "x").to_json()) == json.dumps(parse_prompt(floating, "x").to_json())


@pytest.mark.parametrize(
    ("fields", "seen", "wanted"),
    [
        ({"max_tokens": 0}, "max_tokens is 0", "an integer from 1 to"),
        ({"max_tokens": -5}, "max_tokens is -5", "an integer from 1 to"),
        ({"max_tokens": 2**31}, f"max_tokens is {2**31}", f"to {2**31 - 1}"),
        ({"max_tokens": 1.0}, "max_tokens is 1.0", "an integer"),
        ({"max_tokens": True}, "max_tokens is True", "an integer"),
        ({"max_tokens": "8"}, "max_tokens is '8'", "an integer"),
        ({"max_tokens": [8]}, "max_tokens is [8]", "an integer"),
        ({"temperature": -0.5}, "temperature is -0.5", "0 or a number from 1e-06 to 1e+06"),
        ({"temperature": True}, "temperature is True", "a number"),
        ({"temperature": "0.5"}, "temperature is '0.5'", "a number"),
        ({"temperature": float("nan")}, "temperature is nan", "a number"),
        ({"temperature": float("inf")}, "temperature is inf", "a number"),
        ({"temperature": 10**400}, "temperature is 1000", "a number"),  # no float holds it
        ({"temperature": 1e300}, "temperature is 1e+300", "a number"),  # infinite in fp32
        ({"temperature": 1e-40}, "temperature is 1e-40", "a number"),  # logits / 1e-40 are infinite in fp32
        ({"top_p": 0}, "top_p is 0", "a number from 1e-06 to 1"),
        ({"top_p": -0.1}, "top_p is -0.1", "a number"),
        ({"top_p": 1.01}, "top_p is 1.01", "to 1"),
        ({"top_p": 1e-60}, "top_p is 1e-60", "a number"),  # zero in fp32
        ({"top_p": False}, "top_p is False", "a number"),
        ({"top_p": {}}, "top_p is {}", "a number"),
        ({"top_k": -1}, "top_k is -1", "an integer from 0"),
        ({"top_k": 2**31}, f"top_k is {2**31}", "an integer"),
        ({"top_k": 1.5}, "top_k is 1.5", "an integer"),
        ({"min_p": -0.1}, "min_p is -0.1", "0 or a number from 1e-06 to 1"),
        ({"min_p": 1.01}, "min_p is 1.01", "to 1"),
        ({"min_p": 1e-60}, "min_p is 1e-60", "a number"),  # zero in fp32
        ({"min_p": float("nan")}, "min_p is nan", "a number"),
        ({"min_p": True}, "min_p is True", "a number"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0", "a number from 0.001 to 1000"),
        ({"repetition_penalty": -1.5}, "repetition_penalty is -1.5", "a number"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf", "a number"),
        ({"repetition_penalty": "1.1"}, "repetition_penalty is '1.1'", "a number"),
        ({"frequency_penalty": 2.01}, "frequency_penalty is 2.01", "a number from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan", "a number"),
        ({"presence_penalty": -2.01}, "presence_penalty is -2.01", "a number from -2 to 2"),
        ({"presence_penalty": [0]}, "presence_penalty is [0]", "a number"),
        ({"logprobs": -1}, "logprobs is -1", "an integer from 0"),
        ({"logprobs": True}, "logprobs is True", "an integer"),
        ({"logprobs": 2.0}, "logprobs is 2.0", "an integer"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1", "an integer from 0"),
        ({"prompt_logprobs": False}, "prompt_logprobs is False", "an integer"),
        ({"seed": 2**63}, f"seed is {2**63}", f"from {-(2**63)} to {2**63 - 1}"),
        ({"seed": -(2**63) - 1}, f"seed is {-(2**63) - 1}", "an integer"),
        ({"seed": "7"}, "seed is '7'", "an integer"),
        ({"stop": ""}, "stop is ['']", "none empty"),
        ({"stop": ["a", ""]}, "stop is ['a', '']", "none empty"),
        ({"stop": 3}, "stop is 3", "a string or a list of strings"),
        ({"stop": ["a", 3]}, "stop is ['a', 3]", "a list of strings"),
        ({"prompt": 3}, "prompt is 3", "a string"),
        ({"prompt": None}, "prompt is None", "a string"),
        ({"prompt": ["a"]}, "prompt is ['a']", "a string"),
        ({"id": ""}, "id is ''", "a string or an integer"),
        ({"id": None}, "id is None", "a string or an integer"),
        ({"id": True}, "id is True", "a string or an integer"),
        ({"id": 1.5}, "id is 1.5", "a string or an integer"),
        ({"id": ["a"]}, "id is ['a']", "a string or an integer"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_a_malformed_field_is_named_with_the_value_seen_and_the_one_wanted(fields, seen, wanted):
    message = refusal({"prompt": "x", **fields})
    assert seen in message
    assert wanted in message.partition("want ")[2]


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "Hello",
        {"role": "user", "content": "x"},
        ["Hello"],
        [{}],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": 1, "content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": "x"}, {"role": "user", "content": ["x"]}],
    ],
    ids=str,
)
def test_malformed_messages_are_named(messages):
    message = refusal({"messages": messages})
    assert f"messages is {messages!r}" in message
    assert "want a list of objects with role and content strings" in message


def test_unknown_fields_are_all_named_with_the_known_ones():
    message = refusal({"prompt": "x", "top-k": 5, "max_token": 8})
    assert "unknown field max_token, top-k" in message
    for known in ("id", "prompt", "messages", *(field.name for field in fields(Parameters))):
        assert known in message.partition("want ")[2]


def test_both_prompt_and_messages_or_neither_is_refused():
    assert "got both" in refusal({"prompt": "x", "messages": [{"role": "user", "content": "x"}]})
    assert "got neither" in refusal({"max_tokens": 3})


@pytest.mark.parametrize("value", [[], "text", 3, None, True], ids=str)
def test_a_line_that_is_no_object_is_refused_with_its_type(value):
    assert f"the line holds {type(value).__name__}, want a JSON object" in refusal(value)


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "a\ud800"},
        {"prompt": "x", "id": "\udfff"},
        {"prompt": "x", "stop": ["\ud800"]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"prompt": "x", "\ud800": 1},
    ],
    ids=ascii,
)
def test_half_a_surrogate_pair_is_refused_since_no_file_could_hold_it(value):
    assert "surrogate" in refusal(value)


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "x", "stop": "end", "temperature": 1, "seed": -1},
        {"prompt": "x", "min_p": 1, "repetition_penalty": 2, "frequency_penalty": -1, "presence_penalty": 0.1},
        {"prompt": "x", "logprobs": 0, "prompt_logprobs": 3},
        {"messages": [{"role": "user", "content": "x", "name": "kept"}]},
    ],
    ids=str,
)
def test_the_request_in_an_answer_parses_to_the_record_it_came_from(value):
    record = parse_prompt(value, "x")
    again = parse_prompt({**json.loads(json.dumps(record.to_json())), "id": "x"}, "")
    assert again == record


def test_an_integer_id_becomes_a_string():
    assert parse_prompt({"id": 17, "prompt": "x"}, "").id == "17"


def test_blank_lines_are_skipped_and_still_counted(write_lines):
    path = write_lines("p", b"", {"prompt": "a"}, b"  \t\r", {"prompt": "b"}, b"")
    good, bad = read_prompts(path)
    assert [(number, record.id) for number, record in good] == [(2, "line-2"), (4, "line-4")]
    assert bad == []


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"], ids=repr)
def test_the_last_line_may_end_in_any_way(tmp_path, ending):
    path = tmp_path / "p"
    path.write_bytes(b'{"prompt": "a"}\r\n{"prompt": "b"}' + ending)
    assert [record.prompt for _, record in read_prompts(path)[0]] == ["a", "b"]


def test_an_empty_file_has_no_records(write_lines):
    assert read_prompts(write_lines("p")) == ([], [])


def test_a_taken_id_is_refused_with_the_line_that_took_it(write_lines):
    path = write_lines(
        "p", {"id": "a", "prompt": "1"}, {"id": "line-3", "prompt": "2"}, {"prompt": "3"}, {"id": "a", "prompt": "4"},
        {"id": 5, "prompt": "5"}, {"id": "5", "prompt": "6"},
    )  # fmt: skip
    good, bad = read_prompts(path)
    assert [number for number, _ in good] == [1, 2, 5]
    assert [(number, str(error)) for number, error in bad] == [
        (3, "id 'line-3' is taken by line 2"),
        (4, "id 'a' is taken by line 1"),
        (6, "id '5' is taken by line 5"),
    ]


def test_a_malformed_record_does_not_take_its_id(write_lines):
    good, bad = read_prompts(write_lines("p", {"id": "a", "prompt": 3}, {"id": "a", "prompt": "x"}))
    assert [number for number, _ in good] == [2]
    assert [number for number, _ in bad] == [1]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"hello",
        b"{'prompt': 'x'}",
        b'{"prompt": "x"} {"prompt": "y"}',
        b'{"prompt": "\xff"}',
        b"\xff\xfe",
        b'\xef\xbb\xbf{"prompt": "byte order mark"}',
        b'{"seed": ' + b"1" * 5000 + b"}",  # more digits than Python converts
        b"[" * 100_000,  # deeper than Python recurses
    ],
    ids=lambda line: ascii(line[:24]),
)
def test_a_line_that_is_not_json_is_reported_by_number_and_the_others_are_read(write_lines, line):
    good, bad = read_prompts(write_lines("p", {"prompt": "a"}, line, {"prompt": "b"}))
    assert [number for number, _ in good] == [1, 3]
    [(number, error)] = bad
    assert number == 2
    assert str(error).startswith("not JSON: ")


def test_read_lines_gives_the_error_in_the_place_of_the_value(write_lines):
    values = list(read_lines(write_lines("p", [1], b"{", 2)))
    assert values[0] == (1, [1])
    assert values[2] == (3, 2)
    assert isinstance(values[1][1], RecordError)


def test_appended_answers_are_lines_and_come_back_by_id(tmp_path):
    path = tmp_path / "a"
    second = {**ANSWER, "id": "b", "text": "two\nlines"}
    with AnswerFile(path) as file:
        assert file.read() == {}
        file.append(ANSWER)
        assert file.read() == {"a": ANSWER}  # the kernel has it at once
        file.append(second)
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == [ANSWER, second]
    assert path.read_bytes().endswith(b"\n")
    with AnswerFile(path) as file:
        assert file.read() == {"a": ANSWER, "b": second}


def test_an_answer_is_one_write_with_its_newline(tmp_path, monkeypatch):
    writes = []
    write = os.write
    monkeypatch.setattr(records.os, "write", lambda descriptor, data: writes.append(data) or write(descriptor, data))
    with AnswerFile(tmp_path / "a") as file:
        file.append(ANSWER)
    [data] = writes
    assert data.count(b"\n") == 1
    assert data.endswith(b"\n")


def test_a_write_that_is_cut_short_is_continued(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(records.os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    with AnswerFile(tmp_path / "a") as file:
        file.append(ANSWER)
        assert file.read() == {"a": ANSWER}


@pytest.mark.parametrize("cut", [1, 2, 20, -1])
def test_an_unfinished_last_line_is_cut_off_on_opening(tmp_path, cut):
    path = tmp_path / "a"
    line = json.dumps(ANSWER).encode() + b"\n"
    path.write_bytes(line + line.replace(b'"a"', b'"b"')[:cut])
    with AnswerFile(path) as file:
        assert path.read_bytes() == line
        file.append({**ANSWER, "id": "c"})
        assert sorted(file.read()) == ["a", "c"]


@pytest.mark.parametrize(
    "content",
    [
        b"a letter",
        b"a letter\nof two lines",
        b'{"id": "a", "prompt": "x"}',
        b'{"prompt": "x"}\n{"prompt": "y"}',
        b"[1]",
    ],
    ids=ascii,
)
def test_a_file_that_is_no_answer_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "letter"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"letter line \d is not an answer record; move the file away"):
        AnswerFile(path)
    assert path.read_bytes() == content
    path.write_bytes(b"")
    with AnswerFile(path):  # and its lock was let go
        pass


def test_a_second_writer_is_refused_until_the_first_has_closed(tmp_path):
    path = tmp_path / "a"
    with AnswerFile(path) as file:
        with pytest.raises(RecordError, match="is being written by another process"):
            AnswerFile(path)
        file.append(ANSWER)
    with AnswerFile(path) as file:
        assert sorted(file.read()) == ["a"]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"\xff",
        b"[]",
        b"{}",
        b'{"id": "b", "prompt": "a prompt record"}',
        b'{"id": 3, "receipt": "00"}',
        b'{"id": ["b"], "receipt": "00"}',
    ],
    ids=ascii,
)
def test_a_line_that_is_no_answer_is_an_error_with_its_number(write_lines, line):
    path = write_lines("answers", ANSWER, line)
    before = path.read_bytes()
    with AnswerFile(path) as file, pytest.raises(RecordError, match="answers line 2 is not an answer record; move the"):
        file.read()
    assert path.read_bytes() == before
