"""What the memories cost the requests that want to know: rows read for them, and how long they waited for rows.

A layer's wait holds up the whole step, so all of it counts for every sequence in the step. Rows are the sequence's own;
of those that the step did not read from a table, because a cache held them or another token read them too, each has
its share. Steps without such a request are not looked at; what a GPU did is known once it is done, so that others are
waited for.
"""

from __future__ import annotations

from collections.abc import Callable

from server.memory.memories import Memories
from server.runtime.messages import Cost
from server.runtime.scheduler import Work


class Costs:
    """`wait`: until the device has computed all it was given."""

    def __init__(self, memories: Memories | None, wait: Callable[[], None]) -> None:
        self._memories, self._wait = memories, wait
        self._before = (0, 0.0)

    def begin(self, works: list[Work]) -> bool:
        """Whether this step is to be counted."""
        if self._memories is None or not any(work.sequence.params.timings for work in works):
            return False
        self._before = self._totals()
        return True

    def end(self, works: list[Work]) -> None:
        """Adds the step to the costs of its sequences."""
        assert self._memories is not None
        read, stall_s = self._totals()
        read, stall_s = read - self._before[0], stall_s - self._before[1]
        rows = [work.tokens * self._memories.rows_per_token(work.sequence.view) for work in works]
        kept = 1 - read / sum(rows) if sum(rows) else 0.0
        for work, own in zip(works, rows, strict=True):
            if work.sequence.params.timings and own:
                cost = work.sequence.cost
                work.sequence.cost = Cost(cost.stall_s + stall_s, cost.rows + own, cost.hits + kept * own)

    def _totals(self) -> tuple[int, float]:
        assert self._memories is not None
        self._wait()
        counters = self._memories.fetched()
        return sum(c.rows - c.device_hits for c in counters), sum(c.stall_s for c in counters)
