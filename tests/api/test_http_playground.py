"""The playground's files: served from here, under a policy that lets nothing else in. Driven in Chromium in soak."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.api.routes.playground import FOLDER
from tests.api.live import LiveServer


def text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/", "text/html"), ("/static/playground.css", "text/css"), ("/static/playground.js", "text/javascript")],
)
def test_its_files_come_with_a_policy_that_allows_nothing_but_this_server(
    live: LiveServer, path: str, kind: str
) -> None:
    reply = live.request(path)
    assert reply.status == 200 and reply.headers["content-type"].startswith(kind)
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'" and "unsafe" not in str(policy)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for name in ("index.html", "playground.css", "playground.js"):
        assert not re.search(r"https?://|//cdn|@import", text(name)), name
    assert set(re.findall(r'(?:src|href)="([^"]*)"', text("index.html"))) == {
        "data:,", "static/playground.css", "static/playground.js",
    }  # fmt: skip
    assert not re.search(r"<script>|\son\w+=|style=", text("index.html"))  # the policy would block them


def test_model_text_never_becomes_markup() -> None:
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text("playground.js")
    )


def test_every_element_the_script_asks_for_is_on_the_page() -> None:
    asked = set(re.findall(r'\$\("([\w-]+)"\)', text("playground.js")))
    there = set(re.findall(r'id="([\w-]+)"', text("index.html")))
    assert asked <= there and Path(FOLDER, "playground.js").stat().st_size < 40_000
