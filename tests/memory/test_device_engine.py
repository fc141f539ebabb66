"""Engines whose decode steps read hot rows on the device, and tables that fail under them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels import language
from server.cache import row_reader
from server.cache.in_place import read_in_place as in_place_of
from server.cache.row_table import RowTable
from server.runtime.device_path import DevicePath
from server.runtime.engine import Engine
from server.runtime.messages import SamplingParams, Submit
from server.runtime.overlap import OverlappedEngine
from tests.engines import engine_on, outputs_of, tokens_of
from tests.memory.stems import save_stem
from tests.memory.test_device_memory import HIDDEN

GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
PACKS = ("a", "b", "s")
Made = Callable[..., Engine]


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "interpreting", False)


@pytest.fixture(scope="module")
def stem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = torch.randn(49152, 160, generator=torch.Generator().manual_seed(5))
    return save_stem(tmp_path_factory.mktemp("stems") / "s", {2: table}, HIDDEN)


@pytest.fixture
def made(tiny_llama_folder: Path, pack_a: Path, pack_b: Path, stem: Path) -> Iterator[Made]:
    opened: list[Engine] = []

    def make(device: bool, **flags: Any) -> Engine:
        chosen = {"placement": ("pinned",), "keep_up_projection": True, "hot_list": "off", "block_size": 8, **flags}
        memory = tuple(f"{name}={folder}" for name, folder in zip(PACKS, (pack_a, pack_b, stem), strict=True))
        engine = engine_on(str(tiny_llama_folder), device_path=device, memory=memory, **chosen)
        assert isinstance(engine, OverlappedEngine) == device
        opened.append(engine)
        return engine

    yield make
    for engine in opened:
        engine.runner.memories.close()  # type: ignore[union-attr]


def prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    generator = np.random.default_rng(seed)
    return [tuple(generator.integers(100, 4000, int(generator.integers(2, 30))).tolist()) for _ in range(count)]


def submits(seed: int = 0) -> list[Submit]:
    """Requests of different lengths that see different packs, one of them none."""
    seen = [("a",), ("a", "b"), PACKS, (), ("s",), ("b", "s")]
    return [Submit(f"r{i}", prompt, GREEDY, seen[i]) for i, prompt in enumerate(prompts(len(seen), seed))]


def answers(engine: Engine, asked: list[Submit]) -> dict[tuple[str, int], list[int]]:
    return {key: tokens_of(outputs) for key, outputs in outputs_of(engine, asked).items()}


def looked_up(engine: Engine) -> int:
    """N-grams that the device looked up."""
    direct = engine.runner.memories.direct  # type: ignore[union-attr]
    direct._take()
    return int(direct._counted.sum())


@pytest.mark.parametrize("staged", [("a",), ("b", "s"), PACKS], ids="+".join)
def test_staged_packs_give_the_hosts_tokens_one_step_ahead(made: Made, staged: tuple[str, ...]) -> None:
    tiers = ("pinned", *(f"{name}=mapped" for name in staged))
    host, device = made(False), made(True, placement=tiers, device_cache=1 << 20)
    fetches: list[str] = []
    begin = device.runner.memories.begin  # type: ignore[union-attr]

    def counted(batch: Any) -> Any:
        fetches.append("prefill" if batch.num_tokens > batch.num_sequences else "decode")
        return begin(batch)

    device.runner.memories.begin = counted  # type: ignore[union-attr, method-assign]
    for seed in (0, 1, 0):
        assert answers(device, submits(seed)) == answers(host, submits(seed))
    assert device.launched_ahead > 20  # type: ignore[attr-defined]
    assert fetches.count("decode") < 0.2 * device.steps  # the rest were decode steps on the device
    for counters in device.stats().memory:
        assert counters.rows == host_rows(host, counters)


def test_requests_that_see_different_packs_get_the_hosts_tokens_from_hot_rows(made: Made) -> None:
    host, device = made(False), made(True, device_cache=1 << 20)
    for seed in (0, 1, 0):
        assert answers(device, submits(seed)) == answers(host, submits(seed))
    read = [counters for counters in device.stats().memory if counters.layer in (1, 3)]
    assert all(counters.device_hits > 0 and counters.rows == host_rows(host, counters) for counters in read)
    assert looked_up(device) > 100


@pytest.mark.parametrize("tier, in_place", [("pinned", True), ("mapped", False)])
def test_a_prefills_rows_are_read_in_place_where_the_device_can(
    made: Made, tier: str, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, read = made(True, placement=(tier,)), list[int]()
    monkeypatch.setattr(
        row_reader, "read_in_place", lambda table, ids, *rest: (read.append(len(ids)), in_place_of(table, ids, *rest))
    )
    answers(device, [Submit("x", prompts(1)[0], GREEDY, ("a",))])
    assert bool(read) == in_place
    assert not in_place or max(read) == len(prompts(1)[0])  # all tokens of the prompt at once


def test_where_the_device_cannot_read_a_row_the_host_gathers_and_it_is_noted(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("ptxas failed")

    expected = answers(made(False), submits())
    monkeypatch.setattr(row_reader, "read_in_place", broken)
    noted: list[str] = []
    monkeypatch.setattr(DevicePath, "note", lambda self, note: noted.append(note))
    device = made(True)
    assert answers(device, submits()) == expected
    assert "the host gathers the rows of prefills" in noted[0] and "ptxas failed" in noted[0]


def host_rows(host: Engine, of: Any) -> int:
    """Rows that the host's engine looked up of the same table, which the same tokens must have."""
    return next(c.rows for c in host.stats().memory if (c.table, c.layer) == (of.table, of.layer))


@pytest.mark.parametrize("tier", ["pinned", "mapped"])
def test_a_failed_table_ends_its_requests_with_the_cause_and_no_others(made: Made, tier: str) -> None:
    device = made(True, placement=(tier,))
    pack = device.runner.memories.packs[0]  # type: ignore[union-attr]
    with_a, without = (Submit(name, prompts(1)[0], GREEDY, packs) for name, packs in (("x", ("a",)), ("y", ("b",))))
    for submit in (with_a, without):
        device.submit(submit)
    found: dict[str, list[Any]] = {"x": [], "y": []}
    for step in range(60):
        if step == 5:
            pack.tables[3].fault = "the rows are gone"
        for output in device.step().outputs:
            found[output.request_id].append(output)
        if device.idle:
            break
    assert found["x"][-1].finish_reason == "error" and "gone" in found["x"][-1].error.message
    assert found["y"][-1].finish_reason == "length"


@pytest.mark.parametrize("ends", [True, False])
def test_a_step_ahead_that_fails_costs_no_token_of_the_step_before(made: Made, ends: bool) -> None:
    """Who stops at a token has it, though the step launched behind it finds a table changed."""
    (prompt,) = prompts(1)
    answer = answers(made(False), [Submit("x", prompt, GREEDY, ("a",))])["x", 0]
    place = next(i for i, token in enumerate(answer) if i >= 4 and token not in answer[:i])
    params = replace(GREEDY, stop_token_ids=frozenset({answer[place]} if ends else ()))
    device = made(True, placement=("mapped",))
    (table, *_) = device.runner.memories.packs[0].tables.values()  # type: ignore[union-attr]
    assert isinstance(table, RowTable)
    for submit in (Submit("x", prompt, params, ("a",)), Submit("y", prompt, GREEDY, ("b",))):
        device.submit(submit)
    told: dict[str, list[int]] = {"x": [], "y": []}
    reasons = {}
    while not device.idle:
        if len(told["x"]) == place:
            table.files[0].change = lambda: "was cut"  # type: ignore[method-assign]  # found out by reading
        for output in device.step().outputs:
            told[output.request_id] += output.token_ids
            reasons[output.request_id] = output.finish_reason
        device.scheduler.check()
    assert told["x"] == answer[: place + 1]
    assert reasons == {"x": "stop" if ends else "error", "y": "length"} and len(told["y"]) == 16


def test_without_room_for_memories_on_the_device_the_host_reads_them(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    expected = answers(made(False), submits())
    monkeypatch.setattr("server.memory.device_memory.DeviceEdits", full)
    notes: list[str] = []
    monkeypatch.setattr(DevicePath, "note", lambda self, note: notes.append(note))
    engine = made(True, device_cache=1 << 20, max_num_seqs=8)
    (note,) = notes
    assert "read on the host" in note and "--max-num-seqs 4" in note and "\n" not in note
    memories = engine.runner.memories
    assert memories is not None and memories.direct is None and not memories.prefetcher.hot.mirrored  # type: ignore
    assert answers(engine, submits()) == expected
