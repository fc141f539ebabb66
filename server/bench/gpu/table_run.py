"""`gpu-table`: what a memory of a hundred billion parameters in host RAM costs a step, arm beside arm in turns.

    512 sequences, lengths uniform(100, 1024), random weights of Qwen3's shapes       arXiv 2601.07372, table 4
    over none:       direct, direct with a cache of 1, 4 and 8 GiB, staged, Engram and STEM together
    over resident:   direct with a table that fits on the device too, with a cache and without

Pairs are measured one after another, each in its own turns; an arm that is not there takes no memory. ARMS names them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from server.bench.gpu.arms import Memory, bare_arm, direct_arm, on_device, released, staged_arm
from server.bench.gpu.journal import Figures
from server.bench.gpu.models import Engrams, backbone, config_of, dtype_of, engrams, stem_layers, stems, without_up
from server.bench.gpu.scene import Scene, drawn_lengths
from server.bench.gpu.session import Session
from server.bench.gpu.tables import room_for_tables, said
from server.bench.gpu.turns import Turns, compared, take_turns
from server.errors import SettingsError
from server.memory.stem import StemPack
from server.models.config import ModelConfig
from server.models.decoder import Decoder

SEQUENCES, WAVE, LANGUAGES = 512, 8, 64
CACHES = {"direct-1g": 1, "direct-4g": 4, "direct-8g": 8}  # GiB
OVER_NONE = ("direct", *CACHES, "staged", "stem")
OVER_RESIDENT = ("offload", "offload-1g")
ARMS = OVER_NONE + OVER_RESIDENT
SMALL_GIB = 6.0  # of the table that is held on the device too
BARS = {"none": 0.97, "resident": 0.99}  # of the throughput of what an arm is set beside
PAIR_SECONDS, SETUP_SECONDS, TABLE_SECONDS = 30.0, 30.0, 120.0
FILL_SECONDS = 15.0  # a GiB of cache that reads half the text first


def chosen(arms: str) -> tuple[str, ...]:
    """The arms named, with commas between. Raises SettingsError for one that is not known."""
    names = tuple(name.strip() for name in arms.split(",") if name.strip())
    for name in names:
        if name not in ARMS:
            raise SettingsError(f"ARMS names {name!r}; there are {', '.join(ARMS)}")
    return names or ARMS


@dataclass(slots=True)
class Bench:
    """What all pairs share, made when the first that needs it is measured."""

    session: Session
    gib: float
    sequences: int
    pair_seconds: float
    made: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    @property
    def config(self) -> ModelConfig:
        return config_of(self.session.shape)

    @property
    def scene(self) -> Scene:
        def make() -> Scene:
            lengths = drawn_lengths(self.sequences, 80 if self.session.tiny else 1024)
            width = self.config.hidden_size * dtype_of(self.config, self.session.device).itemsize
            conv = 2 * width  # of two layers
            assert self.backbone is not None  # weights first: what is left is for the cache
            return Scene.of(self.config, lengths, self.wave, self.session.device, languages=self.languages, conv=conv)

        found: Scene = self.once("scene", make)
        return found

    @property
    def wave(self) -> int:
        return 4 if self.session.tiny else WAVE

    @property
    def languages(self) -> int:
        return 2 if self.session.tiny else LANGUAGES

    @property
    def backbone(self) -> Decoder:
        longest = (80 if self.session.tiny else 1024) + self.wave + 1
        found: Decoder = self.once("backbone", lambda: backbone(self.config, longest, self.session.device))
        return found

    def engrams(self, small: bool = False) -> Engrams:
        """The large memory, or one that fits on the device."""

        def make() -> Engrams:
            wanted = min(SMALL_GIB, self.gib) if small else self.gib
            nbytes, words = (1 << 22, "tiny tables") if self.session.tiny else room_for_tables(wanted)
            found = engrams(self.config, nbytes, self.session.device, name="small" if small else "engram")
            self.session.say(f"{words}: {said(found.made)}")
            return found

        found: Engrams = self.once("small" if small else "engrams", make)
        return found

    def stem(self) -> tuple[StemPack, Decoder]:
        def make() -> tuple[StemPack, Decoder]:
            pack, made = stems(self.config, self.session.device)
            self.session.say(f"STEM: {said(made)}")
            return pack, without_up(self.backbone, stem_layers(self.config))

        found: tuple[StemPack, Decoder] = self.once("stem", make)
        return found

    def bare(self) -> Turns:
        found: Turns = self.once("bare", lambda: bare_arm(self.scene, self.backbone))
        return found


def run(session: Session, arms: Sequence[str], gib: float, sequences: int, pair_seconds: float) -> dict[str, Any]:
    """Measures the pairs that are missing, prints all of them."""
    bench = Bench(session, gib, sequences, pair_seconds)
    base = {"shape": session.shape, "gib": 0.0 if session.tiny else gib, "sequences": sequences, "wave": bench.wave}
    base["languages"] = bench.languages
    found: dict[str, Any] = {}
    for name in arms:
        needs = pair_seconds * 1.5 + SETUP_SECONDS + (0 if bench.made else TABLE_SECONDS)
        needs += FILL_SECONDS * CACHES.get(name, 0)
        figures = session.measure({**base, "arm": name}, partial(pair, bench, name), 0 if session.tiny else needs)
        if figures is not None:
            found[name] = figures
    show(session, found)
    return found


def pair(bench: Bench, name: str) -> Figures:
    """One arm beside what it is set beside, in turns."""
    beside, caches = ("resident", {"offload-1g": 1}) if name in OVER_RESIDENT else ("none", CACHES)
    arms, memories = (resident if name in OVER_RESIDENT else over_none)(
        bench, name, cache_bytes(bench, caches.get(name))
    )
    try:
        take_turns(arms, bench.wave, bench.pair_seconds, bench.session.device)
        tables = bench.engrams(small=name in OVER_RESIDENT).made.values()
        gib = sum(made.table.nbytes for made in tables) / (1 << 30)
        return {**compared(arms, "arm", beside, bench.sequences, bench.wave), "table_gib": gib}
    finally:
        for memory in memories:
            memory.close()
        arms.clear()
        released(bench.session.device)


def cache_bytes(bench: Bench, gib: int | None) -> int:
    if gib is None:
        return 0
    return (gib << 20) if bench.session.tiny else gib << 30


Arms = dict[str, Turns]


def over_none(bench: Bench, name: str, cache: int) -> tuple[Arms, list[Memory]]:
    packs: list[Any] = [bench.engrams().pack()]
    model = bench.backbone
    if name == "stem":
        stem, model = bench.stem()
        packs.append(stem)
    memory = Memory.of(packs, bench.scene, cache)
    arm = (staged_arm if name == "staged" else direct_arm)(bench.scene, model, memory)
    return {"none": bench.bare(), "arm": arm}, [memory]


def resident(bench: Bench, name: str, cache: int) -> tuple[Arms, list[Memory]]:
    """The same rows twice."""
    small = bench.engrams(small=True)
    offloaded = small.pack()
    held = small.pack(bench.once("held", lambda: on_device(offloaded, bench.session.device)), name="resident")
    memories = [Memory.of([offloaded], bench.scene, cache)]
    held.conv_slots = offloaded.conv_slots
    memories.append(Memory.of([held], bench.scene))
    arms = [direct_arm(bench.scene, bench.backbone, memory) for memory in memories]
    return {"arm": arms[0], "resident": arms[1]}, memories


def ratio_of(figures: Figures) -> tuple[str, Figures]:
    """("none" or "resident", the ratio's median and interval)."""
    beside = next(name for name in BARS if f"arm_over_{name}" in figures)
    return beside, figures[f"arm_over_{beside}"]


def show(session: Session, found: dict[str, Any]) -> None:
    rows, bars = [], []
    for name, figures in found.items():
        beside, measured = ratio_of(figures)
        arm = figures["arms"]["arm"]
        rows.append(
            (
                f"{name} over {beside}",
                f"{measured['median']:.4f} [{measured['ci95'][0]:.4f}, {measured['ci95'][1]:.4f}]",
                f"{figures['arms'][beside]['step_us']:.0f}",
                f"{arm['step_us']:.0f}",
                f"{arm['tokens_per_s']:.0f}",
                f"{arm.get('hit_rate', 0):.3f}",
                f"{arm.get('link_gb_per_s', 0):.2f}",
                f"{figures['added_us']:.0f}",
                f"{arm['stall_us']:.0f}" if name == "staged" else "–",
            )
        )
        bars.append((f"{name} over {beside}, at least {BARS[beside]:.2f}", measured["median"], BARS[beside], True))
    columns = ("arm", "throughput [95 %]", "µs beside", "µs", "tokens/s", "hits", "link GB/s", "added µs", "stall µs")
    session.table(f"memory in host RAM, {session.shape}", columns, rows)
    session.bars(bars)
