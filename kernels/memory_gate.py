"""The gate of an Engram layer, and what it leaves for the short convolution, in one pass.

    s = <key · key gain, query · query gain> / (rms key · rms query · sqrt H)
    α = sigmoid(±sqrt(max(|s|, 1e-6)))
    without a convolution   hidden += α · value
    with one                slots[slot] = RMSNorm(α · value) · conv gain         (`short_conv.py` adds the rest)

Shapes: T tokens, hc residual branches, H hidden width. fp32 inside, whatever the inputs are. Source: arXiv 2601.07372
§2; the three released forms differ in what a score of exactly zero gives and in the gains. Knows nothing of rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.language import jit_for_any, power_of_two, runs_on, tl

FLOOR = 1e-6  # of |s| under the root


@dataclass(frozen=True, slots=True)
class GateWeights:
    """gain[hc, H] fp32: the key norm's gain times the query norm's. conv_gain[hc, H] fp32: None without a convolution.

    `zero_is_plus`: a score of exactly 0 gives sigmoid(+1e-3), DeepSeek-V4.1's way, not 1/2.
    """

    gain: Tensor
    key_eps: float
    query_eps: float
    conv_gain: Tensor | None = None
    conv_eps: float = 1e-5
    zero_is_plus: bool = False


def gate(
    hidden: Tensor,
    key: Tensor,
    value: Tensor,
    weights: GateWeights,
    slots: Tensor | None = None,
    at: Tensor | None = None,
    dead: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """α[T, hc] in fp32. hidden, key [T, hc, H]; value[T, H], rows may be strided, the last dimension is not.

    Without `slots`, adds α · value in place to total[T, hc, H], which is hidden where it is None. With slots[S, hc · H]
    and at[T], writes the convolution's inputs there and leaves both. dead bool[T]: tokens whose α is 0, for whom
    nothing is written.
    """
    tokens, branches, width = hidden.shape
    if not runs_on(hidden):
        return reference(hidden, key, value, weights, slots, at, dead, total)
    alpha = torch.empty(tokens, branches, dtype=torch.float32, device=hidden.device)
    gate_kernel[(tokens, branches)](
        hidden,
        key,
        value,
        weights.gain,
        weights.conv_gain if weights.conv_gain is not None else weights.gain,
        slots if slots is not None else total if total is not None else hidden,
        at if at is not None else alpha,
        dead if dead is not None else alpha,
        alpha,
        hidden.stride(0),
        key.stride(0),
        value.stride(0),
        (total if total is not None else hidden).stride(0),
        weights.key_eps,
        weights.query_eps,
        weights.conv_eps,
        HC=branches,
        H=width,
        BLOCK=power_of_two(width),
        CONV=slots is not None,
        DEAD=dead is not None,
        ZERO_IS_PLUS=weights.zero_is_plus,
        num_warps=4 if width <= 2048 else 8,
    )
    return alpha


def reference(
    hidden: Tensor,
    key: Tensor,
    value: Tensor,
    weights: GateWeights,
    slots: Tensor | None = None,
    at: Tensor | None = None,
    dead: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """The same with torch's operators."""
    query, keys = hidden.float(), key.float()
    width = hidden.shape[-1]
    score = (keys * weights.gain * query).sum(-1) / width**0.5
    score = score * torch.rsqrt(keys.pow(2).mean(-1) + weights.key_eps)
    score = score * torch.rsqrt(query.pow(2).mean(-1) + weights.query_eps)
    root = score.abs().clamp_min(FLOOR).sqrt()
    signed = torch.where(score < 0, -root, root) if weights.zero_is_plus else torch.sign(score) * root
    alpha = torch.sigmoid(signed)
    if dead is not None:
        alpha = alpha.masked_fill(dead[:, None], 0.0)
    gated = alpha[..., None] * value.float()[:, None]
    if slots is None:
        into, added = (hidden if total is None else total), gated.to(hidden.dtype)
        into += added if dead is None else added.masked_fill(dead[:, None, None], -0.0)  # -0 changes no value
    else:
        assert at is not None and weights.conv_gain is not None
        normed = gated * torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + weights.conv_eps) * weights.conv_gain
        new = normed.flatten(1).to(slots.dtype)
        slots.index_copy_(0, at, new if dead is None else torch.where(dead[:, None], slots[at], new))
    return alpha


@jit_for_any("at", "dead")
def gate_kernel(
    hidden,
    key,
    value,
    gain,
    conv_gain,
    out,
    at,
    dead,
    alpha,
    hidden_stride,
    key_stride,
    value_stride,
    out_stride,
    key_eps,
    query_eps,
    conv_eps,
    HC: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    CONV: tl.constexpr,
    DEAD: tl.constexpr,
    ZERO_IS_PLUS: tl.constexpr,
):
    """A program: one token, one branch."""
    token, branch = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    real = column < H
    q = tl.load(hidden + token * hidden_stride + branch * H + column, mask=real, other=0.0).to(tl.float32)
    k = tl.load(key + token * key_stride + branch * H + column, mask=real, other=0.0).to(tl.float32)
    g = tl.load(gain + branch * H + column, mask=real, other=0.0)
    score = tl.sum(k * g * q) / tl.sqrt(H * 1.0)
    score *= tl.rsqrt(tl.sum(k * k) / H + key_eps) * tl.rsqrt(tl.sum(q * q) / H + query_eps)
    root = tl.sqrt(tl.maximum(tl.abs(score), 1e-6))
    if ZERO_IS_PLUS:
        signed = tl.where(score < 0, -root, root)
    else:
        signed = tl.where(score > 0, root, tl.where(score < 0, -root, 0.0))
    a = 1.0 / (1.0 + tl.exp(-signed))
    written = real
    if DEAD:
        a = tl.where(tl.load(dead + token) != 0, 0.0, a)
        written = column < tl.where(tl.load(dead + token) != 0, 0, H)
    tl.store(alpha + token * HC + branch, a)
    gated = a * tl.load(value + token * value_stride + column, mask=real, other=0.0).to(tl.float32)
    if CONV:
        c = tl.load(conv_gain + branch * H + column, mask=real, other=0.0)
        normed = gated * tl.rsqrt(tl.sum(gated * gated) / H + conv_eps) * c
        slot = tl.load(at + token).to(tl.int64)
        tl.store(out + (slot * HC + branch) * H + column, normed.to(out.dtype.element_ty), mask=written)
    else:
        at_out = out + token * out_stride + branch * H + column
        before = tl.load(at_out, mask=written, other=0.0).to(tl.float32)
        added = gated.to(hidden.dtype.element_ty).to(tl.float32)
        tl.store(at_out, (before + added).to(out.dtype.element_ty), mask=written)
