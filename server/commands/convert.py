"""Convert: any model this server can open, written as a plain Hugging Face folder.

    OUT/  config.json  generation_config.json  tokenizer.json  tokenizer_config.json  model.safetensors

Tensors go to the file one at a time, so memory need is one tensor, not the model. The folder appears whole or not at
all: it is written beside its place and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from server.errors import CapacityError, SettingsError
from server.models.source import ModelSource, open_source
from server.models.weights import FLOATS, expected_shapes, tensors

WEIGHTS = "model.safetensors"
# of a folder's own files, those that hold for the converted one too
KEPT = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
DTYPES = ("auto", "bfloat16", "float16", "float32")


def convert(model: str, out: Path, dtype: str = "auto") -> None:
    """Writes `model` to the folder `out`, which must be new or empty; dtype "auto" is the model's own.

    Raises ModelError for the model, SettingsError for `out` and `dtype`, CapacityError when the disk is full.
    """
    if dtype not in DTYPES:
        raise SettingsError(f"--dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingsError(f"--out is {out}, which is there already; name a new or an empty folder")
    source = open_source(model)
    chosen: torch.dtype = getattr(torch, source.config.dtype if dtype == "auto" else dtype)
    _check_room(source, chosen, out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as beside:
            folder = Path(beside) / "model"
            folder.mkdir()
            write_descriptions(source, folder, chosen)
            write_weights(source, folder / WEIGHTS, chosen)
            os.replace(folder, out)
    except OSError as error:
        raise SettingsError(f"--out is {out}, which cannot be written: {error.strerror}") from None


def _check_room(source: ModelSource, dtype: torch.dtype, out: Path) -> None:
    needed = sum(prod(shape) for shape in expected_shapes(source.config).values()) * dtype.itemsize
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        raise CapacityError(f"{out} needs {needed} bytes and its disk has {free} free; set --out to another disk")


def write_descriptions(source: ModelSource, folder: Path, dtype: torch.dtype) -> None:
    """config.json, the tokenizer's files and generation_config.json."""
    config = {**source.config.to_hf(), "torch_dtype": str(dtype).removeprefix("torch.")}
    _write_json(folder / "config.json", config)
    for name in KEPT if source.kind == "folder" else ():
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)
    if not (folder / "generation_config.json").exists():
        _write_json(folder / "generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id")})
    if source.kind == "gguf":
        source.tokenizer.backend.save(str(folder / "tokenizer.json"))
        _write_json(folder / "tokenizer_config.json", _tokenizer_config(source))


def _tokenizer_config(source: ModelSource) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": source.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        **source.special_tokens,
        **({"chat_template": source.chat_template} if source.chat_template else {}),
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(source: ModelSource, path: Path, dtype: torch.dtype) -> None:
    """One safetensors file: the header first, as all shapes are known, then the tensors as they come."""
    shapes = expected_shapes(source.config)
    code = next(code for code, known in FLOATS.items() if known == dtype)
    entries, offsets, end = {}, {}, 0
    for name, shape in shapes.items():
        offsets[name] = end
        end += prod(shape) * dtype.itemsize
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [offsets[name], end]}
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file, Progress(console=Console(stderr=True), transient=True) as progress:
        file.write(len(header).to_bytes(8, "little") + header)
        start = file.tell()
        for name, tensor in progress.track(tensors(source, dtype), total=len(shapes), description=path.name):
            file.seek(start + offsets[name])
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
