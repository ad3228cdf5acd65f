"""The house rules that a machine can check."""

import ast
import pkgutil
from pathlib import Path

import pytest
import torch

import batchproof
from batchproof import ops
from batchproof.registry import all_specs

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
FAMILIES = [module.name for module in pkgutil.iter_modules(ops.__path__) if not module.name.startswith("_")]
MAY_PRINT = {"cli", "demo.py"}


def test_there_is_something_to_check():
    assert len(SOURCES) > 20
    assert {"rms_norm", "linear", "attention"} <= set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_op_family_has_a_test_file(family):
    assert (ROOT / "tests" / "ops" / f"test_{family}.py").is_file()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_op_family_is_documented(family):
    assert f"`{family}`" in (ROOT / "docs" / "ops.md").read_text(), f"docs/ops.md does not mention `{family}`"


@pytest.mark.parametrize("name", all_specs())
def test_a_spec_is_a_registered_documented_op(name):
    spec = all_specs()[name]
    assert spec.name == name == spec.op.__name__
    assert hasattr(torch.ops.batchproof, name), f"torch.ops.batchproof.{name} does not exist"
    documentation = spec.op.__doc__ or ""
    assert "nvariance" in documentation, "its docstring does not say why it is invariant"
    assert name in batchproof.__all__
    assert set(spec.batch_axes) <= set(spec.sample_inputs(2, spec.dtypes[0], torch.device("cpu"), torch.Generator()))


def test_files_are_short():
    long = {str(path.relative_to(ROOT)): n for path in SOURCES if (n := len(path.read_text().splitlines())) > 430}
    assert long == {}, "files of more than about 400 lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_the_library_does_not_print(path):
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    lines = [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert path.relative_to(ROOT / "src" / "batchproof").parts[0] in MAY_PRINT or lines == []


def test_public_names_are_sorted_and_there():
    first, *names = batchproof.__all__
    assert first == "__version__"
    assert names == sorted(names)
    assert len(set(batchproof.__all__)) == len(batchproof.__all__)
    assert set(batchproof.__all__) <= set(dir(batchproof))
    for name in batchproof.__all__:
        value = getattr(batchproof, name)
        assert name == "__version__" or (callable(value) and value.__doc__), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        batchproof.nothing


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_rooms_import_one_way(path):
    """ops knows no integration, no generation and no audit; audit no integration; nobody but cli knows all."""
    room = path.relative_to(ROOT / "src" / "batchproof").parts[0]
    forbidden = {"ops": {"audit", "integrations", "generation", "cli", "mode"}, "audit": {"integrations", "cli"}}
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and (node.level or node.module.startswith("batchproof")):
            imported.add(node.module.removeprefix("batchproof.").split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.level:
            imported.update(alias.name for alias in node.names)
    assert not imported & forbidden.get(room, set())
