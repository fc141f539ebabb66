"""Debian's `prometheus` with the shipped files: checked, tried, and scraping a live server under load.

server (key) ◀── scrape ── prometheus (shipped config, rules) ◀── every expression of every panel and alert
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from server.commands.attach import attach
from tests.deploy.dashboards import DEPLOY, MAY_BE_EMPTY, queries, rules
from tests.live import Live, free_port, live_server

KEY = "a-key-of-the-tests"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: apt install prometheus")
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no prometheus: apt install prometheus"
)


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """deploy/prometheus with a key beside it, as its comment says."""
    folder = tmp_path / "prometheus"
    shutil.copytree(DEPLOY / "prometheus", folder)
    (folder / "secrets" / "api-key").write_text(KEY)
    return folder


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")],
    ids=" ".join,
)
def test_promtool_accepts_the_shipped_files_and_every_alert_fires_when_it_should(
    arguments: tuple[str, ...], shipped: Path
) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=shipped, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_in_which_it_fires() -> None:
    tests = (DEPLOY / "prometheus" / "alerts_test.yml").read_text()
    assert all(f"alertname: {rule['alert']}\n" in tests for rule in rules())


@dataclass(frozen=True)
class Prometheus:
    port: int

    def get(self, path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def values(self, expr: str) -> list[float]:
        return [float(sample["value"][1]) for sample in self.get("query", query=expr)["result"]]


@contextlib.contextmanager
def scraping(config: Path, port: int) -> Iterator[Prometheus]:
    """Prometheus with the folder's files, pointed at a server on `port`, five times as fast as shipped."""
    main = config / "prometheus.yml"
    main.write_text(main.read_text().replace(": 5s", ": 1s").replace(": 4s", ": 1s"))
    local = config / "targets" / "local.yml"
    local.write_text(local.read_text().replace(":8000", f":{port}"))
    own = free_port()
    flags = (
        "--config.file=prometheus.yml",
        f"--storage.tsdb.path={config / 'data'}",
        f"--web.listen-address=127.0.0.1:{own}",
    )
    with (
        (config / "log").open("wb") as log,
        subprocess.Popen(["prometheus", *flags], cwd=config, stderr=log) as process,
    ):
        try:
            yield Prometheus(own)
        finally:
            process.terminate()
            process.wait(20)


def ask_until(live: Live, stop: threading.Event) -> None:
    """Streams short answers, one after the other."""
    number = 0
    while not stop.is_set():
        number += 1
        prompt = [(7 * number + i) % 190 + 5 for i in range(40)]
        body = {"prompt": prompt, "max_tokens": 16, "ignore_eos": True, "stream": True}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        request = urllib.request.Request(f"{live.url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            answer.read()


@pytest.mark.slow
@needs_prometheus
def test_no_panel_is_empty_under_load_but_those_of_errors_and_gpus(
    shipped: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    pack = tmp_path / "pack"
    attach(
        model=str(tiny_llama_folder),
        out=pack,
        layers=(1, 2),
        rows=500,
        dim=8,
        heads=2,
        orders=(2, 3),
        seed=0,
        dtype="bfloat16",
    )
    flags = (
        "--model",
        str(tiny_llama_folder),
        "--memory",
        str(pack),
        "--kv-bytes",
        "16M",
        "--api-key",
        KEY,
        "--threads",
        "1",
    )
    stop = threading.Event()
    with live_server(tmp_path / "log", *flags) as live, scraping(shipped, live.port) as prometheus:
        crowd = [threading.Thread(target=ask_until, args=(live, stop)) for _ in range(2)]
        for thread in crowd:
            thread.start()
        try:
            wait_for(lambda: len(prometheus.values("count_over_time(up[1m]) >= 5 and up == 1")) == 1)
            empty = [
                str(query)
                for query in queries()
                if not query.row.startswith(MAY_BE_EMPTY)
                and not any(math.isfinite(value) for value in prometheus.values(query.filled("10s")))
            ]
            assert not empty
            for query in queries():
                prometheus.values(query.filled("10s"))  # those of errors and GPUs are at least well formed
            assert {rule["health"] for group in prometheus.get("rules")["groups"] for rule in group["rules"]} == {"ok"}
            firing = {
                alert["labels"]["alertname"]
                for alert in prometheus.get("alerts")["alerts"]
                if alert["state"] == "firing"
            }
            assert not firing
        finally:
            stop.set()
            for thread in crowd:
                thread.join()


def wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if condition():
                return
        time.sleep(0.5)
    raise AssertionError(f"not within {seconds:.0f} s")
