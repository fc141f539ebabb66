"""Engram, the paper's form: hashed n-gram rows, gated into the residual stream before attention.

    e = rows[T, C · D]                         the rows of all orders and heads, side by side
    k_c = RMSNorm(W_K,c e),  q_c = RMSNorm(h_c)
    s_c = <k_c, q_c> / sqrt(H)
    α_c = sigmoid(sign(s_c) · sqrt(max(|s_c|, 1e-6)))
    v_c = α_c · (W_V e)
    out_c = v_c + SiLU(conv(RMSNorm(v_c)))     depthwise, causal, kernel 4, dilation = the longest order

Shapes: T tokens, c one of hc residual branches (1 on a plain stream), H hidden width. Source: arXiv 2601.07372 §2 and
its released demo. The convolution's inputs depend on hidden states; they are stored one per token slot beside the KV
cache and always read back through it, so that chunks, prefix hits and forks need no state of their own.
Knows nothing of where rows live or how they are addressed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from server.batch import Batch

SIGNED_SQRT_FLOOR = 1e-6
CONV_NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class EngramShape:
    """What an Engram layer's modules are sized by. `row_width` = C · D, the width of e."""

    hidden_size: int
    row_width: int
    branches: int = 1
    kernel_size: int = 4
    dilation: int = 3
    norm_eps: float = 1e-6


class BranchNorm(nn.Module):
    """RMSNorm over H with a weight per branch: x[T, hc, H], fp32 inside."""

    def __init__(self, shape: EngramShape, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.branches, shape.hidden_size, dtype=dtype))
        self.eps = eps

    def scale(self, x: Tensor) -> Tensor:
        """1 / RMS of x[…, H] in fp32: […, 1]."""
        return torch.rsqrt(x.square().mean(-1, keepdim=True).add_(self.eps))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * self.scale(x) * self.weight.float()


class ConvSlots:
    """The convolution's inputs, one [hc · H] per token slot: [blocks · block_size, hc · H], zero at first."""

    def __init__(self, num_slots: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.inputs = torch.zeros(num_slots, width, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.inputs.nbytes


class Engram(nn.Module):
    """One layer's Engram. `forward` returns what is added to the hidden state, not the sum."""

    def __init__(self, shape: EngramShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        width, hidden, hc = shape.row_width, shape.hidden_size, shape.branches
        self.key_value = nn.Linear(width, (hc + 1) * hidden, dtype=dtype)  # hc keys, then the shared value
        self.key_norm = BranchNorm(shape, shape.norm_eps, dtype)
        self.query_norm = BranchNorm(shape, shape.norm_eps, dtype)
        self.conv_norm = BranchNorm(shape, CONV_NORM_EPS, dtype)
        self.conv = nn.Parameter(torch.zeros(hc * hidden, shape.kernel_size, dtype=dtype))

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
        key, query = key.float(), hidden.float()
        weight = self.key_norm.weight.float() * self.query_norm.weight.float()
        score = (key * weight).mul_(query).sum(-1, keepdim=True) / math.sqrt(size)
        score = score * self.key_norm.scale(key) * self.query_norm.scale(query)  # the norms' scalars, drawn out
        signed_root = torch.sign(score) * score.abs().clamp_min(SIGNED_SQRT_FLOOR).sqrt()
        return torch.sigmoid(signed_root), value

    def forward(self, hidden: Tensor, rows: Tensor, slots: ConvSlots, at: ConvRead) -> Tensor:
        """hidden[T, hc, H] (or [T, H] with one branch), rows[T, C · D] → what to add, in hidden's shape and dtype."""
        branches = hidden.view(hidden.shape[0], self.shape.branches, self.shape.hidden_size)
        alpha, value = self.gate(branches, rows)
        gated = alpha * value.float()
        mixed = self.convolve(self.conv_norm(gated), slots, at).view_as(gated)
        return gated.add_(mixed).to(hidden.dtype).view_as(hidden)

    def convolve(self, inputs: Tensor, slots: ConvSlots, at: ConvRead) -> Tensor:
        """SiLU of the dilated causal depthwise convolution; inputs[T, hc, H] → [T, hc · H] in fp32.

        Writes the inputs to their slots, then reads every tap back from the slots.
        """
        slots.inputs.index_copy_(0, at.slots, inputs.flatten(1).to(slots.inputs.dtype))
        taken = slots.inputs.index_select(0, at.taps.view(-1)).view(*at.taps.shape, -1).float()
        return F.silu((taken * at.inside).mul_(self.conv.float().T[:, None]).sum(0), inplace=True)


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
