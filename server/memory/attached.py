"""An attached pack: opened, checked against the backbone, its modules on the device, its tables mapped.

open_pack(folder)   reads config and headers, checks every promise, loads the small modules; no table byte is read
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from server.cache.row_table import Table
from server.cache.table_files import ReadMode
from server.errors import PackError
from server.memory.addressing import Addresser, from_config
from server.memory.attachment import Attachment, fingerprint, open_tables
from server.memory.compression import compression_map, map_sha256
from server.memory.deepseek import DeepSeekEngram
from server.memory.engram import Engram
from server.memory.layer import MemoryLayer
from server.memory.pack import MODULES, PackConfig, StemConfig, engram_shape, read_config
from server.memory.qwen_ple import QwenPLE
from server.memory.short_conv import ConvSlots
from server.memory.stem import StemPack, open_stem

FORMS: dict[str, type[MemoryLayer]] = {"paper": Engram, "deepseek-v4.1": DeepSeekEngram, "qwen-ple": QwenPLE}


class AttachedPack(Attachment):
    """An Engram pack, with the modules that consume its rows."""

    def __init__(
        self,
        name: str,
        fingerprint: str,
        config: PackConfig,
        addresser: Addresser,
        tables: dict[int, Table],
        modules: Mapping[int, MemoryLayer],
    ) -> None:
        super().__init__(name, fingerprint, addresser, tables)
        self.config, self.modules = config, modules
        self.shape = next(iter(modules.values())).shape
        self.conv_slots: dict[int, ConvSlots] = {}

    @property
    def conv_bytes_per_token(self) -> int:
        """Bytes of convolution inputs that one token slot holds over all layers of the pack."""
        return sum(module.conv_bytes_per_token for module in self.modules.values())

    @property
    def has_conv(self) -> bool:
        return self.conv_bytes_per_token > 0

    def allocate_conv(self, num_slots: int, device: torch.device) -> None:
        """One convolution input per token slot; shares the KV cache's block table."""
        for layer, module in self.modules.items():
            if module.has_conv:
                self.conv_slots[layer] = ConvSlots(num_slots, module.conv_width, module.dtype, device)


def open_pack(
    folder: Path,
    *,
    name: str,
    tokenizer: Any,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    read: ReadMode = "mmap",
) -> AttachedPack | StemPack:
    """Opens and checks a pack for this backbone. Raises PackError or TableError with both values of what differs."""
    config = read_config(folder)
    if isinstance(config, StemConfig):
        config.check_backbone(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_layers=num_layers,
            vocab_size=vocab_size,
        )
        return open_stem(folder, name, config, dtype, device, read)
    mapping = compression_map(tokenizer)
    config.check_backbone(
        hidden_size=hidden_size,
        num_layers=num_layers,
        vocab_size=vocab_size,
        sha256=map_sha256(mapping),
        compressed=int(mapping.max()) + 1,
    )
    addresser = from_config(config.addressing(), tokenizer=tokenizer)
    tables = open_tables(folder, addresser, config.head_dim, name, read)
    modules = load_modules(folder, config, dtype, device)
    return AttachedPack(name, fingerprint(folder, config.layer_ids), config, addresser, tables, modules)


def load_modules(folder: Path, config: PackConfig, dtype: torch.dtype, device: torch.device) -> dict[int, MemoryLayer]:
    """The small weights. Raises PackError for a missing or misshapen tensor and for values that are not finite."""
    path = folder / MODULES
    if config.form not in FORMS:
        raise PackError(f"{folder} has layers of the form {config.form!r}; this server reads {', '.join(FORMS)}")
    modules: dict[int, MemoryLayer] = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for layer in config.layer_ids:
                module = FORMS[config.form](engram_shape(config), dtype)
                for parameter_name, parameter in module.named_parameters():
                    key = f"layers.{layer}.{parameter_name}"
                    if key not in names:
                        raise PackError(f"{path} lacks the tensor {key}")
                    copy_checked(parameter, file.get_tensor(key), f"{path}: {key}")
                modules[layer] = module.to(device).eval().requires_grad_(False)
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
