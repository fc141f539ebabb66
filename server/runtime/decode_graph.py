"""A decode step captured as CUDA graphs: one, or several with a cut where rows arrive that only the host can read.

    capture   part 0 ─ cut(place) ─ part 1 ─ cut(place) ─ part 2        while the step is computed once
    replay    part 0 ─ arrive(place) ─ part 1 ─ arrive(place) ─ part 2

All parts share one memory pool, which is sound as long as they are replayed in the order of their capture on one
stream. Knows graphs and streams; nothing of what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

import torch

Place = TypeVar("Place")


class DecodeGraph(Generic[Place]):
    """`parts`, and the `places` between them."""

    def __init__(self) -> None:
        self.parts: list[torch.cuda.CUDAGraph] = []
        self.places: list[Place] = []

    @classmethod
    def captured(
        cls, compute: Callable[[Callable[[Place], None]], None], pool: Any, stream: torch.cuda.Stream
    ) -> DecodeGraph[Place]:
        """`compute(cut)` computes the step on the current stream, `stream`, and calls cut(place) where it is to be
        parted. Nothing may be left on another stream there. Raises what it raises, and what a capture does."""
        graph: DecodeGraph[Place] = cls()
        torch.cuda.synchronize(stream.device)
        torch.cuda.empty_cache()

        def begin() -> None:
            part = torch.cuda.CUDAGraph()
            part.capture_begin(pool=pool, capture_error_mode="thread_local")
            graph.parts.append(part)

        def cut(place: Place) -> None:
            graph.parts[-1].capture_end()
            graph.places.append(place)
            begin()

        with undone_if_it_fails(pool, stream.device), torch.cuda.stream(stream):
            begin()
            try:
                compute(cut)
            except BaseException:
                with suppress(RuntimeError):  # it ended already, or cannot end any more
                    graph.parts[-1].capture_end()
                raise
            graph.parts[-1].capture_end()
        return graph

    def replay(self, arrive: Callable[[Place], None]) -> None:
        """On the current stream; `arrive(place)` before each part but the first. What it raises ends the step there."""
        self.parts[0].replay()
        for place, part in zip(self.places, self.parts[1:], strict=True):
            arrive(place)
            part.replay()


@contextmanager
def undone_if_it_fails(pool: Any, device: torch.device) -> Iterator[None]:
    """Around a capture into `pool`. Where its own end fails too, torch leaves the capturing stream the current one and
    its allocator capturing: no cached memory would be given back any more, and the pool's own never.
    """
    stream = torch.cuda.current_stream(device)
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(stream)
        index = torch.cuda.current_device()
        with suppress(RuntimeError):  # of a capture that did end: its graph gives the pool back
            torch._C._cuda_endAllocateToPool(index, pool)
            torch._C._cuda_releasePool(index, pool)
        raise


def ran_out(error: BaseException | None) -> bool:
    """Whether device memory ran out, also where the capture's own end failed after that."""
    while error is not None and not isinstance(error, torch.cuda.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None
