"""The server's page in a real browser: it draws, shows errors, and fits a phone, light and dark."""

import copy
import re
import time

import pytest
from served import Held, served

import fastdiff
from fastdiff.serve.painter import Painter

pytestmark = pytest.mark.browser
COLOURS = "(style => [style.backgroundColor, style.color])(getComputedStyle(document.body))"
PATIENCE = 120_000
"""Milliseconds; long, because other processes may occupy the cores."""


@pytest.fixture
def opened(browser):
    """opened(port, scheme, width): the page; no request may go elsewhere and no error may rise."""
    contexts, elsewhere, errors = [], [], []

    def open_page(port, scheme="light", width=1280):
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        tab = context.new_page()
        home = f"http://127.0.0.1:{port}/"
        own = (home, "data:")
        tab.on("request", lambda one: one.url.startswith(own) or elsewhere.append(one.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(home)
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert elsewhere == errors == []


def test_a_picture_is_drawn(opened, demo):
    painter = Painter(fastdiff.compile(copy.deepcopy(demo)), 2, steps=3)
    with served(painter) as port:
        tab = opened(port)
        assert tab.inner_text("h1") == "fastdiff demo"
        tab.fill("#prompt", "purple car")
        tab.get_by_text("More").click()
        tab.fill("#seed", "7")
        tab.keyboard.press("Enter")
        tab.get_by_text("drawn with seed 7").wait_for()
        picture = tab.get_by_alt_text("purple car")
        assert picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [64, 64]
        tab.fill("#size", "70x64")
        tab.get_by_role("button", name="Draw").click()
        tab.get_by_text("width is 70; this pipeline needs a positive multiple of 8").wait_for()
    painter.close()


def test_the_page_asks_for_the_key_and_cancels(opened):
    engine = Held()
    with served(engine, "sesame") as port:
        tab = opened(port)
        draw, key = tab.get_by_role("button", name="Draw"), tab.get_by_label("API key")
        draw.click()
        tab.get_by_text("the API key is missing or wrong").wait_for()
        key.fill("sesame")
        draw.click()
        tab.get_by_text("step 1 of 2").wait_for()
        tab.get_by_role("button", name="Cancel").click()
        tab.get_by_text("cancelled").wait_for()
        draw.wait_for()
        end = time.monotonic() + 60
        while not engine.ended and time.monotonic() < end:
            tab.wait_for_timeout(10)
        assert engine.ended


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_the_page_is_readable(opened, scheme, width):
    with served(Held()) as port:
        tab = opened(port, scheme, width)
        tab.get_by_text("More").click()
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        colours = tab.evaluate(COLOURS)
        paper, ink = (sum(map(int, re.findall(r"\d+", one)[:3])) for one in colours)
        assert (paper > ink) == (scheme == "light")
        assert abs(paper - ink) > 3 * 150
