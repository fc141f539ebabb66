"""A decode step's memory in a captured graph against the same step on the CPU: rows to the bit, sums as near as fp32.

Needs torch, Triton, pytest, tokenizers and safetensors; no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers")

from kernels import language
from server.batch import DecodeBatch
from server.cache import cuda_memory
from server.cache.hot_rows import HotRows, Source
from server.cache.pinned_table import PinnedTable
from server.cache.prefetcher import Prefetcher
from server.cache.row_table import RowTable
from server.cache.row_types import row_type
from server.cache.table_writer import random_rows, write_table
from server.memory.addressing import from_config
from server.memory.attached import AttachedPack
from server.memory.deepseek import DeepSeekEngram
from server.memory.device_memory import DeviceMemory
from server.memory.edits import EditedRows, Overlay
from server.memory.engram import Engram
from server.memory.layer import EngramShape
from server.memory.memories import Memories
from server.memory.staged_rows import Place
from server.memory.stem import StemPack
from server.runtime.decode_graph import DecodeGraph
from server.view import BARE, MemoryView

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not language.available or language.interpreting, reason="needs Triton, not its interpreter"),
]

GPU, CPU = torch.device("cuda"), torch.device("cpu")
HIDDEN, FEED, DIM, VOCAB, BLOCK, PAD, LENGTH, BATCH = 64, 96, 32, 200, 4, 2, 24, 6
RULE = {
    "layer_ids": [1, 3], "max_ngram_size": 3, "n_head_per_ngram": 4, "engram_vocab_size": 500, "pad_id": 2, "seed": 0,
    "compressed_vocab_size": VOCAB,
}  # fmt: skip
# fp32 sums of up to 256 products in another order; values reach 100.
TOLERANCE = 1e-3


def memories_on(device: torch.device, folder: Path, cache: int = 0) -> Memories:
    """A paper's pack at layers 1 and 3, a DeepSeek pack at layer 1, a STEM pack at layer 2; the same on any device."""
    torch.manual_seed(0)

    def tables(addresser: Any, name: str, dim: int, kind: str) -> dict[int, Any]:
        made = {}
        for layer, rows in addresser.rows_per_table.items():
            path = folder / f"{name}-{layer}-{device.type}.safetensors"
            write_table(path, random_rows(rows, dim, seed=layer), rows, dim, row_type(kind), layout="packed")
            source = RowTable.open(path, name=f"{name}/{layer}")
            known = (cuda_memory.register, cuda_memory.unregister) if device.type == "cuda" else ()
            made[layer] = PinnedTable(source, *known)
            source.close()
        return made

    packs: list[AttachedPack | StemPack] = []
    for name, form, layers, kind in (("a", Engram, [1, 3], "int8"), ("b", DeepSeekEngram, [1], "float32")):
        addresser = from_config({**RULE, "layer_ids": layers})
        modules = {layer: form(EngramShape(HIDDEN, 8 * DIM), torch.float32) for layer in layers}
        for module in modules.values():
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, 0.0, 0.5)
            module.to(device).requires_grad_(False)
        pack = AttachedPack(name, "f", None, addresser, tables(addresser, name, DIM, kind), modules)  # type: ignore
        pack.content = name
        pack.allocate_conv(BATCH * LENGTH + 2 * BLOCK, device)
        packs.append(pack)
    addresser = from_config({"stem_layers": [2], "vocab_size": VOCAB})
    packs.append(StemPack("s", "f", None, addresser, tables(addresser, "s", FEED, "float16"), torch.float32, device))  # type: ignore
    sources = [
        Source(table, layer, pack.addresser.orders, pack.addresser.heads)
        for pack in packs
        for layer, table in pack.tables.items()
    ]
    hot = HotRows(cache, sources, device, every=1) if cache else None
    return Memories(packs, Prefetcher(torch.float32, device, 1 << 20, hot=hot))


def batch_on(device: torch.device) -> DecodeBatch:
    generator = np.random.default_rng(0)
    pages = LENGTH // BLOCK
    tensors = dict(
        tokens=torch.from_numpy(generator.integers(0, 20, (BATCH, PAD + LENGTH))),
        row_of=torch.arange(BATCH),
        positions=torch.zeros(BATCH, dtype=torch.int64),
        block_table=1 + torch.arange(BATCH * pages).flip(0).view(BATCH, pages),
        context_len=torch.ones(BATCH, dtype=torch.int64),
        slots=torch.zeros(BATCH, dtype=torch.int64),
        sees=torch.zeros(3, BATCH, dtype=torch.bool),
    )
    return DecodeBatch(**{name: t.to(device) for name, t in tensors.items()}, pad=PAD, block_size=BLOCK)


def move_to(batch: DecodeBatch, position: int, sees: np.ndarray) -> None:
    """In place, as between two launches."""
    at = torch.full((BATCH,), position)
    blocks = batch.block_table.cpu()
    batch.positions.copy_(at)
    batch.context_len.copy_(at + 1)
    batch.slots.copy_(blocks[torch.arange(BATCH), at // BLOCK] * BLOCK + at % BLOCK)
    batch.sees.copy_(torch.from_numpy(sees))


class Stage:
    """The static tensors of one side, and what a step does with them."""

    def __init__(self, device: torch.device, folder: Path, cache: int = 0, *, direct: bool = True) -> None:
        self.memories = memories_on(device, folder, cache)
        self.memory = DeviceMemory(self.memories, BATCH, direct=direct)
        self.batch = batch_on(device)
        self.hidden = torch.zeros(4, BATCH, HIDDEN, device=device)
        self.dense = torch.zeros(BATCH, FEED, device=device)
        self.out = {layer: torch.zeros(BATCH, HIDDEN, device=device) for layer in (1, 3)}
        self.up = torch.zeros(BATCH, FEED, device=device)

    def step(self, arrive: Callable[[Place], None] | None = None) -> None:
        step = self.memory.begin(self.batch, arrive)
        self.out[1].copy_(step.add(1, self.hidden[1].clone()))
        self.up.copy_(step.up(2, self.dense))
        self.out[3].copy_(step.add(3, self.hidden[3].clone()))
        step.join()

    def captured(self) -> Callable[[], None]:
        self.prepare([BARE] * BATCH, 0)
        self.step()
        self.step()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        graph: DecodeGraph[Place] = DecodeGraph.captured(self.step, torch.cuda.graph_pool_handle(), stream)
        assert len(graph.parts) == 1 + len(self.memory.staged.places)
        return lambda: graph.replay(self.memory.arrive)

    def prepare(self, views: list[MemoryView], position: int) -> None:
        """As before a launch of the step at this position of every sequence."""

        def windows() -> tuple[np.ndarray, np.ndarray]:
            at = np.full((BATCH, 1), position) - np.arange(self.memories.window)
            tokens = self.batch.tokens.cpu().numpy()
            return tokens[np.arange(BATCH)[:, None], PAD + at], at < 0

        self.memory.prepare(views, None, np.full(BATCH, position), windows)
        move_to(self.batch, position, self.memory.sees(views))

    def views(self) -> list[MemoryView]:
        a, b, s = (pack.id for pack in self.memories.packs)
        generator = np.random.default_rng(3)
        ids = np.arange(0, 4000, 2)
        values = generator.normal(size=(2, len(ids), DIM)).astype(np.float32)
        everyone = Overlay({("a", 1): EditedRows(ids, values[0]), ("a", 3): EditedRows(ids, values[0])})
        tenant = Overlay({("a", 1): EditedRows(ids[::3], values[1][::3])})
        seen = [(a,), (a, b), (a, b, s), (s,)]
        views = [MemoryView(packs) for packs in seen]
        views[1] = replace(views[1], overlays=(everyone,))
        views[2] = replace(views[2], overlays=(everyone, tenant))
        return [*views, BARE, BARE]


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "staged"])
@pytest.mark.parametrize("cache", [0, 1 << 18], ids=["no cache", "cache"])
def test_a_replayed_step_is_the_cpus(tmp_path: Path, cache: int, direct: bool) -> None:
    gpu, cpu = Stage(GPU, tmp_path, cache, direct=direct), Stage(CPU, tmp_path)
    replay = gpu.captured()
    for slots in [slots for pack in gpu.memories.packs[:2] for slots in pack.conv_slots.values()]:
        slots.inputs.zero_()  # the warm-up's
    views = {stage: stage.views() for stage in (gpu, cpu)}
    for position in range(LENGTH):
        state = torch.randn(4, BATCH, HIDDEN)
        dense = torch.randn(BATCH, FEED)
        for stage in (gpu, cpu):
            assert stage.memory.serves(views[stage])
            stage.prepare(views[stage], position)
            stage.hidden.copy_(state)
            stage.dense.copy_(dense)
        replay()
        gpu.memory.between(gpu.batch)
        cpu.step()
        for ours, theirs in zip(direct_rows(gpu), direct_rows(cpu), strict=False):  # none of staged packs
            assert torch.equal(ours, theirs)
        for layer in (1, 3):
            torch.testing.assert_close(gpu.out[layer].cpu(), cpu.out[layer], atol=TOLERANCE, rtol=1e-4)
            assert torch.equal(gpu.out[layer][4:].cpu(), state[layer][4:])
        assert torch.equal(gpu.up.cpu(), cpu.up)
    torch.cuda.synchronize()
    if cache:
        assert sum(counters.device_hits for counters in gpu.memories.counters()) > 0
    gpu.memories.close()
    cpu.memories.close()


def direct_rows(stage: Stage) -> list[torch.Tensor]:
    """The rows of every pack and layer, of the tokens that see it."""
    found = []
    sees = stage.batch.sees.cpu()
    for served in stage.memory.rows.served.values():
        for _, direct in sorted(served.tables.items()):
            found.append(direct._staging[:BATCH].cpu()[sees[served.index]])
    return found
