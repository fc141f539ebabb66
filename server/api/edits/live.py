"""Edits while serving: kept first, then acknowledged; taught one after another; sent to the engine as snapshots.

    POST ─▶ store (on disk) ─▶ 202 ─▶ queue ─▶ teaching process ─▶ store ─▶ client.update_edits(tenant, rows)

SQLite is called from a thread of its own, so that a slow disk delays edits and nothing else. A snapshot of one tenant
goes to the engine whenever that tenant's edits change, and all of them once at the start. Knows tenants by name.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from server.api.edits.attached import AttachedFolders
from server.api.edits.store import EditStore, Kind, StoredEdit
from server.api.edits.teacher import TeachingProcess
from server.errors import Conflict, EngramError
from server.memory.edits import Cell, EditedRows, composed
from server.memory.redirects import Redirect
from server.runtime.client import EngineClient
from server.settings import Settings

logger = logging.getLogger(__name__)

T = TypeVar("T")

EVERYONE = ""
EARLIER = 200  # facts that a new one may be told of
IDLE_SECONDS = 120.0  # after which the teaching process gives its memory back


class LiveEdits:
    """`folders`: the attached memories. `encode`: text to token ids, with special tokens or
    without; `end`: the token after a completion, if any."""

    def __init__(
        self,
        settings: Settings,
        client: EngineClient,
        encode: Callable[[str, bool], list[int]],
        end: int | None,
        knows: Callable[[str], bool] = lambda tenant: True,
    ) -> None:
        """Raises SettingsError for an --edits-db that cannot be used. `knows`: whether a tenant still has a key."""
        self._settings, self._client, self._encode, self._end, self._knows = settings, client, encode, end, knows
        self.folders = AttachedFolders(settings.memory)
        self._store = EditStore(Path(settings.edits_db)) if settings.edits_db else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="edit-store")
        self._redirects: dict[str, list[Redirect]] = {}
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._sending = asyncio.Lock()
        self._finishing: dict[str, asyncio.Event] = {}  # edits that are kept as done and on their way to the engine
        self._worker: asyncio.Task[None] | None = None
        self.teacher = TeachingProcess(settings)

    async def start(self) -> None:
        """Sends what is kept to the engine and goes on with what was queued."""
        if self._store is None:
            return
        for tenant in await self._do(self._store.tenants):
            await self._send(tenant)
        for edit in await self._do(self._store.queued):
            self._queue.put_nowait(edit.id)
        self._worker = asyncio.create_task(self._work())

    async def close(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        await self.teacher.close()
        self._thread.shutdown()
        if self._store is not None:
            self._store.close()

    @property
    def store(self) -> EditStore:
        """Raises Conflict where the server keeps no edits."""
        if self._store is None:
            raise Conflict("this server keeps no edits; start it with --edits-db PATH")
        return self._store

    async def add(
        self, tenant: str, kind: Kind, pack: str, memory: str, asked: Mapping[str, Any], who: str
    ) -> StoredEdit:
        """Keeps an edit and begins with it. Raises Conflict above --max-edits-per-tenant."""
        store, most = self.store, self._settings.max_edits_per_tenant
        edit = await self._do(
            lambda: store.add(tenant=tenant, kind=kind, pack=pack, memory=memory, asked=asked, author=who, most=most)
        )
        if edit is None:
            raise Conflict(
                f"{tenant or 'everyone'} has {most} edits already, as many as --max-edits-per-tenant allows; "
                f"remove one first: DELETE /v1/memory/edits/ID"
            )
        if kind == "fact":
            self._queue.put_nowait(edit.id)
        else:
            await self._send(tenant)
        return edit

    async def remove(self, edit: StoredEdit, who: str) -> None:
        """When this returns, new requests answer as if the edit had never been made."""
        await self._do(lambda: self.store.remove(edit.id, who))
        await self._send(edit.tenant)

    async def get(self, edit: str) -> StoredEdit | None:
        """As it is kept. One that is done is with the engine too: requests sent after this returns read it."""
        found = await self._do(lambda: self.store.get(edit))
        sent = self._finishing.get(edit)
        if sent is not None and found is not None and found.status == "done":
            await sent.wait()
        return found

    async def all(self, *tenants: str) -> list[StoredEdit]:
        return await self._do(lambda: self.store.all(*tenants))

    async def audit(self, most: int) -> list[dict[str, Any]]:
        return await self._do(lambda: self.store.audit(most))

    async def export(self, memory: str, out: Path, tenant: str, who: str) -> dict[str, int]:
        """Writes the memory with a scope's edits as a pack. Raises RequestError if it cannot be written."""
        attached = self.folders.choose(memory)
        attached.check_takes_facts()
        store = self.store
        edits = await self._do(lambda: store.edited(tenant))
        rows = of_pack(composed(rows for _, rows in edits), attached.content)
        about = {"edits": len(edits), "of": attached.content}
        job = {"id": "export", "pack": str(attached.folder), "export": str(out), "rows": encoded(rows), "about": about}
        await self.teacher.ask(job)
        found = {"edits": len(edits), "rows": sum(len(each.ids) for each in rows.values())}
        await self._do(lambda: store.record(who, "exported", "", {"path": out.name, "tenant": tenant, **found}))
        return found

    def redirects(self, tenant: str, packs: tuple[str, ...]) -> list[Redirect]:
        """What a tenant's requests redirect unasked, its own before everyone's; none without a token-id memory."""
        if not self._redirects or not self.folders.any_by_token(packs):
            return []
        scopes = dict.fromkeys((tenant, EVERYONE))
        return [redirect for scope in scopes for redirect in self._redirects.get(scope, ())]

    # ── inside ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _do(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def _send(self, tenant: str) -> None:
        """A scope's snapshot to the engine, its redirects to the routes. One at a time: the last is the newest."""
        store = self.store
        async with self._sending:
            rows = await self._do(lambda: composed(rows for _, rows in store.edited(tenant)))
            edits = await self._do(lambda: store.all(tenant))
            self._client.update_edits(tenant, rows)
            named = [redirect_of(edit.asked) for edit in edits if edit.kind == "redirect"]
            if named:
                self._redirects[tenant] = named
            else:
                self._redirects.pop(tenant, None)

    async def _work(self) -> None:
        while True:
            try:
                edit = await asyncio.wait_for(self._queue.get(), IDLE_SECONDS)
            except TimeoutError:
                await self.teacher.close()
                continue
            try:
                await self._teach(edit)
            except EngramError as error:
                await self._fail(edit, error.message)
            except Exception as error:
                logger.exception("edit %s failed", edit)
                await self._fail(edit, f"the job failed: {type(error).__name__}")

    async def _fail(self, edit: str, message: str) -> None:
        logger.warning("edit %s failed: %s", edit, message)
        await self._do(lambda: self.store.fail(edit, {"error": message}))

    async def _teach(self, number: str) -> None:
        store = self.store
        edit = await self._do(lambda: store.get(number))
        if edit is None or not await self._do(lambda: store.begin(number)):
            return
        if not self._knows(edit.author):
            raise Conflict("the key that asked for this fact is no longer known to the server")
        attached = self.folders.of_content(edit.pack)
        if attached is None:
            raise Conflict(f"memory {edit.memory!r} is no longer attached, or is another one now")
        scopes = dict.fromkeys((EVERYONE, edit.tenant))
        seen = await self._do(lambda: composed([rows for scope in scopes for _, rows in store.edited(scope)]))
        rows = encoded(of_pack(seen, edit.pack))
        ids, learnt = self._example(edit)
        earlier = await self._do(lambda: self._earlier(edit, list(scopes)))
        job = {"id": edit.id, "pack": str(attached.folder), "ids": ids, "learnt": learnt, "rows": rows}
        answer = await self.teacher.ask({**job, "earlier": earlier})
        report = answer["report"]
        if not report["learnt"]:
            message = f"not learnt within {report['steps']} steps; nothing was changed"
            await self._do(lambda: store.fail(number, {**report, "error": message}))
            return
        sent = self._finishing[number] = asyncio.Event()
        try:
            if await self._do(lambda: store.finish(number, decoded(answer["rows"]), report)):
                await self._send(edit.tenant)
        finally:
            del self._finishing[number]
            sent.set()

    def _example(self, edit: StoredEdit) -> tuple[list[int], int]:
        """A fact's token ids, and from where on they are learnt."""
        before, after = self._encode(edit.asked["prompt"], True), self._encode(edit.asked["completion"], False)
        return [*before, *after, *([] if self._end is None else [self._end])], len(before)

    def _earlier(self, edit: StoredEdit, scopes: list[str]) -> list[tuple[list[int], int]]:
        """The latest facts of this pack that the same requests read."""
        known = [each for each in self.store.all(*scopes) if each.status == "done" and each.pack == edit.pack]
        return [self._example(each) for each in known[-EARLIER:]]


def redirect_of(asked: Mapping[str, Any]) -> Redirect:
    return Redirect(asked["from"], asked["to"], asked["mode"], asked["occurrence"] == "last")


def of_pack(rows: Mapping[Cell, EditedRows], content: str) -> dict[int, EditedRows]:
    return {layer: edited for (pack, layer), edited in rows.items() if pack == content}


def encoded(rows: Mapping[int, EditedRows]) -> dict[str, Any]:
    """As the teaching process reads it: per layer ids, width, values."""
    return {
        str(layer): [
            base64.b64encode(edited.ids.astype("<i8").tobytes()).decode(),
            edited.values.shape[1],
            base64.b64encode(edited.values.astype("<f4").tobytes()).decode(),
        ]
        for layer, edited in rows.items()
    }


def decoded(rows: Mapping[str, Any]) -> dict[int, EditedRows]:
    return {
        int(layer): EditedRows(
            np.frombuffer(base64.b64decode(ids), "<i8").copy(),
            np.frombuffer(base64.b64decode(values), "<f4").reshape(-1, dim).copy(),
        )
        for layer, (ids, dim, values) in rows.items()
    }
