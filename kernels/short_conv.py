"""The short convolution over slots of the paged cache, added to the residual stream with the gated value.

    hidden[t] += α[t] · value[t] + SiLU(Σ_j weight[:, j] · slots[slot of position p(t) - (K - 1 - j) · dilation])

Shapes: T tokens, hc branches, H width, K taps, S slots. Inputs of earlier tokens, and of the step's own, are read
back from `slots`, where `memory_gate.py` has put them: a launch of its own, since programs of one launch do not wait
for each other. Positions below zero read as zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.language import blocks, jit_for_any, runs_on, tl

BLOCK = 512


def short_conv(
    hidden: Tensor,
    alpha: Tensor,
    value: Tensor,
    weight: Tensor,
    slots: Tensor,
    block_table: Tensor,
    sequence_of: Tensor,
    positions: Tensor,
    block_size: int,
    dilation: int,
    dead: Tensor | None = None,
) -> None:
    """In place on hidden[T, hc, H]. alpha[T, hc], value[T, H], weight[hc · H, K] fp32, slots[S, hc · H].

    block_table[B, ·] of the step's sequences, sequence_of[T] and positions[T] of its tokens. dead bool[T]: tokens whose
    hidden state is left as it is.
    """
    tokens, branches, width = hidden.shape
    if not runs_on(hidden):
        return reference(
            hidden, alpha, value, weight, slots, block_table, sequence_of, positions, block_size, dilation, dead
        )
    conv_kernel[(tokens, branches, blocks(width, BLOCK))](
        hidden,
        alpha,
        value,
        weight,
        slots,
        block_table,
        sequence_of,
        positions,
        dead if dead is not None else alpha,
        hidden.stride(0),
        value.stride(0),
        block_table.stride(0),
        block_size,
        dilation,
        HC=branches,
        H=width,
        K=weight.shape[1],
        BLOCK=BLOCK,
        DEAD=dead is not None,
    )
    return None


def reference(
    hidden: Tensor,
    alpha: Tensor,
    value: Tensor,
    weight: Tensor,
    slots: Tensor,
    block_table: Tensor,
    sequence_of: Tensor,
    positions: Tensor,
    block_size: int,
    dilation: int,
    dead: Tensor | None = None,
) -> None:
    """The same with torch's operators."""
    taps = weight.shape[1]
    read = positions - torch.arange(taps - 1, -1, -1, device=positions.device)[:, None] * dilation
    known = read.clamp_min(0)
    slot = block_table[sequence_of, known // block_size] * block_size + known % block_size
    taken = slots[slot].float().masked_fill((read < 0)[..., None], 0.0)
    mixed = F.silu((taken * weight.T[:, None]).sum(0)).view_as(hidden)
    added = (alpha[..., None] * value.float()[:, None] + mixed).to(hidden.dtype)
    hidden += added if dead is None else added.masked_fill(dead[:, None, None], -0.0)  # -0 changes no value


@jit_for_any("sequence_of", "positions", "dead")
def conv_kernel(
    hidden,
    alpha,
    value,
    weight,
    slots,
    block_table,
    sequence_of,
    positions,
    dead,
    hidden_stride,
    value_stride,
    table_stride,
    block_size,
    dilation,
    HC: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    DEAD: tl.constexpr,
):
    """A program: BLOCK values of one token and branch."""
    token, branch = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    real = column < H
    if DEAD:
        real = column < tl.where(tl.load(dead + token) != 0, 0, H)
    position = tl.load(positions + token).to(tl.int64)
    pages = block_table + tl.load(sequence_of + token).to(tl.int64) * table_stride
    mixed = tl.zeros([BLOCK], tl.float32)
    for tap in tl.static_range(K):
        read = position - (K - 1 - tap) * dilation
        inside = tl.maximum(read, 0)
        slot = tl.load(pages + inside // block_size).to(tl.int64) * block_size + inside % block_size
        known = column < tl.where(read >= 0, H, 0)
        taken = tl.load(slots + (slot * HC + branch) * H + column, mask=known, other=0.0).to(tl.float32)
        mixed += taken * tl.load(weight + (branch * H + column) * K + tap, mask=real, other=0.0)
    mixed = mixed / (1.0 + tl.exp(-mixed))
    gated = tl.load(alpha + token * HC + branch) * tl.load(
        value + token * value_stride + column, mask=real, other=0.0
    ).to(tl.float32)
    at = hidden + token * hidden_stride + branch * H + column
    before = tl.load(at, mask=real, other=0.0).to(tl.float32)
    added = (gated + mixed).to(hidden.dtype.element_ty).to(tl.float32)
    tl.store(at, (before + added).to(hidden.dtype.element_ty), mask=real)
