"""The C kernels between a decoder's matrices: applied to a model from outside, on a CPU with a compiler.

    hidden ─ FusedNorm ─ qkv ─ rotate_ ─ attention.CpuBackend ─ out ─ FusedNorm.after ─ gate·up ─ gated ─ down ─(+)

What a step takes beyond its matrix multiplications is mostly the entering of small operators, 45 a layer; these are
five calls instead (docs/experiments.md). The residual stream is changed in place. Without a compiler everything stays
as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.cpu.build import NoKernels, library
from kernels.cpu.ops import SUFFIXES, CpuKernels
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
            block.forward = bound(block, kernels)  # type: ignore[method-assign]


def bound(block: Block, kernels: CpuKernels) -> Callable[..., Tensor]:
    """`block.forward` for the families without further norms, its parts looked up once.

    With one token a layer's weights take half a millisecond to arrive, and each lookup of a module and each call
    through `nn.Module.__call__` runs on processor caches which they have just swept.
    """
    first, second, eps = block.attention_norm.weight, block.mlp_norm.weight, block.mlp_norm.epsilon
    qkv, out, gate_up, down = block.qkv, block.out, block.gate_up, block.down
    size, heads, layer, gated, general = block.qk_size, block.qk_heads, block.layer, block.gated, block.forward

    def forward(
        hidden: Tensor, rotation: Tensor | None, attention: AttentionBackend, memory: MemoryStep | None = None
    ) -> Tensor:
        if memory is not None:
            return general(hidden, rotation, attention, memory)
        states = qkv.forward(kernels.norm(hidden, first, eps))
        if rotation is not None:
            kernels.rotate_(states[:, :size].view(-1, *heads), rotation)
        attended = out.forward(attention.forward(states, layer))
        gate, up = gate_up.forward(kernels.norm(hidden, second, eps, attended)).chunk(2, dim=-1)
        return hidden.add_(down.forward(gated(gate, up)))

    return forward
