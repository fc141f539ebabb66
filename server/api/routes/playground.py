"""`/`: the playground, one static page over this server's own API. No build step, nothing from elsewhere.

The policy lets the page load its own two files and talk to this server, and nothing else: no inline script, no frames,
no other host. Model text is set as text, never as markup (`playground/playground.js`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, Response

FOLDER = Path(__file__).parents[1] / "playground"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/static/playground.css": ("playground.css", "text/css; charset=utf-8"),
    "/static/playground.js": ("playground.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def routes() -> APIRouter:
    router = APIRouter()
    for path, (name, kind) in FILES.items():
        router.add_api_route(path, _page(FOLDER / name, kind), methods=["GET", "HEAD"], include_in_schema=False)
    return router


def _page(file: Path, kind: str) -> Callable[[], Awaitable[Response]]:
    content = file.read_bytes()

    async def page() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return page
