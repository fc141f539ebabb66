"""An Engram that is taught: the paper's layer with gradient to its rows, projections, norms and convolution.

The arithmetic is that of `server/memory/engram.py`, in fp32, on whole sequences: the convolution reads its inputs from
the batch instead of from token slots. A fresh layer adds exact zeros, so that training begins at the bare backbone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from server.memory.addressing import Addresser
from server.memory.engram import Engram
from server.memory.layer import SIGNED_SQRT_FLOOR, BranchNorm
from server.training.frozen import Frozen
from server.training.layout import Layout
from server.training.memory import TaughtMemory
from server.training.rows import TrainedRows


class TaughtEngram(TaughtMemory):
    """`modules`: the layers' Engrams in fp32; they are given gradients."""

    keeps_rows_from_retained = True

    def __init__(self, addresser: Addresser, rows: Mapping[int, TrainedRows], modules: Mapping[int, Engram]) -> None:
        super().__init__(addresser, rows)
        self.modules = dict(modules)
        self.adds = frozenset(self.layer_ids)
        for module in self.modules.values():
            module.requires_grad_(True)

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for module in self.modules.values() for parameter in module.parameters()]

    def added(self, layer: int, hidden: Tensor, rows: Tensor, layout: Layout) -> Tensor:
        module = self.modules[layer]
        gated = gated_value(module, hidden, rows)
        return (gated + convolved(module, gated, layout).view_as(gated)).view_as(hidden)

    def stray(self, layer: int, state: Tensor, rows: Tensor, layout: Layout, frozen: Frozen) -> Tensor:
        return self.added(layer, state, rows, layout).pow(2).sum(-1)


def gated_value(module: Engram, hidden: Tensor, rows: Tensor) -> Tensor:
    """hidden[T, H], rows[T, C · D] → α · value [T, hc, H]."""
    tokens, hc, size = hidden.shape[0], module.shape.branches, module.shape.hidden_size
    key, value = module.key_value(rows).view(tokens, hc + 1, size).split([hc, 1], dim=1)
    key, query = scaled(module.key_norm, key), scaled(module.query_norm, hidden.view(tokens, hc, size))
    score = (key * query).sum(-1, keepdim=True) / math.sqrt(size)
    root = score.abs().clamp_min(SIGNED_SQRT_FLOOR).sqrt()
    gated: Tensor = torch.sigmoid(torch.sign(score) * root) * value
    return gated


def scaled(norm: BranchNorm, x: Tensor) -> Tensor:
    y: Tensor = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight
    return y


def convolved(module: Engram, gated: Tensor, layout: Layout) -> Tensor:
    """SiLU of the causal, dilated, depthwise convolution along each sequence: gated[T, hc, H] → [T, hc · H]."""
    inputs = F.pad(scaled(module.conv_norm, gated).flatten(1), (0, 0, 1, 0))  # row 0: before a sequence's start
    taps = module.conv.shape[1]
    mixed = inputs.new_zeros(layout.tokens, inputs.shape[1])
    for tap in range(taps):
        reads = layout.back((taps - 1 - tap) * module.shape.dilation)
        mixed = mixed + inputs.index_select(0, reads) * module.conv[:, tap]
    return F.silu(mixed)
