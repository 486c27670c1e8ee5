"""Names that a stranger chose, everywhere they are shown: tables, terminal, report."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from antibackdoor.bench.poisoned import poison, read_experiment, write_poisoned
from antibackdoor.data.core import Splits
from antibackdoor.data.truth import read_truth
from antibackdoor.errors import InputError
from antibackdoor.files import HARMFUL, csv_cell, from_csv_cell, write_csv
from antibackdoor.report.page import render
from antibackdoor.report.run import read_run
from antibackdoor.runs import read_suspects
from hostile_files import refused, written
from toy import toy_images

NAMES = {
    "formula": '=HYPERLINK("http://evil","x")',
    "formula with a plus": "+1+cmd|' /C calc'!A0",
    "formula with a minus": "-2+3",
    "formula with an at": "@SUM(1)",
    "formula, full width": "＝1+1",
    "formula behind a tab": "\t=1+1",
    "formula behind a line break": "\r\n=1+1",
    "line break": "a\nb,c,d",
    "quotes": "a\"b'c",
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "terminal escape": "\x1b]0;owned\x07\x1b[2J",
    "C1 escape": "\x9b31m",
    "right to left": "\u202egnp.exe",
    "isolates": "\u2066a\u2069",
    "line separator": "a\u2028b",
    "NUL": "a\x00b",
    "backslashes": "'\\n\\x1b",
    "backslashes and a line break": "\\n\n\\",
    "leading quote": "'=1",
    "formula behind a semicolon": "a;=1+1|cmd",
    "formula behind semicolons and quotes": 'a; "=1;;\'+1"',
    "bell and backspace": "ok\x07\x08\x08bad",
}
FORMULA = re.compile(r"[\s\"]*[=+\-@＝＋－＠]").match


@pytest.mark.parametrize("case", NAMES)
def test_names_in_tables(tmp_path: Path, case: str) -> None:
    """Nothing runs or prints, any reader of CSV can read the table, and the name comes back."""
    name = NAMES[case]
    table = {"id": [name], "label": [name], "score": [1.0], "probability": [0.5], "flagged": [True],
             "suggested_label": [name], "reason": [""]}  # fmt: skip
    write_csv(tmp_path / "suspects.csv", pd.DataFrame(table))
    text = (tmp_path / "suspects.csv").read_bytes().decode("utf-8")
    assert not HARMFUL.search(text.replace("\n", "")) and text.count("\n") == 2
    cells = list(csv.reader(text.splitlines()))[1]
    assert not cells[0].startswith(("=", "+", "-", "@", "＝", "\t", "\r", "\n"))
    for separator in ";\t|":  # as a spreadsheet may take it, after the user's settings
        assert not [cell for row in csv.reader(text.splitlines(), delimiter=separator) for cell in row if FORMULA(cell)]
    assert from_csv_cell(cells[0]) == name
    assert read_suspects(tmp_path)["id"].tolist() == [name] and read_suspects(tmp_path)["label"].tolist() == [name]


@pytest.mark.parametrize("case", NAMES)
def test_names_in_sentences_and_reports(tmp_path: Path, case: str) -> None:
    name = NAMES[case]
    assert str(InputError(f"cannot read {name}.")).isprintable()
    table = {"id": [name], "label": [name], "score": [1.0], "probability": [0.5], "flagged": [True],
             "suggested_label": ["x"], "reason": [name]}  # fmt: skip
    write_csv(tmp_path / "suspects.csv", pd.DataFrame(table))
    written(tmp_path / "verdict.json", '{"poisoned": true, "confidence": 0.9}')
    page = render(read_run(tmp_path)).encode("utf-8").decode()  # and it can be written
    visible = re.sub(r"<script.*?</script>", "", page[page.index("<body") :], flags=re.S)
    assert "<img src=x" not in visible and "<script>alert" not in visible
    assert not HARMFUL.search(visible.replace("\n", "").replace("\t", ""))


@pytest.mark.parametrize("text", ["", "plain", "a\\b", "\\", "'", "''", "é", "a b", "-"])
def test_cells_come_back_as_they_were(text: str) -> None:
    assert from_csv_cell(csv_cell(text)) == text


def test_a_name_that_is_no_text_is_refused() -> None:
    """Tables could not hold it, which would be told after the training."""
    refused(lambda: replace(toy_images(2), ids=["a", "\udcff\udcfe"]), r"name '\\udcff\\udcfe' is no text")
    assert from_csv_cell(csv_cell("\udcff")) == "\udcff"


def test_the_truth_is_read_back_under_any_name(tmp_path: Path) -> None:
    train = toy_images(24)
    names = [*NAMES.values(), *(str(k) for k in range(24 - len(NAMES)))]
    named = replace(train, ids=[name.replace("\x00", "0") for name in names])
    made = poison(Splits(named, toy_images(12, seed=1)), "badnets", {"rate": 0.2, "target": 0})
    write_poisoned(made, tmp_path / "set")
    assert not HARMFUL.search((tmp_path / "set" / "truth.csv").read_text().replace("\n", ""))
    assert read_truth(tmp_path / "set" / "truth.csv", made.splits.train).poisoned.sum() > 0
    assert read_experiment(tmp_path / "set", made.splits).truth.poisoned.equal(made.experiment.truth.poisoned)
