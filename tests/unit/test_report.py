"""The page of a run: what it says, what it survives, and what a hostile data set cannot make it do."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs
from toy_run import toy_run

from antibackdoor.errors import InputError
from antibackdoor.report import build_report
from antibackdoor.report.figures import FLAGGED, REST, charts, sketch
from antibackdoor.report.looks import where_in_words
from antibackdoor.report.pictures import picture
from antibackdoor.report.run import read_run
from antibackdoor.report.words import duration, measure, percent, plain
from antibackdoor.threats import references

OPTIONAL = ["metrics.json", "history.jsonl", "config.json", "env.json", "gallery.npz", "comparison.json", "data.json",
            "truth.csv", "attention.npz"]  # fmt: skip


class Elements(HTMLParser):
    """Tags with their attributes, the text in between, and the text of scripts apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts = "", list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts.append(data)
        elif self.cdata_elem is None:
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def read(folder: Path) -> Elements:
    return Elements(build_report(folder).read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["image", "series"])
def test_poisoned_run(tmp_path: Path, kind: str) -> None:
    page = read(toy_run(tmp_path, kind, n=600))
    assert "This data set looks poisoned" in page.text
    assert "9.1%" in page.text and "97%" in page.text and "7,913 of 10,000" in page.text
    assert "no defense" in page.text and "99.8%" in page.text
    shown, trusted, first, maps, sketch = 48, 6, 6 if kind == "image" else 4, 2, kind == "series"
    assert page.count("img" if kind == "image" else "svg") == shown + trusted + first + maps + sketch
    pictures = [attrs for tag, attrs in page.tags if tag in ("img", "svg")]
    assert all(attrs.get("alt") or attrs.get("aria-label") for attrs in pictures)
    assert len([a for t, a in page.tags if t == "script" and a.get("type") == "application/json"]) == 3
    assert "12 min 34 s" in page.text and "defense.options.isolation_ratio" in page.text


def test_the_first_screen_proves_it(tmp_path: Path) -> None:
    page = read(toy_run(tmp_path, n=600))
    assert "Very sure: confidence 97% (not calibrated)" in page.text
    assert "photos/from-the-web" in page.text and "cifar10" in page.text.split("Details")[-1]
    assert "suspects: strongest at the bottom right; half of it lies on 0.5% of the image" in page.text
    assert "trusted samples: spread over the image" in page.text
    series = read(toy_run(tmp_path / "series", "series", n=600))
    assert "strongest around step 402 of 900 of channel 1; half of it lies on 0.1% of the series" in series.text


def test_the_finding_is_named_as_elsewhere(tmp_path: Path) -> None:
    folder = toy_run(tmp_path, n=60)
    page = read(folder)
    for entry in references(True):
        assert entry["id"] in page.text and entry["name"] in page.text and entry["why"] in page.text
    (folder / "verdict.json").write_text('{"poisoned": true, "references": ["AML", {"id": "X-1"}, 3]}')
    assert "X-1" in read(folder).text
    (folder / "verdict.json").write_text('{"poisoned": true}')
    assert "Findings elsewhere" not in read(folder).text


def test_no_number_is_sold_as_a_chance(tmp_path: Path) -> None:
    text = read(toy_run(tmp_path, n=60)).text
    assert "estimated chance" not in text and text.count("calibrated") >= 3
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    (tmp_path / "verdict.json").write_text(json.dumps({**verdict, "margin": 1.7}))
    known = read(tmp_path).text
    assert "confidence 97% (calibrated)" in known
    assert "your data may be unlike them" in known and "Neither is calibrated" not in known
    cut = read_run(tmp_path).suspects.cut
    assert f"{cut:.3g} is the lowest that was flagged" in text


def test_a_reason_is_told_once_though_single_cards_have_another(tmp_path: Path) -> None:
    folder = toy_run(tmp_path, n=600)
    table = (folder / "suspects.csv").read_text()
    reason = "learned in the first epoch and kept by the shallow head"
    (folder / "suspects.csv").write_text(table.replace(reason, "something else", 1))
    page = read(folder)
    assert page.text.count(reason) == 1 and page.text.count("something else") == 1


def test_the_sketch_was_not_told_the_truth(tmp_path: Path) -> None:
    suspects = read_run(toy_run(tmp_path, n=600)).suspects
    assert suspects.truth is not None
    assert set(re.findall(r'fill="(.*?)"', sketch(suspects))) == {REST, FLAGGED}
    assert "heights logarithmic" in read(tmp_path).text


def test_the_header_names_the_end_of_a_long_path(tmp_path: Path) -> None:
    folder = toy_run(tmp_path, n=60)
    for given, shown in (
        ("/a/long/way/set/data.npz", "set/data.npz"),
        ("C:\\a\\b\\set", "b/set"),
        ("cifar10", "cifar10"),
    ):
        (folder / "data.json").write_text(json.dumps({"name": given}))
        page = read(folder)
        assert shown in page.text.split("Evidence")[0] and given in page.text


def test_stages_of_one_kind_are_one_band(tmp_path: Path) -> None:
    stages = [("trap", 20), *((f"outsider {k}", 4) for k in range(10)), ("training", 30), ("x", 1)]
    rows = [{"stage": name, "epoch": e, "witness_loss": 1.0} for name, length in stages for e in range(length)]
    folder = toy_run(tmp_path, n=60)
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chart = {chart.key: chart for chart in charts(read_run(folder))}["losses"]
    assert "trap (20), outsider 0 to 9 (40), training (30), x (1). The trap is" in chart.caption
    assert "Each outsider is" in chart.caption and "more" not in chart.caption
    layout = chart.figure["layout"]
    assert [(note["text"], note["yanchor"]) for note in layout["annotations"]] == [
        ("trap", "bottom"),
        ("outsider 0 to 9", "bottom"),
        ("training", "bottom"),
    ], "a band too narrow for its name has none, and no name lies on the curves"
    assert len(layout["shapes"]) == 4
    many = [{"stage": letter, "epoch": 1, "main_loss": 1.0} for letter in "abcdefghijkl"]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    assert "g (1), h (1) and 4 more." in {c.key: c for c in charts(read_run(folder))}["losses"].caption


@pytest.mark.parametrize(
    ("aligned", "steps", "words"),
    [
        ("", slice(4, 7), "strongest around step 5 of 40; half of it lies on 3.8% of the series"),
        ("start", slice(4, 7), "strongest around step 5; half of it lies on 3.8% of the series"),
        ("end", slice(37, 40), "strongest in the last 3 steps; half of it lies on 3.8% of the series"),
        ("end", slice(39, 40), "strongest at the last step; half of it lies on 1.2% of the series"),
        ("end", slice(30, 33), "strongest around 8 steps before the end; half of it lies on 3.8% of the series"),
    ],
)
def test_where_in_series_of_unequal_length(tmp_path: Path, aligned: str, steps: slice, words: str) -> None:
    weight = np.zeros((2, 40), np.float32)
    weight[:, steps] = 1
    assert where_in_words(weight, weight, aligned) == words
    maps = dict.fromkeys(("suspects", "trusted", "suspects_mean", "trusted_mean"), weight)
    folder = toy_run(tmp_path, "series", n=60)
    np.savez(folder / "attention.npz", label="b", witness="model", n=10, aligned=aligned, **maps)
    text = read(folder).text
    assert words in text and (f"lie over each other by their {aligned}s" in text) == bool(aligned)


def test_the_truth_is_counted(tmp_path: Path) -> None:
    run = read_run(toy_run(tmp_path, n=600))
    truth, flagged = run.suspects.truth, run.suspects.flagged
    assert truth is not None and 0 < (truth & flagged).sum() < truth.sum()
    page = read(tmp_path)
    assert f"{(truth & flagged).sum()} found" in page.text and f"{(truth & ~flagged).sum()} missed" in page.text
    assert f"{(~truth & flagged).sum()} wrongly suspected" in page.text
    assert page.text.count("truth: poisoned") == truth[:48].sum()
    (tmp_path / "truth.csv").unlink()
    assert "wrongly suspected" not in read(tmp_path).text


def test_no_verdict_is_not_nothing_found(tmp_path: Path) -> None:
    folder = toy_run(tmp_path, n=50, poisoned=False)
    (folder / "verdict.json").write_text('{"poisoned": false, "confidence": 0.0, "evidence": ["Looks for no poison."]}')
    page = read(folder)
    assert "No verdict" in page.text and "Nothing found" not in page.text and "Looks for no poison." in page.text


def test_headings_leave_no_level_out(tmp_path: Path) -> None:
    page = read(toy_run(tmp_path, n=200))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))


def test_nothing_found_is_no_proof(tmp_path: Path) -> None:
    page = read(toy_run(tmp_path, n=600, poisoned=False))
    assert "Nothing found" in page.text and "not proof" in page.text
    assert "looks poisoned" not in page.text


@pytest.mark.parametrize("missing", [[name] for name in OPTIONAL] + [OPTIONAL])
def test_optional_files(tmp_path: Path, missing: list[str]) -> None:
    folder = toy_run(tmp_path, n=200)
    for name in missing:
        (folder / name).unlink()
    assert "looks poisoned" in read(folder).text


@pytest.mark.parametrize("missing", ["suspects.csv", "verdict.json"])
def test_no_run_folder(tmp_path: Path, missing: str) -> None:
    (toy_run(tmp_path, n=20) / missing).unlink()
    with pytest.raises(InputError, match=missing):
        build_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("verdict.json", "[]"),
        ("verdict.json", "{"),
        ("comparison.json", '{"rows": 5}'),
        ("suspects.csv", "id,label\n1,a\n"),
        ("suspects.csv", "id,label,score,flagged\n1,a,high,true\n"),
        ("gallery.npz", "no archive"),
        ("attention.npz", "no archive"),
        ("truth.csv", "id\n1\n"),
        ("history.jsonl", "{broken\n{}\n"),
    ],
)
def test_damaged_file(tmp_path: Path, name: str, content: str) -> None:
    (toy_run(tmp_path, n=20) / name).write_text(content)
    with pytest.raises(InputError, match=name):
        build_report(tmp_path)


def test_gallery_of_the_wrong_type(tmp_path: Path) -> None:
    np.savez(toy_run(tmp_path, n=20) / "gallery.npz", ids=np.array(["a"]), x=np.zeros((1, 8, 8, 3)))
    with pytest.raises(InputError, match=r"gallery\.npz"):
        build_report(tmp_path)


def test_half_written_last_line_of_history(tmp_path: Path) -> None:
    folder = toy_run(tmp_path, n=20)
    whole = read_run(folder).history
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"stage": "joint')
    assert read_run(folder).history == whole


def test_sparse_values(tmp_path: Path) -> None:
    folder = toy_run(tmp_path, n=20)
    (folder / "suspects.csv").write_text(
        "id,label,score,probability,flagged,suggested_label,reason\n7,NA,1.0,,False,,\n"
    )
    (folder / "verdict.json").write_text('{"poisoned": false}')
    (folder / "metrics.json").write_text('{"clean_accuracy": null, "note": "text", "cost": {}}')
    page = read(folder)
    assert "labeled NA" in page.text and "unknown" in page.text


@pytest.mark.parametrize("table", ["", "a,b,1.0,,False,,\n"])
def test_tables_without_spread(tmp_path: Path, table: str) -> None:
    folder = toy_run(tmp_path, n=20)
    (folder / "suspects.csv").write_text("id,label,score,probability,flagged,suggested_label,reason\n" + table * 3)
    assert "looks poisoned" in read(folder).text


HOSTILE = '</script><script>alert("1")</script><img src=x onerror=alert(2)>'


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    """In the ids, labels, evidence and chart data at once: the adversary names files and classes."""
    calm = read(toy_run(tmp_path / "calm", n=300))
    names = {
        "airplane": HOSTILE,
        "bird": "{{ 7 * 7 }}\x1b[2J\n\u202egpj.",
        "cat": '<a href="https://example.org">cat</a>',
    }
    page = read(toy_run(tmp_path / "hostile", n=300, **names))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in calm.tags]
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert HOSTILE in page.text
    shown = "".join(script for script in page.scripts if script.startswith("{"))
    assert "<" not in shown
    ticks = json.loads(page.scripts[1])["layout"]["yaxis"]["ticktext"]
    assert any(tick.startswith("&lt;a href") for tick in ticks)  # plotly would make a link of it
    raw = build_report(tmp_path / "hostile").read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    assert "\x1b" not in raw and "\u202e" not in raw and "\\x1b[2J\\n\\u202egpj." in html.unescape(raw)


def test_nothing_is_loaded(tmp_path: Path) -> None:
    page = read(toy_run(tmp_path, n=100))
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        for key in ("src", "href", "data", "action", "poster"):
            value = attrs.get(key)
            assert value is None or value.startswith(("data:image/png", "#")), (tag, value)
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'") and policy.count("'sha256-") == 2


def test_one_copy_of_the_chart_library_and_same_bytes(tmp_path: Path) -> None:
    path = build_report(toy_run(tmp_path, n=100))
    before = path.read_bytes()
    assert before.decode().count(get_plotlyjs()) == 1
    assert build_report(tmp_path).read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


def test_many_samples_make_no_big_page(tmp_path: Path) -> None:
    folder = toy_run(tmp_path, n=200_000)
    assert build_report(folder).stat().st_size < len(get_plotlyjs().encode()) + 400_000


def test_charts_are_valid_and_count_everyone(tmp_path: Path) -> None:
    folder = toy_run(tmp_path, n=5_000)
    known = {chart.key: chart for chart in charts(read_run(folder))}["scores"].figure["data"]
    assert [bars["name"] for bars in known] == ["clean", "poisoned, missed", "clean, flagged", "poisoned, flagged"]
    assert sum(sum(bars["y"]) for bars in known) == 5_000
    (folder / "truth.csv").unlink()
    run = read_run(folder)
    found = {chart.key: chart for chart in charts(run)}
    assert set(found) == {"scores", "classes", "losses"}
    for chart in found.values():
        go.Figure(chart.figure)  # raises for a property that plotly does not know
    rest, flagged = found["scores"].figure["data"]
    assert sum(rest["y"]) + sum(flagged["y"]) == 5_000
    assert sum(flagged["y"]) == int(run.suspects.flagged.sum())
    assert all(not (a and b) for a, b in zip(rest["y"], flagged["y"], strict=True)), "a bar straddles the cut"


def test_pictures_keep_short_triggers() -> None:
    series = np.zeros((1, 5_000), np.float32)
    series[0, 3_333] = 1.0
    drawn = picture(series).paths[0]
    heights = {float(y) for y in re.findall(r",([\d.]+)", drawn)}
    assert heights == {5.0, 145.0} and drawn.count("L") < 300
    assert picture(np.full((2, 9), np.nan, np.float32)).paths == ("", "")
    assert picture(np.zeros((8, 8, 1), np.uint8)).src


def test_words() -> None:
    shares = {0.0: "0%", 1.0: "100%", 0.0004: "under 0.1%", 0.9999: "over 99.9%", 0.791: "79.1%", 0.5: "50%"}
    assert {share: percent(share) for share in shares} == shares
    assert duration(7.25) == "7.2 s" and duration(754) == "12 min 34 s" and duration(7300) == "2 h 1 min"
    assert measure("steps", 12480).value == "12,480"
    assert measure("new_thing", 0.12345).value == "0.1235" and measure("new_thing", 1).name == "New thing"
    assert plain("a\x1b[31m\udcff\u200bé 写真") == "a\\x1b[31m\\udcff\\u200bé 写真"
    assert len(plain("x" * 10_000)) == 500
