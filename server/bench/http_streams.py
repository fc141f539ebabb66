"""Many streams over HTTP, by a client that costs next to nothing: raw sockets, arrival times, no parsing of JSON.

On two cores the client's own work would otherwise be measured as the server's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import server
from server.errors import NotReady

START_SECONDS = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_server(*flags: str) -> Iterator[int]:
    """`engram-server serve` as its own process, ready; yields its port and ends it with SIGTERM."""
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), "--log-level", "warning", *flags]
    process = subprocess.Popen(command, cwd=Path(server.__file__).parent.parent, stdout=subprocess.DEVNULL)
    try:
        _await_ready(process, port)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _await_ready(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise NotReady(f"the server ended with exit code {process.returncode} before it was ready")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as link:
            link.sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            if b" 200 " in link.recv(64):
                return
        time.sleep(0.1)
    raise NotReady(f"the server was not ready within {START_SECONDS:.0f} s")


async def stream(port: int, body: dict[str, object]) -> list[float]:
    """Posts one streaming completion; returns the arrival time of each event that carries a token."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    payload = json.dumps(body).encode()
    head = ("POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", "Connection: close")
    writer.write("\r\n".join((*head, f"Content-Length: {len(payload)}", "", "")).encode() + payload)
    arrivals: list[float] = []
    tail = b""
    while data := await reader.read(1 << 16):
        now = time.perf_counter()
        tail += data
        arrivals += [now] * tail.count(b"\ndata: {")
        tail = tail[tail.rfind(b"\n") :]
    writer.close()
    return arrivals


async def streams(port: int, prompts: list[tuple[int, ...]], tokens: int) -> list[list[float]]:
    """All prompts at once, to the default model; the arrival times of each."""
    bodies = [
        {
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        for prompt in prompts
    ]
    return await asyncio.gather(*[stream(port, body) for body in bodies])


def intervals(arrivals: list[list[float]], skip: int = 8) -> list[float]:
    """Seconds between neighbouring tokens of a stream, once all streams are decoding."""
    latest_start = max(times[0] for times in arrivals)
    gaps = []
    for times in arrivals:
        for before, after in zip(times[skip:], times[skip + 1 :], strict=False):
            if before > latest_start:
                gaps.append(after - before)
    return gaps
