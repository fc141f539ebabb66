"""What the device path is refused for, what serves in its place, and that the report says so in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from server.errors import CapacityError
from server.models import fused
from server.models.attention.kv_cache import KVCache
from server.models.attention.paged import PagedBackend
from server.models.attention.sdpa import SdpaBackend
from server.runtime import device_path
from server.runtime.attention_probe import TOLERANCE, attention_error
from server.runtime.decode_step import DecodeSteps, no_room
from server.runtime.device_path import DevicePath, trial, unfit
from server.runtime.engine import Engine
from server.runtime.load import Loaded, load
from server.runtime.messages import SamplingParams, Submit
from server.runtime.overlap import OverlappedEngine
from server.runtime.process import build_engine
from server.runtime.report import describe
from server.runtime.runner import Runner
from tests.decoders import KINDS, random_decoder
from tests.engines import drive, settings_for
from tests.tiny import save_tiny_llama

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NO_MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory")


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.language.interpreting", False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder)
    return str(folder)


def started(tiny: str, **flags: Any) -> tuple[Engine, Loaded, dict[str, list[str]]]:
    """An engine on the device path, what it was loaded from, and the report's lines by name."""
    settings = settings_for(tiny, **flags)
    loaded = load(settings, device_path=True)
    engine = build_engine(settings, loaded)
    lines: dict[str, list[str]] = {}
    for name, text in describe(loaded, settings):
        lines.setdefault(name, []).append(text)
    return engine, loaded, lines


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_paged_attention_is_torchs_attention(kind: str, dtype: torch.dtype) -> None:
    # fp32 sums in another order; bf16 and fp16 weights and outputs are rounded
    exact = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert attention_error(random_decoder(kind).config, dtype, CPU) < exact <= TOLERANCE[dtype]


def test_attention_that_reads_past_its_window_is_found_out() -> None:
    config = random_decoder("gemma3").config
    wrong = PagedBackend.__init__

    def forgetful(self: PagedBackend, *arguments: Any) -> None:
        wrong(self, *arguments)
        self.windows = (0,) * len(self.windows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PagedBackend, "__init__", forgetful)
        reason = trial(config, torch.float32, CPU)
    assert reason is not None and "paged attention differs by" in reason and "0.001" in reason


def test_the_report_names_attention_and_decode_steps(tiny: str) -> None:
    engine, loaded, lines = started(tiny)
    assert isinstance(engine, OverlappedEngine) and isinstance(loaded.attention, PagedBackend)
    assert lines["attention"] == ["paged, by our kernels (torch's varlen_attn needs CUDA)"]
    assert lines["decode"] == ["on the device, one step ahead, without CUDA graphs"]
    assert "fallback" not in lines


def test_on_a_cpu_nothing_is_said_and_nothing_changes(tiny: str) -> None:
    settings = settings_for(tiny)
    loaded = load(settings)
    assert type(build_engine(settings, loaded)) is Engine and isinstance(loaded.attention, SdpaBackend)
    assert loaded.model.fused is not fused.states and not {"attention", "decode", "fallback"} & {
        n for n, _ in describe(loaded, settings)
    }


def test_a_kernel_that_fails_leaves_torchs_operators(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = drive(started(tiny)[0], [(5, 9, 11)], max_tokens=8)
    monkeypatch.setattr("kernels.rotary.reference", lambda *arguments: 1 / 0)
    engine, loaded, lines = started(tiny)
    assert type(engine) is Engine and isinstance(loaded.attention, SdpaBackend)
    assert loaded.model.fused is not fused.states
    (note,) = lines["fallback"]
    assert note == "torch's operators in place of our kernels: a kernel failed: ZeroDivisionError: division by zero"
    assert lines["attention"] == ["torch's scaled_dot_product_attention"] and "decode" not in lines
    assert drive(engine, [(5, 9, 11)], max_tokens=8) == expected


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (CapacityError(no_room(64, 64, 1000)), "--max-num-seqs 32"),
        (
            RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be"),
            "not permitted",
        ),
    ],
)
def test_steps_that_cannot_be_captured_run_as_they_are(
    tiny: str, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def capture(self: DecodeSteps) -> None:
        raise error

    expected = drive(started(tiny)[0], [(5, 9, 11)], max_tokens=8)
    monkeypatch.setattr(DecodeSteps, "capture", capture)
    engine, _, lines = started(tiny)
    (note,) = lines["fallback"]
    assert "without CUDA graphs" in note and words in note and "\n" not in note
    assert isinstance(engine, OverlappedEngine) and not engine.runner.steps.graphs
    assert drive(engine, [(5, 9, 11)], max_tokens=8) == expected


@pytest.mark.parametrize(
    ("error", "words"),
    [(RuntimeError("out of resource: shared memory\nmore"), "shared memory"), (NO_MEMORY, "--max-num-seqs 3")],
)
def test_a_decode_step_that_fails_at_start_is_left_to_the_eager_engine(
    tiny: str, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fails(self: DecodeSteps, batch: object, arrive: object) -> None:
        raise error

    expected = drive(started(tiny)[0], [(5, 9, 11)], max_tokens=8)
    monkeypatch.setattr(DecodeSteps, "_compute", fails)
    engine, loaded, lines = started(tiny, max_num_seqs=6)
    (note,) = lines["fallback"]
    assert note.startswith("decode steps run eagerly") and words in note and "\n" not in note
    assert type(engine) is Engine and isinstance(loaded.attention, PagedBackend) and "decode" not in lines
    assert drive(engine, [(5, 9, 11)], max_tokens=8) == expected


def test_without_room_for_logits_decode_steps_run_eagerly(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device_path, "DecodeSteps", full)
    engine, loaded, lines = started(tiny, max_num_seqs=6)
    (note,) = lines["fallback"]
    assert "--max-num-seqs 3" in note and "--kv-bytes" in note
    assert type(engine) is Engine and isinstance(loaded.attention, PagedBackend)
    assert len(drive(engine, [(5, 9, 11)], max_tokens=8)[0]) == 8


def test_an_eager_step_without_room_says_what_to_lower(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Runner, works: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    engine = started(tiny)[0]
    monkeypatch.setattr(Runner, "run", full)
    engine.submit(Submit("a", (1,) * 40, SamplingParams()))
    (failed,) = engine.step().outputs
    assert failed.finish_reason == "error" and "--max-num-batched-tokens 20" in str(failed.error)


def test_a_gpu_that_is_too_old_or_without_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    assert unfit(CUDA) == "Old GPU has compute capability 7.5 and they need 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert unfit(CUDA) is None
    monkeypatch.setattr("kernels.language.available", False)
    assert unfit(CUDA) == "Triton is not installed; pip install 'engram-server[gpu]'"


def test_a_model_without_up_projections_needs_a_memory_that_gives_them() -> None:
    model = random_decoder("llama")
    model.without_up = frozenset({1})
    path = DevicePath(13)
    attention = path.choose_attention(model.config, KVCache(model.config, 14, 8, torch.float32, CPU))
    sizes = dict(max_num_seqs=2, max_len=64, block_size=8, window=1)
    assert path.build(model, attention, None, **sizes, graphs=False) is None
    assert ["decode steps run eagerly" in note for note in path.notes] == [True]
