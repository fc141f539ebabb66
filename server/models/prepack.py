"""Weights in the layout that the CPU's bf16 kernels want, made once: applied to a model from outside.

oneDNN multiplies faster when the weight is already in its blocked layout; with plain rows it reorders at each call.
Measured here: 21 → 15 ms for all matrices of a SmolLM2 step at batch 1 (docs/experiments.md). The packed copy
replaces the plain one, so weights stay in memory once; only a tied embedding keeps both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from server.models.layers import Linear

TYPICAL_BATCH = 8  # the row count oneDNN lays the blocks out for; other counts run on the same layout


class PackedLinear(nn.Module):
    """`Linear` with an oneDNN-blocked weight."""

    def __init__(self, linear: Linear | nn.Linear) -> None:
        super().__init__()
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, TYPICAL_BATCH)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


def can_prepack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this build and processor have the bf16 kernels."""
    return (
        dtype == torch.bfloat16
        and device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def prepack(module: nn.Module) -> None:
    """Replaces every linear map below `module` by its packed form, one at a time, in place."""
    for name, child in module.named_children():
        if isinstance(child, (Linear, nn.Linear)):
            setattr(module, name, PackedLinear(child))
        else:
            prepack(child)
