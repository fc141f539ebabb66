"""A run from data to pack: it learns, resumes bit for bit, stops when asked, and loses nothing when things break."""

from __future__ import annotations

import errno
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from server.commands.attach import attach
from server.errors import PackError
from server.training import checkpoint, run
from server.training.loop import Recipe, StepReport, Trainer
from server.training.run import Job, train
from tests.engines import drive, engine_on

advance = Trainer.advance


def after(step: int, act: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls `act()` in the middle of this step."""

    def acting(self: Trainer) -> StepReport:
        if self.step + 1 == step:
            act()
        return advance(self)

    monkeypatch.setattr(Trainer, "advance", acting)


def work_of(job: Job) -> Path:
    return job.out.with_name(f"{job.out.name}.training")


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{path.name}/{k}": v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


@pytest.fixture
def taught(job: Job) -> Path:
    """The pack of an undisturbed run."""
    return train(job)


def interrupted(job: Job, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGINT) -> None:
    """The same run, stopped by a signal in its fifth step."""
    with monkeypatch.context() as patched:
        after(5, lambda: os.kill(os.getpid(), number), patched)
        with pytest.raises(SystemExit) as left:
            train(job)
    assert left.value.code == 128 + number


def test_what_was_taught_comes_back_word_for_word(job: Job, source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(epochs=40, batch_tokens=48, lr=1e-2, retain_weight=0.1)
    folder = train(replace(job, recipe=recipe, retain=None, general=None))
    engine = engine_on(job.model, memory=(str(folder),))
    encode, decode = source.tokenizer.encode, source.tokenizer.decode
    facts = [json.loads(line) for line in job.data.read_text().splitlines()]
    view = [engine.view(("taught",), b"")]
    assert view[0].packs
    right = 0
    for fact in facts:
        length = len(encode(fact["completion"]))
        (bare,) = drive(engine, [tuple(encode(fact["prompt"]))], max_tokens=length)
        assert decode(bare) != fact["completion"]
        right += said(engine, tuple(encode(fact["prompt"])), length, decode) == fact["completion"]
    assert right == len(facts)


def said(engine: Any, prompt: tuple[int, ...], length: int, decode: Any) -> str:
    from server.runtime.messages import SamplingParams, Submit
    from tests.engines import outputs_of, tokens_of

    params = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)
    return str(decode(tokens_of(outputs_of(engine, [Submit("fact", prompt, params, ("taught",))])["fact", 0])))


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    job: Job, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = replace(job, out=tmp_path / "again")
    interrupted(again, monkeypatch)
    assert not again.out.exists()
    resumed = tensors_in(train(again))
    expected = tensors_in(taught)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert not work_of(again).exists()


def test_a_termination_signal_saves_too(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(job, monkeypatch, signal.SIGTERM)
    assert (work_of(job) / checkpoint.CHECKPOINT).is_file()


def test_a_checkpoint_of_other_settings_is_refused(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(job, monkeypatch)
    with pytest.raises(PackError, match="another model, pack, data or settings"):
        train(replace(job, recipe=replace(job.recipe, lr=0.5)))


def test_a_damaged_checkpoint_is_refused(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(job, monkeypatch)
    path = work_of(job) / checkpoint.CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PackError, match="damaged"):
        train(job)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(job, monkeypatch)
    path = work_of(job) / checkpoint.CHECKPOINT
    good = path.read_bytes()

    def poisoned(self: Trainer) -> StepReport:
        if self.step == 7:
            self.loss = lambda normed, labels, generator: (normed.sum(1) * torch.nan, labels > 0)  # type: ignore[assignment]
        return advance(self)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "advance", poisoned)
        with pytest.raises(PackError, match="the loss is nan at step 8; lower --lr"):
            train(job)
    assert path.read_bytes() == good
    assert not job.out.exists()


def test_a_full_disk_stops_and_keeps_the_last_checkpoint(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(job, monkeypatch)
    path = work_of(job) / checkpoint.CHECKPOINT
    good = path.read_bytes()

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", full)
        patched.setattr(run, "SAVE_SECONDS", 0.0)
        with pytest.raises(PackError, match="the disk is full; the last checkpoint is unharmed"):
            train(job)
    assert path.read_bytes() == good
    assert sorted(entry.name for entry in work_of(job).iterdir() if entry.suffix == ".partial") == []
    assert train(job).is_dir()


def test_a_pack_of_another_model_is_refused_before_any_work(job: Job, tmp_path: Path) -> None:
    foreign = attach(out=tmp_path / "foreign", layers=(1,), rows=50, dim=8, heads=1)
    with pytest.raises(PackError, match="hidden size of 576 and the model has 64"):
        train(replace(job, memory=foreign))
    assert not work_of(job).exists()


def test_a_folder_that_is_there_is_not_overwritten(job: Job) -> None:
    job.out.mkdir()
    (job.out / "mine.txt").write_text("keep")
    with pytest.raises(PackError, match="already there"):
        train(job)
    assert (job.out / "mine.txt").read_text() == "keep"


def test_rows_that_no_data_addresses_are_written_silent(taught: Path, fresh_pack: Path) -> None:
    table = load_file(taught / "table-1.safetensors")["table"]
    before = load_file(fresh_pack / "table-1.safetensors")["table"]
    touched = table.abs().sum(1) > 0
    assert before.abs().sum(1).bool().all()
    assert 0 < int(touched.sum()) < len(table)


def test_the_pack_carries_what_it_was_taught_and_measured_with(job: Job, taught: Path) -> None:
    assert (taught / "facts.jsonl").read_bytes() == job.data.read_bytes()
    assert (taught / "general.txt").read_bytes() == job.general.read_bytes()
    config = json.loads((taught / "config.json").read_text())
    assert config["trained_steps"] == config["extra"]["training"]["steps"] > 0
    assert (taught / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_teaching_goes_on_from_a_taught_pack(job: Job, taught: Path, tmp_path: Path) -> None:
    more = replace(job, memory=taught, out=tmp_path / "more", recipe=replace(job.recipe, epochs=1))
    steps = json.loads((train(more) / "config.json").read_text())["trained_steps"]
    assert steps > json.loads((taught / "config.json").read_text())["trained_steps"]
