"""Stalls on a GPU are counted by its stream's clock, once the stream is past them; events are stand-ins here."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from server.cache import stream_stall
from server.cache.prefetcher import Lookup, Prefetcher
from server.cache.stream_stall import StreamStall
from tests.cache.counted import MemoryTable

CPU = torch.device("cpu")


class Marks:
    """A stream's clock, in milliseconds, and how far the stream is."""

    def __init__(self, times: Iterator[float]) -> None:
        self.times, self.reached = times, 0.0

    def timed(self, device: torch.device) -> Mark:
        return Mark(self, next(self.times))


class Mark:
    def __init__(self, marks: Marks, at: float) -> None:
        self.marks, self.at = marks, at

    def query(self) -> bool:
        return self.marks.reached >= self.at

    def elapsed_time(self, later: Mark) -> float:
        return later.at - self.at


def test_a_stall_is_known_once_the_stream_is_past_it(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = Marks(iter([3.0, 3.5]))
    monkeypatch.setattr(stream_stall, "timed", marks.timed)
    stall = StreamStall(CPU)
    assert stall.seconds() is None
    stall.end(CPU)
    marks.reached = 3.4
    assert stall.seconds() is None
    marks.reached = 3.5
    assert stall.seconds() == pytest.approx(0.0005)


def test_fetches_are_counted_when_their_stalls_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = Marks(iter([1.0, 1.2, 2.0, 2.5]))
    monkeypatch.setattr(stream_stall, "timed", marks.timed)
    prefetcher = Prefetcher(torch.float32, CPU, 1 << 16)
    table = MemoryTable("t")
    for _ in range(2):
        (fetch,) = prefetcher.begin([Lookup(table, 0, np.arange(4).reshape(2, 2))])
        stall = StreamStall(CPU)
        fetch.wait()
        stall.end(CPU)
        prefetcher._waited[-1] = (fetch, stall)  # as on a GPU
    assert prefetcher.counters() == ()
    for reached, rows, seconds in ((1.2, 4, 0.0002), (2.4, 4, 0.0002), (2.5, 8, 0.0007)):
        marks.reached = reached
        (counters,) = prefetcher.counters()
        assert counters.rows == rows and counters.stall_s == pytest.approx(seconds)
    prefetcher.close()
