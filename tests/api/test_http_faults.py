"""A table file harmed under a live server: readers fail with the cause, others go on, /ready and the log say so."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.commands.attach import attach
from server.memory.attached import read_memory
from server.memory.hot_list import hot_list_path
from tests.live import Live, engine_of, live_server
from tests.memory.conftest import randomise

FLAGS = ("--dtype", "float32", "--max-model-len", "256", "--kv-bytes", "16M", "--threads", "1")


def replaced(path: Path) -> None:
    shutil.copy(path, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.fixture(scope="module")
def made(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faults") / "engram"
    sizes = {"layers": (1, 3), "rows": 500, "dim": 16, "heads": 4, "dtype": "float32"}
    return randomise(attach(model=str(tiny_llama_folder), out=out, **sizes), 1)


def get(live: Live, path: str, body: Any = None) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(live.url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def ask(live: Live, **more: Any) -> tuple[int, str]:
    body = {"prompt": "The capital of Spain", "max_tokens": 4, "temperature": 0, "ignore_eos": True, **more}
    status, text = get(live, "/v1/completions", body)
    return status, json.loads(text)["choices"][0]["text"] if status == 200 else text


def ready_turns_503(live: Live) -> str:
    deadline = time.monotonic() + 30
    while (answer := get(live, "/ready"))[0] == 200 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert answer[0] == 503
    return answer[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "named", "read"),
    [(replaced, "was replaced", "mmap"), (cut, "changed size", "pread"), (Path.unlink, "cannot be found", "mmap")],
)
def test_a_harmed_file_fails_its_readers_by_name_and_nobody_else(
    harm: Callable[[Path], None], named: str, read: str, made: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    pack = tmp_path / "a"
    shutil.copytree(made, pack)
    without = {"memory": {"enabled": False}}
    flags = ("--model", str(tiny_llama_folder), "--memory", str(pack), "--read", read, *FLAGS)
    with live_server(tmp_path / "log", *flags) as live:
        assert ask(live)[0] == 200
        bare = ask(live, **without)
        harm(pack / "table-3.safetensors")
        if read == "mmap":  # found by a reader, or by the idle engine itself
            status, text = ask(live)
            assert status == 500
            assert named in text and "table-3.safetensors" in text
        found = ready_turns_503(live)
        assert named in found and "table-3.safetensors" in found
        status, text = ask(live)
        assert status == 500 and named in text
        assert ask(live, **without) == bare
        assert get(live, "/health")[0] == 200
    assert f"table a/3: table file {pack}/table-3.safetensors {named}" in live.log.read_text()


@pytest.mark.slow
def test_a_fault_of_the_mapping_ends_the_engine_with_its_cause(
    made: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    """A page that cannot be read is SIGBUS, here sent by hand: nothing is left to serve, and why is said."""
    with live_server(tmp_path / "log", "--model", str(tiny_llama_folder), "--memory", str(made), *FLAGS) as live:
        os.kill(engine_of(live.process.pid), signal.SIGBUS)
        assert "a mapped table file was cut or its disk failed; --read pread" in ready_turns_503(live)
        assert ask(live)[0] == 503
    assert "SIGBUS" in live.log.read_text()


@pytest.mark.slow
def test_what_does_not_work_as_asked_for_is_noted_where_all_is_served(
    made: Path, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hot list that cannot be read: the answer is the same, the log and /ready name the file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    damaged = hot_list_path(read_memory(made).fingerprint)  # type: ignore[union-attr]
    flags = ("--model", str(tiny_llama_folder), "--memory", str(made), "--device-cache", "1M", *FLAGS)
    with live_server(tmp_path / "log", *flags) as live:
        assert json.loads(get(live, "/ready")[1]) == {"status": "ready"}
        before = ask(live)
    damaged.parent.mkdir(parents=True, exist_ok=True)
    damaged.write_bytes(b"not a list")
    with live_server(tmp_path / "log", *flags) as live:
        assert ask(live) == before
        status, text = get(live, "/ready")
        (note,) = json.loads(text)["notes"]
        assert status == 200 and str(damaged) in note and "starts cold" in note
    assert note in live.log.read_text()
