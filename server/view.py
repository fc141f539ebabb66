"""MemoryView: what memory one sequence sees, fixed at admission and held for its life.

Knows nothing of packs' contents or of tables: it names packs by the fingerprint the engine gave them, so that two
sequences see the same memory exactly when their views have the same `key`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Protocol


class Snapshot(Protocol):
    """Edits of one scope at one moment (`memory/edits.py`); equal ids, equal edits."""

    @property
    def id(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class MemoryView:
    """The packs a sequence reads, by name and content fingerprint, in attachment order.

    `redirects`: (position, tokens) - token-id tables read the rows of these tokens at this place of the prompt, their
    mean if there are several; text, embedding and n-grams stay as they are.
    `overlays`: the snapshots of edits it reads, everyone's before its tenant's; the later one counts.

    `key` (SHA-256, 32 bytes) seeds the prefix cache's block-hash chain together with `salt` (a tenant's secret):
    two requests share a KV block only if tokens, view and salt agree.
    """

    packs: tuple[tuple[str, str], ...] = ()
    salt: bytes = b""
    redirects: tuple[tuple[int, tuple[int, ...]], ...] = ()
    overlays: tuple[Snapshot, ...] = ()
    key: bytes = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for part in (len(self.packs).to_bytes(4, "little"), *(f"{n}\0{f}\0".encode() for n, f in self.packs)):
            digest.update(part)
        digest.update(len(self.salt).to_bytes(4, "little") + self.salt)
        if self.redirects:
            digest.update(repr(self.redirects).encode())
        for overlay in self.overlays:
            digest.update(b"edits" + overlay.id)
        object.__setattr__(self, "key", digest.digest())

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.packs)


BARE = MemoryView()
