"""Costs of a request whose steps a device computes: counted when they are over, which the host does not see at once."""

from __future__ import annotations

from typing import Any

from server.cache.counters import LayerCounters
from server.runtime.costs import Costs
from server.runtime.messages import SamplingParams
from server.runtime.scheduler import Work
from server.runtime.sequence import Sequence
from server.view import BARE

ROWS = 8  # a token


class Late:
    """Memories of a device that is a step behind."""

    def __init__(self) -> None:
        self.issued, self.known = LayerCounters("t", 0), LayerCounters("t", 0)

    def step(self, tokens: int, stall_s: float) -> None:
        self.issued = LayerCounters("t", 0, self.issued.rows + ROWS * tokens, stall_s=self.issued.stall_s + stall_s)

    def wait(self) -> None:
        self.known = self.issued

    def fetched(self) -> tuple[LayerCounters, ...]:
        return (self.known,)

    def rows_per_token(self, view: Any) -> int:
        return ROWS


def test_a_step_is_charged_its_own_rows_and_stalls_though_they_are_known_late() -> None:
    memories = Late()
    costs = Costs(memories, memories.wait)  # type: ignore[arg-type]
    timed = SamplingParams(max_tokens=1, timings=True)
    sequence = Sequence.create("x", 0, tuple(range(12)), timed, BARE, seed=0, eos_ids=(), max_model_len=64)
    memories.step(50, 0.5)  # of others, which the device still computes
    for start in (0, 6):
        works = [Work(sequence, start, 6)]
        assert costs.begin(works)
        memories.step(6, 0.25)
        costs.end(works)
    assert sequence.cost == (0.5, 12 * ROWS, 0.0)
