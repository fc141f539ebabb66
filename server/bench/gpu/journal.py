"""The results of all measurements on one machine, in one file, and the time a command may take.

    build/gpu/gpu.json    {"format": 1, "runs": {key: {verb, config, commit, command, device, figures, …}}}

A measurement is named by device, commit, verb and configuration: what is there already is not measured again, so that
a command cut short by its budget goes on where it stopped. Written whole after every measurement, never half, and
also to the folder of results where that is another one. Knows nothing of what the figures mean.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.bench.paired import write_json
from server.errors import SettingsError

FORMAT = 1
FILE = "gpu.json"
HOME = Path("build/gpu")
MOST_BYTES = 16 << 20  # in one file of the folder of results

Figures = dict[str, Any]


@dataclass(slots=True)
class Budget:
    """`seconds` of wall time for one command. Work is begun only if it ends in time, as far as one can tell."""

    seconds: float
    begun: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begun)

    def allows(self, seconds: float) -> bool:
        return self.left >= seconds


class Journal:
    """`out`: the folder of results. `device`: the report of `device.py`; its name and commit are part of every key."""

    def __init__(self, out: Path, device: Mapping[str, Any], home: Path = HOME) -> None:
        self.paths = tuple(dict.fromkeys(folder.resolve() / FILE for folder in (home, out)))
        self.device = dict(device)
        self.runs: dict[str, Any] = {}
        for path in self.paths:
            self.runs |= read(path)
        if self.runs:
            self._write()  # the folder of results may be a fresh one

    def key(self, verb: str, config: Mapping[str, Any]) -> str:
        named = [self.device["gpu"], self.device["commit"], verb, dict(config)]
        return f"{verb}-{hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]}"

    def find(self, verb: str, config: Mapping[str, Any]) -> Figures | None:
        """What was measured before on this device, at this commit, with this configuration."""
        run = self.runs.get(self.key(verb, config))
        return None if run is None else run["figures"]

    def add(self, verb: str, config: Mapping[str, Any], figures: Figures, seconds: float) -> None:
        self.runs[self.key(verb, config)] = {
            "verb": verb,
            "config": dict(config),
            "seconds": round(seconds, 1),
            "device": self.device,
            "figures": figures,
        }
        self._write()

    def _write(self) -> None:
        for path in self.paths:
            write_json(path, {"format": FORMAT, "runs": self.runs})


def read(path: Path) -> dict[str, Any]:
    """The runs in a file of results; none if it is not there. Raises SettingsError for a file of another kind."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        return dict(content["runs"])
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} holds no results of format {FORMAT} ({error}); move it away") from None
