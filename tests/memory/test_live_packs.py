"""Packs that come and go while the engine runs: whoever runs keeps what it sees, whoever comes may name the new one."""

from __future__ import annotations

import gc
import shutil
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from server.batch import Batch
from server.errors import CapacityError, Conflict, EngramError, NotFound, PackError, RequestError
from server.runtime import attach
from server.runtime.attach import MemoryChanges
from server.runtime.engine import Engine
from server.runtime.load import load
from server.runtime.messages import MemoryUpdated, SamplingParams, Submit, UpdateMemory
from server.runtime.overlap import OverlappedEngine
from server.runtime.process import build_engine
from tests.engines import engine_on, logits_of, outputs_of, settings_for, tokens_of

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


class Live:
    """An engine whose memories change as the engine process changes them: between steps."""

    def __init__(self, model: Path, *memory: str, device_path: bool = False, **flags: Any) -> None:
        settings = settings_for(str(model), memory=memory, **flags)
        loaded = load(settings, device_path=device_path)
        self.engine: Engine = build_engine(settings, loaded)
        self.changes = MemoryChanges(self.engine, settings, loaded)

    def update(self, name: str, path: Path | None = None, step: Callable[[], Any] = lambda: None) -> MemoryUpdated:
        """Makes one change, calling `step` until it is made. Raises what it was refused with."""
        answers = self.changes.begin(UpdateMemory(1, name, None if path is None else str(path)))
        deadline = time.monotonic() + 60
        while not answers:
            assert time.monotonic() < deadline
            step()
            answers = self.changes.settle()
        if answers[0].error is not None:
            raise answers[0].error
        return answers[0]


@pytest.fixture(params=[False, True], ids=["eager", "on the device"])
def device_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether decode steps are those of a GPU, without graphs, kernels by their torch references."""
    monkeypatch.setattr("kernels.language.interpreting", False)
    return bool(request.param)


@pytest.fixture
def bare(tiny_llama_folder: Path) -> Live:
    return Live(tiny_llama_folder)


def test_an_attached_pack_gives_what_it_gives_when_attached_at_start(
    bare: Live, tiny_llama_folder: Path, pack_a: Path, prompt: tuple[int, ...]
) -> None:
    before = logits_of(bare.engine, prompt)
    updated = bare.update("a", pack_a)
    assert [name for name, _ in updated.models] == ["tiny-llama", "tiny-llama+a"] and updated.packs == ("a",)
    at_start = engine_on(str(tiny_llama_folder), memory=(f"a={pack_a}",))
    assert torch.equal(logits_of(bare.engine, prompt, ("a",)), logits_of(at_start, prompt, ("a",)))
    assert torch.equal(logits_of(bare.engine, prompt), before)


def test_running_sequences_keep_what_they_started_with(
    tiny_llama_folder: Path, pack_a: Path, pack_b: Path, prompt: tuple[int, ...], device_path: bool
) -> None:
    """Streams with a, b and neither run while b comes, a goes, and another pack takes a's name."""
    expected = {}
    for packs in ((), ("a",), ("b",)):
        made = engine_on(str(tiny_llama_folder), memory=(f"a={pack_a}", f"b={pack_b}"))
        expected[packs] = tokens_of(outputs_of(made, [Submit("x", prompt[:20], GREEDY, packs)])["x", 0])
    assert len({tuple(tokens) for tokens in expected.values()}) == 3

    live = Live(tiny_llama_folder, f"a={pack_a}", device_path=device_path)
    collected: dict[str, list[int]] = {}

    def step() -> None:
        for output in live.engine.step().outputs:
            collected.setdefault(output.request_id, []).extend(output.token_ids)

    live.engine.submit(Submit("with a", prompt[:20], GREEDY, ("a",)))
    live.engine.submit(Submit("bare", prompt[:20], GREEDY))
    step()
    live.update("b", pack_b, step=step)
    live.engine.submit(Submit("with b", prompt[:20], GREEDY, ("b",)))
    step()
    live.update("a")
    with pytest.raises(RequestError, match="'a'"):
        live.engine.submit(Submit("late", prompt[:20], GREEDY, ("a",)))
    live.update("a", pack_b)  # another memory under a name that is still being read
    live.engine.submit(Submit("new a", prompt[:20], GREEDY, ("a",)))
    while not live.engine.idle:
        step()
        live.engine.scheduler.check()
    assert collected["with a"] == expected["a",] and collected["bare"] == expected[()]
    assert collected["with b"] == collected["new a"] == expected["b",]


@pytest.mark.parametrize("tier", ["mapped", "pinned"])
def test_decode_steps_on_the_device_read_packs_that_came_later(
    tiny_llama_folder: Path,
    pack_a: Path,
    pack_b: Path,
    prompt: tuple[int, ...],
    tier: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kernels.language.interpreting", False)
    live = Live(tiny_llama_folder, f"a={pack_a}", placement=(tier,), device_path=True)
    engine = live.engine
    assert isinstance(engine, OverlappedEngine)
    outputs_of(engine, [Submit("before", prompt[:9], GREEDY, ("a",))])
    counted = {c.table: c.rows for c in engine.stats().memory}
    assert min(counted.values()) > 0
    live.update("b", pack_b)
    assert {c.table: c.rows for c in engine.stats().memory} == counted  # what was counted stays
    memories = engine.runner.memories
    assert memories is not None
    by_the_host, begin = [], memories.begin

    def noted(batch: Batch) -> Any:
        by_the_host.append(batch.num_tokens)
        return begin(batch)

    memories.begin = noted  # type: ignore[method-assign]
    ahead = engine.launched_ahead
    outputs_of(engine, [Submit("both", prompt[:9], GREEDY, ("a", "b")), Submit("one", prompt[:9], GREEDY, ("b",))])
    assert 1 not in by_the_host and 2 not in by_the_host  # prefill alone
    assert engine.launched_ahead >= ahead + 20
    rows = {c.table: c.rows for c in engine.stats().memory}
    assert rows["a/1"] > counted["a/1"] and rows["b/1"] > 0
    pack = memories.packs[0]
    table = weakref.ref(next(iter(pack.tables.values())))
    live.update("a")
    live.changes.settle()
    del pack
    gc.collect()
    assert table() is None  # nothing holds on to a table that has left


def test_without_room_on_the_device_the_host_reads_a_pack_that_came_later(
    tiny_llama_folder: Path, pack_a: Path, pack_b: Path, prompt: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("kernels.language.interpreting", False)
    monkeypatch.setattr("server.memory.device_memory.DeviceEdits", full)
    live = Live(tiny_llama_folder, f"a={pack_a}", placement=("pinned",), device_path=True, device_cache=1 << 20)
    live.update("b", pack_b)
    memories = live.engine.runner.memories
    assert memories is not None and memories.direct is None
    assert memories.prefetcher.hot is not None and not memories.prefetcher.hot.mirrored
    at_start = engine_on(str(tiny_llama_folder), memory=(f"b={pack_b}",))
    asked = [Submit("x", prompt[:20], GREEDY, ("b",))]
    told, expected = (tokens_of(outputs_of(engine, asked)["x", 0]) for engine in (live.engine, at_start))
    assert told == expected


def test_tables_are_closed_when_the_last_sequence_that_reads_them_has_ended(
    tiny_llama_folder: Path, pack_a: Path, prompt: tuple[int, ...], device_path: bool
) -> None:
    live = Live(tiny_llama_folder, f"a={pack_a}", device_path=device_path)
    memories = live.engine.runner.memories
    assert memories is not None
    (pack,) = memories.packs
    files = [file for table in pack.tables.values() for file in table.files]
    live.engine.submit(Submit("reader", prompt[:20], GREEDY, ("a",)))
    live.engine.step()
    live.update("a")
    while not live.engine.idle:
        live.changes.settle()
        assert all(file.fd >= 0 for file in files)
        live.engine.step()
    live.changes.settle()
    assert memories.packs == () and all(file.fd < 0 for file in files) and not live.changes.busy


def test_a_pack_attached_again_is_another_to_the_prefix_cache(
    tiny_llama_folder: Path, pack_a: Path, prompt: tuple[int, ...]
) -> None:
    live = Live(tiny_llama_folder, f"a={pack_a}")
    cached = []
    for _ in range(2):
        for _ in range(2):
            first = outputs_of(live.engine, [Submit("x", prompt, GREEDY, ("a",))])["x", 0][0]
            cached.append(first.cached_tokens)
        live.update("a")
        live.changes.settle()
        live.update("a", pack_a)
    assert cached == [0, 80, 0, 80]


def test_a_longer_ngram_widens_the_windows_of_those_who_run(
    tiny_llama_folder: Path, make_pack: Callable[..., Path], prompt: tuple[int, ...], device_path: bool
) -> None:
    longer = make_pack("longer", 5, orders=(2, 3, 4))
    live = Live(tiny_llama_folder, device_path=device_path)
    at_start = engine_on(str(tiny_llama_folder), memory=(f"longer={longer}",))
    asked = [Submit("bare", prompt[:20], GREEDY), Submit("longer", prompt[:20], GREEDY, ("longer",))]
    expected = {name: tokens_of(told) for (name, _), told in outputs_of(at_start, asked).items()}
    live.engine.submit(asked[0])
    told = [*live.engine.step().outputs, *live.engine.step().outputs]
    live.update("longer", longer)
    others = outputs_of(live.engine, asked[1:])
    assert tokens_of([*told, *others["bare", 0]]) == expected["bare"]
    assert tokens_of(others["longer", 0]) == expected["longer"]
    if not device_path:  # whose norms are kernels
        assert torch.equal(logits_of(live.engine, prompt, ("longer",)), logits_of(at_start, prompt, ("longer",)))


def test_what_cannot_be_changed_is_refused_and_changes_nothing(
    bare: Live, pack_a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(pack_a, foreign)
    config = (foreign / "config.json").read_text().replace('"hidden_size": 64', '"hidden_size": 65')
    (foreign / "config.json").write_text(config)
    cut = tmp_path / "cut"
    shutil.copytree(pack_a, cut)
    with open(cut / "table-1.safetensors", "r+b") as file:
        file.truncate(1000)
    cases: list[tuple[str, Path | None, type[EngramError], str]] = [
        ("x", tmp_path / "nowhere", PackError, "no memory pack"),
        ("x", foreign, PackError, "65"),
        ("x", cut, PackError, "table-1"),
        ("x", None, NotFound, "'x'"),
    ]
    bare.update("a", pack_a)
    for name, path, error, words in [*cases, ("a", pack_a, Conflict, "attached already")]:
        with pytest.raises(error, match=words):
            bare.update(name, path)
    monkeypatch.setattr(attach, "available_memory", lambda: 1000)
    with pytest.raises(CapacityError, match="1000 are free; .*--kv-bytes"):
        bare.update("x", pack_a)
    memories = bare.engine.runner.memories
    assert memories is not None and [pack.name for pack in memories.packs] == ["a"] and not bare.changes.busy


def test_packs_that_are_opened_at_once_share_the_staging(
    bare: Live, tiny_llama_folder: Path, pack_a: Path, pack_b: Path, prompt: tuple[int, ...]
) -> None:
    """The second is opened before the first has joined; a step has to hold the rows of both all the same."""
    staging = 1 << 15
    at_start = engine_on(str(tiny_llama_folder), memory=(f"a={pack_a}", f"b={pack_b}"), staging=staging)
    live = Live(tiny_llama_folder, staging=staging)
    for ticket, (name, pack) in enumerate((("a", pack_a), ("b", pack_b))):
        live.changes.begin(UpdateMemory(ticket, name, str(pack)))
    for _, opened in live.changes._opening:
        opened.result(60)
    assert [answer.error for answer in live.changes.settle()] == [None, None]
    assert live.engine.scheduler.budget == at_start.scheduler.budget < len(prompt)
    assert torch.equal(logits_of(live.engine, prompt, ("a", "b")), logits_of(at_start, prompt, ("a", "b")))
    before = live.engine.scheduler.budget
    live.update("b")
    live.changes.settle()
    assert before < live.engine.scheduler.budget < len(prompt)
    live.update("a")
    live.changes.settle()
    assert live.engine.scheduler.budget == bare.engine.scheduler.budget
