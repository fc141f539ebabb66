"""Counts every HTTP request by method, route and status, and times it, around all other layers. Plain ASGI.

A route's template stands for its paths, so that ids in paths do not make series without end; what is refused before it
reaches a route counts under its path if that is one of the application's own. Probes and scrapes are not counted: they
would drown what people ask for.
"""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.metrics import RequestMetrics

UNCOUNTED = frozenset({"/metrics", "/health", "/ready", "/version"})
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
CLIENT_LEFT = 499


class Counted:
    """`paths`: the application's paths without parameters."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics, paths: frozenset[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNCOUNTED:
            return await self.app(scope, receive, send)
        begun = time.monotonic()
        status = CLIENT_LEFT

        async def counting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, counting_send)
        finally:
            method = scope["method"] if scope["method"] in METHODS else "other"
            fallback: str = scope["path"] if scope["path"] in self.paths else "other"
            route: str = getattr(scope.get("route"), "path", fallback)
            self.metrics.answered(method, route, status, time.monotonic() - begun)
