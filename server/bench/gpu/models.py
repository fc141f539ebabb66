"""Backbones and memories of random weights, made where they are used: their speed is that of trained ones.

    qwen3-4b, qwen3-8b    the real numbers of Qwen3; tiny: the same code in seconds on a CPU
    engram                two layers in the paper's form, the second block and the fifteenth: orders 2 and 3, 8 heads
                          of 80 values each, 1,280 wide, fp8 rows of 80 bytes, convolution of 4 taps
    stem                  token-id rows in place of the up-projections of four layers

Source of the arrangement: arXiv 2601.07372 §4 and its table 4 (arXiv 2601.10639 for STEM). Knows nothing of steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from server.bench.gpu.tables import Made, MadeUp, make, of_type
from server.cache.row_table import Table
from server.errors import SettingsError
from server.memory.addressing import NGramAddresser, from_config
from server.memory.attached import AttachedPack
from server.memory.engram import Engram
from server.memory.pack import PackConfig, StemConfig, engram_shape
from server.memory.stem import StemPack
from server.models import fused
from server.models.config import ModelConfig
from server.models.decoder import Block, Decoder

ROW_TYPE = "float8_e4m3"
STEM_ROW_TYPE = "int8"
ORDERS, HEADS, DIM = (2, 3), 8, 80
ENGRAM_DEPTHS = (1 / 30, 14 / 30)  # blocks 2 and 15 of the paper's 30, counted from 1
STEM_DEPTHS = (0.55, 0.65, 0.75, 0.85)
SIGMA = 0.02

QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "eos_token_id": 151_645,
    "torch_dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-4b": {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "qwen3-8b": {**QWEN3, "hidden_size": 4096, "intermediate_size": 12_288, "tie_word_embeddings": False},
    "tiny": {
        **QWEN3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 16,
        "num_key_value_heads": 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "eos_token_id": 511,
        "tie_word_embeddings": True,
    },
}


def config_of(shape: str) -> ModelConfig:
    """Raises SettingsError for a shape that is not known."""
    if shape not in SHAPES:
        raise SettingsError(f"SHAPE is {shape!r}; it must be one of {', '.join(SHAPES)}")
    return ModelConfig.from_hf(SHAPES[shape])


def dtype_of(config: ModelConfig, device: torch.device) -> torch.dtype:
    """fp32 on CPU, where the references run."""
    stored: torch.dtype = getattr(torch, config.dtype)
    return torch.float32 if device.type == "cpu" else stored


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> None:
    """Matrices N(0, 0.02²); norms stay ones and biases what they are."""
    device = next(module.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1 and "norm" not in name:
            parameter.normal_(0.0, SIGMA, generator=generator)


def backbone(config: ModelConfig, max_len: int, device: torch.device) -> Decoder:
    """Made on the device."""
    with torch.device(device):
        model = Decoder(config, max_len, dtype_of(config, device)).eval()
    randomise(model)
    model.fused = fused.states
    return model.requires_grad_(False)


def without_up(model: Decoder, layers: frozenset[int]) -> Decoder:
    """The same weights, but `layers` have blocks of their own without an up-projection."""
    thin = Decoder.__new__(Decoder)
    nn.Module.__init__(thin)
    thin.__dict__.update({name: value for name, value in vars(model).items() if not name.startswith("_")})
    thin._parameters, thin._modules = dict(model._parameters), dict(model._modules)
    thin.without_up = layers
    blocks = list(model.blocks)
    for layer in layers:
        with torch.device(model.embed.device):
            block = Block(model.config, layer, model.dtype, has_up=False).eval()
        randomise(block, seed=layer)
        blocks[layer] = block.requires_grad_(False)
    thin.blocks = nn.ModuleList(blocks)
    return thin


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters that a step of a dense model reads, a tied embedding once."""
    return sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())


@dataclass(frozen=True, slots=True)
class Engrams:
    """An Engram memory over made-up tables, one a layer. `made` tells how long they took."""

    config: PackConfig
    addresser: NGramAddresser
    modules: Mapping[int, Engram]
    made: Mapping[int, Made]

    def pack(self, tables: Mapping[int, Table] | None = None, name: str = "engram") -> AttachedPack:
        """A pack over its tables or over `tables`, which hold the same rows elsewhere; packs share the modules."""
        found: dict[int, Table] = {layer: made.table for layer, made in self.made.items()}
        found |= tables or {}
        return AttachedPack(name, name, self.config, self.addresser, found, self.modules)


def layers_at(depths: tuple[float, ...], layers: int) -> tuple[int, ...]:
    """Distinct layers at these shares of the depth, never the first: a fetch needs something to hide behind."""
    return tuple(sorted({min(max(1, round(depth * layers)), layers - 1) for depth in depths}))


def engrams(model: ModelConfig, table_bytes: int, device: torch.device, name: str = "engram") -> Engrams:
    """`table_bytes`: of all its tables together. Raises CapacityError where the driver refuses their memory."""
    layers = layers_at(ENGRAM_DEPTHS, model.num_layers)
    kind = of_type(ROW_TYPE)
    rows = max(64, table_bytes // (len(layers) * len(ORDERS) * HEADS * MadeUp("", 1, DIM, kind).row_bytes))
    addressing = {
        "layer_ids": list(layers),
        "max_ngram_size": max(ORDERS),
        "n_head_per_ngram": HEADS,
        "engram_vocab_size": [rows] * len(ORDERS),
        "pad_id": 0,
        "seed": 0,
        "compressed_vocab_size": model.vocab_size,
    }
    addresser = from_config(addressing)
    assert isinstance(addresser, NGramAddresser)
    config = PackConfig(
        layer_ids=layers,
        max_ngram_size=max(ORDERS),
        n_head_per_ngram=HEADS,
        engram_vocab_size=(rows,) * len(ORDERS),
        head_dim=DIM,
        pad_id=0,
        seed=0,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        compressed_vocab_size=model.vocab_size,
        compression_sha256="",
        multipliers={str(layer): list(map(int, m)) for layer, m in addresser.multipliers.items()},
        primes={str(layer): [list(map(int, order)) for order in p] for layer, p in addresser.primes.items()},
        backbone={"name": "random", "fingerprint": "", "num_layers": model.num_layers},
        row_type=ROW_TYPE,
        norm_eps=model.rms_norm_eps,
    )
    modules = {}
    for layer in layers:
        with torch.device(device):
            module = Engram(engram_shape(config), dtype_of(model, device)).eval()
        randomise(module, seed=layer)
        modules[layer] = module.requires_grad_(False)
    made = {
        layer: make(MadeUp(f"{name}/{layer}", addresser.rows_per_table[layer], DIM, kind, seed=layer), device)
        for layer in layers
    }
    return Engrams(config, addresser, modules, made)


def stem_layers(model: ModelConfig) -> frozenset[int]:
    return frozenset(layers_at(STEM_DEPTHS, model.num_layers))


def stems(model: ModelConfig, device: torch.device) -> tuple[StemPack, Mapping[int, Made]]:
    """A STEM memory of made-up rows, in host memory."""
    layers, kind = tuple(sorted(stem_layers(model))), of_type(STEM_ROW_TYPE)
    config = StemConfig(
        layer_ids=layers,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        backbone={"name": "random", "fingerprint": "", "num_layers": model.num_layers},
        row_type=STEM_ROW_TYPE,
    )
    made = {
        layer: make(MadeUp(f"stem/{layer}", model.vocab_size, model.intermediate_size, kind, seed=layer), device)
        for layer in layers
    }
    tables: dict[int, Table] = {layer: each.table for layer, each in made.items()}
    addresser = from_config(config.addressing())
    return StemPack("stem", "stem", config, addresser, tables, dtype_of(model, device), device), made
