"""A new folder that appears whole or not at all: written beside its place, then renamed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.errors import PackError


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """The folder to fill. Raises PackError if `out` is there already and not empty, or cannot be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PackError(f"{out} is already there; choose another --out or remove it")
    partial = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        yield partial
        partial.chmod(0o755)
        partial.rename(out)
    except OSError as error:
        raise PackError(f"{out} could not be written: {error}") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
