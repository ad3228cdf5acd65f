"""The demo end to end on a few prompts: what it prints and writes, and that it fails when batchproof varies."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from batchproof import demo, layers
from batchproof.errors import RecordError
from batchproof.generation.verify import read_answers

PROMPTS = (
    "In the beginning",
    "A program is a thing that",
    "And the king said unto the prophet, Why weepest thou? " * 3,
)
PLAN = demo._Plan(prompts=PROMPTS, batch_sizes=(1, 2, 3), steps=2, answers=2, answer_tokens=4)


def table(text, after, columns=4):
    """{batch size label: cells} of the grid that follows the line holding ``after``."""
    lines = iter(text[text.index(after) :].splitlines())
    header = next(line for line in lines if "batch size" in line)
    assert header.split()[-1] == "batchproof"
    rows = {}
    for line in lines:
        if not line.strip():
            return rows
        cells = line.split()
        rows[" ".join(cells[:-columns])] = cells[-columns:]
    return rows


@pytest.fixture
def plan_small(monkeypatch):
    monkeypatch.setattr(demo, "_Plan", lambda: PLAN)


@pytest.mark.usefixtures("plan_small")
def test_demo_of_the_built_in_model(tmp_path, capsys):
    out = tmp_path / "out put"
    out.mkdir()
    (out / "answers.jsonl").write_text('{"id": "demo-7"}\n')  # of an earlier demo
    assert demo.run(None, out) == 0
    text = capsys.readouterr().out

    changed = table(text, "whose logits changed")
    assert list(changed) == ["1 (again)", "2", "all 3"]
    for cells in changed.values():
        assert cells[-1] == "0"
        assert all(0 <= int(cell) <= len(PROMPTS) for cell in cells)  # "failed" is no number
    assert all(float(cell) > 0 for cells in table(text, "New tokens a second").values() for cell in cells)

    answers, unreadable = read_answers(out / "answers.jsonl")
    assert not unreadable
    assert sorted(answer.record.id for answer in answers) == ["demo-0", "demo-1"]
    assert {answer.record.parameters.temperature for answer in answers} == {0.0, 0.8}
    assert all(answer.value["receipt"] in text for answer in answers)
    assert "2 of 2 hold" in text
    assert f"batchproof verify '{out}/answers.jsonl'" in text
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("plan_small")
def test_planted_variance_fails(tmp_path, capsys, monkeypatch):
    invariant = layers.Linear.forward

    def variant(self, x):
        """Cuts the inner axis in two if there are many tokens, as a split-K heuristic does."""
        if x.numel() // x.shape[-1] < 3:
            return invariant(self, x)
        half = x.shape[-1] // 2
        parts = ((x[..., :half], self.weight[:, :half]), (x[..., half:], self.weight[:, half:]))
        return sum(torch.nn.functional.linear(a, b) for a, b in parts)

    monkeypatch.setattr(layers.Linear, "forward", variant)
    monkeypatch.setattr(demo, "_measure_stock", lambda *arguments: [])
    assert demo.run(None, tmp_path) == 1
    text = capsys.readouterr().out
    changed = table(text, "whose logits changed", columns=1)
    assert changed["1 (again)"] == ["0"]
    assert int(changed["all 3"][0]) > 0
    assert "FAILED" in text


def test_a_receipt_that_does_not_hold_fails(tmp_path, capsys, monkeypatch):
    append = demo.AnswerFile.append

    def append_forged(self, answer):
        append(self, {**answer, "receipt": "0" * 64} if answer["id"] == "demo-1" else answer)

    monkeypatch.setattr(demo.AnswerFile, "append", append_forged)
    assert not demo._answer_and_verify(demo.Generator.load(None), tmp_path / "answers.jsonl", PLAN)
    text = capsys.readouterr().out
    assert "1 of 2 hold" in text
    assert "demo-1: differs: receipt" in text


def test_leaves_a_file_it_did_not_write(tmp_path):
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"id": "mine"}) + "\n")
    with pytest.raises(RecordError, match="not written by the demo"):
        demo.run(None, tmp_path)
    assert json.loads(answers.read_text()) == {"id": "mine"}


def test_prompts_are_many_and_ragged():
    plan = demo._Plan()
    assert len(plan.prompts) > 33
    assert len(set(plan.prompts)) == len(plan.prompts)
    assert len({len(prompt) for prompt in plan.prompts}) > len(plan.prompts) // 2
    assert tuple(plan.batch_sizes) == (1, 2, 3, 8, 33, len(plan.prompts))


def test_says_so_if_stock_never_changed(capsys):
    columns = [demo._Column(name, "", "k", [0, 0, 0], [1.0] * 3) for name in ("stock", "batchproof")]
    demo._print_measured(columns, PLAN, "here")
    assert "never changed a bit here" in capsys.readouterr().out
    columns[0] = demo._Column("stock", "", "k", failure="ValueError: no")
    demo._print_measured(columns, PLAN, "here")
    text = capsys.readouterr().out
    assert "never changed" not in text
    assert table(text, "whose logits", columns=2)["2"] == ["failed", "0"]
    assert "stock: ValueError: no" in text
