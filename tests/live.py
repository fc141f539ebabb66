"""A live server for tests: the command line in a process of its own, on a free port, until the block ends."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
READY_SECONDS = 120


@dataclass(frozen=True)
class Live:
    """Where a server listens, and its process."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def gauges(self) -> dict[str, float]:
        """Series of /metrics, labels and all, to their values."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}

    def settled(self, seconds: float = 20) -> dict[str, float]:
        """`gauges` once nothing runs or waits. Raises AssertionError if that takes longer."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            gauges = self.gauges()
            if not any(value for name, value in gauges.items() if name.startswith("engram_num_requests_")):
                return gauges
            time.sleep(0.1)
        raise AssertionError(f"the server is still busy after {seconds:.0f} s")

    def resident_bytes(self) -> int:
        """Resident set of the server's processes together."""
        pids = [self.process.pid, *_children(self.process.pid)]
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * 4096

    def open_files(self, wanted: int = 0, seconds: float = 20) -> int:
        """Files the API process has open: the fewest seen until they are `wanted` or fewer, or `seconds` are over.

        A connection that its client has just left stays open for a moment.
        """
        deadline, fewest = time.monotonic() + seconds, sys.maxsize
        while fewest > wanted and time.monotonic() < deadline:
            fewest = min(fewest, len(os.listdir(f"/proc/{self.process.pid}/fd")))
            time.sleep(0.1)
        return fewest


def engine_of(pid: int) -> int:
    """The engine's process among the server's: the largest of those it spawned."""
    spawned = [child for child in _children(pid) if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
    return max(spawned, key=lambda child: int(Path(f"/proc/{child}/statm").read_text().split()[1]))


def _children(pid: int) -> list[int]:
    below = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*below, *(grandchild for child in below for grandchild in _children(child))]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def live_server(log: Path, *flags: str) -> Iterator[Live]:
    """`engram-server serve` with these flags, ready; ended by SIGTERM. Its output goes to `log`."""
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), *flags]
    with log.open("wb") as out, subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out) as process:
        live = Live(port, process, log)
        try:
            _wait_until_ready(live)
            yield live
        finally:
            process.terminate()
            process.wait(30)


def _wait_until_ready(live: Live) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and live.process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{live.url}/ready", timeout=5):
            return
        time.sleep(0.1)
    raise AssertionError(f"the server did not get ready:\n{live.log.read_text()}")
