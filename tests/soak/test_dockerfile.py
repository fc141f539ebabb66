"""The Dockerfile's steps in a clean environment: built as the cpu image is, served and probed as it says.

No Docker engine is needed: COPY, ENV and those RUN steps that use Python are carried out below a folder that stands in
for the root.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.deploy.dockerfile import chain, stages
from tests.live import ROOT, free_port

BUILD_SECONDS = 900


def configured_index() -> str:
    """The package index of this machine's pip, in the place of PyTorch's own."""
    found = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True
    )
    return found.stdout.strip() or "https://pypi.org/simple"


@pytest.mark.timeout(1200)
def test_the_cpu_images_steps_make_a_server_that_gets_healthy(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "src").mkdir(parents=True)
    environment = {**os.environ, "TORCH_INDEX": configured_index()}
    environment.pop("PYTHONPATH", None)
    all_stages = stages(ROOT / "Dockerfile")
    for instruction, arguments in chain(all_stages, "build-cpu"):
        if instruction == "COPY":
            *sources, target = arguments.split()
            for source in sources:
                copy(ROOT / source, root / "src" / target)
        elif instruction == "RUN":
            command = arguments.replace("python -m venv", f"{sys.executable} -m venv").replace("/opt/", f"{root}/opt/")
            subprocess.run(["sh", "-ec", command], cwd=root / "src", env=environment, check=True, timeout=BUILD_SECONDS)
    said = dict(chain(all_stages, "cpu"))
    port = str(free_port())
    environment |= {"ENGRAM_API_KEY": "a-key", "ENGRAM_HOST": "0.0.0.0", "ENGRAM_PORT": port, "ENGRAM_KV_BYTES": "256M"}
    environment["PATH"] = f"{root}/opt/engram/bin:{environment['PATH']}"
    server = subprocess.Popen(
        [*json.loads(said["ENTRYPOINT"]), *json.loads(said["CMD"])], cwd=tmp_path, env=environment
    )
    check = json.loads(said["HEALTHCHECK"].partition("CMD ")[2])
    try:
        deadline = time.monotonic() + 120
        while subprocess.run(check, env=environment, capture_output=True).returncode != 0:
            assert time.monotonic() < deadline and server.poll() is None
            time.sleep(1)
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert subprocess.run(check, env=environment, capture_output=True).returncode != 0


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target / source.name if target.is_dir() else target)
