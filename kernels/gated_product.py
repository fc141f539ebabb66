"""A feed-forward block's product: activation of the gate times the up-projection, both halves of one matrix's output.

    out[t] = activation(gate_up[t, :F]) · gate_up[t, F:]        silu, or gelu in its tanh form

Shapes: T tokens, F feed-forward width. fp32 inside, rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.language import blocks, jit, runs_on, tl

BLOCK = 1024


def gated_product(gate_up: Tensor, activation: str) -> Tensor:
    """gate_up[T, 2 F], contiguous → [T, F] in its dtype. activation: "silu" or "gelu_pytorch_tanh"."""
    if not runs_on(gate_up):
        return reference(gate_up, activation)
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    product_kernel[(tokens, blocks(width, BLOCK))](gate_up, out, F=width, BLOCK=BLOCK, GELU=activation != "silu")
    return out


def reference(gate_up: Tensor, activation: str) -> Tensor:
    """The same with torch's operators."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return (active * up).to(gate_up.dtype)


@jit
def product_kernel(gate_up, out, F: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    """A program: BLOCK values of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < F
    g = tl.load(gate_up + token * (2 * F) + column, mask=real, other=0.0).to(tl.float32)
    u = tl.load(gate_up + token * (2 * F) + F + column, mask=real, other=0.0).to(tl.float32)
    # x/2 · (1 + tanh z) = x · sigmoid(2 z), z = sqrt(2 / π) · (x + 0.044715 x³)
    inner = 1.5957691216057308 * (g + 0.044715 * g * g * g) if GELU else g
    product = g / (1.0 + tl.exp(-inner)) * u
    tl.store(out + token * F + column, product.to(out.dtype.element_ty), mask=real)
