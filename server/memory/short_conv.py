"""The short convolution of gated values: depthwise, causal, dilated, its inputs stored beside the KV cache.

The inputs depend on hidden states, so they are stored one per token slot and always read back through it, also within
a chunk: then chunks, prefix hits, forks and preemption need no state of their own.

    tap j of token t reads position t - (K - 1 - j) · dilation; zero before the sequence's start

Shapes: T tokens, hc branches, H hidden width, K taps. Knows slots and positions, nothing of gates or rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from server.batch import Batch


class ConvSlots:
    """The convolution's inputs, one [hc · H] per token slot: [blocks · block_size, hc · H], zero at first."""

    def __init__(self, num_slots: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.inputs = torch.zeros(num_slots, width, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.inputs.nbytes


@dataclass(frozen=True, slots=True)
class ConvRead:
    """Where one step's convolution reads: slots[T] of the tokens themselves, taps[K, T] of their predecessors.

    Tap j looks (K - 1 - j) · dilation positions back; inside[K, T, 1] is 0 where that lies before the sequence.
    """

    slots: Tensor
    taps: Tensor
    inside: Tensor

    @classmethod
    def of(cls, batch: Batch, kernel_size: int, dilation: int, tokens: Tensor | None = None) -> ConvRead:
        """For the batch's tokens, or for those at the indices `tokens` only."""
        sequence = torch.from_numpy(batch.sequence_of).to(batch.slots.device)
        own, at = batch.slots, batch.positions
        if tokens is not None:
            sequence, own, at = sequence[tokens], own[tokens], at[tokens]
        back = torch.arange(kernel_size - 1, -1, -1, device=at.device)[:, None] * dilation
        positions = at - back
        clamped = positions.clamp_min(0)
        blocks = batch.block_table[sequence, clamped // batch.block_size]
        return cls(own, blocks * batch.block_size + clamped % batch.block_size, (positions >= 0).float()[..., None])


def short_conv(inputs: Tensor, weight: Tensor, slots: ConvSlots, at: ConvRead) -> Tensor:
    """SiLU of the convolution; inputs[T, hc, H], weight[hc · H, K] → [T, hc · H] in fp32.

    Writes the inputs to their slots, then reads every tap back from the slots.
    """
    slots.inputs.index_copy_(0, at.slots, inputs.flatten(1).to(slots.inputs.dtype))
    taken = slots.inputs.index_select(0, at.taps.view(-1)).view(*at.taps.shape, -1).float()
    return F.silu((taken * at.inside).mul_(weight.float().T[:, None]).sum(0), inplace=True)
