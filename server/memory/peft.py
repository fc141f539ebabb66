"""engram-peft's adapters: opened as packs, in place, without conversion.

    ADAPTER/config.json                  sizes per order over all heads, layers in any order, hc_mult branches
    ADAPTER/engram_adapters.safetensors  <l>.multi_head_embedding.embedding.weight   the table [rows, D]
                                         <l>.gating.w_k.<c>.weight, <l>.gating.w_v.weight, no biases
                                         <l>.gating.norm_k.<c>.weight, <l>.gating.norm_h.<c>.weight
                                         <l>.short_conv.norms.<c>.weight, <l>.short_conv.conv.weight [hc · H, 1, K]

The layer is the paper's, with one difference: on a plain residual stream all its branches read the same hidden state,
and their outputs are summed. Addresses differ more: `families.peft_rule`. Source: engram-peft 1.2.7, its full forward
pass. Knows files and formulas, nothing of backbones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.cache.layouts import Header, Layout, find_layout, read_header
from server.errors import PackError
from server.memory.addressing import Addresser
from server.memory.engram import Engram
from server.memory.pack import PackConfig
from server.memory.stored import Modules, Stored, counting, print_of, read_tensors, stated

KNOWN_BY = "engram_vocab_size_per_ngram"
FORM = "engram-peft"
FILE, PICKLE, LORA = "engram_adapters.safetensors", "engram_weights.pt", "adapter_config.json"
TABLE = "{}.multi_head_embedding.embedding.weight"
NORM_EPS = torch.finfo(torch.float32).eps  # what torch takes for a norm that names none
RULE_FIELDS = (
    KNOWN_BY,
    "ngram_sizes",
    "n_head_per_ngram",
    "target_layers",
    "enable_tokenizer_compression",
    "compressed_vocab_size",
    "pad_id",
    "seed",
    "engine",
)


class SummedEngram(Engram):
    """The paper's layer with all branches on one plain stream: each reads the same, and what they write adds up."""

    def branches_of(self, hidden: Tensor) -> Tensor:
        return hidden[:, None].expand(-1, self.shape.branches, -1)

    def joined(self, added: Tensor) -> Tensor:
        return added.sum(1)


def read_adapter(folder: Path, content: Mapping[str, Any]) -> Stored:
    """Reads config and headers. Raises PackError or TableError for what this server cannot serve."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        wrong = f"{PICKLE}, which this server does not unpickle" if (folder / PICKLE).exists() else "no weights"
        raise PackError(f"{folder} holds {wrong}; an adapter saved by engram-peft has its weights in {FILE}")
    headers = [read_header(file) for file in files]
    rule = {name: content[name] for name in RULE_FIELDS if content.get(name) is not None}
    addresser = counting(rule)
    layouts = {layer: find_layout(headers, TABLE.format(layer)) for layer in addresser.layer_ids}
    config = adapter_config(content, rule, addresser, layouts[addresser.layer_ids[0]])
    text = json.dumps(dict(content), sort_keys=True).encode()
    return Stored(
        "engram-peft", folder, config, layouts, partial(modules, folder, headers, config), print_of(text, files)
    )


def adapter_config(content: Mapping[str, Any], rule: dict[str, Any], addresser: Addresser, first: Layout) -> PackConfig:
    """The adapter's config in a pack's words."""
    size = content[KNOWN_BY]
    sizes = tuple(size) if isinstance(size, Sequence) else (size,) * len(addresser.orders)
    multipliers = {str(layer): list(m) for layer, m in addresser.multipliers.items()}
    if "compressed_vocab_size" not in rule:
        multipliers = {}  # the tokenizer will tell
    return PackConfig(
        layer_ids=addresser.layer_ids,
        max_ngram_size=addresser.n,
        n_head_per_ngram=addresser.heads,
        engram_vocab_size=sizes,
        head_dim=first.dim,
        pad_id=content.get("pad_id") or 0,
        seed=content.get("seed") or 0,
        hidden_size=stated(content, "hidden_size"),
        vocab_size=0,
        compressed_vocab_size=addresser.compressed_vocab,
        compression_sha256="",
        multipliers=multipliers,
        primes={str(layer): [list(order) for order in p] for layer, p in addresser.primes.items()},
        backbone={},
        row_type=first.row_type.name,
        kernel_size=stated(content, "conv_kernel_size"),
        norm_eps=NORM_EPS,
        branches=stated(content, "hc_mult"),
        form=FORM,
        dilation=stated(content, "conv_dilation"),
        rule=rule,
    )


def modules(folder: Path, headers: Sequence[Header], config: PackConfig, layer: int) -> Modules:
    """One layer's parameters, named and joined as the paper's form has them. Raises PackError."""
    if (folder / LORA).exists():
        raise PackError(
            f"{folder} holds LoRA weights beside the memory ({LORA}); merge them into the model and serve that, with "
            "the memory in a folder of its own"
        )
    branches = range(config.branches)
    stored = {
        **{f"key.{c}": f"{layer}.gating.w_k.{c}.weight" for c in branches},
        **{f"key_norm.{c}": f"{layer}.gating.norm_k.{c}.weight" for c in branches},
        **{f"query_norm.{c}": f"{layer}.gating.norm_h.{c}.weight" for c in branches},
        **{f"conv_norm.{c}": f"{layer}.short_conv.norms.{c}.weight" for c in branches},
        "value": f"{layer}.gating.w_v.weight",
        "conv": f"{layer}.short_conv.conv.weight",
    }
    found = read_tensors(headers, stored)
    missing = stored.keys() - found.keys()
    if missing:
        raise PackError(f"{folder} lacks the tensor {stored[min(missing)]}")
    try:
        key_value = torch.cat([*(found[f"key.{c}"] for c in branches), found["value"]])
        norms = ("key_norm", "query_norm", "conv_norm")
        return {
            "key_value.weight": key_value,
            "key_value.bias": torch.zeros(len(key_value)),
            **{f"{name}.weight": torch.stack([found[f"{name}.{c}"] for c in branches]) for name in norms},
            "conv": found["conv"].flatten(1),
        }
    except (RuntimeError, IndexError) as error:
        raise PackError(f"{folder}: the tensors of layer {layer} do not go together: {error}") from None


def is_adapter(content: Mapping[str, Any]) -> bool:
    return content.get(KNOWN_BY) is not None and "format_version" not in content
