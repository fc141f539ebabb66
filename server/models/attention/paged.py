"""Attention straight from the paged cache, by our own kernels: the GPU's backend, and the one of decode steps.

Sequences with one new token come first in a batch and go through split-KV decode, those with several through prefill.
A decode step over static tensors (`plan_decode`) reads nothing on the host, so that it can be captured.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels import paged_attention
from server.batch import Batch, DecodeBatch
from server.models.attention.base import AttentionBackend
from server.models.attention.kv_cache import KVCache
from server.models.config import ModelConfig


class PagedBackend(AttentionBackend):
    name = "paged"

    def __init__(self, config: ModelConfig, cache: KVCache) -> None:
        self.cache, self.device = cache, cache.layers[0].device
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale = config.features.query_scale or config.head_dim**-0.5
        self.windows = config.features.windows
        self.q_size = self.num_heads * self.head_dim
        self.slots: Tensor
        self.block_table: Tensor
        self.context_len: Tensor
        self.query_start: Tensor | None = None  # of the sequences with several tokens
        self.decodes = self.longest = 0

    def plan(self, batch: Batch) -> None:
        counts = np.diff(batch.query_start)
        several = np.flatnonzero(counts > 1)
        self.decodes = int(several[0]) if len(several) else len(counts)
        self.slots, self.block_table = batch.slots, batch.block_table
        self.context_len = torch.from_numpy(batch.context_len).to(self.device)
        self.longest, self.query_start = int(counts.max()), None
        if len(several):
            starts = batch.query_start[self.decodes :] - self.decodes
            self.query_start = torch.from_numpy(starts).to(self.device)

    def plan_decode(self, batch: DecodeBatch) -> None:
        """The same for a decode step: keeps the batch's tensors."""
        self.decodes, self.query_start = batch.num_tokens, None
        self.slots, self.block_table, self.context_len = batch.slots, batch.block_table, batch.context_len

    def forward(self, qkv: Tensor, layer: int) -> Tensor:
        cache, window, decodes = self.cache.layers[layer], self.windows[layer], self.decodes
        paged_attention.write_kv(cache, self.slots, qkv[:, self.q_size :])
        query = qkv[:, : self.q_size].view(-1, self.num_heads, self.head_dim)
        first = (query[:decodes], cache, self.block_table[:decodes], self.context_len[:decodes], self.num_kv_heads)
        if self.query_start is None:
            return paged_attention.decode(*first, window, self.scale).flatten(1)
        chunks = paged_attention.prefill(
            query[decodes:],
            cache,
            self.block_table[decodes:],
            self.query_start,
            self.context_len[decodes:],
            self.num_kv_heads,
            self.longest,
            window,
            self.scale,
        ).flatten(1)
        if not decodes:
            return chunks
        return torch.cat((paged_attention.decode(*first, window, self.scale).flatten(1), chunks))
