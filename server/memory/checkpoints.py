"""Checkpoint folders of whole models whose memory can be taken out: Qwen3.8-Flash-Next and DeepSeek-V4.1.

    family         config.json has    table of layer l                                     modules
    deepseek-v4.1  engram_layer_ids   layers.<l>.engram.embed.weight, .scale               wkv, q_weight, k_weight
    qwen-ple       ple_layer_ids      layers.<l>.ple.ple_embedding.ngram_embedding         key_proj, value_proj, conv1d,
                                      [.shard_<i>].weight                                  norm_key, _query, _conv

A matrix in float8 comes out as bfloat16: its scales stand for blocks of rows and columns, whose size the scales' shape
tells (32 by 32 in the released DeepSeek-V4.1). The folder is read in place, headers first; what else it holds is left
alone. Sources: the released configurations and the names in their weight files. Knows nothing of backbones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.cache.layouts import SHARD, Header, Layout, find_layout, read_header
from server.cache.row_types import E8M0_BIAS
from server.errors import PackError, TableError
from server.memory.addressing import Addresser
from server.memory.families import integer, integers, per_order
from server.memory.pack import PackConfig
from server.memory.stored import Modules, Stored, counting, print_of, read_tensors, stated, stated_number

BLOCK = r"^(?!mtp\.)(?:.*\.)?layers\.{layer}\."  # the draft model's layers have numbers of their own
SCALES = ("scale", "weight_scale", "weight_scale_inv")
BLOCK_SIZES = (32, 64, 128, 256, 1)


@dataclass(frozen=True, slots=True)
class Family:
    """`field` tells it; `table`, `modules`: names within a layer, as patterns.

    `rule`: the fields that decide addresses; `branches`, `kernel`: those that hold these, "" for none. `raw`: ids are
    hashed as they are.
    """

    name: str
    field: str
    table: str
    modules: str
    rule: tuple[str, ...]
    branches: str
    kernel: str
    raw: bool


FAMILIES = (
    Family(
        "deepseek-v4.1",
        "engram_layer_ids",
        r"engram\.embed\.weight$",
        r"engram\.(wkv\.(?:weight|scale|weight_scale|weight_scale_inv)|q_weight|k_weight)$",
        (
            "engram_layer_ids",
            "engram_max_ngram_size",
            "engram_n_heads",
            "engram_num_embeddings",
            "engram_compressed_vocab_size",
            "engram_pad_token_id",
            "engram_vocab_size",
            "seed",
        ),
        branches="hc_mult",
        kernel="",
        raw=False,
    ),
    Family(
        "qwen-ple",
        "ple_layer_ids",
        r"ple\.ple_embedding\.ngram_embedding(?:\.shard_\d+)?\.weight$",
        r"ple\.((?:key_proj|value_proj|norm_key|norm_query|norm_conv|conv1d)\.\w+)$",
        (
            "ple_layer_ids",
            "ngram_size",
            "heads_per_ngram",
            "ngram_vocab_size_base",
            "seed",
            "eos_token_id",
            "make_ngram_vocab_size_divisible_by",
            "vocab_size",
        ),
        branches="hc_count",
        kernel="ple_conv_kernel_size",
        raw=True,
    ),
)


def family_of(content: Mapping[str, Any]) -> Family | None:
    """The family a checkpoint's config belongs to; None for another model's."""
    return next((family for family in FAMILIES if content.get(family.field) not in (None, [])), None)


def read_checkpoint(folder: Path, content: Mapping[str, Any], family: Family) -> Stored:
    """Reads config and headers. Raises PackError or TableError for what does not hold together."""
    rule = {name: content[name] for name in family.rule if content.get(name) is not None}
    addresser = counting(rule)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise TableError(f"{folder} holds no .safetensors file")
    headers = [read_header(file) for file in files]
    layouts = {layer: layout_of(headers, family, layer, folder) for layer in addresser.layer_ids}
    config = checkpoint_config(folder, content, family, rule, addresser, layouts)
    text = json.dumps(dict(content), sort_keys=True).encode()
    read = partial(modules, headers, family)
    return Stored(family.name, folder, config, layouts, read, print_of(text, files))


def layout_of(headers: Sequence[Header], family: Family, layer: int, folder: Path) -> Layout:
    wanted = re.compile(BLOCK.replace("{layer}", str(layer)) + family.table)
    names = [name for header in headers for name in header.tensors if wanted.search(name)]
    if not names:
        raise TableError(f"{folder} holds no table of layer {layer}: no tensor is called {wanted.pattern}")
    return find_layout(headers, SHARD.sub("", names[0]))


def checkpoint_config(
    folder: Path,
    content: Mapping[str, Any],
    family: Family,
    rule: dict[str, Any],
    addresser: Addresser,
    layouts: Mapping[int, Layout],
) -> PackConfig:
    """The memory's part of the config, in a pack's words."""
    first = layouts[addresser.layer_ids[0]]
    sizes = per_order(content, "ngram_vocab_size_base" if family.raw else "engram_vocab_size", len(addresser.orders))
    pad = integers(content, "eos_token_id")[0] if family.raw else integer(content, "engram_pad_token_id", default=0)
    return PackConfig(
        layer_ids=addresser.layer_ids,
        max_ngram_size=addresser.n,
        n_head_per_ngram=addresser.heads,
        engram_vocab_size=sizes,
        head_dim=first.dim,
        pad_id=pad,
        seed=content.get("seed") or 0,
        hidden_size=stated(content, "hidden_size"),
        vocab_size=stated(content, "vocab_size"),
        compressed_vocab_size=addresser.compressed_vocab,
        compression_sha256="",
        multipliers={str(layer): list(m) for layer, m in addresser.multipliers.items()},
        primes={str(layer): [list(order) for order in p] for layer, p in addresser.primes.items()},
        backbone={"name": folder.resolve().name, "fingerprint": "", "num_layers": content.get("num_hidden_layers")},
        row_type=first.row_type.name,
        kernel_size=stated(content, family.kernel) if family.kernel else 4,
        norm_eps=stated_number(content, "rms_norm_eps", 1e-6),
        branches=stated(content, family.branches),
        form=family.name,
        rule=rule,
    )


def modules(headers: Sequence[Header], family: Family, layer: int) -> Modules:
    """One layer's parameters under its form's names, whatever was float8 as bfloat16."""
    wanted = re.compile(BLOCK.replace("{layer}", str(layer)) + family.modules)
    names = {}
    for header in headers:
        for name in header.tensors:
            match = wanted.search(name)
            if match:
                names[match[1]] = name
    found = read_tensors(headers, names)
    scales = {name: found.pop(name) for name in list(found) if name.rpartition(".")[2] in SCALES}
    for name, value in found.items():
        if value.dtype == torch.float8_e4m3fn:
            stem = name.rpartition(".")[0]
            scale = next((scales[f"{stem}.{kind}"] for kind in SCALES if f"{stem}.{kind}" in scales), None)
            found[name] = dequantised(value, scale, names[name])
    return found


def dequantised(value: Tensor, scale: Tensor | None, name: str) -> Tensor:
    """float8[N, M] and the scales of its blocks → bfloat16[N, M]. Raises PackError for scales that fit no block."""
    if scale is None:
        raise PackError(f"{name} is float8 and has no scale beside it ({', '.join(SCALES)})")
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponents = scale.view(torch.uint8).int() - E8M0_BIAS
        scale = torch.ldexp(torch.ones(exponents.shape), exponents)
    scale = scale.float()
    if scale.numel() != 1:
        for axis, size in enumerate(value.shape):
            count = scale.shape[axis] if scale.dim() == value.dim() else 0
            block = next((block for block in BLOCK_SIZES if -(-size // block) == count), None)
            if block is None:
                raise PackError(
                    f"{name} is {list(value.shape)} and its scales are {list(scale.shape)}; blocks of "
                    f"{', '.join(map(str, BLOCK_SIZES))} are read"
                )
            scale = scale.repeat_interleave(block, axis).narrow(axis, 0, size)
    return (value.float() * scale).bfloat16()
