"""The tables of what varies, and how their result files come about, with audits that were planted."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from batchproof.audit.report import Check, Difference
from batchproof.audit.server.relations import Finding, Relations
from batchproof.audit.server.storm import Probe, Storm

ROOT = Path(__file__).parent.parent
DIFFERENCE = Difference("logprobs of the short probe", (0,), -1.5, -1.25, 1, 16)


@pytest.fixture
def bench(monkeypatch):
    """The modules under benchmarks, by name."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import audit_tables
    import what_varies

    return SimpleNamespace(audit_tables=audit_tables, what_varies=what_varies)


# Servers.


def check(relation, size, running, words=None, notes=(), threshold=None):
    """As an audit makes it of ``size`` requests together, some of ``words`` words, in which an answer changed."""
    finding = Finding(relation, 3, list(notes), threshold=threshold, largest=size, peak=size)
    if words is not None:
        finding.storm, finding.difference = Storm(Probe("short", ""), size, "last", words, 16, 0.1), DIFFERENCE
    server = SimpleNamespace(_bounded=SimpleNamespace(client=SimpleNamespace(running=running)), _formed=True)
    Relations._conclude(server, finding)
    return asdict(finding.check())


def served(*rows):
    facts = {"device": "NVIDIA H200", "torch": "2.11.0", "vllm": "0.26.0", "max_concurrency": 300}
    return facts | {"rows": [{"server": f"server {i}", **row} for i, row in enumerate(rows)]}


def test_servers_table(bench):
    cache = Check("cache", "varies", 4, "48 cached tokens | change it; 400 do", difference=DIFFERENCE)
    checks = [
        asdict(cache),
        check("concurrency", 126, 179.0, 4, ["not the same each time: tried 2 times more"]),
        check("short neighbours", 32, 179.0, 1),
        check("seeded sampling", 2, 200.0, 4, threshold=2),
    ]
    holds = [
        asdict(Check("cache", "not exercised", 0, "no prompt came from a cache")),
        check("concurrency", 300, 125.0),
        check("short neighbours", 32, None),
    ]
    failed = {"verdict": "not audited", "error": "it ended with exit code 1"}
    lines = bench.audit_tables.servers(served({"checks": checks}, {"checks": holds}, failed)).splitlines()
    assert lines[:-2] == [
        "| relation | server 0 | server 1 | server 2 |",
        "|---|---|---|---|",
        "| cache | varies: 48 cached tokens \\| change it | not exercised | not audited |",
        "| concurrency | varies: 126 requests, the others of 4 words, not each time | holds | not audited |",
        "| short neighbours | varies: 32 requests, the others of 1 word | holds | not audited |",
        "| seeded sampling | varies: from 2 requests on | not audited | not audited |",
        "| answers compared | 13 | 6 | 0 |",
        "| most requests seen running at once | 200 | 125 | not counted |",
    ]
    assert "Up to 300 requests" in lines[-1]
    assert "server 2: it ended with exit code 1." in lines[-1]
    assert "NVIDIA H200, vLLM 0.26.0, torch 2.11.0 (`benchmarks/results/h200/what_varies_servers.json`" in lines[-1]


def test_the_committed_audits_are_those_the_page_speaks_of(bench):
    result = json.loads((ROOT / "benchmarks" / "results" / bench.audit_tables.SERVERS).read_text())
    varying = {row["server"]: [c for c in row["checks"] if c["verdict"] != "holds"] for row in result["rows"]}
    assert {server: [check["relation"] for check in checks] for server, checks in varying.items()} == {
        "vLLM default": [
            "cache", "concurrency", "long neighbours", "short neighbours", "staggered arrivals", "seeded sampling",
        ],
        "vLLM batch-invariant": ["concurrency", "long neighbours"],
        "with batchproof": [],
    }  # fmt: skip
    assert {len(row["checks"]) for row in result["rows"]} == {7}
    for differs in (check["difference"] for check in varying["vLLM batch-invariant"]):
        assert (differs["output"].split()[0], differs["index"]) == ("logprobs", [0])


# Ops.


def test_every_library_is_in_the_summary(bench):
    assert set(bench.audit_tables.LIBRARIES) == {case.library for case in bench.what_varies.cases()}


@pytest.fixture
def audit(bench, monkeypatch, tmp_path):
    """Run the command line with planted audits and facts; the file's content after it."""
    what_varies, out = bench.what_varies, tmp_path / "what_varies.json"

    def run(*arguments, **facts):
        def audited(case, *_):
            return {"library": case.library, "op": case.op, "verdict": "holds", "classes": "1-9", "seconds": 1.0}

        facts = {"device": "planted", "torch": "2.11.0", "commit": "aaaaaaa", "date": "2026-11-24"} | facts
        monkeypatch.setattr(what_varies, "run_case", audited)
        monkeypatch.setattr(what_varies, "describe", lambda: dict(facts))
        monkeypatch.setattr(sys, "argv", ["what_varies.py", "--out", str(out), *arguments])
        assert what_varies.main() == 0
        return json.loads(out.read_text())

    return run


def names(rows):
    return [(row["library"], row["op"]) for row in rows]


def test_without_keep_a_file_has_what_was_asked_for(audit):
    audit("--only", "Liger", "Quack")
    result = audit("--only", "Quack", commit="bbbbbbb")
    assert names(result["rows"]) == [("Quack", "rmsnorm_fwd"), ("Quack", "softmax_fwd")]
    assert (result["asked"], result["commit"]) == (2, "bbbbbbb")
    assert not any("commit" in row for row in result["rows"])


def test_keep_replaces_and_adds_rows_in_their_order(bench, audit):
    first = audit("--keep", "--only", "torch", "Quack")  # no file yet: nothing to keep
    result = audit("--keep", "--only", "Liger", "Quack", commit="bbbbbbb")
    order = [(case.library, case.op) for case in bench.what_varies.cases()]
    wanted = [key for key in order if key[0] in ("torch", "torch.compile", "Liger", "Quack")]
    assert names(result["rows"]) == wanted
    assert (result["asked"], result["commit"], result["date"]) == (len(wanted), "aaaaaaa", "2026-11-24")
    for row in result["rows"]:
        of_first = row["library"].startswith("torch")
        assert row.get("commit") == (None if of_first else "bbbbbbb"), row
        assert "date" not in row
        assert not of_first or row in first["rows"]
    assert list(result) == list(first)


def test_keep_drops_rows_of_cases_that_are_gone(bench, audit, monkeypatch):
    audit("--only", "Quack")
    cases = [case for case in bench.what_varies.cases() if case.op != "softmax_fwd"]
    monkeypatch.setattr(bench.what_varies, "cases", lambda: cases)
    result = audit("--keep", "--only", "Quack")
    assert names(result["rows"]) == [("Quack", "rmsnorm_fwd")]
    assert result["asked"] == 1


def test_keep_refuses_a_file_of_another_device_or_version(audit):
    audit("--only", "Quack")
    with pytest.raises(SystemExit, match=r"is of device planted, torch 2\.11\.0, want another, 2\.12\.0"):
        audit("--keep", "--only", "Liger", device="another", torch="2.12.0")


def test_tables_take_rows_of_another_commit(bench):
    row = {"library": "Quack", "op": "rmsnorm_fwd", "verdict": "holds", "classes": "1-9", "varies": [], "cause": None}
    result = {"device": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "rows": [row]}
    other = result | {"rows": [row | {"commit": "bbbbbbb"}]}
    assert "| rmsnorm_fwd | 1-9 | no |  |" in bench.audit_tables.what_varies(other)
    assert bench.audit_tables.what_varies(other) == bench.audit_tables.what_varies(result)
    assert "| Quack | 1 | none |" in bench.audit_tables.summary(other)
