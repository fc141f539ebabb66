"""Engram as DeepSeek-V4.1 has it: one fused projection, no convolution, no biases.

    key_1 … key_hc, value = W_kv e
    d_c = Σ h_c · q_c · k_c · key_c · rsqrt(mean h_c² + eps) · rsqrt(mean key_c² + eps) / sqrt(H)
    α_c = sigmoid(±sqrt(max(|d_c|, 1e-6)))     minus below zero, so that a score of exactly 0 gives +1e-3
    out_c = α_c · value                        nothing at all for a dead token

q_c and k_c are the two norms' weights, all of it in fp32. A dead token (an image's place) passes through as it is.
Shapes: T tokens, c one of hc residual branches, H hidden width. Parameters are named as in the released checkpoint.
Source: the released V4.1 configuration and inference code. Knows nothing of where rows live or how they are addressed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from server.memory.layer import SIGNED_SQRT_FLOOR, EngramShape, MemoryLayer


class DeepSeekEngram(MemoryLayer):
    """`wkv.weight` [(hc + 1) · H, C · D], `q_weight` and `k_weight` [hc, H]."""

    has_conv = False

    def __init__(self, shape: EngramShape, dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        hc, hidden = shape.branches, shape.hidden_size
        self.wkv = nn.Linear(shape.row_width, (hc + 1) * hidden, bias=False, dtype=dtype)
        self.q_weight = nn.Parameter(torch.ones(hc, hidden, dtype=dtype))
        self.k_weight = nn.Parameter(torch.ones(hc, hidden, dtype=dtype))

    def gate(self, query: Tensor, key: Tensor) -> Tensor:
        """query, key [T, hc, H] → α[T, hc, 1] in fp32."""
        query, key = query.float(), key.float()
        eps = self.shape.norm_eps
        dot = (query * self.q_weight.float() * self.k_weight.float() * key).sum(-1, keepdim=True)
        for side in (query, key):
            dot = dot * torch.rsqrt(side.pow(2).mean(-1, keepdim=True) + eps)
        dot = dot / math.sqrt(query.shape[-1])
        root = dot.abs().clamp_min(SIGNED_SQRT_FLOOR).sqrt()
        return torch.sigmoid(torch.where(dot < 0, -root, root))

    def gated(self, hidden: Tensor, rows: Tensor, dead: Tensor | None) -> Tensor:
        tokens, hc, size = hidden.shape
        key, value = self.wkv(rows).view(tokens, hc + 1, size).split([hc, 1], dim=1)
        alpha = self.gate(hidden, key)
        if dead is not None:
            alpha = alpha.masked_fill(dead[:, None, None], 0.0)
        gated: Tensor = alpha * value.float()
        return gated

    def gates(self, hidden: Tensor, rows: Tensor, dead: Tensor | None = None) -> Tensor:
        query = self.branches_of(hidden)
        tokens, hc, size = query.shape
        key = self.wkv(rows).view(tokens, hc + 1, size)[:, :hc]
        alpha = self.gate(query, key).mean((1, 2))
        return alpha if dead is None else alpha.masked_fill(dead, 0.0)
