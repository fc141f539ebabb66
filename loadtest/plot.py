"""The picture of an overhead run: one panel per width, a dot per round, median and bound as lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from loadtest.figures import Turn, overheads, seconds_of


def plot(taken: Sequence[Turn], bound: float, path: Path) -> None:
    """`bound` as a fraction. Draws offload over resident, or what pair there is; nothing if there is none."""
    measured = overheads(taken)
    if not measured:
        return
    pair, widths = next(iter(measured.items()))
    arm, _, base = pair.partition(" over ")
    figure, panels = plt.subplots(1, len(widths), figsize=(5.5 * len(widths), 4), squeeze=False, layout="constrained")
    for panel, (width, each) in zip(panels[0], widths.items(), strict=True):
        times = zip(seconds_of(taken, arm, width), seconds_of(taken, base, width), strict=True)
        percent = [100 * (mine / theirs - 1) for mine, theirs in times]
        low, high = (100 * (limit - 1) for limit in each.ci95)
        panel.plot(range(1, len(percent) + 1), percent, ".", color="tab:gray", label="one round")
        panel.axhspan(low, high, color="tab:blue", alpha=0.25, label="95 % of the median")
        panel.axhline(100 * (each.median - 1), color="tab:blue", label=f"median {100 * (each.median - 1):+.1f} %")
        panel.axhline(100 * bound, color="tab:red", linestyle="--", label=f"bound {100 * bound:g} %")
        panel.set(title=f"{pair}, {width} at once", xlabel="round", ylabel="more time (%)")
        panel.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
