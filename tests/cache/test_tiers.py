"""Tiers through a whole engine: wherever a pack's tables live, the logits are the same to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.commands.attach import attach
from server.errors import CapacityError, SettingsError
from server.runtime.messages import SamplingParams, Submit
from tests.engines import engine_on, logits_of, outputs_of, tokens_of
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


def test_under_a_limit_logits_are_the_same_and_pages_are_counted(
    tiny_llama_folder: Path, packs: tuple[str, str], mapped_logits: torch.Tensor
) -> None:
    flags = {"host_memory_limit": 24 << 20, "max_num_batched_tokens": 8}
    made = engine_on(str(tiny_llama_folder), memory=packs[1:], **flags)
    free = engine_on(str(tiny_llama_folder), memory=packs[1:], max_num_batched_tokens=8)
    assert torch.equal(logits_of(made, PROMPT, ("stem",)), logits_of(free, PROMPT, ("stem",)))
    assert made.runner.memories is not None and made.runner.memories.residency is not None
    made.runner.memories.residency._count()
    ((table, layer, found),) = made.runner.memories.resident()
    assert (table, layer, found.counted) == ("stem/2", 2, "touched")
    assert len(set(PROMPT)) * 640 <= found.nbytes <= 24 << 20
    copied = engine_on(str(tiny_llama_folder), memory=packs[:1], placement=("pinned",))
    assert [r.counted for r in copied.stats().resident] == ["copied", "copied"]


def test_a_limit_below_what_two_steps_read_is_refused_with_both_numbers(
    tiny_llama_folder: Path, packs: tuple[str, str]
) -> None:
    with pytest.raises(CapacityError, match=r"--host-memory-limit is 4096 bytes; .* set it to 16384"):
        engine_on(str(tiny_llama_folder), memory=packs[1:], host_memory_limit=4096, max_num_batched_tokens=1)


def test_a_read_error_fails_the_reader_by_name_and_nobody_else(
    tiny_llama_folder: Path, packs: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = engine_on(str(tiny_llama_folder), memory=packs[:1], read="pread", prefix_cache="off")
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    bare = tokens_of(outputs_of(made, [Submit("before", PROMPT, params)])["before", 0])

    def failing(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.preadv", failing)
    answers = outputs_of(made, [Submit("reader", PROMPT, params, ("engram",)), Submit("other", PROMPT, params)])
    (refused,) = answers["reader", 0]
    assert refused.finish_reason == "error" and refused.error is not None
    assert "Input/output error" in refused.error.message and "table-1.safetensors" in refused.error.message
    assert tokens_of(answers["other", 0]) == bare
    assert "Input/output error" in (made.stats().table_fault or "")
    assert "Input/output error" in caplog.text
