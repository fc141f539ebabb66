"""Two arms in turns, wave by wave, and what the turns say: ratio with interval, step times, what the memory did.

    wave 0    a: W steps, sync │ b: W steps, sync        (in random order)
    wave 1    b …              │ a …

A step is launched before the last one's tokens are read, as the engine does. Ratios are of throughput, a over b.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from server.bench.gpu.timing import event, synchronize
from server.bench.paired import ratio
from server.cache.counters import LayerCounters
from server.runtime.launched import Launched

WARM_WAVES = 2
LEAST_WAVES = 12

Counts = Callable[[], Sequence[LayerCounters]]


class Arm(Protocol):
    @property
    def graphs(self) -> int: ...
    @property
    def parts(self) -> int: ...
    def enter(self, wave: int) -> None: ...
    def launch(self, step: int, count: int = 0) -> Launched: ...


@dataclass(slots=True)
class Turns:
    """What one arm did: seconds of every wave by the wall, on the device, and of the host at launching."""

    arm: Arm
    counts: Counts = tuple
    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    before: Sequence[LayerCounters] = ()

    def wave(self, number: int, steps: int, device: torch.device, count: int = 0) -> None:
        self.arm.enter(number)
        synchronize(device)
        pair = (event(), event()) if device.type == "cuda" else None
        begun, host = time.perf_counter(), 0.0
        if pair is not None:
            pair[0].record()
        last: Launched | None = None
        for step in range(steps):
            before = time.perf_counter()
            launched = self.arm.launch(step, count)
            host += time.perf_counter() - before
            if last is not None:
                last.tokens()
            last = launched
        if pair is not None:
            pair[1].record()
        synchronize(device)
        self.wall.append(time.perf_counter() - begun)
        self.host.append(host)
        self.device.append(pair[0].elapsed_time(pair[1]) / 1e3 if pair is not None else self.wall[-1])

    def forget(self) -> None:
        """After warming up."""
        self.wall.clear()
        self.device.clear()
        self.host.clear()
        self.before = self.counts()

    def figures(self, sequences: int, steps: int) -> dict[str, Any]:
        step_s = float(np.median(self.wall)) / steps
        found = {
            "step_us": step_s * 1e6,
            "device_step_us": float(np.median(self.device)) / steps * 1e6,
            "host_step_us": float(np.median(self.host)) / steps * 1e6,
            "tokens_per_s": sequences / step_s,
            "waves": len(self.wall),
            "graphs": self.arm.graphs,
            "parts": self.arm.parts,
        }
        return found | memory_figures(self.before, self.counts(), sum(self.wall), len(self.wall) * steps)


def memory_figures(
    before: Sequence[LayerCounters], after: Sequence[LayerCounters], seconds: float, steps: int
) -> dict[str, float]:
    """Hit rate, bytes read of tables, bytes over the host link, seconds that the host's fetches stalled, between two
    moments; empty without tables. What a step on the device waits for rows is within the time that an arm adds."""
    if not after:
        return {}
    known = {(c.table, c.layer): c for c in before}
    zero = LayerCounters("", 0)

    def grown(name: str) -> float:
        return float(sum(getattr(c, name) - getattr(known.get((c.table, c.layer), zero), name) for c in after))

    rows = grown("rows")
    return {
        "hit_rate": grown("device_hits") / rows if rows else 0.0,
        "table_bytes_per_step": grown("bytes") / steps,
        "link_bytes_per_step": grown("device_bytes") / steps,
        "link_gb_per_s": grown("device_bytes") / seconds / 1e9,
        "stall_us": grown("stall_s") / steps * 1e6,
        "rows_per_step": rows / steps,
    }


def take_turns(
    arms: Mapping[str, Turns], steps: int, seconds: float, device: torch.device, count: int = 0, warm: int = WARM_WAVES
) -> None:
    """Waves of all arms for about so many seconds, at least LEAST_WAVES, `warm` more before to warm up."""
    order, draw = list(arms), random.Random(count)
    for number in range(warm):
        for turns in arms.values():
            turns.wave(number, steps, device, count)
    for turns in arms.values():
        turns.forget()
    ends, number = time.perf_counter() + seconds, warm
    while number < warm + LEAST_WAVES or time.perf_counter() < ends:
        draw.shuffle(order)
        for name in order:
            arms[name].wave(number, steps, device, count)
        number += 1


def compared(arms: Mapping[str, Turns], a: str, b: str, sequences: int, steps: int) -> dict[str, Any]:
    """Throughput of a over b, and each arm's own figures."""
    return {
        "sequences": sequences,
        f"{a}_over_{b}": ratio(arms[b].wall, arms[a].wall).as_json(),
        "added_us": float(np.median(np.array(arms[a].wall) - np.array(arms[b].wall))) / steps * 1e6,
        "arms": {name: turns.figures(sequences, steps) for name, turns in arms.items()},
    }
