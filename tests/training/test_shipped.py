"""The memory that ships, asked through the engine as it is served: bf16, int8 rows read from the file, prefetched."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from server.commands.evaluate import shipped
from server.memory.pack import PackConfig
from server.models.source import ModelSource
from server.runtime.engine import Engine
from server.runtime.load import load
from server.runtime.process import build_engine
from server.settings import Settings
from server.training import recall
from tests.conftest import BUILTIN

SAMPLE, LINES = 40, 8
SHIPPED_BYTES = 24_000_000


@pytest.fixture(scope="module")
def engine() -> Engine:
    small = {"threads": 1, "kv_bytes": 128 << 20, "max_model_len": 1024, "prefix_cache": "off"}
    settings = Settings(model=BUILTIN, memory=(str(shipped()),), **small)
    return build_engine(settings, load(settings))


@pytest.fixture(scope="module")
def sample() -> list[recall.Fact]:
    """Forty facts, by the hash of their gloss: another order than the one they were chosen in."""
    facts = recall.read_facts(shipped() / "facts.jsonl")
    return sorted(facts, key=lambda fact: hashlib.sha256(fact.completion.encode()).digest())[:SAMPLE]


def test_it_ships_at_least_two_thousand_facts_within_its_size() -> None:
    folder = shipped()
    assert len(recall.read_facts(folder / "facts.jsonl")) >= 2000
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= SHIPPED_BYTES
    assert PackConfig.read(folder).row_type == "int8"
    assert (folder / "LICENSE.wordnet").is_file() and (folder / "README.md").is_file()


@pytest.mark.slow
def test_a_sample_of_its_facts_comes_back_word_for_word(
    engine: Engine, smollm2: ModelSource, sample: list[recall.Fact]
) -> None:
    answers = recall.answers(engine, smollm2.tokenizer, sample, ("wordnet",))
    # the promise is 60 % of all facts; the pack gave 96.7 % of them when it was made
    assert sum(answer.right for answer in answers) >= 0.6 * SAMPLE


@pytest.mark.slow
def test_without_it_the_backbone_knows_none_of_them(
    engine: Engine, smollm2: ModelSource, sample: list[recall.Fact]
) -> None:
    answers = recall.answers(engine, smollm2.tokenizer, sample, ())
    assert sum(answer.right for answer in answers) <= 0.02 * SAMPLE


@pytest.mark.slow
def test_general_text_is_left_alone(engine: Engine, smollm2: ModelSource) -> None:
    lines = (shipped() / "general.txt").read_text(encoding="utf-8").splitlines()[:LINES]
    on = recall.perplexity(engine, smollm2.tokenizer, lines, ("wordnet",))
    off = recall.perplexity(engine, smollm2.tokenizer, lines, ())
    # 1 % is the promise for all 64 lines; eight scatter about that
    assert on / off < 1.03


def test_its_recipe_and_its_path_are_where_the_makefile_says() -> None:
    root = Path(__file__).parents[2]
    assert "DEFAULT_MEMORY := packs/wordnet\n" in (root / "Makefile").read_text()
    assert (root / "packs/wordnet/recipe.py").is_file()
