"""Locust against a live server: the documentation's commands run, and client and server count the same tokens."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live import ROOT, Live, live_server
from tests.test_readme import BLOCKS, Block

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="no locust: pip install -e '.[loadtest]'"),
]
COMMANDS = [block for block in BLOCKS if block.needs == "locust"]


@pytest.fixture(scope="module")
def live(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    log = tmp_path_factory.mktemp("server") / "log"
    with live_server(log, "--model", str(tiny_llama_folder), "--kv-bytes", "32M", "--threads", "1") as live:
        yield live


def locust(command: str, live: Live, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command as printed but for the port, its length, and a page nobody would close. Every answer may end."""
    text = (
        command.replace(":8000", f":{live.port}")
        .replace(" -t 60s", " -t 2s --stop-timeout 30")
        .replace("--stage 20", "--stage 1")
    )
    text = text.replace("--arrivals 1 ", "--arrivals 5 ").replace("loadtest/", f"{ROOT}/loadtest/")
    text = text.replace(".venv/bin/locust", f"{shlex.quote(sys.executable)} -m locust")
    if "--headless" not in text:
        text = text.rstrip() + " --headless -u 5 -r 5 -t 2s --stop-timeout 30\n"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=folder, capture_output=True, text=True, timeout=90
    )


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_the_commands_of_the_documentation_run_without_a_failed_request(
    block: Block, live: Live, tmp_path: Path
) -> None:
    done = locust(block.text, live, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^(\S+)\s+(?:.*?)\s{2,}(\d+)\s+(\d+)\(", done.stdout + done.stderr, re.MULTILINE)
    entries = {name: (int(requests), int(failed)) for name, requests, failed in rows}
    assert {"TTFT", "ITL", "tokens/s"} <= entries.keys()
    assert all(requests > 0 and failed == 0 for requests, failed in entries.values()), entries


def test_client_and_server_count_the_same_tokens_and_requests(live: Live, tmp_path: Path) -> None:
    before = live.settled()
    command = ".venv/bin/locust -f loadtest/locustfile.py Streaming --host http://127.0.0.1:8000 --headless -u 2 -r 2"
    done = locust(f"{command} -t 60s --json", live, tmp_path)
    assert done.returncode == 0, done.stderr
    counted = {entry["method"]: entry for entry in json.loads(done.stdout)}
    after = live.gauges()

    def grown(name: str) -> float:
        return sum(value - before.get(key, 0.0) for key, value in after.items() if key.split("{")[0] == name)

    for kind, name in (("TTFT", "time_to_first_token_seconds"), ("ITL", "inter_token_latency_seconds")):
        assert counted[kind]["num_requests"] == grown(f"engram_{name}_count") > 0
