"""The C kernels in the model: what `--cpu-kernels` gives, and that the model computes the same with them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from kernels.cpu.build import COMPILERS, build
from server.errors import CapacityError, SettingsError
from server.models import c_kernels
from server.models.attention.cpu import CpuBackend
from server.runtime import capacity
from server.runtime.load import load, prepare, weight_bytes
from server.runtime.report import describe
from tests.engines import drive, engine_on, settings_for
from tests.tiny import save_tiny_llama

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C compiler is here")


@needs_compiler
def test_bf16_logits_stay_as_close_to_fp32_with_the_kernels_as_without(tmp_path: Path) -> None:
    """Both round once per matrix; attention's weights are rounded by torch and not by the kernels."""
    save_tiny_llama(tmp_path)
    prompt = tuple(range(1, 60))
    exact = last_logits(tmp_path, prompt, "float32", "off")
    plain, fused = (last_logits(tmp_path, prompt, "bfloat16", kernels) for kernels in ("off", "on"))
    assert (fused - exact).abs().mean() <= 1.1 * (plain - exact).abs().mean()


def last_logits(folder: Path, prompt: tuple[int, ...], dtype: str, cpu_kernels: str) -> torch.Tensor:
    """[32, V]: logits of decode steps over forced tokens; the prompt is computed a token a step."""
    engine = engine_on(str(folder), dtype=dtype, cpu_kernels=cpu_kernels, max_num_batched_tokens=1, prefix_cache="off")
    rows: list[torch.Tensor] = []
    engine.runner.model.norm.register_forward_hook(lambda module, args, out: rows.append(out.clone()))
    drive(engine, [prompt], max_tokens=1)
    with torch.inference_mode():
        return engine.runner.model.logits(torch.cat(rows))[-32:]


@needs_compiler
def test_the_report_says_that_there_are_kernels_and_where(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    settings = settings_for(str(tmp_path))
    loaded = load(settings)
    assert isinstance(loaded.attention, CpuBackend)
    assert dict(describe(loaded, settings))["kernels"].startswith("C kernels between matrices")


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(c_kernels, "library", build)  # not what this process has built already


@pytest.mark.parametrize(
    ("flags", "reason"),
    [({}, "no C compiler"), ({"dtype": "float16"}, "float16"), ({"cpu_kernels": "off"}, "--cpu-kernels off")],
    ids=["no compiler", "a type they do not know", "off"],
)
def test_without_kernels_the_report_says_why(
    flags: dict[str, str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_llama(tmp_path)
    without_compiler(monkeypatch)
    settings = settings_for(str(tmp_path), **flags)
    loaded = load(settings)
    assert not isinstance(loaded.attention, CpuBackend)
    assert reason in dict(describe(loaded, settings))["kernels"]


def test_kernels_that_are_asked_for_and_cannot_be_stop_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_llama(tmp_path)
    without_compiler(monkeypatch)
    with pytest.raises(SettingsError, match="--cpu-kernels is on and there is no C compiler"):
        load(settings_for(str(tmp_path), cpu_kernels="on"))


@needs_compiler
def test_heads_that_do_not_divide_into_vectors_do_without(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, head_dim=18)
    settings = settings_for(str(tmp_path))
    loaded = load(settings)
    assert "heads of 18 values do not divide" in loaded.kernels_note


@needs_compiler
@pytest.mark.parametrize(("cpu_weights", "twice"), [("auto", True), ("once", False), ("twice", True)])
def test_plain_rows_are_kept_where_there_is_room(
    cpu_weights: str, twice: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_llama(tmp_path)
    settings = settings_for(str(tmp_path), cpu_weights=cpu_weights)
    loaded = load(settings)
    assert loaded.plan.twice is twice and loaded.plan.weights == weight_bytes(loaded.model)
    assert ("plain rows" in dict(describe(loaded, settings))["dtype"]) is twice
    monkeypatch.setattr(capacity, "_free_memory", lambda device: 2 * loaded.plan.weights)
    small = settings_for(str(tmp_path), cpu_weights=cpu_weights, kv_bytes=1 << 16, max_model_len=64)
    assert prepare(small).plan.twice is (cpu_weights == "twice")


@needs_compiler
def test_plain_rows_never_stand_in_the_way_of_what_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The KV cache fits beside the weights once and not beside the weights twice."""
    save_tiny_llama(tmp_path)
    once = prepare(settings_for(str(tmp_path), cpu_weights="once")).plan.weights
    free, kv = 8 * once, 8 * once - once - (1 << 12)
    monkeypatch.setattr(capacity, "_free_memory", lambda device: free)
    monkeypatch.setattr(capacity, "available_memory", lambda: free)
    flags = {"kv_bytes": kv, "max_model_len": 64}
    assert prepare(settings_for(str(tmp_path), **flags)).plan.twice is False
    with pytest.raises(CapacityError, match="--cpu-weights once, with which it fits"):
        prepare(settings_for(str(tmp_path), cpu_weights="twice", **flags))


@needs_compiler
@pytest.mark.parametrize(
    ("flags", "reason"),
    [({"quantize": "int8"}, "--quantize is int8"), ({"cpu_kernels": "off"}, "no C kernels with")],
    ids=["integers", "no kernels"],
)
def test_plain_rows_that_nothing_would_read_stop_the_start(flags: dict[str, str], reason: str, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    with pytest.raises(SettingsError, match=f"--cpu-weights is twice and {reason}"):
        load(settings_for(str(tmp_path), cpu_weights="twice", **flags))
