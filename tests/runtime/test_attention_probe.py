"""Whose paged attention serves: every reason for our kernels, and the figures that decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from server.models.attention import varlen
from server.models.attention.kv_cache import KVCache
from server.models.attention.paged import PagedBackend
from server.models.attention.varlen import VarlenBackend
from server.runtime import attention_probe
from server.runtime.attention_probe import choose_paged
from server.runtime.device_path import DevicePath
from tests.decoders import random_decoder
from tests.varlen import varlen_attn

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that has varlen_attn, as documented."""
    monkeypatch.setattr("kernels.language.interpreting", False)
    monkeypatch.setattr(varlen, "unavailable", lambda device: None)
    monkeypatch.setattr(varlen, "paged_varlen_attn", lambda: varlen_attn)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the times of our decode, our prefill, theirs and theirs. Steps still run, once."""

    def times(*milliseconds: float) -> None:
        left = iter(milliseconds)

        def read(step: Callable[[], None], device: torch.device) -> float:
            step()
            return next(left)

        monkeypatch.setattr(attention_probe, "milliseconds", read)

    return times


def chosen(kind: str = "gemma3", dtype: torch.dtype = torch.float32) -> tuple[type, str, KVCache]:
    config = random_decoder(kind).config
    cache = KVCache(config, 20, 8, dtype, CPU)
    attention, words = choose_paged(config, cache)
    assert attention.cache is cache
    return type(attention), words, cache


def test_what_decodes_faster_serves_and_both_figures_are_told(clock: Callable[..., None]) -> None:
    clock(0.214, 0.4, 0.301, 0.3)
    kind, words, _ = chosen()
    assert kind is PagedBackend
    assert words == (
        "paged, by our kernels (decode 0.21 ms, prefill 0.40 ms; torch's varlen_attn decode 0.30 ms, prefill 0.30 ms)"
    )
    clock(0.3, 0.2, 0.1, 0.4)
    kind, words, _ = chosen()
    assert kind is VarlenBackend
    assert words == (
        "paged, by torch's varlen_attn (decode 0.10 ms, prefill 0.40 ms; our kernels decode 0.30 ms, prefill 0.20 ms)"
    )


def test_timing_leaves_the_cache_as_it_was(clock: Callable[..., None]) -> None:
    clock(1.0, 1.0, 2.0, 2.0)
    assert not any(layer.any() for layer in chosen()[2].layers)


def test_a_device_or_torch_without_it_keeps_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "unavailable", lambda device: "torch 2.11.0 has no paged varlen_attn")
    kind, words, _ = chosen()
    assert (kind, words) == (PagedBackend, "paged, by our kernels (torch 2.11.0 has no paged varlen_attn)")


def test_a_refusal_is_told_with_what_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("Paged KV cache block size must be divisible by 256\nException raised from")

    monkeypatch.setattr(varlen, "paged_varlen_attn", lambda: refuse)
    kind, words, _ = chosen(dtype=torch.bfloat16)
    assert kind is PagedBackend
    assert words == (
        "paged, by our kernels (torch's varlen_attn refuses torch.bfloat16 in blocks of 8: "
        "RuntimeError: Paged KV cache block size must be divisible by 256)"
    )


@pytest.mark.parametrize("nan", [False, True])
def test_a_wrong_answer_is_found_out(monkeypatch: pytest.MonkeyPatch, nan: bool) -> None:
    def wrong(*arguments: Any, window_size: tuple[int, int], **options: Any) -> torch.Tensor:
        out = varlen_attn(*arguments, window_size=(window_size[0], 0), **(options | {"num_splits": 1}))
        out[-1] *= torch.nan if nan else 1.5
        return out

    monkeypatch.setattr(varlen, "paged_varlen_attn", lambda: wrong)
    kind, words, _ = chosen()
    assert kind is PagedBackend
    assert words.startswith("paged, by our kernels (torch's varlen_attn differs by ") and ("nan" in words) == nan


def test_what_cannot_be_captured_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(step: Callable[[], None], device: torch.device) -> float:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(attention_probe, "milliseconds", fail)
    kind, words, _ = chosen()
    assert kind is PagedBackend
    assert words == (
        "paged, by our kernels (torch's varlen_attn was not timed: "
        "RuntimeError: operation not permitted when stream is capturing)"
    )


def test_no_reason_is_a_fallback(clock: Callable[..., None]) -> None:
    clock(0.2, 0.2, 0.1, 0.1)
    config = random_decoder("llama").config
    path = DevicePath(19)
    attention = path.choose_attention(config, KVCache(config, 20, 8, torch.float32, CPU))
    ((name, words),) = path.report()
    assert isinstance(attention, VarlenBackend) and path.paged and not path.notes
    assert name == "attention" and words.startswith("paged, by torch's varlen_attn (decode 0.10 ms")
