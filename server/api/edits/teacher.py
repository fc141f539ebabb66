"""The teaching process, as the API sees it: started with the first job, asked one thing at a time, ended when idle.

    job ─ one JSON line ─▶ python -m server.training.facts ─ one JSON line ─▶ rows and report, or an error

Its interpreter is its own, so that neither this process nor the engine waits for a step of it. Knows lines and a
process; nothing of edits.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import server
from server.errors import RequestError, StepFailed
from server.settings import Settings

MODULE = "server.training.facts"
LONGEST_LINE = 1 << 30
CLOSE_SECONDS = 5.0
NICENESS = 5  # a quarter of a core where the engine wants all of them


class TeachingProcess:
    """`pid`: of the process, None while there is none."""

    def __init__(self, settings: Settings) -> None:
        self._settings = json.dumps({"model": settings.model, "dtype": settings.dtype})
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one job. Raises RequestError with what it was refused with, StepFailed if the process ended."""
        async with self._turn:
            try:
                process = await self._running()
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write(json.dumps(job).encode() + b"\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
            except asyncio.CancelledError:
                await self._end()  # an answer that nobody took must not be the next one's
                raise
            except OSError as error:
                line, cause = b"", str(error)
            else:
                cause = ""
            if not line:
                code = await self._end()
                raise StepFailed(f"the teaching process ended with {code} before it answered {cause}".rstrip())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RequestError(answer["error"])
        return answer

    async def close(self) -> None:
        """Ends the process; the next job starts another."""
        async with self._turn:
            await self._end()

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            root = str(Path(server.__file__).parents[1])
            paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", MODULE, self._settings,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=LONGEST_LINE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )  # fmt: skip
            # Before it has loaded a thing, which takes seconds of a core. In a session of its own niceness would mean
            # nothing: Linux shares processors between sessions first (sched(7), autogroups).
            os.setpriority(os.PRIO_PROCESS, self._process.pid, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
        return self._process

    async def _end(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(process.wait(), CLOSE_SECONDS)
        return None
