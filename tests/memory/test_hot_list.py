"""Hot lists: what many asked for is remembered over a restart, and nothing of what one asked alone."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import save_file

from server.cache.prefetcher import Prefetcher
from server.commands.hotlist import hotlist
from server.errors import PackError
from server.memory import warm_start
from server.memory.addressing import from_config, windows_of
from server.memory.hot_list import FORMAT, HotList, hot_list_path, read_hot_list
from server.models.source import open_source
from server.runtime.engine import Engine
from server.runtime.messages import SamplingParams, Submit
from tests.cache.counted import CPU, MemoryTable, cache_for, hashed
from tests.engines import engine_on, logits_of, outputs_of
from tests.live import live_server
from tests.memory.stems import save_stem
from tests.memory.test_addressing import DEEPSEEK, DEMO, QWEN
from tests.memory.test_families import PEFT

MIB = 1 << 20
STEM = {"stem_layers": [1, 2], "vocab_size": 99}


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("config", [DEEPSEEK, DEMO, QWEN, PEFT, STEM], ids=["deepseek", "demo", "qwen", "peft", "stem"])
def test_rows_of_a_key_are_the_rows_of_its_ngram(config: dict[str, Any]) -> None:
    addresser = from_config(config)
    ids = np.random.default_rng(0).integers(0, 99, 200)
    windows, blocked = windows_of(ids, addresser.n)
    for layer in addresser.layer_ids:
        rows, mix = addresser.rows(layer, windows, blocked), addresser.mix(layer, windows, blocked)
        by_key = [addresser.rows_of_mix(layer, order, mix[:, i]) for i, order in enumerate(addresser.orders)]
        assert np.array_equal(np.concatenate(by_key, axis=1), rows)
    with pytest.raises(KeyError):
        addresser.rows_of_mix(77, addresser.orders[0], np.arange(3))


def some_list(fingerprint: str = "f" * 64) -> HotList:
    lists = {(1, 2): (np.array([-5, 7, 9]), np.array([9, 5, 2])), (1, 3): (np.array([4]), np.array([1]))}
    return HotList(fingerprint, lists, 1234.5)


def test_a_list_is_read_as_it_was_written_and_only_by_its_owner() -> None:
    path = hot_list_path("f" * 64)
    assert read_hot_list(path, "f" * 64) is None
    some_list().write(path)
    found = read_hot_list(path, "f" * 64)
    assert found is not None
    assert (found.saved, found.size) == (1234.5, 4)
    assert [array.tolist() for array in found.lists[1, 2]] == [[-5, 7, 9], [9, 5, 2]]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == [path.name]


def test_a_write_that_fails_leaves_the_old_list(monkeypatch: pytest.MonkeyPatch) -> None:
    path = hot_list_path("f" * 64)
    some_list().write(path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space"):
            HotList("f" * 64, {}, 0.0).write(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def no_space(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("damage", ["another pack's", "no hot list", "cut", "floats", "counts missing", "lengths"])
def test_what_is_no_list_of_this_pack_is_refused_by_name(damage: str) -> None:
    path = hot_list_path("f" * 64)
    some_list("e" * 64 if damage == "another pack's" else "f" * 64).write(path)
    about = {"format": "engram-hot-list-1", "fingerprint": "f" * 64, "saved": "1.0"}
    keys, ones = np.arange(3), np.ones(3, np.int64)
    made: dict[str, tuple[dict[str, np.ndarray], dict[str, str]]] = {
        "no hot list": ({"1.2.keys": keys, "1.2.counts": ones}, {}),
        "floats": ({"1.2.keys": keys.astype(float), "1.2.counts": ones}, about),
        "counts missing": ({"1.2.keys": keys}, about),
        "lengths": ({"1.2.keys": keys, "1.2.counts": ones[:2]}, about),
    }
    if damage in made:
        save_file(made[damage][0], path, made[damage][1])
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(PackError, match=f"{path.name}.*remove it"):
        read_hot_list(path, "f" * 64)


# ── in the server ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def packs(pack_a: Path, tmp_path: Path, tiny_llama_folder: Path) -> tuple[str, str]:
    """An Engram pack and a STEM pack."""
    config = open_source(str(tiny_llama_folder)).config
    table = torch.randn(config.vocab_size, config.intermediate_size, generator=torch.Generator().manual_seed(0))
    stem = save_stem(tmp_path / "stem", {2: table}, config.hidden_size)
    return f"a={pack_a}", f"s={stem}"


def server(folder: Path, packs: tuple[str, ...], **flags: Any) -> Engine:
    engine = engine_on(str(folder), memory=packs, **{"device_cache": MIB, "prefix_cache": "off", **flags})
    memories = engine.runner.memories
    assert memories is not None
    if memories.warm is not None:
        assert memories.warm.loaded.wait(30)
    return engine


def close(engine: Engine) -> None:
    assert engine.runner.memories is not None
    engine.runner.memories.close()


def ask(engine: Engine, name: str, prompt: tuple[int, ...], packs: tuple[str, ...] = ("a", "s")) -> None:
    outputs_of(engine, [Submit(name, prompt, SamplingParams(max_tokens=4, temperature=0), packs)])
    hot = engine.runner.memories.prefetcher.hot  # type: ignore[union-attr]
    if hot is not None:
        engine.runner.memories.prefetcher.between_fetches(hot.learn)  # type: ignore[union-attr]


def device_hits(engine: Engine) -> dict[int, int]:
    return {counters.layer: counters.device_hits for counters in engine.stats().memory}


def keys_in(engine: Engine, pack: int) -> dict[tuple[int, int], set[int]]:
    fingerprint = engine.runner.memories.packs[pack].fingerprint  # type: ignore[union-attr]
    found = read_hot_list(hot_list_path(fingerprint), fingerprint)
    assert found is not None
    return {place: set(keys.tolist()) for place, (keys, _) in found.lists.items()}


def test_a_restart_begins_with_what_several_requests_asked_for(
    tiny_llama_folder: Path, packs: tuple[str, ...], prompt: tuple[int, ...]
) -> None:
    first = server(tiny_llama_folder, packs)
    common, private = prompt[:30], prompt[40:70]
    for number in range(5):
        ask(first, f"r{number}", common)
        ask(first, "one client's", private)
    close(first)
    pack = first.runner.memories.packs[0]  # type: ignore[union-attr]
    keys = pack.addresser.address(*windows_of(common, pack.addresser.n))
    alone = pack.addresser.address(*windows_of(private, pack.addresser.n))
    for layer in (1, 3):
        for index, order in enumerate((2, 3)):
            saved = keys_in(first, 0)[layer, order]
            assert set(keys[layer][1][:, index].tolist()) <= saved
            assert not saved & (set(alone[layer][1][:, index].tolist()) - set(keys[layer][1][:, index].tolist()))
    assert set(common) <= keys_in(first, 1)[2, 1]

    second = server(tiny_llama_folder, packs)
    ages = second.runner.memories.hot_list_ages()  # type: ignore[union-attr]
    assert all(0 <= age < 60 for age in ages.values())
    assert len(ages) == 3
    ask(second, "new", common)
    hits = device_hits(second)
    assert hits[1] >= len(common) * 8  # from the first lookup on
    assert hits[3] >= len(common) * 8
    assert hits[2] >= len(set(common))
    assert {c.hot_list_age_s is not None for c in second.stats().memory} == {True}
    close(second)


def test_logits_are_the_same_bits_without_with_and_with_a_warm_cache(
    tiny_llama_folder: Path, packs: tuple[str, ...], prompt: tuple[int, ...]
) -> None:
    off = server(tiny_llama_folder, packs, device_cache=0)
    without = logits_of(off, prompt, ("a", "s"))
    close(off)
    cold = server(tiny_llama_folder, packs)
    assert torch.equal(logits_of(cold, prompt, ("a", "s")), without)
    for number in range(5):
        ask(cold, f"r{number}", prompt[:60])
    close(cold)
    warm = server(tiny_llama_folder, packs)
    assert torch.equal(logits_of(warm, prompt, ("a", "s")), without)
    assert all(device_hits(warm).values())
    assert torch.equal(logits_of(warm, prompt, ("a", "s")), without)
    close(warm)


def test_a_list_that_cannot_be_saved_is_named_and_serving_goes_on(
    tiny_llama_folder: Path,
    packs: tuple[str, ...],
    prompt: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(HotList, "write", no_space)
    monkeypatch.setattr(warm_start, "SAVE_SECONDS", 0.01)
    engine = server(tiny_llama_folder, packs[:1])
    for number in range(5):
        ask(engine, f"r{number}", prompt[:30], ("a",))
    close(engine)
    path = hot_list_path(engine.runner.memories.packs[0].fingerprint)  # type: ignore[union-attr]
    assert f"memory a: no hot list saved to {path}: No space left on device" in caplog.text
    assert [note in caplog.text for note in engine.stats().notes] == [True]
    assert not path.exists()


def test_a_damaged_list_means_a_cold_start_and_a_line_in_the_log(
    tiny_llama_folder: Path, packs: tuple[str, ...], prompt: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    before = server(tiny_llama_folder, packs[:1])
    path = hot_list_path(before.runner.memories.packs[0].fingerprint)  # type: ignore[union-attr]
    close(before)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a list")
    with caplog.at_level(logging.WARNING):
        engine = server(tiny_llama_folder, packs[:1])
    assert f"memory a starts cold: {path} cannot be read as a hot list" in caplog.text
    ask(engine, "r", prompt[:30], ("a",))
    close(engine)


def test_off_leaves_no_file_and_reads_none(
    tiny_llama_folder: Path, packs: tuple[str, ...], prompt: tuple[int, ...], cache_home: Path
) -> None:
    engine = server(tiny_llama_folder, packs, hot_list="off")
    for number in range(5):
        ask(engine, f"r{number}", prompt[:30])
    close(engine)
    assert not cache_home.exists()


def test_a_list_made_from_a_text_warms_the_first_start(
    tiny_llama_folder: Path, packs: tuple[str, ...], tmp_path: Path
) -> None:
    text = "the quick brown fox jumps over the lazy dog, the quick brown fox"
    (tmp_path / "text").write_text(text)
    for spec in packs:
        folder = Path(spec.partition("=")[2])
        path, made = hotlist(model=str(tiny_llama_folder), memory=folder, corpus=tmp_path / "text", most=1000)
        assert path.exists()
        assert made.size >= 10
    engine = server(tiny_llama_folder, packs)
    ids = tuple(open_source(str(tiny_llama_folder)).tokenizer.encode(text))
    outputs_of(engine, [Submit("r", ids, SamplingParams(max_tokens=1), ("a", "s"))])
    assert device_hits(engine) == {1: 8 * len(ids), 2: len(set(ids)), 3: 8 * len(ids)}
    close(engine)


def test_a_text_that_cannot_be_read_is_named(tiny_llama_folder: Path, pack_a: Path, tmp_path: Path) -> None:
    with pytest.raises(PackError, match="--corpus .*missing"):
        hotlist(model=str(tiny_llama_folder), memory=pack_a, corpus=tmp_path / "missing")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(PackError, match="--corpus .* is empty"):
        hotlist(model=str(tiny_llama_folder), memory=pack_a, corpus=tmp_path / "empty")


@pytest.mark.slow
def test_a_server_that_is_told_to_stop_saves_its_list(
    tiny_llama_folder: Path, pack_a: Path, tmp_path: Path, cache_home: Path
) -> None:
    flags = ("--model", str(tiny_llama_folder), "--memory", f"a={pack_a}", "--device-cache", "1M", "--kv-bytes", "64M")
    with live_server(tmp_path / "log", *flags) as live:
        for _ in range(20):
            body = json.dumps({"prompt": "the quick brown fox jumps over the lazy dog", "max_tokens": 1}).encode()
            request = urllib.request.Request(f"{live.url}/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                assert answer.status == 200
    assert [stat.S_IMODE(path.stat().st_mode) for path in (cache_home / "engram-server" / "hot").iterdir()] == [0o600]


def test_the_list_of_a_pack_that_left_is_not_its_successors() -> None:
    """Another pack under its name has the place in the cache by now, and other keys."""
    old, new = MemoryTable("a/1"), MemoryTable("a/1", seed=1)
    prefetcher = Prefetcher(torch.float32, CPU, MIB, hot=cache_for(hashed(new, 1, np.arange(6).reshape(3, 2))))
    packs = [SimpleNamespace(name="a", fingerprint=fingerprint, tables={1: table}) for fingerprint, table in
             (("old", old), ("new", new))]  # fmt: skip
    warm = warm_start.WarmStart(packs, prefetcher)  # type: ignore[arg-type]
    assert warm._sources(packs[0]) == []  # type: ignore[arg-type]
    assert [source.table for _, source in warm._sources(packs[1])] == [new]  # type: ignore[arg-type]
    prefetcher.close()
    warm.close()


def test_a_list_of_a_type_that_numpy_lacks_is_refused(tmp_path: Path) -> None:
    path, about = tmp_path / "hot.safetensors", {"format": FORMAT, "fingerprint": "f", "saved": "1.0"}
    tensors = {"1.2.keys": torch.zeros(3, dtype=torch.bfloat16), "1.2.counts": torch.zeros(3, dtype=torch.bfloat16)}
    safetensors.torch.save_file(tensors, path, about)
    with pytest.raises(PackError, match="cannot be read as a hot list"):
        read_hot_list(path, "f")
