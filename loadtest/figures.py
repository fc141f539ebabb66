"""From the records of `arms.py` to overheads with their intervals, percentiles, and a verdict.

Overhead of an arm over another: the time a turn took, first request sent to last token come, paired round by round;
median of the ratios less one, with the exact interval of the sign test: half of all rounds lie below the true median,
whatever the noise is like. A bootstrap of a median covers too little with few rounds (86 % of 95 with 12).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from server.bench.paired import Ratio

PAIRS = (("offload", "resident"), ("offload", "none"), ("resident", "none"))
UNDER, OVER, UNCLEAR = 0, 1, 2
FEWEST_ROUNDS = 12


@dataclass(frozen=True, slots=True)
class Turn:
    """One arm's answers to one round's prompts, `width` at once. Seconds; `gaps` and `ttfts` of all its answers."""

    round: int
    arm: str
    width: int
    seconds: float
    ttfts: tuple[float, ...]
    gaps: tuple[float, ...]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, record: dict[str, Any]) -> Turn:
        answers = record["answers"]
        first, last = min(a["sent"] for a in answers), max(a["arrivals"][-1] for a in answers)
        return cls(
            record["round"],
            record["arm"],
            record["width"],
            last - first,
            tuple(a["arrivals"][0] - a["sent"] for a in answers),
            tuple(after - before for a in answers for before, after in zip(a["arrivals"], a["arrivals"][1:])),  # noqa: B905
            tuple(a["text"] for a in answers),
        )


def turns(records: Path) -> list[Turn]:
    """The rounds that every arm finished at every width."""
    read = [Turn.of(json.loads(line)) for line in records.read_text(encoding="utf-8").splitlines()]
    full = len({(turn.arm, turn.width) for turn in read})
    counts: dict[int, int] = {}
    for turn in read:
        counts[turn.round] = counts.get(turn.round, 0) + 1
    return [turn for turn in read if counts[turn.round] == full]


def seconds_of(taken: Iterable[Turn], arm: str, width: int) -> list[float]:
    """In the order of rounds."""
    chosen = [turn for turn in taken if turn.arm == arm and turn.width == width]
    return [turn.seconds for turn in sorted(chosen, key=lambda turn: turn.round)]


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Median of numerators[i] / denominators[i] and its 95 % interval, whose ends are ratios of certain ranks."""
    ratios = sorted(a / b for a, b in zip(numerators, denominators, strict=True))
    count = len(ratios)
    below, rank = 0, 0  # how many of the 2^count ways of falling left or right have at most `rank` on the left
    while (below := below + math.comb(count, rank)) <= 0.025 * 2**count:
        rank += 1
    at = max(rank - 1, 0)
    return Ratio(statistics.median(ratios), (ratios[at], ratios[-1 - at]), count)


def overheads(taken: Sequence[Turn]) -> dict[str, dict[int, Ratio]]:
    """ "offload over resident" → width → ratio of times."""
    arms, widths = {turn.arm for turn in taken}, sorted({turn.width for turn in taken})
    return {
        f"{arm} over {base}": {w: paired(seconds_of(taken, arm, w), seconds_of(taken, base, w)) for w in widths}
        for arm, base in PAIRS
        if {arm, base} <= arms
    }


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """Milliseconds."""
    measured = np.asarray(list(values)) * 1e3
    return {f"p{p}": float(np.percentile(measured, p)) for p in (50, 95, 99)} | {"mean": float(measured.mean())}


def latencies(taken: Iterable[Turn]) -> dict[str, dict[int, dict[str, Any]]]:
    """Arm → width → TTFT and inter-token percentiles in ms, and tokens per second."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    taken = list(taken)
    for arm, width in sorted({(turn.arm, turn.width) for turn in taken}):
        own = [turn for turn in taken if (turn.arm, turn.width) == (arm, width)]
        tokens = sum(len(turn.gaps) + len(turn.ttfts) for turn in own)
        found.setdefault(arm, {})[width] = {
            "ttft_ms": percentiles(value for turn in own for value in turn.ttfts),
            "inter_token_ms": percentiles(value for turn in own for value in turn.gaps),
            "tokens_per_s": tokens / sum(turn.seconds for turn in own),
            "turns": len(own),
        }
    return found


def same_texts(taken: Iterable[Turn], arm: str, base: str) -> float | None:
    """Share of prompts that both arms answered with the same text; None if there are none."""
    texts = {(turn.arm, turn.round, turn.width): turn.texts for turn in taken}
    pairs = [
        (one, other)
        for (name, number, width), of_arm in texts.items()
        if name == arm and (base, number, width) in texts
        for one, other in zip(of_arm, texts[base, number, width], strict=True)
    ]
    return sum(one == other for one, other in pairs) / len(pairs) if pairs else None


def verdict(measured: dict[int, Ratio], bound: float) -> Literal[0, 1, 2]:
    """0: at every width the interval lies under the bound; 1: at one it lies above; 2: neither can be said."""
    if any(each.pairs >= FEWEST_ROUNDS and each.ci95[0] - 1 > bound for each in measured.values()):
        return OVER
    if measured and all(each.pairs >= FEWEST_ROUNDS and each.ci95[1] - 1 < bound for each in measured.values()):
        return UNDER
    return UNCLEAR


def step_level_claim(folders: Sequence[Path]) -> tuple[Path, dict[str, Any]] | None:
    """The newest result of `bench offload` in the folders, earlier folders first: its file and its ratios."""
    for folder in folders:
        for path in sorted(folder.glob("offload*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
            content = json.loads(path.read_text(encoding="utf-8"))
            ratios = content.get("ratios", {}).get("offload_over_resident", {}).get("throughput")
            if ratios:
                return path, ratios
    return None
