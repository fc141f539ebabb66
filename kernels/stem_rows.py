"""STEM's product: SiLU of the gate times the row of the token, through the inverse index of the distinct rows.

    out[t] = silu(gate[t]) · rows[inverse[t]]

Shapes: T tokens, U distinct rows, F feed-forward width. Source: arXiv 2601.10639. Rows are never repeated in memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.language import blocks, jit_for_any, runs_on, tl

BLOCK = 1024


def gated_rows(gate: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """gate[T, F], rows[U, F], inverse[T] → [T, F] in gate's dtype; fp32 inside."""
    if not runs_on(gate):
        return reference(gate, rows, inverse)
    tokens, width = gate.shape
    out = torch.empty(tokens, width, dtype=gate.dtype, device=gate.device)
    stem_kernel[(tokens, blocks(width, BLOCK))](
        gate, rows, inverse, out, gate.stride(0), rows.stride(0), F=width, BLOCK=BLOCK
    )
    return out


def reference(gate: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """The same with torch's operators."""
    return (F.silu(gate.float()) * rows[inverse].float()).to(gate.dtype)


@jit_for_any("inverse")
def stem_kernel(gate, rows, inverse, out, gate_stride, rows_stride, F: tl.constexpr, BLOCK: tl.constexpr):
    """A program: BLOCK values of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < F
    row = tl.load(inverse + token).to(tl.int64)
    g = tl.load(gate + token * gate_stride + column, mask=real, other=0.0).to(tl.float32)
    u = tl.load(rows + row * rows_stride + column, mask=real, other=0.0).to(tl.float32)
    product = g / (1.0 + tl.exp(-g)) * u
    tl.store(out + token * F + column, product.to(out.dtype.element_ty), mask=real)
