"""AttentionBackend: the one seam between the decoder and how attention is computed on a device.

The backend owns the paged KV cache. It knows slots and block tables, never sequences, requests or text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from server.models.attention.kv_cache import KVCache

if TYPE_CHECKING:
    from torch import Tensor

    from server.batch import Batch


class AttentionBackend(ABC):
    """Shapes: T tokens, Hq query heads, Hk key-value heads, D values per head."""

    name: str
    cache: KVCache

    @abstractmethod
    def plan(self, batch: Batch) -> None:
        """Prepares what all layers of one step share: page lists, lengths, masks."""

    @abstractmethod
    def forward(self, qkv: Tensor, layer: int) -> Tensor:
        """Writes the step's keys and values to their slots and attends. qkv[T, (Hq + 2 Hk) · D] → [T, Hq · D].

        Queries and keys are already rotated. A token sees the positions of its own sequence up to itself.
        """

    @property
    def kv_bytes(self) -> int:
        """Bytes the KV cache occupies."""
        return self.cache.nbytes

    @property
    def num_slots(self) -> int:
        """Tokens the KV cache has room for."""
        return self.cache.layers[0].shape[0] * self.cache.block_size
