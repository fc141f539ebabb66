"""Inputs of a decode step: static tensors on the device, filled by one copy from one pinned host buffer.

    host, in turn   ┌ integers [8, most] ┬ shares [3, most] ┬ sees [K, most] ┐
                    └────────────────────┴── one copy ──────┴────────────────┘ ─► the same bytes on the device

There are two host buffers: while the copy from one may still be queued behind the step in flight, the next step's is
written to the other. Columns beyond the step's sequences are dummies. Shapes: `most` sequences of the largest bucket,
K packs. Knows rows, positions and blocks; nothing of sequences or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.batch import Bools, Ints

LANES = ("row_of", "positions", "context_len", "slots", "pages", "blocks", "seeds", "top_k")
SHARES = ("temperature", "top_p", "min_p")


class Sampling(NamedTuple):
    """How the next token of each of B sequences is chosen: temperature[B] (0: the most likely); seeds[B], int64 bits;
    top_k[B] (0: all), top_p[B] (1: all), min_p[B] (0: all)."""

    temperature: npt.NDArray[np.float32]
    seeds: Ints
    top_k: Ints
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]

    @classmethod
    def plain(cls, temperature: npt.NDArray[np.floating], seeds: Ints) -> Sampling:
        """From all tokens."""
        heat = np.asarray(temperature, np.float32)
        return cls(heat, seeds, np.zeros(len(heat), np.int64), np.ones_like(heat), np.zeros_like(heat))


@dataclass(frozen=True, slots=True)
class Fields:
    """The parts of one buffer: integers[8, most] int64 in the order of `LANES`, shares[3, most] fp32 in that of
    `SHARES`, sees[K, most].

    pages       the column of each position's page in its row of the block table
    blocks      the block that this page is
    top_k       0: all
    """

    integers: Tensor
    shares: Tensor
    sees: Tensor

    @classmethod
    def of(cls, buffer: Tensor, most: int, packs: int) -> Fields:
        first = len(LANES) * most * 8
        second = first + len(SHARES) * most * 4
        return cls(
            buffer[:first].view(torch.int64).view(len(LANES), most),
            buffer[first:second].view(torch.float32).view(len(SHARES), most),
            buffer[second:].view(torch.bool).view(packs, most),
        )

    def lane(self, name: str) -> Tensor:
        return self.integers[LANES.index(name)] if name in LANES else self.shares[SHARES.index(name)]


def buffer_bytes(most: int, packs: int) -> int:
    return most * (len(LANES) * 8 + len(SHARES) * 4 + packs)


class HostBuffer:
    """A pinned buffer, and the event after which it may be written again."""

    def __init__(self, most: int, packs: int, pinned: bool) -> None:
        self.bytes = torch.zeros(buffer_bytes(most, packs), dtype=torch.uint8, pin_memory=pinned)
        fields = Fields.of(self.bytes, most, packs)
        self.integers: Ints = fields.integers.numpy()
        self.shares: npt.NDArray[np.float32] = fields.shares.numpy()
        self.sees: Bools = fields.sees.numpy()
        self.copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]


class StepInputs:
    """`dummy_row`, `dummy_block`: where dummies read and write."""

    def __init__(
        self, most: int, packs: int, *, dummy_row: int, dummy_block: int, block_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.dummy = np.array([dummy_row, 0, 1, dummy_block * block_size, 0, dummy_block, 0, 0], np.int64)[:, None]
        self._host = [HostBuffer(most, packs, device.type == "cuda") for _ in range(2)]
        self._bytes = torch.zeros(buffer_bytes(most, packs), dtype=torch.uint8, device=device)
        self.fields = Fields.of(self._bytes, most, packs)
        empty = np.zeros(0, np.int64)
        self.send(most, empty, empty, empty, Sampling.plain(np.zeros(0), empty), np.zeros((packs, 0), np.bool_))

    def send(
        self,
        bucket: int,
        rows: Ints,
        positions: Ints,
        blocks: Ints,
        sampling: Sampling,
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
            host.integers,
            (rows, positions, positions + 1, slots, pages, blocks, sampling.seeds, sampling.top_k),
            strict=True,
        ):
            lane[:count] = values
        host.integers[:, count:bucket] = self.dummy
        host.shares[:, :count] = sampling.temperature, sampling.top_p, sampling.min_p
        host.shares[:, count:bucket] = 0.0  # the most likely token
        host.sees[:, :count], host.sees[:, count:bucket] = sees, False
        self._bytes.copy_(host.bytes, non_blocking=True)
        if host.copied is not None:
            host.copied.record()
