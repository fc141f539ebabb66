"""A small pack for the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.commands.attach import attach


@pytest.fixture(scope="session")
def tiny_pack(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two heads of bigrams and trigrams at two layers."""
    pack = tmp_path_factory.mktemp("packs") / "tiny"
    shape = {"rows": 500, "dim": 8, "heads": 2, "orders": (2, 3), "seed": 0, "dtype": "bfloat16"}
    attach(model=str(tiny_llama_folder), out=pack, layers=(1, 2), **shape)
    return pack
