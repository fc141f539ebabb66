"""An independent Engram: whole sequences, float64, plain loops; shares no code with the server.

Reads a pack's files with the safetensors library, hashes with Python integers, and adds the result inside
transformers' own Llama, converted to float64, by hooks before the layers.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import regex  # comes with transformers
import torch
from safetensors.torch import load_file
from torch import Tensor


def compressed_ids(tokenizer: Any) -> list[int]:
    """Old id → new id by normalised text, after the demo's description, with unicodedata instead of tokenizers."""
    seen: dict[str, int] = {}
    table = []
    for token in range(tokenizer.get_vocab_size(with_added_tokens=True)):
        text = tokenizer.decode([token], skip_special_tokens=False)
        if "\ufffd" in text:
            key = tokenizer.id_to_token(token)
        else:
            norm = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
            norm = "".join(c for c in norm if unicodedata.category(c) != "Mn").lower()
            norm = regex.sub(r"[ \t\r\n]+", " ", norm)
            norm = " " if norm == " " else norm.strip()
            key = norm or text
        table.append(seen.setdefault(key, len(seen)))
    return table


class ReferenceEngram:
    def __init__(self, folder: Path, mapping: list[int]) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.mapping = mapping
        self.gates: dict[int, Tensor] = {}  # of the last sequence, by layer: mean over branches [T]
        modules = load_file(folder / "modules.safetensors")
        self.modules = {name: tensor.double() for name, tensor in modules.items()}
        self.tables = {
            layer: load_file(folder / f"table-{layer}.safetensors")["table"].double()
            for layer in self.config["layer_ids"]
        }

    def rows(self, ids: list[int], layer: int) -> list[list[int]]:
        pad = self.mapping[self.config["pad_id"]]
        small = [self.mapping[i] for i in ids]
        multipliers = self.config["multipliers"][str(layer)]
        answer = []
        for t in range(len(ids)):
            row, offset = [], 0
            for order, primes in enumerate(self.config["primes"][str(layer)], start=2):
                mix = 0
                for back in range(order):
                    mix ^= (small[t - back] if t >= back else pad) * multipliers[back]
                for prime in primes:
                    row.append(mix % prime + offset)
                    offset += prime
            answer.append(row)
        return answer

    def __call__(self, hidden: Tensor, ids: list[int], layer: int) -> Tensor:
        """hidden[T, hc, H] float64 → what the layer adds."""
        w = {n.removeprefix(f"layers.{layer}."): m for n, m in self.modules.items() if n.startswith(f"layers.{layer}.")}
        tokens, hc, size = hidden.shape
        e = self.tables[layer][torch.tensor(self.rows(ids, layer))].flatten(1)
        projected = e @ w["key_value.weight"].T + w["key_value.bias"]
        eps = self.config["norm_eps"]
        gated = torch.zeros_like(hidden)
        alphas = []
        for c in range(hc):
            key = projected[:, c * size : (c + 1) * size]
            value = projected[:, hc * size :]
            k = key / (key.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w["key_norm.weight"][c]
            h = hidden[:, c]
            q = h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w["query_norm.weight"][c]
            s = (k * q).sum(-1) / size**0.5
            root = torch.sign(s) * torch.sqrt(torch.clamp(s.abs(), min=1e-6))
            alphas.append(torch.sigmoid(root))
            gated[:, c] = alphas[-1][:, None] * value
        self.gates[layer] = torch.stack(alphas).mean(0)
        normed = gated / (gated.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w["conv_norm.weight"]
        flat = normed.flatten(1)
        kernel, dilation = self.config["kernel_size"], self.config["max_ngram_size"]
        conv = torch.zeros_like(flat)
        for t in range(tokens):
            for tap in range(kernel):
                source = t - (kernel - 1 - tap) * dilation
                if source >= 0:
                    conv[t] += flat[source] * w["conv"][:, tap]
        return gated + (conv * torch.sigmoid(conv)).view_as(gated)


@contextmanager
def attached(model: Any, engrams: list[ReferenceEngram], ids: list[int]) -> Iterator[None]:
    """Within the block, `model` (a float64 Llama of transformers) reads the memories for the sequence `ids`."""
    handles = []
    for layer, block in enumerate(model.model.layers):
        here = [engram for engram in engrams if layer in engram.tables]
        if not here:
            continue

        def add(module: Any, args: tuple[Tensor, ...], here: Any = here, layer: int = layer) -> tuple[Tensor, ...]:
            hidden = args[0]
            added = sum(engram(hidden[0][:, None], ids, layer)[:, 0] for engram in here)
            return (hidden + added[None], *args[1:])

        handles.append(block.register_forward_pre_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reference_logits(model: Any, engrams: list[ReferenceEngram], ids: tuple[int, ...]) -> Tensor:
    """[T, V] in float64."""
    with torch.no_grad(), attached(model, engrams, list(ids)):
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits
