"""The process beside a server that teaches facts: one job after another, on one thread, at low priority, in bites.

    stdin    one JSON object a line: a job {"id", "pack", "ids", "learnt", "rows", "earlier"}, or {"id", "export", …}
    stdout   one JSON object a line: {"id", "rows", "report"} or {"id", "error"}

`python -m server.training.facts SETTINGS` holds the frozen backbone from its first job on and ends with its stdin. A
job starts from the rows that its tenant sees, changes only rows that its own n-grams address, keeps right the earlier
facts that read some of these, and rests between steps. Knows rows and texts; nothing of tenants, stores or engines.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from server.batch import Ints
from server.cache.row_types import Floats
from server.errors import EngramError, PackError
from server.models.source import ModelSource, open_source
from server.runtime.load import choose_dtype
from server.settings import Settings
from server.training.data import Example
from server.training.edit import Edit, teach_text
from server.training.export import export_pack
from server.training.frozen import Frozen
from server.training.memory import TaughtMemory, addresses
from server.training.shared_rows import SharedRows
from server.training.start import Opened, open_to_teach, teachable

# Seconds of rest for each second of a step: the engine's threads wait for one another, so that one disturbed is all.
REST, LONGEST_REST = 4.0, 1.0
NEIGHBOURS = 4  # earlier facts that are kept right while a new one changes rows that they read

Rows = Mapping[int, tuple[Ints, Floats]]


class Teacher:
    """Backbone and packs, loaded when first asked for and kept. `rest`: seconds after each second of a step."""

    def __init__(self, settings: Settings, rest: float = REST) -> None:
        self._settings, self._device, self._rest = settings, torch.device("cpu"), rest
        self._source: ModelSource | None = None
        self._frozen: Frozen | None = None
        self._packs: dict[Path, tuple[Opened, SharedRows]] = {}

    @property
    def source(self) -> ModelSource:
        if self._source is None:
            self._source = open_source(self._settings.model)
        return self._source

    def frozen(self) -> Frozen:
        if self._frozen is None:
            dtype = choose_dtype(self._settings, self.source, self._device)
            self._frozen = Frozen(self.source, dtype, self._device, self.source.config.max_position_embeddings)
        return self._frozen

    def pack(self, folder: Path) -> tuple[Opened, SharedRows]:
        if folder not in self._packs:
            opened = open_to_teach(folder, self.source, self._device)
            self._packs[folder] = opened, SharedRows(opened, self.source)
        return self._packs[folder]

    def teach(
        self, folder: Path, example: Example, seen: Rows, earlier: Sequence[Example] = ()
    ) -> tuple[Edit, dict[str, Any]]:
        """The rows to edit and the report. `seen`: edited rows that whoever asked reads already, `earlier`: the facts
        that these came from.
        """
        begun, cpu = time.perf_counter(), time.process_time()
        opened, shared = self.pack(folder)
        if opened.fresh:
            raise PackError(f"{folder.name} was never taught; a fact needs a memory that knows something")
        kept = neighbours(opened, example, earlier)
        memory = teachable(opened, self.frozen(), [example], kept)
        put(memory, seen)
        edit = teach_text(self.frozen(), memory, [example, *kept], between=Rest(self._rest))
        touched = {layer: ids for layer, (ids, _) in edit.rows.items()}
        report = {
            "learnt": edit.learnt,
            "rows": sum(len(ids) for ids, _ in edit.rows.values()),
            "loss_before": round(edit.loss_before, 6),
            "loss_after": round(edit.loss_after, 6),
            "steps": edit.steps,
            "kept_right": len(kept),
            "seconds": round(time.perf_counter() - begun, 3),
            "core_seconds": round(time.process_time() - cpu, 3),
            "shared_with_facts": shared.with_facts(touched),
            "shared_with_hot": shared.with_hot(touched),
        }
        return edit, report


def neighbours(opened: Opened, example: Example, earlier: Sequence[Example]) -> list[Example]:
    """Of the earlier facts, those that share most rows with the new one."""
    own = addresses(opened.addresser, example.ids)
    shared = [
        sum(int(np.isin(ids[1:], own[layer][1:]).sum()) for layer, ids in addresses(opened.addresser, each.ids).items())
        for each in earlier
    ]
    most = sorted(range(len(earlier)), key=lambda index: -shared[index])[:NEIGHBOURS]
    return [earlier[index] for index in most if shared[index]]


class Rest:
    """Called after every step: leaves the core to others for a while; ends the process if its server is gone."""

    def __init__(self, share: float) -> None:
        self._share, self._parent, self._at = share, os.getppid(), time.perf_counter()

    def __call__(self) -> None:
        if os.getppid() != self._parent:
            raise SystemExit(0)
        time.sleep(min(LONGEST_REST, self._share * (time.perf_counter() - self._at)))
        self._at = time.perf_counter()


@torch.no_grad()
def put(memory: TaughtMemory, seen: Rows) -> None:
    """Masters begin at the rows as they are seen."""
    for layer, (ids, values) in seen.items():
        rows = memory.rows[layer]
        held = np.isin(ids, np.concatenate([rows.taught, rows.read]))
        if held.any():
            rows.values[rows.places(ids[held])] = torch.from_numpy(values[held]).to(rows.values.device)


def encoded(rows: Rows) -> dict[str, Any]:
    return {
        str(layer): [base64.b64encode(ids.astype("<i8").tobytes()).decode(), values.shape[1],
                     base64.b64encode(values.astype("<f4").tobytes()).decode()]
        for layer, (ids, values) in rows.items()
    }  # fmt: skip


def decoded(rows: Mapping[str, Any]) -> dict[int, tuple[Ints, Floats]]:
    return {
        int(layer): (
            np.frombuffer(base64.b64decode(ids), "<i8").copy(),
            np.frombuffer(base64.b64decode(values), "<f4").reshape(-1, dim).copy(),
        )
        for layer, (ids, dim, values) in rows.items()
    }


def answer(teacher: Teacher, job: Mapping[str, Any]) -> dict[str, Any]:
    folder, seen = Path(job["pack"]), decoded(job["rows"])
    if "export" in job:
        export_pack(folder, Path(job["export"]), teacher.pack(folder)[0], seen, job["about"])
        return {"id": job["id"]}
    example = Example(np.array(job["ids"], np.int64), job["learnt"])
    earlier = [Example(np.array(ids, np.int64), learnt) for ids, learnt in job["earlier"]]
    edit, report = teacher.teach(folder, example, seen, earlier)
    rows = {layer: (ids, values.numpy()) for layer, (ids, values) in edit.rows.items()}
    return {"id": job["id"], "rows": encoded(rows), "report": report}


def main(settings: Settings, jobs: BinaryIO, answers: BinaryIO) -> None:
    """Until `jobs` ends. What goes wrong in a job is its answer."""
    torch.set_num_threads(1)
    teacher = Teacher(settings)
    for line in jobs:
        job = json.loads(line)
        try:
            result = answer(teacher, job)
        except EngramError as error:
            result = {"id": job["id"], "error": error.message}
        except Exception as error:
            logging.getLogger(__name__).exception("a job failed")
            result = {"id": job["id"], "error": f"the job failed: {type(error).__name__}: {error}"}
        answers.write(json.dumps(result).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    os.setpgid(0, 0)  # Ctrl-C is for the server, which ends this process itself
    main(Settings(**json.loads(sys.argv[1])), sys.stdin.buffer, sys.stdout.buffer)
