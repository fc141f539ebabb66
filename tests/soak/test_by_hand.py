"""docs/monitoring.md without Docker: server, Prometheus and Locust started by hand are green within a minute."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.live import ROOT, free_port
from tests.test_readme import BLOCKS

BY_HAND = [block for block in BLOCKS if block.needs == "prometheus"]
GREEN_SECONDS = 60


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a clone has at its root, with this environment's programs as its own."""
    for name in ("deploy", "loadtest"):
        shutil.copytree(ROOT / name, tmp_path / name)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, module in (("engram-server", "server"), ("locust", "locust")):
        python, root = shlex.quote(sys.executable), shlex.quote(str(ROOT))
        (programs / name).write_text(f'#!/bin/sh\nPYTHONPATH={root} exec {python} -m {module} "$@"\n')
        (programs / name).chmod(0o755)
    return tmp_path


def answer(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            text: str = reply.read().decode()
            return text
    except (urllib.error.URLError, OSError):
        return None


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus: apt install prometheus")
@pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="no locust: pip install -e '.[loadtest]'")
def test_server_prometheus_and_locust_started_by_hand_are_green_within_a_minute(clone: Path) -> None:
    server, prometheus, page = (free_port() for _ in range(3))
    ports = {":8000": f":{server}", ":9090": f":{prometheus}"}
    target = clone / "deploy" / "prometheus" / "targets" / "local.yml"
    target.write_text(target.read_text().replace(":8000", f":{server}"))
    serve, scrape, check = (block.text for block in BY_HAND)
    load = ".venv/bin/locust -f loadtest/locustfile.py Streaming --host http://127.0.0.1:8000 --autostart -u 2 -r 2"
    serve = serve.replace("engram-server serve", f"engram-server serve --port {server} --kv-bytes 256M")
    texts = [serve, scrape, f"export ENGRAM_API_KEY=change-me\n{load} --web-host 127.0.0.1 --web-port {page}"]
    running = []
    begun = time.monotonic()
    try:
        for text in texts:
            for old, new in ports.items():
                text = text.replace(old, new)
            command = ["bash", "-euo", "pipefail", "-c", text]
            environment = {**os.environ, "GOMP_SPINCOUNT": "2000"}  # three programs share the cores
            running.append(subprocess.Popen(command, cwd=clone, env=environment, start_new_session=True))
            if len(running) == 1:  # as a person would: the users come to a server that is up
                while answer(f"http://127.0.0.1:{server}/ready") is None:
                    assert time.monotonic() - begun < GREEN_SECONDS
                    time.sleep(0.2)
        while not is_green(prometheus, page):
            assert time.monotonic() - begun < GREEN_SECONDS, "not green within a minute"
            time.sleep(0.5)
    finally:
        for process in running:
            os.killpg(process.pid, 15)
            process.wait(60)
    checked = subprocess.run(["bash", "-euo", "pipefail", "-c", check], cwd=clone, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def is_green(prometheus: int, page: int) -> bool:
    """Prometheus scrapes the server and raises no alert; Locust has answers and no failure."""
    up = answer(f"http://127.0.0.1:{prometheus}/api/v1/query?query=up==1")
    alerts = answer(f"http://127.0.0.1:{prometheus}/api/v1/alerts")
    stats = answer(f"http://127.0.0.1:{page}/stats/requests")
    if up is None or alerts is None or stats is None:
        return False
    entries = {entry["method"]: entry for entry in json.loads(stats)["stats"]}
    answered = "TTFT" in entries and all(not entry["num_failures"] for entry in entries.values())
    return bool(json.loads(up)["data"]["result"]) and not json.loads(alerts)["data"]["alerts"] and answered
