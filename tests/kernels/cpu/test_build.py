"""The library is built once, shared by later starts, and its absence has a reason."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kernels.cpu import build
from kernels.cpu.build import NoKernels

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, build.COMPILERS)), reason="no C compiler: the kernels are not used here"
)


@needs_compiler
def test_a_second_start_finds_what_the_first_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = build.build(), build.build()
    assert first.seconds > 0 and second.seconds == 0
    assert first.path == second.path and list(first.path.parent.iterdir()) == [first.path]


@needs_compiler
def test_another_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.fingerprint(build.compiler())
    changed = tmp_path / "decode.c"
    changed.write_text(build.SOURCE.read_text() + "\n")
    monkeypatch.setattr(build, "SOURCE", changed)
    assert build.fingerprint(build.compiler()) != before


def test_without_a_compiler_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoKernels, match="no C compiler"):
        build.build()


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(NoKernels, match="false failed: exit status 1"):
        build.build()
    assert list((tmp_path / "engram-server").iterdir()) == []


@needs_compiler
def test_a_library_cut_short_is_built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a machine that stops before the disk has the file leaves it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = build.folder() / f"decode-{build.fingerprint([*build.compiler(), *build.FLAGS, *build.openmp()])}.so"
    path.write_bytes(b"")
    built = build.build()
    assert built.path == path and built.seconds > 0 and built.library.lanes() > 0


def test_starts_of_one_process_id_do_not_build_into_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers that share a cache folder: their ids are alike, and both build."""
    path, outputs = tmp_path / "kept.so", list[Path]()

    def run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
        outputs.append(output := Path(command[command.index("-o") + 1]))
        if len(outputs) == 1:
            build.compiled(["cc"], path)  # the other start, meanwhile
        output.write_bytes(b"whole")
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(build, "_run", run)
    build.compiled(["cc"], path)
    assert outputs[0] != outputs[1] and list(tmp_path.iterdir()) == [path]


def test_where_nothing_can_be_written_there_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(prefix: str) -> str:
        raise FileNotFoundError("no usable temporary directory")

    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(build.tempfile, "mkdtemp", refused)
    with pytest.raises(NoKernels, match="no folder to build them in"):
        build.folder()
