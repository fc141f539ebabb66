"""The decoder's forward over fused kernels: what a GPU runs, eagerly and within graphs.

    stream ─ += last block's output, norm ─ qkv ─ rotary ─ attention ─ out ─┐
           ┌────────────────────────────────────────────────────────────────┘
           └ += attention's output, norm ─ gate·up ─ product ─ down ─► added by the next norm
                                           gate ─ product with a memory's rows, where they replace up

The same sums as `Decoder.states` in the same order, over the same parameters; additions wait for the norm that reads
them, and are made before memory reads the stream. `prepack.py` is this for a CPU: a choice made from outside.
Shapes: T tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from torch import Tensor

from kernels.gated_product import gated_product
from kernels.rms_norm import add_rms_norm
from kernels.rotary import rotate_
from kernels.stem_rows import gated_rows
from server.models.decoder import DistinctRows
from server.models.layers import RMSNorm, Rotary

if TYPE_CHECKING:
    from server.models.attention.base import AttentionBackend
    from server.models.decoder import Block, Decoder, MemoryStep


def states(
    model: Decoder, token_ids: Tensor, positions: Tensor, attention: AttentionBackend, memory: MemoryStep | None
) -> Tensor:
    """token_ids[T] at positions[T] → the last hidden states [T, H], normed."""
    stream, delta = model.embedded(token_ids), None
    for layer, block in enumerate(cast("Iterable[Block]", model.blocks)):
        if memory is not None and layer in memory.layers:
            if delta is not None:
                stream, delta = stream.add_(delta), None
            stream = memory.add(layer, stream)
        kind = model.config.features.rotary[layer]
        rotary = model.rotary[kind] if kind != "none" else None
        table = rotary.table if isinstance(rotary, Rotary) else None
        replaced = memory if memory is not None and layer in memory.up_layers else None
        delta = block_delta(block, stream, delta, table, positions, attention, replaced)
    return normed(model.norm, stream, delta)


def block_delta(
    block: Block,
    stream: Tensor,
    delta: Tensor | None,
    table: Tensor | None,
    positions: Tensor,
    attention: AttentionBackend,
    memory: MemoryStep | None,
) -> Tensor:
    """stream[T, H] takes `delta` and attention's output in; returns what the feed-forward block adds to it."""
    qkv = block.qkv(normed(block.attention_norm, stream, delta))
    heads, norm = qkv[:, : block.qk_size].view(-1, *block.qk_heads), block.head_norm
    if table is not None:
        rotate_(heads, table, positions, *((norm.weight, norm.epsilon) if norm is not None else ()))
    elif norm is not None:
        heads.copy_(norm(heads.float()))
    attended = block.out(attention.forward(qkv, block.layer))
    if block.after_attention is not None:
        attended = normed(block.after_attention, attended.float(), None)
    gate_up = block.gate_up(normed(block.mlp_norm, stream, attended))
    if memory is None:
        fed = block.down(gated_product(gate_up, block.activation_name))
    else:
        fed = block.down(replaced_product(block, gate_up, memory))
    return fed if block.after_mlp is None else normed(block.after_mlp, fed.float(), None)


def replaced_product(block: Block, gate_up: Tensor, memory: MemoryStep) -> Tensor:
    """[T, F]: the gate's activation times what memory gives in place of the up-projection."""
    if block.activation_name == "silu" and isinstance(memory, DistinctRows) and not block.has_up:
        distinct = memory.distinct_up(block.layer)
        if distinct is not None:
            return gated_rows(gate_up, *distinct)
    gate, up = gate_up.chunk(2, dim=-1) if block.has_up else (gate_up, None)
    return block.activation(gate).mul_(memory.up(block.layer, up))


def normed(norm: RMSNorm, stream: Tensor, delta: Tensor | None) -> Tensor:
    """The norm of the stream, once it has taken `delta` in."""
    return add_rms_norm(stream, delta, norm.weight, norm.epsilon, norm.dtype)
