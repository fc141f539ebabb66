"""The store of edits, killed a hundred times while it writes."""

from __future__ import annotations

from pathlib import Path

from tests.api.test_edit_store import kill_times


def test_a_hundred_kills_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    kill_times(tmp_path / "edits.db", 100)
