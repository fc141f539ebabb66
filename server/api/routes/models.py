"""`/v1/models`: the names this server answers to, and the memories behind each."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from server.api.replies import ERRORS, JSONReply, Model, Models
from server.api.service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["models"])

    @router.get("/v1/models", responses={200: {"model": Models}, **ERRORS})
    async def list_models() -> Response:
        """The first is the default."""
        return JSONReply(
            {"object": "list", "data": [describe(service, name) for name, _ in service.client.ready.models]}
        )

    @router.get("/v1/models/{name:path}", responses={200: {"model": Model}, **ERRORS})
    async def one_model(name: str) -> Response:
        return JSONReply(describe(service, name))

    return router


def describe(service: Service, name: str) -> dict[str, Any]:
    """Raises UnknownModelName."""
    name, packs = service.model(name)
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "engram-server",
        "root": service.source.name,
        "parent": None,
        "max_model_len": service.context,
        "memory": list(packs),
    }
