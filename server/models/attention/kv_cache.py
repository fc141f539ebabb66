"""The paged KV cache: per layer one tensor [blocks, block_size, 2 · Hk · D], a token's key and value side by side.

    block 7   | k₀ v₀ | k₁ v₁ | … | k₃₁ v₃₁ |        slot = block · block_size + offset

Keys and values share a row, so that a step writes and gathers them with one operation per layer. Memory is zeroed:
padding pages are read under a mask, and 0 · NaN would not be 0.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from server.batch import Ints
from server.models.config import ModelConfig


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token occupies over all layers."""
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize


Pages = Tensor | slice


class KVCache:
    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size = block_size
        width = 2 * config.num_kv_heads * config.head_dim
        self.layers = [
            torch.zeros(num_blocks, block_size, width, dtype=dtype, device=device) for _ in range(config.num_layers)
        ]
        self.nbytes = sum(layer.nbytes for layer in self.layers)

    def write(self, layer: int, slots: Tensor, kv: Tensor) -> None:
        """kv[T, 2 · Hk · D] to slots[T]."""
        cache = self.layers[layer]
        cache.view(-1, cache.shape[-1]).index_copy_(0, slots, kv)

    def read(self, layer: int, blocks: Pages) -> Tensor:
        """The tokens of `blocks`, in order: [N · block_size, 2 · Hk · D]. A view where the blocks are neighbours."""
        cache = self.layers[layer]
        taken = cache[blocks] if isinstance(blocks, slice) else cache.index_select(0, blocks)
        return taken.view(-1, cache.shape[-1])


def pages(blocks: Ints, device: torch.device) -> Pages:
    """blocks[N] as a slice if they are neighbours in ascending order, so that reading them copies nothing."""
    first = int(blocks[0])
    if np.array_equal(blocks, np.arange(first, first + len(blocks))):
        return slice(first, first + len(blocks))
    return torch.from_numpy(blocks).to(device)
