"""Weight-only int8 and int4 on CPU by torch's own kernels: applied to a model from outside, before `prepack`.

    int8   one scale per output row                                  w = q · scale
    int4   a scale and a zero per 32 weights of a row                w = (q - 8) · scale + zero

A step of few tokens waits for its weights, and smaller ones arrive sooner. With more tokens these kernels fall behind
bf16 matrix multiplication (docs/experiments.md), so the weights' rounded values are kept in the model's dtype too and
used there: the function computed is the same at every batch size, and no step is slower than with oneDNN's blocks alone
(`--cpu-weights once`). The output head stays at int8 in both, since rounding errors of it go straight into the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from server.errors import SettingsError
from server.models.layers import Linear

GROUP = 32  # weights that share a scale and a zero in int4
TINY = 1e-30  # in place of a scale of 0, which a row of zeros has and a very small one in fp16
FEW = {"int8": 1, "int4": 4}  # tokens up to which the integer kernel is the faster


class QuantizedLinear(nn.Module):
    """`Linear` by integer weights for up to FEW tokens, by the same values in the model's dtype for more."""

    def __init__(self, linear: Linear, bits: str) -> None:
        super().__init__()
        self.bits, self.few, self.bias = bits, FEW[bits], linear.bias
        weight = linear.weight.data
        self.packed, self.scales, values = _int8(weight) if bits == "int8" else _int4(weight)
        self.many = Linear.of(values, linear.bias)

    @property
    def nbytes(self) -> int:
        """Bytes of the integer form."""
        return self.packed.nbytes + self.scales.nbytes

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > self.few:
            y: Tensor = self.many(x)
            return y
        if self.bits == "int8":
            y = torch.ops.aten._weight_int8pack_mm(x, self.packed, self.scales)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, GROUP, self.scales)
        return y if self.bias is None else y.add_(self.bias)


def _int8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight[N, K] → int8 [N, K], scales [N], and the values they stand for [N, K]."""
    scales = (weight.float().abs().amax(1) / 127).to(weight.dtype)
    packed = (weight.float() / scales.float()[:, None].clamp(min=TINY)).round_().clamp_(-127, 127)
    values = (packed * scales.float()[:, None]).to(weight.dtype)
    return packed.to(torch.int8), scales, values


def _int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight[N, K] → the kernel's blocks, scales and zeros [K / GROUP, N, 2], and the values they stand for [N, K]."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // GROUP, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).to(weight.dtype)
    zero = (low + 8 * scale.float()).to(weight.dtype)
    steps = ((groups - zero.float()[..., None]) / scale.float()[..., None].clamp(min=TINY) + 8).round_().clamp_(0, 15)
    values = ((steps - 8) * scale.float()[..., None] + zero.float()[..., None]).to(weight.dtype)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps.view(rows, columns).to(torch.int32), 1)
    scales = torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous()
    return packed, scales, values.view(rows, columns)


def quantize(module: nn.Module, bits: str, head: nn.Module | None = None) -> None:
    """Replaces every linear map below `module` by its quantised form, one at a time, in place; `head` by int8.

    Raises SettingsError where int4 does not fit a matrix's shape.
    """
    for name, child in module.named_children():
        if isinstance(child, Linear):
            chosen = "int8" if child is head else bits
            if chosen == "int4":
                _check_int4(child.weight)
            setattr(module, name, QuantizedLinear(child, chosen))
        else:
            quantize(child, bits, head)


def _check_int4(weight: Tensor) -> None:
    rows, columns = weight.shape
    if columns % GROUP or rows % 16:
        raise SettingsError(
            f"--quantize is int4 and a matrix of the model is {rows} by {columns}; it packs {GROUP} weights of 16 rows "
            f"at a time; use --quantize int8"
        )
