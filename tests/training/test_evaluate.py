"""`eval`: recall, perplexity and gates through the engine; what a pack lacks is said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from server.commands.evaluate import evaluate
from server.errors import PackError
from server.models.source import ModelSource
from server.settings import Settings
from server.training.run import Job, train


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A taught pack with facts.jsonl and general.txt inside."""
    from server.training.loop import Recipe

    values = {name: request.getfixturevalue(name) for name in ("tiny_llama_folder", "fresh_pack", "facts_file")}
    text = request.getfixturevalue("text_file")
    recipe = Recipe(epochs=40, batch_tokens=48, lr=1e-2, retain_weight=0.1)
    out = tmp_path_factory.mktemp("taught") / "taught"
    paths = {"retain": text, "general": text, "row_type": "float32", "dtype": "float32"}
    model, memory, data = values.values()
    return train(Job(str(model), memory, data, out, threads=1, recipe=recipe, **paths))


def measured(model: Path, pack: Path, **options: Any) -> dict[str, Any]:
    settings = Settings(
        model=str(model), memory=(str(pack),), dtype="float32", threads=1, kv_bytes=64 << 20, prefix_cache="off"
    )
    return evaluate(settings, **options)


def test_recall_is_measured_with_the_memory_and_without(tiny_llama_folder: Path, pack: Path, tmp_path: Path) -> None:
    figures = measured(tiny_llama_folder, pack, json=tmp_path / "figures.json", plot=tmp_path / "gates.png")
    assert figures["recall"]["on"] == 1.0
    assert figures["recall"]["on_and_ended"] == 1.0
    assert figures["recall"]["off"] == 0.0
    assert json.loads((tmp_path / "figures.json").read_text())["recall"]["facts"] == 8
    assert (tmp_path / "gates.png").read_bytes()[:4] == b"\x89PNG"
    facts, general = figures["gates"]["1.facts"], figures["gates"]["1.general"]
    assert facts["tokens"] > 0 and general["tokens"] > 0
    assert facts["share"] > general["share"]
    assert 0 <= general["alpha"] <= 1


def test_perplexity_without_the_memory_is_transformers(
    tiny_llama_folder: Path, pack: Path, source: ModelSource
) -> None:
    from transformers import LlamaForCausalLM

    figures = measured(tiny_llama_folder, pack)
    reference = LlamaForCausalLM.from_pretrained(tiny_llama_folder).float().eval()
    losses = []
    for line in (pack / "general.txt").read_text().splitlines():
        ids = torch.tensor([source.tokenizer.encode(line)])
        with torch.no_grad():
            scores = torch.log_softmax(reference(ids).logits[0, :-1].double(), -1)
        losses += (-scores.gather(1, ids[0, 1:, None])[:, 0]).tolist()
    expected = math.exp(sum(losses) / len(losses))
    assert figures["perplexity"]["off"] == pytest.approx(expected, rel=1e-3)  # logits agree within 2e-4


def test_a_pack_without_facts_is_measured_as_far_as_it_goes(
    tiny_llama_folder: Path, pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in pack.iterdir():
        if path.name != "facts.jsonl":
            (bare / path.name).symlink_to(path)
    figures = measured(tiny_llama_folder, bare)
    assert "holds no facts.jsonl" in capsys.readouterr().out
    assert "recall" not in figures and figures["perplexity"]["on"] > 0


def test_a_fresh_pack_has_nothing_to_measure_and_says_so(
    tiny_llama_folder: Path, fresh_pack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = measured(tiny_llama_folder, fresh_pack)
    said = capsys.readouterr().out
    assert "holds no facts.jsonl" in said and "holds no general.txt" in said
    assert "recall" not in figures and "perplexity" not in figures


def test_facts_that_are_no_facts_are_refused_with_their_line(
    tiny_llama_folder: Path, fresh_pack: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in fresh_pack.iterdir():
        (broken / path.name).symlink_to(path)
    (broken / "facts.jsonl").write_text("nonsense\n")
    with pytest.raises(PackError, match="line 1"):
        measured(tiny_llama_folder, broken)
