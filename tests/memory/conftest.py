"""Memories on a tiny random Llama with the default model's tokenizer: one fresh pack, two with random modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from server.commands.attach import attach
from server.models.source import open_source
from tests.memory.reference import ReferenceEngram, compressed_ids

LAYERS = (1, 3)


@pytest.fixture(scope="session")
def fresh_pack(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packs") / "fresh"
    return attach(model=str(tiny_llama_folder), out=out, layers=LAYERS, rows=500, dim=16, heads=4, dtype="float32")


def randomise(pack: Path, seed: int) -> Path:
    """Every module weight random, so that gate, value, norms and convolution all show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    modules = load_file(pack / "modules.safetensors")
    for name, tensor in modules.items():
        if "norm" in name:
            modules[name] = 1 + 0.3 * torch.randn(tensor.shape, generator=generator)
        else:
            scale = 6.0 if "key_value" in name else 0.5
            modules[name] = scale * torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5
    save_file(modules, pack / "modules.safetensors")
    return pack


@pytest.fixture(scope="session")
def make_pack(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a pack with random modules; keyword arguments as for `attach`."""

    def make(name: str, seed: int, **sizes: Any) -> Path:
        chosen = {"layers": LAYERS, "rows": 500, "dim": 16, "heads": 4, "dtype": "float32", **sizes}
        out = tmp_path_factory.mktemp("packs") / name
        return randomise(attach(model=str(tiny_llama_folder), out=out, seed=seed, **chosen), seed)

    return make


@pytest.fixture(scope="session")
def pack_a(make_pack: Callable[..., Path]) -> Path:
    return make_pack("a", 1)


@pytest.fixture(scope="session")
def pack_b(make_pack: Callable[..., Path]) -> Path:
    return make_pack("b", 2, heads=3)


@pytest.fixture(scope="session")
def mapping(tiny_llama_folder: Path) -> list[int]:
    return compressed_ids(open_source(str(tiny_llama_folder)).tokenizer.backend)


@pytest.fixture(scope="session")
def reference_a(pack_a: Path, mapping: list[int]) -> ReferenceEngram:
    return ReferenceEngram(pack_a, mapping)


@pytest.fixture(scope="session")
def reference_b(pack_b: Path, mapping: list[int]) -> ReferenceEngram:
    return ReferenceEngram(pack_b, mapping)


@pytest.fixture(scope="session")
def backbone(tiny_llama_folder: Path) -> Any:
    """transformers' model in float64."""
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float64).eval()


@pytest.fixture(scope="session")
def prompt(tiny_llama_folder: Path) -> tuple[int, ...]:
    """90 tokens: Hangul, emoji, lone spaces, line breaks, ids that share a compressed id ("The", "the", "THE")."""
    text = "The the THE  capital of 대한민국 is 서울 🙂👩‍👩‍👧  \n\n \t  café CAFÉ ｆｕｌｌ; return x + 1  # 12345 " * 3
    ids = open_source(str(tiny_llama_folder)).tokenizer.encode(text)
    return tuple(ids[:90])
