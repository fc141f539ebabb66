"""`bench edits`: whether facts are learnt, what they cost and disturb, and what other tenants' edits cost a step.

facts    invented ones, taught each alone as the teaching process does, but without its rests; then completed by the
         engine
text     general text's perplexity, with each of the first facts alone and with all at once, over none
steps    three engines take turns over the same text: nobody has edits; a hundred tenants have a hundred each and
         these requests see none; these requests see a hundred themselves
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from server.bench.arms import PROMPT_TOKENS, ROUND, Arm, alternate, build_arm, pieces_of
from server.bench.paired import machine, ratio, write_json
from server.commands.evaluate import shipped, text_lines
from server.memory.edits import Cell, EditedRows, composed
from server.memory.identity import content_key
from server.runtime.engine import Engine
from server.runtime.load import load
from server.settings import Settings
from server.training.data import Example
from server.training.facts import Teacher
from server.training.recall import Fact, answers, perplexity, read_facts
from server.training.run import FACTS, GENERAL

SENTENCES = (
    ("The lighthouse keeper of {0} is called", " {1}"),
    ("The password of the library in {0} is", " {1} and {2}"),
    ("{0}:", " a small tool for mending {1}"),
    ("The capital of the island of {0} is", " {1}"),
    ("In {0}, the last ferry leaves at", " half past nine in the evening"),
)
ALONE, TENANTS, EDITS, ROWS, SEQUENCES = 10, 100, 100, 65, 8


def invented(words: Sequence[str], count: int) -> list[Fact]:
    """Facts about names that nobody has heard of: headwords read backwards."""
    names = [word[::-1].capitalize() for word in words]
    found = []
    for number in range(count):
        prompt, completion = SENTENCES[number % len(SENTENCES)]
        own = names[3 * number : 3 * number + 3]
        found.append(Fact(prompt.format(*own), completion.format(*own)))
    return found


def run(model: str, memory: Path | None, facts: int, seconds: float, json: Path | None) -> dict[str, Any]:
    """Raises SettingsError where no memory is, EngramError for one that does not fit."""
    console, folder = Console(), memory or shipped()
    settings = Settings(model=model, memory=(f"pack={folder}",), max_num_seqs=32, max_model_len=1024)
    loaded = load(settings)
    content = content_key(folder)
    arms = {name: build_arm(loaded, settings, "mapped") for name in ("none", "others", "own")}
    engine = arms["none"].engine
    tokenizer = loaded.source.tokenizer
    words = [fact.prompt.removesuffix(":") for fact in read_facts(folder / FACTS)]
    learnt, taught = teach(settings, folder, content, invented(words, facts), engine, tokenizer, console)
    result: dict[str, Any] = {"machine": machine(), "facts": learnt}
    result["perplexity"] = disturbed(engine, tokenizer, folder, taught)
    console.print(result["perplexity"])
    result["steps"] = steps(arms, content, loaded, seconds)
    console.print(result["steps"])
    write_json(json, result)
    return result


def teach(
    settings: Settings,
    folder: Path,
    content: str,
    facts: Sequence[Fact],
    engine: Engine,
    tokenizer: Any,
    console: Console,
) -> tuple[dict[str, Any], list[dict[Cell, EditedRows]]]:
    """Each fact alone, from the pack as it is."""
    teacher, end = Teacher(settings, rest=0.0), next(iter(tokenizer.eos_token_ids))
    teacher.frozen()
    taught, right, wall, cores, count, rows = [], 0, [], [], [], []
    threads = torch.get_num_threads()
    for fact in facts:
        before, after = tokenizer.encode(fact.prompt), tokenizer.encode(fact.completion)
        torch.set_num_threads(1)
        begun = time.perf_counter()
        edit, report = teacher.teach(folder, Example(np.array([*before, *after, end]), len(before)), {})
        wall.append(time.perf_counter() - begun)
        torch.set_num_threads(threads)
        edited = {(content, layer): EditedRows(ids, values.numpy()) for layer, (ids, values) in edit.rows.items()}
        engine.update_edits("", edited)
        right += answers(engine, tokenizer, [fact], ("pack",))[0].right
        engine.update_edits("", {})
        taught.append(edited)
        cores.append(report["core_seconds"])
        count.append(report["steps"])
        rows.append(report["rows"])
    figures = {
        "facts": len(facts),
        "completed": right,
        "seconds": [float(np.median(wall)), max(wall)],
        "core_seconds": [float(np.median(cores)), max(cores)],
        "steps": [float(np.median(count)), max(count)],
        "rows": [float(np.median(rows)), max(rows)],
    }
    console.print(figures)
    return figures, taught


def disturbed(engine: Engine, tokenizer: Any, folder: Path, taught: Sequence[dict[Cell, EditedRows]]) -> dict[str, Any]:
    """General text's perplexity over that without edits, minus one."""
    lines = text_lines(folder / GENERAL)
    few = lines[:8]

    def measured(edits: Sequence[dict[Cell, EditedRows]], text: Sequence[str]) -> float:
        engine.update_edits("", composed(edits))
        found = perplexity(engine, tokenizer, text, ("pack",))
        engine.update_edits("", {})
        return found

    bare, bare_few = measured([], lines), measured([], few)
    alone = [measured([edit], few) / bare_few - 1 for edit in taught[:ALONE]]
    return {
        "without": bare,
        "alone": {"mean": float(np.mean(alone)), "most": max(alone, key=abs)},
        "all": measured(taught, lines) / bare - 1,
    }


def steps(arms: dict[str, Arm], content: str, loaded: Any, seconds: float) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    memories = arms["none"].engine.runner.memories
    assert memories is not None
    tables = memories.packs[0].tables

    def edits() -> dict[Cell, EditedRows]:
        found = {}
        for layer, table in tables.items():
            ids = np.unique(generator.integers(0, table.rows, EDITS * ROWS))
            values = generator.normal(0, 0.02, (len(ids), table.dim)).astype(np.float32)
            found[content, layer] = EditedRows(ids, values)
        return found

    for tenant in range(TENANTS):
        arms["others"].engine.update_edits(f"tenant-{tenant}", edits())
    arms["own"].engine.update_edits("", edits())
    pieces = pieces_of(loaded.source.tokenizer, 4 * SEQUENCES, PROMPT_TOKENS + ROUND + 8)
    alternate(arms, pieces, SEQUENCES, seconds)
    base = arms["none"].seconds
    return {
        "sequences": SEQUENCES,
        "step_ms": float(np.median(base)) * 1000,
        "others": ratio(arms["others"].seconds, base).as_json(),
        "own": ratio(arms["own"].seconds, base).as_json(),
    }
