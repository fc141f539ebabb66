"""Tiers through a whole engine: wherever a pack's tables live, the logits are the same to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.commands.attach import attach
from server.errors import CapacityError, SettingsError
from tests.engines import engine_on, logits_of
from tests.memory.conftest import randomise
from tests.memory.stems import save_stem

PROMPT = tuple(range(40, 100))


@pytest.fixture(scope="session")
def packs(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An Engram pack at layers 1 and 3 and a STEM pack at layer 2, with random contents."""
    folder = tmp_path_factory.mktemp("tiers")
    sizes = {"layers": (1, 3), "rows": 500, "dim": 16, "heads": 4, "dtype": "float32"}
    engram = randomise(attach(model=str(tiny_llama_folder), out=folder / "engram", **sizes), 1)
    generator = torch.Generator().manual_seed(0)
    stem = save_stem(folder / "stem", {2: torch.randn(49152, 160, generator=generator)}, 64)
    return f"engram={engram}", f"stem={stem}"


@pytest.fixture(scope="session")
def mapped_logits(tiny_llama_folder: Path, packs: tuple[str, str]) -> torch.Tensor:
    return logits_of(engine_on(str(tiny_llama_folder), memory=packs), PROMPT, ("engram", "stem"))


@pytest.mark.parametrize(
    "flags",
    [
        {"placement": ("device",)},
        {"placement": ("pinned",)},
        {"placement": ("engram/1=device", "engram/3=pinned", "stem=mapped")},
        {"placement": ("stem=device",), "read": "pread"},
        {"placement": ("device",), "prefetch": "off"},
    ],
    ids=str,
)
def test_logits_are_the_same_to_the_bit_wherever_rows_live(
    flags: dict[str, object], tiny_llama_folder: Path, packs: tuple[str, str], mapped_logits: torch.Tensor
) -> None:
    made = engine_on(str(tiny_llama_folder), memory=packs, max_num_batched_tokens=32, **flags)
    assert torch.allclose(logits_of(made, PROMPT, ("engram", "stem")), mapped_logits, atol=1e-4)  # other chunks
    whole = engine_on(str(tiny_llama_folder), memory=packs, **flags)
    assert torch.equal(logits_of(whole, PROMPT, ("engram", "stem")), mapped_logits)
    read = {(c.table, c.layer): c.rows for c in whole.stats().memory}
    assert read.keys() == {("engram/1", 1), ("engram/3", 3), ("stem/2", 2)}
    assert read["engram/1", 1] == 8 * len(PROMPT)


def test_a_table_on_the_device_needs_no_staging(tiny_llama_folder: Path, packs: tuple[str, str]) -> None:
    made = engine_on(str(tiny_llama_folder), memory=packs, placement=("device",), staging=64)
    assert made.scheduler.budget == 512
    with pytest.raises(CapacityError, match="raise --staging"):
        engine_on(str(tiny_llama_folder), memory=packs, staging=64)


def test_what_cannot_be_placed_is_refused_before_loading(tiny_llama_folder: Path, packs: tuple[str, str]) -> None:
    with pytest.raises(SettingsError, match="names 'other'"):
        engine_on(str(tiny_llama_folder), memory=packs, placement=("other=device",))
    with pytest.raises(CapacityError, match=r"stem/2 takes 31457280 bytes .*--host-memory-limit"):
        engine_on(str(tiny_llama_folder), memory=packs, placement=("stem=pinned",), host_memory_limit=1 << 20)
