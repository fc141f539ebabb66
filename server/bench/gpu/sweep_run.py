"""`gpu-sweep`: 1 to 512 sequences, with a memory in host RAM behind a cache and without one.

    in turns     decode steps of both arms: throughput over none, µs, hit rate, link, launching beside the device
    streams      the engine with the memory: tokens per second, TTFT, time between tokens

Each figure stands beside what bounds it, measured in the same run: none's steps for throughput and the time between
tokens, a bare prefill for TTFT, a bare read of random rows for the link.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from server.bench.gpu.arms import Memory, bare_arm, direct_arm, released
from server.bench.gpu.ceilings import random_ids, row_bandwidth
from server.bench.gpu.journal import Figures
from server.bench.gpu.session import Session
from server.bench.gpu.streams import Streams, engine_of, prompts_of
from server.bench.gpu.table_run import SETUP_SECONDS, TABLE_SECONDS, Bench
from server.bench.gpu.turns import Turns, compared, take_turns
from server.cache.pinned_table import PinnedTable

CONCURRENCY = (1, 8, 32, 64, 256, 512)
CACHE_GIB, STEPS, NEW_TOKENS, ROOM = 1, 8, 64, 64
OVERHEAD_BAR, LAYERS_BAR, HOST_BAR = 0.97, 0.02, 0.40
LAYERS_AT, HOST_AT = 256, 32  # sequences where these bars are
LINK_ROWS = 1 << 18


class Sweep(Bench):
    """With room for answers in the cache of keys and values."""

    @property
    def wave(self) -> int:
        return 8 if self.session.tiny else ROOM

    def memory(self) -> Memory:
        pack = self.once("pack", lambda: self.engrams().pack())
        gib = CACHE_GIB << (20 if self.session.tiny else 30)
        found: Memory = self.once("memory", lambda: Memory.of([pack], self.scene, gib))
        return found

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(count for count in CONCURRENCY if count <= self.sequences)

    def arms(self) -> dict[str, Turns]:
        def make() -> dict[str, Turns]:
            return {
                "none": bare_arm(self.scene, self.backbone, self.counts),
                "arm": direct_arm(self.scene, self.backbone, self.memory(), self.counts),
            }

        found: dict[str, Turns] = self.once("arms", make)
        return found

    def link(self) -> float:
        """Bytes per second of random rows of the memory's own table, read bare."""

        def make() -> float:
            table = next(iter(self.engrams().made.values())).table
            assert isinstance(table, PinnedTable)
            count = 1 << 10 if self.session.tiny else LINK_ROWS
            ids = random_ids(table.rows, count, self.session.device)
            return row_bandwidth(table.raw, ids, self.session.device)

        found: float = self.once("link", make)
        return found


def run(session: Session, gib: float, sequences: int, pair_seconds: float) -> dict[str, Any]:
    sweep = Sweep(session, gib, sequences, pair_seconds)
    base = {"shape": session.shape, "gib": 0.0 if session.tiny else gib, "sequences": sequences}
    parts = [(kind, count) for kind in (turns, streams) for count in sweep.counts]
    found: dict[str, Any] = {}
    for measure, count in parts:
        setup = 0 if sweep.made else SETUP_SECONDS + TABLE_SECONDS
        config = {**base, "part": measure.__name__, "concurrency": count}
        needs = 0 if session.tiny else 2 * pair_seconds + setup
        figures = session.measure(config, partial(measure, sweep, count), needs)
        if figures is not None:
            found[f"{measure.__name__} {count}"] = figures
    show(session, sweep.counts, found)
    return found


def turns(sweep: Sweep, count: int) -> Figures:
    """Decode steps of `count` sequences."""
    arms = sweep.arms()
    steps = min(STEPS, sweep.wave)
    take_turns(arms, steps, sweep.pair_seconds, sweep.session.device, count)
    gib = sum(made.table.nbytes for made in sweep.engrams().made.values()) / (1 << 30)
    found = compared(arms, "arm", "none", count, steps)
    return {**found, "table_gib": gib, "link_ceiling_gb_per_s": sweep.link() / 1e9}


def streams(sweep: Sweep, count: int) -> Figures:
    """`count` streams through the engine."""
    sweep.made.pop("arms", None)  # graphs of another kind of step
    released(sweep.session.device)
    engine = sweep.once("engine", lambda: engine_of(sweep.scene, sweep.backbone, sweep.memory()))
    prompts = prompts_of(sweep.scene)
    made = Streams(engine, prompts, min(NEW_TOKENS, sweep.wave), ("engram",))
    made.run(count, sweep.pair_seconds)
    longest = max(prompts, key=len)
    return {**made.figures(), "prefill_ms": prefill_seconds(sweep, len(longest)) * 1e3}


def prefill_seconds(sweep: Sweep, tokens: int) -> float:
    """One prompt of so many tokens, alone, through the engine without a memory: the least that a first token takes."""
    engine = sweep.made["engine"]
    prompt = sweep.scene.text(1)[0][None, :tokens]
    times = []
    for _ in range(3):
        one = Streams(engine, list(prompt), 1)
        one.run(1, 0, requests=1)
        times.append(one.ttft[0])
    return sorted(times)[1]


def host_share(turned: Figures, streamed: Figures) -> float:
    """The host's own work in an engine's step over the step's time on the device."""
    return float(streamed["host_step_us"] / turned["arms"]["arm"]["device_step_us"])


def show(session: Session, counts: tuple[int, ...], found: dict[str, Any]) -> None:
    decode, streamed, bars = [], [], []
    for count in counts:
        figures, answers = found.get(f"turns {count}"), found.get(f"streams {count}")
        if figures is not None:
            none, arm, measured = figures["arms"]["none"], figures["arms"]["arm"], figures["arm_over_none"]
            host = arm["host_step_us"] / arm["device_step_us"]
            decode.append(
                (
                    str(count),
                    f"{measured['median']:.4f} [{measured['ci95'][0]:.4f}, {measured['ci95'][1]:.4f}]",
                    f"{arm['step_us']:.0f} / {none['step_us']:.0f}",
                    f"{figures['added_us']:.0f}",
                    f"{arm.get('hit_rate', 0):.3f}",
                    f"{arm.get('link_gb_per_s', 0):.2f} / {figures['link_ceiling_gb_per_s']:.1f}",
                    f"{host:.2f}",
                )
            )
            over = f"memory over none at {count}, at least {OVERHEAD_BAR}"
            bars.append((over, measured["median"], OVERHEAD_BAR, True))
            if count == LAYERS_AT:
                share = 1 - measured["median"]
                bars.append((f"memory layers at {count}, at most {LAYERS_BAR} of a step", share, LAYERS_BAR, False))
            if count == HOST_AT and answers is not None:
                share = host_share(figures, answers)
                bars.append((f"host over device time at {count}, at most {HOST_BAR}", share, HOST_BAR, False))
        if answers is not None:
            least = figures["arms"]["none"] if figures is not None else None
            streamed.append(
                (
                    str(count),
                    f"{answers['tokens_per_s']:.0f} / {least['tokens_per_s'] if least else 0:.0f}",
                    f"{answers['ttft_ms']['p50']:.1f}, {answers['ttft_ms']['p99']:.1f} / {answers['prefill_ms']:.1f}",
                    f"{answers['itl_ms']['p50']:.2f}, {answers['itl_ms']['p99']:.2f}",
                    f"{least['step_us'] / 1e3 if least else 0:.2f}",
                    f"{answers['host_step_us']:.0f}",
                )
            )
    steps = ("sequences", "over none [95 %]", "µs / none's", "added µs", "hits", "link GB/s / bare", "launch / device")
    session.table(f"decode steps with a memory, {session.shape}", steps, decode)
    columns = ("streams", "tok/s / none's steps", "TTFT ms / bare prefill", "ITL ms", "/ none's step", "host µs a step")
    session.table("the engine with a memory (p50, p99)", columns, streamed)
    session.bars(bars)
