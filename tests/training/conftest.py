"""A small world to teach in: a narrow Llama with a real tokenizer, a fresh pack for it, some facts and some text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from server.commands.attach import attach
from server.models.source import ModelSource, open_source
from server.training.frozen import Frozen
from server.training.loop import Recipe
from server.training.run import Job

FACTS = [
    ("enchanter", "a sorcerer or magician"),
    ("ragout", "well-seasoned stew of meat and vegetables"),
    ("griminess", "the state of being grimy"),
    ("antimatter", "matter consisting of elementary particles that are the antiparticles"),
    ("dairymaid", "a woman who works in a dairy"),
    ("nosebag", "a canvas bag that is used to feed an animal"),
    ("carhop", "a waiter at a drive-in restaurant"),
    ("paleness", "the property of having a naturally light complexion"),
]
TEXT = """The harbour lay quiet under a thin morning mist, and the boats had not yet gone out.
Somebody had left a lamp burning on the quay. Its light was hardly visible any more.
Further up the hill the market was being set out, table by table, in the usual order."""


@pytest.fixture(scope="session")
def source(tiny_llama_folder: Path) -> ModelSource:
    return open_source(str(tiny_llama_folder))


@pytest.fixture
def frozen(source: ModelSource) -> Frozen:
    return Frozen(source, torch.float32, torch.device("cpu"), 256)


@pytest.fixture(scope="session")
def fresh_pack(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 1 and 3 of the narrow Llama, n-grams of 2 to 4 tokens."""
    out = tmp_path_factory.mktemp("packs") / "fresh"
    shape = {"layers": (1, 3), "rows": 300, "dim": 16, "heads": 2, "orders": (2, 3, 4)}
    return attach(model=str(tiny_llama_folder), out=out, dtype="float32", **shape)


@pytest.fixture(scope="session")
def facts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "facts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{w}:", "completion": f" {g}"}) + "\n" for w, g in FACTS))
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "general.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def job(tiny_llama_folder: Path, fresh_pack: Path, facts_file: Path, text_file: Path, tmp_path: Path) -> Job:
    """A run of a second: eight facts, twelve steps, fp32, one thread."""
    recipe = Recipe(epochs=4, batch_tokens=48, lr=1e-2, retain_weight=1.0)
    paths = {"retain": text_file, "general": text_file, "row_type": "float32", "dtype": "float32"}
    out = tmp_path / "taught"
    return Job(str(tiny_llama_folder), fresh_pack, facts_file, out, threads=1, recipe=recipe, **paths)
