"""The documentation is true: its commands run as printed, its links lead somewhere, both READMEs say the same.

A fenced block of kind `bash` is run here, in an empty folder, unless its info string says what it needs:

    ```bash                   run by test_untagged_commands_run_as_printed
    ```bash needs=server      run by test_server_commands_get_an_answer against a live server
    ```bash needs=install     a package index and minutes: the two commands; .ci/run in a fresh clone runs them
    ```bash needs=minutes     longer than a test may take
    ```bash needs=prometheus  run by tests/soak/test_by_hand.py, where prometheus is installed
    ```bash needs=locust      run by tests/loadtest/test_commands.py against a live server
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.live import live_server

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.ko.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = {"server", "install", "minutes", "gpu", "docker", "admin", "prometheus", "locust"}


@dataclass(frozen=True)
class Block:
    """One fenced block of shell commands."""

    page: str
    line: int
    needs: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text, found = page.read_text(encoding="utf-8"), []
    for match in re.finditer(r"^```(?:bash|sh|shell|console)\b([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(str(page.relative_to(ROOT)), line, match[1].strip().removeprefix("needs="), match[2]))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
# The Korean README holds the same commands (a test below); once is enough.
RUN = [block for block in BLOCKS if not block.needs and block.page != "README.ko.md"]
ASK = [block for block in BLOCKS if block.needs == "server" and block.page != "README.ko.md"]


def test_every_command_is_run_here_or_says_what_it_needs() -> None:
    assert BLOCKS
    assert not {str(block): block.needs for block in BLOCKS if block.needs and block.needs not in NEEDS}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder where `.venv/bin/engram-server` is this project, wherever the tests' own environment lies."""
    program = tmp_path / ".venv" / "bin" / "engram-server"
    program.parent.mkdir(parents=True)
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} -m server "$@"\n'
    )
    program.chmod(0o755)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("block", RUN, ids=str)
def test_untagged_commands_run_as_printed(block: Block, clone: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(clone / "cache")}
    command = ["bash", "-euo", "pipefail", "-c", block.text]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The default model on a free port."""
    with live_server(tmp_path_factory.mktemp("server") / "log", "--kv-bytes", "512M") as live:
        yield live.port


@pytest.mark.slow
@pytest.mark.parametrize("block", ASK, ids=str)
def test_server_commands_get_an_answer(block: Block, port: int) -> None:
    command = block.text.replace(":8000", f":{port}").replace("curl ", "curl --fail-with-body -sS ")
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    if "capital of France" in command:
        assert "Paris" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_and_folders_exist(page: Path) -> None:
    for name in re.findall(r"`((?:server|kernels|tests|docs)/[\w./-]*)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{page} names {name}"


def test_both_readmes_have_the_same_shape_and_commands() -> None:
    english, korean = (ROOT / name for name in ("README.md", "README.ko.md"))
    shapes = [re.findall(r"^#+(?= )", page.read_text(encoding="utf-8"), re.MULTILINE) for page in (english, korean)]
    assert shapes[0] == shapes[1]
    commands = [[(block.needs, block.text) for block in blocks_of(page)] for page in (english, korean)]
    assert commands[0] == commands[1]
    links = [re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))[1:] for page in (english, korean)]
    assert links[0] == links[1]


def test_generated_pages_are_fresh() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, ROOT / "docs/generate.py", "--check"], env=environment, text=True)
    assert done.returncode == 0


def test_the_readmes_make_targets_exist() -> None:
    text = "".join(block.text for block in BLOCKS)
    for target in set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE)):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
