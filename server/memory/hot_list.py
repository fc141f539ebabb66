"""Hot lists: which n-grams of a pack were asked for most, in a small file that a restart begins with.

    <cache folder>/hot/<pack fingerprint>.safetensors      mode 0600, replaced whole
        <layer>.<order>.keys    int64[M]    the hash before the modulus, or the token id; hottest first
        <layer>.<order>.counts  int64[M]    how often, aged

Keys, not rows and not tokens: rows are computed from them again, so that a damaged file can make a cache useless but
never wrong, and nobody's text stands on disk. The fingerprint in the name and in the metadata binds the list to one
pack. Knows nothing of caches or of how keys were collected.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from server.batch import Ints
from server.errors import PackError
from server.settings import cache_folder

FORMAT = "engram-hot-list-1"


@dataclass(frozen=True, slots=True)
class HotList:
    """`lists`: (layer, order) → keys[M], counts[M], hottest first. `saved`: seconds since 1970."""

    fingerprint: str
    lists: Mapping[tuple[int, int], tuple[Ints, Ints]]
    saved: float

    @property
    def size(self) -> int:
        return sum(len(keys) for keys, _ in self.lists.values())

    def write(self, path: Path) -> None:
        """Replaces `path` whole, readable by its owner only. Raises OSError, which leaves the old file in place."""
        tensors: dict[str, Ints] = {}
        for (layer, order), (keys, counts) in self.lists.items():
            tensors |= {f"{layer}.{order}.keys": keys, f"{layer}.{order}.counts": counts}
        about = {"format": FORMAT, "fingerprint": self.fingerprint, "saved": repr(self.saved)}
        data = save(tensors, about)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        try:
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(fd)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def hot_list_path(fingerprint: str) -> Path:
    return cache_folder() / "hot" / f"{fingerprint}.safetensors"


def read_hot_list(path: Path, fingerprint: str) -> HotList | None:
    """None if there is none. Raises PackError for a file that is no hot list, or one of another pack."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT or about.get("fingerprint") != fingerprint:
                raise PackError(f"{path} is no hot list of this pack; remove it, a new one will be saved")
            lists = {}
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                layer, order, kind = name.split(".")
                if kind == "keys":
                    counts = file.get_tensor(f"{layer}.{order}.counts")
                    lists[int(layer), int(order)] = _checked(file.get_tensor(name), counts)
            return HotList(fingerprint, lists, float(about["saved"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # types numpy lacks
        raise PackError(f"{path} cannot be read as a hot list: {error}; remove it, a new one will be saved") from None


def hottest(keys: Ints, counts: Ints, most: int | None = None) -> tuple[Ints, Ints]:
    """The hottest first; all of them, or `most`."""
    order = np.argsort(-counts, kind="stable")[:most]
    return keys[order], counts[order]


def _checked(keys: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """Raises ValueError for what no hot list holds."""
    for array in (keys, counts):
        if array.dtype != np.int64 or array.ndim != 1 or len(array) != len(keys):
            raise ValueError(f"{array.dtype} {list(array.shape)} where int64 [{len(keys)}] is needed")
    distinct, first = np.unique(keys, return_index=True)
    return hottest(distinct, np.maximum(counts[first], 1))
