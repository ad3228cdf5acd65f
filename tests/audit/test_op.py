"""The op auditor: every mutant killed and named, no false alarm, and a report that says what was done."""

import contextlib
import io

import pytest
import torch
from mutation import check_control, check_mutant

import batchproof
import ops
from batchproof.audit import launches as launches_module
from batchproof.audit.launches import differing
from batchproof.audit.op import assert_batch_invariant, audit_op
from batchproof.audit.report import Launch, Report
from batchproof.errors import ArgumentError
from batchproof.registry import all_specs

X = {"x": "randn[M,16]"}
FEW = {"rows": 12, "sizes": (1, 2, 5, 12), "most_calls": 3, "device": "cpu"}


@pytest.mark.parametrize("mutant", ops.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_killed_and_named(mutant):
    report = check_mutant(mutant)
    assert report.exit_code == 1
    assert Report.from_json(report.to_json()).text() == report.text()
    if report.reproduction:
        assert shown(report.reproduction, getattr(ops, mutant.name)) > 0


def shown(program, function):
    """The bytes that a reproduction says differ."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {"function": function})
    return sum(int(line.split(":")[1].split()[0]) for line in printed.getvalue().splitlines())


def test_most_mutants_come_with_a_program_that_shows_them():
    shown_by = [mutant for mutant in ops.MUTANTS if mutant.relation in ("batch size", "position")]
    assert len(shown_by) > 15
    for mutant in shown_by[:3]:
        assert mutant.audit().reproduction


@pytest.mark.parametrize("control", ops.CONTROLS, ids=lambda control: control.name)
def test_a_control_raises_no_alarm(control):
    check_control(control)


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm_static_fp8_quant", "linear", "paged_attention", "sample"])
def test_ops_of_batchproof_bring_their_arguments_and_hold(name, device):
    report = audit_op(all_specs()[name], **FEW | {"device": device})
    assert report.verdict == "holds", report.text()
    assert report.classes == "1-12"


def test_a_pytest_assertion_carries_the_report():
    assert_batch_invariant(torch.neg, ["randn[M,16]"], **FEW)
    assert batchproof.assert_batch_invariant is assert_batch_invariant
    with pytest.raises(AssertionError, match=r"(?s)neighbours varies.*to see it"):
        assert_batch_invariant(ops.centred, X, **FEW)


def test_an_op_that_differs_from_itself_is_judged_no_further():
    report = audit_op(ops.float_atomics, {"x": "randn[M,96]", "weight": "randn[4,96]"}, **FEW)
    assert report.cause.relation == "repeat"
    assert {check.verdict for check in report.checks[1:]} == {"not exercised"}
    assert len(report.gaps) == len(report.checks) - 1


def test_a_required_relation_that_was_not_exercised_is_no_pass():
    report = audit_op(torch.neg, ["randn[M,16]"], require=["graph against eager"], **FEW)
    assert report.exit_code == (0 if torch.cuda.is_available() and FEW["device"] != "cpu" else 2)
    assert any("graph against eager" in gap for gap in report.gaps)
    assert audit_op(torch.neg, ["randn[M,16]"], require=["position"], **FEW).exit_code == 0
    with pytest.raises(ArgumentError, match="require has"):
        audit_op(torch.neg, ["randn[M,16]"], require=["luck"], **FEW)


def test_pieces_of_another_class_are_the_batch_sizes_doing():
    """257 rows are of the class of 1 row, and a piece of 85 rows, a size that was not tried, is not."""

    def between(x):
        return ops.rms(x, ops.pairs if 75 <= len(x) < 98 else ops.halves)

    report = audit_op(between, {"x": "randn[M,96]"}, rows=257, most_calls=3, device="cpu")
    verdicts = {check.relation: check.verdict for check in report.checks}
    assert report.classes == "1-74, 98-257 | 75-97"
    assert (verdicts["batch size"], verdicts["chunking"]) == ("varies", "holds")


def test_time_that_is_over_is_no_pass():
    report = audit_op(torch.neg, ["randn[M,16]"], require=["batch size"], limit_s=0.0, rows=12, device="cpu")
    assert report.verdict == "not audited"
    assert any("time was over" in gap for gap in report.gaps)


def test_an_op_that_raises_could_not_be_audited():
    report = audit_op(lambda x: x.view(7, 7), X, name="bad", **FEW)
    assert report.exit_code == 2
    assert "it raised RuntimeError" in report.error
    assert "bad: not audited" in report.text()


def test_what_has_no_axis_of_the_batch_is_said():
    report = audit_op(ops.with_a_sum_of_the_batch, X, **FEW)
    assert report.verdict == "holds"
    assert any("output 1" in entry for entry in report.not_observed)
    with pytest.raises(ArgumentError, match="no output has an axis"):
        audit_op(torch.sum, ["randn[M,16]"], **FEW)


def test_a_layout_that_is_refused_is_said_and_no_variance():
    def contiguous_only(x):
        if not x.is_contiguous() or x.data_ptr() % 16:
            raise ValueError("contiguous only")
        return x * 2

    report = audit_op(contiguous_only, X, **FEW)
    layout = next(check for check in report.checks if check.relation == "layout")
    assert (report.verdict, layout.verdict) == ("holds", "not exercised")
    assert "refused: rows further apart (ValueError)" in layout.detail


def test_values_that_are_refused_leave_the_other_relations():
    def no_nan(x):
        if x.isnan().any():
            raise ValueError("NaN")
        return x * 2

    report = audit_op(no_nan, X, **FEW)
    assert {c.relation: c.verdict for c in report.checks}["position"] == "holds"
    assert "neighbours: it raised ValueError: NaN" in report.gaps


def test_sizes_are_checked():
    with pytest.raises(ArgumentError, match="sizes go from 1 to 13, want 1 to 12"):
        audit_op(torch.neg, ["randn[M,16]"], rows=12, sizes=(1, 13), device="cpu")
    with pytest.raises(ArgumentError, match="rows is 3, want at least 5"):
        audit_op(torch.neg, ["randn[M,16]"], rows=3, device="cpu")


def test_launches_on_a_cpu_are_aten_ops():
    seen = launches_module.launches(lambda: torch.ones(4).exp().sum(), torch.device("cpu"))
    assert "aten::exp" in [launch.kernel for launch in seen]


def test_only_launches_that_differ_are_shown():
    a, b, c = (Launch(name, (1,), (32,)) for name in "abc")
    other = Launch("b", (1,), (64,))
    assert differing((a, b, c), (a, other, c)) == ((b,), (other,))
    assert differing((a, b), (a, b)) == ((), ())
    assert differing((a, c), (a, b, c)) == ((), (b,))
    assert str(other) == "b grid 1 block 64"
