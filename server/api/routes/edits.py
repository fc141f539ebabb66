"""`/v1/memory/facts`, `/redirects`, `/edits`, `/jobs`, `/audit`: a memory edited while it serves, for one or for all.

Whoever has a key edits what its own tenant sees; the admin key, with `"scope": "global"`, what everyone sees. Another
tenant's edits are 404, as if they were not there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import Field

from server.api.auth import Caller, caller_of, require_admin
from server.api.edits.live import EVERYONE
from server.api.edits.store import StoredEdit
from server.api.prompts import encode
from server.api.replies import ERRORS, JSONReply, Reply
from server.api.schemas import RedirectChoice, Wire
from server.api.service import Service
from server.errors import Conflict, Forbidden, NotFound, RequestError

FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Scope = Literal["own", "global"]


class FactRequest(Wire):
    prompt: Annotated[str, Field(min_length=1)]
    completion: Annotated[str, Field(min_length=1)] = Field(description="how the model shall go on after the prompt")
    memory: str | None = Field(None, description="the memory to teach; needed where several could be")
    scope: Scope = Field("own", description="global: for everyone, with the admin key")


class RedirectRequest(RedirectChoice):
    scope: Scope = Field("own", description="global: for everyone, with the admin key")


class ExportRequest(Wire):
    memory: str
    path: Annotated[str, Field(min_length=1, max_length=64)] = Field(description="the new pack's folder in --packs-dir")
    tenant: str = Field(EVERYONE, description="whose edits; default: everyone's")


class Edit(Reply):
    """`active`: requests read it. `report`: what teaching came to, or the error."""

    id: str
    kind: Literal["fact", "redirect"]
    tenant: str
    scope: Scope
    memory: str
    status: Literal["queued", "running", "done", "failed"]
    active: bool
    created: float
    asked: dict[str, Any]
    report: dict[str, Any]


class Edits(Reply):
    edits: list[Edit]


class Removed(Reply):
    id: str
    removed: bool


class Exported(Reply):
    path: str
    edits: int
    rows: int


class Audit(Reply):
    entries: list[dict[str, Any]]


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["memory"])
    live = service.edits

    @router.post("/v1/memory/facts", status_code=202, responses={202: {"model": Edit}, **ERRORS})
    async def teach_fact(body: FactRequest, request: Request) -> Response:
        """Teaches the memory to go on with the completion after the prompt. Follow the job at /v1/memory/jobs/ID."""
        live.store  # noqa: B018 - refuses first where no edits are kept
        caller = caller_of(request)
        tenant = scope_of(caller, body.scope)
        attached = live.folders.choose(body.memory)
        attached.check_takes_facts()
        await check_fact(service, body)
        asked = {"prompt": body.prompt, "completion": body.completion}
        edit = await live.add(tenant, "fact", attached.content, attached.name, asked, caller.name)
        return JSONReply(described(service, edit), 202)

    @router.post("/v1/memory/redirects", status_code=201, responses={201: {"model": Edit}, **ERRORS})
    async def keep_redirect(body: RedirectRequest, request: Request) -> Response:
        """From now on, prompts that say `from` read the rows of `to` in token-id memories (STEM)."""
        live.store  # noqa: B018 - as above
        caller = caller_of(request)
        tenant = scope_of(caller, body.scope)
        if not live.folders.any_by_token():
            raise Conflict("a redirect needs a memory addressed by token ids; attach a STEM pack: --memory")
        asked = {"from": body.source, "to": body.target, "mode": body.mode, "occurrence": body.occurrence}
        edit = await live.add(tenant, "redirect", "", "", asked, caller.name)
        return JSONReply(described(service, edit), 201)

    @router.get("/v1/memory/jobs/{job}", responses={200: {"model": Edit}, **ERRORS})
    async def job_state(job: str, request: Request) -> Response:
        return JSONReply(described(service, await visible(service, job, caller_of(request))))

    @router.get("/v1/memory/edits", responses={200: {"model": Edits}, **ERRORS})
    async def list_edits(request: Request) -> Response:
        """The caller's own and everyone's; an admin sees all."""
        caller = caller_of(request)
        tenants = () if caller.is_admin else (caller.name, EVERYONE)
        return JSONReply({"edits": [described(service, edit) for edit in await live.all(*tenants)]})

    @router.delete("/v1/memory/edits/{edit}", responses={200: {"model": Removed}, **ERRORS})
    async def remove_edit(edit: str, request: Request) -> Response:
        """New requests answer as if it had never been made; running ones keep what they started with."""
        caller = caller_of(request)
        found = await visible(service, edit, caller)
        if found.tenant == EVERYONE and not caller.is_admin:
            raise Forbidden("this edit is everyone's; only the admin key may remove it")
        await live.remove(found, caller.name)
        return JSONReply({"id": found.id, "removed": True})

    @router.post(
        "/v1/memory/edits/export",
        status_code=201,
        dependencies=[Depends(require_admin)],
        responses={201: {"model": Exported}, **ERRORS},
    )
    async def export_edits(body: ExportRequest, request: Request) -> Response:
        """Writes a memory with the edits of everyone, or of one tenant, as a pack in --packs-dir."""
        live.store  # noqa: B018 - as above
        if not service.settings.packs_dir:
            raise Forbidden("packs are written to --packs-dir, and this server was started without it")
        if not FOLDER.fullmatch(body.path):
            raise RequestError("path must be a new folder's name of letters, digits, '.', '_' or '-'", param="path")
        out = Path(service.settings.packs_dir).resolve() / body.path
        if out.exists() or out.is_symlink():
            raise Conflict(f"{body.path!r} is in --packs-dir already; choose another name", param="path")
        found = await live.export(body.memory, out, body.tenant, caller_of(request).name)
        return JSONReply({"path": body.path, **found}, 201)

    @router.get("/v1/memory/audit", dependencies=[Depends(require_admin)], responses={200: {"model": Audit}, **ERRORS})
    async def audit_log(limit: Annotated[int, Query(ge=1, le=10_000)] = 100) -> Response:
        """Who changed what, the latest first."""
        return JSONReply({"entries": await live.audit(limit)})

    return router


def scope_of(caller: Caller, scope: Scope) -> str:
    """The tenant that an edit is for. Raises Forbidden for everyone's without the admin key."""
    if scope == "global" and not caller.is_admin:
        raise Forbidden(
            'only the admin key may edit for everyone; leave "scope" out to edit for yourself', param="scope"
        )
    return EVERYONE if scope == "global" else caller.name


async def check_fact(service: Service, body: FactRequest) -> None:
    """Raises RequestError for a text without tokens, or one too long to teach."""
    most, tokens = service.settings.max_edit_tokens, 0
    for name, text in (("prompt", body.prompt), ("completion", body.completion)):
        ids = await encode(service, text, False, name)
        if not ids:
            raise RequestError(f"{name} tokenises to nothing; give it some text", param=name)
        tokens += len(ids)
    if tokens > most:
        raise RequestError(
            f"the fact has {tokens} tokens and may have {most}; shorten it or raise --max-edit-tokens", param="prompt"
        )


async def visible(service: Service, number: str, caller: Caller) -> StoredEdit:
    """Raises NotFound for an edit that is not there, or is another tenant's."""
    edit = await service.edits.get(number)
    if edit is None or not (caller.is_admin or edit.tenant in (caller.name, EVERYONE)):
        raise NotFound(f"there is no edit {number[:40]!r}")
    return edit


def described(service: Service, edit: StoredEdit) -> dict[str, Any]:
    folders = service.edits.folders
    there = edit.pack in folders.contents if edit.kind == "fact" else folders.any_by_token()
    return {
        "id": edit.id,
        "kind": edit.kind,
        "tenant": edit.tenant,
        "scope": "global" if edit.tenant == EVERYONE else "own",
        "memory": edit.memory,
        "status": edit.status,
        "active": edit.status == "done" and there,
        "created": edit.created,
        "asked": dict(edit.asked),
        "report": dict(edit.report),
    }
