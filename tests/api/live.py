"""A live server: this project's own process pair on a free port, spoken to over real sockets."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SERVE = "import json, sys; from server.api.serve import run; from server.settings import Settings; \
run(Settings(**json.loads(sys.argv[1])), lambda client: print('ready', flush=True))"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class LiveServer:
    flags: dict[str, Any]
    log: Path | None = None  # where its log lines go; None: where the tests' own go
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        flags = json.dumps({"port": self.port, "threads": 1, **self.flags})
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with open(self.log or os.devnull, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE, flags],
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=log if self.log else None,
            )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            self.stop()
            raise AssertionError(f"the server did not start with {flags}")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(
        self, path: str, body: Any = None, *, headers: dict[str, str] | None = None, method: str | None = None
    ) -> Reply:
        """GET, or with a body POST; a body that is no bytes is sent as JSON. Any status is a reply."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **(headers or {})}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return Reply(reply.status, dict(reply.headers), reply.read())
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, dict(error.headers), error.read())

    def raw(self, data: bytes, *, timeout: float = 20) -> bytes:
        """What comes back for these bytes, until the server closes or falls silent after an answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            received = b""
            while chunk := connection.recv(65536):
                received += chunk
            return received

    def metric(self, name: str, **labels: str) -> float:
        """The value of one exported series."""
        for line in self.request("/metrics").body.decode().splitlines():
            series, _, value = line.rpartition(" ")
            if series.split("{")[0] == name and all(f'{k}="{v}"' in series for k, v in labels.items()):
                return float(value)
        raise AssertionError(f"{name}{labels} is not exported")

    def settled(self, seconds: float = 10) -> bool:
        """Whether nothing runs, waits or holds a block within this time."""
        gauges = ("engram_num_requests_running", "engram_num_requests_waiting", "engram_kv_cache_usage_perc")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if all(self.metric(gauge) == 0 for gauge in gauges):
                return True
            time.sleep(0.05)
        return False

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code
