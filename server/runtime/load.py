"""Loading: from settings to a model on its device, with attention, KV blocks and memories, and a report of it all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kernels.cpu.ops import CpuKernels
from server.cache import cuda_memory
from server.cache.device_table import DeviceTable
from server.cache.hot_rows import HotRows
from server.cache.pinned_table import PinnedTable
from server.cache.prefetcher import Prefetcher
from server.cache.residency import Residency
from server.cache.row_table import RowTable, Table
from server.errors import CapacityError, PackError, SettingsError
from server.memory.attached import AttachedPack, open_pack
from server.memory.c_engram import CEngram
from server.memory.engram import Engram
from server.memory.identity import content_key
from server.memory.memories import Memories
from server.memory.stem import StemPack
from server.metrics import MEMORY_FETCH, buckets_from
from server.models import fused
from server.models.attention.base import AttentionBackend
from server.models.attention.kv_cache import KVCache
from server.models.c_kernels import attention_over, choose_kernels, fuse
from server.models.decoder import Decoder
from server.models.prepack import PackedLinear, can_prepack, prepack
from server.models.quantize import QuantizedLinear, quantize
from server.models.source import ModelSource, open_source
from server.models.weights import tensors
from server.runtime.capacity import CapacityPlan, KVPlan, Wanted, plan
from server.runtime.device_path import DevicePath
from server.runtime.host import cpu_quota
from server.settings import Settings

LONGEST_DEFAULT = 8192


@dataclass(slots=True)
class Loaded:
    """Everything the engine runs on."""

    source: ModelSource
    model: Decoder
    attention: AttentionBackend
    plan: CapacityPlan
    max_len: int
    device: torch.device
    dtype: torch.dtype
    memories: Memories | None
    kernels: CpuKernels | None
    kernels_note: str  # which, and why
    device_path: DevicePath | None = None  # where decode steps may stay on the device

    @property
    def rows(self) -> CpuKernels | None:
        """What multiplies weights as plain rows, where they are kept so."""
        return self.kernels if self.plan.twice else None

    @property
    def slots(self) -> int:
        """Tokens that the KV cache has room for, padding and dummies included."""
        return self.attention.num_slots

    @property
    def kv(self) -> KVPlan:
        return self.plan.kv

    @property
    def token_budget(self) -> int:
        """The most tokens of one step."""
        return self.plan.token_budget

    @property
    def fixed(self) -> frozenset[str]:
        """Names of the packs without which the model is not whole."""
        packs = self.memories.packs if self.memories is not None else ()
        return frozenset(pack.name for pack in packs if self.model.without_up.intersection(stem_layers([pack])))

    @property
    def redirectable(self) -> frozenset[str]:
        """Names of the packs that a token id addresses, where a prompt's places can read other tokens' rows."""
        packs = self.memories.packs if self.memories is not None else ()
        return frozenset(pack.name for pack in packs if isinstance(pack, StemPack))


def choose_device(settings: Settings) -> torch.device:
    """Raises SettingsError for a device that is not there."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device is cuda and no CUDA device is usable here; use --device cpu")
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(settings.device)


def choose_dtype(settings: Settings, source: ModelSource, device: torch.device) -> torch.dtype:
    """The flag's, else the checkpoint's; a CPU without bf16 instructions falls back to fp32."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)  # type: ignore[no-any-return]
    dtype: torch.dtype = getattr(torch, source.config.dtype)
    if device.type == "cpu" and (dtype == torch.float16 or not can_prepack(torch.bfloat16, device)):
        return torch.float32 if not can_prepack(torch.bfloat16, device) else torch.bfloat16
    return dtype


def context_limit(settings: Settings, source: ModelSource) -> int:
    """Tokens of prompt and answer together. Raises SettingsError above the model's own limit."""
    own = source.config.max_position_embeddings
    if settings.max_model_len > own:
        raise SettingsError(
            f"--max-model-len is {settings.max_model_len} and {source.name} was made for {own} positions; "
            f"set --max-model-len {own} or less"
        )
    return settings.max_model_len or min(own, LONGEST_DEFAULT)


def build_model(
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    max_len: int,
    without_up: frozenset[int] = frozenset(),
    bits: str = "none",
    rows: CpuKernels | None = None,
) -> Decoder:
    """The backbone with its weights, on `device`, prepacked where that helps. One tensor at a time is in flight.

    `without_up`: layers whose up-projection is not wanted; `bits`: --quantize; `rows`: what multiplies plain rows,
    where they are kept too. Raises SettingsError if it cannot be.
    """
    weights = tensors(source, dtype)
    with torch.device(device):
        model = Decoder(source.config, max_len, dtype, without_up)
    with torch.inference_mode():
        model.load(weights)
        if bits != "none":
            if device.type != "cpu":
                raise SettingsError(f"--quantize is {bits} and the model runs on {device}; use --device cpu")
            quantize(model, bits, head=model.head)
        if can_prepack(dtype, device):
            prepack(model, rows)
    return model.eval()


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known before a weight or a row is loaded: headers are read, sizes are settled."""

    source: ModelSource
    device: torch.device
    dtype: torch.dtype
    max_len: int
    packs: list[AttachedPack | StemPack]
    without_up: frozenset[int]
    plan: CapacityPlan
    kernels: CpuKernels | None
    kernels_note: str


def prepare(settings: Settings) -> Prepared:
    """Opens model and packs and settles what goes where. Raises ModelError, PackError, SettingsError, CapacityError."""
    source = open_source(settings.model)
    device = choose_device(settings)
    dtype = choose_dtype(settings, source, device)
    max_len = context_limit(settings, source)
    kernels, note = choose_kernels(settings.cpu_kernels, source.config, dtype, device)
    packs = open_packs(settings, source, dtype, device)
    replaced = frozenset(stem_layers(packs))
    without_up = frozenset[int]() if settings.keep_up_projection else replaced
    planned = plan(Wanted(settings, source.config, packs, dtype, device, max_len, without_up), kernels)
    return Prepared(source, device, dtype, max_len, packs, without_up, planned, kernels, note)


def load(settings: Settings, *, device_path: bool | None = None) -> Loaded:
    """Loads the backbone and the tables that are copied. Raises ModelError, PackError, SettingsError, CapacityError.

    `device_path`: whether decode steps may stay on the device; None: on CUDA.
    """
    torch.set_num_threads(settings.threads or cpu_quota())
    prepared = prepare(settings)
    source, device, dtype, packs = prepared.source, prepared.device, prepared.dtype, prepared.packs
    on_device = device.type == "cuda" if device_path is None else device_path
    kernels, note = (None, "") if on_device else (prepared.kernels, prepared.kernels_note)
    rows = kernels if prepared.plan.twice else None
    for pack in packs:
        prepack_modules(pack, dtype, device, kernels, rows)
    model = build_model(source, dtype, device, prepared.max_len, prepared.without_up, settings.quantize, rows)
    kv = prepared.plan.kv
    path = DevicePath(kv.blocks) if on_device else None
    blocks = kv.blocks + (path is not None)
    try:
        cache = KVCache(source.config, blocks, settings.block_size, dtype, device)
        for pack in packs:
            pack.allocate_conv(blocks * settings.block_size, device)
    except (RuntimeError, MemoryError) as error:
        raise CapacityError(
            f"no room for {kv.blocks * kv.block_bytes} bytes of KV cache; set --kv-bytes lower"
        ) from error
    if path is not None:
        attention = path.choose_attention(source.config, cache)
        model.fused = fused.states if path.paged else None
    else:
        if kernels is not None:
            fuse(model, kernels)
        attention = attention_over(source.config, cache, kernels)
    memories = None
    if packs:
        place(packs, prepared.plan, device)
        hot = device_cache(settings, packs, device)
        prefetcher = Prefetcher(dtype, device, settings.staging, settings.prefetch == "on", hot, fetch_bounds(settings))
        memories = Memories(packs, prefetcher, watch(packs, prepared.plan), hot_list=settings.hot_list == "on")
    return Loaded(
        source, model, attention, prepared.plan, prepared.max_len, device, dtype, memories, kernels, note, path
    )


def fetch_bounds(settings: Settings) -> tuple[float, ...]:
    """Seconds by which the prefetcher counts its fetches, for the metrics."""
    return buckets_from(settings.metrics_buckets)[MEMORY_FETCH.name]


def place(packs: Sequence[AttachedPack | StemPack], planned: CapacityPlan, device: torch.device) -> None:
    """Copies the tables that do not stay where they are. Raises TableError or CapacityError."""
    for pack in packs:
        for layer, table in pack.tables.items():
            pack.tables[layer] = placed(table, planned.tier(table.name), device)


def watch(packs: Sequence[AttachedPack | StemPack], planned: CapacityPlan) -> Residency:
    """Who counts the mapped tables' pages, and holds them under what --host-memory-limit leaves for them."""
    mapped = [table for pack in packs for table in pack.mapped]
    step = sum(place.need.step_bytes for place in planned.places if place.tier == "mapped")
    return Residency(mapped, planned.mapped_limit, step)


def placed(table: Table, tier: str, device: torch.device) -> Table:
    """The table in its tier; the file it was copied from is closed."""
    if tier == "mapped" or not isinstance(table, RowTable):
        return table
    copy: Table
    if tier == "device":
        copy = DeviceTable(table, device)
    elif device.type == "cuda":
        copy = PinnedTable(table, cuda_memory.register, cuda_memory.unregister)
    else:
        copy = PinnedTable(table)
    table.close()
    return copy


def device_cache(settings: Settings, packs: Sequence[AttachedPack | StemPack], device: torch.device) -> HotRows | None:
    """The hot rows of --device-cache, for all tables that are not on the device as a whole.

    Raises CapacityError if it is too small or does not fit.
    """
    sources = [source for pack in packs for source in pack.sources()]
    if not settings.device_cache or not sources:
        return None
    try:
        return HotRows(settings.device_cache, sources, device)
    except (RuntimeError, MemoryError) as error:
        raise CapacityError(f"no room on {device} for --device-cache {settings.device_cache}; set it lower") from error


def open_packs(
    settings: Settings, source: ModelSource, dtype: torch.dtype, device: torch.device
) -> list[AttachedPack | StemPack]:
    """The packs of --memory, each PATH or NAME=PATH. Raises PackError; before any weight is loaded."""
    packs: list[AttachedPack | StemPack] = []
    for spec in settings.memory:
        given, separator, path = spec.rpartition("=")
        folder = Path(path)
        name = given if separator else folder.resolve().name
        if "+" in name or not name:
            raise SettingsError(
                f"--memory {spec}: {name!r} cannot be a memory's name; give another: --memory NAME={path}"
            )
        if name in {pack.name for pack in packs}:
            raise SettingsError(f"--memory names {name!r} twice; give one of them another name: --memory OTHER={path}")
        pack = open_pack(
            folder,
            name=name,
            tokenizer=source.tokenizer.backend,
            hidden_size=source.config.hidden_size,
            intermediate_size=source.config.intermediate_size,
            num_layers=source.config.num_layers,
            vocab_size=source.config.vocab_size,
            dtype=dtype,
            device=device,
            read="pread" if settings.read == "pread" else "mmap",
        )
        pack.content = content_key(folder)
        packs.append(pack)
    return packs


def prepack_modules(
    pack: AttachedPack | StemPack,
    dtype: torch.dtype,
    device: torch.device,
    kernels: CpuKernels | None,
    rows: CpuKernels | None,
) -> None:
    """What `build_model` and `fuse` do for the backbone, for an Engram pack's modules: `rows` multiplies plain rows."""
    for engram in pack.modules.values() if isinstance(pack, AttachedPack) else ():
        if can_prepack(dtype, device):
            prepack(engram, rows)
        if type(engram) is Engram and kernels is not None:
            engram.fused = CEngram(engram, kernels)


def stem_layers(packs: Sequence[AttachedPack | StemPack]) -> dict[int, str]:
    """Layer → the STEM pack that replaces its up-projection. Raises PackError if two packs want the same layer."""
    owners: dict[int, str] = {}
    for pack in packs:
        for layer in pack.config.layer_ids if isinstance(pack, StemPack) else ():
            if layer in owners:
                raise PackError(
                    f"STEM packs {owners[layer]!r} and {pack.name!r} both replace the up-projection of layer {layer}; "
                    f"attach one of them: --memory"
                )
            owners[layer] = pack.name
    return owners


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights as stored, a tied embedding counted once unless its packed form is apart."""
    linears = [m for m in model.modules() if isinstance(m, PackedLinear)]
    plain = [*model.parameters(), *(m.rows for m in linears if m.rows is not None)]
    seen = {p.data_ptr(): p.nbytes for p in plain}
    packed = [m.packed for m in linears]
    integers = sum(m.nbytes for m in model.modules() if isinstance(m, QuantizedLinear))
    return sum(seen.values()) + sum(p.numel() * p.element_size() for p in packed) + integers
