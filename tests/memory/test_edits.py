"""Edits of rows: as if the table itself were another, for those who see them and for nobody else."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from server.memory.addressing import windows_of
from server.memory.edits import Edited, EditedRows, Overlay, composed
from server.memory.identity import content_key
from server.runtime.engine import Engine
from server.runtime.messages import SamplingParams, Submit
from tests.engines import engine_on, outputs_of, tokens_of

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
SCORED = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=True)


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    generator = np.random.default_rng(3)
    return [tuple(generator.integers(100, 4000, 40).tolist()) for _ in range(3)]


@pytest.fixture(scope="module")
def engine(tiny_llama_folder: Path, pack_a: Path) -> Engine:
    return engine_on(str(tiny_llama_folder), memory=(f"a={pack_a}",), block_size=8)


def edits_of(
    engine: Engine, prompt: tuple[int, ...], seed: int, share: float = 1.0
) -> dict[tuple[str, int], EditedRows]:
    """Other values for a share of the rows that the prompt addresses."""
    memories = engine.runner.memories
    assert memories is not None
    pack = memories.packs[0]
    generator = np.random.default_rng(seed)
    edited = {}
    for layer, (ids, _) in pack.address(*windows_of(np.array(prompt), memories.window)).items():
        distinct = np.unique(ids)
        chosen = distinct[generator.random(len(distinct)) < share]
        values = generator.normal(0, 0.5, (len(chosen), pack.tables[layer].dim)).astype(np.float32)
        if len(chosen):
            edited[pack.content, layer] = EditedRows(chosen, values)
    return edited


def edited_copy(pack: Path, edits: Edited, out: Path) -> Path:
    """The reference: a pack whose tables hold the edited values."""
    shutil.copytree(pack, out)
    for (_, layer), rows in edits.items():
        file = out / f"table-{layer}.safetensors"
        tensors = load_file(file)
        tensors["table"][torch.from_numpy(rows.ids)] = torch.from_numpy(rows.values)
        save_file(tensors, file)
    return out


def scores(engine: Engine, prompt: tuple[int, ...], tenant: str = "") -> list[float]:
    """Log-probabilities of the prompt's tokens, exact: any change of a row that is read shows in them."""
    outputs = outputs_of(engine, [Submit("s", prompt, SCORED, ("a",), tenant=tenant)])["s", 0]
    assert outputs[0].prompt_logprobs is not None
    return [entry.logprob for entry in outputs[0].prompt_logprobs if entry is not None]


def answer(engine: Engine, prompt: tuple[int, ...], tenant: str = "") -> list[int]:
    return tokens_of(outputs_of(engine, [Submit("x", prompt, GREEDY, ("a",), tenant=tenant)])["x", 0])


@pytest.fixture(autouse=True)
def without_edits(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        request.getfixturevalue("engine").edits.clear()


def test_an_overlay_gives_what_an_edited_table_gives(
    engine: Engine, tiny_llama_folder: Path, pack_a: Path, prompts: list[tuple[int, ...]], tmp_path: Path
) -> None:
    edits = edits_of(engine, prompts[0], 1, share=0.5)
    bare = scores(engine, prompts[0], "t")
    engine.update_edits("t", edits)
    reference = engine_on(str(tiny_llama_folder), memory=(f"a={edited_copy(pack_a, edits, tmp_path / 'a')}",))
    assert scores(engine, prompts[0], "t") == scores(reference, prompts[0]) != bare
    assert answer(engine, prompts[0], "t") == answer(reference, prompts[0])


@pytest.mark.parametrize("placement", ["device", "pinned", "mapped"])
def test_edits_read_the_same_wherever_the_table_lives_and_hot_rows_stay_base_rows(
    tiny_llama_folder: Path, pack_a: Path, prompts: list[tuple[int, ...]], engine: Engine, placement: str
) -> None:
    edits = edits_of(engine, prompts[0], 1, share=0.5)
    engine.update_edits("t", edits)
    flags = {} if placement == "device" else {"device_cache": 1 << 20}
    placed = engine_on(str(tiny_llama_folder), memory=(f"a={pack_a}",), placement=(placement,), hot_list="off", **flags)
    bare = scores(placed, prompts[0])
    placed.update_edits("t", edits)
    for _ in range(3):  # cold, then from the cache
        assert scores(placed, prompts[0], "t") == scores(engine, prompts[0], "t")
        assert scores(placed, prompts[0]) == bare


def test_taking_an_edit_back_gives_the_same_bits_as_before(engine: Engine, prompts: list[tuple[int, ...]]) -> None:
    before = scores(engine, prompts[0], "t"), answer(engine, prompts[0], "t")
    engine.update_edits("t", edits_of(engine, prompts[0], 1))
    assert scores(engine, prompts[0], "t") != before[0]
    answer(engine, prompts[0], "t")
    engine.update_edits("t", {})
    assert (scores(engine, prompts[0], "t"), answer(engine, prompts[0], "t")) == before


def test_everyones_edits_are_seen_by_all_and_a_tenants_own_count_before_them(
    engine: Engine, prompts: list[tuple[int, ...]]
) -> None:
    everyones, own = edits_of(engine, prompts[0], 1), edits_of(engine, prompts[0], 2)
    engine.update_edits("t", own)
    alone = scores(engine, prompts[0], "t")
    engine.update_edits("", everyones)
    assert scores(engine, prompts[0], "other") == scores(engine, prompts[0]) != alone
    assert scores(engine, prompts[0], "t") == alone


def test_tenants_in_one_batch_and_in_the_prefix_cache_never_see_each_other(
    tiny_llama_folder: Path, pack_a: Path, prompts: list[tuple[int, ...]]
) -> None:
    """Every tenant sends every prompt, several times, forks included; the expected answers come from tenants alone."""
    tenants = ("", "t1", "t2", "t3")
    alone = {}
    apart = engine_on(str(tiny_llama_folder), memory=(f"a={pack_a}",), block_size=8, prefix_cache="off")
    for number, tenant in enumerate(tenants):
        apart.edits.clear()
        if tenant:
            apart.update_edits(tenant, edits_of(apart, prompts[0], number))
        for prompt in prompts:
            alone[tenant, prompt] = answer(apart, prompt, tenant)
    assert len({tuple(alone[tenant, prompts[0]]) for tenant in tenants}) == len(tenants)

    shared = engine_on(str(tiny_llama_folder), memory=(f"a={pack_a}",), block_size=8)
    for number, tenant in enumerate(tenants):
        if tenant:
            shared.update_edits(tenant, edits_of(shared, prompts[0], number))
    for _ in range(3):
        asked = [(tenant, prompt) for prompt in prompts for tenant in tenants]
        submits = [
            Submit(f"{i}", prompt, GREEDY, ("a",), tenant=tenant, n=2) for i, (tenant, prompt) in enumerate(asked)
        ]
        collected = outputs_of(shared, submits)
        for i, pair in enumerate(asked):
            for child in range(2):
                assert tokens_of(collected[f"{i}", child]) == alone[pair], pair
    assert shared.scheduler.prefix_hits > 0


def test_a_running_sequence_keeps_what_it_started_with_through_preemption(
    tiny_llama_folder: Path, pack_a: Path, prompts: list[tuple[int, ...]]
) -> None:
    """Blocks for two of three sequences at full length: some are preempted and computed again under their old view."""
    long = replace(GREEDY, max_tokens=60)
    flags = {"memory": (f"a={pack_a}",), "block_size": 8, "max_model_len": 112}
    roomy = engine_on(str(tiny_llama_folder), **flags)
    edits = edits_of(roomy, prompts[0], 1)
    roomy.update_edits("t", edits)
    expected = [tokens_of(outputs_of(roomy, [Submit("x", p, long, ("a",), tenant="t")])["x", 0]) for p in prompts]

    tight = engine_on(str(tiny_llama_folder), **flags)
    assert tight.pool.allocate(tight.pool.usable - 26) is not None  # what is left: two sequences of 13 blocks
    tight.update_edits("t", edits)
    for number, prompt in enumerate(prompts):
        tight.submit(Submit(f"r{number}", prompt, long, ("a",), tenant="t"))
    collected: dict[str, list[int]] = {}
    while not tight.idle:
        for output in tight.step().outputs:
            collected.setdefault(output.request_id, []).extend(output.token_ids)
        tight.update_edits("t", edits_of(tight, prompts[1], tight.steps))  # changes while all run
    assert tight.scheduler.preemptions > 0
    assert [collected[f"r{number}"] for number in range(3)] == expected


def test_edits_of_another_pack_leave_the_view_as_it_was(engine: Engine, prompts: list[tuple[int, ...]]) -> None:
    before = engine.view(("a",), b"", (), "t")
    engine.update_edits("t", {("0" * 32, 1): EditedRows(np.array([1, 2]), np.zeros((2, 16), np.float32))})
    assert engine.view(("a",), b"", (), "t") == before
    engine.update_edits("t", edits_of(engine, prompts[0], 1))
    assert engine.view(("a",), b"", (), "t").key != before.key
    assert engine.view(("a",), b"", (), "u") == before
    assert engine.view((), b"salt", (), "t").overlays == ()


rows = st.dictionaries(st.integers(0, 30), st.floats(-4, 4, width=32), max_size=12)


@given(edits=st.lists(rows, max_size=5), ids=st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=3), max_size=9))
@hypothesis_settings(max_examples=200)
def test_any_edits_of_any_lookup_are_what_editing_the_table_would_give(
    edits: list[dict[int, float]], ids: list[list[int]]
) -> None:
    table = np.arange(31, dtype=np.float32)[:, None].repeat(2, 1)
    expected, cell = table.copy(), ("pack", 1)
    for edit in edits:
        for row, value in edit.items():
            expected[row] = value
    made = [
        {
            cell: EditedRows(
                np.array(sorted(edit), np.int64), np.array([[edit[r]] * 2 for r in sorted(edit)], np.float32)
            )
        }
        for edit in edits
        if edit
    ]
    asked = np.array(ids, np.int64).reshape(-1, 3)
    read = table[asked].reshape(-1, 2)
    overlay = Overlay(composed(made))
    found = overlay.patch(*cell, asked)
    if found is not None:
        read[found[0]] = found[1]
    assert np.array_equal(read, expected[asked].reshape(-1, 2))
    assert overlay.id == Overlay(composed([composed(made)])).id


def test_a_pack_is_known_by_its_content_not_by_its_place(
    pack_a: Path, pack_b: Path, tmp_path: Path, make_pack: Callable[..., Path]
) -> None:
    copy = shutil.copytree(pack_a, tmp_path / "copy")
    assert content_key(copy) == content_key(pack_a) != content_key(pack_b)
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"trained_steps": 0', '"trained_steps": 9'))
    assert content_key(copy) != content_key(pack_a)
