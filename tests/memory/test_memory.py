"""A served memory gives the logits of an independent float64 implementation, however its tokens were scheduled."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from server.errors import StepFailed, TableError
from server.runtime.engine import Engine
from server.runtime.messages import SamplingParams, Submit
from tests.engines import drive, engine_on, logits_of, outputs_of, tokens_of
from tests.memory.reference import ReferenceEngram, reference_logits

# fp32 against float64 through four layers; logits reach about 60 here and fp32 carries 7 digits.
TOLERANCE = 1e-3
BLOCK = 8


@pytest.fixture
def engine(tiny_llama_folder: Path, pack_a: Path, pack_b: Path) -> Callable[..., Engine]:
    def make(**flags: Any) -> Engine:
        memory = (f"a={pack_a}", f"b={pack_b}")
        return engine_on(str(tiny_llama_folder), memory=memory, block_size=BLOCK, **flags)

    return make


def last_logits(engine: Engine, submit: Submit) -> torch.Tensor:
    """The logits [V] from which the first token of `submit` was sampled; prefix hits are allowed."""
    seen: list[torch.Tensor] = []
    model = engine.runner.model
    inner = model.logits
    model.logits = lambda hidden: seen.append(inner(hidden)) or seen[-1].clone()  # type: ignore[method-assign]
    try:
        outputs_of(engine, [submit])
    finally:
        del model.logits
    return seen[0][0]


ONE = SamplingParams(max_tokens=1, temperature=0)


def test_a_fresh_pack_changes_no_bit(tiny_llama_folder: Path, fresh_pack: Path, prompt: tuple[int, ...]) -> None:
    with_pack = engine_on(str(tiny_llama_folder), memory=(f"fresh={fresh_pack}",))
    bare = engine_on(str(tiny_llama_folder))
    assert torch.equal(logits_of(with_pack, prompt, ("fresh",)), logits_of(bare, prompt))
    rows = with_pack.stats().memory
    assert [(c.layer, c.rows) for c in rows] == [(1, 8 * 90), (3, 8 * 90)]  # every token read its rows all the same


@pytest.mark.parametrize("budget", [1, 7, 32, 512])
def test_chunks_of_any_size_match_the_reference(
    engine: Callable[..., Engine], backbone: Any, reference_a: ReferenceEngram, prompt: tuple[int, ...], budget: int
) -> None:
    expected = reference_logits(backbone, [reference_a], prompt)
    found = logits_of(engine(max_num_batched_tokens=budget), prompt, ("a",))
    assert torch.allclose(found.double(), expected, atol=TOLERANCE)
    bare = reference_logits(backbone, [], prompt)
    assert (expected - bare).abs().max() > 1  # the memory matters in this test


def test_prefetch_off_gives_the_same_bits(engine: Callable[..., Engine], prompt: tuple[int, ...]) -> None:
    assert torch.equal(logits_of(engine(prefetch="off"), prompt, ("a",)), logits_of(engine(), prompt, ("a",)))


@pytest.mark.parametrize("prefetch", ["on", "off"])
def test_slow_rows_are_hinted_where_hints_are_followed_and_not_hashed_in_vain(
    engine: Callable[..., Engine], prompt: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, prefetch: str
) -> None:
    monkeypatch.setattr("server.memory.memories.HINT_SECONDS", -1.0)  # every fetch counts as slow
    made = engine(prefetch=prefetch)
    hinted = []
    memories = made.runner.memories
    inner = memories.hint  # type: ignore[union-attr]
    memories.hint = lambda *args: hinted.append(len(args[0])) or inner(*args)  # type: ignore
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    outputs_of(made, [Submit("x", prompt[:9], params, ("a",))])
    assert bool(hinted) == (prefetch == "on")


def test_two_packs_on_one_layer_add(
    engine: Callable[..., Engine],
    backbone: Any,
    reference_a: ReferenceEngram,
    reference_b: ReferenceEngram,
    prompt: tuple[int, ...],
) -> None:
    expected = reference_logits(backbone, [reference_a, reference_b], prompt)
    assert torch.allclose(logits_of(engine(), prompt, ("a", "b")).double(), expected, atol=TOLERANCE)


def test_decoded_tokens_match_the_reference(
    engine: Callable[..., Engine], backbone: Any, reference_a: ReferenceEngram, prompt: tuple[int, ...]
) -> None:
    """Greedy decoding token by token, eight forks apart by their prompt's length, in one batch with bare sequences."""
    made = engine()
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    submits = [Submit(f"on{i}", prompt[: 20 + i], params, ("a",)) for i in range(4)]
    submits += [Submit(f"off{i}", prompt[: 20 + i], params) for i in range(4)]
    answers = outputs_of(made, submits)
    for submit in submits:
        answer = tokens_of(answers[submit.request_id, 0])
        engrams = [reference_a] if submit.packs else []
        logits = reference_logits(backbone, engrams, (*submit.token_ids, *answer))[len(submit.token_ids) - 1 : -1]
        gap = logits.max(-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert gap.max() < TOLERANCE, submit.request_id


@pytest.mark.parametrize("beyond", range(10))
def test_a_prefix_hit_ending_anywhere_near_a_block_edge_changes_nothing(
    engine: Callable[..., Engine], backbone: Any, reference_a: ReferenceEngram, prompt: tuple[int, ...], beyond: int
) -> None:
    """The convolution looks 9 tokens back: across the edge of cached blocks, whose inputs it never computed."""
    made = engine()
    outputs_of(made, [Submit("first", prompt[: 5 * BLOCK], ONE, ("a",))])
    made.scheduler.prefix_hits = 0
    longer = prompt[: 5 * BLOCK + beyond]
    found = last_logits(made, Submit("second", longer, ONE, ("a",)))
    assert made.scheduler.prefix_hits == (5 if beyond else 4) * BLOCK
    assert torch.allclose(found.double(), reference_logits(backbone, [reference_a], longer)[-1], atol=TOLERANCE)


def test_memories_never_share_prefix_blocks(engine: Callable[..., Engine], prompt: tuple[int, ...]) -> None:
    views = [(), ("a",), ("b",), ("a", "b"), ("b", "a")]
    alone = [last_logits(engine(), Submit("x", prompt, ONE, packs)) for packs in views]
    made = engine()
    for turn in range(2):
        for packs, expected in zip(views, alone, strict=True):
            made.scheduler.prefix_hits = 0
            found = last_logits(made, Submit(f"{turn}{packs}", prompt, ONE, packs))
            assert torch.allclose(found, expected, atol=TOLERANCE)
            assert made.scheduler.prefix_hits == (88 if turn else 0)


def test_forks_read_the_same_rows(
    engine: Callable[..., Engine], backbone: Any, reference_a: ReferenceEngram, prompt: tuple[int, ...]
) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.5, seed=3, ignore_eos=True, logprobs=0)
    answers = outputs_of(engine(), [Submit("n", prompt[:37], params, ("a",), n=3)])
    for index in range(3):
        outputs = answers["n", index]
        answer = tokens_of(outputs)
        logits = reference_logits(backbone, [reference_a], (*prompt[:37], *answer))[36:-1]
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        found = [output.logprobs[0].logprob for output in outputs]
        assert np.allclose(found, expected.numpy(), atol=TOLERANCE)
    assert len({tuple(tokens_of(outputs)) for outputs in answers.values()}) == 3


def test_preemption_and_abort_leave_the_others_alone(engine: Callable[..., Engine], prompt: tuple[int, ...]) -> None:
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    submits = [Submit(f"r{i}", prompt[i : 30 + i], params, ("a",) if i % 2 else ("a", "b")) for i in range(5)]
    calm = outputs_of(engine(), submits)
    token_bytes = 4 * 2 * 2 * 16 * 4 + 4 * 64 * 4  # keys and values, and four convolution inputs, of one token
    made = engine(kv_bytes=18 * BLOCK * token_bytes, max_model_len=64)
    pressed: dict[tuple[str, int], list[int]] = {}
    for submit in [*submits, Submit("doomed", prompt[:40], params, ("b",))]:
        made.submit(submit)
    while not made.idle:
        for output in made.step().outputs:
            pressed.setdefault((output.request_id, output.index), []).extend(output.token_ids)
        made.scheduler.check()
        if made.steps == 4:
            made.abort("doomed")
    assert made.stats().preemptions_total > 0
    for key, outputs in calm.items():
        assert pressed[key] == tokens_of(outputs)


def table_offset(file: Path) -> tuple[int, int]:
    """Where the table's bytes begin in the file, and how many bytes a row takes."""
    with safe_open(file, framework="np") as opened:
        rows, dim = opened.get_slice("table").get_shape()
    return file.stat().st_size - rows * dim * 4, dim * 4


def test_one_flipped_byte_changes_exactly_the_requests_that_read_its_row(
    tiny_llama_folder: Path, pack_a: Path, mapping: list[int], prompt: tuple[int, ...], tmp_path: Path
) -> None:
    pack = tmp_path / "a"
    shutil.copytree(pack_a, pack)
    ids = list(prompt)
    read_by = [
        set(np.ravel(ReferenceEngram(pack, mapping).rows(ids[i : i + 12], 3)).tolist()) for i in range(0, 84, 12)
    ]
    victim = next(row for row in sorted(read_by[2]) if not any(row in r for j, r in enumerate(read_by) if j != 2))
    pieces = [prompt[i : i + 12] for i in range(0, 84, 12)]

    def all_logits() -> list[torch.Tensor]:
        made = engine_on(str(tiny_llama_folder), memory=(f"a={pack}",))
        return [logits_of(made, piece, ("a",)) for piece in pieces]

    before = all_logits()
    file = pack / "table-3.safetensors"
    start, row_bytes = table_offset(file)
    with open(file, "r+b") as opened:
        at = start + victim * row_bytes + 3  # the sign and high exponent bits of the row's first value
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 0x80]))
    after = all_logits()
    changed = [not torch.equal(x, y) for x, y in zip(before, after, strict=True)]
    assert changed == [i == 2 for i in range(len(pieces))]


@pytest.mark.parametrize("harm", ["cut", "touched", "replaced"])
def test_a_table_harmed_while_serving_fails_its_readers_and_nobody_else(
    tiny_llama_folder: Path, pack_a: Path, prompt: tuple[int, ...], tmp_path: Path, harm: str
) -> None:
    pack = tmp_path / "a"
    shutil.copytree(pack_a, pack)
    made = engine_on(str(tiny_llama_folder), memory=(f"a={pack}",))
    bare = drive(made, [prompt[:20]], max_tokens=10)[0]
    params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
    made.submit(Submit("reader", prompt[:20], params, ("a",)))
    made.submit(Submit("other", prompt[:20], params))
    collected = {"reader": [], "other": []}
    for step in range(30):
        if step == 4:
            file = pack / "table-1.safetensors"
            if harm == "cut":
                with open(file, "r+b") as opened:
                    opened.truncate(file.stat().st_size // 2)
            elif harm == "touched":
                file.touch()
            else:
                shutil.copy(file, tmp_path / "new")
                (tmp_path / "new").rename(file)
        for output in made.step().outputs:
            collected[output.request_id].append(output)
    assert collected["reader"][-1].finish_reason == "error"
    assert isinstance(collected["reader"][-1].error, TableError)
    assert "table-1.safetensors" in collected["reader"][-1].error.message
    assert tokens_of(collected["other"]) == bare
    assert "table-1" in (made.stats().table_fault or "")
    with pytest.raises(StepFailed, match="'a' cannot be read"):
        made.submit(Submit("late", prompt[:5], params, ("a",)))
    assert drive(made, [prompt[:20]], max_tokens=10)[0] == bare
