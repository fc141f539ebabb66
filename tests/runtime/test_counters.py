"""The memories' counters cross the pipe now and then, and are whole when the engine rests."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.commands.attach import attach
from server.runtime import engine as engines
from server.runtime.messages import SamplingParams, StepOutputs, Submit
from tests.engines import engine_on


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "between"), [(3600.0, {None}), (0.0, {(1, 2)})])
def test_steps_leave_counters_out_until_they_are_due_or_the_engine_is_idle(
    seconds: float, between: set[object], tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach(
        model=str(tiny_llama_folder),
        out=tmp_path / "pack",
        layers=(1, 2),
        rows=500,
        dim=8,
        heads=2,
        orders=(2, 3),
        seed=0,
        dtype="bfloat16",
    )
    monkeypatch.setattr(engines, "COUNT_SECONDS", seconds)
    engine = engine_on(str(tiny_llama_folder), memory=(str(tmp_path / "pack"),))
    engine.submit(Submit("r", (1, 2, 3), SamplingParams(max_tokens=6, ignore_eos=True), tuple(engine.packs)))
    steps: list[StepOutputs] = []
    while not engine.idle:
        steps.append(engine.step())
    layers = [tuple(c.layer for c in step.stats.memory) if step.stats.counted else None for step in steps]
    assert layers[0] == layers[-1] == (1, 2) and set(layers[1:-1]) == between
    assert steps[-1].stats.memory == engine.stats().memory
    assert {c.rows for c in steps[-1].stats.memory} == {(3 + 5) * 2 * 2}  # two orders of two heads per token
