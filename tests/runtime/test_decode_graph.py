"""A step captured in parts: what is launched between them, and what is left of a capture that fails.

Graphs are recorded by a stand-in here; tests/gpu captures real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch

from server.runtime.attention_probe import milliseconds
from server.runtime.decode_graph import DecodeGraph


class Recorded:
    """A CUDAGraph that notes what happened: what was launched while it was captured is done again at each replay."""

    log: ClassVar[list[str]] = []
    capturing: Recorded | None = None
    made = 0

    def __init__(self) -> None:
        self.work: list[str] = []
        self.name = f"part {Recorded.made}"
        Recorded.made += 1

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert Recorded.capturing is None and pool == "pool" and capture_error_mode == "thread_local"
        Recorded.capturing = self

    def capture_end(self) -> None:
        if Recorded.capturing is not self:
            raise RuntimeError("no capture is under way")
        Recorded.capturing = None

    def replay(self) -> None:
        assert Recorded.capturing is None
        Recorded.log += self.work


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    Recorded.log, Recorded.capturing, Recorded.made = [], None, 0
    for name, stand_in in (
        ("CUDAGraph", Recorded),
        ("stream", lambda stream: nullcontext()),
        ("synchronize", lambda device: None),
        ("empty_cache", lambda: None),
        ("current_stream", lambda device: "the stream before"),
        ("set_stream", lambda stream: Recorded.log.append(f"back to {stream}")),
        ("current_device", lambda: 0),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda index, pool, name=name: Recorded.log.append(name), raising=False)

    def record(work: str) -> None:
        assert Recorded.capturing is not None
        Recorded.capturing.work.append(work)

    return record


class Stream:
    device = torch.device("cpu")


def captured(compute: Callable[[Any], None]) -> DecodeGraph[int]:
    return DecodeGraph.captured(compute, "pool", Stream())  # type: ignore[arg-type]


def test_rows_arrive_between_the_parts_they_were_captured_between(launch: Callable[[str], None]) -> None:
    def step(cut: Callable[[int], None]) -> None:
        launch("embed")
        cut(1)
        launch("layer 1")
        launch("layer 2")
        cut(15)
        launch("layer 15")

    graph = captured(step)
    assert graph.places == [1, 15] and Recorded.log == []
    graph.replay(lambda place: Recorded.log.append(f"rows of {place}"))
    assert Recorded.log == ["embed", "rows of 1", "layer 1", "layer 2", "rows of 15", "layer 15"]


def test_without_a_cut_a_step_is_one_graph(launch: Callable[[str], None]) -> None:
    graph = captured(lambda cut: launch("everything"))

    def nobody(place: int) -> None:
        raise AssertionError(place)

    graph.replay(nobody)
    assert len(graph.parts) == 1 and Recorded.log == ["everything"]


def test_rows_that_do_not_come_end_the_step_there(launch: Callable[[str], None]) -> None:
    def step(cut: Callable[[int], None]) -> None:
        launch("embed")
        cut(1)
        launch("layer 1")

    graph = captured(step)

    def gone(place: int) -> None:
        raise LookupError(f"rows of {place} are gone")

    with pytest.raises(LookupError, match="rows of 1"):
        graph.replay(gone)
    assert Recorded.log == ["embed"]
    graph.replay(lambda place: None)  # and the next is whole
    assert Recorded.log == ["embed", "embed", "layer 1"]


@pytest.mark.parametrize("cuts", [0, 1])
def test_a_capture_that_fails_is_ended_and_leaves_the_pool(launch: Callable[[str], None], cuts: int) -> None:
    def step(cut: Callable[[int], None]) -> None:
        for place in range(cuts):
            cut(place)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        captured(step)
    assert Recorded.capturing is None
    assert Recorded.log == ["back to the stream before", "_cuda_endAllocateToPool", "_cuda_releasePool"]


def test_timing_attention_that_cannot_be_captured_leaves_the_stream_too(
    launch: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Side(Stream):
        def __init__(self, device: torch.device) -> None: ...

        def wait_stream(self, other: object) -> None: ...

        def synchronize(self) -> None: ...

    def step() -> None:
        if Recorded.capturing is not None:
            raise ZeroDivisionError

    monkeypatch.setattr(torch.cuda, "Stream", Side)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    with pytest.raises(ZeroDivisionError):
        milliseconds(step, Stream.device)
    assert Recorded.capturing is None and Recorded.log[0] == "back to the stream before"
