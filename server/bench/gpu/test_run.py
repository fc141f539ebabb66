"""`gpu-test`: the project's tests that need a device, and the kernels' tests compiled for it.

    tests/gpu        what only a GPU shows: captured steps, registered tables, streams
    tests/kernels    the same tests as everywhere, here compiled instead of interpreted
    sanitizer        compute-sanitizer over the lookup kernels at tiny sizes, where the tool is installed

pytest is not one of the packages such a machine must have: without it there is one clear line, and `gpu-kernels`
compares every kernel with float64 all the same.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from server.bench.gpu.device import ROOT
from server.bench.gpu.journal import MOST_BYTES, Figures
from server.bench.gpu.session import Session
from server.errors import SettingsError, StepFailed

FOLDERS = ("tests/gpu", "tests/kernels")
SANITIZER = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
# Calls of the driver that fail are no fault of a kernel: torch and Triton try out what a driver has.
TOOLS = {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}
LEAST_SECONDS = 60.0
NO_TESTS = 5  # pytest's exit status where it found none
OUT_OF_TIME = -1


def run(session: Session, out: Path) -> dict[str, Any]:
    """Raises StepFailed if a test failed or the sanitizer found something; what is cut off has not failed."""
    found: dict[str, Any] = {}
    for name, command in jobs(session).items():
        if command is None:
            session.say(f"{name}: not run, since {session.device.type} has no use for it or the tool is not installed")
            continue
        needs = 0 if session.tiny else LEAST_SECONDS
        figures = session.measure({"job": name}, partial(ran, session, name, command, out), needs)
        if figures is not None:
            found[name] = figures
    rows = [(name, outcome(f), f"{f['seconds']:.0f}", f["last"]) for name, f in found.items()]
    session.table("tests", ("what", "", "s", "last words"), rows)
    failed = [name for name, figures in found.items() if outcome(figures) == "FAILED"]
    if failed:
        raise StepFailed(f"failed: {', '.join(failed)}; their output is in {out}")
    return found


def outcome(figures: Figures) -> str:
    if figures["code"] == OUT_OF_TIME:
        return "cut off"
    return "passed" if figures["ok"] else "FAILED"


def jobs(session: Session) -> dict[str, list[str] | None]:
    """Name → command. Raises SettingsError without pytest."""
    if importlib.util.find_spec("pytest") is None:
        raise SettingsError(
            f"{sys.executable} has no pytest; make gpu-kernels compares every kernel with float64 without it, "
            f"or install it: {sys.executable} -m pip install pytest"
        )
    found: dict[str, list[str] | None] = {folder: pytest_command(folder) for folder in FOLDERS}
    tool = next((path for path in map(shutil.which, SANITIZER) if path is not None), None)
    only = [sys.executable, "-m", "server.bench.gpu", "kernels", "--shape", "tiny", "--only", "lookup"]
    for kind, flags in TOOLS.items():
        usable = tool is not None and session.device.type == "cuda"
        found[kind] = [str(tool), "--tool", kind, *flags, "--error-exitcode", "9", *only] if usable else None
    return found


def pytest_command(folder: str) -> list[str]:
    """Without the settings of pyproject.toml and tests/conftest.py, which need plugins."""
    words = ["-c", "tests/gpu/pytest.ini", "--rootdir", ".", "--confcutdir", folder, "-q", folder]
    return [sys.executable, "-m", "pytest", *words]


def ran(session: Session, name: str, command: Sequence[str], out: Path) -> Figures:
    """Ends the job when the command's time is over. Its output is kept in a file."""
    begun = time.monotonic()
    code, output = done(command, name in TOOLS, max(session.budget.left, 1.0))
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{name.replace('/', '-')}.log"
    log.write_bytes(output.encode()[-MOST_BYTES:])
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "no words")
    return {
        "ok": code in (0, NO_TESTS),
        "code": code,
        "seconds": time.monotonic() - begun,
        "last": last.strip(" =")[:100],
        "log": log.name,
    }


def done(command: Sequence[str], apart: bool, limit: float) -> tuple[int, str]:
    """Exit status and output. `apart`: in an empty folder, where no result of before makes it skip anything, and with
    memory from the driver itself: within what torch's cache holds, no read would be out of bounds.

    Ended with all that it started: compute-sanitizer's program would keep the device without it.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if apart:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with tempfile.TemporaryDirectory(prefix="gpu-test-") as scratch:
        environment |= {
            "OUT": scratch,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }
        process = subprocess.Popen(
            command, cwd=scratch if apart else ROOT, env=environment, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return OUT_OF_TIME, process.communicate()[0]
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output
