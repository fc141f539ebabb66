"""Engram, the paper's form, by a C kernel: put in place from outside, on a CPU with a compiler.

    rows ─ key_value ─ kernel: gate, value, convolution ─► added to the hidden state

About 50 small operators a layer are one call (docs/experiments.md). The same sums as `engram.py`, in fp32, in another
order.
"""

from __future__ import annotations

from torch import Tensor

from kernels.cpu.ops import CpuKernels, EngramLayer
from server.memory.engram import Engram
from server.memory.short_conv import ConvRead, ConvSlots


class CEngram:
    """How the layer `module` is computed: `MemoryLayer.fused`."""

    def __init__(self, module: Engram, kernels: CpuKernels) -> None:
        norms = module.key_norm, module.query_norm, module.conv_norm
        gain = module.key_norm.gain() * module.query_norm.gain()
        self.layer = EngramLayer(gain, module.conv_norm.gain(), module.conv.float(), *(float(n.eps) for n in norms))
        self.key_value, self.kernels = module.key_value, kernels

    def __call__(self, total: Tensor | None, hidden: Tensor, rows: Tensor, slots: ConvSlots, at: ConvRead) -> Tensor:
        """hidden[T, hc · H], rows[T, C · D] → what is added, and with it `total`, where that is given."""
        wide = self.key_value(rows)
        return self.kernels.engram(self.layer, hidden, wide, slots.inputs, at.slots, at.taps, total)
