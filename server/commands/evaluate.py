"""`eval`: what a memory knows and what it disturbs, through the engine that serves it, as tables, JSON and a picture.

    PACK/facts.jsonl   what it was taught         recall.on, recall.off
    PACK/general.txt   text it should leave alone perplexity.on, perplexity.off

A pack without one of them is evaluated as far as the other goes, and what is missing is said. A memory that stands in
for a part of the model (STEM) has no "off" in the same engine: it is compared with an engine that has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from server.bench.paired import machine, write_json
from server.errors import SettingsError
from server.memory.attached import AttachedPack
from server.models.tokenizer import Tokenizer
from server.runtime.engine import Engine
from server.runtime.load import load
from server.runtime.process import build_engine
from server.settings import Settings
from server.training import gates, recall
from server.training.curves import figure
from server.training.data import read_text
from server.training.gates import Watched, watching
from server.training.run import FACTS, GENERAL

SHIPPED = Path("packs/wordnet")
SHOWN = 8  # facts printed side by side
Figures = dict[str, Any]


def evaluate(settings: Settings, *, limit: int = 0, json: Path | None = None, plot: Path | None = None) -> Figures:
    """Prints and returns the figures. `limit`: of facts, the first so many; 0: all. Raises PackError, SettingsError."""
    console = Console()
    folder = Path(settings.memory[0].rpartition("=")[2])
    facts = recall.read_facts(folder / FACTS) if (folder / FACTS).is_file() else []
    lines = text_lines(folder / GENERAL)
    facts = facts[:limit] if limit else facts
    for what, name in ((facts, FACTS), (lines, GENERAL)):
        if not what:
            console.print(f"{folder} holds no {name}: nothing is measured on it", soft_wrap=True)
    if plot is not None:
        figure(1, 1, (1, 1))  # refuse now, not after minutes
    loaded = load(settings)
    engine = build_engine(settings, loaded)
    tokenizer = loaded.source.tokenizer
    assert loaded.memories is not None
    pack = loaded.memories.packs[0]
    bare = engine
    if pack.name in loaded.fixed:
        without = Settings(model=settings.model, dtype=settings.dtype, device=settings.device, threads=settings.threads)
        bare = build_engine(without, load(without))
    figures: Figures = {"machine": machine(), "model": loaded.source.name, "pack": pack.name}
    figures["row_types"] = sorted({table.row_type.name for table in pack.tables.values()})
    seen, watched = Watched(), pack if isinstance(pack, AttachedPack) else None

    def watch(kind: str) -> Any:
        return nullcontext() if watched is None else watching(loaded.model, watched, seen, kind)

    if facts:
        with console.status(f"{len(facts)} facts, twice"):
            measure_recall(figures, engine, bare, tokenizer, facts, pack.name, watch, console)
    if lines:
        with console.status(f"{len(lines)} lines of general text, twice"):
            with watch("general"):
                on = recall.perplexity(engine, tokenizer, lines, (pack.name,))
            off = recall.perplexity(bare, tokenizer, lines, ())
        figures["perplexity"] = {"on": on, "off": off, "change": on / off - 1}
    if watched is not None:
        figures["gates"] = gate_figures(seen, watched, tokenizer, console)
    print_summary(figures, console)
    if plot is not None and watched is not None:
        gates.draw(seen, tuple(watched.modules), ("facts", "general"), plot)
        console.print(f"wrote {plot}")
    if json is not None:
        write_json(json, figures)
    return figures


def text_lines(path: Path) -> list[str]:
    """Those that are not blank; none without the file. Raises PackError for one that is no text."""
    return [line for line in read_text(path, "general text").splitlines() if line.strip()] if path.is_file() else []


def measure_recall(
    figures: Figures,
    engine: Engine,
    bare: Engine,
    tokenizer: Tokenizer,
    facts: Sequence[recall.Fact],
    name: str,
    watch: Any,
    console: Console,
) -> None:
    with watch("facts"):
        on = recall.answers(engine, tokenizer, facts, (name,))
    off = recall.answers(bare, tokenizer, facts, ())
    figures["recall"] = {
        "on": share(answer.right for answer in on),
        "off": share(answer.right for answer in off),
        "on_and_ended": share(answer.right and answer.ended for answer in on),
        "facts": len(facts),
        "side_by_side": [
            {"prompt": with_memory.fact.prompt, "on": with_memory.said, "off": without.said}
            for with_memory, without in list(zip(on, off, strict=True))[:SHOWN]
        ],
    }
    table = Table("prompt", "with the memory", "without", title="side by side")
    for with_memory, without in list(zip(on, off, strict=True))[:SHOWN]:
        mark = "" if with_memory.right else f"  [red]≠{with_memory.fact.completion}[/red]"
        table.add_row(with_memory.fact.prompt, with_memory.said + mark, without.said)
    console.print(table)


def share(right: Iterable[bool]) -> float:
    found = list(right)
    return sum(found) / max(1, len(found))


def gate_figures(seen: Watched, pack: AttachedPack, tokenizer: Tokenizer, console: Console) -> Figures:
    """Statistics per layer and kind of text, and the n-grams that get most; printed as tables."""
    figures: Figures = {}
    for layer in pack.modules:
        for kind in ("facts", "general"):
            table = Table("n-gram (ends at its token)", "gate", "added / stream", "seen")
            table.title = f"layer {layer}, {kind}: n-grams that get most"
            named = [
                {"ngram": tokenizer.decode(ids, skip_special_tokens=False), "alpha": a, "share": s, "seen": count}
                for ids, a, s, count in gates.widest(seen, layer, kind)
            ]
            figures[f"{layer}.{kind}"] = {**gates.summary(seen, layer, kind), "widest": named}
            for entry in named:
                row = (repr(entry["ngram"]), f"{entry['alpha']:.2f}", f"{entry['share']:.2f}", str(entry["seen"]))
                table.add_row(*row)
            if named:
                console.print(table)
    return figures


def print_summary(figures: Figures, console: Console) -> None:
    table = Table("", "with the memory", "without", title=f"{figures['model']} + {figures['pack']}")
    if "recall" in figures:
        found = figures["recall"]
        table.add_row(f"recall of {found['facts']} facts", f"{found['on']:.1%}", f"{found['off']:.1%}")
    if "perplexity" in figures:
        found = figures["perplexity"]
        table.add_row("general perplexity", f"{found['on']:.3f} ({found['change']:+.2%})", f"{found['off']:.3f}")
    for name, found in figures.get("gates", {}).items():
        if found["tokens"]:
            layer, kind = name.split(".")
            text = f"gate {found['alpha']:.2f}, adds {found['share']:.2f} of the stream (p90 {found['share_p90']:.2f})"
            table.add_row(f"layer {layer}, {kind}", text, "")
    console.print(table)


def shipped() -> Path:
    """The memory that comes with the project: from here, or beside the sources. Raises SettingsError."""
    for root in (Path(), Path(__file__).parents[2]):
        if (root / SHIPPED).is_dir():
            return root / SHIPPED
    raise SettingsError(f"{SHIPPED} is not here; run in the project's folder or name a pack: --memory PACK")
