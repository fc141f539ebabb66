"""Which pack an edit belongs to: a digest of what the pack is, whatever it is called and wherever it lies.

Edited rows replace rows of one table; over another they would be nonsense. Teaching a pack changes its config and its
modules, so that both are digested whole; of tables, which may be huge, the size. Torch-free.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def content_key(folder: Path) -> str:
    """Hexadecimal, 32 digits. Copies of a pack have the same."""
    digest = hashlib.sha256()
    for name in ("config.json", "modules.safetensors"):
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    for path in sorted(folder.glob("table*.safetensors")):
        digest.update(f"{path.name}:{path.stat().st_size};".encode())
    return digest.hexdigest()[:32]
