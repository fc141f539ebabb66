"""The C kernels between a decoder's matrices: applied to a model from outside, on a CPU with a compiler.

    stream ─ +=, norm ─ qkv ─ rotate ─ attention.CpuBackend ─ out ─ +=, norm ─ gate·up ─ product ─ down ─► next norm

What a step takes beyond its matrix multiplications is mostly the entering of small operators, 45 a layer; these are
five calls instead (docs/experiments.md). The residual stream is changed in place. `Plain` is a block of the families
without further norms; the others, and blocks whose up-projection is a memory, run their own `forward` over the same
kernels. Without a compiler everything stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import cast

import torch
from torch import Tensor

from kernels.cpu.build import NoKernels, library
from kernels.cpu.ops import KINDS, SUFFIXES, CpuKernels
from server.errors import SettingsError
from server.models.attention.base import AttentionBackend
from server.models.attention.cpu import CpuBackend
from server.models.attention.kv_cache import KVCache
from server.models.attention.sdpa import SdpaBackend
from server.models.config import ModelConfig
from server.models.decoder import Block, Decoder, MemoryStep
from server.models.layers import RMSNorm


class FusedNorm(RMSNorm):
    """An `RMSNorm` in one pass, the addition before it included."""

    def __init__(self, norm: RMSNorm, kernels: CpuKernels) -> None:
        super().__init__(norm.weight.shape[-1], norm.epsilon, norm.dtype)
        self.weight, self.kernels = norm.weight, kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.norm(x, self.weight, self.epsilon)

    def after(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        if delta.dtype != self.dtype:
            return super().after(x, delta)
        return x, self.kernels.norm(x, self.weight, self.epsilon, delta)


def kernels_for(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> CpuKernels:
    """Raises NoKernels where a model of this shape and type cannot have them, or the machine has no compiler."""
    if device.type != "cpu":
        raise NoKernels(f"they are for CPUs and the model runs on {device}")
    if dtype not in SUFFIXES:
        raise NoKernels(f"they know float32 and bfloat16 and the model is {str(dtype).removeprefix('torch.')}")
    kernels = CpuKernels(library(), dtype)
    if not kernels.serves(config.head_dim, config.hidden_size, config.intermediate_size):
        raise NoKernels(
            f"the model's rows of {config.hidden_size} and {config.intermediate_size} and heads of {config.head_dim} "
            f"values do not divide into this processor's vectors"
        )
    return kernels


def choose_kernels(
    setting: str, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[CpuKernels | None, str]:
    """The kernels that --cpu-kernels gives here, and a clause for people. Raises SettingsError if "on" cannot be."""
    if setting == "off":
        return None, "torch's operators between matrices (--cpu-kernels off)"
    try:
        kernels = kernels_for(config, dtype, device)
    except NoKernels as reason:
        if setting == "on":
            raise SettingsError(f"--cpu-kernels is on and {reason}; use --cpu-kernels auto") from reason
        return None, f"torch's operators between matrices: {reason}"
    built = kernels.built
    how = f"built in {built.seconds:.1f} s, kept as" if built.seconds else "from"
    return kernels, f"C kernels between matrices, {how} {built.path}"


def attention_over(config: ModelConfig, cache: KVCache, kernels: CpuKernels | None) -> SdpaBackend:
    return SdpaBackend(config, cache) if kernels is None else CpuBackend(config, cache, kernels)


def fuse(model: Decoder, kernels: CpuKernels) -> None:
    """Puts the kernels in place of what lies between the matrices, in place."""
    model.norm = FusedNorm(model.norm, kernels)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attention_norm = FusedNorm(block.attention_norm, kernels)
        block.mlp_norm = FusedNorm(block.mlp_norm, kernels)
        block.rotate_ = kernels.rotate_
        block.gated = partial(kernels.gated, activation=model.config.features.activation)
        if block.head_norm is None and block.after_attention is None and block.has_up:
            block.plain = Plain(block, kernels)
    model.fused = states


class Plain:
    """A block without further norms, its parts looked up once: stream[T, H], delta[T, H] → the next delta.

    With one token a layer's weights take half a millisecond to arrive and sweep the processor's caches, so that a
    tensor made or a module entered between two matrices costs about ten times what it does in a loop. So the kernels
    are given addresses, and a step's intermediate values one place.
    """

    def __init__(self, block: Block, kernels: CpuKernels) -> None:
        self.layer, self.epsilon = block.layer, block.mlp_norm.epsilon
        self.qkv, self.out, self.gate_up, self.down = block.qkv, block.out, block.gate_up, block.down
        self.norms = block.attention_norm.weight, block.mlp_norm.weight  # held for their addresses
        self.first, self.second = (weight.data_ptr() for weight in self.norms)
        self.heads, self.head_dim = block.qk_heads
        self.kind = KINDS[block.activation_name]
        self.add_norm, self.rotate, self.product = kernels.add_norm, kernels.rotate, kernels.product

    def delta(
        self, stream: Tensor, delta: Tensor | None, rotation: Tensor | None, attention: AttentionBackend, room: Room
    ) -> Tensor:
        """stream[T, H] takes `delta`, if there is one, and attention's output in; returns what is to be added next."""
        at, (tokens, hidden), threads = stream.data_ptr(), stream.shape, room.threads
        added = None if delta is None else delta.data_ptr()
        self.add_norm(at, added, self.first, self.epsilon, room.normed_at, tokens, hidden, threads)
        qkv = self.qkv.forward(room.normed)
        if rotation is not None:
            turn, width = rotation.data_ptr(), qkv.shape[1]
            self.rotate(qkv.data_ptr(), turn, tokens, width, self.heads, self.head_dim, threads)
        attended = self.out.forward(attention.forward(qkv, self.layer))
        added = attended.data_ptr()
        self.add_norm(at, added, self.second, self.epsilon, room.normed_at, tokens, hidden, threads)
        gate_up = self.gate_up.forward(room.normed)
        gate, inner = gate_up.data_ptr(), room.inner
        up = gate + inner * gate_up.element_size()
        self.product(gate, up, room.product_at, tokens, inner, 2 * inner, 2 * inner, self.kind, threads)
        return self.down.forward(room.product)


class Room:
    """Where a step's intermediate values stand, one layer's after the other's: normed[T, H] and product[T, F]."""

    def __init__(self, tokens: int, config: ModelConfig, dtype: torch.dtype) -> None:
        self.inner, self.threads = config.intermediate_size, torch.get_num_threads()
        self.normed = torch.empty(tokens, config.hidden_size, dtype=dtype)
        self.product = torch.empty(tokens, self.inner, dtype=dtype)
        self.normed_at, self.product_at = self.normed.data_ptr(), self.product.data_ptr()


def states(
    model: Decoder, token_ids: Tensor, positions: Tensor, attention: AttentionBackend, memory: MemoryStep | None
) -> Tensor:
    """`Decoder.states`: the same sums in the same order, an addition made by the norm that reads it."""
    stream, delta = model.embedded(token_ids), None
    rotations = model.rotations(positions)
    room = Room(len(token_ids), model.config, model.dtype)
    for layer, block in enumerate(cast("Iterable[Block]", model.blocks)):
        adds = memory is not None and layer in memory.layers
        replaced = memory if memory is not None and layer in memory.up_layers else None
        plain = None if replaced is not None else block.plain
        if delta is not None and (adds or plain is None):
            stream, delta = stream.add_(delta), None
        if memory is not None and adds:
            stream = memory.add(layer, stream)
        if plain is None:
            stream = block.forward(stream, rotations[layer], attention, replaced)
        else:
            delta = plain.delta(stream, delta, rotations[layer], attention, room)
    normed: Tensor = model.norm(stream if delta is None else stream.add_(delta))
    return normed
