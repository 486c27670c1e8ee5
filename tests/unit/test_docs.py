"""What the docs say of results is what the ledger says."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_pages_and_figures_are_made_from_the_ledger() -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "build_results.py"))["pages"]()
    for name, text in pages.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, f"run docs/build_results.py: {name} is old"
    assert pages["results.md"].count("| e2abl |") >= 1
    assert pages["reproduction.md"].count("\n## ") >= 16
    figures = {f"figures/{path.name}" for path in (ROOT / "docs" / "figures").glob("*.svg")}
    assert figures == {name for name in pages if name.endswith(".svg")}
