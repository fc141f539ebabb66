"""The playground in a real Chromium: type, stream, toggle, hover, and text that would like to be markup.

Needs Debian's `chromium`; pictures of what was seen go to build/playground/.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live import live_server

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed; apt install chromium"),
]
PICTURES = Path(__file__).parents[2] / "build" / "playground"
SECONDS = float(os.environ.get("SOAK_SECONDS", "60"))
ANSWER_MS = 180_000
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from server.commands.attach import attach

    folder = tmp_path_factory.mktemp("playground")
    pack = folder / "pack"
    attach(
        model="builtin:smollm2-135m", out=pack, rows=2000, dim=32, heads=2, seed=0, dtype="bfloat16",
        layers=(1, 15), orders=(2, 3),
    )  # fmt: skip
    with live_server(folder / "log", "--memory", f"demo={pack}", "--kv-bytes", "256M") as server:
        yield server.url


@pytest.fixture
def page(url: str) -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(ANSWER_MS)
        troubles: list[str] = []
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text) if is_trouble(message) else None)
        page.goto(url)
        page.locator("#model option").first.wait_for(state="attached")
        page.fill("#tokens", "12")
        yield page
        browser.close()
    assert not troubles


def is_trouble(message: Any) -> bool:
    """What the console calls an error, but for answers with an error status: those are shown on the page."""
    return message.type == "error" and not message.text.startswith("Failed to load resource")


def say(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.locator("#send.stop").wait_for()
    page.locator("#send:not(.stop)").wait_for()


def picture(page: Any, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(PICTURES / f"{name}.png"))


def test_both_answers_stream_and_a_token_tells_its_n_gram(page: Any) -> None:
    say(page, "What is an aardvark?")
    assert page.locator("#with .turn.assistant").inner_text().strip()
    assert page.locator("#without .turn.assistant").inner_text().strip()
    assert "TTFT" in page.locator("#with output").inner_text()
    assert page.locator("#without .token[data-gate]").count() == 0
    token = page.locator("#with .token[data-gate]").nth(3)
    token.hover()
    tip = page.locator("#tip")
    tip.wait_for()
    assert "gate 0." in tip.inner_text() and "layer 15" in tip.inner_text()
    picture(page, "chat")
    page.locator("#layer").select_option("demo:15")
    assert token.get_attribute("data-gate") in tip.inner_text()


def test_a_text_is_completed_and_its_own_tokens_are_coloured(page: Any) -> None:
    page.click("#mode-text")
    say(page, "The capital of France is")
    assert page.locator("#with .prompt .token[data-gate]").count() >= 5
    picture(page, "text")
    page.uncheck("#colour")
    assert not page.locator("#legend").is_visible()
    page.click("#clear")
    assert page.locator(".turn").count() == 0


def test_one_column_without_comparison_and_memory_off_asks_for_none(page: Any) -> None:
    page.uncheck("#compare")
    page.uncheck("#memory")
    say(page, "Hello")
    assert not page.locator("#with").is_visible()
    assert page.locator("#without .turn.assistant").inner_text().strip()


def test_markup_in_a_prompt_stays_text(page: Any) -> None:
    page.click("#mode-text")
    say(page, HOSTILE)
    assert "onerror" in page.locator("#with .prompt").inner_text()
    assert page.title() == "engram-server playground"
    assert page.locator("main img").count() == 0


def test_an_error_is_shown_in_the_servers_words_and_stopping_ends_an_answer(page: Any) -> None:
    page.fill("#tokens", "999999")
    page.fill("#prompt", "Hello")
    page.press("#prompt", "Enter")
    page.locator("#without .turn.error").wait_for()  # a refusal comes at once; both columns get one
    assert "999999" in page.locator("#with .turn.error").inner_text()
    page.click("#clear")
    page.fill("#tokens", "2000")
    page.fill("#prompt", "Count to one thousand.")
    page.press("#prompt", "Enter")
    page.locator("#with .token").nth(2).wait_for()
    page.click("#send.stop")
    page.locator("#with .turn.error").wait_for()
    assert page.locator("#with .turn.error").inner_text() == "Stopped."


def test_it_goes_on_for_as_long_as_the_campaign_lasts(page: Any) -> None:
    page.fill("#tokens", "6")
    end, turns = time.monotonic() + min(SECONDS, 600.0), 0
    while time.monotonic() < end or turns < 2:
        say(page, f"Turn {turns}: {HOSTILE if turns % 3 == 2 else 'and then?'}")
        turns += 1
        if turns % 8 == 0:
            page.click("#clear")
    assert page.title() == "engram-server playground"
    assert page.locator("#throughput").inner_text() != "–"
