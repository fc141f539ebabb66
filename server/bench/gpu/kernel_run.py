"""`gpu-kernels`: every kernel beside float64, then beside the ceiling measured in the same run.

ceilings      copy, copy engine, stream, rows: `ceilings.py`
correctness   each case on fresh random input, outputs poisoned; a deviation above its tolerance fails the command
speed         µs, bytes moved per second, share of the ceiling, at 8,192 tokens or 256 sequences
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from server.bench.gpu.ceilings import (
    copy_bandwidth,
    engine_bandwidth,
    random_ids,
    row_bandwidth,
    stream_bandwidth,
)
from server.bench.gpu.dense_cases import DENSE
from server.bench.gpu.journal import Figures
from server.bench.gpu.kernel_case import Case, Sizes, judged
from server.bench.gpu.models import DIM, HEADS, ORDERS, ROW_TYPE, config_of, dtype_of
from server.bench.gpu.row_cases import row_cases
from server.bench.gpu.session import Session
from server.bench.gpu.tables import MadeUp, make, of_type, room_for_tables, said
from server.bench.gpu.timing import median_seconds
from server.cache.pinned_table import PinnedTable
from server.errors import StepFailed

TOKENS, SEQUENCES, CONTEXT = 8192, 256, 1024
MISSES_BAR, HITS_BAR = 0.90, 0.50  # of a bare read of the same rows; of the device's copy bandwidth
SETUP_SECONDS, CASE_SECONDS = 60.0, 15.0


@dataclass(slots=True)
class Room:
    """What cases run in; made when the first of them is to be measured."""

    session: Session
    gib: float
    _table: PinnedTable | None = None
    ceilings: Figures | None = None

    def table(self) -> PinnedTable:
        """One table of the memory's row type, as large as one layer's of the paper."""
        if self._table is None:
            nbytes, words = (1 << 22, "a tiny table") if self.session.tiny else room_for_tables(self.gib / 2)
            shape = MadeUp("kernels", 1, DIM, of_type(ROW_TYPE))
            made = make(MadeUp("kernels", nbytes // shape.row_bytes, DIM, shape.row_type), self.session.device)
            self.session.say(f"{words}: {said({0: made})}")
            self._table = made.table
        return self._table

    def measured_ceilings(self) -> Figures:
        """In every run anew: figures are set beside those of their own run."""
        if self.ceilings is None:
            device, raw = self.session.device, self.table().raw
            count = (1 << 10) if self.session.tiny else TOKENS * len(ORDERS) * HEADS
            host_ids = random_ids(len(raw), count, device, seed=secrets.randbits(30))
            near = raw[: min(len(raw), (1 << 30) // raw.shape[1])].to(device, copy=True)
            self.ceilings = {
                "copy": copy_bandwidth(device),
                "engine": engine_bandwidth(raw, device),
                "stream": stream_bandwidth(raw, device),
                "rows": row_bandwidth(raw, host_ids, device),
                "device rows": row_bandwidth(near, random_ids(len(near), count, device), device),
                "table_bytes": raw.nbytes,
            }
        return self.ceilings


def sizes(session: Session, seed: int) -> Sizes:
    config = config_of(session.shape)
    generator = torch.Generator(device=session.device).manual_seed(seed)
    counts = (64, 6, 70) if session.tiny else (TOKENS, SEQUENCES, CONTEXT)
    cache = 1 << (20 if session.tiny else 30)
    return Sizes(config, dtype_of(config, session.device), *counts, session.device, generator, cache)


def cases(room: Room) -> dict[str, Callable[[Sizes], Case]]:
    return DENSE | row_cases(lambda: room.table().raw, of_type(ROW_TYPE), DIM)


def measured(build: Callable[[Sizes], Case], room: Room, seed: int) -> Figures:
    """Deviation first: a wrong kernel's speed is of no interest."""
    case = build(sizes(room.session, seed))
    deviation = judged(case)
    if deviation > case.limit:
        return {"deviation": deviation, "limit": case.limit, "tolerance": case.tolerance}
    seconds = median_seconds(case.work, room.session.device)
    ceilings = room.measured_ceilings()
    return {
        "deviation": deviation,
        "limit": case.limit,
        "tolerance": case.tolerance,
        "us": seconds * 1e6,
        "gb_per_s": case.moved / seconds / 1e9,
        "bytes": case.moved,
        "ceiling": case.ceiling,
        "ceiling_gb_per_s": ceilings[case.ceiling] / 1e9,
        "share": case.ideal_bytes / ceilings[case.ceiling] / seconds,
    }


def run(session: Session, gib: float, only: str = "") -> dict[str, Any]:
    """Measures, prints, and raises StepFailed if a kernel is wrong. `only` those with this word in their names."""
    room, seed = Room(session, gib), secrets.randbits(30)
    found: dict[str, Any] = {}
    base = {"shape": session.shape, "gib": 0 if session.tiny else gib}
    chosen = {name: build for name, build in cases(room).items() if only in name}
    for name, build in chosen.items():
        figures = session.measure({**base, "case": name}, partial(measured, build, room, seed), CASE_SECONDS)
        if figures is not None:
            found[name] = figures
    if room.ceilings is not None:
        session.file({**base, "ceilings": seed}, room.ceilings)
        session.table(
            "ceilings",
            ("what", "GB/s"),
            [(n, f"{v / 1e9:.1f}") for n, v in room.ceilings.items() if n != "table_bytes"],
        )
    session.table(
        f"kernels, {session.shape}, seed {seed}",
        ("kernel", "deviation", "limit", "µs", "GB/s", "ceiling", "share"),
        [line(name, figures) for name, figures in found.items()],
    )
    misses, hits = found.get("lookup, misses", {}).get("share"), found.get("lookup, hits", {}).get("share")
    session.bars(
        [
            ("lookup, misses: of a bare row read, at least 0.90", misses, MISSES_BAR, True),
            ("lookup, hits: of device bandwidth, at least 0.50", hits, HITS_BAR, True),
        ]
    )
    wrong = [name for name, figures in found.items() if figures["deviation"] > figures["limit"]]
    if wrong:
        raise StepFailed(f"wrong beside float64: {', '.join(wrong)}")
    return found


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def line(name: str, figures: Figures) -> tuple[str, ...]:
    judged_words = f"{figures['deviation']:.3g}", f"{figures['limit']:g}"
    if "us" not in figures:
        return (name, *judged_words, "–", "–", "–", "WRONG")
    ceiling = f"{figures['ceiling']} {figures['ceiling_gb_per_s']:.0f}"
    return (name, *judged_words, f"{figures['us']:.1f}", f"{figures['gb_per_s']:.1f}", ceiling, share(figures["share"]))
