"""The page in a real browser: a message is typed, the answer and the figures are seen, with no network but this server's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .browser import Browser, browsing, find_browser
from .conftest import Process, serving

WRITTEN = re.compile(r"\w.*\w.*\w")
"""A text that has begun."""

SIZES = {"wide": (1280, 800), "narrow": (390, 844)}


@pytest.fixture(scope="module")
def server(smollm2_gguf: Path) -> Iterator[Process]:
    """A model whose answers can be read, part of it streamed."""
    find_browser()
    # As plain numbers not all of it has room.
    place = ("--no-keep-blocks", "--device-memory", "200MB", "--max-context", "512", "--link-gbps", "1")
    drafts = ("--window", "4", "--keep", "0.75")
    with serving("--model", str(smollm2_gguf), "--served-name", "smollm2-135m", *place, *drafts) as server:
        yield server


@pytest.fixture(scope="module")
def browser(server: Process) -> Iterator[Browser]:
    with browsing(server.url) as browser:
        yield browser


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where screenshots go: OFFLOAD_SIRIUS_PICTURES, for those who want to look at them."""
    folder = Path(os.environ.get("OFFLOAD_SIRIUS_PICTURES") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def lies_within(page: Any, selector: str) -> bool:
    """Whether an element is seen as a whole."""
    box, size = page.locator(selector).bounding_box(), page.viewport_size
    assert box is not None, selector
    return bool(
        box["x"] >= 0
        and box["y"] >= 0
        and box["x"] + box["width"] <= size["width"]
        and box["y"] + box["height"] <= size["height"]
    )


@pytest.mark.parametrize(("name", "scheme"), [("wide", "light"), ("narrow", "dark")])
def test_a_message_is_answered_with_live_figures_and_nothing_else_is_asked(
    browser: Browser, pictures: Path, name: str, scheme: str
) -> None:
    width, height = SIZES[name]
    page = browser.open(viewport={"width": width, "height": height}, color_scheme=scheme)
    assert page.get_by_role("button", name="Send").is_disabled()

    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Longest answer").fill("24")
    page.get_by_role("button", name="Done").click()
    page.get_by_label("Message").fill("What is the capital of France, and what is it known for?")
    page.keyboard.press("Enter")

    # While it is written: text that grows, a button that stops, figures that move.
    said = page.locator(".turn.assistant .said")
    said.filter(has_text=WRITTEN).wait_for()
    assert page.get_by_role("button", name="Stop").is_visible()
    early = said.inner_text()
    page.locator(".notes").wait_for()
    assert len(said.inner_text()) > len(early)
    assert "Paris" in said.inner_text()
    assert "tokens/s" in page.locator(".notes").inner_text()
    if name == "narrow":
        page.locator("#strip").click()
    page.locator("#rate").filter(has_text=re.compile("[1-9]")).wait_for()
    assert float(page.locator("#aal").inner_text()) >= 1
    assert "GB/s" in page.locator("#link").inner_text()
    assert int(page.get_by_role("meter", name="Device plan").get_attribute("aria-valuenow")) > 50
    assert int(page.get_by_role("meter", name="Host in use").get_attribute("aria-valuenow")) > 0
    page.screenshot(path=pictures / f"{name}-figures.png")
    if name == "narrow":
        page.locator("#strip").click()

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for seen in ("header", "#composer .box", "#send", ".notes", "#open-settings"):
        assert lies_within(page, seen), seen
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 20, 22)"
    assert dark == (scheme == "dark")
    page.screenshot(path=pictures / f"{name}.png")
    assert browser.elsewhere == []
    assert browser.complaints == []
    page.close()


def test_escape_stops_an_answer_and_what_a_model_writes_is_no_html(browser: Browser) -> None:
    page = browser.open()
    page.get_by_label("Message").fill("<img src=x onerror=document.title='hit'> Tell me a long story.")
    page.get_by_role("button", name="Send").click()
    page.locator(".turn.assistant .said").filter(has_text=WRITTEN).wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("stopped", exact=True).wait_for()
    assert page.locator("#log img").count() == 0
    page.evaluate("document.querySelector('.said').replaceChildren(render('<b id=bad>x</b> **bold** `a<b`'))")
    assert page.locator("#bad").count() == 0
    assert page.locator(".said strong").inner_text() == "bold"
    page.get_by_role("button", name="New chat").click()
    assert page.get_by_text("What shall we talk about?").is_visible()
    page.close()


def test_a_new_chat_begins_without_what_was_being_written(browser: Browser) -> None:
    page = browser.open()
    page.get_by_label("Message").fill("Tell me a long story.")
    page.keyboard.press("Enter")
    page.locator(".turn.assistant .said").filter(has_text=WRITTEN).wait_for()
    page.get_by_role("button", name="New chat").click()
    page.get_by_label("Message").fill("Hello")
    page.get_by_role("button", name="Send").wait_for()
    assert page.evaluate("turns") == []
    page.close()


def test_a_server_that_is_always_greedy_is_asked_for_no_temperature(browser: Browser) -> None:
    page = browser.open()
    assert page.evaluate("request().temperature") == 0.7
    page.route("**/v1/figures", lambda route: route.fulfill(json=route.fetch().json() | {"is_greedy": True}))
    page.get_by_role("button", name="Settings").click()
    page.get_by_text("This server always takes the most likely token").wait_for()
    assert page.get_by_label("Temperature").is_disabled()
    assert "temperature" not in page.evaluate("request()")
    page.close()
