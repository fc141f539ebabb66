"""The memories of a decode step on the device: what it looks up by itself, and what the host brings in the midst of it.

    host    serves? ─ prepare ─ launch ───────────────────────────────────────────────────────── between
    main    ──────────┬─ embed ─ block 0 ─ … ─ add(l) ─ block l ─ … ─ up(m) ─ … ─ join ─ sample ─ copies for the host
    side              └─ hash ─ rows of layer l ─ event ┘  rows of layer m ─ event ┘

One side stream, the earliest layer first; a layer waits for its own rows' event and for nothing else. Before a layer
whose rows the host brings (`staged_rows.py`), `arrive` is called and the streams are one again: a graph is cut there.
All that varies from step to step stands in tensors that are rewritten in place. What cannot be served this way
(`serves`) goes the host's way, `Memories.begin`, to the same rows. On CPU there are no streams, and kernels are their
torch references.

Shapes: B tokens, one a sequence; K attached packs, in the order of attachment; H hidden width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kernels.language import runs_on
from server.batch import Bools, DecodeBatch, Ints
from server.memory.attached import AttachedPack
from server.memory.device_edits import MOST_EDITS, DeviceEdits
from server.memory.device_layer import Fused, conv_read, fused
from server.memory.device_rows import DeviceRows, Identity, Pack
from server.memory.memories import Memories
from server.memory.short_conv import ConvRead
from server.memory.staged_rows import Expected, Place, StagedRows, Windows, place_of
from server.memory.stem import StemPack
from server.view import MemoryView


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """One pack's rows [B, C · D] at one layer, who sees it and who does not, bool[B]. `ready`: when rows looked up here
    are there; `staged`: whether the host brings them."""

    pack: Pack
    layer: int
    rows: Tensor
    seen: Tensor
    unseen: Tensor
    ready: torch.cuda.Event | None = None
    staged: bool = False


@dataclass(slots=True)
class DeviceStep:
    """One step's memory, as `decoder.MemoryStep`. `layers`, `up_layers`: the same in every step.

    `arrive(place)` is called where staged rows are read next, once nothing is left on the side stream.
    """

    memory: DeviceMemory
    batch: DecodeBatch
    side: torch.cuda.Stream | None
    arrive: Callable[[Place], None]
    readings: dict[int, list[DeviceReading]] = field(default_factory=dict)
    ups: dict[int, DeviceReading] = field(default_factory=dict)
    conv_reads: dict[Identity, ConvRead] = field(default_factory=dict)

    def read(self, reading: DeviceReading) -> None:
        """Takes a reading in, in the order of `begin`."""
        if isinstance(reading.pack, StemPack):
            self.ups[reading.layer] = reading
        else:
            self.readings.setdefault(reading.layer, []).append(reading)

    @property
    def layers(self) -> frozenset[int]:
        return frozenset(self.readings)

    @property
    def up_layers(self) -> frozenset[int]:
        return frozenset(self.ups)

    def add(self, layer: int, hidden: Tensor) -> Tensor:
        """hidden[B, H] with what the memories of this layer add, maybe in place; tokens that see none keep theirs."""
        readings, sequence_of = self.readings[layer], self.memory.sequence_of[: self.batch.num_tokens]
        self._await(readings)
        total = hidden if len(readings) == 1 else hidden.clone()
        for reading in readings:
            pack, rows = reading.pack, reading.rows
            assert isinstance(pack, AttachedPack)
            slots, kernels = pack.conv_slots.get(layer), self.memory.fused.get((pack.id, layer))
            if kernels is not None:
                kernels.add(total, hidden, rows, reading.unseen, self.batch, sequence_of, slots)
            else:
                added = pack.modules[layer](hidden, rows, slots, self.conv_reads.get(pack.id))
                total = torch.where(reading.seen[:, None], total + added, total)
        return total

    def up(self, layer: int, dense: Tensor | None) -> Tensor:
        """[B, F] in place of the layer's up-projection; tokens that do not see the pack keep `dense`. Without `dense`
        every request sees it, and what a dummy reads does not matter."""
        reading = self.ups[layer]
        self._await([reading])
        rows = reading.rows
        return rows if dense is None else torch.where(reading.seen[:, None], rows, dense)

    def distinct_up(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """As `decoder.DistinctRows`: where there is no up-projection every token has a row of its own here."""
        reading = self.ups[layer]
        self._await([reading])
        return reading.rows, self.memory.sequence_of[: self.batch.num_tokens]

    def join(self) -> None:
        """The current stream waits for the side stream: before a capture ends. What is captured next finds all that
        was looked up, and knows nothing of that stream."""
        if self.side is not None:
            torch.cuda.current_stream(self.side.device).wait_stream(self.side)
            self.side = None

    def _await(self, readings: Sequence[DeviceReading]) -> None:
        """All readings of one place: their rows are there for what the current stream does next."""
        staged = next((reading for reading in readings if reading.staged), None)
        if staged is not None:
            self.join()
            self.arrive(place_of(staged.pack, staged.layer))
        if self.side is not None:
            for reading in readings:
                if reading.ready is not None:
                    torch.cuda.current_stream(self.side.device).wait_event(reading.ready)


@dataclass(frozen=True, slots=True, eq=False)
class Views:
    """The views of a step's tokens: sees[K, B], the packs they name, (token, last redirected place) of those
    that read a token-id table, and whether their edits can be read on the device."""

    views: list[MemoryView]
    sees: Bools
    packs: frozenset[Identity]
    redirected: list[tuple[int, int]]
    fits: bool


class DeviceMemory:
    """`max_num_seqs`: the most tokens of a step, dummies included. Packs attached later are not served: another takes
    over then, which goes on counting where this one, its `before`, stopped. `use_kernels`: consume rows by the fused
    kernels where they know the form; None: where they run. `direct`: look up what the device can read by itself; False:
    the host brings all rows, for comparison.

    All methods belong to the thread that launches; `prepare`, `arrive` and `between` to the stream it launches on.
    """

    def __init__(
        self,
        memories: Memories,
        max_num_seqs: int,
        *,
        before: DeviceMemory | None = None,
        use_kernels: bool | None = None,
        direct: bool = True,
    ) -> None:
        staging = memories.prefetcher.staging
        self.memories, self.max_num_seqs = memories, max_num_seqs
        self.packs, self.device = memories.packs, staging.device
        self.rows = DeviceRows(self.packs if direct else (), memories.prefetcher, max_num_seqs)
        self.staged = StagedRows([p for p in self.packs if p.id not in self.rows.served], memories, max_num_seqs)
        engram = [pack for pack in self.packs if isinstance(pack, AttachedPack)]
        looked_up = [pack for pack in engram if pack.id in self.rows.served]
        self.edits = DeviceEdits(looked_up, max_num_seqs, staging.dtype, self.device, MOST_EDITS)
        self._stem = {pack.id for pack in self.packs if isinstance(pack, StemPack)}
        with torch.inference_mode(False):
            self.sequence_of = torch.arange(max_num_seqs, device=self.device)
        self._seen = self._prepared = self._looked(())
        kernels = runs_on(self.sequence_of) if use_kernels is None else use_kernels
        self.fused = fused_layers(engram) if kernels else {}
        cuda = self.device.type == "cuda"
        self._side = torch.cuda.Stream(self.device) if cuda else None  # type: ignore[no-untyped-call]
        if before is not None:
            self.rows.go_on_from(before.rows)
        memories.direct = self.rows

    def give_up(self) -> None:
        """No decode step will read through it: the host serves every step, and has the cache to itself again."""
        self.memories.direct = None
        self.memories.prefetcher.unmirror()

    def serve_fetches(self) -> None:
        """Rows in RAM that the host asks for, as prefills do, are read by the device itself from now on. Raises what
        reading one raises."""
        self.rows.serve_fetches()

    @property
    def up_layers(self) -> frozenset[int]:
        """The layers whose up-projection it replaces."""
        return frozenset(layer for pack in self.packs if isinstance(pack, StemPack) for layer in pack.tables)

    # ── on the host ────────────────────────────────────────────────────────────────────────────────────────────────

    def serves(self, views: Sequence[MemoryView], positions: Ints | None = None) -> bool:
        """Whether a decode step of these views can be done on the device; positions[B] of its tokens tell redirects
        that lie behind from those ahead (None: any redirect is ahead)."""
        if len(views) > self.max_num_seqs:
            return False
        seen = self._look(views)
        if not seen.fits or not all(self.rows.can_read(i) or self.staged.can_read(i) for i in seen.packs):
            return False
        return all(positions is not None and last < positions[token] for token, last in seen.redirected)

    def sees(self, views: Sequence[MemoryView]) -> Bools:
        """[K, B], `DecodeBatch.sees`; not to be changed."""
        return self._look(views).sees

    def prepare(
        self,
        views: Sequence[MemoryView],
        askers: Ints | None = None,
        positions: Ints | None = None,
        windows: Windows | None = None,
    ) -> None:
        """Before each launch, on its stream: writes what varies. `views`, positions[B]: of the real tokens, which come
        first; askers[B]: which request each is of, where hot lists are kept; `windows`: asked for their n-grams by the
        first `arrive`, needed as positions are where the host brings rows."""
        seen = self._look(views)
        if seen is not self._prepared:
            self.edits.write(views)
            self._prepared = seen
        expected = None
        if any(pack.id in seen.packs for pack in self.staged.packs):
            assert positions is not None and windows is not None
            expected = Expected(views, positions, askers, windows)
        self.staged.expect(expected)
        self.rows.expect(seen.sees, askers)

    def arrive(self, place: Place) -> None:
        """Between two parts of a step: the rows that the host brings to this place."""
        self.staged.arrive(place)

    def _look(self, views: Sequence[MemoryView]) -> Views:
        """What the host needs to know of these views; most steps have those of the step before."""
        if self._seen.views != list(views):
            self._seen = self._looked(views)
        return self._seen

    def _looked(self, views: Sequence[MemoryView]) -> Views:
        distinct = {id(view): view for view in views}
        place = {number: index for index, number in enumerate(distinct)}
        sees = np.array([[pack.id in view.packs for view in distinct.values()] for pack in self.packs], bool)
        of_view = [place[id(view)] for view in views]
        redirected = [
            (token, max(position for position, _ in view.redirects))
            for token, view in enumerate(views)
            if view.redirects and not self._stem.isdisjoint(view.packs)
        ]
        return Views(
            list(views),
            sees.reshape(len(self.packs), len(distinct))[:, of_view],
            frozenset(identity for view in distinct.values() for identity in view.packs),
            redirected,
            self.edits.fit(list(distinct.values())),
        )

    def between(self, batch: DecodeBatch) -> None:
        """After a launch, on its stream, without waiting: what the step looked up begins to be copied, and what earlier
        ones did is counted; rows enter the cache now and then."""
        self.rows.between(batch.num_tokens)

    # ── within a launch ────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, batch: DecodeBatch, arrive: Callable[[Place], None] | None = None) -> DeviceStep:
        """Hashes and looks up on the side stream; may be captured. Rows are there until the next `begin`. `arrive`: in
        place of this memory's own, where a capture is cut."""
        step, unseen = DeviceStep(self, batch, self._side, arrive or self.arrive), ~batch.sees
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        with self._on_side_stream():
            for index, pack, layer in self.rows.in_layer_order():
                rows, row_ids = self.rows.read(pack, layer, batch, batch.sees[index])
                if isinstance(pack, AttachedPack):
                    self.edits.patch(pack, layer, rows, row_ids)
                    self._read_conv(step, pack, layer)
                ready = self._side.record_event() if self._side is not None else None
                step.read(DeviceReading(pack, layer, rows, batch.sees[index], unseen[index], ready))
        for pack in self.staged.packs:
            index, rows = self.packs.index(pack), self.staged.rows[pack.id][: batch.num_tokens]
            for layer in sorted(pack.tables):
                if isinstance(pack, AttachedPack):
                    self._read_conv(step, pack, layer)
                step.read(DeviceReading(pack, layer, rows, batch.sees[index], unseen[index], staged=True))
        for readings in step.readings.values():  # sums run in the order of attachment, as the host's
            readings.sort(key=lambda reading: self.packs.index(reading.pack))
        return step

    def _read_conv(self, step: DeviceStep, pack: AttachedPack, layer: int) -> None:
        """Where the pack's convolution reads, the same for all its layers; the kernels find it themselves."""
        if pack.has_conv and pack.id not in step.conv_reads and (pack.id, layer) not in self.fused:
            shape, sequences = pack.shape, self.sequence_of[: step.batch.num_tokens]
            step.conv_reads[pack.id] = conv_read(step.batch, shape.kernel_size, shape.dilation, sequences)

    def _on_side_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._side is None else torch.cuda.stream(self._side)


def fused_layers(packs: Sequence[AttachedPack]) -> dict[tuple[Identity, int], Fused]:
    """The layers that the kernels know, by pack and layer."""
    made = {(pack.id, layer): fused(module) for pack in packs for layer, module in pack.modules.items()}
    return {key: layer for key, layer in made.items() if layer is not None}
