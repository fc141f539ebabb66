"""One Engram pack at one layer of a decode step on the device: what its rows add, and to whom.

    plain   the pack's own module on all tokens, then `where` by who sees it
    fused   Engram, DeepSeek-V4.1: projection ─ one kernel for gate and value ─ one for the convolution, if there is one

Tokens that do not see the pack keep their hidden state to the bit. Shapes: T tokens, hc residual branches, H hidden
width. Knows modules and masks; nothing of tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.memory_gate import GateWeights, gate
from kernels.short_conv import short_conv
from server.batch import DecodeBatch
from server.memory.deepseek import DeepSeekEngram
from server.memory.engram import Engram
from server.memory.layer import MemoryLayer
from server.memory.short_conv import ConvRead, ConvSlots


@dataclass(frozen=True, slots=True)
class Fused:
    """A layer as the kernels take it. `conv` [hc · H, K] and `dilation`: None and 0 without a convolution."""

    project: Callable[[Tensor], Tensor]
    branches: int
    weights: GateWeights
    conv: Tensor | None = None
    dilation: int = 0

    def add(
        self,
        total: Tensor,
        hidden: Tensor,
        rows: Tensor,
        unseen: Tensor,
        batch: DecodeBatch,
        sequence_of: Tensor,
        slots: ConvSlots | None,
    ) -> None:
        """In place on total[T, H], which may be hidden; unseen bool[T]: tokens for whom nothing is done."""
        tokens, width = hidden.shape[0], hidden.shape[-1]
        wide = self.project(rows).view(tokens, self.branches + 1, -1)
        key, value = wide[:, : self.branches], wide[:, self.branches]
        query, into = hidden.view(tokens, self.branches, -1), total.view(tokens, self.branches, -1)
        if self.conv is None:
            gate(query, key, value, self.weights, dead=unseen, total=into)
            return
        assert slots is not None, f"a convolution over {width} values without slots"
        alpha = gate(query, key, value, self.weights, slots.inputs, batch.slots, unseen)
        short_conv(
            into, alpha, value, self.conv, slots.inputs, batch.block_table, sequence_of, batch.positions,
            batch.block_size, self.dilation, unseen,
        )  # fmt: skip


def fused(module: MemoryLayer) -> Fused | None:
    """The layer for the kernels; None for forms that they do not know."""
    shape = module.shape
    if type(module) is Engram:
        weights = GateWeights(
            gain=module.key_norm.gain() * module.query_norm.gain(),
            key_eps=float(module.key_norm.eps),
            query_eps=float(module.query_norm.eps),
            conv_gain=module.conv_norm.gain(),
            conv_eps=float(module.conv_norm.eps),
        )
        return Fused(module.key_value, shape.branches, weights, module.conv.float(), shape.dilation)
    if type(module) is DeepSeekEngram:
        gain = module.q_weight.float() * module.k_weight.float()
        return Fused(module.wkv, shape.branches, GateWeights(gain, shape.norm_eps, shape.norm_eps, zero_is_plus=True))
    return None


def conv_read(batch: DecodeBatch, kernel_size: int, dilation: int, sequence_of: Tensor) -> ConvRead:
    """`ConvRead.of` with the device's own numbers: places before the start read slot 0, which stays zero."""
    back = torch.arange(kernel_size - 1, -1, -1, device=batch.positions.device)[:, None] * dilation
    read = batch.positions - back
    known = read.clamp_min(0)
    block = batch.block_table[sequence_of, known // batch.block_size]
    taps = block * batch.block_size + known % batch.block_size
    return ConvRead(batch.slots, taps.masked_fill(read < 0, 0))
