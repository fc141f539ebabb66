"""Attention by torch's varlen_attn: what it is given, over what its documentation says it does with it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor

from server.batch import DecodeBatch
from server.models.attention import varlen
from server.models.attention.kv_cache import KVCache
from server.models.attention.paged import PagedBackend
from server.models.attention.varlen import VarlenBackend, paged_varlen_attn, unavailable
from server.runtime.attention_probe import attention_error, decode_batch, trial_batch
from tests.decoders import KINDS, random_decoder
from tests.varlen import varlen_attn

CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda")
BEFORE = (7, 30, 19)  # tokens of three sequences


@pytest.fixture(autouse=True)
def documented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.language.interpreting", False)
    monkeypatch.setattr(varlen, "paged_varlen_attn", lambda: varlen_attn)


def prepared(kind: type[PagedBackend], name: str, **shape: int) -> tuple[Any, int]:
    """A backend over a cache of random keys and values, and the width of a token's queries, keys and values."""
    config = random_decoder(name, **shape).config
    cache = KVCache(config, 13, 16, torch.float32, CPU)
    generator = torch.Generator().manual_seed(1)
    for layer in cache.layers:
        layer.normal_(generator=generator)
    return kind(config, cache), (config.num_heads + 2 * config.num_kv_heads) * config.head_dim


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("block_size", [8, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_mixed_batches_and_decode_are_torchs_attention(kind: str, block_size: int, kv_heads: int) -> None:
    config = random_decoder(kind, num_key_value_heads=kv_heads).config
    # fp32 sums in another order
    assert attention_error(config, torch.float32, CPU, VarlenBackend, block_size) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [(1, 1, 21), (2, 9, 21), (1, 1, 1)])
def test_it_agrees_with_our_kernels_on_output_and_cache(kind: str, tokens: tuple[int, ...]) -> None:
    batch = trial_batch(tokens, CPU, before=BEFORE)
    (ours, width), (theirs, _) = prepared(PagedBackend, kind), prepared(VarlenBackend, kind)
    qkv = torch.randn(batch.num_tokens, width, generator=torch.Generator().manual_seed(2))
    for layer in range(2):
        for attention in (ours, theirs):
            attention.plan(batch)
        assert torch.allclose(theirs.forward(qkv, layer), ours.forward(qkv, layer), atol=1e-5)
        assert torch.equal(theirs.cache.layers[layer], ours.cache.layers[layer])


@pytest.mark.parametrize("kind", KINDS)
def test_a_decode_step_follows_the_tensors_it_was_planned_over(kind: str) -> None:
    attention, width = prepared(VarlenBackend, kind)
    static = decode_batch(trial_batch((1, 1, 1), CPU, before=(0, 0, 0)))
    for before in (BEFORE, (8, 31, 20)):
        batch = trial_batch((1, 1, 1), CPU, before=before)
        for name in ("block_table", "context_len", "slots"):
            getattr(static, name).copy_(getattr(decode_batch(batch), name))
        qkv = torch.randn(3, width, generator=torch.Generator().manual_seed(before[0]))
        attention.plan(batch)
        expected = attention.forward(qkv, 0)
        attention.plan_decode(static)
        assert torch.equal(attention.forward(qkv, 0), expected)


def test_a_decode_step_reads_nothing_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "paged_varlen_attn", lambda: lambda query, *arguments, **options: query)
    config = random_decoder("gemma3").config
    attention = VarlenBackend(config, KVCache(config, 13, 16, torch.bfloat16, META))
    ids, table = torch.zeros(3, dtype=torch.int64, device=META), torch.zeros(3, 8, dtype=torch.int64, device=META)
    attention.plan_decode(DecodeBatch(ids[:, None], 0, ids, ids, table, ids, ids, ids[None] > 0, 16))
    for layer in range(2):
        qkv = torch.zeros(3, 8 * config.head_dim, dtype=torch.bfloat16, device=META)
        assert attention.forward(qkv, layer).shape == (3, 4 * config.head_dim)


def test_masks_and_splits_are_what_flash_attention_2_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def noted(query: Tensor, *arguments: Any, **options: Any) -> Tensor:
        asked.append((*arguments[-2:], options["window_size"], options["num_splits"]))
        return query

    monkeypatch.setattr(varlen, "paged_varlen_attn", lambda: noted)
    for kv_heads in (2, 4):
        attention, width = prepared(VarlenBackend, "gemma3", num_key_value_heads=kv_heads)  # windows of 6 and of all
        for tokens in ((1, 1, 1), (1, 1, 21)):
            attention.plan(trial_batch(tokens, CPU, before=BEFORE))
            for layer in range(2):
                attention.forward(torch.zeros(sum(tokens), width), layer)
    sliding, causal = (5, 0), (-1, 0)
    assert asked[:4] == [(1, 128, sliding, 1), (1, 128, (-1, -1), None), (21, 128, sliding, 1), (21, 128, causal, 1)]
    assert asked[4:] == [(1, 128, sliding, 1), (1, 128, (-1, -1), 1), (21, 128, sliding, 1), (21, 128, causal, 1)]


def test_the_stand_in_takes_what_torchs_function_takes() -> None:
    function = paged_varlen_attn()
    if function is None:
        pytest.skip(f"torch {torch.__version__} has no paged varlen_attn")
    assert signature(varlen_attn).parameters.keys() == signature(function).parameters.keys()


def without_pages(query: Tensor, key: Tensor, *, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """As torch 2.11's, which knows no block table."""
    raise AssertionError


@pytest.mark.parametrize("function", [None, without_pages])
def test_a_torch_without_it_is_named(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Tensor] | None) -> None:
    monkeypatch.setattr(varlen, "paged_varlen_attn", paged_varlen_attn)
    module = None if function is None else type(sys)("torch.nn.attention.varlen")
    if module is not None:
        monkeypatch.setattr(module, "varlen_attn", function, raising=False)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    assert unavailable(CUDA) == f"torch {torch.__version__} has no paged varlen_attn"
    assert unavailable(CPU) == "torch's varlen_attn needs CUDA"
