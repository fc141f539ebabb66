"""The store of edits: what was acknowledged is there after kill -9, and nothing else."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from server.api.edits.store import EditStore, StoredEdit
from server.errors import SettingsError
from server.memory.edits import EditedRows

ROOT = Path(__file__).parents[2]
WRITER = """
import sys
import numpy as np
from pathlib import Path
from server.api.edits.store import EditStore
from server.memory.edits import EditedRows
store, number = EditStore(Path(sys.argv[1])), 0
for old in store.all():
    number = max(number, int(old.asked["prompt"]) + 1)
print("ready", flush=True)
while True:
    asked = {"prompt": str(number), "completion": "x"}
    edit = store.add(tenant="t", kind="fact", pack="p", memory="m", asked=asked, author="t", most=10**9)
    print("add", edit.id, number, flush=True)
    store.begin(edit.id)
    rows = EditedRows(np.arange(200), np.full((200, 16), number, np.float32))
    if number % 4 == 3:
        store.remove(edit.id, "t")
        print("remove", edit.id, number, flush=True)
    else:
        store.finish(edit.id, {1: rows}, {"number": number})
        print("finish", edit.id, number, flush=True)
    number += 1
"""


def killed_writer(path: Path, seconds: float) -> list[tuple[str, str, int]]:
    """What a writer acknowledged before it was killed in the middle of something."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        lines = [line.split() for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    return [(what, edit, int(number)) for what, edit, number in lines]


def check_after_kill(path: Path, acknowledged: dict[str, str], numbers: dict[str, int]) -> None:
    """Every acknowledged edit is there in the state acknowledged, or in the next one, which was on its way."""
    store = EditStore(path)
    there = {edit.id: edit for edit in store.all()}
    rows = dict(store.edited("t"))
    for edit, state in acknowledged.items():
        assert (edit in there) or (state in ("remove", "add") and numbers[edit] % 4 == 3), (edit, state)
        if state == "finish":
            assert there[edit].status == "done" and there[edit].report == {"number": numbers[edit]}
            (edited,) = rows[edit].values()
            assert np.array_equal(edited.values, np.full((200, 16), numbers[edit], np.float32))
    unknown = [there[edit] for edit in there.keys() - acknowledged.keys()]
    assert len(unknown) <= 1  # written, and killed before it could be said
    assert all(state != "remove" or edit not in there for edit, state in acknowledged.items())
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)
    for edit in unknown:
        acknowledged[edit.id], numbers[edit.id] = "add", int(edit.asked["prompt"])
    store.close()


def kill_times(path: Path, times: int) -> None:
    acknowledged: dict[str, str] = {}
    numbers: dict[str, int] = {}
    generator = np.random.default_rng(0)
    for _ in range(times):
        for what, edit, number in killed_writer(path, float(generator.uniform(0.005, 0.08))):
            acknowledged[edit], numbers[edit] = what, number
        check_after_kill(path, acknowledged, numbers)
    assert len(acknowledged) > times


def test_acknowledged_edits_survive_kill_nine(tmp_path: Path) -> None:
    kill_times(tmp_path / "edits.db", 20)


@pytest.fixture
def store(tmp_path: Path) -> EditStore:
    return EditStore(tmp_path / "folder" / "edits.db")


def fact(store: EditStore, tenant: str = "t", most: int = 9) -> StoredEdit | None:
    asked = {"prompt": "a", "completion": "b"}
    return store.add(tenant=tenant, kind="fact", pack="p", memory="m", asked=asked, author=tenant, most=most)


def test_a_job_that_was_cut_short_is_queued_again(store: EditStore, tmp_path: Path) -> None:
    edit = fact(store)
    assert edit is not None and store.begin(edit.id) and not store.begin(edit.id)
    store.close()
    again = EditStore(tmp_path / "folder" / "edits.db")
    assert [each.id for each in again.queued()] == [edit.id]


def test_quotas_count_a_tenants_own_and_forgive_failures(store: EditStore) -> None:
    first = fact(store, most=1)
    assert first is not None and fact(store, most=1) is None and fact(store, "u", most=1) is not None
    store.fail(first.id, {"error": "no"})
    assert fact(store, most=1) is not None


def test_a_removed_edit_is_not_finished_any_more(store: EditStore) -> None:
    edit = fact(store)
    assert edit is not None and store.begin(edit.id) and store.remove(edit.id, "t")
    assert not store.finish(edit.id, {1: EditedRows(np.arange(2), np.zeros((2, 4), np.float32))}, {})
    assert store.all() == [] and store.edited("t") == []
    assert [line["what"] for line in store.audit(9)] == ["removed", "fact asked for"]


def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but long enough to be read as one: " * 100)
    with pytest.raises(SettingsError, match="--edits-db"):
        EditStore(path)
    assert path.read_text().startswith("not a database")


@pytest.mark.parametrize(
    "harm",
    [
        "UPDATE rows SET dim = 0",
        "UPDATE rows SET ids = 'words'",
        "UPDATE rows SET vals = x'00'",
        "UPDATE edits SET asked = '{'",
        "UPDATE edits SET asked = '[]'",
        'UPDATE edits SET asked = \'{"prompt": 1, "completion": 2}\'',
        "UPDATE edits SET kind = 'guess'",
        "UPDATE edits SET report = 'null and void'",
        "UPDATE audit SET detail = ''",
    ],
)
def test_a_damaged_store_is_refused_at_the_start_in_one_line(store: EditStore, tmp_path: Path, harm: str) -> None:
    edit = fact(store)
    assert edit is not None and store.begin(edit.id)
    assert store.finish(edit.id, {1: EditedRows(np.arange(2), np.zeros((2, 4), np.float32))}, {})
    store.close()
    path = tmp_path / "folder" / "edits.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute(harm)
        db.commit()
    with pytest.raises(SettingsError, match="cannot be used") as refused:
        EditStore(path)
    assert "\n" not in str(refused.value)


def test_a_store_of_damaged_pages_is_refused_at_the_start(store: EditStore, tmp_path: Path) -> None:
    fact(store)
    store.close()
    path = tmp_path / "folder" / "edits.db"
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + b"\xff" * (len(whole) - 8192))
    with pytest.raises(SettingsError, match="cannot be used"):
        EditStore(path)
