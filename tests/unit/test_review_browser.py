"""The review page in a real browser, by keyboard."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from antibackdoor.data.arrays import write_npz
from antibackdoor.data.core import Splits
from antibackdoor.data.load import load
from antibackdoor.review.decisions import DROP, KEEP, UNDECIDED, Decisions
from antibackdoor.review.session import Session, open_session
from toy import toy_images, toy_series
from toy_review import toy_run_of

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
server = pytest.importorskip("antibackdoor.review.server", reason="the extra `review` is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.long, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


class Served:
    """The page of a session, for a `with` block."""

    def __init__(self, session: Session):
        self.session, self.ready, self.stop = session, threading.Event(), threading.Event()
        self.address = ""
        self.thread = threading.Thread(
            target=server.serve, args=(session,), kwargs={"ready": self.tell, "stop": self.stop}
        )

    def tell(self, address: str) -> None:
        self.address = address
        self.ready.set()

    def __enter__(self) -> str:
        self.thread.start()
        assert self.ready.wait(20)
        return self.address

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join(20)


def opened(browser: Any, address: str, troubles: list[str]) -> Any:
    page = browser.new_page(viewport={"width": 1100, "height": 800})
    page.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: troubles.append("dialog " + dialog.message))
    page.goto(address)
    playwright.expect(page.locator("#id")).not_to_be_empty()
    return page


def press(page: Any, key: str) -> None:
    """A key, and the wait until it is done."""
    page.keyboard.press(key)
    page.wait_for_selector("body:not([aria-busy])")


def shows(page: Any, selector: str, text: str) -> None:
    playwright.expect(page.locator(selector)).to_contain_text(text)


def test_by_keyboard(browser: Any, tmp_path: Path) -> None:
    data = toy_images(24, size=24)
    names = ["<img src=x onerror=alert(1)>", *data.ids[1:]]
    write_npz(tmp_path / "set.npz", Splits(type(data)(data.x, data.y, data.spec, names)))
    folder = toy_run_of(load(tmp_path / "set.npz"), tmp_path / "run")
    troubles: list[str] = []
    with Served(open_session(folder)) as address:
        page = opened(browser, address, troubles)
        assert page.text_content("#id") == names[0] and page.text_content("#position").startswith("1 of 6")
        press(page, "d")
        press(page, "k")
        press(page, "s")
        page.keyboard.press("r")
        page.keyboard.type("class 0")
        press(page, "Enter")
        shows(page, "#position", "5 of 6")
        press(page, "d")
        press(page, "u")
        press(page, "ArrowLeft")
        press(page, " ")
        assert page.text_content("#position").startswith("5 of 6")
        assert page.text_content("#counts") == "1 kept · 1 dropped · 2 relabeled · 2 of 6 flagged open"
        page.reload()
        playwright.expect(page.locator("#id")).not_to_be_empty()
        assert page.text_content("#position").startswith("5 of 6")  # goes on where it stopped
        picture = "document.getElementById('picture')"
        assert page.evaluate(f"{picture}.decode().then(() => {picture}.naturalWidth)") == 24
        page.screenshot(path=tmp_path / "page.png")
        page.keyboard.press("e")
        page.keyboard.press("Enter")
        shows(page, "#status", "21 of 24 samples kept")
        page.close()
    assert troubles == []
    codes = Decisions(folder, open_session(folder).data).codes
    assert codes[:6].tolist() == [DROP, KEEP, 3, 0, UNDECIDED, UNDECIDED]
    assert len(load(folder / "cleaned-npz" / "data.npz").train) == 21

    with Served(open_session(folder)) as address:  # a restart: another address, the same decisions
        page = opened(browser, address, troubles)
        assert page.text_content("#counts").startswith("1 kept · 1 dropped · 2 relabeled")
    press(page, "d")  # the program has ended
    page.wait_for_selector("#trouble:not([hidden])")
    assert "start it again" in page.text_content("#trouble") and page.text_content("#position").startswith("5 of 6")
    page.close()


def test_finding_the_way_without_a_mouse(browser: Any, tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz", Splits(toy_images(24, size=24)))
    folder = toy_run_of(load(tmp_path / "set.npz"), tmp_path / "run")
    troubles: list[str] = []
    with Served(open_session(folder)) as address:
        page = opened(browser, address, troubles)
        assert page.text_content("#status") == "Now 0/0.png, labeled class 0, suggested class 1, open."
        for _ in range(5):
            press(page, "ArrowRight")
        press(page, "d")
        assert page.text_content("#status").startswith("0/5.png: drop, saved. Now 0/5.png, ")
        press(page, " ")  # nothing is open after the last one, so from the start
        assert page.text_content("#position").startswith("1 of 6")
        page.locator("#strip button").nth(5).focus()
        press(page, "Enter")
        shows(page, "#position", "6 of 6")
        assert page.evaluate("document.activeElement.getAttribute('aria-current')") == "true"
        press(page, "o")
        assert page.text_content("#decision") == "open" and page.text_content("#position").startswith("6 of 6")
        page.close()
    assert troubles == []


def test_series_on_a_phone(browser: Any, tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz", Splits(toy_series(24, length=200)))
    folder = toy_run_of(load(tmp_path / "set.npz"), tmp_path / "run", flagged=0)
    troubles: list[str] = []
    with Served(open_session(folder)) as address:
        page = opened(browser, address, troubles)
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.text_content("#position") == "1 of 24 · not flagged"
        page.click("#drop")
        shows(page, "#position", "2 of 24")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert "200 steps" in page.text_content("#note") and page.text_content("#probability") == "0%"
        tops = "[...document.querySelectorAll('#references figure:first-child img')].map((image) => image.offsetTop)"
        assert len(found := page.evaluate(tops)) == 4 and len(set(found)) == 1, "one wraps alone"
        page.screenshot(path=tmp_path / "phone.png")
        page.close()
    assert troubles == []
