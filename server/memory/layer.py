"""The seam of Engram-kind memory layers: rows in, what is added to the residual stream out.

    hidden[T, hc, H], rows[T, C · D] ─→ gate ─→ v = α · value ─→ v + SiLU(conv(norm(v))) ─→ added[T, hc, H]

The convolution is left out where a form has none.

Shapes: T tokens, hc residual branches (1 on a plain stream), H hidden width, C rows a token, D values a row. The forms
that were released differ in projections, norms, zero of the gate and convolution: `engram.py`, `deepseek.py`,
`qwen_ple.py`. Knows nothing of where rows live or how they are addressed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from server.memory.short_conv import ConvRead, ConvSlots, short_conv

SIGNED_SQRT_FLOOR = 1e-6


@dataclass(frozen=True, slots=True)
class EngramShape:
    """What an Engram layer's modules are sized by. `row_width` = C · D, the width of a token's rows side by side."""

    hidden_size: int
    row_width: int
    branches: int = 1
    kernel_size: int = 4
    dilation: int = 3
    norm_eps: float = 1e-6


class MemoryLayer(nn.Module, ABC):
    """One layer's consumer of fetched rows. `forward` returns what is added to the hidden state, not the sum."""

    has_conv: ClassVar[bool]  # whether each token leaves a convolution input behind, which later tokens read
    fused: Callable[[Tensor | None, Tensor, Tensor, ConvSlots, ConvRead], Tensor] | None = None  # c_engram.CEngram

    def __init__(self, shape: EngramShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype

    @property
    def conv_width(self) -> int:
        """Values of convolution input per token slot; 0 without a convolution."""
        return self.shape.branches * self.shape.hidden_size if self.has_conv else 0

    @property
    def conv_bytes_per_token(self) -> int:
        return self.conv_width * self.dtype.itemsize

    def forward(
        self,
        hidden: Tensor,
        rows: Tensor,
        slots: ConvSlots | None,
        at: ConvRead | None,
        dead: Tensor | None = None,
    ) -> Tensor:
        """hidden[T, hc, H] (or [T, H] with one branch), rows[T, C · D] → what to add, in hidden's shape and dtype.

        `slots`, `at`: where the convolution's inputs are stored and read; None for layers without one. `dead` bool[T]:
        tokens that take part in no n-gram; None: there are none.
        """
        if self.fused is not None and slots is not None and at is not None:
            return self.fused(None, hidden, rows, slots, at)
        gated = self.gated(self.branches_of(hidden), rows, dead)
        if self.has_conv:
            assert slots is not None and at is not None
            gated = gated + short_conv(self.conv_input(gated), self.taps(), slots, at).view_as(gated)
        return self.joined(gated).to(hidden.dtype).view_as(hidden)

    def add_to(
        self,
        total: Tensor,
        hidden: Tensor,
        rows: Tensor,
        slots: ConvSlots | None,
        at: ConvRead | None,
        dead: Tensor | None = None,
    ) -> Tensor:
        """total[T, H] and what `forward` gives, for whose hooks it is called by itself."""
        if self.fused is not None and slots is not None and at is not None and not self._forward_hooks:
            return self.fused(total, hidden, rows, slots, at)
        added: Tensor = self(hidden, rows, slots, at, dead)
        return total + added

    @abstractmethod
    def gated(self, hidden: Tensor, rows: Tensor, dead: Tensor | None) -> Tensor:
        """hidden[T, hc, H], rows[T, C · D] → α · value [T, hc, H] in fp32."""

    def conv_input(self, gated: Tensor) -> Tensor:
        """What the convolution reads of the gated values: [T, hc, H] → the same."""
        raise NotImplementedError(f"{type(self).__name__} has no convolution")

    def taps(self) -> Tensor:
        """The convolution's weight [hc · H, K]."""
        raise NotImplementedError(f"{type(self).__name__} has no convolution")

    @abstractmethod
    def gates(self, hidden: Tensor, rows: Tensor, dead: Tensor | None = None) -> Tensor:
        """[T] in fp32: how much of their value `forward` lets these tokens in, the mean over branches; for traces."""

    def branches_of(self, hidden: Tensor) -> Tensor:
        """[T, hc, H]: what each branch reads of the residual stream."""
        return hidden.view(hidden.shape[0], self.shape.branches, self.shape.hidden_size)

    def joined(self, added: Tensor) -> Tensor:
        """What the branches write, [T, hc, H], as the residual stream has it."""
        return added


class BranchNorm(nn.Module):
    """RMSNorm over H with a weight per branch: x[T, hc, H] of any float type → fp32."""

    def __init__(self, shape: EngramShape, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.branches, shape.hidden_size, dtype=dtype))
        self.register_buffer("eps", torch.tensor(eps), persistent=False)
        self.eps: Tensor

    def gain(self) -> Tensor:
        """[hc, H] in fp32."""
        return self.weight.float()

    def scale(self, x: Tensor) -> Tensor:
        """1 / RMS of x[…, H] in fp32: […, 1]."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.addcmul(self.eps, norm, norm, value=1 / x.shape[-1]).rsqrt()

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * self.scale(x) * self.gain()
