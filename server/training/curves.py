"""The curves of a run as a picture: loss, both perplexities, what is said word for word. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.errors import SettingsError

INSTALL = "pictures need matplotlib: pip install 'engram-server[train]'"
History = Sequence[dict[str, float]]


def figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """(figure, axes) of a picture drawn without a screen. Raises SettingsError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise SettingsError(INSTALL) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, layout="constrained")


def draw(history: History, path: Path) -> None:
    """One PNG: perplexity of the data by step; general text relative to the bare backbone, and verbatim, by epoch."""
    drawn, (left, middle, right) = figure(1, 3, (10, 3))
    steps = [entry["step"] for entry in history]
    left.semilogy(steps, [math.exp(entry["loss"]) for entry in history])
    left.set(title="perplexity of the data", xlabel="step")
    measured = [entry for entry in history if "general_on" in entry]
    if measured:
        change = [100 * (entry["general_on"] / entry["general_off"] - 1) for entry in measured]
        middle.plot([entry["step"] for entry in measured], change, marker="o")
        middle.axhline(0, color="grey", linewidth=0.8)
    middle.set(title="general perplexity over the bare model's, %", xlabel="step")
    right.plot(steps, [100 * entry["verbatim"] for entry in history])
    right.set(title="examples right word for word, %", xlabel="step", ylim=(0, 100))
    drawn.savefig(path, dpi=110)
