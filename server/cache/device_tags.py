"""DeviceTags: a hot pool's tags once more, on the device, where lookups within a CUDA graph find them.

    host     choose ─ void the host's tags ─ copy rows ─ write tags        the truth, and the policy
    device            void the ways ──────── copy rows ─ publish           the same order on one stream

Every change goes to the stream that lookups are launched on, between two of them: none ever sees a tag over rows that
are being written. A voided way is a miss, which is always right. Knows slots, owners and keys.
"""

from __future__ import annotations

import torch

from kernels.row_lookup import HotTags
from server.cache.cuda_memory import send
from server.cache.row_table import Ids


class DeviceTags:
    """Of `rows`, entries of E bytes [S · W, ·] on the device; keys and owners [S, W] as the host has them now."""

    def __init__(self, rows: torch.Tensor, keys: Ids, owners: Ids) -> None:
        with torch.inference_mode(False):  # else only threads in inference mode could write them
            self.hot = HotTags(
                torch.from_numpy(keys).to(rows.device, copy=True),
                torch.from_numpy(owners).to(rows.device, copy=True),
                rows.view(torch.uint8),
            )

    @property
    def nbytes(self) -> int:
        return self.hot.keys.nbytes + self.hot.owners.nbytes

    def void(self, slots: torch.Tensor, empty: int) -> None:
        """slots[M] on the device hold nothing until they are published."""
        self.hot.owners.view(-1).index_fill_(0, slots, empty)

    def publish(self, slots: torch.Tensor, owners: Ids, keys: Ids) -> None:
        """slots[M] hold the rows of these tags from now on."""
        self.hot.keys.view(-1).index_copy_(0, slots, send(keys, slots.device))
        self.hot.owners.view(-1).index_copy_(0, slots, send(owners, slots.device))

    def drop(self, owner: int, empty: int) -> None:
        self.hot.owners.masked_fill_(self.hot.owners == owner, empty)
