"""`gpu-baseline`: the dense model alone, beside what memory allows and beside transformers' continuous batching.

    roofline        (weights + keys and values that a step reads) / copy bandwidth, over the step's time on the device
    transformers    `generate_batch` on the same weights and prompts, in another process

The peer has a process of its own, so that neither holds the other's memory; its configuration is what it chooses.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from typing import Any

from server.bench.gpu.arms import bare_arm, released
from server.bench.gpu.ceilings import copy_bandwidth
from server.bench.gpu.journal import Figures
from server.bench.gpu.models import weight_bytes
from server.bench.gpu.session import Session
from server.bench.gpu.streams import Streams, engine_of, prompts_of
from server.bench.gpu.sweep_run import ROOM
from server.bench.gpu.table_run import SETUP_SECONDS, Bench
from server.bench.gpu.turns import take_turns
from server.errors import StepFailed

BATCHES = {1: 0.70, 32: 0.70, 256: 0.60}  # sequences: the least share of the roofline
PEER_BAR = 1.5
NEW_TOKENS, STEPS = 64, 8
PEER_SECONDS = 200.0
PEER_LIMIT = 400.0  # seconds after which the peer is ended


class Baseline(Bench):
    """The dense model, with room for answers."""

    @property
    def wave(self) -> int:
        return 8 if self.session.tiny else ROOM


def run(session: Session, sequences: int, pair_seconds: float) -> dict[str, Any]:
    """Raises StepFailed, after all else is printed, if transformers cannot answer."""
    bench = Baseline(session, 0.0, sequences, pair_seconds)
    base = {"shape": session.shape}
    found: dict[str, Any] = {}

    def measured(name: str, config: dict[str, Any], work: Any, needs: float) -> None:
        figures = session.measure({**base, **config}, work, 0 if session.tiny else needs)
        if figures is not None:
            found[name] = figures

    batches = [count for count in BATCHES if count <= sequences]
    for count in batches:
        setup = 0 if bench.made else SETUP_SECONDS
        measured(f"decode {count}", {"decode": count}, partial(decode, bench, count, batches), pair_seconds + setup)
    asked = {"requests": sequences, "new_tokens": new_tokens(bench)}
    measured("ours", {"engine": "ours", **asked}, partial(ours, bench), SETUP_SECONDS + 60)
    bench.made.clear()
    released(session.device)
    failed: StepFailed | None = None
    try:
        measured("transformers", {"engine": "transformers", **asked}, partial(peer, bench), PEER_SECONDS)
    except StepFailed as error:
        failed = error
    show(session, found)
    if failed is not None:
        raise failed
    return found


def new_tokens(bench: Bench) -> int:
    return min(NEW_TOKENS, bench.wave)


def decode(bench: Bench, count: int, batches: list[int]) -> Figures:
    """Decode steps of `count` sequences, as a share of what reading their bytes takes."""
    arm = bench.once("arm", lambda: bare_arm(bench.scene, bench.backbone, batches))
    steps = min(STEPS, bench.wave)
    take_turns({"none": arm}, steps, bench.pair_seconds, bench.session.device, count)
    bandwidth = bench.once("copy", lambda: copy_bandwidth(bench.session.device))
    weights, kv = weight_bytes(bench.backbone), bench.scene.kv_bytes(steps // 2, count)
    if not bench.config.tie_word_embeddings:
        weights -= bench.backbone.embed.nbytes  # of the embedding a step reads a row a sequence
    figures = arm.figures(count, steps)
    least = (weights + kv) / bandwidth * 1e6
    return {
        **figures,
        "sequences": count,
        "weight_bytes": weights,
        "kv_bytes": kv,
        "copy_gb_per_s": bandwidth / 1e9,
        "roofline_us": least,
        "share": least / figures["device_step_us"],
    }


def ours(bench: Bench) -> Figures:
    """All requests at once through the engine, to their end."""
    bench.made.pop("arm", None)
    released(bench.session.device)
    engine = engine_of(bench.scene, bench.backbone, None)
    warm = Streams(engine, prompts_of(bench.scene)[:2], 2)
    warm.run(2, 0, requests=2)
    made = Streams(engine, prompts_of(bench.scene), new_tokens(bench))
    made.run(bench.sequences, 0, requests=bench.sequences)
    return {**made.figures(), "seconds": made.wall, "tokens": made.tokens}


def peer(bench: Bench) -> Figures:
    """The same by transformers. Raises StepFailed with its last words if it fails."""
    session = bench.session
    job = {
        "shape": session.shape,
        "device": session.device.type,
        "sequences": bench.sequences,
        "new_tokens": new_tokens(bench),
        "longest": 80 if session.tiny else 1024,
    }
    command = [sys.executable, "-m", "server.bench.gpu.transformers_peer", json.dumps(job)]
    limit = max(PEER_LIMIT if session.tiny else min(PEER_LIMIT, session.budget.left), 1.0)
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise StepFailed(f"transformers' generate_batch was not through after {limit:.0f} s; SEQUENCES=64") from None
    if ran.returncode:
        words = (ran.stderr.strip().splitlines() or ["no words"])[-1][:400]
        raise StepFailed(f"transformers' generate_batch failed: {words}")
    figures: Figures = json.loads(ran.stdout.strip().splitlines()[-1])
    return figures


def show(session: Session, found: dict[str, Any]) -> None:
    rows, bars = [], []
    for count, bar in BATCHES.items():
        figures = found.get(f"decode {count}")
        if figures is None:
            continue
        gigabytes = (figures["weight_bytes"] + figures["kv_bytes"]) / 1e9
        rows.append(
            (
                f"decode, {count} sequences",
                f"{figures['device_step_us']:.0f}",
                f"{gigabytes:.2f}",
                f"{figures['copy_gb_per_s']:.0f}",
                f"{figures['share']:.1%}",
            )
        )
        bars.append((f"decode at {count}: of the roofline, at least {bar:.2f}", figures["share"], bar, True))
    session.table(f"roofline, {session.shape}", ("step", "µs", "GB read", "copy GB/s", "share"), rows)
    engines = [(name, found[name]) for name in ("ours", "transformers") if name in found]
    lines = [(how(name, f), f"{f['tokens']}", f"{f['seconds']:.1f}", f"{f['tokens_per_s']:.0f}") for name, f in engines]
    session.table("continuous batching, the same weights and prompts", ("engine", "tokens", "s", "tokens/s"), lines)
    if len(engines) == 2:
        ratio = found["ours"]["tokens_per_s"] / found["transformers"]["tokens_per_s"]
        bars.append((f"over transformers, at least {PEER_BAR}", ratio, PEER_BAR, True))
    session.bars(bars)


def how(name: str, figures: Figures) -> str:
    """The engine, and what attention it took where it had a choice."""
    return f"{name}, {figures['attention']}, {figures['at_once']} at once" if "at_once" in figures else name
