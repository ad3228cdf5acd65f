"""batchproof audit op | model | server: exit codes, reports, and errors that name what was seen."""

import contextlib
import io
import json

import pytest
import servers

from batchproof import cli
from batchproof.audit.report import SCHEMA, Report
from batchproof.cli.audit import resolve
from batchproof.errors import ArgumentError

OP = ["--rows", "12", "--sizes", "1,2,5,12", "--device", "cpu"]


def run(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["audit", *map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "audited.py"
    path.write_text("def varies(x):\n    print('noise')\n    return x + len(x) * (len(x) > 3)\n\nNUMBER = 3\n")
    return path


def test_an_op_that_holds(tmp_path):
    code, out, _ = run("op", "torch:neg", "--arg", "input=randn[M,8]", *OP)
    assert code == 0
    assert out.startswith("op torch.neg: holds\n")


def test_an_op_that_varies_and_its_reports(tmp_path, module):
    page, data = tmp_path / "new" / "report.html", tmp_path / "new" / "report.json"
    code, out, err = run("op", f"{module}:varies", "--arg", "x=randn[M,8]", "--html", page, "--json", data, *OP)
    assert code == 1
    assert "from 4 rows on" in out
    assert "noise" not in out
    assert "noise" in err
    report = Report.from_json(data.read_text())
    assert json.loads(data.read_text())["schema"] == SCHEMA
    assert (report.cause.relation, report.cause.threshold) == ("batch size", 4)
    assert page.read_text().startswith("<!doctype html>")
    assert sorted(file.name for file in page.parent.iterdir()) == ["report.html", "report.json"]


def test_arguments_by_place():
    assert run("op", "torch:add", "--arg", "randn[M,8]", "--arg", "1.5", *OP)[0] == 0
    code, _, err = run("op", "torch:add", "--arg", "input=randn[M,8]", "--arg", "1.5", *OP)
    assert code == 2
    assert "want all as NAME=VALUE or all by place" in err


def test_an_op_of_batchproof_brings_its_arguments():
    code, out, _ = run("op", "batchproof:rms_norm", "--dtype", "float32", *OP)
    assert code == 0
    assert out.startswith("op batchproof.rms_norm: holds")


def test_a_required_relation_that_cannot_be_exercised(tmp_path):
    code, out, _ = run("op", "torch:neg", "--arg", "input=randn[M,8]", "--require", "graph against eager", *OP)
    assert code == 2
    assert "not covered by this verdict" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["op", "torch"], "want MODULE:NAME"),
        (["op", "no_such_module:f"], "no_such_module cannot be imported"),
        (["op", "no_such_file.py:f"], "no Python file"),
        (["op", "torch:no_such_op"], "torch has no no_such_op"),
        (["op", "torch:pi"], "of type float, want something that can be called"),
        (["op", "torch:neg", "--arg", "input=randn[N,8]"], "a size of input is 'N'"),
        (["op", "torch:neg", "--arg", "input=randn[M,8]", "--sizes", "1,x"], "--sizes is '1,x'"),
        (["op", "torch:neg", "--dtype", "bf17"], "dtype is 'bf17'"),
        (["op", "torch:neg", "--arg", "input=randn[M,8]", "--require", "luck"], "require has"),
        (["server", "--base-url", "http://192.0.2.1/v1", "--model", "m"], "192.0.2.1"),
        (["model", "--model", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_what_is_wrong_is_named(arguments, message):
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_resolve_takes_attributes_and_files(module):
    import torch

    assert resolve("torch:nn.functional.relu") is torch.nn.functional.relu
    assert resolve(f"{module}:varies").__name__ == "varies"
    with pytest.raises(ArgumentError, match="of type int"):
        resolve(f"{module}:NUMBER")


@pytest.mark.parametrize(("options", "code"), [([], 1), (["--make-invariant"], 0)])
def test_the_built_in_model(options, code):
    found, out, _ = run("model", "--batch-sizes", "2,5", *options)
    assert found == code, out
    assert "LlamaForCausalLM" in out


def test_a_server():
    with servers.serving(servers.Engine()) as server:
        code, out, _ = run("server", "--base-url", server.url, "--model", "tiny", "--max-concurrency", "4")
    assert code == 0, out
    assert "concurrency" in out


@pytest.mark.parametrize("target", ["op", "model", "server"])
def test_help_teaches(target):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        cli.main(["audit", target, "--help"])
    assert f"batchproof audit {target} " in out.getvalue()
    assert "--require" in out.getvalue()
