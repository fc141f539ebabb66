"""What goes where, in bytes, and why: weights, KV blocks, staging, tables. Decided before a weight or row is loaded.

`engram-server plan` prints it, `load` keeps to it, the start-up report repeats it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.cpu.ops import CpuKernels
from server.cache.placement import Place, Room, TableNeed, place_tables, wishes
from server.cache.row_table import Table
from server.cache.staging import max_tokens
from server.errors import CapacityError, SettingsError
from server.memory.attachment import Attachment
from server.models.attention.kv_cache import kv_bytes_per_token
from server.models.config import ModelConfig
from server.models.prepack import can_prepack
from server.models.weights import expected_shapes
from server.runtime.host import available_memory
from server.settings import GIB, Settings

DEFAULT_KV_BYTES = 2 * GIB
# Of a GPU's memory beside weights, staging, hot rows and the tables that were asked there; the rest is for small
# tables, activations, graphs and the workspaces of matrix products.
GPU_SHARE = 0.75


@dataclass(frozen=True, slots=True)
class KVPlan:
    blocks: int
    block_bytes: int
    reason: str

    @property
    def nbytes(self) -> int:
        return self.blocks * self.block_bytes


@dataclass(frozen=True, slots=True)
class CapacityPlan:
    """`weights`, `staging`: bytes. `twice`: whether weights are kept as plain rows too, counted in `weights`.
    `token_budget`: the most tokens of a step whose rows fit --staging.
    """

    weights: int
    twice: bool
    kv: KVPlan
    staging: int
    token_budget: int
    places: tuple[Place, ...]
    room: Room

    def copied(self, tier: str) -> int:
        """Bytes of the tables in `tier`."""
        return sum(place.need.nbytes for place in self.places if place.tier == tier)

    @property
    def in_ram(self) -> int:
        """Bytes of the tables copied to RAM."""
        return self.copied("pinned") + (self.copied("device") if self.room.device == "cpu" else 0)

    @property
    def mapped_limit(self) -> int:
        """Most resident bytes of the mapped tables together; 0: no limit."""
        return self.room.host_limit - self.in_ram if self.room.host_limit else 0

    def tier(self, table: str) -> str:
        return next(place.tier for place in self.places if place.need.name == table)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be planned: a model of this shape and these packs, opened but not loaded. `without_up`: the layers
    whose up-projection is not kept."""

    settings: Settings
    config: ModelConfig
    packs: Sequence[Attachment]
    dtype: torch.dtype
    device: torch.device
    max_len: int
    without_up: frozenset[int]

    @property
    def weights(self) -> int:
        return planned_weight_bytes(self.config, self.dtype, self.device, self.without_up)


def plan(wanted: Wanted, kernels: CpuKernels | None) -> CapacityPlan:
    """What goes where. `kernels`: what computes on the CPU between the matrices.

    Raises CapacityError for what does not fit, with the flag and the value that would; SettingsError for a name in
    --placement that no table has, and for --cpu-weights that cannot be.
    """
    settings, device = wanted.settings, wanted.device
    twice = keeps_rows(settings, kernels if can_prepack(wanted.dtype, device) else None)
    if kernels is None or not twice:
        return plan_with(wanted, rows=0)
    rows = plain_row_bytes(wanted.config, wanted.dtype, wanted.without_up, kernels.at_once)
    asked = settings.cpu_weights == "twice"
    if not asked and rows > (_free_memory(device) - wanted.weights) // 4:
        return plan_with(wanted, rows=0)
    try:
        return plan_with(wanted, rows)
    except CapacityError as error:
        once = plan_with(wanted, rows=0)
        if asked:
            raise CapacityError(f"{error.message}; or set --cpu-weights once, with which it fits") from error
        return once


def plan_with(wanted: Wanted, rows: int) -> CapacityPlan:
    """The plan with `rows` bytes of plain rows beside the weights."""
    settings, packs, dtype, device = wanted.settings, wanted.packs, wanted.dtype, wanted.device
    weights = wanted.weights + rows
    free = _free_memory(device)
    if weights > free:
        raise CapacityError(
            f"the weights take {weights} bytes and {free} are free on {device}: choose a smaller --model"
        )
    token_bytes = kv_bytes_per_token(wanted.config, dtype) + sum(pack.conv_bytes_per_token for pack in packs)
    staging = settings.staging if packs else 0
    beside = staging + (settings.device_cache if packs else 0)
    needs = [need for pack in packs for need in mapped_needs(pack, settings.max_num_batched_tokens)]
    wish = wishes(needs, settings.placement)
    tables = sum(need.nbytes for need in needs if wish[need.name][0] == "device")
    kv = plan_kv(
        settings,
        block_bytes=settings.block_size * token_bytes,
        max_len=wanted.max_len,
        available=free - weights,
        share=GPU_SHARE * max(free - weights - beside - tables, 0) if device.type == "cuda" else None,
    )
    on_device = weights + kv.nbytes + beside
    host_free = available_memory() - staging - (on_device - staging if device.type == "cpu" else 0)
    room = Room(device.type, free - on_device, host_free, settings.host_memory_limit)
    lookups = [(table, pack.addresser.columns) for pack in packs for table in pack.tables.values()]
    assert len(needs) == len(lookups), "the plan is made before tables are placed"
    places = place_tables(needs, settings.placement, room)
    fetched: list[tuple[Table, int]] = [
        lookup for lookup, place in zip(lookups, places, strict=True) if place.tier != "device"
    ]
    budget = settings.max_num_batched_tokens
    if fetched:
        budget = min(budget, max_tokens(settings.staging, fetched, dtype))
    return CapacityPlan(weights, rows > 0, kv, staging, budget, places, room)


def mapped_needs(pack: Attachment, tokens: int) -> list[TableNeed]:
    """What the pack's mapped tables need in steps of so many tokens."""
    rows = tokens * pack.addresser.columns
    return [TableNeed(table.name, table.nbytes, table.step_bytes(rows)) for table in pack.mapped]


def planned_weight_bytes(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, without_up: frozenset[int]
) -> int:
    """Bytes of the weights as they will be stored: norms in fp32, a tied embedding prepacked beside its plain form."""
    total = 0
    for name, shape in expected_shapes(config).items():
        if not any(name.startswith(f"model.layers.{layer}.mlp.up_proj.") for layer in without_up):
            total += math.prod(shape) * (4 if "norm" in name else dtype.itemsize)
    if config.tie_word_embeddings and can_prepack(dtype, device):
        total += config.vocab_size * config.hidden_size * dtype.itemsize
    return total


def plain_row_bytes(config: ModelConfig, dtype: torch.dtype, without_up: frozenset[int], at_once: int) -> int:
    """Bytes of the matrices as plain rows, whose width `at_once` divides; not of a tied head: the embedding is they."""
    return sum(
        math.prod(shape) * dtype.itemsize
        for name, shape in expected_shapes(config).items()
        if len(shape) == 2
        and not shape[1] % at_once
        and "embed_tokens" not in name
        and not any(name.startswith(f"model.layers.{layer}.mlp.up_proj.") for layer in without_up)
    )


def keeps_rows(settings: Settings, kernels: CpuKernels | None) -> bool:
    """Whether weights may be kept as plain rows too. Raises SettingsError where they are asked for and of no use."""
    reason = ""
    if settings.quantize != "none":
        reason = f"--quantize is {settings.quantize}"
    elif kernels is None or not kernels.few:
        reason = "no C kernels with oneDNN's blocks beside them are here to read plain rows"
    if reason and settings.cpu_weights == "twice":
        raise SettingsError(f"--cpu-weights is twice and {reason}; use --cpu-weights auto")
    return not reason and settings.cpu_weights != "once"


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return available_memory()


def plan_kv(
    settings: Settings, *, block_bytes: int, max_len: int, available: int | None = None, share: float | None = None
) -> KVPlan:
    """Blocks for the KV cache; `block_bytes` counts everything stored per block, `max_len` the longest sequence.
    `share`: bytes it may take by default; None: as beside a CPU.

    Never more than all running sequences at full length could use. Raises CapacityError if not even one sequence of
    `max_len` tokens fits, naming the value that would.
    """
    available = available_memory() if available is None else available
    one = -(-max_len // settings.block_size) + 1  # block 0 is padding
    most = settings.max_num_seqs * (one - 1) + 1
    if settings.kv_bytes:
        budget, source = settings.kv_bytes, "--kv-bytes"
    elif share is not None:
        budget, source = int(share), f"{GPU_SHARE:.0%} of the device memory that is left"
    else:
        budget = min(DEFAULT_KV_BYTES, available // 4)
        source = "2 GiB, the default" if budget == DEFAULT_KV_BYTES else "a quarter of the free memory"
    blocks = min(budget // block_bytes, most)
    if blocks < one:
        longest = max((budget // block_bytes - 1) * settings.block_size, 0)
        raise CapacityError(
            f"{source} holds {longest} tokens of KV cache and one sequence of --max-model-len {max_len} needs more; "
            f"set --kv-bytes {one * block_bytes} or --max-model-len {max(longest, settings.block_size)}"
        )
    if blocks * block_bytes > available:
        raise CapacityError(
            f"the KV cache would take {blocks * block_bytes} bytes and {available} are free; "
            f"set --kv-bytes {available // 2}"
        )
    reason = f"all of --max-num-seqs {settings.max_num_seqs} at full length" if blocks == most else source
    return KVPlan(blocks, block_bytes, reason)
