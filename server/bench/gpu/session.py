"""One command at work: its device, its time, its journal, and what it says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from server.bench.gpu.device import open_device, report
from server.bench.gpu.journal import Budget, Figures, Journal
from server.errors import CapacityError, SettingsError

TINY = "tiny"


@dataclass(frozen=True, slots=True)
class Session:
    """`verb`: what the journal files its figures under."""

    verb: str
    device: torch.device
    shape: str
    budget: Budget
    journal: Journal
    console: Console

    @classmethod
    def open(cls, verb: str, device: str, shape: str, seconds: float, out: Path) -> Session:
        """Raises SettingsError for a device that is not there or will not do."""
        budget, found = Budget(seconds), open_device(device)
        if found.type == "cpu" and shape != TINY:
            raise SettingsError(f"SHAPE is {shape} on the CPU, where it would take hours; use --shape tiny")
        torch.set_grad_enabled(False)
        if found.type == "cpu":
            torch.set_num_threads(1)
        return cls(verb, found, shape, budget, Journal(out, report(found)), Console(width=140, soft_wrap=True))

    @property
    def tiny(self) -> bool:
        """Whether sizes are those of a trial."""
        return self.shape == TINY

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)

    def measure(self, config: Mapping[str, Any], work: Callable[[], Figures], needs: float) -> Figures | None:
        """The figures of a configuration: those in the journal, or `work`'s, filed there. None if the time left is less
        than the `needs` seconds; then the command says so, and another run goes on from here. What is filed as not ok
        is done again."""
        known = self.journal.find(self.verb, config)
        if known is not None and known.get("ok", True):
            return known
        if not self.budget.allows(needs):
            left = max(self.budget.left, 0)
            self.say(f"left for the next run: {described(config)} ({needs:.0f} s needed, {left:.0f} left)")
            return None
        begun = time.monotonic()
        with clear_capacity(config):
            figures = work()
        self.journal.add(self.verb, config, figures, time.monotonic() - begun)
        self.say(f"measured in {time.monotonic() - begun:.1f} s: {described(config)}")
        return figures

    def file(self, config: Mapping[str, Any], figures: Figures) -> None:
        """What was found beside the measurements, such as this run's ceilings."""
        self.journal.add(self.verb, config, figures, 0.0)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        made = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            made.add_column(column, justify="left" if index == 0 else "right", no_wrap=index > 0)
        for row in rows:
            made.add_row(*row)
        self.console.print(made)

    def bars(self, rows: Sequence[tuple[str, float | None, float, bool]]) -> None:
        """(what is to hold, the figure, the bar, whether at least so much is wanted). No bar counts on a CPU."""
        lines = []
        for words, value, bar, least in rows:
            counted = value if self.device.type == "cuda" else None
            shown = "–" if counted is None else f"{counted:.3f}"
            lines.append((words, shown, met(counted, bar, least=least)))
        self.table("bars", ("bar", "measured", ""), lines)


def described(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in config.items())


@contextmanager
def clear_capacity(config: Mapping[str, Any]) -> Iterator[None]:
    """Device memory that ran out becomes one line: what to lower, and to what."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info()
        sequences = config.get("sequences")
        cure = (
            f"set SEQUENCES={sequences // 2}" if isinstance(sequences, int) and sequences > 1 else "take SHAPE=qwen3-4b"
        )
        raise CapacityError(
            f"device memory ran out at {described(config)}: {free / (1 << 30):.1f} of {total / (1 << 30):.1f} GiB were "
            f"free; {cure}"
        ) from error


def met(value: float | None, bar: float, *, least: bool) -> str:
    """met or missed, for a figure that must be at least or at most so large."""
    if value is None:
        return "not measured"
    return "met" if (value >= bar if least else value <= bar) else "missed"
