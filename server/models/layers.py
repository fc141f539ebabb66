"""The parts of a dense decoder block: linear map, RMS norm, rotary embedding.

Single-device, plain tensors. Layout choices for speed (prepacked weights) are applied from outside: `prepack.py`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from server.models.config import ModelConfig


class Linear(nn.Module):
    """y = x Wᵀ + b, and + residual when one is given, so that a layout can fuse the addition.

    weight[out, in]. Subclasses keep the signature and change only how the weight is stored.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if residual is None else residual + y


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, computed in fp32 and rounded once before the weight, as Llama does."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x_float = x.float()
        scale = torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True).add_(self.eps))
        return (x_float * scale).to(x.dtype) * self.weight


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Rotary frequencies [D / 2] in fp32 and the factor on cos and sin (1 except for YaRN).

    Sources: RoPE (arXiv 2104.09864); Llama 3.1's rule by wavelength; YaRN (arXiv 2309.00071) §3.
    """
    half = config.head_dim // 2
    frequency = 1.0 / config.rope_theta ** (torch.arange(half, dtype=torch.float32) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency, 1.0
    if scaling.kind == "linear":
        return frequency / scaling.factor, 1.0
    if scaling.kind == "llama3":
        wavelength = 2 * math.pi / frequency
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        blend = ((scaling.original_max_position / wavelength - low) / (high - low)).clamp(0, 1)
        return frequency / scaling.factor * (1 - blend) + frequency * blend, 1.0

    def dimension_of(rotations: float) -> float:
        period = scaling.original_max_position / (rotations * 2 * math.pi)
        return half * math.log(period) / math.log(config.rope_theta)

    low = max(math.floor(dimension_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_of(scaling.beta_slow)), config.head_dim - 1)
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return frequency * (1 - ramp) + frequency / scaling.factor * ramp, factor


class Rotary(nn.Module):
    """Rotates pairs (i, i + D/2) of every head by position · frequency_i.

    The sine table carries rotate_half's sign, so that a rotation is x · cos + roll(x, D/2) · sin.
    """

    def __init__(self, config: ModelConfig, max_len: int, dtype: torch.dtype) -> None:
        super().__init__()
        frequency, factor = inverse_frequencies(config)
        angle = torch.outer(torch.arange(max_len, dtype=torch.float32), frequency)
        cos, sin = angle.cos() * factor, angle.sin() * factor
        self.half = frequency.numel()
        self.register_buffer("table", torch.cat([cos, cos, -sin, sin], dim=-1).to(dtype), persistent=False)
        self.table: Tensor

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos[T, 1, D] and signed sin[T, 1, D] of positions[T]: once per step, for all layers."""
        rows = self.table.index_select(0, positions).unsqueeze(1)
        return rows[..., : 2 * self.half], rows[..., 2 * self.half :]

    def rotate_(self, heads: Tensor, cos: Tensor, sin: Tensor) -> None:
        """In place on heads[T, H, D]."""
        rolled = torch.roll(heads, self.half, dims=-1)
        heads.mul_(cos).addcmul_(rolled, sin)
