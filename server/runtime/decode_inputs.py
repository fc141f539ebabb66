"""Inputs of a decode step: static tensors on the device, filled by one copy from one pinned host buffer.

    host, in turn   ┌ integers [7, most] ┬ temperature [most] ┬ sees [K, most] ┐
                    └────────────────────┴── one copy ────────┴────────────────┘ ─► the same bytes on the device

There are two host buffers: while the copy from one may still be queued behind the step in flight, the next step's is
written to the other. Columns beyond the step's sequences are dummies. Shapes: `most` sequences of the largest bucket,
K packs. Knows rows, positions and blocks; nothing of sequences or models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.batch import Bools, Ints

LANES = ("row_of", "positions", "context_len", "slots", "pages", "blocks", "seeds")


@dataclass(frozen=True, slots=True)
class Fields:
    """The parts of one buffer: integers[7, most] int64 in the order of `LANES`, temperature[most] fp32, sees[K, most].

    pages       the column of each position's page in its row of the block table
    blocks      the block that this page is
    """

    integers: Tensor
    temperature: Tensor
    sees: Tensor

    @classmethod
    def of(cls, buffer: Tensor, most: int, packs: int) -> Fields:
        first, second = len(LANES) * most * 8, len(LANES) * most * 8 + most * 4
        return cls(
            buffer[:first].view(torch.int64).view(len(LANES), most),
            buffer[first:second].view(torch.float32),
            buffer[second:].view(torch.bool).view(packs, most),
        )

    def lane(self, name: str) -> Tensor:
        return self.integers[LANES.index(name)]


def buffer_bytes(most: int, packs: int) -> int:
    return most * (len(LANES) * 8 + 4 + packs)


class HostBuffer:
    """A pinned buffer, and the event after which it may be written again."""

    def __init__(self, most: int, packs: int, pinned: bool) -> None:
        self.bytes = torch.zeros(buffer_bytes(most, packs), dtype=torch.uint8, pin_memory=pinned)
        fields = Fields.of(self.bytes, most, packs)
        self.integers: Ints = fields.integers.numpy()
        self.temperature: npt.NDArray[np.float32] = fields.temperature.numpy()
        self.sees: Bools = fields.sees.numpy()
        self.copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]


class StepInputs:
    """`dummy_row`, `dummy_block`: where dummies read and write."""

    def __init__(
        self, most: int, packs: int, *, dummy_row: int, dummy_block: int, block_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.dummy = np.array([dummy_row, 0, 1, dummy_block * block_size, 0, dummy_block, 0], np.int64)[:, None]
        self._host = [HostBuffer(most, packs, device.type == "cuda") for _ in range(2)]
        self._bytes = torch.zeros(buffer_bytes(most, packs), dtype=torch.uint8, device=device)
        self.fields = Fields.of(self._bytes, most, packs)
        empty = np.zeros(0, np.int64)
        self.send(most, empty, empty, empty, np.zeros(0), empty, np.zeros((packs, 0), np.bool_))

    def send(
        self,
        bucket: int,
        rows: Ints,
        positions: Ints,
        blocks: Ints,
        temperature: npt.NDArray[np.floating],
        seeds: Ints,
        sees: Bools,
    ) -> None:
        """Columns [0, bucket) of the next step: these sequences, then dummies. Returns before the copy is done."""
        host, count = self._host[0], len(rows)
        self._host.reverse()
        if host.copied is not None:
            host.copied.synchronize()
        pages = positions // self.block_size
        slots = blocks * self.block_size + positions % self.block_size
        for lane, values in zip(
            host.integers, (rows, positions, positions + 1, slots, pages, blocks, seeds), strict=True
        ):
            lane[:count] = values
        host.integers[:, count:bucket] = self.dummy
        host.temperature[:count], host.temperature[count:bucket] = temperature, 0.0
        host.sees[:, :count], host.sees[:, count:bucket] = sees, False
        self._bytes.copy_(host.bytes, non_blocking=True)
        if host.copied is not None:
            host.copied.record()
