"""decode.c as a shared library: built once with the machine's own C compiler, kept in the user's cache folder.

    ~/.cache/engram-server/decode-<hash of source, compiler, processor, OpenMP>.so

A package index brings no compiler, so that one may be missing: NoKernels says why, and callers go on without. The
library shares torch's OpenMP threads; a second pool would spin against the first. Knows nothing of tensors.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from server.settings import cache_folder

SOURCE = Path(__file__).with_name("decode.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")
BUILD_SECONDS = 120.0


class NoKernels(Exception):
    """The library cannot be had here; the message is the reason, as a clause."""


@dataclass(frozen=True)
class Built:
    """`seconds`: what compiling took now; 0 if it was there from an earlier start."""

    library: ctypes.CDLL
    path: Path
    seconds: float


@functools.cache
def library() -> Built:
    """What `build` gives, once a process. Raises NoKernels."""
    return build()


def build() -> Built:
    """Compiles, or finds what an earlier start compiled, and loads it. Raises NoKernels."""
    command = [*compiler(), *FLAGS, *openmp()]
    path = folder() / f"decode-{fingerprint(command)}.so"
    if path.exists():
        with suppress(NoKernels):  # cut short by a crash or a full disk: built anew
            return Built(loaded(path), path, 0.0)
    begun = time.perf_counter()
    compiled(command, path)
    return Built(loaded(path), path, time.perf_counter() - begun)


def compiler() -> list[str]:
    """The command of $CC, else the first of COMPILERS that is there. Raises NoKernels."""
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        return named
    found = next((path for path in map(shutil.which, COMPILERS) if path is not None), None)
    if found is None:
        raise NoKernels("there is no C compiler (cc, gcc or clang)")
    return [found]


def openmp() -> list[str]:
    """Flags for the OpenMP library that torch has loaded; none where torch brings none of GNU's."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return ["-fopenmp", str(libraries[0])] if libraries else []


def fingerprint(command: list[str]) -> str:
    """Changes with the source, the command, the compiler's version and the processor that -march=native asks for."""
    version = _run([command[0], "--version"]).stdout
    return hashlib.blake2b(
        b"\0".join([SOURCE.read_bytes(), shlex.join(command).encode(), version, processor().encode()]), digest_size=12
    ).hexdigest()


def processor() -> str:
    """What tells instruction sets apart: the flags of /proc/cpuinfo, or what `platform` knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kept = dict.fromkeys(line for line in lines if line.startswith(("flags", "Features", "model name")))
    return "\n".join(kept) or f"{platform.machine()} {platform.processor()}"


def folder() -> Path:
    """Where the library is kept: the cache folder, or a fresh temporary one if that cannot be written.

    Raises NoKernels where neither can be.
    """
    with suppress(OSError, RuntimeError):  # RuntimeError: nobody's home
        kept = cache_folder()
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(kept, os.W_OK | os.X_OK):
            return kept
    try:
        return Path(tempfile.mkdtemp(prefix="engram-server-"))
    except OSError as error:
        raise NoKernels(f"there is no folder to build them in: {error}") from error


def compiled(command: list[str], path: Path) -> None:
    """Builds beside `path` and renames, so that two starts at once do not see half a file. Raises NoKernels.

    Beside means in a folder of its own: the starts may be of containers, whose process ids are alike.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as made:
            partial = Path(made) / path.name
            done = _run([*command, str(SOURCE), "-o", str(partial), "-lm"])
            if done.returncode:
                said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
                raise NoKernels(f"{command[0]} failed: {said[0]}")
            partial.replace(path)
    except OSError as error:
        raise NoKernels(f"{path} cannot be written: {error}") from error


def loaded(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoKernels(f"{path} cannot be loaded: {error}") from error


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, capture_output=True, timeout=BUILD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernels(f"{command[0]} cannot be run: {error}") from error
