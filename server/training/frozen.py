"""The frozen backbone as training runs it: gradients go through activations, never into weights.

    hidden[T, H] before layer `first` ── memory? ──► blocks first … last ──► normed[T, H] ──► logits

The arithmetic is the decoder's (`server/models/decoder.py`), without its in-place steps and its packed weights, which
have no backward. The residual stream is fp32, the matrices run in the model's dtype. Sequences lie as in `layout.py`.
Knows nothing of rows, losses or optimisers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from server.models.decoder import Block, Decoder, MemoryStep
from server.models.layers import RMSNorm
from server.models.source import ModelSource
from server.models.weights import tensors
from server.training.layout import Layout


class Frozen:
    """A backbone and the parts of its forward pass that training needs."""

    def __init__(self, source: ModelSource, dtype: torch.dtype, device: torch.device, max_len: int) -> None:
        weights = tensors(source, dtype)
        with torch.device(device):
            self.decoder = Decoder(source.config, max_len, dtype)
        with torch.no_grad():
            self.decoder.load(weights)
        self.decoder.eval().requires_grad_(False)
        self.config, self.dtype, self.device, self.max_len = source.config, dtype, device, max_len
        self.blocks = [cast(Block, block) for block in self.decoder.blocks]

    def embed(self, layout: Layout) -> Tensor:
        """[T, H] fp32, the hidden state before layer 0."""
        return self.decoder.embedded(layout.token_ids)

    def states(self, layout: Layout, *, between: bool, until: int) -> Iterator[Tensor]:
        """The bare backbone's hidden states [T, H] fp32 before layers 0 … until.

        `between`: those within layers 0 … until - 1 instead, between attention and feed-forward block, then the last.
        """
        hidden = self.embed(layout)
        rotations = self.decoder.rotations(layout.positions)
        for layer in range(until):
            attended = self.attended(layer, hidden, rotations[layer], layout)
            yield attended if between else hidden
            hidden = self.fed(layer, attended)
        yield hidden

    def final(self, hidden: Tensor) -> Tensor:
        """The hidden state after the last layer → normed [T, H]."""
        return norm(self.decoder.norm, hidden)

    def run(self, hidden: Tensor, layout: Layout, first: int = 0, memory: MemoryStep | None = None) -> Tensor:
        """From the hidden state before layer `first`, the last hidden states [T, H], normed. The rest is memory's."""
        rotations = self.decoder.rotations(layout.positions)
        for layer in range(first, len(self.blocks)):
            if memory is not None and layer in memory.layers:
                hidden = memory.add(layer, hidden)
            replaced = memory if memory is not None and layer in memory.up_layers else None
            hidden = self.block(layer, hidden, rotations[layer], layout, replaced)
        return self.final(hidden)

    def block(
        self, layer: int, hidden: Tensor, rotation: Tensor | None, layout: Layout, memory: MemoryStep | None = None
    ) -> Tensor:
        return self.fed(layer, self.attended(layer, hidden, rotation, layout), memory)

    def attended(self, layer: int, hidden: Tensor, rotation: Tensor | None, layout: Layout) -> Tensor:
        block = self.blocks[layer]
        qkv = block.qkv(norm(block.attention_norm, hidden))
        out: Tensor = block.out(self.attend(block, qkv, rotation, layout))
        return hidden + (out if block.after_attention is None else norm(block.after_attention, out.float()))

    def fed(self, layer: int, hidden: Tensor, memory: MemoryStep | None = None) -> Tensor:
        block = self.blocks[layer]
        gate, up = self.feed_in(layer, norm(block.mlp_norm, hidden), memory)
        fed: Tensor = block.down(block.activation(gate) * up)
        return hidden + (fed if block.after_mlp is None else norm(block.after_mlp, fed.float()))

    def feed_in(self, layer: int, x: Tensor, memory: MemoryStep | None) -> tuple[Tensor, Tensor]:
        """The feed-forward block's two factors [T, F] of its normed input x[T, H]."""
        block, inner = self.blocks[layer], self.config.intermediate_size
        if memory is None:
            gate, up = block.gate_up(x).chunk(2, dim=-1)
            return gate, up
        bias = block.gate_up.bias
        gate = F.linear(x, block.gate_up.weight[:inner], None if bias is None else bias[:inner])
        return gate, memory.up(layer, None)

    def attend(self, block: Block, qkv: Tensor, rotation: Tensor | None, layout: Layout) -> Tensor:
        """Causal attention within each sequence: qkv[T, …] → [T, heads · head_dim]."""
        config = self.config
        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
        turned = qkv[:, : block.qk_size].view(-1, heads + kv_heads, size)
        if block.head_norm is not None:
            turned = norm(block.head_norm, turned.float()).to(qkv.dtype)
        if rotation is not None:
            pairs = torch.view_as_complex(turned.float().view(-1, heads + kv_heads, size // 2, 2)) * rotation
            turned = torch.view_as_real(pairs).view(-1, heads + kv_heads, size).to(qkv.dtype)
        value = qkv[:, block.qk_size :].view(-1, kv_heads, size)
        padded = layout.pad(torch.cat([turned, value], dim=1)).transpose(1, 2)
        query, key, value = torch.split(padded, [heads, kv_heads, kv_heads], dim=1)
        if heads != kv_heads:
            key, value = (side.repeat_interleave(heads // kv_heads, dim=1) for side in (key, value))
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.config.features.query_scale or None
        )
        return layout.flatten(out.transpose(1, 2)).reshape(-1, heads * size)

    def logits(self, normed: Tensor) -> Tensor:
        """[N, H] → [N, V] in fp32."""
        return F.linear(normed, self.decoder.head.weight).float()


class FrozenNorm(torch.autograd.Function):
    """RMS norm with a constant weight: forward as `RMSNorm`'s, backward in five kernels instead of ten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: Tensor, dtype: torch.dtype) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        inner = grads[0].float() * weight
        along = torch.linalg.vecdot(inner, x).unsqueeze(-1).mul_(scale.pow(3) / x.shape[-1])
        return inner.mul_(scale).addcmul_(x, along, value=-1), None, None, None


def norm(module: RMSNorm, x: Tensor) -> Tensor:
    y: Tensor = FrozenNorm.apply(x, module.weight, module.eps, module.dtype)  # type: ignore[no-untyped-call]
    return y
