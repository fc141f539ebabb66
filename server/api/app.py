"""The HTTP application: routes over one Service, OpenAI's error bodies, request ids, the body limit.

Knows the engine's verbs through `EngineClient` and the tokenizer through `ModelSource`; starts and ends neither.
"""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from server.api import errors
from server.api.http_metrics import Counted
from server.api.middleware import BodyLimit, Edge
from server.api.routes import chat, completions, models, operations, tokens
from server.api.service import Service
from server.api.sse import ClientGone
from server.models.source import ModelSource
from server.runtime.client import EngineClient
from server.settings import Settings

CLIENT_CLOSED_REQUEST = 499  # nginx's status for it; nobody reads it but the log


def create_app(settings: Settings, client: EngineClient, source: ModelSource) -> FastAPI:
    """The application over a running engine. `app.state.service` is what its routes share."""
    service = Service(settings, client, source)
    app = FastAPI(
        title="engram-server",
        description="OpenAI's API over a language model with attached memories.",
        version=operations.installed_version(),
    )
    app.state.service = service
    for module in (completions, chat, models, tokens, operations):
        app.include_router(module.routes(service))
    errors.install(app)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(Edge)
    app.add_middleware(Counted, metrics=service.metrics)  # outermost: counts what every other answers
    return app
