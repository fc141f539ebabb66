"""Attention over the paged KV cache: write, prefill (varlen, causal, sliding window, grouped heads), split-KV decode.

    cache[blocks, block_size, 2 · Hk · D]      a token's keys, then its values; slot = block · block_size + offset

Shapes: T tokens, B sequences, Hq query heads, Hk key-value heads, G = Hq / Hk, D values a head. Softmax in fp32, the
online way (arXiv 2307.08691 §3). A token sees positions max(0, p - window + 1) … p of its own sequence. Decode cuts
each context into pieces that run side by side and are joined by their log-sum-exp, so that one long sequence fills
the device.
"""

import torch
from torch import Tensor

from kernels.language import blocks, interpreting, jit, jit_for_any, power_of_two, runs_on, tl

BLOCK_N = 64  # cached tokens read at once
BLOCK_M = 64  # prefill queries of one program
SPLIT_TOKENS = 512  # of context that one decode program reads


def write_kv(cache: Tensor, slots: Tensor, kv: Tensor) -> None:
    """kv[T, 2 · Hk · D], rows may be strided, to slots[T] of the cache."""
    width = cache.shape[-1]
    if not runs_on(cache):
        cache.view(-1, width).index_copy_(0, slots, kv)
        return
    write_kernel[(len(slots),)](cache, slots, kv, kv.stride(0), WIDTH=width, BLOCK=power_of_two(width))


def decode(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_len: Tensor,
    kv_heads: int,
    window: int = 0,
    scale: float = 0.0,
) -> Tensor:
    """One query a sequence: query[B, Hq, D], block_table[B, P], context_len[B], itself included → [B, Hq, D].

    `scale` of query · key; 0: 1 / sqrt(D). The number of splits follows from P alone, so that a graph captured for P
    pages holds for every length within it.
    """
    sequences, heads, width = query.shape
    out = query.new_empty(query.shape)
    if not runs_on(cache):
        starts = torch.arange(sequences + 1, device=query.device)
        return reference(query, cache, block_table, starts, context_len, kv_heads, window, scale)
    block_size = cache.shape[1]
    splits = max(1, blocks(block_table.shape[1] * block_size, SPLIT_TOKENS))
    partial = torch.empty(sequences, heads, splits, width, dtype=torch.float32, device=query.device)
    lse = torch.empty(sequences, heads, splits, dtype=torch.float32, device=query.device)
    group = heads // kv_heads
    shape = dict(D=width, DP=max(16, power_of_two(width)), KV_HEADS=kv_heads, GROUP=group, WIDEN=interpreting)
    decode_kernel[(sequences, kv_heads, splits)](
        query,
        cache,
        block_table,
        context_len,
        partial,
        lse,
        query.stride(0),
        block_table.stride(0),
        block_size,
        window,
        scale or width**-0.5,
        GP=max(16, power_of_two(group)),
        SPLIT=SPLIT_TOKENS,
        BLOCK=BLOCK_N,
        **shape,
    )
    join_kernel[(sequences, heads)](
        partial, lse, out, splits, D=width, DP=shape["DP"], SP=power_of_two(splits), HEADS=heads
    )
    return out


def prefill(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    kv_heads: int,
    longest: int,
    window: int = 0,
    scale: float = 0.0,
) -> Tensor:
    """Queries of several sequences, flat: query[T, Hq, D], query_start[B + 1], context_len[B], queries included.

    `longest`: the most queries of one sequence, known on the host; `scale` as in `decode`.
    """
    _, heads, width = query.shape
    if not runs_on(cache):
        return reference(query, cache, block_table, query_start, context_len, kv_heads, window, scale)
    out = query.new_empty(query.shape)
    prefill_kernel[(blocks(longest, BLOCK_M), len(context_len), heads)](
        query,
        cache,
        block_table,
        query_start,
        context_len,
        out,
        query.stride(0),
        block_table.stride(0),
        cache.shape[1],
        window,
        scale or width**-0.5,
        D=width,
        DP=max(16, power_of_two(width)),
        HEADS=heads,
        KV_HEADS=kv_heads,
        BLOCK_Q=BLOCK_M,
        BLOCK=BLOCK_N,
        WIDEN=interpreting,
    )
    return out


def reference(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    kv_heads: int,
    window: int = 0,
    scale: float = 0.0,
) -> Tensor:
    """The same with torch's operators, one sequence after another, in fp32."""
    _, heads, width = query.shape
    out = query.new_empty(query.shape)
    for b, (start, stop) in enumerate(zip(query_start[:-1].tolist(), query_start[1:].tolist(), strict=True)):
        context = int(context_len[b])
        pages = block_table[b, : blocks(context, cache.shape[1])]
        kv = cache[pages].reshape(-1, 2, kv_heads, width)[:context].float()
        kv = kv.repeat_interleave(heads // kv_heads, dim=2)
        at = torch.arange(context - (stop - start), context, device=query.device)
        seen = torch.arange(context, device=query.device) <= at[:, None]
        if window:
            seen &= torch.arange(context, device=query.device) > at[:, None] - window
        score = torch.einsum("qhd,khd->hqk", query[start:stop].float(), kv[:, 0])
        score *= scale or width**-0.5
        weight = score.masked_fill(~seen, -torch.inf).softmax(-1)
        out[start:stop] = torch.einsum("hqk,khd->qhd", weight, kv[:, 1]).to(out.dtype)
    return out


@jit_for_any("slots")
def write_kernel(cache, slots, kv, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A program: one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < WIDTH
    slot = tl.load(slots + token).to(tl.int64)
    tl.store(cache + slot * WIDTH + column, tl.load(kv + token * stride + column, mask=real), mask=real)


@jit
def attend(
    q, state_max, state_sum, total, cache, pages, begin, end, last, window, block_size, scale, head,
    D: tl.constexpr, DP: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Takes cached tokens [begin, end) into the running softmax of q[M, DP]; query i sees up to position last[i].

    WIDEN: multiply in fp32, since Triton's interpreter takes bf16 operands of `dot` for integers.
    """
    if WIDEN:
        q = q.to(tl.float32)
    column = tl.arange(0, DP)
    width = column < D
    for start in range(begin, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        there = position < end
        page = tl.load(pages + position // block_size, mask=there, other=0).to(tl.int64)
        token = (page * block_size + position % block_size) * (2 * KV_HEADS * D) + head * D
        real = there[:, None] & width[None, :]
        k = tl.load(cache + token[:, None] + column[None, :], mask=real, other=0.0)
        v = tl.load(cache + token[:, None] + KV_HEADS * D + column[None, :], mask=real, other=0.0)
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = there[None, :] & (position[None, :] <= last[:, None])
        if window > 0:
            seen = seen & (position[None, :] > last[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
        peak = tl.maximum(state_max, tl.max(score, 1))
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        weight = tl.exp(score - shift[:, None])
        keep = tl.exp(state_max - shift)
        state_sum = state_sum * keep + tl.sum(weight, 1)
        total = total * keep[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        state_max = peak
    return state_max, state_sum, total


@jit_for_any("block_table", "context_len", "table_stride")
def decode_kernel(
    query, cache, block_table, context_len, partial, lse, query_stride, table_stride, block_size, window, scale,
    D: tl.constexpr, DP: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A program: the query heads of one key head of one sequence, over SPLIT cached tokens."""
    sequence, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    context = tl.load(context_len + sequence).to(tl.int32)
    member, column = tl.arange(0, GP), tl.arange(0, DP)
    real = (member < GROUP)[:, None] & (column < D)[None, :]
    at = query + sequence * query_stride + (head * GROUP + member)[:, None] * D + column[None, :]
    q = tl.load(at, mask=real, other=0.0)
    last = tl.zeros([GP], tl.int32) + (context - 1)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, context)
    if window > 0:
        oldest = tl.maximum(context - window, 0)
        begin = tl.maximum(begin, oldest // BLOCK * BLOCK)
    peak, total_weight, total = attend(
        q, tl.full([GP], float("-inf"), tl.float32), tl.zeros([GP], tl.float32), tl.zeros([GP, DP], tl.float32),
        cache, block_table + sequence * table_stride, begin, end, last, window, block_size, scale, head,
        D, DP, KV_HEADS, BLOCK, WIDEN,
    )  # fmt: skip
    safe = tl.where(total_weight > 0, total_weight, 1.0)
    splits = tl.num_programs(2)
    row = (sequence * KV_HEADS * GROUP + head * GROUP + member) * splits + split
    # what a split beyond the context would give is neither written nor read: with a long table that is most of them
    given = real & (total_weight > 0)[:, None]
    tl.store(partial + row[:, None] * D + column[None, :], total / safe[:, None], mask=given)
    joined = tl.where(total_weight > 0, peak + tl.log(safe), float("-inf"))
    tl.store(lse + row, joined, mask=member < GROUP)


@jit_for_any("splits")
def join_kernel(
    partial, lse, out, splits, D: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """A program: one query head; its splits weighted by their log-sum-exp."""
    row = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    split, column = tl.arange(0, SP), tl.arange(0, DP)
    there, width = split < splits, column < D
    each = tl.load(lse + row * splits + split, mask=there, other=float("-inf"))
    weight = tl.exp(each - tl.max(each, 0))
    at = partial + (row * splits + split)[:, None] * D + column[None, :]
    parts = tl.load(at, mask=(each > float("-inf"))[:, None] & width[None, :], other=0.0)
    total = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + row * D + column, total.to(out.dtype.element_ty), mask=width)


@jit_for_any("block_table", "query_start", "context_len", "table_stride")
def prefill_kernel(
    query, cache, block_table, query_start, context_len, out, query_stride, table_stride, block_size, window, scale,
    D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_Q queries of one sequence and head."""
    sequence, head = tl.program_id(1).to(tl.int64), tl.program_id(2)
    start = tl.load(query_start + sequence).to(tl.int64)
    count = (tl.load(query_start + sequence + 1) - start).to(tl.int32)
    context = tl.load(context_len + sequence).to(tl.int32)
    first = tl.program_id(0) * BLOCK_Q
    if first < count:
        index, column = first + tl.arange(0, BLOCK_Q), tl.arange(0, DP)
        real = (index < count)[:, None] & (column < D)[None, :]
        row = (start + index)[:, None]
        q = tl.load(query + row * query_stride + head * D + column[None, :], mask=real, other=0.0)
        last = context - count + index
        end = tl.minimum(context - count + first + BLOCK_Q, context)
        begin = 0
        if window > 0:
            begin = tl.maximum(context - count + first - window + 1, 0) // BLOCK * BLOCK
        _, total_weight, total = attend(
            q, tl.full([BLOCK_Q], float("-inf"), tl.float32), tl.zeros([BLOCK_Q], tl.float32),
            tl.zeros([BLOCK_Q, DP], tl.float32), cache, block_table + sequence * table_stride, begin, end, last, window,
            block_size, scale, head // (HEADS // KV_HEADS), D, DP, KV_HEADS, BLOCK, WIDEN,
        )  # fmt: skip
        safe = tl.where(total_weight > 0, total_weight, 1.0)
        tl.store(
            out + (row * HEADS + head) * D + column[None, :],
            (total / safe[:, None]).to(out.dtype.element_ty),
            mask=real,
        )
