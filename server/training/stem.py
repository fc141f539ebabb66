"""A STEM memory that is taught: rows per token id in place of up-projections, with gradient to the rows alone.

There are no modules to learn to be silent, so that retained text teaches the rows too: it holds the feed-forward
block's output where the bare backbone has it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from server.memory.addressing import Addresser
from server.training.frozen import Frozen, norm
from server.training.layout import Layout
from server.training.memory import TaughtMemory
from server.training.rows import TrainedRows


class TaughtStem(TaughtMemory):
    keeps_rows_from_retained = False

    def __init__(self, addresser: Addresser, rows: Mapping[int, TrainedRows], frozen: Frozen) -> None:
        super().__init__(addresser, rows)
        self.replaces = frozenset(self.layer_ids)
        self.dtype = frozen.dtype

    def parameters(self) -> list[nn.Parameter]:
        return []

    def up(self, layer: int, rows: Tensor) -> Tensor:
        return rows.to(self.dtype)

    def stray(self, layer: int, state: Tensor, rows: Tensor, layout: Layout, frozen: Frozen) -> Tensor:
        """`state`: the bare backbone's stream between the layer's attention and its feed-forward block."""
        block = frozen.blocks[layer]
        gate, up = frozen.feed_in(layer, norm(block.mlp_norm, state), None)
        moved: Tensor = block.down(F.silu(gate) * (self.up(layer, rows) - up)).float()
        return moved.pow(2).sum(-1)
