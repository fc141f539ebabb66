"""A training run from the command line: progress, checkpoints, signals, and the pack at the end.

    OUT.training/    checkpoint and cached states; run again, the same command goes on from there
    OUT              appears at the end, whole: the taught pack, curves.png, what it was taught and measured with

SIGINT and SIGTERM let the running step finish, save and leave with the signal's exit code. A loss that is not finite
stops the run before anything of that step is applied or saved.
"""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from server.commands.folders import new_folder
from server.errors import PackError, SettingsError
from server.models.source import open_source
from server.models.weights import fingerprint
from server.runtime.host import cpu_quota
from server.runtime.load import choose_device, choose_dtype
from server.settings import Settings
from server.training import checkpoint
from server.training.curves import draw
from server.training.data import Example, pieces_of, read_examples, read_text
from server.training.frozen import Frozen
from server.training.loop import Part, Recipe, StepReport, Trainer, perplexity
from server.training.start import Opened, build_trainer, open_to_teach, stamp_of
from server.training.write import write_taught

LONGEST = 2048  # tokens of one example
RETAINED_PIECE, MEASURED_PIECE = 128, 256
MEASURED_TOKENS = 2048  # of general text that perplexity is measured on at the end of each epoch
SAVE_SECONDS = 120.0
FACTS, GENERAL, CURVES = "facts.jsonl", "general.txt", "curves.png"


@dataclass(frozen=True, slots=True)
class Job:
    """What to teach and where. `retain`: text to stay silent on; `general`: text to measure that on, never learnt."""

    model: str
    memory: Path
    data: Path
    out: Path
    retain: Path | None = None
    general: Path | None = None
    row_type: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 0
    recipe: Recipe = field(default_factory=Recipe)


@dataclass(slots=True)
class Signals:
    """The signal that asked to stop, if one did."""

    caught: int | None = None

    def catch(self, number: int, frame: FrameType | None) -> None:
        self.caught = number


def train(job: Job) -> Path:
    """Teaches and writes the pack; returns its folder. Raises PackError, ModelError, SettingsError; SystemExit with
    128 + the signal after a signal.
    """
    if job.out.exists() and (not job.out.is_dir() or any(job.out.iterdir())):
        raise PackError(f"{job.out} is already there; choose another --out or remove it")
    settings = Settings(model=job.model, dtype=job.dtype, device=job.device, threads=job.threads)
    torch.set_num_threads(settings.threads or cpu_quota())
    source = open_source(job.model)
    device = choose_device(settings)
    dtype = choose_dtype(settings, source, device)
    opened = open_to_teach(job.memory, source, device)
    longest = min(LONGEST, source.config.max_position_embeddings)
    encode, ends = source.tokenizer.encode, source.config.eos_token_ids
    taught = read_examples(job.data, encode, ends[0] if ends else None, longest)
    retained = pieces_of(read_text(job.retain, "--retain"), encode, RETAINED_PIECE) if job.retain else []
    general = measured_of(pieces_of(read_text(job.general, "--general"), encode, MEASURED_PIECE)) if job.general else []
    stamp = stamp_of(source, opened, (taught, retained, general), job.recipe, str(dtype))
    work = job.out.with_name(f"{job.out.name}.training")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PackError(f"{work} cannot be made: {error.strerror}; choose another --out") from None
    console = Console(stderr=True)
    console.print(f"[dim]loading {source.name} …[/dim]")
    frozen = Frozen(source, dtype, device, longest)
    with reading(console, taught, retained) as advance:
        trainer, part, off = build_trainer(
            frozen, opened, taught, retained, general, job.recipe, work, fingerprint(source), advance
        )
    history = checkpoint.restore(work, trainer, stamp)
    run = Run(trainer, part, off, work, stamp, history, console)
    run.go()
    finish(job, opened, run)
    return job.out


def measured_of(pieces: Sequence[Example]) -> list[Example]:
    """The first pieces, up to MEASURED_TOKENS tokens."""
    taken: list[Example] = []
    for piece in pieces:
        if taken and sum(len(example.ids) for example in taken) + len(piece.ids) > MEASURED_TOKENS:
            break
        taken.append(piece)
    return taken


@contextmanager
def reading(console: Console, *parts: Sequence[Example]) -> Iterator[Callable[[int], object]]:
    tokens = sum(len(example.ids) for part in parts for example in part)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"the backbone reads {tokens:,} tokens once", total=tokens)
        yield lambda count: progress.advance(task, count)


class Run:
    """The loop around the steps. `history`: one entry a step, with general perplexities at the ends of epochs."""

    def __init__(
        self,
        trainer: Trainer,
        general: Part,
        off: float,
        work: Path,
        stamp: str,
        history: list[dict[str, float]],
        console: Console,
    ) -> None:
        self.trainer, self.general, self.work, self.stamp = trainer, general, work, stamp
        self.history, self.console, self.data_off = history, console, off
        self.members = range(len(general.examples))
        self.general_off = perplexity(trainer.frozen, None, general, self.members)[0] if general.examples else math.nan
        self.general_on = next((e["general_on"] for e in reversed(history) if "general_on" in e), self.general_off)
        self.tokens, self.seconds = 0, 0.0

    def go(self) -> None:
        """Until the last step. Raises PackError on a loss that is not finite, SystemExit on a signal."""
        saved = time.monotonic()
        with self.bar() as (progress, task), interruptible() as signals:
            while self.trainer.step < self.trainer.steps:
                begun, epoch = time.perf_counter(), self.trainer.position()[0]
                report = self.trainer.advance()
                self.tokens, self.seconds = self.tokens + report.tokens, self.seconds + time.perf_counter() - begun
                self.note(report)
                if self.trainer.position()[0] != epoch:
                    self.measure()
                    self.console.print(f"epoch {epoch + 1}: {self.line()}", highlight=False)
                if signals.caught is not None:
                    self.save()
                    self.console.print(
                        f"saved at step {self.trainer.step} of {self.trainer.steps}; run the same command to go on"
                    )
                    raise SystemExit(128 + signals.caught)
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
                progress.update(task, completed=self.trainer.step, shown=self.line())
            self.save()

    def note(self, report: StepReport) -> None:
        self.history.append(
            {
                "step": self.trainer.step,
                "loss": report.loss,
                "stray": report.stray,
                "labels": report.labels,
                "verbatim": report.right / report.sequences,
            }
        )

    def measure(self) -> None:
        """Perplexity of the general text with the memory as it is."""
        if self.general.examples:
            self.general_on = perplexity(self.trainer.frozen, self.trainer.memory, self.general, self.members)[0]
            self.history[-1] |= {"general_on": self.general_on, "general_off": self.general_off}

    def save(self) -> None:
        checkpoint.save(self.work, self.trainer, self.stamp, self.history)

    def recent(self) -> list[dict[str, float]]:
        """The last epoch's worth of entries."""
        return self.history[-max(self.trainer.per_epoch, default=1) :]

    def line(self) -> str:
        loss, verbatim = averages(self.recent())
        shown = f"loss {loss:.3f}  perplexity {math.exp(loss):.2f} (bare {self.data_off:.0f})  verbatim {verbatim:.0%}"
        if self.general.examples:
            shown += f"  general {self.general_on:.2f} (bare {self.general_off:.2f})"
        return f"{shown}  {self.tokens / max(self.seconds, 1e-9):.0f} tokens/s"

    @contextmanager
    def bar(self) -> Iterator[tuple[Progress, Any]]:
        columns = (
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            yield progress, progress.add_task("", total=self.trainer.steps, completed=self.trainer.step, shown="")


def averages(entries: Sequence[dict[str, float]]) -> tuple[float, float]:
    """(loss over learnt tokens, mean share verbatim); zeros for nothing."""
    labels = sum(entry["labels"] for entry in entries)
    loss = sum(entry["loss"] * entry["labels"] for entry in entries) / max(1, labels)
    return loss, sum(entry["verbatim"] for entry in entries) / max(1, len(entries))


@contextmanager
def interruptible() -> Iterator[Signals]:
    """SIGINT and SIGTERM are noted instead of ending the process in the middle of a step."""
    signals = Signals()
    before = {number: signal.signal(number, signals.catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finish(job: Job, opened: Opened, run: Run) -> None:
    """Writes the pack, and then removes checkpoint and states."""
    loss, verbatim = averages(run.recent())
    about = {
        "data": job.data.name,
        "examples": len(run.trainer.taught.examples),
        "steps": run.trainer.step,
        **{name: value for name, value in asdict(job.recipe).items()},
        "perplexity": round(math.exp(loss), 4),
        "perplexity_bare": round(run.data_off, 4),
        "verbatim_last_epoch": round(verbatim, 4),
    }
    if run.general.examples:
        about |= {"general": round(run.general_on, 4), "general_bare": round(run.general_off, 4)}
    with new_folder(job.out) as folder:
        write_taught(folder, opened, run.trainer.memory, job.row_type, run.trainer.step, about)
        if job.data.suffix == ".jsonl":
            shutil.copyfile(job.data, folder / FACTS)
        if job.general is not None:
            shutil.copyfile(job.general, folder / GENERAL)
        (folder / "README.md").write_text(readme(job, about), encoding="utf-8")
        draw_if_possible(run, folder)
    shutil.rmtree(run.work)


def draw_if_possible(run: Run, folder: Path) -> None:
    try:
        draw(run.history, folder / CURVES)
    except SettingsError as error:
        run.console.print(f"no {CURVES}: {error}")


def readme(job: Job, about: dict[str, Any]) -> str:
    lines = "\n".join(f"| {name} | {value} |" for name, value in about.items())
    return f"""# A memory taught with {job.data.name}

| | |
|---|---|
{lines}

    engram-server serve --model {job.model} --memory THIS_FOLDER
    engram-server eval {job.model} --memory THIS_FOLDER
"""
