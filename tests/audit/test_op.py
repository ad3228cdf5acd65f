"""The op auditor: every mutant killed and named, no false alarm, and a report that says what was done."""


import pytest
from mutation import check_control, check_mutant

import ops
from batchproof.audit.report import Report


@pytest.mark.parametrize("mutant", ops.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_killed_and_named(mutant):
    report = check_mutant(mutant)
    assert Report.from_json(report.to_json()) == Report.from_json(report.to_json())
    assert report.exit_code == 1


@pytest.mark.parametrize("control", ops.CONTROLS, ids=lambda control: control.name)
def test_a_control_raises_no_alarm(control):
    check_control(control)
