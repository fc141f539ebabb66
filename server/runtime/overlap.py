"""The engine with one decode step in flight: the host schedules and launches the next before it reads the last.

    device   │ step n      │ step n+1    │ step n+2    │
    host     │ launch n+1 ─┤ read n, launch n+2 ─┤ read n+1 …
                           └ ends, stops, outputs of n

A step is launched ahead only if nothing else could be done instead: all its sequences are plain, nobody who waits has
a place, blocks suffice. Whoever turns out to have ended in step n (a stop token, an abort) has one token too many
computed in step n + 1, which is discarded. Its blocks and its row are given back at once, while that step may still
write to them: everything the device does is in one stream, so that whoever gets them next writes after it; and a block
that step n + 1 writes to is not full before it, so nobody can have found it by its prefix. A launch ahead that fails,
at a table that the host reads for it, takes nothing from step n: step n + 1 is launched again when it is due, if
anybody is left in it, and fails then. What reads tokens or logits on the host goes one step after another, as in
`Engine`.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from server.errors import EngramError
from server.runtime.decode_step import Launched
from server.runtime.device_runner import DeviceRunner
from server.runtime.engine import Engine
from server.runtime.messages import StepOutputs, TokenOutput
from server.runtime.scheduler import Work

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that is being computed."""

    works: list[Work]
    launched: Launched

    @property
    def alive(self) -> list[Work]:
        """The works whose sequences still want their token."""
        return [work for work in self.works if work.sequence.finish_reason is None]


class OverlappedEngine(Engine):
    runner: DeviceRunner

    def __init__(self, runner: DeviceRunner, *arguments: Any, **options: Any) -> None:
        super().__init__(runner, *arguments, **options)
        self._flight: Flight | None = None
        self.launched_ahead = 0

    def step(self) -> StepOutputs:
        """Computes the next batch, or reads the one in flight. Does nothing (no outputs) when idle."""
        flight, self._flight = self._flight, None
        if flight is None or not flight.alive:
            return super().step()
        begun = time.perf_counter()
        outputs = self._land(flight)
        return self._told(outputs, begun, len(flight.works))

    def _compute(self, works: list[Work]) -> list[TokenOutput]:
        if not self.runner.decodes(works) or any(work.sequence.params.timings for work in works):
            return super()._compute(works)
        try:
            flight = Flight(works, self.runner.launch(works))
        except Exception as error:
            return self._fail(works, error)
        return self._land(flight)

    def _land(self, flight: Flight) -> list[TokenOutput]:
        """Launches what can follow, then takes the flight's tokens."""
        works = flight.alive
        try:
            self._flight = self._ahead(works)
            sampled = self.runner.read(flight.works, flight.launched)
        except Exception as error:
            self._flight = None
            return self._fail(works, error)
        outputs = self._take(works, [(s, token) for s, token in sampled if s.finish_reason is None])
        if self._flight is not None and not self._flight.alive:
            self._flight = None
        return outputs

    def _ahead(self, works: list[Work]) -> Flight | None:
        """The step after these works, launched; None if it has to wait for what they give, or cannot be launched."""
        scheduler, sequences = self.scheduler, [work.sequence for work in works]
        if self._constrained or scheduler.can_admit or len(scheduler.running) != len(works):
            return None
        if not self.runner.are_plain(sequences) or not self.runner.serves(works):
            return None
        following = scheduler.ahead(works)
        if following is None:
            return None
        try:
            launched = self.runner.launch(following)
        except Exception as error:
            logger.debug("a step could not be launched ahead", exc_info=not isinstance(error, EngramError))
            return None
        self.launched_ahead += 1
        return Flight(following, launched)
