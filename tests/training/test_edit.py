"""A text taught to a memory that knows already: learnt by its own rows alone, within bounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from server.models.source import ModelSource
from server.training.data import Example
from server.training.edit import Edit, teach_text
from server.training.engram import TaughtEngram
from server.training.frozen import Frozen
from server.training.memory import addresses
from server.training.start import begin_fresh, open_to_teach, teachable

Teach = Callable[..., Edit]


@pytest.fixture
def example(source: ModelSource) -> Example:
    encode = source.tokenizer.encode
    prompt = encode("The lighthouse keeper is called")
    return Example(np.array([*prompt, *encode(" Anneliese")]), len(prompt))


@pytest.fixture
def memory(source: ModelSource, frozen: Frozen, fresh_pack: Path, example: Example) -> TaughtEngram:
    memory = teachable(open_to_teach(fresh_pack, source, frozen.device), frozen, [example], [])
    assert isinstance(memory, TaughtEngram)
    begin_fresh(memory, {1: 1.0, 3: 1.0}, seed=0)
    return memory


def test_it_is_learnt_and_reported(frozen: Frozen, memory: TaughtEngram, example: Example) -> None:
    edit = teach_text(frozen, memory, [example], hold=0.0)
    assert edit.learnt
    assert edit.loss_after < 0.2 * edit.loss_before
    assert 0 < edit.steps <= 60


def test_only_rows_that_the_text_addresses_are_in_the_result(
    frozen: Frozen, memory: TaughtEngram, example: Example
) -> None:
    edit = teach_text(frozen, memory, [example], steps=2)
    expected = addresses(memory.addresser, example.ids)
    for layer, (ids, values) in edit.rows.items():
        assert ids.tolist() == sorted(set(expected[layer][1:].ravel().tolist()))
        assert values.shape == (len(ids), 16)


def test_the_modules_stay_as_they_are(frozen: Frozen, memory: TaughtEngram, example: Example) -> None:
    before = [parameter.clone() for parameter in memory.parameters()]
    teach_text(frozen, memory, [example], steps=3)
    assert all(torch.equal(a, b) for a, b in zip(before, memory.parameters(), strict=True))


def test_it_stops_when_told_to(frozen: Frozen, memory: TaughtEngram, example: Example) -> None:
    class Enough(Exception):
        pass

    calls = []

    def between() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Enough

    with pytest.raises(Enough):
        teach_text(frozen, memory, [example], between=between)


def test_holding_on_keeps_rows_nearer_to_where_they_were(
    source: ModelSource, frozen: Frozen, fresh_pack: Path, example: Example
) -> None:
    moved = []
    for hold in (0.0, 100.0):
        memory = teachable(open_to_teach(fresh_pack, source, frozen.device), frozen, [example], [])
        assert isinstance(memory, TaughtEngram)
        begin_fresh(memory, {1: 1.0, 3: 1.0}, seed=0)
        edit = teach_text(frozen, memory, [example], steps=20, hold=hold)
        moved.append(sum(float(values.pow(2).sum()) for _, values in edit.rows.values()))
    assert moved[1] < moved[0]
