"""Table files written by hand, byte by byte, so that the reader is not tested against our own writer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def write_safetensors(
    path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]], metadata: dict[str, str] | None = None
) -> Path:
    """`tensors`: name → (dtype, shape, bytes). The header is as long as it is: nothing is aligned."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))
    return path


def random_bytes(rows: int, width: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (rows, width), np.uint8)


def float_table(path: Path, rows: int, dim: int, seed: int = 0, tensor: str = "table") -> npt.NDArray[np.float32]:
    """A float32 table at `path`; returns its rows."""
    values = np.random.default_rng(seed).normal(size=(rows, dim)).astype("<f4")
    write_safetensors(path, {tensor: ("F32", (rows, dim), values.tobytes())})
    return values


def split_evenly(rows: int, parts: int) -> list[int]:
    """Sizes of `parts` runs that add up to `rows`, the first ones larger."""
    return [rows // parts + (i < rows % parts) for i in range(parts)]
