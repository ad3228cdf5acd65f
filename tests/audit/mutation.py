"""The mutation suite's vocabulary: planted variances that an audit must find and name, and controls it must pass.

A mutant is a callable, model or server that varies with the batch in one known way; it is killed if the audit says so,
and named if the first relation that varies, the op and the threshold are the planted ones. A control does not vary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from batchproof.audit.report import Report


@dataclass(frozen=True)
class Mutant:
    """A planted variance. ``seen`` says where the like was seen in the wild; None means: not looked at."""

    name: str
    seen: str
    audit: Callable[[], Report]
    relation: str
    op: str | None = None
    threshold: int | None = None
    classes: str | None = None


@dataclass(frozen=True)
class Control:
    """Something that does not vary, and might be thought to."""

    name: str
    audit: Callable[[], Report]


@dataclass
class Score:
    """What the suite prints at the end of ``make test``."""

    killed: dict[str, bool] = field(default_factory=dict)  # name: and named
    survived: list[str] = field(default_factory=list)
    quiet: list[str] = field(default_factory=list)
    false_alarms: list[str] = field(default_factory=list)

    def line(self) -> str:
        """One line of the score."""
        mutants = len(self.killed) + len(self.survived)
        controls = len(self.quiet) + len(self.false_alarms)
        return (
            f"auditor: {len(self.killed)} of {mutants} mutants killed, {sum(self.killed.values())} of them named; "
            f"{len(self.false_alarms)} false alarms in {controls} controls"
        )


SCORE = Score()


def check_mutant(mutant: Mutant) -> Report:
    """Audit a mutant, count it, and assert that it was killed and named."""
    report = mutant.audit()
    if report.verdict != "varies":
        SCORE.survived.append(mutant.name)
    assert report.verdict == "varies", f"survived:\n{report.text()}"
    wrong = _misnamed(mutant, report)
    SCORE.killed[mutant.name] = not wrong
    assert not wrong, f"{'; '.join(wrong)}\n{report.text()}"
    return report


def check_control(control: Control) -> Report:
    """Audit a control, count it, and assert that nothing was found and that something was compared."""
    report = control.audit()
    (SCORE.quiet if report.verdict == "holds" else SCORE.false_alarms).append(control.name)
    assert report.verdict == "holds", report.text()
    assert sum(check.cases for check in report.checks) > 0
    return report


def _misnamed(mutant: Mutant, report: Report) -> list[str]:
    cause = report.cause
    wrong = []
    if cause.relation != mutant.relation:
        wrong.append(f"relation is {cause.relation!r}, want {mutant.relation!r}")
    if mutant.op is not None and mutant.op not in (cause.op or ""):
        wrong.append(f"op is {cause.op!r}, want {mutant.op!r} in it")
    if mutant.threshold is not None and cause.threshold != mutant.threshold:
        wrong.append(f"threshold is {cause.threshold}, want {mutant.threshold}")
    if mutant.classes is not None and report.classes != mutant.classes:
        wrong.append(f"classes are {report.classes!r}, want {mutant.classes!r}")
    return wrong
