"""A STEM pack is taught: its rows alone learn, and retained text holds them where they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from server.commands.attach_stem import attach_stem
from server.models.source import ModelSource
from server.training.data import Example
from server.training.frozen import Frozen
from server.training.layout import Layout
from server.training.loop import Recipe
from server.training.memory import joined
from server.training.run import Job, train
from server.training.start import open_to_teach, teachable
from tests.engines import engine_on, logits_of

SEQUENCE = np.random.default_rng(5).integers(0, 49_000, 40)


@pytest.fixture(scope="session")
def stem_pack(tiny_llama_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packs") / "stem"
    return attach_stem(model=str(tiny_llama_folder), out=out, layers=(1, 2), calibrate=text_file, dtype="float32")


@pytest.fixture
def stem_job(job: Job, stem_pack: Path) -> Job:
    return replace(job, memory=stem_pack, recipe=Recipe(epochs=12, batch_tokens=48, lr=2e-2, retain_weight=0.0))


def test_training_computes_what_the_engine_serves(
    source: ModelSource, frozen: Frozen, stem_pack: Path, tiny_llama_folder: Path
) -> None:
    memory = teachable(open_to_teach(stem_pack, source, frozen.device), frozen, [Example(SEQUENCE, 1)], [])
    layout = Layout.of([SEQUENCE], frozen.device)
    step = memory.look(layout, joined(memory.places([SEQUENCE])))
    with torch.no_grad():
        mine = frozen.logits(frozen.run(frozen.embed(layout), layout, 0, step))
    engine = engine_on(str(tiny_llama_folder), memory=(str(stem_pack),))
    served = logits_of(engine, tuple(SEQUENCE.tolist()), ("stem",))
    # fp32 sums in another order; the design's tolerance for logits
    torch.testing.assert_close(mine, served, rtol=0, atol=2e-4)


def test_it_learns_and_leaves_the_rows_of_other_tokens_alone(
    stem_job: Job, stem_pack: Path, source: ModelSource
) -> None:
    folder = train(stem_job)
    from server.memory.pack import StemConfig, read_config

    config = read_config(folder)
    assert isinstance(config, StemConfig)
    before = load_file(stem_pack / "table-1.safetensors")["table"]
    after = load_file(folder / "table-1.safetensors")["table"]
    changed = (before != after).any(1).nonzero()[:, 0].tolist()
    used = {token for line in stem_job.data.read_text().splitlines() for token in tokens_of(line, source)}
    assert changed
    assert set(changed) <= used


def tokens_of(line: str, source: ModelSource) -> list[int]:
    import json

    entry = json.loads(line)
    encode = source.tokenizer.encode
    return [*encode(entry["prompt"]), *encode(entry["completion"]), *source.config.eos_token_ids]


def test_the_loss_falls(stem_job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    from server.memory.pack import read_config

    train(stem_job)
    errors = capsys.readouterr().err
    losses = [float(line.split("loss ")[1].split()[0]) for line in errors.splitlines() if line.startswith("epoch")]
    assert losses[-1] < 0.8 * losses[0]  # rows of some forty tokens at two layers are all there is to move
    assert read_config(stem_job.out).trained_steps > 0
