"""What the docs say of results is what the ledger says."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_results_page_is_made_from_the_ledger() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert page == runpy.run_path(str(ROOT / "docs" / "build_results.py"))["results"]()
    assert page.count("| e2abl |") >= 1
