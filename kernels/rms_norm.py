"""Residual addition and RMS norm in one pass over the fp32 stream.

    stream += delta;  out = stream · rsqrt(mean(stream²) + eps) · weight        rounded once, to out's dtype

Shapes: T tokens, H hidden width.
"""

import torch
from torch import Tensor

from kernels.language import jit, power_of_two, runs_on, tl


def add_rms_norm(stream: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """stream fp32 [T, H], changed in place if there is a delta[T, H]; weight[H] fp32 → [T, H] in `dtype`."""
    if not runs_on(stream):
        return reference(stream, delta, weight, eps, dtype)
    tokens, width = stream.shape
    out = torch.empty(tokens, width, dtype=dtype, device=stream.device)
    norm_kernel[(tokens,)](
        stream,
        delta if delta is not None else stream,
        weight,
        out,
        eps,
        H=width,
        BLOCK=power_of_two(width),
        ADD=delta is not None,
        num_warps=4 if width <= 4096 else 8,
    )
    return out


def reference(stream: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The same with torch's operators."""
    if delta is not None:
        stream += delta
    return (stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + eps) * weight).to(dtype)


@jit
def norm_kernel(stream, delta, weight, out, eps, H: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """A program: one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < H
    x = tl.load(stream + token * H + column, mask=real, other=0.0)
    if ADD:
        x += tl.load(delta + token * H + column, mask=real, other=0.0).to(tl.float32)
        tl.store(stream + token * H + column, x, mask=real)
    scale = tl.rsqrt(tl.sum(x * x) / H + eps)
    normed = x * scale * tl.load(weight + column, mask=real, other=0.0)
    tl.store(out + token * H + column, normed.to(out.dtype.element_ty), mask=real)
