"""torch's own varlen_attn, where it reads paged caches: right in every shape that it takes, captured too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from server.batch import DecodeBatch
from server.models.attention.kv_cache import KVCache
from server.models.attention.paged import PagedBackend
from server.models.attention.varlen import VarlenBackend, unavailable
from server.runtime.attention_probe import TOLERANCE, attention_error, choose_paged, decode_batch, trial_batch
from tests.decoders import KINDS, random_decoder

CUDA, BLOCK = torch.device("cuda"), 256


@pytest.fixture(autouse=True)
def there() -> None:
    reason = unavailable(CUDA)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_torchs_plain_attention(kind: str, dtype: torch.dtype, kv_heads: int) -> None:
    config = random_decoder(kind, num_key_value_heads=kv_heads).config
    assert attention_error(config, dtype, CUDA, VarlenBackend, BLOCK) <= TOLERANCE[dtype]


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_captured_step_follows_tables_lengths_and_slots(kind: str) -> None:
    config = random_decoder(kind).config
    pages = 32  # a table for contexts of 8192 tokens: they are split
    caches = [KVCache(config, 3 * pages + 1, BLOCK, torch.bfloat16, CUDA) for _ in range(2)]
    ours, theirs = PagedBackend(config, caches[0]), VarlenBackend(config, caches[1])
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    qkv = torch.zeros(3, width, dtype=torch.bfloat16, device=CUDA)

    def at(*before: int) -> DecodeBatch:
        return decode_batch(trial_batch((1, 1, 1), CUDA, before=before, block_size=BLOCK, pages=pages))

    static = at(0, 0, 0)

    def step() -> list[Tensor]:
        theirs.plan_decode(static)
        return [theirs.forward(qkv, layer) for layer in range(config.num_layers)]

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outs = step()
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        other.copy_(one.normal_())
    for before in ((0, 40, 8191), (255, 256, 257), (5000, 3, 700)):
        batch = at(*before)
        static.block_table.copy_(batch.block_table.flip(0))  # of other blocks than those captured
        static.context_len.copy_(batch.context_len.flip(0))
        static.slots.copy_(batch.slots.flip(0))
        qkv.normal_()
        graph.replay()
        ours.plan_decode(static)
        for layer, out in enumerate(outs):
            assert (out - ours.forward(qkv, layer)).abs().max() <= TOLERANCE[torch.bfloat16]


def test_both_are_timed_and_small_blocks_refused() -> None:
    config = random_decoder("llama").config
    attention, words = choose_paged(config, KVCache(config, 20, BLOCK, torch.bfloat16, CUDA))
    assert isinstance(attention, VarlenBackend) == words.startswith("paged, by torch's varlen_attn (decode ")
    assert words.count(" ms") == 4
    attention, words = choose_paged(config, KVCache(config, 40, 16, torch.float32, CUDA))
    assert type(attention) is PagedBackend and "refuses torch.float32 in blocks of 16" in words
