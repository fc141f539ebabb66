"""Engram, the paper's form: hashed n-gram rows, gated into the residual stream before attention.

    e = rows[T, C · D]                         the rows of all orders and heads, side by side
    k_c = RMSNorm(W_K,c e),  q_c = RMSNorm(h_c)
    s_c = <k_c, q_c> / sqrt(H)
    α_c = sigmoid(sign(s_c) · sqrt(max(|s_c|, 1e-6)))
    v_c = α_c · (W_V e)
    out_c = v_c + SiLU(conv(RMSNorm(v_c)))     depthwise, causal, kernel 4, dilation = the longest order

Shapes: T tokens, c one of hc residual branches (1 on a plain stream), H hidden width. Source: arXiv 2601.07372 §2 and
its released demo. Knows nothing of where rows live or how they are addressed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from server.memory.layer import SIGNED_SQRT_FLOOR, BranchNorm, EngramShape, MemoryLayer

CONV_NORM_EPS = 1e-5


class Engram(MemoryLayer):
    """The paper's layer, with biases and a convolution; what is computed in fp32 is stored so.

    A dead token reads its pads' rows like any other.
    """

    has_conv = True

    def __init__(self, shape: EngramShape, dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        width, hidden, hc = shape.row_width, shape.hidden_size, shape.branches
        self.key_value = nn.Linear(width, (hc + 1) * hidden, dtype=dtype)  # hc keys, then the shared value
        self.key_norm = BranchNorm(shape, shape.norm_eps, torch.float32)
        self.query_norm = BranchNorm(shape, shape.norm_eps, torch.float32)
        self.conv_norm = BranchNorm(shape, CONV_NORM_EPS, torch.float32)
        self.conv = nn.Parameter(torch.zeros(hc * hidden, shape.kernel_size))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """A fresh memory: random keys, and an exactly zero contribution (value and convolution zero). Trainable."""
        keys = self.shape.branches * self.shape.hidden_size
        self.key_value.weight[:keys].normal_(0.0, 1 / math.sqrt(self.shape.row_width), generator=generator)
        self.key_value.weight[keys:] = 0
        self.key_value.bias.zero_()
        self.conv.zero_()

    def gate(self, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """hidden[T, hc, H], rows[T, C · D] → α[T, hc, 1] in fp32 and the ungated value [T, 1, H]."""
        tokens, hc, size = hidden.shape
        key, value = self.key_value(rows).view(tokens, hc + 1, size).split([hc, 1], dim=1)
        return signed_root_gate(key, self.key_norm, hidden, self.query_norm), value

    def gated(self, hidden: Tensor, rows: Tensor, dead: Tensor | None) -> Tensor:
        alpha, value = self.gate(hidden, rows)
        return alpha * value.float()

    def conv_input(self, gated: Tensor) -> Tensor:
        normed: Tensor = self.conv_norm(gated)
        return normed

    def taps(self) -> Tensor:
        return self.conv

    def gates(self, hidden: Tensor, rows: Tensor, dead: Tensor | None = None) -> Tensor:
        return self.gate(self.branches_of(hidden), rows)[0].mean((1, 2))


def signed_root_gate(key: Tensor, key_norm: BranchNorm, query: Tensor, query_norm: BranchNorm) -> Tensor:
    """key, query [T, hc, H], to be normed → α[T, hc, 1] in fp32. A score of exactly 0 gives 1/2."""
    key, query = key.float(), query.float()
    weight = key_norm.gain() * query_norm.gain()
    score = (key * weight).mul_(query).sum(-1, keepdim=True) / math.sqrt(key.shape[-1])
    score = score * key_norm.scale(key) * query_norm.scale(query)  # the norms' scalars, drawn out
    return torch.sigmoid(torch.sign(score) * score.abs().clamp_min(SIGNED_SQRT_FLOOR).sqrt())
