"""The figures of README and docs are those of the committed result files."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def readme(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import readme

    return readme


def test_figures_are_the_files_figures(readme):
    for page in readme.pages():
        text = page.read_text()
        assert readme.render(page, text) == text, f"{page.name}: run python benchmarks/readme.py"


def test_a_changed_figure_is_noticed(readme):
    text = readme.README.read_text().replace("| 8 |", "| 9 |", 1)
    assert readme.render(readme.README, text) != text


def test_a_page_without_its_markers_is_noticed(readme):
    with pytest.raises(SystemExit, match="0 times, want once"):
        readme.render(readme.README, "no markers")


def test_every_marker_of_a_norm_has_a_benchmark(readme):
    """So that naming a benchmark in ``NORMS`` is all it takes to show it."""
    markers = re.findall(r"<!-- begin: (\w+) h200 -->", readme.BENCHMARKS.read_text())
    assert set(readme.NORMS) <= set(markers)
    assert all((ROOT / "benchmarks" / f"bench_{name}.py").is_file() for name in markers)


def test_links_and_pictures_exist():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
