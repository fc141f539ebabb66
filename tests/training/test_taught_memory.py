"""What training computes is what the server computes; a fresh memory changes nothing, not a bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from server.models.source import ModelSource
from server.training.activations import States
from server.training.data import Example
from server.training.engram import TaughtEngram
from server.training.frozen import Frozen
from server.training.layout import Layout
from server.training.loop import Part, Recipe, median_lengths
from server.training.memory import addresses, joined
from server.training.start import begin_fresh, build_trainer, open_to_teach, teachable
from server.training.write import write_taught
from tests.engines import engine_on, logits_of

LENGTHS = (17, 5, 30, 5)


@pytest.fixture
def sequences(source: ModelSource) -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    return [generator.integers(0, source.config.vocab_size, length) for length in LENGTHS]


@pytest.fixture
def memory(source: ModelSource, frozen: Frozen, fresh_pack: Path, sequences: list[np.ndarray]) -> TaughtEngram:
    memory = teachable(
        open_to_teach(fresh_pack, source, frozen.device), frozen, [Example(ids, 1) for ids in sequences], []
    )
    assert isinstance(memory, TaughtEngram)
    return memory


def disturb(memory: TaughtEngram) -> None:
    """As if it had been taught: every parameter and row is something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for rows in memory.rows.values():
            rows.values.add_(torch.randn(rows.values.shape, generator=generator) * 0.3)


def logits_with(frozen: Frozen, memory: TaughtEngram | None, sequences: list[np.ndarray]) -> torch.Tensor:
    layout = Layout.of(sequences, frozen.device)
    step = memory.look(layout, joined(memory.places(sequences))) if memory is not None else None
    with torch.no_grad():
        return frozen.logits(frozen.run(frozen.embed(layout), layout, 0, step))


def test_training_begins_at_the_bare_backbones_logits_bit_for_bit(
    frozen: Frozen, memory: TaughtEngram, sequences: list[np.ndarray]
) -> None:
    bare = logits_with(frozen, None, sequences)
    assert torch.equal(logits_with(frozen, memory, sequences), bare)
    begin_fresh(memory, {1: 1.0, 3: 1.0}, seed=0)
    assert torch.equal(logits_with(frozen, memory, sequences), bare)


def test_the_first_step_of_a_trainer_starts_there_too(
    source: ModelSource, frozen: Frozen, fresh_pack: Path, sequences: list[np.ndarray], tmp_path: Path
) -> None:
    examples = [Example(ids, 1) for ids in sequences]
    opened = open_to_teach(fresh_pack, source, frozen.device)
    trainer, _, _ = build_trainer(frozen, opened, examples, [], [], Recipe(epochs=1), tmp_path, "", lambda tokens: None)
    members = np.arange(len(examples))
    layout = trainer.taught.layout(members, frozen.device)
    step = trainer.memory.look(layout, trainer.taught.rows(members))
    cached = trainer.taught.states[trainer.first].take(members, frozen.device)
    with torch.no_grad():
        logits = frozen.logits(frozen.run(cached, layout, trainer.first, step))
    assert torch.equal(logits, logits_with(frozen, None, sequences))


def test_the_frozen_backbone_agrees_with_transformers(
    tiny_llama_folder: Path, frozen: Frozen, sequences: list[np.ndarray]
) -> None:
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(tiny_llama_folder).float().eval()
    with torch.no_grad():
        expected = torch.cat([reference(torch.from_numpy(ids)[None]).logits[0] for ids in sequences])
    # fp32 sums in another order; the design's tolerance for logits
    torch.testing.assert_close(logits_with(frozen, None, sequences), expected, rtol=0, atol=2e-4)


def test_what_is_taught_is_what_the_engine_serves(
    source: ModelSource,
    frozen: Frozen,
    fresh_pack: Path,
    memory: TaughtEngram,
    sequences: list[np.ndarray],
    tiny_llama_folder: Path,
    tmp_path: Path,
) -> None:
    disturb(memory)
    folder = tmp_path / "taught"
    folder.mkdir()
    write_taught(folder, open_to_teach(fresh_pack, source, frozen.device), memory, "float32", 1, {})
    engine = engine_on(str(tiny_llama_folder), memory=(str(folder),))
    for ids in sequences:
        served = logits_of(engine, tuple(ids.tolist()), ("taught",))
        # fp32 sums in another order; the design's tolerance for logits
        torch.testing.assert_close(logits_with(frozen, memory, [ids]), served, rtol=0, atol=2e-4)


def test_padding_and_neighbours_in_a_batch_change_nothing(
    frozen: Frozen, memory: TaughtEngram, sequences: list[np.ndarray]
) -> None:
    disturb(memory)
    together = logits_with(frozen, memory, sequences)
    apart = torch.cat([logits_with(frozen, memory, [ids]) for ids in sequences])
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-4)  # fp32 sums in another order


def test_gradients_are_those_of_finite_differences(
    frozen: Frozen, memory: TaughtEngram, sequences: list[np.ndarray]
) -> None:
    """Of one row value and one projection weight, through the whole backbone."""
    disturb(memory)
    layout = Layout.of(sequences, frozen.device)
    places = joined(memory.places(sequences))
    weights = torch.randn(layout.tokens, frozen.config.hidden_size, generator=torch.Generator().manual_seed(1))

    def loss() -> torch.Tensor:
        step, _ = memory.read(layout, places)
        leaves.append(step.leaves[1])
        return (frozen.run(frozen.embed(layout), layout, 0, step) * weights).sum() / layout.tokens

    leaves: list = []
    loss().backward()
    distinct, gradient = leaves[0].distinct, leaves[0].values.grad
    row = int(gradient.abs().sum(1).argmax())
    column = int(gradient[row].abs().argmax())
    projection = memory.modules[1].key_value.weight
    at = divmod(int(projection.grad.abs().argmax()), projection.shape[1])
    cases = (
        (memory.rows[1].values, (int(distinct[row]), column), gradient[row, column]),
        (projection.data, at, projection.grad[at].clone()),
    )
    for tensor, index, expected in cases:
        size = 1e-2
        sides = []
        for sign in (1, -1):
            tensor[index] += sign * size
            sides.append(float(loss().detach()))
            tensor[index] -= sign * size
        # central differences in fp32: an error of size² and one of rounding over size
        assert (sides[0] - sides[1]) / (2 * size) == pytest.approx(float(expected), rel=0.03)


def test_the_backbone_never_gets_a_gradient(frozen: Frozen, memory: TaughtEngram, sequences: list[np.ndarray]) -> None:
    step, _ = memory.read(Layout.of(sequences, frozen.device), joined(memory.places(sequences)))
    frozen.run(frozen.embed(step.layout), step.layout, 0, step).sum().backward()
    assert all(parameter.grad is None for parameter in frozen.decoder.parameters())


def test_what_the_memory_adds_is_what_counts_as_stray(
    frozen: Frozen, memory: TaughtEngram, sequences: list[np.ndarray]
) -> None:
    disturb(memory)
    layout = Layout.of(sequences, frozen.device)
    state = frozen.embed(layout)
    rows = memory.look(layout, joined(memory.places(sequences))).rows[1]
    added = memory.added(1, state, rows, layout).double()
    expected = added.norm(dim=1) ** 2
    found = memory.stray(1, state, rows, layout, frozen).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)  # fp32 against float64


def test_a_part_hands_out_layout_and_rows_in_the_same_order(memory: TaughtEngram, sequences: list[np.ndarray]) -> None:
    part = Part([Example(ids, 1) for ids in sequences], memory.places(sequences), {})
    members = np.array([2, 0])
    assert part.layout(members, torch.device("cpu")).tokens == LENGTHS[2] + LENGTHS[0]
    assert torch.equal(part.rows(members)[1][: LENGTHS[2]], memory.places([sequences[2]])[0][1])


def test_the_scale_of_what_counts_as_stray_is_not_a_first_tokens_long_stream(
    frozen: Frozen, sequences: list[np.ndarray], tmp_path: Path
) -> None:
    examples = [Example(ids, 1) for ids in sequences]
    states = States(tmp_path / "states", examples, 2, torch.float32)
    states.values.fill_(1.0)
    states.values[states.starts[:-1]] = 1000.0
    found = median_lengths(Part(examples, [], {7: states}), frozen.device)
    assert found == {7: pytest.approx(2.0)}


def test_rows_of_a_prompts_first_token_are_not_taught(
    source: ModelSource, frozen: Frozen, fresh_pack: Path, sequences: list[np.ndarray]
) -> None:
    opened = open_to_teach(fresh_pack, source, frozen.device)
    ids = sequences[0]
    own = addresses(opened.addresser, ids)[1]
    after_a_prompt = teachable(opened, frozen, [Example(ids, 5)], []).rows[1]
    from_the_start = teachable(opened, frozen, [Example(ids, 1)], []).rows[1]
    assert set(own[1:].ravel()) == set(after_a_prompt.taught)
    assert set(own.ravel()) == set(from_the_start.taught)
