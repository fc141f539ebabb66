"""`attach --stem --fit`: rows that make the block's output right, within the time, and what an interruption keeps."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress

from server.cli import app
from server.commands import fit_stem
from server.commands.attach_stem import attach_stem
from server.commands.fit_stem import Stopwatch, fit_rows
from server.commands.stem_text import Places, Reader, Split, State, Tables, Watch
from server.errors import PackError
from server.runtime.load import load
from tests.engines import settings_for
from tests.memory.test_pack_commands import all_rows
from tests.memory.test_peft import STORED

WORDS = ("the capital of Cafe is The THE of a b c d e f 1 2 3 is capital café " * 40).split()


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads wait for each other on a busy machine, ten times as long as such small steps take."""
    monkeypatch.setattr("server.runtime.load.cpu_quota", lambda: 1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(2)
    order = torch.randint(0, len(WORDS), (700,), generator=generator).tolist()
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS[i] for i in order))
    return path


class Ticks(Stopwatch):
    """A clock that moves on by one whenever it is read, so that a busy machine fits as far as an idle one."""

    def __init__(self) -> None:
        self.read = 0
        super().__init__(1000)

    def now(self) -> float:
        self.read += 1
        return float(self.read)


def places(truth: torch.Tensor, count: int, seed: int) -> Places:
    """Of tokens 0 to 9 only, with gates of either sign, where the up-projection gave exactly the token's row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 10, (count,), generator=generator)
    return Places(tokens, torch.randn(count, truth.shape[1], generator=generator), truth[tokens])


def test_fitted_rows_come_to_those_that_leave_no_error_and_others_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    truth, down = torch.randn(14, 6, generator=generator), torch.randn(8, 6, generator=generator)
    start = truth + 0.5 * torch.randn(14, 6, generator=generator)
    heard: list[float] = []
    given = start.clone()
    fit, choose = places(truth, 300, 1), places(truth, 60, 2)
    rows, steps = fit_rows(given, fit, choose, down, Ticks(), 800, lambda passed, error: heard.append(error))
    assert torch.allclose(rows[:10], truth[:10], atol=0.02)  # of a start 0.5 away; Adam's last steps are this small
    assert torch.equal(rows[10:], start[10:]) and torch.equal(given, start)
    assert steps > 0 and heard == sorted(heard, reverse=True) and heard[-1] < 0.01


def test_what_makes_the_choosing_text_worse_is_not_kept() -> None:
    truth, down = torch.ones(10, 6), torch.eye(6)
    other = places(truth + 5, 300, 1)  # the fitted text wants rows that the other does not
    start = truth.clone()
    rows, _ = fit_rows(start, other, places(truth, 60, 2), down, Ticks(), 300, lambda p, e: None)
    assert torch.equal(rows, start)


def test_no_time_leaves_the_calibrated_rows() -> None:
    truth = torch.randn(10, 6)
    rows, steps = fit_rows(
        truth + 1, places(truth, 30, 1), places(truth, 30, 2), torch.eye(6), Stopwatch(0), 0.0, lambda p, e: None
    )
    assert steps == 0 and torch.equal(rows, truth + 1)


def test_the_text_goes_through_once_and_gives_what_the_blocks_add() -> None:
    """gate · up through the down-projection is what a feed-forward block adds; also from a layer on, after another."""
    loaded = load(settings_for(str(STORED / "model"), max_model_len=64))
    reader, state = Reader(loaded, 16), State()
    pieces = [[5, 9, 40, 41, 9], [7, 7, 3]]
    rows = torch.randn(129, 40, generator=torch.Generator().manual_seed(1))
    passes: list[int] = []
    handle = loaded.model.blocks[0].qkv.register_forward_hook(lambda *args: passes.append(0))
    for layer, below in ((1, {}), (3, {1: rows})):
        added: list[torch.Tensor] = []
        down = loaded.model.blocks[layer].down
        with Progress(disable=True) as progress:
            found = reader.places(pieces, Watch(below, layer), state, progress)
        assert len(passes) == 2 * (layer == 1)  # the second time nothing below layer 1 is computed again
        assert found.tokens.tolist() == [5, 9, 40, 41, 9, 7, 7, 3]
        watched = down.register_forward_hook(lambda module, args, out, to=added: to.append(out.clone()))
        with torch.no_grad():
            for piece in pieces:
                reader.read(piece, Tables(below))
            watched.remove()
            assert torch.allclose(down(found.gate * found.dense), torch.cat(added), atol=1e-5)  # fp32, same sums
        passes.clear()
    handle.remove()


def test_fitting_is_reported_and_stored(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(STORED / "model")
    plain = attach_stem(model=model, out=tmp_path / "plain", layers=(1, 2), calibrate=text, dtype="float32")
    out = attach_stem(model=model, out=tmp_path / "out", layers=(1, 2), calibrate=text, dtype="float32", fit=0.05)
    fit = json.loads((out / "config.json").read_text())["calibration"]["fit"]
    assert sorted(fit["perplexity"]) == ["calibrated", "dense", "fitted"] and not fit["interrupted"]
    assert fit["steps"] == json.loads((out / "config.json").read_text())["trained_steps"] > 0
    assert "over dense" in capsys.readouterr().out
    for layer in (1, 2):
        assert not torch.equal(*(all_rows(pack / f"table-{layer}.safetensors") for pack in (plain, out)))


def test_an_interruption_keeps_the_best_so_far(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.monotonic()
    inner = fit_stem.fit_rows

    def interrupted(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return inner(*args)

    monkeypatch.setattr(fit_stem, "fit_rows", interrupted)
    before = signal.getsignal(signal.SIGINT)
    model = str(STORED / "model")
    out = attach_stem(model=model, out=tmp_path / "out", layers=(1, 2), calibrate=text, dtype="float32", fit=30)
    assert json.loads((out / "config.json").read_text())["calibration"]["fit"]["interrupted"]
    assert time.monotonic() - begun < 60 and signal.getsignal(signal.SIGINT) is before


def test_a_text_too_short_to_hold_some_out_is_refused_with_both_numbers() -> None:
    with pytest.raises(PackError, match="has 100 tokens and --fit needs 500"):
        Split.of(list(range(100)), 32, held_out=True)
    whole = Split.of(list(range(1000)), 300, held_out=True)
    assert (whole.choose, whole.report) == (
        [list(range(400, 450)), list(range(900, 950))],
        [list(range(450, 500)), list(range(950, 1000))],
    )
    assert sorted(token for part in (whole.fit, whole.choose, whole.report) for piece in part for token in piece) == (
        list(range(1000))
    )


def test_fit_without_stem_is_refused(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from server.errors import SettingsError

    result = CliRunner().invoke(app, ["attach", "x", "--out", str(tmp_path / "o"), "--fit", "2"])
    assert isinstance(result.exception, SettingsError) and "--fit is 2 minutes" in str(result.exception)
