"""The short convolution of gated values: depthwise, causal, dilated, its inputs stored beside the KV cache.

The inputs depend on hidden states, so they are stored one per token slot and always read back through it, also within
a chunk: then chunks, prefix hits, forks and preemption need no state of their own.

    tap j of token t reads position t - (K - 1 - j) · dilation; zero before the sequence's start

Shapes: T tokens, hc branches, H hidden width, K taps. Knows slots and positions, nothing of gates or rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from server.batch import Batch, Ints


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

    Tap j looks (K - 1 - j) · dilation positions back. Before the sequence's start it reads slot 0, which is in the
    padding block: nobody writes there, and it stays zero.
    """

    slots: Tensor
    taps: Tensor

    @classmethod
    def of(cls, batch: Batch, kernel_size: int, dilation: int, tokens: Ints | None = None) -> ConvRead:
        """For the batch's tokens, or for those at the indices `tokens` only. Computed on the host, in one pass."""
        sequences, positions, slots = batch.sequence_of, batch.host_positions, batch.slots
        if tokens is not None:
            sequences, positions = sequences[tokens], positions[tokens]
            slots = slots[torch.from_numpy(tokens).to(slots.device)]
        back = np.arange(kernel_size - 1, -1, -1)[:, None] * dilation
        read = positions - back
        block, offset = np.divmod(np.maximum(read, 0), batch.block_size)
        taps = batch.host_blocks[sequences, block] * batch.block_size + offset
        taps[read < 0] = 0
        return cls(slots, torch.from_numpy(taps).to(slots.device))


def short_conv(inputs: Tensor, weight: Tensor, slots: ConvSlots, at: ConvRead) -> Tensor:
    """SiLU of the convolution; inputs[T, hc, H], weight[hc · H, K] → [T, hc · H] in fp32.

    Writes the inputs to their slots, then reads every tap back from the slots.
    """
    slots.inputs.index_copy_(0, at.slots, inputs.flatten(1).to(slots.inputs.dtype))
    taken = slots.inputs.index_select(0, at.taps.view(-1)).view(*at.taps.shape, -1)
    return F.silu((taken * weight.float().T[:, None]).sum(0), inplace=True)
