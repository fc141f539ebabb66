"""The store of edits: one SQLite file in WAL mode, every commit synced, so that what was acknowledged survives kill -9.

    edits    id, tenant ("": everyone's), kind fact | redirect, pack (content key), what was asked, status, report
    rows     per edit and layer: row ids int64 and values float32, little endian, side by side
    audit    when, who, what, which edit

    status   queued ─► running ─► done | failed        a redirect is done at once; on opening, running is queued again

One connection, used from one thread at a time. Knows rows and words; nothing of models, HTTP or who may do what.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from server.errors import SettingsError
from server.json_text import parsed
from server.memory.edits import Cell, EditedRows

Kind = Literal["fact", "redirect"]
Status = Literal["queued", "running", "done", "failed"]
FORMAT = 1
ASKED: Mapping[Kind, tuple[str, ...]] = {
    "fact": ("prompt", "completion"),
    "redirect": ("from", "to", "mode", "occurrence"),
}
SCHEMA = """
CREATE TABLE IF NOT EXISTS edits (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, kind TEXT NOT NULL,
    pack TEXT NOT NULL, memory TEXT NOT NULL, asked TEXT NOT NULL, created REAL NOT NULL, author TEXT NOT NULL,
    status TEXT NOT NULL, report TEXT NOT NULL DEFAULT '{}');
CREATE INDEX IF NOT EXISTS by_tenant ON edits (tenant);
CREATE TABLE IF NOT EXISTS rows (
    edit TEXT NOT NULL REFERENCES edits (id) ON DELETE CASCADE, layer INTEGER NOT NULL, dim INTEGER NOT NULL,
    ids BLOB NOT NULL, vals BLOB NOT NULL, PRIMARY KEY (edit, layer));
CREATE TABLE IF NOT EXISTS audit (
    number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, who TEXT NOT NULL, what TEXT NOT NULL,
    edit TEXT NOT NULL, detail TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class StoredEdit:
    """`asked`: {"prompt", "completion"}, or {"from", "to", "mode", "occurrence"}. `author`: whose key asked for it."""

    id: str
    tenant: str
    kind: Kind
    pack: str
    memory: str
    asked: Mapping[str, Any]
    author: str
    status: Status
    created: float = 0.0
    report: Mapping[str, Any] = field(default_factory=dict)


COLUMNS = "id, tenant, kind, pack, memory, asked, author, status, created, report"


class EditStore:
    """Opens or makes the file. Raises SettingsError for one that is no store, or cannot be written."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found not in (0, FORMAT):
                raise SettingsError(f"--edits-db {path} has format {found} and this server reads {FORMAT}")
            self._db.executescript(SCHEMA)
            self._db.execute(f"PRAGMA user_version = {FORMAT}")
            self._db.execute("UPDATE edits SET status = 'queued' WHERE status = 'running'")
            self._check()
        except (OSError, sqlite3.Error, ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise SettingsError(f"--edits-db {path} cannot be used: {error}") from None

    def _check(self) -> None:
        """Reads everything once: a damaged file is refused at the start, not in the midst of serving."""
        (found,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise ValueError(found)
        for edit in self.all():
            if not all(isinstance(edit.asked[name], str) for name in ASKED[edit.kind]):
                raise ValueError(f"edit {edit.id} does not say what was asked")
        for tenant in self.tenants():
            self.edited(tenant)
        for (detail,) in self._db.execute("SELECT detail FROM audit"):
            parsed(detail)

    def close(self) -> None:
        self._db.close()

    def add(
        self, *, tenant: str, kind: Kind, pack: str, memory: str, asked: Mapping[str, Any], author: str, most: int
    ) -> StoredEdit | None:
        """Keeps a new edit; None if the tenant has `most` already. It is on disk when this returns."""
        status: Status = "queued" if kind == "fact" else "done"
        edit = StoredEdit(secrets.token_hex(8), tenant, kind, pack, memory, asked, author, status, time.time())
        with self._writing():
            if self.count(tenant) >= most:
                return None
            self._db.execute(
                f"INSERT INTO edits ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (edit.id, tenant, kind, pack, memory, json.dumps(asked), author, status, edit.created, "{}"),
            )
            self._log(author, f"{kind} asked for", edit.id, {"tenant": tenant, **asked})
        return edit

    def begin(self, edit: str) -> bool:
        """Marks a queued edit as running; False if it is gone."""
        with self._writing():
            changed = self._db.execute(
                "UPDATE edits SET status = 'running' WHERE id = ? AND status = 'queued'", (edit,)
            )
            return changed.rowcount == 1

    def finish(self, edit: str, rows: Mapping[int, EditedRows], report: Mapping[str, Any]) -> bool:
        """Keeps what a job found and counts the edit from now on; False if it was removed meanwhile."""
        with self._writing():
            if not self._end(edit, "done", report):
                return False
            for layer, edited in rows.items():
                ids, values = edited.ids.astype("<i8").tobytes(), edited.values.astype("<f4").tobytes()
                self._db.execute(
                    "INSERT INTO rows VALUES (?, ?, ?, ?, ?)", (edit, layer, edited.values.shape[1], ids, values)
                )
            self._log("", "fact learnt", edit, report)
            return True

    def fail(self, edit: str, report: Mapping[str, Any]) -> None:
        with self._writing():
            if self._end(edit, "failed", report):
                self._log("", "fact failed", edit, report)

    def remove(self, edit: str, who: str) -> bool:
        with self._writing():
            removed = self._db.execute("DELETE FROM edits WHERE id = ?", (edit,)).rowcount == 1
            if removed:
                self._log(who, "removed", edit, {})
            return removed

    def record(self, who: str, what: str, edit: str, detail: Mapping[str, Any]) -> None:
        """Writes a line into the audit log."""
        with self._writing():
            self._log(who, what, edit, detail)

    def count(self, tenant: str) -> int:
        """Edits that count against the tenant's quota; failed ones do not."""
        query = "SELECT COUNT(*) FROM edits WHERE tenant = ? AND status != 'failed'"
        return int(self._db.execute(query, (tenant,)).fetchone()[0])

    def get(self, edit: str) -> StoredEdit | None:
        return next(self._edits("WHERE id = ?", edit), None)

    def all(self, *tenants: str) -> list[StoredEdit]:
        """Oldest first; those of these tenants, or of everyone."""
        if not tenants:
            return list(self._edits(""))
        return list(self._edits(f"WHERE tenant IN ({', '.join('?' * len(tenants))})", *tenants))

    def queued(self) -> list[StoredEdit]:
        return list(self._edits("WHERE status = 'queued'"))

    def tenants(self) -> list[str]:
        return [name for (name,) in self._db.execute("SELECT DISTINCT tenant FROM edits")]

    def edited(self, tenant: str) -> list[tuple[str, dict[Cell, EditedRows]]]:
        """(id, rows) of a scope's finished edits, oldest first."""
        query = (
            "SELECT edits.id, pack, layer, dim, ids, vals FROM edits JOIN rows ON rows.edit = edits.id "
            "WHERE tenant = ? AND status = 'done' ORDER BY number"
        )
        found: dict[str, dict[Cell, EditedRows]] = {}
        for edit, pack, layer, dim, ids, values in self._db.execute(query, (tenant,)):
            read = np.frombuffer(ids, "<i8").copy()
            rows = EditedRows(read, np.frombuffer(values, "<f4").reshape(len(read), dim).copy())
            found.setdefault(edit, {})[pack, layer] = rows
        return list(found.items())

    def audit(self, most: int) -> list[dict[str, Any]]:
        """The latest lines, newest first."""
        query = "SELECT at, who, what, edit, detail FROM audit ORDER BY number DESC LIMIT ?"
        names = ("at", "who", "what", "edit", "detail")
        return [
            {**dict(zip(names, line, strict=True)), "detail": parsed(line[4])}
            for line in self._db.execute(query, (most,))
        ]

    # ── inside ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction, on disk when the block ends; nothing of it is if the block raises."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _end(self, edit: str, status: Status, report: Mapping[str, Any]) -> bool:
        query = "UPDATE edits SET status = ?, report = ? WHERE id = ?"
        return self._db.execute(query, (status, json.dumps(report), edit)).rowcount == 1

    def _log(self, who: str, what: str, edit: str, detail: Mapping[str, Any]) -> None:
        self._db.execute(
            "INSERT INTO audit (at, who, what, edit, detail) VALUES (?, ?, ?, ?, ?)",
            (time.time(), who, what, edit, json.dumps(detail)),
        )

    def _edits(self, where: str, *values: str) -> Iterator[StoredEdit]:
        for row in self._db.execute(f"SELECT {COLUMNS} FROM edits {where} ORDER BY number", values):
            fields = dict(zip(COLUMNS.split(", "), row, strict=True))
            yield StoredEdit(**{**fields, "asked": parsed(fields["asked"]), "report": parsed(fields["report"])})
