"""Paired measurements: the statistics every experiment shares, and the line that says where it ran.

On a shared machine only alternation resolves small differences. Two arms take turns within one process; each turn
gives one ratio; the median of the ratios is quoted with a bootstrap interval over blocks of neighbouring turns,
because drift makes neighbours alike. Where a per cent is to be resolved, the mean of the ratios' middle half besides:
as deaf to single slow steps as the median, and narrower on plain noise.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]

BLOCK = 8  # neighbouring turns resampled together
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median of paired ratios, its 95 % interval, and how many pairs."""

    median: float
    ci95: tuple[float, float]
    pairs: int

    def as_json(self) -> dict[str, Any]:
        return {"median": self.median, "ci95": list(self.ci95), "pairs": self.pairs}

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.ci95[0]:.3f}, {self.ci95[1]:.3f}]"


def ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Ratio:
    """Median of numerators[i] / denominators[i] with a block-bootstrap interval."""
    ratios = np.asarray(numerators) / np.asarray(denominators)
    low, high = np.percentile(np.median(resampled(ratios, seed), axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), (float(low), float(high)), len(ratios))


def middle_half(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """The geometric mean of the middle half of the paired ratios, {"mean", "ci95"}; the interval as `ratio`'s."""
    logs = np.log(np.asarray(numerators) / np.asarray(denominators))
    means = np.exp(_mean_of_middle(resampled(logs, seed)))
    mean = float(np.exp(_mean_of_middle(logs[None]))[0])
    return {"mean": mean, "ci95": np.percentile(means, [2.5, 97.5]).tolist()}


def resampled(values: Floats, seed: int) -> Floats:
    """[RESAMPLES, about as many] blocks of neighbouring values[N], drawn anew."""
    generator = np.random.default_rng(seed)
    block = min(BLOCK, len(values))
    starts = generator.integers(0, len(values) - block + 1, (RESAMPLES, -(-len(values) // block)))
    found: Floats = values[(starts[:, :, None] + np.arange(block)).reshape(RESAMPLES, -1)]
    return found


def _mean_of_middle(values: Floats) -> Floats:
    """Of each row of values[M, N], without its lowest and its highest quarter."""
    cut = values.shape[1] // 4
    found: Floats = np.sort(values, axis=1)[:, cut : values.shape[1] - cut].mean(axis=1)
    return found


def machine() -> dict[str, Any]:
    """Processor, cores, memory, versions, date: what a figure needs beside it."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    return {
        "processor": name,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Writes the result whole or not at all."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(path)
