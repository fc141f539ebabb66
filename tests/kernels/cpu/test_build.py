"""The library is built once, shared by later starts, and its absence has a reason."""

from __future__ import annotations

import shutil
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
