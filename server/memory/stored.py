"""Stored: an Engram memory as it lies on disk, whoever wrote it, described the way a pack is.

    a pack                      pack.py
    an engram-peft adapter      peft.py
    a Qwen or DeepSeek-V4.1     checkpoints.py
    checkpoint's folder

All are read in place: headers when opened, the small modules layer by layer, rows when they are asked for. Knows files
and names, nothing of backbones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from server.cache.layouts import Header, Layout, find_layout, read_header
from server.cache.row_table import RowTable
from server.cache.table_files import ReadMode
from server.errors import PackError
from server.memory.addressing import Addresser, from_config
from server.memory.attachment import fingerprint
from server.memory.families import listed
from server.memory.pack import MODULES, PackConfig, table_file

Modules = dict[str, Tensor]
SIZES = {  # what a layer is sized by → the least and the most that is read
    "hidden_size": (1, 1 << 20),
    "branches": (1, 1 << 10),
    "kernel_size": (1, 1 << 10),
    "max_ngram_size": (1, 1 << 10),
    "dilation": (0, 1 << 10),
}


@dataclass(frozen=True, slots=True)
class Stored:
    """`layouts`: per layer, where its rows lie. `modules(layer)`: its parameters, named as its form names them.

    `family`: who wrote it. `fingerprint` changes whenever what the memory answers could change.
    """

    family: str
    folder: Path
    config: PackConfig
    layouts: Mapping[int, Layout]
    modules: Callable[[int], Modules]
    fingerprint: str

    @property
    def foreign(self) -> bool:
        """Whether another program wrote it."""
        return self.family != self.config.kind

    def check_shape(self) -> None:
        """Raises PackError if config.json does not say what a layer is sized by, or says what no layer has."""
        for what, (least, most) in SIZES.items():
            value, words = getattr(self.config, what), what.replace("_", " ")
            if type(value) is not int or value < least:
                raise PackError(f"{self.folder}: config.json does not state the memory's {words}")
            if value > most:
                raise PackError(
                    f"{self.folder}: config.json gives the memory's {words} as {value}; at most {most} is read"
                )

    def check_rule(self, addresser: Addresser) -> None:
        """Raises PackError unless the rule is one of n-grams, for the layers and row widths that the config names."""
        if not addresser.primes or set(addresser.layer_ids) != set(self.config.layer_ids):
            raise PackError(
                f"{self.folder}: config.json names the layers {listed(self.config.layer_ids)} and a rule for "
                f"n-grams at {listed(addresser.primes) or 'none'}"
            )
        if self.config.row_width != addresser.columns * self.config.head_dim:
            raise PackError(
                f"{self.folder}: config.json has {self.config.n_head_per_ngram} heads per n-gram; its rule has "
                f"{addresser.heads}"
            )

    def check_rows(self, addresser: Addresser) -> None:
        """Raises PackError with both sizes if a table is not as the config says."""
        self.check_rule(addresser)
        for layer, layout in self.layouts.items():
            rows, dim = addresser.rows_per_table[layer], self.config.head_dim
            if (layout.rows, layout.dim) != (rows, dim):
                raise PackError(
                    f"{layout.paths[0]} holds {layout.rows} rows of {layout.dim} values; config.json needs {rows} rows "
                    f"of {dim}"
                )

    def open_tables(self, name: str, read: ReadMode = "mmap") -> dict[int, RowTable]:
        """The table of every layer, called NAME/LAYER."""
        return {layer: RowTable(f"{name}/{layer}", layout, read) for layer, layout in self.layouts.items()}


def read_pack(folder: Path, config: PackConfig) -> Stored:
    """A pack of this server's own form. Raises TableError or PackError for files that cannot be read."""
    layouts = {layer: find_layout([read_header(folder / table_file(layer))], "table") for layer in config.layer_ids}
    if not (folder / MODULES).is_file():
        raise PackError(f"{folder} has no {MODULES}")

    def modules(layer: int) -> Modules:
        path, prefix = folder / MODULES, f"layers.{layer}."
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in list(file.keys()) if name.startswith(prefix)]
                return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise PackError(f"{path} cannot be read: {error}") from None

    return Stored(config.kind, folder, config, layouts, modules, fingerprint(folder, config.layer_ids))


def counting(config: Mapping[str, Any]) -> Addresser:
    """An addresser good for row counts, which need neither the compression nor the pad, and so no tokenizer."""
    return from_config({"compressed_vocab_size": 1, **config, "pad_id": 0, "engram_pad_token_id": 0})


def read_tensors(headers: Iterable[Header], names: Mapping[str, str]) -> Modules:
    """Tensors by new name: `names` is new → as stored. What the files lack is left out. Raises PackError."""
    where = {name: header.path for header in headers for name in header.tensors}
    found: Modules = {}
    for name, stored in names.items():
        if stored not in where:
            continue
        try:
            with safe_open(where[stored], framework="pt") as file:
                found[name] = file.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise PackError(f"{where[stored]} cannot be read: {error}") from None
    return found


def print_of(config: bytes, paths: Iterable[Path]) -> str:
    """SHA-256 over a config and each file's name, size and modification time: no table byte is read."""
    digest = hashlib.sha256(config)
    for path in sorted(set(paths)):
        status = path.stat()
        digest.update(f"{path.name}:{status.st_size}:{status.st_mtime_ns};".encode())
    return digest.hexdigest()


def stated_number(content: Mapping[str, Any], field: str, default: float) -> float:
    """A number from 0 to 1 of a foreign config, such as a norm's epsilon. Raises PackError."""
    value = content.get(field, default)
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise PackError(f"{field} is {value!r}; it must be a number from 0 to 1")
    return float(value)


def stated(content: Mapping[str, Any], field: str) -> int:
    """A whole number of a foreign config, 0 where it gives none; what must be there is checked before serving."""
    value = content.get(field)
    return value if type(value) is int and value > 0 else 0
