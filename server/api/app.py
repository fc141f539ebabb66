"""The HTTP application: routes over one Service, OpenAI's error bodies, request ids, the body limit.

Knows the engine's verbs through `EngineClient` and the tokenizer through `ModelSource`; starts and ends neither.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware

from server.api import errors
from server.api.auth import Auth, Keys
from server.api.http_metrics import Counted
from server.api.limits import Gate
from server.api.middleware import BodyLimit, Edge
from server.api.routes import chat, completions, edits, memory, models, operations, playground, tokens
from server.api.service import Service
from server.api.sse import ClientGone
from server.models.source import ModelSource
from server.runtime.client import EngineClient
from server.settings import Settings

CLIENT_CLOSED_REQUEST = 499  # nginx's status for it; nobody reads it but the log


GENERATING = frozenset({"/v1/completions", "/v1/chat/completions"})
CORS_HEADERS = ("Authorization", "Content-Type", "X-Api-Key", "X-Request-Id")
EXPOSED_HEADERS = ("Retry-After", "X-Request-Id")


def create_app(settings: Settings, client: EngineClient, source: ModelSource, keys: Keys | None = None) -> FastAPI:
    """The application over a running engine. `app.state.service` is what its routes share."""
    keys = keys if keys is not None else Keys(settings)
    service = Service(settings, client, source, keys)
    app = FastAPI(
        title="engram-server",
        description="OpenAI's API over a language model with attached memories.",
        version=operations.installed_version(),
        redirect_slashes=False,  # a redirect would lead wherever the Host header says
    )
    app.state.service = service
    for module in (completions, chat, models, tokens, memory, edits, operations):
        app.include_router(module.routes(service))
    app.include_router(playground.routes())
    errors.install(app)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    if keys.required:
        describe_keys(app)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes, seconds=settings.body_timeout)
    app.add_middleware(Gate, admission=service.admission, paths=GENERATING)
    app.add_middleware(Auth, keys=keys, metrics=service.metrics)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=CORS_HEADERS,
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_middleware(Edge, log_prompts=settings.log_prompts)
    plain = frozenset(path for path in app.openapi()["paths"] if "{" not in path)
    app.add_middleware(Counted, metrics=service.metrics, paths=plain)  # outermost: counts what every other answers
    return app


def describe_keys(app: FastAPI) -> None:
    """The API's own documentation says that keys are needed, and its pages ask for one."""
    plain = app.openapi

    def with_keys() -> dict[str, Any]:
        document = plain()
        document.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        return document

    app.openapi = with_keys  # type: ignore[method-assign]
