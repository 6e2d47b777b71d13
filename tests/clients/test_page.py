"""The page at /, in headless Chromium, by keyboard alone. Debian's browser, Playwright's client."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="`make test-clients` installs playwright"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("there is no Chromium on PATH", allow_module_level=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


def open_page(browser: Any, url: str, scheme: str) -> tuple[Any, list[str]]:
    page = browser.new_page(color_scheme=scheme, viewport={"width": 900, "height": 640})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    return page, asked


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_conversation_by_keyboard(browser: Any, url: str, scheme: str) -> None:
    page, asked = open_page(browser, url, scheme)
    sync_api.expect(page.locator("#status")).to_contain_text("API key")
    page.keyboard.press("Shift+Tab")  # the log
    page.keyboard.press("Shift+Tab")  # New
    page.keyboard.press("Shift+Tab")  # Settings
    page.keyboard.press("Enter")
    page.locator("#key").focus()
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#model")).to_have_text("tiny")
    page.locator("#message").focus()
    page.keyboard.type("Hello!")
    page.keyboard.press("Enter")
    answer = page.locator("article.assistant")
    sync_api.expect(answer).to_have_text("Hello! Ask me about Python or PostgreSQL.")
    sync_api.expect(page.locator("#status")).to_contain_text("tokens/s")
    sync_api.expect(page.locator("#message")).to_be_focused()
    page.keyboard.type("<b>What</b> is an index?")
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("article.user").last).to_have_text("<b>What</b> is an index?")
    sync_api.expect(page.locator("#stop")).to_be_disabled()
    sync_api.expect(page.locator("article.assistant")).to_have_count(2)
    if picture := os.environ.get("LFM2_FAST_PICTURE"):
        page.screenshot(path=f"{picture}-{scheme}.png")
    assert {each.split("/v1/")[0].rstrip("/") for each in asked if "data:" not in each} == {url}
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back[4:-1].split(","))) < 384) is (scheme == "dark")


def test_escape_stops_an_answer(browser: Any, url: str) -> None:
    page, _ = open_page(browser, url, "light")
    page.evaluate("document.getElementById('key').value = 'secret'")
    page.evaluate("document.getElementById('temperature').value = '4'")
    page.locator("#message").focus()
    page.keyboard.type("What is a decorator?")
    page.keyboard.press("Enter")
    # The page forbids eval, which a script that waits would need. The browser reads the pattern.
    sync_api.expect(page.locator("article.assistant")).to_have_text(re.compile(".{21}", re.DOTALL))
    page.keyboard.press("Escape")
    sync_api.expect(page.locator("#status")).to_contain_text("stopped")
    sync_api.expect(page.locator("#send")).to_be_enabled()
    assert page.locator("article.error").count() == 0
