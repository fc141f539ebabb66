"""HotPool: a set-associative cache of entries of one size, with admission by aged global frequency.

    key ─ mix ─→ set ─→ | tag 0 | tag 1 | … | tag W-1 |        a tag: (owner, key), compared exactly
                        | row 0 | row 1 | … | row W-1 |        E bytes each, on the model's device
                        | n 0   | n 1   | … | n W-1   |        how often each was hit, aged

A resident's frequency is counted at its way, everybody else's in the sketch; who enters brings the sketch's estimate
along, who leaves takes the count back there. A newcomer enters only if it is hotter than the coldest way of its set.
Everything is halved after AGE · capacity accesses: 100 capacities, since shorter memories lose 2 to 4 points of hit
rate under steady Zipf traffic and longer ones adapt late.

Shapes: N keys looked up, S sets, W ways, E bytes an entry. Knows owners and keys; nothing of tables or layers. Not safe
for several threads: `hot_rows.py` sees to that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from server.cache.cuda_memory import send
from server.cache.row_table import Ids
from server.cache.row_types import Bytes
from server.cache.sketch import Counts, Hashes, Sketch

if TYPE_CHECKING:
    from server.cache.device_tags import DeviceTags

Mask = npt.NDArray[np.bool_]

WAYS = range(16, 33)
AGE = 100  # accesses per entry between two halvings
COUNTERS_PER_ENTRY = 16
EMPTY = -1  # an owner
SEVERAL = 3  # distinct requests that make an n-gram nobody's own
NOBODY, ANYBODY = -1, (-2, -3, -4)  # askers: none yet; of entries that several asked for in an earlier run
WORD = np.dtype(np.int64)


def mixed(owners: Ids, keys: Ids) -> Hashes:
    """[N] 64 bits that depend on all bits of both: a set index and the sketch's places come from them."""
    hashes = keys.view(np.uint64) ^ (owners.view(np.uint64) * np.uint64(0xA24BAED4963EE407))
    hashes = hashes * np.uint64(0x9E3779B97F4A7C15)
    hashes ^= hashes >> np.uint64(32)
    hashes *= np.uint64(0xD6E8FEB86659FD93)
    hashes ^= hashes >> np.uint64(32)
    return hashes


@dataclass(frozen=True, slots=True)
class Newcomers:
    """Who is to enter: places[M] among the misses given, the slots[M] they take, and how often they were seen."""

    places: Ids
    slots: Ids
    counts: Counts


class HotPool:
    """`nbytes` of entries on `device`. `capacity` entries fit; 0 if not even one set does."""

    def __init__(self, entry_bytes: int, nbytes: int, device: torch.device) -> None:
        self.entry_bytes, self.device = entry_bytes, device
        most = nbytes // entry_bytes
        self.ways = min(WAYS, key=lambda ways: (most % ways, ways)) if most >= WAYS[0] else WAYS[0]
        self.sets = most // self.ways
        self.capacity = self.sets * self.ways
        self.nbytes = self.capacity * entry_bytes
        # Whole words where possible: torch and NumPy both copy bytes one by one otherwise.
        dtype = torch.int64 if entry_bytes % WORD.itemsize == 0 else torch.uint8
        with torch.inference_mode(False):  # else only threads in inference mode could write them
            self._rows = torch.empty(self.capacity, entry_bytes // dtype.itemsize, dtype=dtype, device=device)
        self._host_rows = self._rows.numpy() if device.type == "cpu" else None
        self._keys = np.zeros((self.sets, self.ways), np.int64)
        self._owners = np.full((self.sets, self.ways), EMPTY, np.int64)
        self._counts = np.zeros((self.sets, self.ways), np.int64)
        self._askers = np.full((self.capacity, SEVERAL), NOBODY, np.int64)
        self._sketch = Sketch(COUNTERS_PER_ENTRY * self.capacity)
        self._accesses = 0
        self.tags: DeviceTags | None = None

    @property
    def host_bytes(self) -> int:
        """Of tags, counts, askers and the sketch, always in host memory."""
        arrays = (self._keys, self._owners, self._counts, self._askers, self._sketch)
        return sum(array.nbytes for array in arrays)

    @property
    def used(self) -> int:
        """Entries that hold something."""
        return int(np.count_nonzero(self._owners != EMPTY))

    def mirror(self) -> DeviceTags:
        """The tags on the device, from now on kept as the host's."""
        from server.cache.device_tags import DeviceTags  # imports Triton, which only lookups on a device need

        if self.tags is None:
            self.tags = DeviceTags(self._rows, self._keys, self._owners)
        return self.tags

    # ── looking up ─────────────────────────────────────────────────────────────────────────────────────────────────

    def find(self, owners: Ids, keys: Ids, hashes: Hashes) -> Ids:
        """[N] the slot that holds each entry, -1 where none does."""
        sets = self._set_of(hashes)
        same = (self._keys[sets] == keys[:, None]) & (self._owners[sets] == owners[:, None])
        ways = same.argmax(1)
        slots: Ids = sets * self.ways + ways
        slots[~same[np.arange(len(keys)), ways]] = -1
        return slots

    def read(self, slots: Ids, places: Ids | slice, out: Bytes) -> None:
        """On CPU: copies entries slots[M] to out[places], out uint8[N, E], C-contiguous."""
        assert self._host_rows is not None
        words = out.view(self._host_rows.dtype)
        if isinstance(places, slice):
            np.take(self._host_rows, slots, axis=0, out=words[places], mode="clip")
        else:
            words[places] = self._host_rows.take(slots, axis=0)

    def read_on_device(self, slots: Ids) -> torch.Tensor:
        """uint8[M, E] on the device, on the current stream."""
        return self._rows.index_select(0, torch.from_numpy(slots).to(self.device)).view(torch.uint8)

    # ── learning ───────────────────────────────────────────────────────────────────────────────────────────────────

    def hit(self, slots: Ids, askers: Ids | None) -> None:
        """Counts slots[M], with repeats; askers[M], each under 2^32, are the requests that asked."""
        np.add.at(self._counts.reshape(-1), slots, 1)
        if askers is not None:
            self._remember(slots, askers)

    def choose(self, hashes: Hashes, counts: Counts, most: int) -> Newcomers:
        """Counts the missed hashes[U], distinct, and chooses at most `most` to enter, each hotter than who must leave.

        The r-th hottest newcomer of a set is held against its r-th coldest way.
        """
        estimates = self._sketch.add(hashes, counts)
        sets = self._set_of(hashes)
        places = np.flatnonzero(estimates > self._counts[sets].min(1))
        if len(places) > most:
            places = places[np.argpartition(-estimates[places], most)[:most]]
        places = places[np.lexsort((-estimates[places], sets[places]))]
        chosen, heat = sets[places], estimates[places]
        begins = np.flatnonzero(np.diff(chosen, prepend=-1))
        rank = np.arange(len(places)) - np.repeat(begins, np.diff(begins, append=len(places)))
        coldest = np.argsort(self._counts[chosen], axis=1, kind="stable")
        ways = coldest[np.arange(len(places)), np.minimum(rank, self.ways - 1)]
        enters = (rank < self.ways) & (heat > self._counts[chosen, ways])
        return Newcomers(places[enters], (chosen * self.ways + ways)[enters], heat[enters])

    def enter(self, newcomers: Newcomers, owners: Ids, keys: Ids, rows: Bytes) -> Ids:
        """Puts the newcomers' entries, rows[M, E], into their slots; returns the owners of those that had to leave.

        A slot's tag is void while its row is written: a reader finds the old entry, nothing, or the new one.
        """
        slots = newcomers.slots
        held, ways = self._owners.reshape(-1), self._keys.reshape(-1)
        tally = self._counts.reshape(-1)
        leaving = slots[held[slots] != EMPTY]
        left: Ids = held[leaving]
        self._sketch.raise_to(mixed(left, ways[leaving]), tally[leaving])
        held[slots] = EMPTY
        on_device = send(slots, self.device)
        if self.tags is not None:
            self.tags.void(on_device, EMPTY)
        if self._host_rows is not None:
            self._host_rows[slots] = rows.view(self._host_rows.dtype)
        else:
            self._rows.index_copy_(0, on_device, send(rows, self.device).view(self._rows.dtype))
        if self.tags is not None:
            self.tags.publish(on_device, owners, keys)
        ways[slots], tally[slots] = keys, newcomers.counts
        self._askers[slots] = NOBODY
        held[slots] = owners
        return left

    def age(self, accesses: int) -> None:
        """Counts accesses; halves all frequencies each time AGE · capacity of them are over."""
        self._accesses += accesses
        while self._accesses >= AGE * self.capacity:
            self._accesses -= AGE * self.capacity
            self._sketch.halve()
            np.right_shift(self._counts, 1, out=self._counts)

    # ── all entries ────────────────────────────────────────────────────────────────────────────────────────────────

    def drop(self, owner: int) -> None:
        """Voids all entries of an owner."""
        mine = self._owners == owner
        self._owners[mine] = EMPTY
        if self.tags is not None:
            self.tags.drop(owner, EMPTY)
        self._counts[mine] = 0

    def shared(self, owner: int) -> tuple[Ids, Counts]:
        """Keys and counts of the owner's entries that several distinct requests asked for."""
        mine = (self._owners.reshape(-1) == owner) & (self._askers[:, -1] != NOBODY)
        return self._keys.reshape(-1)[mine], self._counts.reshape(-1)[mine]

    def mark_shared(self, slots: Ids) -> None:
        self._askers[slots] = ANYBODY

    def _set_of(self, hashes: Hashes) -> Ids:
        return ((hashes >> np.uint64(32)) * np.uint64(self.sets) >> np.uint64(32)).view(np.int64)

    def _remember(self, slots: Ids, askers: Ids) -> None:
        """Notes up to SEVERAL distinct askers an entry, distinct ones only, in columns from the left."""
        unknown = self._askers[slots, -1] == NOBODY
        pairs = np.unique(slots[unknown] << 32 | askers[unknown])
        slots, askers = pairs >> 32, pairs & 0xFFFF_FFFF
        for column in range(SEVERAL):
            fresh = ~(self._askers[slots] == askers[:, None]).any(1)
            slots, askers = slots[fresh], askers[fresh]
            free = self._askers[slots, column] == NOBODY
            self._askers[slots[free], column] = askers[free]  # of several for one slot the last stays, others go on
