"""A server under load: told to stop, every stream ends properly; killed, nothing is left and it starts again."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.live import LiveServer

STREAMS = 24


@pytest.fixture
def start(flags: dict[str, Any]) -> Iterator[Callable[..., LiveServer]]:
    """Starts servers; none outlives its test."""
    started: list[LiveServer] = []

    def new(**more: Any) -> LiveServer:
        started.append(LiveServer({**flags, **more}))
        return started[-1]

    yield new
    for server in started:
        server.process.kill()
        server.process.wait()
        if server.process.stdout is not None:
            server.process.stdout.close()


@pytest.fixture
def flags(tiny_llama_folder: Path) -> dict[str, Any]:
    sizes = {"kv_bytes": 64 << 20, "max_model_len": 2048, "max_num_seqs": 16}
    return {"model": str(tiny_llama_folder), "dtype": "float32", "drain_seconds": 1.0, **sizes}


class Stream(threading.Thread):
    """One streaming request; `events` are its chunks as they came, `ended` says that the server ended it itself."""

    def __init__(self, server: LiveServer, number: int) -> None:
        super().__init__()
        self.events: list[Any] = []
        self.ended = False
        # some end soon, some would run far beyond the time there is
        tokens = 40 if number % 3 else 2000
        body = {"prompt": f"{number}", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        self._request = urllib.request.Request(
            f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )

    def run(self) -> None:
        try:
            with urllib.request.urlopen(self._request, timeout=60) as answer:
                for line in answer:
                    if line.startswith(b"data: "):
                        self.events.append(json.loads(line[6:]) if line[6:] != b"[DONE]\n" else "[DONE]")
            self.ended = True
        except OSError:
            pass


def streaming(server: LiveServer) -> list[Stream]:
    """STREAMS of them, the first at work and the last still waiting."""
    streams = [Stream(server, number) for number in range(STREAMS)]
    for stream in streams:
        stream.start()
    deadline = time.monotonic() + 30
    while server.metric("engram_num_requests_running") < 8:
        assert time.monotonic() < deadline, "nothing runs"
    return streams


def children(pid: int) -> list[int]:
    """All processes below one."""
    own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*own, *(below for child in own for below in children(child))]


def gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_sigterm_under_load_ends_every_stream_properly(flags: dict[str, Any], start: Callable[..., LiveServer]) -> None:
    server = start()
    streams = streaming(server)
    processes = children(server.process.pid)
    begun = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - begun < flags["drain_seconds"] + 10  # a busy machine's share included
    reasons = []
    for stream in streams:
        stream.join(10)
        assert stream.ended and stream.events[-1] == "[DONE]", stream.events[-3:]
        reasons.append(stream.events[-2]["choices"][0]["finish_reason"])
    assert set(reasons) <= {"length", "abort"} and "abort" in reasons
    assert gone(processes, 5)


def test_a_killed_engine_is_told_to_everyone_and_a_new_server_starts(start: Callable[..., LiveServer]) -> None:
    server = start()
    streams = streaming(server)
    engine = max(children(server.process.pid), key=resident_pages)
    os.kill(engine, signal.SIGKILL)
    for stream in streams:
        stream.join(20)
        last = stream.events[-2] if stream.ended and len(stream.events) > 1 else None
        assert (
            last is None or last.get("error", {}).get("code") == 500 or last["choices"][0]["finish_reason"] == "length"
        )
    assert server.request("/health").status == 503
    server.stop()
    again = start()
    assert again.request("/ready").status == 200
    assert again.stop() == 0


def resident_pages(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def test_a_killed_server_leaves_no_process_and_starts_again(start: Callable[..., LiveServer]) -> None:
    server = start()
    streams = streaming(server)
    processes = children(server.process.pid)
    assert len(processes) >= 2  # the engine, the templates' child
    server.process.kill()
    server.process.wait()
    for stream in streams:
        stream.join(20)
    assert gone(processes, 20)
    again = start()
    assert again.request("/ready").status == 200
    assert again.stop() == 0
