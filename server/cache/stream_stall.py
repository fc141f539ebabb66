"""StreamStall: how long a CUDA stream stood still for a layer's rows, by the stream's own clock.

    stream   … layers before ─ began │ nothing to do │ rows are there ─ ended │ the layer …

The host's wait would say nothing: it may wait while the device is still busy with earlier layers, and the device may
wait on while the host has gone on. Known once the stream is past the second mark.
"""

from __future__ import annotations

import torch


class StreamStall:
    """Begins on the device's current stream, behind what has been launched there."""

    __slots__ = ("_began", "_ended")

    def __init__(self, device: torch.device) -> None:
        self._began = timed(device)
        self._ended: torch.cuda.Event | None = None

    def end(self, device: torch.device) -> None:
        """Once the stream has been told to wait for the rows."""
        self._ended = timed(device)

    def seconds(self) -> float | None:
        """None: not known yet."""
        if self._ended is None or not self._ended.query():  # type: ignore[no-untyped-call]
            return None
        return float(self._began.elapsed_time(self._ended)) / 1e3


def timed(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
