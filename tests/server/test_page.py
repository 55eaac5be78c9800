"""The chat page: one file without outside requests, and used in a browser by keyboard, on a desktop and a phone."""

import json
import re
import shutil
import subprocess
import sys

import httpx
import pytest

from kimi_jax.data import tokenizer as tk
from kimi_jax.server.app import PAGE

BYTES = tk.load("bytes")
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
CALL = (
    "Let me see.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Oslo"}<|tool_call_end|><|tool_calls_section_end|>'
)


def test_the_page_asks_for_nothing_outside(random_server):
    source = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//\w+\.|<link|<img|src=|@import|url\(", source)
    response = httpx.get(random_server.url)
    assert response.text == source and response.headers["content-type"].startswith("text/html")
    assert response.headers["content-security-policy"].startswith("default-src 'none'")


def chromium():
    """The system's, where there is one; None is Playwright's own, which is fetched the first time."""
    found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")))
    if path := next(found, None):
        return path
    subprocess.run([sys.executable, "-m", "playwright", "install", "--only-shell", "chromium"], check=True)
    return None


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1280, 800), (360, 640)])
def test_a_dialogue_with_a_tool_by_keyboard(size, browser, serve_text):
    def script(ids):
        text = "It is 12°." if "## Return of" in BYTES.decode(ids) else CALL
        return [*BYTES.encode(text, allow_special=True), BYTES.special_ids["<|im_end|>"]]

    with serve_text("", max_model_len=4096) as server:
        server.engine.script = script
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        outside, errors = [], []
        page.on(
            "request", lambda request: outside.append(request.url) if not request.url.startswith(server.url) else None
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.get_by_text("Options").click()
        page.get_by_label("Tools").fill(json.dumps(TOOLS))
        page.get_by_label("System").fill("Be brief.")
        page.get_by_text("Options").click()
        page.get_by_label("Message").focus()
        page.keyboard.type("Weather <b>in</b> Oslo?")
        page.keyboard.press("Enter")
        page.get_by_placeholder("Result of get_weather").wait_for()
        assert page.locator(".call code").inner_text() == '{"city": "Oslo"}'
        page.keyboard.type("12°")  # the field for the result has the focus
        page.keyboard.press("Enter")
        page.get_by_text("It is 12°.").wait_for()
        assert page.locator("article.user b").count() == 1  # what was typed is no markup
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        prompt = BYTES.decode(server.engine.seen[-1].prompt_ids)
        assert (
            "## Return of functions.get_weather:0\n12°" in prompt and "Be brief." in prompt and "tool_declare" in prompt
        )
        server.engine.script, server.engine.delay = None, 0.01
        page.get_by_label("Tools").fill("", force=True)
        page.get_by_label("Message").fill("Go on")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Stop").wait_for()
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Send").wait_for()
        page.get_by_role("button", name="New chat").click()
        assert page.locator("article").count() == 0
        assert outside == [] and errors == []
        page.close()
