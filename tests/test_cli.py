"""The command line teaches, says what is wrong without a traceback, and its exit codes mean what it says."""

import json
import re
import signal
from pathlib import Path

import pytest

from batchproof import __version__, cli
from batchproof.generation import records
from batchproof.generation import verify as verification
from batchproof.generation.model import Generator
from batchproof.generation.records import AnswerFile
from batchproof.generation.verify import DIFFERS, ELSEWHERE, HOLDS, UNREADABLE, Verdict

COMMANDS = ("generate", "verify", "demo")
PROMPT = {"id": "a", "prompt": "x", "max_tokens": 1}


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    monkeypatch.setenv("COLUMNS", "120")  # argparse wraps its help to it


@pytest.fixture(scope="module")
def loaded():
    return Generator.load()


@pytest.fixture
def load(loaded, monkeypatch):
    """Puts the loaded model in the place of loading; gives the arguments it would have been loaded with."""
    calls = []
    monkeypatch.setattr(Generator, "load", classmethod(lambda cls, *arguments: calls.append(arguments) or loaded))
    return calls


@pytest.fixture
def run(capsys):
    """Runs a command; gives its exit code and what it printed. Nothing may be a traceback."""

    def call(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's way
            code = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


@pytest.fixture
def files(tmp_path):
    """Writes prompts and gives the path of the answers to be."""

    def write(*lines):
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return prompts, tmp_path / "answers.jsonl"

    return write


@pytest.fixture
def answers(loaded, tmp_path):
    """A file of three answers, of a shape that reads, with made-up contents."""
    path = tmp_path / "three.jsonl"
    fields = {"text": "", "token_ids": [], "logprobs": [], "finish_reason": "length", "receipt": "00"}
    with AnswerFile(path) as file:
        for key in "abc":
            file.append({"id": key, **fields, "environment": {}, "model": {}, "request": {"prompt": "x"}})
    return path


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in COMMANDS:
        assert re.search(rf"^ +{command} +\w", out, re.MULTILINE), command


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_explains_its_exit_codes_and_options(run, command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    codes = out[out.index("exit code:") :]
    assert all(f"{number} " in codes for number in (0, 1, 2))
    options = re.split(r"^  (?=-)", out, flags=re.MULTILINE)[1:]
    assert {"-h", "--model", "--device"} <= {re.split("[ ,\n]", option)[0] for option in options}
    for option in options:  # the explanation starts after two blanks, or on the next line
        assert re.search(r"(  |\n +)\w+ ?.*\w", option), f"no explanation: {option}"
    assert "default: the built-in model" in out


def test_help_of_generate_names_every_field_of_a_record_and_every_default(run):
    _, out, _ = run("generate", "--help")
    for name in ("id", "prompt", "messages", *records._CHECKS):
        assert f'"{name}"' in out or re.search(rf"^ *.*\b{name}\b.* default", out, re.MULTILINE), name
    assert '"role"' in out
    assert '"content"' in out
    for default in ("line-N", "64", "greedy", "filter nothing", "(seed, its position)"):
        assert default in out
    fields = "id, text, token_ids, logprobs, finish_reason, receipt, environment, model, request"
    assert f"answer record: {fields}" in out
    for field in ("top_logprobs", "prompt_logprobs", '"logprob"', '"rank"', '"top"'):
        assert field in out.partition("answer record:")[2]
    assert "run it again: it does what is left" in out


def test_the_prompt_records_in_the_help_are_records(run):
    _, out, _ = run("generate", "--help")
    examples = re.findall(r'^  (\{"id".*?\})$', out, re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        records.parse_prompt(json.loads(example), "")


def test_help_of_verify_explains_environments_and_samples(run):
    _, out, _ = run("verify", "--help")
    for part in ("another environment", "no failure", "--sample N", "alone and in hostile company", "--seed"):
        assert part in out


def test_version(run):
    assert run("--version") == (0, f"batchproof {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "COMMAND"),
        (("generte",), "generte"),
        (("generate",), "--in, --out"),
        (("generate", "--in", "p"), "--out"),
        (("generate", "--in", "p", "--out", "a", "--batch-size", "0"), "'0' is not a whole number from 1"),
        (("generate", "--in", "p", "--out", "a", "--batch-size", "-3"), "'-3' is not a whole number from 1"),
        (("generate", "--in", "p", "--out", "a", "--batch-size", "many"), "'many' is not a whole number from 1"),
        (("generate", "--in", "p", "--out", "a", "--batch-size", "1.5"), "'1.5' is not a whole number from 1"),
        (("generate", "--in", "p", "--out", "a", "--batch-size", "\u00b2"), "\u00b2"),
        (("generate", "--in", "p", "--out", "a", "--dtype", "int8"), "int8"),
        (("generate", "--in", "p", "--out", "a", "--unknown"), "--unknown"),
        (("verify",), "ANSWERS.jsonl"),
        (("verify", "a", "--sample", "0"), "'0' is not a whole number from 1"),
        (("verify", "a", "--seed", "x"), "x"),
    ],
    ids=lambda value: " ".join(value)[:48] if isinstance(value, tuple) else "",
)
def test_wrong_arguments_exit_2_with_the_argument_named(run, arguments, named):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert named in err


@pytest.mark.parametrize("value", ["maybe", "", "true", "2", " 1"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_malformed_switch_exits_2_with_its_value_named(run, load, files, monkeypatch, command, value):
    prompts, out = files(PROMPT)
    arguments = {"generate": ("--in", prompts, "--out", out), "verify": (prompts,), "demo": ("--out", out)}
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", value)
    assert run(command, *arguments[command]) == (
        2, "", f"batchproof: VLLM_BATCH_INVARIANT is {value!r}, want 0 or 1\n"
    )  # fmt: skip
    assert load == []
    assert not out.exists()


@pytest.mark.parametrize("value", ["0", "1"])
def test_a_well_formed_switch_is_taken(run, load, files, monkeypatch, value):
    prompts, out = files(PROMPT)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", value)
    assert run("generate", "--in", prompts, "--out", out)[0] == 0


@pytest.mark.parametrize("arguments", [("generate", "--out", "a", "--in"), ("verify",)], ids=lambda a: a[0])
@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_file_that_is_not_there_exits_2_before_the_model_is_loaded(run, load, tmp_path, arguments, kind):
    path = tmp_path / "nothing.jsonl"
    if kind == "folder":
        path.mkdir()
    assert run(*arguments, path) == (2, "", f"batchproof: no file {path}\n")
    assert load == []


def test_an_answer_file_in_a_folder_that_is_not_there_exits_2(run, load, files):
    prompts, out = files(PROMPT)
    code, _, err = run("generate", "--in", prompts, "--out", out.parent / "no" / "a")
    assert code == 2
    assert str(out.parent / "no" / "a") in err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--device", "banana"), "device is 'banana', want auto, cpu, cuda or cuda:N"),
        (("--device", ""), "device is '', want"),
        (("--device", "meta"), "device is 'meta', want"),
        (("--device", "cuda:77"), "device is 'cuda:77', but this torch sees "),
        (("--model", "/nowhere/at/all"), "model is '/nowhere/at/all', want a folder or a hub id"),
        (("--model", "EMPTY"), "want a folder or a hub id of a causal LM"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["generate", "verify", "demo"])
def test_a_model_or_device_that_is_not_there_exits_2_with_its_name(run, files, tmp_path, command, options, named):
    empty = tmp_path / "empty"
    empty.mkdir()
    options = [str(empty) if option == "EMPTY" else option for option in options]
    prompts, out = files(PROMPT)
    arguments = {"generate": ("--in", prompts, "--out", out), "verify": (prompts,), "demo": ("--out", out)}
    code, _, err = run(command, *arguments[command], *options)
    assert code == 2
    assert f"batchproof: {named}" in err or f"batchproof: model is {str(empty)!r}, {named}" in err


def test_all_answered_exits_0_and_a_second_run_finds_them(run, load, files):
    prompts, out = files(PROMPT, {**PROMPT, "id": "b"})
    code, stdout, err = run("generate", "--in", prompts, "--out", out)
    assert (code, stdout) == (0, "")
    assert err.endswith(f"2 answers written to {out}\n")
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["a", "b"]
    code, _, err = run("generate", "--in", prompts, "--out", out)
    assert code == 0
    assert err.endswith(f"0 answers written to {out}, 2 were there\n")


def test_malformed_lines_exit_1_with_file_and_number_and_the_others_are_answered(run, load, files):
    prompts, out = files(PROMPT, "{", {"prompt": "x", "top_k": -1})
    code, _, err = run("generate", "--in", prompts, "--out", out)
    assert code == 1
    assert f"{prompts} line 2: not JSON" in err
    assert f"{prompts} line 3: top_k is -1, want an integer from 0" in err
    assert f"1 answers written to {out}" in err


def test_an_answer_file_of_other_requests_exits_2_and_is_left_alone(run, load, files):
    prompts, out = files(PROMPT)
    run("generate", "--in", prompts, "--out", out)
    before = out.read_bytes()
    files({**PROMPT, "seed": 1})
    code, _, err = run("generate", "--in", prompts, "--out", out)
    assert code == 2
    assert "batchproof: " in err
    assert "another prompt or other parameters under id 'a'" in err
    assert out.read_bytes() == before


def test_an_answer_file_that_another_run_is_writing_exits_2(run, load, files):
    prompts, out = files(PROMPT)
    with AnswerFile(out):
        code, _, err = run("generate", "--in", prompts, "--out", out)
    assert code == 2
    assert f"{out} is being written by another process" in err


@pytest.mark.parametrize("moment", ["before it is written", "after it is written"])
def test_ctrl_c_exits_130_with_whole_lines_and_the_next_run_does_the_rest(run, load, files, monkeypatch, moment):
    prompts, out = files(*({**PROMPT, "id": str(i), "max_tokens": 1 + i % 2} for i in range(6)))
    append = AnswerFile.append
    count = 0

    def interrupted(file, answer):
        nonlocal count
        count += 1
        if count == 3 and moment == "before it is written":
            signal.raise_signal(signal.SIGINT)
        append(file, answer)
        if count == 3:
            signal.raise_signal(signal.SIGINT)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python starts with
    try:
        monkeypatch.setattr(AnswerFile, "append", interrupted)
        code, _, err = run("generate", "--in", prompts, "--out", out, "--batch-size", "2")
    finally:
        signal.signal(signal.SIGINT, previous)
    assert code == 130
    assert err.splitlines()[-1] == "interrupted"
    there = [json.loads(line)["id"] for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert len(there) == (2 if moment == "before it is written" else 3)
    monkeypatch.setattr(AnswerFile, "append", append)
    assert run("generate", "--in", prompts, "--out", out)[0] == 0
    assert sorted(json.loads(line)["id"] for line in out.read_text().splitlines()) == [str(i) for i in range(6)]


def test_options_reach_the_model_and_the_engine(run, load, loaded, files, monkeypatch):
    sizes = []
    engine = Generator.engine
    monkeypatch.setattr(Generator, "engine", lambda self, *sized: sizes.append(sized) or engine(self, *sized))
    prompts, out = files(PROMPT)
    options = ("--model", "M", "--device", "cpu", "--dtype", "float16", "--batch-size", "7")
    assert run("generate", "--in", prompts, "--out", out, *options)[0] == 0
    assert load == [("M", "cpu", "float16")]
    assert sizes[0][0] == 7


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ([HOLDS, HOLDS, HOLDS], 0),
        ([HOLDS, ELSEWHERE, HOLDS], 0),
        ([ELSEWHERE] * 3, 0),
        ([HOLDS, DIFFERS, HOLDS], 1),
        ([ELSEWHERE, HOLDS, DIFFERS], 1),
    ],
    ids=str,
)
def test_verify_exits_1_if_an_answer_differs_and_0_if_none_does(run, load, answers, monkeypatch, outcomes, code):
    verdicts = [Verdict(key, outcome, "why") for key, outcome in zip("abc", outcomes, strict=True)]
    monkeypatch.setattr(verification, "verify", lambda *arguments: verdicts)
    got, out, _ = run("verify", answers)
    lines = out.splitlines()
    assert got == code
    assert lines[:3] == [f"{key}: {outcome}: why" for key, outcome in zip("abc", outcomes, strict=True)]
    assert sorted(lines[3].split(", ")) == sorted(f"{outcomes.count(kind)} {kind}" for kind in set(outcomes))


def test_verify_exits_1_if_a_line_is_unreadable(run, load, answers, monkeypatch):
    monkeypatch.setattr(
        verification, "verify", lambda generator, answers, *rest: [Verdict("a", HOLDS) for _ in answers]
    )
    with answers.open("a") as file:
        file.write("{\n")
    code, out, _ = run("verify", answers)
    assert code == 1
    assert f"line 4: {UNREADABLE}: not JSON" in out
    assert out.splitlines()[-1] == "3 holds, 1 unreadable"


def test_verify_of_an_empty_file_says_so(run, load, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.touch()
    assert run("verify", path)[:2] == (0, "no answers\n")


@pytest.mark.parametrize(("sample", "checked"), [(1, 1), (2, 2), (3, 3), (50, 3)])
def test_sample_checks_that_many_drawn_by_the_seed(run, load, answers, monkeypatch, sample, checked):
    drawn = []

    def fake(generator, answers, seed, on_record):
        drawn.append(([answer.record.id for answer in answers], seed))
        return [Verdict(answer.record.id, HOLDS) for answer in answers]

    monkeypatch.setattr(verification, "verify", fake)
    for seed in (0, 0, 4):
        code, out, _ = run("verify", answers, "--sample", sample, "--seed", seed)
        assert code == 0
        assert out.splitlines()[-1] == f"{checked} holds"
    assert drawn[0] == drawn[1]
    assert drawn[2][1] == 4
    assert all(len(set(ids)) == checked for ids, _ in drawn)
    samples = set()
    for seed in range(20):
        run("verify", answers, "--sample", 1, "--seed", seed)
        samples.update(drawn[-1][0])
    assert samples == {"a", "b", "c"}


def test_what_generate_writes_verify_accepts_and_a_changed_text_it_does_not(run, load, files):
    prompts, out = files(PROMPT, {**PROMPT, "id": "b", "temperature": 1.0})
    assert run("generate", "--in", prompts, "--out", out)[0] == 0
    code, stdout, _ = run("verify", out)
    assert (code, stdout.splitlines()) == (0, ["a: holds", "b: holds", "2 holds"])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    lines[1]["text"] += "!"
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, stdout, _ = run("verify", out)
    assert code == 1
    assert stdout.splitlines() == ["a: holds", "b: differs: text differs alone", "1 differs, 1 holds"]


def test_demo_gets_its_options_and_its_exit_code_is_the_commands(run, monkeypatch, tmp_path):
    from batchproof import demo

    calls = []
    monkeypatch.setattr(demo, "run", lambda *arguments: calls.append(arguments) or 1)
    assert run("demo", "--model", "M", "--out", tmp_path, "--device", "cpu")[0] == 1
    assert calls == [("M", tmp_path, "cpu")]
    run("demo")
    assert calls[1] == (None, Path("demo_out"), "auto")


def test_a_missing_extra_exits_2_with_the_command_that_installs_it(run, files, monkeypatch):
    def load(cls, *arguments):
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr(Generator, "load", classmethod(load))
    prompts, out = files(PROMPT)
    code, _, err = run("generate", "--in", prompts, "--out", out)
    assert code == 2
    assert err.endswith("batchproof: No module named 'transformers'; want pip install 'batchproof[transformers]'\n")
