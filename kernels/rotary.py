"""Rotary embedding in place: neighbouring pairs (2i, 2i + 1) of every head, turned by the angle of the position.

With a gain, every head is normed before it is turned: x / sqrt(mean(x²) + eps) · gain.

Shapes: T tokens, N heads (queries and keys together), D values a head. Source: arXiv 2104.09864; pairs are neighbours,
as `server/models/layers.py` lays queries and keys out.
"""

import torch
from torch import Tensor

from kernels.language import jit_for_any, power_of_two, runs_on, tl


def rotate_(heads: Tensor, table: Tensor, positions: Tensor, gain: Tensor | None = None, eps: float = 0.0) -> None:
    """heads[T, N, D], rows may be strided; table complex64 [P, D / 2]; positions[T]; gain fp32 [N, D]. fp32 inside."""
    tokens, count, width = heads.shape
    if not runs_on(heads):
        reference(heads, table, positions, gain, eps)
        return
    angles = torch.view_as_real(table)
    rotary_kernel[(tokens,)](
        heads,
        angles,
        positions,
        gain if gain is not None else angles,
        heads.stride(0),
        eps,
        N=count,
        HALF=width // 2,
        BLOCK_N=power_of_two(count),
        BLOCK=power_of_two(width // 2),
        NORM=gain is not None,
    )


def reference(heads: Tensor, table: Tensor, positions: Tensor, gain: Tensor | None = None, eps: float = 0.0) -> None:
    """The same with torch's operators."""
    wide = heads.float()
    if gain is not None:
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * gain
    pairs = torch.view_as_complex(wide.contiguous().view(*heads.shape[:-1], -1, 2))
    heads.copy_(torch.view_as_real(pairs * table[positions][:, None]).flatten(-2))


@jit_for_any("positions")
def rotary_kernel(
    heads, table, positions, gain, stride, eps,
    N: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """A program: all heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK)
    half = pair < HALF
    real = (head < N)[:, None] & half[None, :]
    angle = table + tl.load(positions + token).to(tl.int64) * (2 * HALF) + 2 * pair
    cos = tl.load(angle, mask=half, other=0.0)[None, :]
    sin = tl.load(angle + 1, mask=half, other=0.0)[None, :]
    within = head[:, None] * (2 * HALF) + 2 * pair[None, :]
    at = heads + token * stride + within
    x = tl.load(at, mask=real, other=0.0).to(tl.float32)
    y = tl.load(at + 1, mask=real, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x + y * y, 1) / (2 * HALF) + eps)[:, None]
        x = x * scale * tl.load(gain + within, mask=real, other=0.0)
        y = y * scale * tl.load(gain + within + 1, mask=real, other=0.0)
    tl.store(at, (x * cos - y * sin).to(heads.dtype.element_ty), mask=real)
    tl.store(at + 1, (x * sin + y * cos).to(heads.dtype.element_ty), mask=real)
