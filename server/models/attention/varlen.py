"""Attention straight from the paged cache by torch's `varlen_attn`, where the installed torch has it paged.

Our kernel writes keys and values; one call attends for all sequences of a step, those of one new token among them.
A layer of the cache, [blocks, block_size, 2 · Hk · D], is handed over as two strided views [blocks, block_size, Hk, D].

By default torch runs FlashAttention 2. It aligns the causal mask with the last key, takes bf16 and fp16, heads of at
most 256 values and blocks of a multiple of 256 tokens, and refuses what else it is given. Whether it is right and worth
it on this GPU is not known here: `server/runtime/attention_probe.py` finds out.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import cast

import numpy as np
import torch
from torch import Tensor

from kernels import paged_attention
from server.batch import Batch, DecodeBatch
from server.models.attention.kv_cache import KVCache
from server.models.attention.paged import PagedBackend
from server.models.config import ModelConfig


def paged_varlen_attn() -> Callable[..., Tensor] | None:
    """torch's function if it reads paged caches, as it does from 2.12 on; None if it does not."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    paged = {"seqused_k", "block_table", "num_splits"} <= signature(varlen_attn).parameters.keys()
    return cast(Callable[..., Tensor], varlen_attn) if paged else None


def unavailable(device: torch.device) -> str | None:
    """Why torch's function cannot even be tried; None if it can."""
    if device.type != "cuda":
        return "torch's varlen_attn needs CUDA"
    if paged_varlen_attn() is None:
        return f"torch {torch.__version__} has no paged varlen_attn"
    return None


class VarlenBackend(PagedBackend):
    """Only where `unavailable` has nothing to say. Here `query_start[B + 1]` is of all sequences of the step."""

    name = "varlen"

    def __init__(self, config: ModelConfig, cache: KVCache) -> None:
        super().__init__(config, cache)
        attend = paged_varlen_attn()
        assert attend is not None
        self.attend = attend
        pair = (2, self.num_kv_heads, self.head_dim)
        self.views = [layer.view(*layer.shape[:2], *pair).unbind(2) for layer in cache.layers]
        self.key_start: Tensor
        self.max_context = 0

    def plan(self, batch: Batch) -> None:
        starts = torch.from_numpy(batch.query_start.astype(np.int32)).to(self.device)
        context = torch.from_numpy(batch.context_len).to(self.device)
        self._lay_out(batch.slots, batch.block_table, context, starts, int(np.diff(batch.query_start).max()))

    def plan_decode(self, batch: DecodeBatch) -> None:
        """The same for a decode step, on the device alone: a captured graph copies the batch's tensors anew."""
        starts = torch.arange(batch.num_tokens + 1, dtype=torch.int32, device=self.device)
        self._lay_out(batch.slots, batch.block_table, batch.context_len, starts, 1)

    def _lay_out(self, slots: Tensor, block_table: Tensor, context_len: Tensor, starts: Tensor, longest: int) -> None:
        self.slots, self.query_start, self.longest = slots, starts, longest
        self.block_table, self.context_len = block_table.int(), context_len.int()
        self.max_context = block_table.shape[1] * self.cache.block_size
        # asked for by FlashAttention 2, which reads context_len in its place
        self.key_start = torch.arange(len(starts), dtype=torch.int32, device=self.device) * self.max_context

    def forward(self, qkv: Tensor, layer: int) -> Tensor:
        window, (key, value) = self.windows[layer], self.views[layer]
        paged_attention.write_kv(self.cache.layers[layer], self.slots, qkv[:, self.q_size :])
        # A single query sees all keys: without a mask, FlashAttention 2 reads them once for all query heads of a group.
        # Contexts are split only then: other shapes have been split wrongly (Dao-AILab/flash-attention#2550).
        unmasked, grouped = self.longest == 1 and not window, self.num_heads != self.num_kv_heads
        return self.attend(
            qkv[:, : self.q_size].view(-1, self.num_heads, self.head_dim),
            key,
            value,
            self.query_start,
            self.key_start,
            self.longest,
            self.max_context,
            scale=self.scale,
            window_size=(-1, -1) if unmasked else (window - 1 if window else -1, 0),
            enable_gqa=grouped,
            seqused_k=self.context_len,
            block_table=self.block_table,
            num_splits=None if unmasked and grouped else 1,
        ).flatten(1)
