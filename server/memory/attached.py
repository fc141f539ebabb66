"""An attached pack: opened, checked against the backbone, its modules on the device, its tables mapped.

open_pack(folder)   reads config and headers, checks every promise, loads the small modules; no table byte is read
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from server.batch import Bools, Ints
from server.cache.row_table import RowTable
from server.errors import PackError
from server.memory.addressing import Addresser, from_config
from server.memory.compression import compression_map, map_sha256
from server.memory.engram import ConvSlots, Engram
from server.memory.pack import MODULES, PackConfig, engram_shape, table_file


class AttachedPack:
    """`name` as clients say it; `fingerprint` changes whenever what the pack answers could change."""

    def __init__(
        self,
        name: str,
        fingerprint: str,
        config: PackConfig,
        addresser: Addresser,
        tables: dict[int, RowTable],
        modules: dict[int, Engram],
    ) -> None:
        self.name, self.fingerprint, self.config = name, fingerprint, config
        self.addresser, self.tables, self.modules = addresser, tables, modules
        self.shape = next(iter(modules.values())).shape
        self.conv_slots: dict[int, ConvSlots] = {}

    @property
    def conv_bytes_per_token(self) -> int:
        """Bytes of convolution inputs that one token slot holds over all layers of the pack."""
        sizes = {layer: module.conv.dtype.itemsize * module.conv.shape[0] for layer, module in self.modules.items()}
        return sum(sizes.values())

    def allocate_conv(self, num_slots: int, device: torch.device) -> None:
        """One convolution input per token slot; shares the KV cache's block table."""
        for layer, module in self.modules.items():
            self.conv_slots[layer] = ConvSlots(num_slots, module.conv.shape[0], module.conv.dtype, device)

    def address(self, windows: Ints, blocked: Bools) -> Mapping[int, tuple[Ints, Ints]]:
        """Per layer, the row ids [T, C] and the hash before the modulus [T, O]."""
        return self.addresser.address(windows, blocked)


def open_pack(
    folder: Path,
    *,
    name: str,
    tokenizer: Any,
    hidden_size: int,
    num_layers: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> AttachedPack:
    """Opens and checks a pack for this backbone. Raises PackError or TableError with both values of what differs."""
    config = PackConfig.read(folder)
    mapping = compression_map(tokenizer)
    config.check_backbone(
        hidden_size=hidden_size,
        num_layers=num_layers,
        vocab_size=vocab_size,
        sha256=map_sha256(mapping),
        compressed=int(mapping.max()) + 1,
    )
    addresser = from_config(config.addressing(), tokenizer=tokenizer)
    tables = {layer: open_table(folder, layer, config, addresser) for layer in config.layer_ids}
    modules = load_modules(folder, config, dtype, device)
    return AttachedPack(name, fingerprint(folder, config), config, addresser, tables, modules)


def open_table(folder: Path, layer: int, config: PackConfig, addresser: Addresser) -> RowTable:
    table = RowTable.open(folder / table_file(layer), name=f"{folder.name}/{layer}")
    expected = addresser.rows_per_table[layer]
    if table.rows != expected or table.dim != config.head_dim:
        raise PackError(
            f"{folder / table_file(layer)} holds {table.rows} rows of {table.dim} values; config.json's primes need "
            f"{expected} rows of {config.head_dim}"
        )
    return table


def load_modules(folder: Path, config: PackConfig, dtype: torch.dtype, device: torch.device) -> dict[int, Engram]:
    """The small weights. Raises PackError for a missing or misshapen tensor and for values that are not finite."""
    path = folder / MODULES
    modules: dict[int, Engram] = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for layer in config.layer_ids:
                engram = Engram(engram_shape(config), dtype)
                for parameter_name, parameter in engram.named_parameters():
                    key = f"layers.{layer}.{parameter_name}"
                    if key not in names:
                        raise PackError(f"{path} lacks the tensor {key}")
                    copy_checked(parameter, file.get_tensor(key), f"{path}: {key}")
                modules[layer] = engram.to(device).eval().requires_grad_(False)
    except (SafetensorError, OSError) as error:
        raise PackError(f"{path} cannot be read: {error}") from None
    return modules


@torch.no_grad()
def copy_checked(parameter: Tensor, value: Tensor, what: str) -> None:
    if value.shape != parameter.shape:
        raise PackError(f"{what} has shape {list(value.shape)} and config.json needs {list(parameter.shape)}")
    if not torch.isfinite(value).all():
        raise PackError(f"{what} holds NaN or infinity; the pack is damaged")
    parameter.copy_(value)


def fingerprint(folder: Path, config: PackConfig) -> str:
    """SHA-256 over config, modules and each table's size and modification time: no table byte is read."""
    digest = hashlib.sha256()
    for path in [*sorted(folder.glob("*.json")), folder / MODULES]:
        digest.update(path.name.encode() + path.read_bytes())
    for layer in config.layer_ids:
        status = (folder / table_file(layer)).stat()
        digest.update(f"{layer}:{status.st_size}:{status.st_mtime_ns};".encode())
    return digest.hexdigest()
