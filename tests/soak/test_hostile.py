"""A live server under requests that nobody should send: no 5xx, no crash, no growth, and it still answers everyone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.live import live_server
from tests.soak.hostile import Hostile, post
from tests.soak.test_http import GROWTH, at_rest

REQUESTS = int(os.environ.get("HOSTILE_REQUESTS", "100000"))
CLIENTS = 12
WARM = 4000
PATIENCE = 150  # seconds; more than a busy machine ever needs
EXPECTED = {100, 200, 400, 401, 403, 404, 405, 408, 409, 413, 429, 431}
FLAGS = (
    *("--max-model-len", "256", "--kv-bytes", "8M", "--max-num-seqs", "12", "--threads", "1"),
    *("--body-timeout", "1", "--max-body-bytes", "1M", "--log-level", "error"),
)
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
VALID = post("/v1/completions", b'{"prompt": "a", "max_tokens": 2}')


async def exchange(port: int, data: bytes, pause: float = 0.0, *, leave: bool = False, half: bool = False) -> bytes:
    """What the server sends back until it closes. `leave`: the client resets the connection instead of reading;
    `half`: it says that it will send no more, without which a broken request is waited for.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = b""
    try:
        with contextlib.suppress(OSError):
            first = len(data) // 2 if pause else len(data)
            writer.write(data[:first])
            await writer.drain()
            if pause:
                await asyncio.sleep(pause)
                writer.write(data[first:])
                await writer.drain()
            if leave:
                reset = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                return b""
            if half:
                writer.write_eof()
            while part := await reader.read(1 << 16):
                received += part
        return received
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def attacker(port: int, seed: int, until: float, left: list[int], seen: Counter[str]) -> None:
    hostile = Hostile(seed)
    while left[0] > 0 and time.monotonic() < until:
        left[0] -= 1
        how, data = hostile.request()
        sending = exchange(port, data, hostile.pause(), leave=hostile.rng.random() < 0.02, half=True)
        received = await asyncio.wait_for(sending, PATIENCE)
        for status in map(int, STATUS.findall(received)):
            assert status in EXPECTED, (how, data[:3000], received[:2000])
            seen[str(status)] += 1
        seen["sent"] += 1
        if left[0] % 500 == 0:
            valid = await asyncio.wait_for(exchange(port, VALID), PATIENCE)
            assert valid.startswith(b"HTTP/1.1 200 "), valid


async def attack(port: int, seed: int, count: int, until: float) -> Counter[str]:
    seen: Counter[str] = Counter()
    left = [count]
    await asyncio.gather(*(attacker(port, seed * 1000 + number, until, left, seen) for number in range(CLIENTS)))
    return seen


@pytest.mark.timeout(1500)
def test_hostile_requests_break_nothing(soak_seconds: float, tiny_llama_folder: Path, tmp_path: Path) -> None:
    with live_server(tmp_path / "log", "--model", str(tiny_llama_folder), *FLAGS) as live:
        until = time.monotonic() + soak_seconds
        total = asyncio.run(attack(live.port, 0, WARM, until))  # buffers reach their size
        resident, files = live.resident_bytes(), live.open_files(seconds=2)
        total += asyncio.run(attack(live.port, 1, REQUESTS - WARM, until))
        assert at_rest(live) == {}
        assert live.process.poll() is None
        grown, left_open = live.resident_bytes() - resident, live.open_files(files)
        print(dict(total), f"grown by {grown / (1 << 20):.1f} MiB, files {files} then {left_open}")
        assert grown < GROWTH
        assert left_open <= files
    assert (tmp_path / "log").read_text().count("unexpected") == 0, (tmp_path / "log").read_text()[-3000:]


CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.timeout(1500)
def test_the_server_keeps_to_its_own_document(soak_seconds: float, tiny_llama_folder: Path, tmp_path: Path) -> None:
    """schemathesis: valid and invalid requests made of /openapi.json."""
    examples = str(max(10, min(1000, int(soak_seconds / 2))))
    with live_server(tmp_path / "log", "--model", str(tiny_llama_folder), *FLAGS) as live:
        program = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{live.url}/openapi.json"]
        flags = ["--checks", CHECKS, "--max-examples", examples, "--request-timeout", "30", "--seed", "1", "--no-color"]
        done = subprocess.run([*program, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=1400)
        print(done.stdout[-1500:])
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert at_rest(live) == {}
    assert (tmp_path / "log").read_text().count("unexpected") == 0
