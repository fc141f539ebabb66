"""For operators: alive, ready, version, metrics."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from server.api.metrics import registry
from server.api.replies import ERRORS, JSONReply, Readiness, Status, Version
from server.api.service import Service
from server.errors import NotReady

DISTRIBUTION = "engram-server"


def installed_version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["operations"])
    exported = registry(service.metrics, service.client, service.name, service.settings)

    @router.get("/health", responses={200: {"model": Status}, **ERRORS})
    async def health() -> Response:
        """Alive: the engine's process runs. If not, restart this server."""
        if not service.client.alive:
            raise NotReady("the engine is gone; restart the server")
        return JSONReply({"status": "ok"})

    @router.get("/ready", responses={200: {"model": Readiness}, **ERRORS})
    async def ready() -> Response:
        """Takes requests: loaded, not draining, its tables readable. Notes: what else does not work as asked for."""
        service.check_ready()
        notes = list(service.client.stats.notes)
        return JSONReply({"status": "ready", **({"notes": notes} if notes else {})})

    @router.get("/version", responses={200: {"model": Version}})
    async def get_version() -> Response:
        return JSONReply({"version": installed_version()})

    @router.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def scrape(request: Request) -> Response:
        """Prometheus text, or OpenMetrics for those who accept it."""
        # prometheus_client's OpenMetrics writes vllm_… for vllm:…
        accepted = "" if service.settings.vllm_metrics else request.headers.get("accept", "")
        encode, content_type = choose_encoder(accepted)
        return Response(encode(exported), headers={"Content-Type": content_type})

    return router
