"""Engines on the device path read the memories of the engine that computes eagerly: token for token, in any mixture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.stem_rows import gated_rows
from server.memory.addressing import windows_of
from server.memory.edits import EditedRows
from server.runtime.engine import Engine
from server.runtime.messages import SamplingParams, Submit
from server.runtime.overlap import OverlappedEngine
from tests.engines import engine_on, outputs_of, tokens_of
from tests.memory.stems import save_stem

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
HIDDEN, INNER = 64, 160


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels by their torch references: through Triton's interpreter a step takes seconds (tests/kernels)."""
    monkeypatch.setattr("kernels.language.interpreting", False)


@pytest.fixture(scope="module")
def packs(pack_a: Path, pack_b: Path, tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> list[str]:
    """Two Engram packs on layers 1 and 3, a STEM pack on layers 1 and 2."""
    generator = torch.Generator().manual_seed(7)
    tables = {layer: torch.randn(49152, INNER, generator=generator) for layer in (1, 2)}
    stem = save_stem(tmp_path_factory.mktemp("packs") / "stem", tables, HIDDEN)
    return [f"a={pack_a}", f"b={pack_b}", f"s={stem}"]


def both(folder: Path, packs: list[str], **flags: Any) -> tuple[Engine, OverlappedEngine]:
    """The same engine, eager and on the device path."""
    sizes: dict[str, Any] = {"block_size": 8, "max_num_seqs": 4, "max_num_batched_tokens": 24, **flags}
    eager, device = (engine_on(str(folder), memory=tuple(packs), device_path=path, **sizes) for path in (False, True))
    assert isinstance(device, OverlappedEngine)
    return eager, device


def workload(names: list[tuple[str, ...]]) -> list[Submit]:
    """Prompts of several lengths, some with a common start; each names the packs it reads."""
    generator = np.random.default_rng(3)
    shared = tuple(generator.integers(100, 4000, 18).tolist())
    prompts = [shared[: 3 * i] + tuple(generator.integers(100, 4000, 3 + 5 * i).tolist()) for i in range(len(names))]
    return [Submit(f"r{i}", prompts[i], GREEDY, packs) for i, packs in enumerate(names)]


def answers(engine: Engine, submits: list[Submit]) -> dict[tuple[str, int], list[int]]:
    return {key: tokens_of(told) for key, told in outputs_of(engine, submits).items()}


@pytest.mark.parametrize("placement", ["device", "pinned", "mapped"])
def test_whoever_reads_which_pack_gets_the_tokens_of_the_eager_engine(
    tiny_llama_folder: Path, packs: list[str], placement: str
) -> None:
    submits = workload([("a", "s"), ("s",), ("b", "s"), ("a", "b", "s"), ("s",), ("b", "a", "s")])
    eager, device = both(tiny_llama_folder, packs, placement=(placement,))
    expected = answers(eager, submits)
    assert len({tuple(tokens) for tokens in expected.values()}) == len(submits)
    assert answers(device, submits) == expected
    assert device.launched_ahead > 10


def test_a_step_waits_for_the_hosts_rows_only_if_somebody_reads_them(tiny_llama_folder: Path, packs: list[str]) -> None:
    submits = workload([("a",), (), ("a", "b")])
    eager, device = both(tiny_llama_folder, packs[:2], placement=("mapped",))
    assert answers(device, submits) == answers(eager, submits)
    read = rows_read(device)
    assert read == rows_read(eager) > 0
    assert answers(device, workload([(), ()])) == answers(eager, workload([(), ()]))
    assert rows_read(device) == read and device.launched_ahead >= 20


@pytest.mark.parametrize("placement", ["device", "pinned", "mapped"])
def test_the_rows_of_repeated_tokens_are_multiplied_where_they_are(
    tiny_llama_folder: Path, packs: list[str], placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its up-projection a block's product takes a row per distinct token and the way back to tokens."""
    shapes: list[tuple[int, int]] = []

    def noted(gate: torch.Tensor, rows: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        shapes.append((len(gate), len(rows)))
        return gated_rows(gate, rows, inverse)

    monkeypatch.setattr("server.models.fused.gated_rows", noted)
    prompt = (5, 9, 5, 5, 9, 5, 5, 5)
    submits = [Submit("x", prompt, GREEDY, ("s",))]
    eager, device = both(tiny_llama_folder, packs[2:], placement=(placement,))
    assert answers(device, submits) == answers(eager, submits)
    decoded = [shape for shape in shapes if shape[0] == 1]
    assert len(decoded) >= 2 * 11 and set(decoded) == {(1, 1)}
    assert ((len(prompt), 2) in shapes) == (placement != "device")  # a table on the device is looked up by token


def rows_read(engine: Engine) -> int:
    assert engine.runner.memories is not None
    return sum(counters.rows for counters in engine.runner.memories.counters())


def test_edits_are_read_by_those_who_see_them(tiny_llama_folder: Path, packs: list[str]) -> None:
    engines = both(tiny_llama_folder, packs[:1], placement=("pinned",))
    submits = workload([("a",), ("a",)])
    plain = answers(engines[0], submits)
    for engine in engines:
        memories = engine.runner.memories
        assert memories is not None
        pack, edited = memories.packs[0], {}
        # of the tokens the answer will consist of, so that decode steps read edited rows
        ids = np.array((*submits[1].token_ids, *plain["r1", 0]))
        for layer, (rows, _) in pack.address(*windows_of(ids, memories.window)).items():
            chosen = np.unique(rows)
            values = np.random.default_rng(1).normal(0, 0.5, (len(chosen), pack.tables[layer].dim))
            edited[pack.content, layer] = EditedRows(chosen, values.astype(np.float32))
        engine.update_edits("someone", edited)
    asked = [Submit(f"e{i}", submit.token_ids, GREEDY, ("a",), tenant="someone") for i, submit in enumerate(submits)]
    expected = answers(engines[0], [*submits, *asked])
    assert expected["e1", 0] != plain["r1", 0] == expected["r1", 0]
    assert answers(engines[1], [*submits, *asked]) == expected


@pytest.fixture(scope="module")
def engines(tiny_llama_folder: Path, packs: list[str]) -> tuple[Engine, OverlappedEngine]:
    return both(tiny_llama_folder, packs, placement=("pinned", "b=mapped", "s=mapped"), keep_up_projection=True)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_workload_reads_the_rows_of_the_eager_engine(
    engines: tuple[Engine, OverlappedEngine], data: st.DataObject
) -> None:
    """Requests come, stop at a token and are given up while steps are in flight; some sample on the host."""
    eager, device = engines
    submits = []
    for i in range(data.draw(st.integers(1, 6))):
        prompt = tuple(data.draw(st.lists(st.integers(100, 130), min_size=1, max_size=20)))
        names = tuple(name for name in ("a", "b", "s") if data.draw(st.booleans()))
        params = SamplingParams(
            max_tokens=data.draw(st.integers(1, 12)),
            temperature=data.draw(st.sampled_from((0.0, 1.0))),
            seed=i,
            stop_token_ids=frozenset(data.draw(st.sets(st.integers(0, 49151), max_size=3))),
            logprobs=data.draw(st.sampled_from((None, None, None, 1))),
        )
        submits.append(Submit(f"r{i}", prompt, params, names))
    expected = {}
    for submit in submits:
        expected |= answers(eager, [submit])
    if data.draw(st.booleans()):  # a token that is sure to come stops the first request
        first = expected["r0", 0]
        stop = data.draw(st.sampled_from(first))
        submits[0] = replace(submits[0], params=replace(submits[0].params, stop_token_ids=frozenset({stop})))
        expected["r0", 0] = first[: first.index(stop) + 1]
    arrivals = {i: data.draw(st.integers(0, 5)) for i in range(len(submits))}
    victim, moment = data.draw(st.sampled_from((None, *arrivals))), data.draw(st.integers(6, 12))
    found: dict[tuple[str, int], list[int]] = {key: [] for key in expected}
    step = 0
    while not device.idle or step <= max(arrivals.values()):
        for i, submit in enumerate(submits):
            if arrivals[i] == step:
                device.submit(submit)
        if step == moment and victim is not None:
            device.abort(f"r{victim}")
        for output in device.step().outputs:
            assert output.finish_reason != "error", output.error
            found[output.request_id, output.index] += output.token_ids
        device.scheduler.check()
        step += 1
    for (name, index), tokens in expected.items():
        told = found[name, index]
        assert told == (tokens[: len(told)] if name == f"r{victim}" else tokens)
