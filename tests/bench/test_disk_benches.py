"""The experiments about disk and memory, small: they run through, and say what they claim to measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.bench import cold, limit
from server.bench.big_pack import big_pack
from server.bench.disk import sweep
from server.cache.table_files import PAGE
from server.commands.inspect import summary
from server.errors import CapacityError

# Headers, and folios that the kernel drops a little later: a large part of the small limits here.
SPARE_BYTES = 4 * 32 * PAGE


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tiny_llama_folder: Path) -> str:
    for module in (cold, limit):
        monkeypatch.setattr(module, "LAYERS", (1, 3))
    monkeypatch.setattr(cold, "PROMPT_TOKENS", 300)
    monkeypatch.setattr(cold, "SWEEPS", 1)
    monkeypatch.setattr(cold, "STARTS", 1)
    monkeypatch.setattr(limit, "BUDGET", 32)
    monkeypatch.setattr(limit, "PROMPT_TOKENS", 24)
    monkeypatch.setattr("server.bench.disk.READS", 64)
    return str(tiny_llama_folder)


def test_cold_says_what_was_read_and_how_fast(small: str, tmp_path: Path) -> None:
    try:
        result = cold.run(model=small, rounds=2, table_bytes=8 << 20, folder=tmp_path, json=tmp_path / "cold.json")
    except CapacityError as error:
        pytest.skip(str(error))  # a file system that keeps its pages
    assert json.loads((tmp_path / "cold.json").read_text()) == result
    assert 0.99 <= result["ratios"]["pages_read_over_distinct"] <= 1.05
    assert len(result["disk"]) >= 6 and all(point["per_s"] > 0 for point in result["disk"])
    assert set(result["arms"]) == {"stem", "engram+stem"}
    for arm in (result, *result["arms"].values()):
        assert all(value > 0 for name, value in arm["median"].items() if name != "added_s" and "stall" not in name)
        assert {"added_over_page_in", "page_in_over_disk", "page_in_over_demand"} < set(arm["ratios"])
    assert result["start"]["large_over_small"]["median"] > 0
    assert [len(seconds) for seconds in result["start"]["seconds"]] == [1, 1]
    assert len(result["table_bytes"]) == 2 and len(result["arms"]["engram+stem"]["table_bytes"]) == 4
    assert not list(tmp_path.glob("big-*"))  # removed, since nobody asked to keep it


@pytest.mark.slow
def test_limit_holds_and_both_arms_agree(small: str, tmp_path: Path) -> None:
    result = limit.run(model=small, seconds=5, table_bytes=64 << 20, folder=tmp_path, json=tmp_path / "limit.json")
    assert result["turns_or_checks_that_differed"] == 0
    assert result["rows_compared"] > 0 and result["tokens_sampled"] > 0
    assert result["resident_bytes"]["most"] <= 1.01 * result["limit_bytes"]
    assert result["table_bytes"] >= 4 * result["limit_bytes"]
    assert set(result["arms"]) == {"stem", "engram+stem"}
    for arm in result["arms"].values():
        assert arm["turns_or_checks_that_differed"] == 0 and arm["rows_compared"] > 0 and arm["pages_dropped"] > 0
        assert arm["resident_bytes"]["most"] <= arm["limit_bytes"] + SPARE_BYTES
        assert arm["table_bytes"] >= 4 * arm["limit_bytes"]


def test_a_kept_pack_is_real_and_used_again(small: str, tmp_path: Path) -> None:
    with big_pack(small, (1,), 1 << 20, tmp_path, keep=True) as pack:
        found = summary(pack, verify=True)
    assert found["bytes"] >= 1 << 20
    table = pack / "table-1.safetensors"
    assert table.stat().st_blocks * 512 >= 1 << 20  # allocated, not holes
    before = table.stat().st_mtime_ns
    with big_pack(small, (1,), 1 << 20, tmp_path, keep=False) as pack:
        assert table.stat().st_mtime_ns == before
    assert not pack.exists()


def test_no_room_is_said_before_anything_is_written(small: str, tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="set --dir"), big_pack(small, (1,), 1 << 60, tmp_path, keep=False):
        pass


def test_threads_and_depths_are_both_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.bench.disk.READS", 32)
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    points = sweep(path)
    assert {(p["threads"], p["depth"]) for p in points} >= {(1, 1), (32, 1)}
    assert all(p["per_s"] > 0 for p in points)
