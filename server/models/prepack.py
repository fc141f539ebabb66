"""Weights in the layout that the CPU's matrix kernels want, made once: applied to a model from outside.

oneDNN multiplies faster when the weight is already in its blocked layout; with plain rows it reorders at each call.
Measured: in bf16 21 → 15 ms for all matrices of a SmolLM2 step at batch 1, in fp32 115 → 70 ms at batch 8 on one core
without AVX-512 (docs/experiments.md). The packed copy replaces the plain one, so weights stay in memory once; only a
tied embedding keeps both. Where memory allows, plain rows stay beside it for steps of few tokens, which are read at the
memory's bandwidth by a C kernel: all matrices of a SmolLM2 step at batch 1 15.1 → 11.7 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.cpu.ops import CpuKernels
from server.models.layers import Linear

TYPICAL_BATCH = 8  # the row count oneDNN lays the blocks out for; other counts run on the same layout


class PackedLinear(nn.Module):
    """`Linear` with an oneDNN-blocked weight; with `kernels`, up to `kernels.few` tokens go by plain rows instead."""

    def __init__(self, linear: Linear | nn.Linear, kernels: CpuKernels | None = None) -> None:
        super().__init__()
        self.rows: Tensor | None = None
        if kernels is not None and kernels.multiplies(linear.weight):
            self.rows, self.few, self.by_rows = linear.weight.data, kernels.few, kernels.multiply
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, TYPICAL_BATCH)
        self.bias = linear.bias
        self.multiply = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is not None and 0 < x.shape[0] <= self.few:
            return self.by_rows(x, self.rows, self.bias)
        y: Tensor = self.multiply(x, self.packed, self.bias, "none", [], "")
        return y


def can_prepack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this build has oneDNN, and the processor what it needs for `dtype`: fp32, or bf16."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def prepack(module: nn.Module, kernels: CpuKernels | None = None) -> None:
    """Replaces every linear map below `module` by its packed form, one at a time, in place; with `kernels`, the plain
    rows stay.
    """
    for name, child in module.named_children():
        if isinstance(child, (Linear, nn.Linear)):
            setattr(module, name, PackedLinear(child, kernels))
        else:
            prepack(child, kernels)
