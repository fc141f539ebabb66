"""An attached pack: opened, checked against the backbone, its modules on the device, its tables mapped.

open_pack(folder)   reads config and headers, checks every promise, loads the small modules; no table byte is read
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.cache.row_table import Table
from server.cache.table_files import ReadMode
from server.errors import PackError
from server.memory.addressing import Addresser, NGramAddresser, from_config
from server.memory.attachment import Attachment
from server.memory.checkpoints import family_of, read_checkpoint
from server.memory.compression import map_sha256
from server.memory.deepseek import DeepSeekEngram
from server.memory.engram import Engram
from server.memory.layer import MemoryLayer
from server.memory.pack import PackConfig, StemConfig, engram_shape, read_config, read_content
from server.memory.peft import FORM, SummedEngram, is_adapter, read_adapter
from server.memory.qwen_ple import QwenPLE
from server.memory.short_conv import ConvSlots
from server.memory.stem import StemPack, open_stem
from server.memory.stored import Stored, read_pack

FORMS: dict[str, type[MemoryLayer]] = {
    "paper": Engram,
    "deepseek-v4.1": DeepSeekEngram,
    "qwen-ple": QwenPLE,
    FORM: SummedEngram,
}
STREAMS = 1  # residual streams of every backbone there is


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
    """Opens and checks a pack for this backbone. Raises PackError or TableError with both values of what differs.

    `folder`: a pack, an engram-peft adapter, or a checkpoint with a memory, all read in place.
    """
    stored = read_memory(folder)
    if isinstance(stored, StemConfig):
        stored.check_backbone(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_layers=num_layers,
            vocab_size=vocab_size,
        )
        return open_stem(folder, name, stored, dtype, device, read)
    config = stored.config
    stored.check_shape()
    config.check_backbone(hidden_size=hidden_size, num_layers=num_layers, vocab_size=vocab_size)
    form = form_of(stored)
    if config.branches != STREAMS and form is not SummedEngram:
        raise PackError(f"{folder} was made for {config.branches} residual streams and the model has {STREAMS}")
    addresser = from_config(config.addressing(), tokenizer=tokenizer)
    check_compression(config, addresser)
    stored.check_rows(addresser)
    modules = {layer: load_modules(stored, layer, form, dtype) for layer in config.layer_ids}
    for module in modules.values():
        module.to(device).eval().requires_grad_(False)
    tables: dict[int, Table] = {**stored.open_tables(name, read)}
    return AttachedPack(name, stored.fingerprint, config, addresser, tables, modules)


def check_compression(config: PackConfig, addresser: Addresser) -> None:
    """Raises PackError with both values if the tokenizer compresses to other ids than the pack was made with."""
    mapping = addresser.rule.mapping if isinstance(addresser, NGramAddresser) else None
    if mapping is not None:
        config.check_compression(sha256=map_sha256(mapping), compressed=int(mapping.max()) + 1)


def read_memory(folder: Path) -> Stored | StemConfig:
    """What lies in the folder, from its config and headers. Raises PackError or TableError if it is no memory."""
    content = read_content(folder)
    family = None if "format_version" in content else family_of(content)
    if family is not None:
        return read_checkpoint(folder, content, family)
    if is_adapter(content):
        return read_adapter(folder, content)
    config = read_config(folder)
    return config if isinstance(config, StemConfig) else read_pack(folder, config)


def form_of(stored: Stored) -> type[MemoryLayer]:
    if stored.config.form not in FORMS:
        raise PackError(
            f"{stored.folder} has layers of the form {stored.config.form!r}; this server reads {', '.join(FORMS)}"
        )
    return FORMS[stored.config.form]


def load_modules(stored: Stored, layer: int, form: type[MemoryLayer], dtype: torch.dtype) -> MemoryLayer:
    """The small weights. Raises PackError for a missing or misshapen tensor and for values that are not finite.

    Shapes are compared before anything of the sizes that the config names is allocated.
    """
    found, shape = stored.modules(layer), engram_shape(stored.config)
    with torch.device("meta"):
        wanted = {name: parameter.shape for name, parameter in form(shape, dtype).named_parameters()}
    for name, size in wanted.items():
        what = f"layers.{layer}.{name}"
        if name not in found:
            raise PackError(f"{stored.folder} lacks the tensor {what}")
        if found[name].shape != size:
            raise PackError(
                f"{stored.folder}: {what} has shape {list(found[name].shape)} and config.json needs {list(size)}"
            )
    module = form(shape, dtype)
    for name, parameter in module.named_parameters():
        copy_checked(parameter, found[name], f"{stored.folder}: layers.{layer}.{name}")
    return module


@torch.no_grad()
def copy_checked(parameter: Tensor, value: Tensor, what: str) -> None:
    if not value.dtype.is_floating_point or value.dtype.itemsize < 2:
        raise PackError(f"{what} is {value.dtype}; floats of 16 bits and more are read")
    if not torch.isfinite(value).all():
        raise PackError(f"{what} holds NaN or infinity; the pack is damaged")
    parameter.copy_(value)
