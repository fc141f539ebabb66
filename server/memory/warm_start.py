"""WarmStart: a cache begins with what was hot when the server last ran, and leaves a list of that behind.

    start   read each pack's hot list ─ its pages asked for ─→ a few entries at a time, between two steps' fetches
    every SAVE_SECONDS, and at the end: the n-grams that several requests asked for ─→ the list, replaced whole

Serving never waits for it, and goes on if a list cannot be read or written: the log says so.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from server.batch import Ints
from server.cache.hot_rows import Source
from server.cache.prefetcher import Prefetcher
from server.errors import EngramError
from server.memory.attachment import Attachment
from server.memory.hot_list import HotList, hot_list_path, hottest, read_hot_list

logger = logging.getLogger(__name__)

SAVE_SECONDS = 300.0
CHUNK = 256  # entries brought in between two steps


class WarmStart:
    """For the packs whose rows `prefetcher` caches."""

    def __init__(self, packs: Sequence[Attachment], prefetcher: Prefetcher, every: float = SAVE_SECONDS) -> None:
        assert prefetcher.hot is not None
        self.packs, self.prefetcher, self.hot = tuple(packs), prefetcher, prefetcher.hot
        self._saved: dict[str, float] = {}  # pack name → when its list was written
        self._notes: dict[str, str] = {}  # pack name → what went wrong with its list last
        self.loaded = threading.Event()
        self._ends = threading.Event()
        self._every = every
        self._thread = threading.Thread(target=self._run, name="hot-list", daemon=True)
        self._thread.start()

    def ages(self) -> dict[str, float]:
        """Table → seconds since the list that it started with, or that was written last."""
        now, saved = time.time(), dict(self._saved)
        return {
            table.name: now - saved[pack.name]
            for pack in self.packs
            if pack.name in saved
            for table in pack.tables.values()
        }

    def notes(self) -> tuple[str, ...]:
        """What went wrong with a list and was not mended by a later one."""
        return tuple(dict(self._notes).values())

    def _note(self, pack: Attachment, what: str) -> None:
        self._notes[pack.name] = what
        logger.warning("%s", what)

    def forget(self, pack: Attachment) -> None:
        """No more lists of a pack that is removed."""
        self.packs = tuple(other for other in self.packs if other is not pack)
        self._notes.pop(pack.name, None)

    def close(self) -> None:
        """After the prefetcher's end: saves once more, unless the old lists are still being read, which hold more.

        May be called twice.
        """
        ended = self._ends.is_set()
        self._ends.set()
        self._thread.join()
        if self.loaded.is_set() and not ended:
            try:
                self.hot.learn()  # what the last steps asked for
            except Exception:
                logger.exception("hot rows of the last steps are not in the hot list")
            self.save()

    def save(self) -> None:
        """Writes a list for every pack that has something to remember."""
        for pack in self.packs:
            path = hot_list_path(pack.fingerprint)
            lists = {}
            for layer, source in self._sources(pack):
                for order, (keys, counts) in zip(source.orders, self.hot.hot_list(source), strict=True):
                    lists[layer, order] = hottest(keys, counts)
            made = HotList(pack.fingerprint, lists, time.time())
            if not made.size:
                continue
            try:
                made.write(path)
            except OSError as error:
                self._note(
                    pack,
                    f"memory {pack.name}: no hot list saved to {path}: {error.strerror}; make room there or start with "
                    f"--hot-list off",
                )
            else:
                self._saved[pack.name] = made.saved
                self._notes.pop(pack.name, None)

    def _run(self) -> None:
        self._load()
        if not self._ends.is_set():
            self.loaded.set()
        while not self._ends.wait(self._every):
            self.save()

    def _load(self) -> None:
        for pack in self.packs:
            path = hot_list_path(pack.fingerprint)
            try:
                found = read_hot_list(path, pack.fingerprint)
                if found is not None:
                    self._saved[pack.name] = found.saved
                    self._adopt(pack, found)
            except EngramError as error:
                self._note(pack, f"memory {pack.name} starts cold: {error}")

    def _adopt(self, pack: Attachment, found: HotList) -> None:
        """Chunk by chunk, the hottest of every list first; the next is asked for when the last has entered."""
        entered = 0

        def enter(*chunk: object) -> None:
            nonlocal entered
            try:
                entered += self.hot.adopt(*chunk)  # type: ignore[arg-type]
            finally:
                done.set()

        for source, index, keys, counts, rows in self._chunks(pack, found):
            done = threading.Event()
            source.table.page_in(rows.reshape(-1))
            self.prefetcher.between_fetches(partial(enter, source, index, keys, counts, rows))
            while not done.wait(0.1):
                if self._ends.is_set():
                    return
        logger.info("memory %s starts with %d of %d n-grams of its hot list", pack.name, entered, found.size)

    def _chunks(self, pack: Attachment, found: HotList) -> Iterator[tuple[Source, int, Ints, Ints, Ints]]:
        sources = dict(self._sources(pack))
        longest = max((len(keys) for keys, _ in found.lists.values()), default=0)
        for at in range(0, longest, CHUNK):
            for (layer, order), (keys, counts) in found.lists.items():
                source = sources.get(layer)
                if source is None or order not in source.orders or at >= len(keys):
                    continue
                rows = pack.addresser.rows_of_mix(layer, order, keys[at : at + CHUNK])
                there = ((rows >= 0) & (rows < source.table.rows)).all(1)
                chosen = np.flatnonzero(there)
                yield (
                    source,
                    source.orders.index(order),
                    keys[at : at + CHUNK][chosen],
                    counts[at : at + CHUNK][chosen],
                    rows[chosen],
                )

    def _sources(self, pack: Attachment) -> list[tuple[int, Source]]:
        """Those in the cache; one of the same name may be another pack's, which came when this one left."""
        found = ((layer, table, self.hot.sources.get((table.name, layer))) for layer, table in pack.tables.items())
        return [(layer, source) for layer, table, source in found if source is not None and source.table is table]
