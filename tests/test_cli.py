"""The command line: its verbs, its exit codes, and one line for what goes wrong."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import server
from server.cli import app, default_text
from server.settings import FIELDS, flag, typed
from tests.live import live_server

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**{k: v for k, v in os.environ.items() if not k.startswith("ENGRAM_")}, "COLUMNS": "200"}


def run(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """`engram-server` as a user starts it."""
    command = [sys.executable, "-m", "server", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_help_lists_the_verbs() -> None:
    done = run("--help")
    assert done.returncode == 0
    for verb in ("serve", "convert", "attach", "inspect", "bench"):
        assert re.search(rf"^│ {verb} ", plain(done.stdout), re.MULTILINE)


def test_serves_help_shows_every_setting_with_its_default_and_choices() -> None:
    shown = " ".join(plain(CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "240"}).output).split())
    for name, field in FIELDS.items():
        assert flag(name) in shown
        assert field.metadata["help"] in shown
        for choice in field.metadata["choices"]:
            assert choice in shown


@pytest.mark.parametrize("name", [name for name in FIELDS if default_text(name)])
def test_a_default_as_shown_can_be_typed(name: str) -> None:
    assert typed(name, default_text(name), flag(name)) == FIELDS[name].default


def test_the_version_is_the_packages() -> None:
    assert run("--version").stdout.strip() == server.__version__


@pytest.mark.parametrize("arguments", [["--nonsense"], ["serve", "--nonsense"], ["nonsense"], ["convert"]])
def test_a_wrong_command_line_exits_2_without_a_traceback(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Error" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["serve", "--port", "x"], 2, "error: --port is 'x'; it must be a whole number"),
        (["serve", "--config", "missing.yaml"], 2, "error: --config missing.yaml cannot be read"),
        (["attach", "x", "--out", "y", "--layers", "1,b"], 2, "error: --layers is '1,b'"),
        (["convert", "nowhere/at/all", "--out", "y"], 3, "error: no model at 'nowhere/at/all'"),
        (["inspect", "nowhere"], 4, "error: nowhere is no memory pack"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_its_exit_code(arguments: list[str], code: int, line: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_a_mistake_of_ours_is_one_line_too_and_dev_mode_shows_where(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(
        "import sys, server.cli as cli\n"
        "cli.resolve = lambda *_: 1 // 0\n"
        "sys.argv = ['engram-server', 'serve']\n"
        "cli.main()\n"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    for flags, lines in (([], 1), (["-X", "dev"], 2)):
        command = [sys.executable, *flags, str(script)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 1
        assert min(done.stderr.count("\n"), 2) == lines
        assert "ZeroDivisionError" in done.stderr


def test_help_answers_at_once() -> None:
    """It loads no torch and nothing else that takes long: well under a second and a half of its processor time."""
    command = [sys.executable, "-X", "importtime", "-m", "server", "--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "server.cli" in loaded
    assert not loaded & {"torch", "triton", "transformers", "fastapi", "uvicorn"}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


@pytest.mark.slow
def test_a_fresh_pack_is_what_the_flags_say(tmp_path: Path, tiny_llama_folder: Path) -> None:
    pack = tmp_path / "pack"
    arguments = ["--layers", "1,2", "--rows", "200", "--dim", "8", "--heads", "2", "--orders", "2,3"]
    done = run("attach", str(tiny_llama_folder), "--out", str(pack), *arguments)
    assert (done.returncode, done.stdout.strip()) == (0, f"wrote {pack}"), done.stderr
    found = json.loads(run("inspect", str(pack), "--json").stdout)
    assert (found["layers"], found["orders"], found["heads"]) == ([1, 2], [2, 3], 2)
    again = run("attach", str(tiny_llama_folder), "--out", str(pack))
    assert (again.returncode, again.stderr.count("\n")) == (4, 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_announces_a_line_that_works_and_leaves_quietly(
    number: signal.Signals, tmp_path: Path, tiny_llama_folder: Path
) -> None:
    log = tmp_path / "log"
    with live_server(log, "--model", str(tiny_llama_folder), "--kv-bytes", "8M") as live:
        pasted = log.read_text().splitlines()[-1]
        assert pasted.startswith(f"curl -N {live.url}/v1/chat/completions")
        answer = subprocess.run(["bash", "-c", pasted], capture_output=True, text=True, timeout=60)
        assert answer.stdout.rstrip().endswith("data: [DONE]")
        busy = run("serve", "--port", str(live.port))
        assert (busy.returncode, busy.stderr.count("\n")) == (2, 1)
        assert f"cannot listen on 127.0.0.1:{live.port}" in busy.stderr
        live.process.send_signal(number)
        assert live.process.wait(20) == 0
    assert "Traceback" not in log.read_text()
