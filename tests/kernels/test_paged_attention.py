"""Paged attention against the formula in float64; unwritten cache slots hold NaN and are never read.

Tolerance: fp32 sums of a few hundred terms, 2e-5; bf16 weights and outputs are rounded to 8 bits, 2e-2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from kernels import language, paged_attention

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
BLOCK_SIZE = 8
Attention = Callable[..., torch.Tensor]


def paged(lengths: list[int], kv_heads: int, width: int, dtype: torch.dtype):
    """A cache with scattered pages, its keys and values in order, and the block table."""
    generator = torch.Generator().manual_seed(0)
    pages = [-(-n // BLOCK_SIZE) for n in lengths]
    order = torch.randperm(sum(pages), generator=generator) + 1
    cache = torch.full((sum(pages) + 1, BLOCK_SIZE, 2 * kv_heads * width), math.nan, dtype=dtype)
    table = torch.zeros(len(lengths), max(pages) + 1, dtype=torch.int64)
    contents, at = [], 0
    for b, (n, count) in enumerate(zip(lengths, pages, strict=True)):
        table[b, :count] = order[at : at + count]
        at += count
        kv = torch.randn(n, 2 * kv_heads * width, generator=generator).to(dtype)
        slots = table[b, torch.arange(n) // BLOCK_SIZE] * BLOCK_SIZE + torch.arange(n) % BLOCK_SIZE
        paged_attention.write_kv(cache, slots, kv)
        contents.append(kv.double().view(n, 2, kv_heads, width))
    return cache, table, contents


def attention64(query, contents, counts, window: int, scale: float = 0.0) -> torch.Tensor:
    outs, at = [], 0
    for kv, count in zip(contents, counts, strict=True):
        n, group = len(kv), query.shape[1] // kv.shape[2]
        for i in range(count):
            p = n - count + i
            first = max(0, p - window + 1) if window else 0
            keys, values = kv[first : p + 1, 0], kv[first : p + 1, 1]
            heads = []
            for h in range(query.shape[1]):
                score = keys[:, h // group] @ query[at + i, h].double() * (scale or 1 / math.sqrt(query.shape[2]))
                heads.append(score.softmax(0) @ values[:, h // group])
            outs.append(torch.stack(heads))
        at += count
    return torch.stack(outs)


def whole(query, cache, table, starts, context, kv_heads, longest, window=0, scale=0.0) -> torch.Tensor:
    """`reference`, called as `prefill` is."""
    return paged_attention.reference(query, cache, table, starts, context, kv_heads, window, scale)


@pytest.mark.parametrize("decode", [paged_attention.decode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("width", [16, 24])
def test_decode_sees_its_whole_context_whatever_the_splits(
    monkeypatch: pytest.MonkeyPatch, decode: Attention, dtype: torch.dtype, window: int, width: int
) -> None:
    monkeypatch.setattr(paged_attention, "SPLIT_TOKENS", 64)
    lengths = [1, 70, 130]
    cache, table, contents = paged(lengths, 2, width, dtype)
    query = torch.randn(3, 6, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = decode(query, cache, table, torch.tensor(lengths), 2, window)
    expected = attention64(query, contents, [1, 1, 1], window)
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.skipif(not (language.interpreting or torch.cuda.is_available()), reason="the reference has no splits")
@pytest.mark.parametrize("decode", [paged_attention.decode])
@pytest.mark.parametrize("window", [0, 20])
def test_splits_beyond_the_context_or_the_window_are_not_written(
    monkeypatch: pytest.MonkeyPatch, decode: Attention, window: int
) -> None:
    made, empty = [], torch.empty

    def poisoned(*sizes: int, **options: object) -> torch.Tensor:
        made.append(empty(*sizes, **options))  # type: ignore[call-overload]
        return made[-1].fill_(math.nan) if made[-1].is_floating_point() else made[-1]

    monkeypatch.setattr(paged_attention, "SPLIT_TOKENS", 64)
    cache, table, contents = paged([70, 130], 2, 16, torch.float32)
    query, context = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([70, 130])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        got = decode(query, cache, table, context, 2, window)
    torch.testing.assert_close(got.double(), attention64(query, contents, [1, 1], window), atol=2e-5, rtol=2e-5)
    partial = next(each for each in made if each.shape == (2, 4, 3, 16))
    written = ~partial.isnan().any(-1).any(1).cpu()
    assert written.tolist() == [[True, True, False], [not window, True, True]]


@pytest.mark.parametrize("implementation", [paged_attention.prefill, whole])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 20])
def test_prefill_is_causal_from_where_its_chunk_begins(
    implementation: Attention, dtype: torch.dtype, window: int
) -> None:
    lengths, counts = [90, 5, 33], [70, 5, 1]
    cache, table, contents = paged(lengths, 2, 16, dtype)
    wide = torch.randn(sum(counts), 4 * 16 + 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    query = wide[:, :64].view(-1, 4, 16)  # rows strided, as a slice of q, k and v
    starts = torch.tensor([0, 70, 75, 76])
    got = implementation(query, cache, table, starts, torch.tensor(lengths), 2, 70, window)
    expected = attention64(query, contents, counts, window)
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("prefill", [paged_attention.prefill, whole])
@pytest.mark.parametrize("decode", [paged_attention.decode])
@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_a_scale_of_ones_own_takes_the_place_of_the_head_sizes(
    prefill: Attention, decode: Attention, scale: float
) -> None:
    lengths, counts = [40, 9], [3, 2]
    cache, table, contents = paged(lengths, 2, 16, torch.float32)
    query = 3 * torch.randn(5, 4, 16, generator=torch.Generator().manual_seed(2))
    starts, context = torch.tensor([0, 3, 5]), torch.tensor(lengths)
    expected = attention64(query, contents, counts, 0, scale)
    got = prefill(query, cache, table, starts, context, 2, 3, 0, scale)
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=2e-5)
    last = query[[2, 4]]
    got = decode(last, cache, table, context, 2, 0, scale)
    torch.testing.assert_close(got.double(), expected[[2, 4]], atol=2e-5, rtol=2e-5)
