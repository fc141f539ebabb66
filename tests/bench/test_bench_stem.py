"""`bench stem` measures what it says: its arms differ only in their memories, and read the text's tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.bench.memory import PROMPT_TOKENS
from server.bench.stem import arms_over, compared, random_stem, run, start
from server.commands.attach import attach
from server.commands.inspect import summary
from server.models.source import open_source


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads wait for each other on a busy machine, ten times as long as such small steps take."""
    monkeypatch.setattr("server.runtime.load.cpu_quota", lambda: 1)


def test_the_arms_differ_in_their_memories_and_read_the_texts_tokens(tiny_llama_folder: Path, tmp_path: Path) -> None:
    model = str(tiny_llama_folder)
    stem = random_stem(tmp_path / "stem", open_source(model).config)
    engram = attach(model=model, out=tmp_path / "engram", layers=(1, 2), rows=50, dim=8, heads=2)
    arms = arms_over(model, stem, engram, 100)
    assert {name: sorted(engine.packs) for name, engine in arms.items()} == {
        "dense": [],
        "stem": ["stem"],
        "engram": ["engram"],
        "hybrid": ["engram", "stem"],
    }
    assert {name: engine.runner.model.without_up for name, engine in arms.items()} == {
        "dense": frozenset(),
        "stem": {1},
        "engram": frozenset(),
        "hybrid": {1},
    }
    text = tuple(range(100, 100 + PROMPT_TOKENS + 12))
    for engine in arms.values():
        start(engine, [text])
        for _ in range(5):
            engine.step()
        (sequence,) = engine.scheduler.sequences()
        assert tuple(sequence.tokens[: sequence.length].tolist()) == text[: sequence.length]
        assert sequence.length > PROMPT_TOKENS + 5


def test_a_random_table_is_whole(tiny_llama_folder: Path, tmp_path: Path) -> None:
    found = summary(random_stem(tmp_path / "stem", open_source(str(tiny_llama_folder)).config), verify=True)
    assert (found["layers"], found["rows"]) == ([1], 49152)


def test_a_hybrid_that_costs_its_parts_gives_a_ratio_of_one() -> None:
    seconds = {"dense": [10.0] * 20, "stem": [8.0] * 20, "engram": [11.0] * 20, "hybrid": [9.0] * 20}
    found = compared(seconds)
    assert found["stem_over_dense"]["median"] == 1.25
    assert found["hybrid_over_sum_of_parts"]["median"] == 1.0


def test_the_figures_are_written_with_their_intervals(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.bench.stem.ENGRAM_ROWS", 50)
    run(model=str(tiny_llama_folder), turns=16, json=tmp_path / "stem.json")
    written = json.loads((tmp_path / "stem.json").read_text())
    assert written["ratios"] == written["ratios_by_sequences"]["1"]
    for name in ("stem_over_dense", "engram_over_dense", "hybrid_over_dense", "hybrid_over_sum_of_parts"):
        low, high = written["ratios"][name]["ci95"]
        assert low <= written["ratios"][name]["median"] <= high and written["ratios"][name]["pairs"] == 16
