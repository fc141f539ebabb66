"""The dense decoder: embed, blocks, norm, head, over a flat batch of tokens.

    hidden[T, H]  ── memory? ──► norm ─ qkv ─ rotary ─ attention ─ out ─(+)─ norm ─ gate·up ─ down ─(+)──► next block
                                        └ norm of heads?           └ norm?              activation └ norm?

Query, key and value are one matrix, and so are gate and up. What is marked with ? only some families have
(`families.Features`). The residual stream is fp32 in every dtype:
with a stream in bf16 each of 60 additions rounds, and SmolLM2's logits stray twice as far from fp32
(docs/experiments.md). It knows nothing of sequences or sampling; attention and
memory are handed in per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from server.batch import Batch
from server.models.attention.base import AttentionBackend
from server.models.config import ModelConfig
from server.models.layers import Linear, RMSNorm, Rotary, interleave

if TYPE_CHECKING:
    from server.models.c_kernels import Plain

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
INTERLEAVED = (".q_proj.", ".k_proj.", ".q_norm.", ".k_norm.")  # of what is rotated in pairs


class MemoryStep(Protocol):
    """One step's memory: the rows on their way, and the layers that will read them."""

    @property
    def layers(self) -> frozenset[int]:
        """The layers to which something is added."""

    @property
    def up_layers(self) -> frozenset[int]:
        """The layers whose up-projection is replaced."""

    def add(self, layer: int, hidden: Tensor) -> Tensor:
        """hidden[T, H] with what the memories of this layer add to it, before the layer's attention."""

    def up(self, layer: int, dense: Tensor | None) -> Tensor:
        """[T, F] in place of the layer's up-projection; `dense` is what that gives, where the layer has one."""


@runtime_checkable
class DistinctRows(Protocol):
    """A step's memory that can name the rows themselves, for kernels that need not have them repeated."""

    def distinct_up(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """rows[U, F] and inverse[T], int64: the row in place of each token's up-projection; None if it is not a row of
        a table for every token."""


class States(Protocol):
    """`Decoder.states` computed another way."""

    def __call__(
        self,
        model: Decoder,
        token_ids: Tensor,
        positions: Tensor,
        attention: AttentionBackend,
        memory: MemoryStep | None,
        /,
    ) -> Tensor:
        """token_ids[T] at positions[T] → the last hidden states [T, H], normed."""


class Block(nn.Module):
    """One layer. With `has_up` False its feed-forward block has a gate only, and memory gives the other factor."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, *, has_up: bool = True) -> None:
        super().__init__()
        self.layer, self.has_up = layer, has_up
        features, eps = config.features, config.rms_norm_eps
        heads = (config.num_heads + config.num_kv_heads, config.head_dim)
        self.qk_heads, self.qk_size = heads, heads[0] * heads[1]
        hidden, q_size = config.hidden_size, config.num_heads * config.head_dim
        qkv_size = self.qk_size + config.num_kv_heads * config.head_dim
        self.attention_norm = RMSNorm(hidden, eps, dtype)
        self.qkv = Linear(hidden, qkv_size, bias=features.attention_bias, dtype=dtype)
        self.head_norm = RMSNorm(heads, eps, torch.float32) if features.qk_norm else None
        self.out = Linear(q_size, hidden, bias=features.output_bias, dtype=dtype)
        self.mlp_norm = RMSNorm(hidden, eps, dtype)
        inner = config.intermediate_size
        self.gate_up = Linear(hidden, (1 + has_up) * inner, bias=features.mlp_bias, dtype=dtype)
        self.activation_name = features.activation
        self.activation = ACTIVATIONS[features.activation]
        self.gated: Callable[[Tensor, Tensor], Tensor] = partial(gated, self.activation)
        self.rotate_: Callable[[Tensor, Tensor], None] = Rotary.rotate_
        self.down = Linear(inner, hidden, bias=features.mlp_bias, dtype=dtype)
        self.plain: Plain | None = None  # how C kernels compute the block, where it has no further norms
        self.after_attention = RMSNorm(hidden, eps, torch.float32) if features.norms_after else None
        self.after_mlp = RMSNorm(hidden, eps, torch.float32) if features.norms_after else None

        self.parts: dict[str, tuple[nn.Module, slice]] = {
            "input_layernorm": (self.attention_norm, slice(None)),
            "self_attn.q_proj": (self.qkv, slice(0, q_size)),
            "self_attn.k_proj": (self.qkv, slice(q_size, self.qk_size)),
            "self_attn.v_proj": (self.qkv, slice(self.qk_size, qkv_size)),
            "self_attn.o_proj": (self.out, slice(None)),
            "post_attention_layernorm": (self.mlp_norm, slice(None)),
            "mlp.gate_proj": (self.gate_up, slice(0, inner)),
            "mlp.down_proj": (self.down, slice(None)),
        }
        if self.head_norm is not None:
            self.parts["self_attn.q_norm"] = (self.head_norm, slice(0, config.num_heads))
            self.parts["self_attn.k_norm"] = (self.head_norm, slice(config.num_heads, None))
        if self.after_attention is not None and self.after_mlp is not None:
            self.parts["post_attention_layernorm"] = (self.after_attention, slice(None))
            self.parts["pre_feedforward_layernorm"] = (self.mlp_norm, slice(None))
            self.parts["post_feedforward_layernorm"] = (self.after_mlp, slice(None))
        if has_up:
            self.parts["mlp.up_proj"] = (self.gate_up, slice(inner, 2 * inner))

    def slot(self, path: str) -> Tensor:
        """The rows of a fused parameter that the Hugging Face tensor `path` ("self_attn.q_proj.weight") fills."""
        name, kind = path.rsplit(".", 1)
        module, rows = self.parts[name]
        parameter: Tensor = getattr(module, kind)
        return parameter[rows]

    def forward(
        self, hidden: Tensor, rotation: Tensor | None, attention: AttentionBackend, memory: MemoryStep | None = None
    ) -> Tensor:
        """hidden[T, H] → [T, H]. `rotation`: its layer's; `memory`: what replaces its up-projection, if anything."""
        qkv = self.qkv(self.attention_norm(hidden))
        heads = qkv[:, : self.qk_size].view(-1, *self.qk_heads)
        if self.head_norm is not None:
            heads.copy_(self.head_norm(heads.float()))
        if rotation is not None:
            self.rotate_(heads, rotation)
        attended = self.out(attention.forward(qkv, self.layer))
        if self.after_attention is not None:
            attended = self.after_attention(attended.float())
        hidden, normed = self.mlp_norm.after(hidden, attended)
        gate: Tensor = self.gate_up(normed)
        up: Tensor | None = None
        if self.has_up:
            gate, up = gate.chunk(2, dim=-1)
        if memory is not None:
            up = memory.up(self.layer, up)
        assert up is not None, f"layer {self.layer} has no up-projection and no memory gives one"
        fed = self.down(self.gated(gate, up))
        if self.after_mlp is not None:
            fed = self.after_mlp(fed.float())
        return hidden.add_(fed)


def gated(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """activation(gate) · up, [T, F] each."""
    return activation(gate).mul_(up)


class Decoder(nn.Module):
    """`without_up`: the layers whose up-projection memory replaces, and which have none. `fused`: how fused kernels
    compute the states, a choice made from outside.
    """

    fused: States | None = None

    def __init__(
        self, config: ModelConfig, max_len: int, dtype: torch.dtype, without_up: frozenset[int] = frozenset()
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.without_up = config, dtype, without_up
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(config, i, dtype, has_up=i not in without_up) for i in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        if config.tie_word_embeddings:
            self.head.weight = self.embed
        used = dict.fromkeys(kind for kind in config.features.rotary if kind != "none")
        self.rotary = nn.ModuleDict({kind: Rotary(config, max_len, kind) for kind in used})
        # transformers rounds the factor to the model's dtype, and so were the models trained
        self.embed_scale = float(torch.tensor(config.features.embed_scale, dtype=dtype, device="cpu"))

    def forward(self, batch: Batch, attention: AttentionBackend, memory: MemoryStep | None = None) -> Tensor:
        """The last hidden states [T, H], normed, of all tokens of the batch."""
        attention.plan(batch)
        return self.states(batch.token_ids, batch.positions, attention, memory)

    def states(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend, memory: MemoryStep | None = None
    ) -> Tensor:
        """The same for token_ids[T] at positions[T], once `attention` has its plan."""
        if self.fused is not None:
            return self.fused(self, token_ids, positions, attention, memory)
        hidden, rotations = self.embedded(token_ids), self.rotations(positions)
        for layer, block in enumerate(self.blocks):
            if memory is not None and layer in memory.layers:
                hidden = memory.add(layer, hidden)
            replaced = memory if memory is not None and layer in memory.up_layers else None
            hidden = block(hidden, rotations[layer], attention, replaced)
        normed: Tensor = self.norm(hidden)
        return normed

    def embedded(self, token_ids: Tensor) -> Tensor:
        """token_ids[T] → the hidden state before layer 0, [T, H] fp32."""
        hidden = F.embedding(token_ids, self.embed).float()
        return hidden if self.embed_scale == 1.0 else hidden.mul_(self.embed_scale)

    def rotations(self, positions: Tensor) -> list[Tensor | None]:
        """For every layer the rotation of positions[T]; None where a layer turns nothing."""
        turned = {kind: rotary.at(positions) for kind, rotary in self.rotary.items() if isinstance(rotary, Rotary)}
        return [turned.get(kind) for kind in self.config.features.rotary]

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[N, H] → [N, V] in fp32, in `out` if that is given."""
        scores: Tensor = self.head(hidden)
        return scores.float() if out is None else out.copy_(scores)

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies Hugging Face-named tensors into the fused parameters, one at a time.

        The tensors' names and shapes are already checked (`weights.tensors`).
        """
        for name, tensor in tensors:
            if any(part in name for part in INTERLEAVED):
                tensor = interleave(tensor, self.config.head_dim)
            slot = self.slot(name)
            if slot is not None:
                slot.copy_(tensor)
                if name.endswith("norm.weight"):
                    slot.add_(self.config.features.norm_offset)

    def slot(self, name: str) -> Tensor | None:
        """Where a tensor goes; None for an up-projection that this model does without."""
        if name == "model.embed_tokens.weight":
            return self.embed
        if name == "model.norm.weight":
            return self.norm.weight
        if name == "lm_head.weight":
            return self.head.weight
        _, _, layer, path = name.split(".", 3)
        block = self.blocks[int(layer)]
        assert isinstance(block, Block)
        if path.startswith("mlp.up_proj.") and not block.has_up:
            return None
        return block.slot(path)
