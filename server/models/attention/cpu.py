"""Attention on a CPU with the C kernels: decode reads the pages where they lie, prefill goes by torch's operators.

    qkv ─ keys, values to their slots ─┬─ decode rows: one call for all sequences, no gather, no mask, no padding
                                       └─ chunks: as `SdpaBackend` does them

What a layer's window leaves out is not read. Shapes: T tokens, B decoding sequences, Hq query heads, Hk key-value
heads, D values a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.ops import CpuKernels, Shape, Step
from server.batch import Batch
from server.models.attention.kv_cache import KVCache
from server.models.attention.sdpa import Plan, SdpaBackend, decoding
from server.models.config import ModelConfig


class CpuBackend(SdpaBackend):
    name = "cpu"

    def __init__(self, config: ModelConfig, cache: KVCache, kernels: CpuKernels) -> None:
        super().__init__(config, cache)
        self.kernels = kernels
        self.shapes = {window: self._shape(window) for window in dict.fromkeys(self.windows)}
        self.step: Step

    def _shape(self, window: int) -> Shape:
        return Shape(self.num_heads, self.num_kv_heads, self.head_dim, self.cache.block_size, window, self.scale, 1)

    def plan(self, batch: Batch) -> None:
        decodes = decoding(batch)
        self.step = Step(batch.slots, batch.host_blocks[:decodes], batch.context_len[:decodes])
        for shape in self.shapes.values():
            shape.threads = torch.get_num_threads()
        self.plans = {window: Plan([], self._chunks(batch, decodes, window)) for window in self.shapes}

    def forward(self, qkv: Tensor, layer: int) -> Tensor:
        window = self.windows[layer]
        out = qkv.new_empty(qkv.shape[0], self.q_size)
        self.kernels.attend(self.shapes[window], self.step, qkv, self.cache.layers[layer], out)
        for chunk in self.plans[window].chunks:
            out[chunk.start : chunk.stop] = self._prefill(qkv[chunk.start : chunk.stop], layer, chunk)
        return out
