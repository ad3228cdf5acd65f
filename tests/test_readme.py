"""README's figures are those of the committed result files."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_figures_are_the_files_figures(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import readme

    text = readme.README.read_text()
    assert readme.render(text) == text, "run python benchmarks/readme.py"


def test_a_changed_figure_is_noticed(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import readme

    text = readme.README.read_text().replace("| 8 |", "| 9 |", 1)
    assert readme.render(text) != text


def test_links_and_pictures_exist():
    import re

    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
