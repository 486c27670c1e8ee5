"""The report in a real browser: nothing on the console, pictures and charts drawn, keyboard, phone, dark, paper."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_run import toy_run

from antibackdoor.report import build_report
from browser import browser

pytestmark = pytest.mark.long

DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}

CONTRAST = """() => {
  const number = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => ((c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = number(getComputedStyle(node).backgroundColor);
      if (color.length < 4 || color[3] > 0.99) return color;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const node of document.querySelectorAll("h1,h2,h3,p,li,dt,dd,td,th,a,code,figcaption,.mark,button,summary")) {
    if (!node.checkVisibility() || !node.textContent.trim() || node.closest(".chart")) continue;
    const [a, b] = [light(number(getComputedStyle(node).color)), light(behind(node))].sort().reverse();
    if ((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5) poor.push(node.outerHTML.slice(0, 90));
  }
  return poor;
}"""
"""Elements whose text has less than the contrast of 4.5 that WCAG AA asks for."""

HEIGHTS = """() => [...document.querySelectorAll(".scroll tbody th")].map((cell) => {
  const range = document.createRange();
  range.selectNodeContents(cell);
  return [range.getBoundingClientRect().height, cell.textContent];
})"""
"""How high the text of each row's header is, and the text."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(toy_run(tmp_path_factory.mktemp("image"), n=10_000))


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(toy_run(tmp_path_factory.mktemp("series"), "series", n=400, poisoned=False))


def opened(chromium: Any, path: Path, **options: Any) -> tuple[Any, list[str]]:
    page, told = chromium.new_context(**options).new_page(), list[str]()
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: told.append(request.url) if request.url.startswith("http") else None)
    page.goto(path.as_uri())
    return page, told


@pytest.mark.parametrize(("options", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop", "phone"])
def test_it_draws_without_a_complaint(
    chromium: Any, report: Path, series: Path, options: dict[str, Any], scheme: str
) -> None:
    for path in (report, series):
        page, told = opened(chromium, path, **options, color_scheme=scheme)
        assert told == []
        assert page.locator(".chart .main-svg").count() >= 3
        broken = "() => [...document.images].filter((i) => !i.complete || !i.naturalWidth).length"
        assert page.evaluate(broken) == 0
        wide = page.evaluate("() => document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"the page is {wide} pixels wider than the screen"
        assert page.evaluate(CONTRAST) == []
        page.context.close()


def test_the_first_screen_tells_the_story(chromium: Any, report: Path) -> None:
    page, _ = opened(chromium, report, **DESKTOP)
    for place in ("h1", ".sure", ".facts", ".pair", ".strip", ".sketch", ".verdict ol"):
        box = page.locator(place).first.bounding_box()
        assert box["y"] + box["height"] <= 800, f"{place} is below the first screen"
    page.context.close()


def test_a_phone_shows_a_picture_first_and_whole_words(chromium: Any, report: Path) -> None:
    page, _ = opened(chromium, report, **PHONE)
    box = page.locator(".pair").bounding_box()
    assert box["y"] + box["height"] <= 740, "the first picture is below the first screen"
    page.evaluate("() => document.querySelectorAll('details').forEach((details) => (details.open = true))")
    tallest = max(page.evaluate(HEIGHTS))
    assert tallest[0] < 80, f"one letter a line: {tallest}"
    page.context.close()


def test_the_header_is_one_line(chromium: Any, report: Path) -> None:
    page, _ = opened(chromium, report, **DESKTOP)
    page.evaluate("() => (document.querySelector('header dd').textContent = 'a/very/long/path/'.repeat(9))")
    top = page.locator("header nav").bounding_box()["y"]
    assert top < page.locator("header .brand").bounding_box()["y"] + 20
    page.context.close()


def test_the_keyboard_leads_through_the_samples(chromium: Any, report: Path) -> None:
    page, told = opened(chromium, report, **DESKTOP)
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.textContent") == "Skip to the verdict"
    page.locator(".zoom").first.focus()
    page.keyboard.press("Enter")
    viewer = page.locator("#viewer")
    first = viewer.locator("h3").text_content()
    assert viewer.locator("img").is_visible()
    page.keyboard.press("ArrowRight")
    second = viewer.locator("h3").text_content()
    page.keyboard.press("ArrowLeft")
    assert viewer.locator("h3").text_content() == first != second
    page.keyboard.press("Escape")
    assert not viewer.is_visible() and page.evaluate("() => document.activeElement.className") == "zoom"
    assert told == []
    page.context.close()


def test_it_prints_and_reads_without_scripts(chromium: Any, report: Path, tmp_path: Path) -> None:
    page, told = opened(chromium, report, **DESKTOP)
    page.pdf(path=tmp_path / "report.pdf")
    paper = (tmp_path / "report.pdf").read_bytes()
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", paper)) <= 8 and told == []
    assert page.locator(".listed").is_visible()
    page.emulate_media(media="print")
    assert (
        not page.locator(".more").is_visible() and not page.locator(".listed").is_visible()
    )  # a dozen pages of rows that suspects.csv has
    page.context.close()
    page, told = opened(chromium, report, **DESKTOP, java_script_enabled=False)
    assert "looks poisoned" in page.locator("h1").text_content() and page.locator(".sample img").first.is_visible()
    page.context.close()


def test_a_large_run_opens_quickly(chromium: Any, report: Path) -> None:
    page, _ = opened(chromium, report, **DESKTOP)
    painted = "() => performance.getEntriesByName('first-contentful-paint')[0].startTime"
    assert page.evaluate(painted) < 3000, "measured 0.1 to 0.3 s; much more means that something blocks the page"
    page.context.close()
