"""The report: which verdict and exit code follow, that JSON brings it back, and how it reads."""

import dataclasses
import json

import pytest
import torch

from batchproof import __version__
from batchproof.audit.report import SCHEMA, Check, Difference, Launch, Report, Series, describe_environment
from batchproof.errors import ArgumentError

HOLDS, VARIES, SKIPPED = (Check(f"that {v}", v, 4, "seen") for v in ("holds", "varies", "not exercised"))


def full_report():
    """A report with every field filled."""
    difference = Difference("residual", (3, 17), 0.5, "nan", 76, 4096, 2, 0.25)
    launches = (
        (Launch("norm", (255, 1, 1), (1024, 1, 1), 128),),
        (Launch("aten::sum"), Launch("norm", (256,), (256,))),
    )
    cause = Check("batch size", "varies", 9, "rows differ", 256, "rows", "ns::norm", "layer 3", difference, launches)
    return Report(
        target="op",
        name="ns:norm",
        checks=(Check("position", "holds", 12, "moved"), cause, Check("graph", "not exercised", 0, "needs CUDA")),
        classes="1-255 | 256-4096",
        not_observed=("norm: compiled",),
        series=(Series("bits", "classes", "rows", "class", (1, 256.0, "all"), (0, 1.5, None)),),
        reproduction="import torch\nprint(1)",
        required=("graph", "chunking"),
        settings={"seed": 0, "shape": [2, 3]},
        environment={"device": "cpu", "torch": "2.11"},
        seconds=1.25,
        error="stopped early",
    )


@pytest.mark.parametrize(
    ("checks", "required", "error", "verdict", "exit_code"),
    [
        ((HOLDS,), (), None, "holds", 0),
        ((HOLDS, SKIPPED), (), None, "holds", 0),
        ((HOLDS, SKIPPED), (HOLDS.relation,), None, "holds", 0),
        ((HOLDS, VARIES), (), None, "varies", 1),
        ((VARIES,), ("absent",), "failed later", "varies", 1),
        ((), (), None, "not audited", 2),
        ((SKIPPED,), (), None, "not audited", 2),
        ((HOLDS, SKIPPED), (SKIPPED.relation,), None, "not audited", 2),
        ((HOLDS,), ("absent",), None, "not audited", 2),
        ((HOLDS,), (), "failed later", "not audited", 2),
    ],
)
def test_the_verdict_follows_from_the_relations(checks, required, error, verdict, exit_code):
    report = Report("op", "x", checks, required=required, error=error)
    assert (report.verdict, report.exit_code) == (verdict, exit_code)


def test_the_first_relation_that_varies_is_the_cause():
    later = dataclasses.replace(VARIES, relation="later")
    assert Report("op", "x", (HOLDS, VARIES, later)).cause is VARIES
    assert Report("op", "x", (HOLDS, SKIPPED)).cause is None


def test_gaps_are_what_was_skipped_and_what_was_required_but_unknown():
    report = Report("op", "x", (HOLDS, SKIPPED), required=("b", "a", HOLDS.relation))
    assert report.gaps == (
        "that not exercised: seen",
        "a: required, and was not looked at",
        "b: required, and was not looked at",
    )


def test_a_verdict_is_one_of_three():
    with pytest.raises(ArgumentError, match="verdict is 'passed', want 'holds', 'varies' or 'not exercised'"):
        Check("batch size", "passed")


@pytest.mark.parametrize("report", [full_report(), Report("model", "m")], ids=["full", "empty"])
def test_json_brings_a_report_back(report):
    text = report.to_json()
    assert Report.from_json(text) == report
    data = json.loads(text)
    assert (data["schema"], data["verdict"], data["gaps"]) == (SCHEMA, report.verdict, list(report.gaps))
    fields = {field.name for field in dataclasses.fields(Report)}
    assert set(data) == fields | {"schema", "verdict", "gaps"}


def test_every_field_of_the_full_report_is_filled():
    def leaves(value):
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                yield field.name, getattr(value, field.name)

    report = full_report()
    cause = report.cause
    for part in (report, cause, cause.difference, cause.launches[0][0]):
        assert [name for name, value in leaves(part) if value in (None, (), "", 0, {})] == []


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ('{"schema": "batchproof.audit/2"}', "'batchproof.audit/2'"),
        ("{}", "None"),
        ("[1]", "'list'"),
        ('"text"', "'str'"),
    ],
)
def test_another_schema_is_refused(text, seen):
    with pytest.raises(ArgumentError, match=f"schema is {seen}, want '{SCHEMA}'"):
        Report.from_json(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("t", "curve", "x", "y", (1,), (1.0,)), "kind of a series is 'curve'"),
        (("t", "spread", "x", "y", (1, 2), (1.0,)), "2 x and 1 y"),
        (("t", "spread", "x", "y", (1,), (float("nan"),)), "the value nan, want finite"),
    ],
)
def test_a_series_can_be_drawn_and_written(given, message):
    with pytest.raises(ArgumentError, match=message):
        Series(*given)


def test_the_text_says_the_verdict_first_and_everything_after():
    assert (
        full_report().text()
        == """\
op ns:norm: varies by batch size
  stopped early
  batch size varies: rows differ
  op: ns::norm, in layer 3
  from 256 rows on
  residual: 76 of 4096 elements differ, at most 2 ulp apart, first at [3, 17]: 0.5 against 'nan'
  kernels before: norm grid 255x1x1 block 1024x1x1 shared 128 B
  kernels after:  aten::sum
  kernels after:  norm grid 256 block 256
  bit classes of the batch size: 1-255 | 256-4096

relations
  position    holds              12 compared  moved
  batch size  varies              9 compared  rows differ
  graph       not exercised       0 compared  needs CUDA

not covered by this verdict
  graph: needs CUDA
  chunking: required, and was not looked at

not observed
  norm: compiled

to see it:
  import torch
  print(1)

device cpu, torch 2.11; 1.2 s
"""
    )


def test_the_text_of_a_failed_audit_says_why():
    text = Report("op", "a:b", error="No module named 'a'", environment={"device": "cpu"}).text()
    assert text == "op a:b: not audited\n  No module named 'a'\n\nrelations\n\ndevice cpu; 0.0 s\n"


def test_the_environment_names_device_and_versions():
    found = describe_environment(torch.device("cpu"))
    assert found == describe_environment() | {"torch": torch.__version__, "batchproof": __version__}
    assert found["device"].startswith("cpu ")
