"""`loadtest/overhead.py` from end to end on a tiny model: its files, its exit code, and what must be equal is."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.commands.attach import attach
from tests.live import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("locust") is None, reason="no locust: pip install -e '.[loadtest]'"
)


@pytest.fixture
def tiny_pack(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """Two heads of bigrams and trigrams at two layers."""
    shape: dict[str, Any] = {"rows": 500, "dim": 8, "heads": 2, "orders": (2, 3), "seed": 0, "dtype": "bfloat16"}
    attach(model=str(tiny_llama_folder), out=tmp_path / "pack", layers=(1, 2), **shape)
    return tmp_path / "pack"


def test_overhead_writes_figures_a_line_per_turn_and_a_picture(
    tiny_llama_folder: Path, tmp_path: Path, tiny_pack: Path
) -> None:
    arguments = (
        "--model",
        str(tiny_llama_folder),
        "--memory",
        str(tiny_pack),
        "--out",
        str(tmp_path),
        "--seconds",
        "5",
    )
    command = [sys.executable, "-m", "loadtest.overhead", *arguments, "--tokens", "4", "--serve", "--kv-bytes", "32M"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    result: dict[str, Any] = json.loads((tmp_path / "overhead.json").read_text())
    assert done.returncode == result["exit_code"], done.stderr
    assert set(result["overhead"]) == {"offload over resident", "offload over none", "resident over none"}
    assert set(result["overhead"]["offload over resident"]) == {"1", "8"}
    assert result["same_text_offload_and_resident"] == 1.0  # a table's place changes no value
    assert result["memory"]["none"] is None
    assert result["memory"]["offload"]["rows"] == result["memory"]["resident"]["rows"] > 0
    assert result["memory"]["resident"]["hit_rate"] == 1.0
    lines = (tmp_path / "overhead.csv").read_text().splitlines()
    assert len(lines) == 1 + result["rounds"] * 3 * 2
    assert (tmp_path / "overhead.png").read_bytes()[:4] == b"\x89PNG"
    assert "offload over resident" in done.stdout
