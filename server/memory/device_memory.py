"""The memories of a decode step that the device serves by itself: no host fetch, legal in a CUDA graph.

    host    serves? ─ prepare ─ launch ───────────────────────────────────────────────────────── between
    main    ──────────┬─ embed ─ block 0 ─ … ─ add(l) ─ block l ─ … ─ up(m) ─ … ─ join ─ sample ─ copies for the host
    side              └─ hash ─ rows of layer l ─ event ┘  rows of layer m ─ event ┘

One side stream, the earliest layer first; a layer waits for its own rows' event and for nothing else. All that varies
from step to step stands in tensors that are rewritten in place. What cannot be served this way (`serves`) goes the
host's way, `Memories.begin`, to the same rows. On CPU there are no streams, and kernels are their torch references.

Shapes: B tokens, one a sequence; K attached packs, in the order of attachment; H hidden width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from server.memory.stem import StemPack
from server.view import MemoryView


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """One pack's rows [B, C · D] at one layer, who sees it and who does not, bool[B], and when they are there."""

    pack: Pack
    rows: Tensor
    seen: Tensor
    unseen: Tensor
    ready: torch.cuda.Event | None

    def wait(self) -> Tensor:
        """The rows, once the current stream has waited for them."""
        if self.ready is not None:
            torch.cuda.current_stream(self.rows.device).wait_event(self.ready)
        return self.rows


@dataclass(slots=True)
class DeviceStep:
    """One step's memory, as `decoder.MemoryStep`. `layers`, `up_layers`: the same in every step."""

    memory: DeviceMemory
    batch: DecodeBatch
    side: torch.cuda.Stream | None
    readings: dict[int, list[DeviceReading]] = field(default_factory=dict)
    ups: dict[int, DeviceReading] = field(default_factory=dict)
    conv_reads: dict[Identity, ConvRead] = field(default_factory=dict)

    @property
    def layers(self) -> frozenset[int]:
        return frozenset(self.readings)

    @property
    def up_layers(self) -> frozenset[int]:
        return frozenset(self.ups)

    def add(self, layer: int, hidden: Tensor) -> Tensor:
        """hidden[B, H] with what the memories of this layer add, maybe in place; tokens that see none keep theirs."""
        readings, sequence_of = self.readings[layer], self.memory.sequence_of[: self.batch.num_tokens]
        total = hidden if len(readings) == 1 else hidden.clone()
        for reading in readings:
            pack, rows = reading.pack, reading.wait()
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
        rows = reading.wait()
        return rows if dense is None else torch.where(reading.seen[:, None], rows, dense)

    def join(self) -> None:
        """The current stream waits for the side stream: before a capture ends."""
        if self.side is not None:
            torch.cuda.current_stream(self.side.device).wait_stream(self.side)


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
    """`max_num_seqs`: the most tokens of a step, dummies included. Packs attached later are not served. `use_kernels`:
    consume rows by the fused kernels where they know the form; None: where they run.

    All methods belong to the thread that launches; `prepare` and `between` to the stream it launches on.
    """

    def __init__(self, memories: Memories, max_num_seqs: int, *, use_kernels: bool | None = None) -> None:
        staging = memories.prefetcher.staging
        self.memories, self.max_num_seqs = memories, max_num_seqs
        self.packs, self.device = memories.packs, staging.device
        self.rows = DeviceRows(self.packs, memories.prefetcher, max_num_seqs)
        memories.direct = self.rows
        engram = [pack for pack in self.packs if isinstance(pack, AttachedPack) and pack.id in self.rows.served]
        self.edits = DeviceEdits(engram, max_num_seqs, staging.dtype, self.device, MOST_EDITS)
        self._stem = {pack.id for pack in self.packs if isinstance(pack, StemPack)}
        with torch.inference_mode(False):
            self.sequence_of = torch.arange(max_num_seqs, device=self.device)
        self._seen = self._prepared = self._looked(())
        kernels = runs_on(self.sequence_of) if use_kernels is None else use_kernels
        self.fused = fused_layers(engram) if kernels else {}
        cuda = self.device.type == "cuda"
        self._side = torch.cuda.Stream(self.device) if cuda else None  # type: ignore[no-untyped-call]

    def give_up(self) -> None:
        """No decode step will read through it: the host serves every step, and has the cache to itself again."""
        self.memories.direct = None
        self.memories.prefetcher.unmirror()

    @property
    def up_layers(self) -> frozenset[int]:
        """The layers whose up-projection it replaces."""
        return frozenset(layer for _, pack, layer in self.rows.in_layer_order() if isinstance(pack, StemPack))

    # ── on the host ────────────────────────────────────────────────────────────────────────────────────────────────

    def serves(self, views: Sequence[MemoryView], positions: Ints | None = None) -> bool:
        """Whether a decode step of these views can be done wholly on the device; positions[B] of its tokens tell
        redirects that lie behind from those ahead (None: any redirect is ahead)."""
        if len(views) > self.max_num_seqs:
            return False
        seen = self._look(views)
        if not seen.fits or not all(self.rows.can_read(identity) for identity in seen.packs):
            return False
        return all(positions is not None and last < positions[token] for token, last in seen.redirected)

    def sees(self, views: Sequence[MemoryView]) -> Bools:
        """[K, B], `DecodeBatch.sees`; not to be changed."""
        return self._look(views).sees

    def prepare(self, views: Sequence[MemoryView], askers: Ints | None = None) -> None:
        """Before each launch, on its stream: writes what varies. `views`: of the real tokens, which come first;
        askers[B]: which request each is of, where hot lists are kept."""
        seen = self._look(views)
        if seen is not self._prepared:
            self.edits.write(views)
            self._prepared = seen
        self.rows.expect(seen.sees, askers)

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

    def begin(self, batch: DecodeBatch) -> DeviceStep:
        """Hashes and looks up on the side stream; may be captured. Rows are there until the next `begin`."""
        step = DeviceStep(self, batch, self._side)
        unseen = ~batch.sees
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        with self._on_side_stream():
            for index, pack, layer in self.rows.in_layer_order():
                rows, row_ids = self.rows.read(pack, layer, batch, batch.sees[index])
                if isinstance(pack, AttachedPack):
                    self.edits.patch(pack, layer, rows, row_ids)
                    self._read_conv(step, pack, layer)
                ready = self._side.record_event() if self._side is not None else None
                reading = DeviceReading(pack, rows, batch.sees[index], unseen[index], ready)
                if isinstance(pack, StemPack):
                    step.ups[layer] = reading
                else:
                    step.readings.setdefault(layer, []).append(reading)
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
