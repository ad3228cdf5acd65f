"""The model auditor: mutants and controls, and what its report says."""

import contextlib
import io

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from models import CONTROLS, DOWN, MUTANTS, NORM, BatchScaledNorm, SplitLinear, audit, plain, planted, rows, tiny
from mutation import check_control, check_mutant

from batchproof.audit.model import MODES, audit_model
from batchproof.audit.model.align import Chunk, Company, Span, compare
from batchproof.audit.report import Report
from batchproof.errors import ArgumentError
from batchproof.generation.model import load_stock


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_killed_and_named(mutant):
    report = check_mutant(mutant)
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_a_control_passes(control):
    check_control(control)


@pytest.fixture(scope="module")
def split():
    """The built-in model with one linear whose split follows the rows: 3 times 23 tokens are more than 64."""
    return audit(lambda: planted(DOWN, lambda module: SplitLinear(module.weight)), "batch", sizes=(2, 33))


def test_the_cause_is_placed(split):
    cause = split.cause
    assert cause.op == "mutants.linear.default"
    assert cause.where.startswith(DOWN)
    assert "models.py:" in cause.where
    assert cause.difference.elements > 0
    assert "it holds among 2" in cause.detail
    assert "among copies of itself too" in cause.detail


def test_the_spread_begins_where_the_mutant_is(split):
    (series,) = split.series
    assert series.x == (*(f"model.layers.{i}" for i in range(4)), "logits")
    assert series.y[0] == 0
    assert all(y > 0 for y in series.y[1:])


def test_contents_are_told_from_size():
    report = audit(lambda: planted(NORM, BatchScaledNorm), "batch", sizes=(2, 8))
    assert "contents decide" in report.cause.detail
    assert audit(lambda: planted(NORM, BatchScaledNorm), "batch", sizes=(2, 8), vary=False).verdict == "holds"


def test_the_invariant_model_is_observed():
    report = audit(tiny, max_tokens=1)
    assert [check.relation for check in report.checks] == ["repeat", *MODES]
    assert {check.verdict for check in report.checks} == {"holds"}
    assert {entry.split(".default")[0].split(".Tensor")[0] for entry in report.not_observed} == {
        "aten.index", "aten.index_put_"
    }  # fmt: skip
    assert report.environment["transformers"]


@pytest.mark.parametrize(("relation", "name"), [("padding", "tile_by_neighbour"), ("cached prefix", "cascade")])
def test_the_reproduction_runs(relation, name):
    model = load_stock(None, "cpu", "bfloat16")[0]
    model.set_attn_implementation(name)
    report = audit_model(model, modes=[relation], batch_sizes=[4])
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(report.reproduction, {})
    finally:
        torch.set_grad_enabled(True)
    count, _, total, *_ = printed.getvalue().split()
    assert 0 < int(count) < int(total)
    assert report.reproduction.endswith("\n".join(f"# {line}" for line in printed.getvalue().splitlines()))


def test_no_reproduction_where_nothing_varies():
    assert audit(tiny, "batch", sizes=(2,)).reproduction is None


def test_an_unstable_model_is_not_blamed_on_the_batch():
    report = next(mutant for mutant in MUTANTS if mutant.name == "noise").audit()
    assert [check.verdict for check in report.checks] == ["varies", *["not exercised"] * len(MODES)]


def test_what_a_model_cannot_do_is_not_exercised():
    class NoCache(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny()

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids):
            return self.inner(input_ids=input_ids).logits

    report = audit_model(NoCache().eval(), batch_sizes=[2], require=["decode"])
    verdicts = {check.relation: check.verdict for check in report.checks}
    assert verdicts == {"repeat": "holds", "batch": "holds"} | dict.fromkeys(MODES[1:], "not exercised")
    assert "attention_mask" in " ".join(report.gaps)
    assert "past_key_values" in " ".join(report.gaps)
    assert report.verdict == "not audited"


def test_a_model_that_raises_is_not_exercised():
    class Refuses(nn.Module):
        def forward(self, x):
            if len(x) > 1:
                raise ValueError("one at a time")
            return x * 2

    report = audit_model(Refuses().eval(), inputs=rows, modes=["batch"], require=["batch"])
    assert "one at a time" in report.gaps[0]
    assert report.verdict == "not audited"


def test_hooks_are_removed():
    model = plain()
    audit_model(model, inputs=rows, batch_sizes=[2])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_own_prompts_and_progress():
    told = []
    model = tiny()
    report = audit_model(
        model,
        ["abc", "Once upon a time"],
        tokenizer=load_stock(None)[1],
        modes=["batch"],
        progress=lambda *stage: told.append(stage),
    )
    assert told == [("repeat", 0, 2), ("batch", 1, 2)]
    assert len(report.settings["prompts"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_sizes": []}, "batch_sizes"),
        ({"batch_sizes": [1]}, "from 2 on"),
        ({"modes": ["prefill"]}, "prefill"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": ["text"]}, "tokenizer"),
        ({"prompts": [[1, 99999]]}, "99999"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        audit_model(tiny(), **arguments)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ArgumentError, match="training mode"):
        audit_model(plain().train(), inputs=rows)


def part(whole, layout):
    """What is cut out of ``whole`` for an alone tensor of 5 tokens and 3 columns, found by its bits."""
    return compare("x", torch.arange(15.0).reshape(5, 3), whole, layout)


def test_cutting_out_the_request():
    alone = torch.arange(15.0).reshape(5, 3)
    other = torch.full((7, 3), -1.0)
    span = Span(length=5, padded=7, offset=2, total=9)
    company = Company(batch=2, place=1, spans=(span,))
    assert part(torch.cat((other[:5], alone)), company) is None, "blocks"
    assert part(torch.stack((other[:5], alone), 1).flatten(0, 1), company) is None, "requests innermost"
    assert part(torch.cat((other[:2], alone)), company) is None, "padded on the left"
    assert part(torch.cat((other, other[:2], alone)), company) is None, "padded, one after another"
    assert part(torch.cat((other[:2], alone, other[:2])), company) is None, "packed"
    assert part(torch.cat((other[:3], alone)), company).startswith("shape (5, 3) against (8, 3)")
    assert part(torch.cat((alone, other[:5])), company).elements == 15, "another place"
    assert part(alone[2:4], Chunk(2, 4, 5)) is None
    assert part(alone[:4], Chunk(2, 4, 5)) is None, "keys so far"
    assert isinstance(part(alone[:3], Chunk(2, 4, 5)), str)
