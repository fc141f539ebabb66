"""Memories attach to every architecture: Engram and STEM packs inside transformers' own model, float64."""

import shutil
from pathlib import Path

import pytest
import torch

from server.commands.attach import attach
from server.models.source import open_source
from tests.backbones import save_backbone
from tests.engines import engine_on, logits_of
from tests.memory.conftest import randomise
from tests.memory.reference import ReferenceEngram, attached, compressed_ids, reference_logits
from tests.memory.stems import save_stem, with_stem

# fp32 against float64, through four layers and the memories' own sums; the logits have a magnitude of about 10.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def mapping(smollm2_folder: Path) -> list[int]:
    return compressed_ids(open_source(str(smollm2_folder)).tokenizer.backend)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral", "smollm3", "gemma 3"])
def test_both_kinds_of_memory_attach_to_a_backbone(
    name: str, tmp_path: Path, smollm2_folder: Path, mapping: list[int]
) -> None:
    folder = tmp_path / "model"
    vocab = open_source(str(smollm2_folder)).config.vocab_size
    reference = save_backbone(folder, name, vocab_size=vocab).double()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2_folder / file, folder / file)
    tokenizer = open_source(str(folder)).tokenizer
    ids = tuple(tokenizer.encode("The capital of France is Paris, and the capital of 대한민국 is 서울. " * 3)[:60])
    sizes = {"rows": 300, "dim": 8, "heads": 2, "dtype": "float32"}
    engram = randomise(attach(model=str(folder), out=tmp_path / "engram", layers=(1, 3), seed=1, **sizes), 1)
    inner, hidden = reference.config.intermediate_size, reference.config.hidden_size
    stem = save_stem(tmp_path / "stem", {2: torch.randn(vocab, inner)}, hidden)
    engine = engine_on(str(folder), memory=(f"e={engram}", f"s={stem}"), max_num_batched_tokens=13)
    memory = ReferenceEngram(engram, mapping)
    with torch.no_grad(), with_stem(reference, [stem], list(ids)), attached(reference, [memory], list(ids)):
        expected = reference(torch.tensor([ids])).logits[0]
    assert torch.allclose(logits_of(engine, ids, ("e", "s")).double(), expected, atol=TOLERANCE)
    bare = reference_logits(reference, [], ids)
    assert (expected - bare).abs().max() > 1  # the memories matter in this test
