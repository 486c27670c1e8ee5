"""The notebook-style examples of the docs run as scripts, with hardly any training."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from antibackdoor.training.loop import Recipe

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "docs" / "examples").glob("*.py"))


@pytest.mark.long
@pytest.mark.timeout(400)  # some 20 s of work; more where a machine is shared
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Recipe, "epochs_for", lambda self, n: 1)
    runpy.run_path(str(path))
    assert list(tmp_path.glob("*-run/report.html"))


def test_every_example_has_its_page() -> None:
    assert [path.stem for path in EXAMPLES] == ["images", "series"]
    assert all(path.name in path.with_suffix(".md").read_text() for path in EXAMPLES)
