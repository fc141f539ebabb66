"""Cases of the kernels beside lookups: norm, rotary, sampling, gate, convolution, STEM product, attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import gated_product, memory_gate, paged_attention, rms_norm, rotary, sampling, short_conv, stem_rows
from kernels.memory_gate import GateWeights
from server.bench.gpu.kernel_case import BITS, Case, Sizes, different, off, paged_table

BLOCK_SIZE, TAPS, DILATION = 32, 4, 3


def norm(sizes: Sizes) -> Case:
    tokens, width, eps = sizes.tokens, sizes.model.hidden_size, sizes.model.rms_norm_eps
    before, delta = sizes.normal(tokens, width, dtype=torch.float32), sizes.normal(tokens, width)
    weight, stream, out = sizes.normal(width, dtype=torch.float32), before.clone(), [delta]

    def work() -> None:
        out[0] = rms_norm.add_rms_norm(stream, delta, weight, eps, sizes.dtype)

    def deviation() -> float:
        total = before.double() + delta.double()
        expected = total * (total.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight.double()
        return max(off(stream, total, 1e-6, 1e-6), off(out[0], expected, sizes.rounding, 1e-5))

    return Case(
        lambda: stream.copy_(before),
        work,
        deviation,
        "one unit in the last place: fp32 sums, rounded once",
        2 * stream.nbytes + 2 * delta.nbytes,
    )


def turned(sizes: Sizes, *, normed: bool) -> Case:
    """`normed`: every head is, before it is turned."""
    model = sizes.model
    heads = model.num_heads + model.num_kv_heads
    wide = sizes.normal(sizes.tokens, (heads + model.num_kv_heads) * model.head_dim)  # as qkv lies: rows are strided
    view = wide[:, : heads * model.head_dim].view(sizes.tokens, heads, model.head_dim)
    before = view.clone()
    angle = torch.outer(
        torch.arange(sizes.context, device=sizes.device).double(),
        0.01 ** torch.linspace(0, 1, model.head_dim // 2, device=sizes.device).double(),
    )
    table = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
    positions, eps = sizes.integers(sizes.context, sizes.tokens), model.rms_norm_eps
    gain = sizes.normal(heads, model.head_dim, dtype=torch.float32) if normed else None

    def deviation() -> float:
        wide_heads = before.double()
        if gain is not None:
            wide_heads = wide_heads * (wide_heads.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * gain.double()
        pairs = torch.view_as_complex(wide_heads.view(*before.shape[:-1], -1, 2).contiguous())
        turned_pairs = pairs * table.to(torch.complex128)[positions][:, None]
        return off(view, torch.view_as_real(turned_pairs).flatten(-2), sizes.rounding, 1e-5)

    return Case(
        lambda: view.copy_(before),
        lambda: rotary.rotate_(view, table, positions, gain, eps),
        deviation,
        "one unit in the last place: fp32 products, rounded once",
        2 * view.numel() * view.element_size(),
    )


def multiplied(sizes: Sizes) -> Case:
    width = sizes.model.intermediate_size
    gate_up, out = sizes.normal(sizes.tokens, 2 * width), [torch.empty(0)]

    def work() -> None:
        out[0] = gated_product.gated_product(gate_up, "silu")

    def deviation() -> float:
        gate, up = gate_up.double().chunk(2, dim=-1)
        return off(out[0], F.silu(gate) * up, sizes.rounding, 1e-6)

    return Case(
        lambda: None,
        work,
        deviation,
        "one unit in the last place: fp32, rounded once",
        gate_up.nbytes * 3 // 2,
    )


def sampled(sizes: Sizes, degree: float, filtered: bool = False) -> Case:
    """`filtered`: as many chat clients ask, by top_k, top_p and min_p."""
    rows, vocab = sizes.sequences, sizes.model.vocab_size
    logits = 3 * sizes.normal(rows, vocab, dtype=torch.float32)
    temperature = torch.full((rows,), degree, device=sizes.device)
    seeds, positions = sizes.integers(1 << 62, rows), sizes.integers(1 << 30, rows)
    found, asked = [seeds], (min(50, vocab), 0.9, 0.02)
    columns = [torch.full((rows,), value, device=sizes.device) for value in asked]
    filters = sampling.Filters(*columns) if filtered else None

    def work() -> None:
        found[0] = sampling.sample(logits, temperature, seeds, positions, filters)

    def deviation() -> float:
        if degree == 0:
            return float((found[0] != logits.argmax(-1)).sum())
        mass = torch.softmax(logits.double() / degree, -1)
        if filtered:
            mass = torch.stack([row.where(sampling.kept(row, *asked), 0.0) for row in mass])
        mass = mass.cumsum(-1) / mass.sum(-1, keepdim=True)
        noise = [sampling.uniform(s, p) for s, p in zip(seeds.tolist(), positions.tolist(), strict=True)]
        at = torch.tensor(noise, dtype=torch.float64, device=sizes.device)[:, None]
        expected = (mass > at).double().argmax(-1)
        clear = (mass - at).abs().min(-1).values > 1e-6  # rounding decides no such draw
        return float(((found[0] != expected) & clear).sum())

    return Case(
        lambda: None,
        work,
        deviation,
        f"{BITS}: token ids, where the noise is further than 1e-6 from a boundary of the mass",
        logits.nbytes * (1 if degree == 0 else 3),
    )


def gated(sizes: Sizes) -> Case:
    tokens, width = sizes.tokens, sizes.model.hidden_size
    before = sizes.normal(tokens, 1, width, dtype=torch.float32)
    wide, hidden = sizes.normal(tokens, 2 * width), before.clone()
    key, value = wide[:, :width].view(tokens, 1, width), wide[:, width:]
    gain = sizes.normal(1, width, dtype=torch.float32)

    def deviation() -> float:
        query, keys = before.double(), key.double()
        score = (query * keys * gain.double()).sum(-1) / math.sqrt(width)
        score = score * ((query.pow(2).mean(-1) + 1e-6) * (keys.pow(2).mean(-1) + 1e-6)).rsqrt()
        alpha = torch.sigmoid(score.sign() * score.abs().clamp_min(memory_gate.FLOOR).sqrt())
        return off(hidden, before.double() + alpha[..., None] * value.double()[:, None], 1e-5, 1e-3)

    return Case(
        lambda: hidden.copy_(before),
        lambda: memory_gate.gate(hidden, key, value, GateWeights(gain, 1e-6, 1e-6)),
        deviation,
        "1e-3: fp32 sums over the width, and a root that is steep near a score of zero",
        2 * hidden.nbytes + wide.nbytes,
    )


def convolved(sizes: Sizes) -> Case:
    """Decode: one token a sequence, its predecessors' inputs behind the block table."""
    width, count = sizes.model.hidden_size, sizes.sequences
    table = paged_table(sizes, BLOCK_SIZE)
    slots = sizes.normal((int(table.max()) + 1) * BLOCK_SIZE, width)
    before, alpha = sizes.normal(count, 1, width, dtype=torch.float32), sizes.normal(count, 1, dtype=torch.float32)
    value, weight = sizes.normal(count, width), sizes.normal(width, TAPS, dtype=torch.float32)
    positions, sequence_of = sizes.integers(sizes.context, count), torch.arange(count, device=sizes.device)
    hidden = before.clone()

    def work() -> None:
        short_conv.short_conv(hidden, alpha, value, weight, slots, table, sequence_of, positions, BLOCK_SIZE, DILATION)

    def deviation() -> float:
        total = torch.zeros(count, width, dtype=torch.float64, device=sizes.device)
        for tap in range(TAPS):
            read = positions - (TAPS - 1 - tap) * DILATION
            inside = read.clamp_min(0)
            at = table[sequence_of, inside // BLOCK_SIZE] * BLOCK_SIZE + inside % BLOCK_SIZE
            total += weight[:, tap].double() * slots[at].double() * (read >= 0)[:, None]
        expected = before.double() + (alpha.double()[..., None] * value.double()[:, None] + F.silu(total)[:, None])
        return off(hidden, expected, 1e-5, 1e-5)

    return Case(
        lambda: hidden.copy_(before),
        work,
        deviation,
        "1e-5: four fp32 products and a sum",
        2 * hidden.nbytes + value.nbytes + TAPS * count * width * slots.element_size() + weight.nbytes,
    )


def stem(sizes: Sizes) -> Case:
    width, distinct = sizes.model.intermediate_size, max(1, sizes.sequences // 2)
    gate, rows = sizes.normal(sizes.sequences, width), sizes.normal(distinct, width)
    inverse, out = sizes.integers(distinct, sizes.sequences), [gate]

    def work() -> None:
        out[0] = stem_rows.gated_rows(gate, rows, inverse)

    def deviation() -> float:
        return off(out[0], F.silu(gate.double()) * rows.double()[inverse], sizes.rounding, 1e-6)

    return Case(
        lambda: None,
        work,
        deviation,
        "one unit in the last place: fp32, rounded once",
        2 * gate.nbytes + gate.nbytes,
    )


def cache_of(sizes: Sizes, table: Tensor) -> Tensor:
    """cache[blocks, block_size, 2 · Hk · D]; block 0, which no sequence has, holds NaN."""
    width = 2 * sizes.model.num_kv_heads * sizes.model.head_dim
    cache = sizes.normal(int(table.max()) + 1, BLOCK_SIZE, width)
    cache[0] = math.nan
    return cache


def written(sizes: Sizes) -> Case:
    table = paged_table(sizes, BLOCK_SIZE)
    cache = cache_of(sizes, table)
    count, flat = sizes.sequences, cache.view(-1, cache.shape[-1])
    wide = sizes.normal(count, (sizes.model.num_heads + 2 * sizes.model.num_kv_heads) * sizes.model.head_dim)
    kv = wide[:, -cache.shape[-1] :]
    slots = table[:, 0] * BLOCK_SIZE + sizes.integers(BLOCK_SIZE, count)
    others = torch.ones(len(flat), dtype=torch.bool, device=sizes.device).index_fill_(0, slots, False)
    before = flat[others].clone()

    return Case(
        lambda: flat.index_fill_(0, slots, math.nan),
        lambda: paged_attention.write_kv(cache, slots, kv),
        lambda: different(flat[slots], kv) + different(flat[others], before),
        f"{BITS}: what is written, and everything beside it",
        2 * kv.numel() * kv.element_size(),
    )


def decoded(sizes: Sizes) -> Case:
    model, table = sizes.model, paged_table(sizes, BLOCK_SIZE)
    cache = cache_of(sizes, table)
    lengths = sizes.integers(sizes.context - sizes.context // 8, sizes.sequences) + sizes.context // 8
    query, out = sizes.normal(sizes.sequences, model.num_heads, model.head_dim), [cache]
    sample = range(0, sizes.sequences, max(1, sizes.sequences // 16))

    def work() -> None:
        out[0] = paged_attention.decode(query, cache, table, lengths, model.num_kv_heads)

    def deviation() -> float:
        worst = 0.0
        for b in sample:
            expected = attention64(sizes, query[b : b + 1], context_of(cache, table[b], int(lengths[b])))
            worst = max(worst, off(out[0][b : b + 1], expected, *attention_tolerance(sizes)))
        return worst + float(out[0].isnan().sum())

    return Case(
        lambda: None,
        work,
        deviation,
        ATTENTION,
        int(lengths.sum()) * cache.shape[-1] * cache.element_size() + 2 * query.nbytes,
    )


def prefilled(sizes: Sizes) -> Case:
    """A quarter of the sequences, half of each context new."""
    model, count = sizes.model, max(1, sizes.sequences // 4)
    table = paged_table(sizes, BLOCK_SIZE)[:count]
    cache, fresh = cache_of(sizes, table), max(1, sizes.context // 2)
    lengths = torch.full((count,), sizes.context, device=sizes.device)
    starts = torch.arange(count + 1, device=sizes.device) * fresh
    query, out = sizes.normal(count * fresh, model.num_heads, model.head_dim), [cache]

    def work() -> None:
        out[0] = paged_attention.prefill(query, cache, table, starts, lengths, model.num_kv_heads, fresh)

    def deviation() -> float:
        expected = attention64(sizes, query[:fresh], context_of(cache, table[0], sizes.context))
        return off(out[0][:fresh], expected, *attention_tolerance(sizes)) + float(out[0].isnan().sum())

    return Case(
        lambda: None,
        work,
        deviation,
        ATTENTION,
        count * sizes.context * cache.shape[-1] * cache.element_size() + 2 * query.nbytes,
    )


ATTENTION = "bf16: 4e-3, weights of the softmax rounded to 8 bits before they meet values near 1; fp32: 2e-5"


def attention_tolerance(sizes: Sizes) -> tuple[float, float]:
    return (2.0**-7, 4e-3) if sizes.dtype == torch.bfloat16 else (2e-5, 2e-5)


def context_of(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    return cache[pages].view(-1, cache.shape[-1])[:length].double()


def attention64(sizes: Sizes, query: Tensor, kv: Tensor) -> Tensor:
    """query[n, Hq, D], the last n of kv[C, 2 · Hk · D]'s tokens → [n, Hq, D] in float64."""
    model, count, length = sizes.model, len(query), len(kv)
    keys, values = kv.view(length, 2, model.num_kv_heads, model.head_dim).unbind(1)
    group = model.num_heads // model.num_kv_heads
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    score = torch.einsum("qhd,khd->hqk", query.double(), keys) / math.sqrt(model.head_dim)
    at = torch.arange(length, device=kv.device)
    score = score.masked_fill(at[None, None] > at[length - count :][None, :, None], -math.inf)
    return torch.einsum("hqk,khd->qhd", score.softmax(-1), values)


DENSE: dict[str, Callable[[Sizes], Case]] = {
    "residual and norm": norm,
    "rotary": partial(turned, normed=False),
    "norm of heads and rotary": partial(turned, normed=True),
    "gated product": multiplied,
    "sampling, greedy": partial(sampled, degree=0.0),
    "sampling, drawn": partial(sampled, degree=0.8),
    "sampling, filtered": partial(sampled, degree=0.8, filtered=True),
    "memory gate": gated,
    "short convolution": convolved,
    "STEM rows": stem,
    "write of keys and values": written,
    "paged decode": decoded,
    "paged prefill": prefilled,
}
