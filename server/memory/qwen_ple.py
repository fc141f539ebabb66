"""Engram as Qwen3.8-Flash-Next has it, there called PLE: the paper's gate and convolution, without biases.

    key_c = N(W_K,c e),  query_c = N(h_c),  value = W_V e        N(x) = x · rsqrt(mean x² + eps) · (1 + w), per branch
    v_c = sigmoid(sign(s_c) · sqrt(max(|s_c|, 1e-6))) · value    s_c = <key_c, query_c> / sqrt(H)
    out_c = v_c + SiLU(conv(N(v_c)))                             depthwise, causal, dilation = the longest order

The convolution runs on across an end of text; only the addresses start anew there. Shapes: T tokens, c one of hc
residual branches, H hidden width, K taps. Parameters are named and shaped as in the released checkpoint. Source: the
`qwen4_exp` model of transformers. Knows nothing of where rows live or how they are addressed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from server.memory.engram import signed_root_gate
from server.memory.layer import BranchNorm, EngramShape, MemoryLayer


class GroupedNorm(BranchNorm):
    """RMSNorm per branch whose stored weight [hc · H] is the gain less one."""

    def __init__(self, shape: EngramShape, dtype: torch.dtype) -> None:
        super().__init__(shape, shape.norm_eps, dtype)
        self.weight = nn.Parameter(torch.zeros(shape.branches * shape.hidden_size, dtype=dtype))
        self.hidden_size = shape.hidden_size

    def gain(self) -> Tensor:
        return 1.0 + self.weight.float().view(-1, self.hidden_size)


class QwenPLE(MemoryLayer):
    """`key_proj.weight` [hc · H, C · D], `value_proj.weight` [H, C · D], `conv1d.weight` [hc · H, 1, K], norms."""

    has_conv = True

    def __init__(self, shape: EngramShape, dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        width, hidden, wide = shape.row_width, shape.hidden_size, shape.branches * shape.hidden_size
        self.key_proj = nn.Linear(width, wide, bias=False, dtype=dtype)
        self.value_proj = nn.Linear(width, hidden, bias=False, dtype=dtype)
        self.norm_key, self.norm_query, self.norm_conv = (GroupedNorm(shape, dtype) for _ in range(3))
        self.conv1d = nn.Conv1d(wide, wide, shape.kernel_size, groups=wide, bias=False, dtype=dtype)

    def alpha(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """hidden[T, hc, H], rows[T, C · D] → α[T, hc, 1] in fp32."""
        key = self.key_proj(rows).view_as(hidden)
        return signed_root_gate(key, self.norm_key, hidden, self.norm_query)

    def gated(self, hidden: Tensor, rows: Tensor, dead: Tensor | None) -> Tensor:
        alpha = self.alpha(hidden, rows)
        gated: Tensor = alpha * self.value_proj(rows).float()[:, None]
        return gated

    def conv_input(self, gated: Tensor) -> Tensor:
        normed: Tensor = self.norm_conv(gated)
        return normed

    def taps(self) -> Tensor:
        return self.conv1d.weight[:, 0]

    def gates(self, hidden: Tensor, rows: Tensor, dead: Tensor | None = None) -> Tensor:
        return self.alpha(self.branches_of(hidden), rows).mean((1, 2))
