"""`/v1/memory/packs`: which memories are attached, and for an admin attaching and removing them while serving."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Response
from pydantic import Field

from server.api.auth import require_admin
from server.api.replies import ERRORS, JSONReply, Reply
from server.api.schemas import Wire
from server.api.service import Service
from server.errors import CapacityError, Conflict, Forbidden, PackError, RequestError
from server.runtime.messages import MemoryUpdated

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MOST_FILES = 1000


class PackRequest(Wire):
    name: Annotated[str, Field(min_length=1, max_length=64)] = Field(
        description="as models will name it: BACKBONE+NAME"
    )
    path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(description="the pack's folder, in --packs-dir")


class Packs(Reply):
    """`packs`: all that are attached; `models`: the names that /v1/models lists."""

    packs: list[str]
    models: list[str]


class PackChange(Packs):
    """`load_seconds`: opening the pack beside running requests; `pause_seconds`: what these waited for the switch."""

    name: str
    load_seconds: float
    pause_seconds: float


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["memory"])
    admin = [Depends(require_admin)]

    @router.get("/v1/memory/packs", responses={200: {"model": Packs}, **ERRORS})
    async def list_packs() -> Response:
        ready = service.client.ready
        return JSONReply({"packs": list(ready.packs), "models": [name for name, _ in ready.models]})

    @router.post(
        "/v1/memory/packs", status_code=201, dependencies=admin, responses={201: {"model": PackChange}, **ERRORS}
    )
    async def attach_pack(body: PackRequest) -> Response:
        """Attaches a pack from --packs-dir. Requests that run keep what they see; new ones may name it."""
        if not NAME.fullmatch(body.name):
            raise RequestError(
                "name must be 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit", param="name"
            )
        if body.name in service.client.ready.packs:
            raise Conflict(f"a memory {body.name!r} is attached already; remove it first, or choose another name")
        folder = await asyncio.to_thread(confined, service.settings.packs_dir, body.path)
        updated = await update(service, body.name, str(folder))
        await asyncio.to_thread(service.edits.folders.add, body.name, folder)
        return JSONReply(changed(body.name, updated), 201)

    @router.delete("/v1/memory/packs/{name}", dependencies=admin, responses={200: {"model": PackChange}, **ERRORS})
    async def remove_pack(name: str) -> Response:
        """Lets a memory go. Requests that run read it to their end, then its files are closed."""
        updated = await update(service, name, None)
        service.edits.folders.remove(name)
        return JSONReply(changed(name, updated))

    return router


async def update(service: Service, name: str, path: str | None) -> MemoryUpdated:
    """Raises RequestError for a pack that does not fit this model, Conflict where there is no room for it."""
    try:
        return await service.client.update_memory(name, path)
    except PackError as error:
        raise RequestError(error.message, param="path") from None
    except CapacityError as error:
        raise Conflict(error.message, param="path") from None


def changed(name: str, updated: MemoryUpdated) -> dict[str, object]:
    return {
        "name": name,
        "packs": list(updated.packs),
        "models": [model for model, _ in updated.models],
        "load_seconds": round(updated.load_s, 4),
        "pause_seconds": round(updated.pause_s, 6),
    }


def confined(packs_dir: str, path: str) -> Path:
    """The pack's real folder. Raises Forbidden unless it lies in `packs_dir`, links resolved, its files too."""
    if not packs_dir:
        raise Forbidden("packs can be attached only from --packs-dir, and this server was started without it")
    try:
        root = Path(packs_dir).resolve(strict=True)
        folder = (root / path).resolve()
        inside = folder.is_relative_to(root) and folder != root
        found = inside and folder.is_dir()
        files = list(folder.iterdir()) if found else []
        leading_out = next((file for file in files if not file.resolve().is_relative_to(root)), None)
    except (OSError, ValueError, RuntimeError):  # unreadable, a null byte, links in a ring
        inside, found, files, leading_out = True, False, [], None
    if not inside:
        raise Forbidden(
            f"{path[:200]!r} lies outside --packs-dir; only packs in that folder can be attached", param="path"
        )
    if not found or len(files) > MOST_FILES:
        raise RequestError(f"there is no pack {path[:200]!r} in --packs-dir", param="path")
    if leading_out is not None:
        raise Forbidden(
            f"{leading_out.name[:200]!r} in {path[:200]!r} is a link that leads out of --packs-dir", param="path"
        )
    return folder
