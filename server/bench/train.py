"""`bench train`: a training step beside the plain way of writing it, in turns, in one process, on the same batches.

    ours    states below the first memory layer cached, no padding, the head on learnt places and candidates, Adam on
            touched rows
    plain   transformers' model in the same dtype, the memory in forward hooks, a padded batch, logits of every token,
            torch's Adam on the whole table

Both compute the same memory layers with the same modules. Tokens per second count real tokens, not padding. What ours
spends once (the pass that fills the cache) is reported beside the ratio and not in it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from server.batch import Ints
from server.bench.paired import machine, ratio, write_json
from server.commands.attach import attach
from server.commands.convert import convert
from server.commands.evaluate import shipped
from server.errors import SettingsError
from server.models.source import open_source
from server.runtime.host import cpu_quota
from server.runtime.load import choose_dtype
from server.settings import Settings
from server.training.data import read_examples
from server.training.engram import TaughtEngram
from server.training.frozen import Frozen
from server.training.layout import Layout
from server.training.loop import Recipe, Trainer
from server.training.memory import joined
from server.training.run import FACTS
from server.training.start import build_trainer, open_to_teach

EXAMPLES, BATCH_TOKENS = 128, 256
WARM_TURNS = 2


class PlainTrainer:
    """The plain way: `model` of transformers, the taught memory in hooks. One `step(members)` is one update."""

    def __init__(self, trainer: Trainer, model: Any) -> None:
        memory = trainer.memory
        assert isinstance(memory, TaughtEngram)
        self.trainer, self.model, self.memory = trainer, model, memory
        self.tables = {layer: nn.Parameter(rows.values.clone()) for layer, rows in memory.rows.items()}
        groups: list[dict[str, Any]] = [
            {"params": memory.parameters()},
            {"params": list(self.tables.values()), "lr": 1.5e-2},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.0)
        self.layout: Layout | None = None
        self.rows: dict[int, Tensor] = {}
        for layer in memory.layer_ids:
            model.model.layers[layer].register_forward_pre_hook(self.hook(layer), with_kwargs=True)

    def hook(self, layer: int) -> Callable[..., Any]:
        def add(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            assert self.layout is not None
            hidden = arguments[0]
            flat = self.layout.flatten(hidden).float()
            added = self.layout.pad(self.memory.added(layer, flat, self.rows[layer], self.layout))
            return (hidden + added.to(hidden.dtype), *arguments[1:]), keywords

        return add

    def step(self, members: Ints) -> int:
        taught = self.trainer.taught
        examples = [taught.examples[member] for member in members]
        self.layout = layout = taught.layout(members, self.trainer.frozen.device)
        places = joined([taught.places[member] for member in members])
        self.rows = {layer: F.embedding(at, self.tables[layer]).flatten(1) for layer, at in places.items()}
        labels = np.full((len(examples), layout.longest), -100)
        for row, example in zip(labels, examples, strict=True):
            row[example.learnt : len(example.ids)] = example.ids[example.learnt :]
        logits = self.model(layout.pad(layout.token_ids)).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(labels[:, 1:]).flatten())
        self.optimiser.zero_grad()
        torch.autograd.backward(loss)
        self.optimiser.step()
        return layout.tokens


def run(*, model: str, layers: tuple[int, ...], turns: int, json: Path | None) -> None:
    """Prints, and writes if asked, both speeds and their paired ratio. Raises SettingsError without transformers."""
    console = Console()
    torch.set_num_threads(cpu_quota())
    source = open_source(model)
    device = torch.device("cpu")
    dtype = choose_dtype(Settings(model=model), source, device)
    frozen = Frozen(source, dtype, device, 256)
    ends = source.config.eos_token_ids
    examples = read_examples(shipped() / FACTS, source.tokenizer.encode, ends[0] if ends else None, 256)[:EXAMPLES]
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as temporary:
        folder = Path(temporary)
        pack = attach(model=model, out=folder / "pack", layers=layers, rows=20_000, dim=16, heads=2)
        begun = time.perf_counter()
        recipe = Recipe(epochs=1000, batch_tokens=BATCH_TOKENS)
        opened = open_to_teach(pack, source, device)
        trainer, _, _ = build_trainer(frozen, opened, examples, [], [], recipe, folder, "", lambda tokens: None)
        once = time.perf_counter() - begun
        plain = PlainTrainer(trainer, transformers_model(model, folder / "model", dtype))
        ours_s, plain_s, tokens = [], [], []
        for turn in range(turns + WARM_TURNS):
            epoch, index = trainer.position()
            members = trainer.batches(epoch)[index]
            begun = time.perf_counter()
            count = plain.step(members)
            middle = time.perf_counter()
            trainer.advance()
            if turn >= WARM_TURNS:
                plain_s.append(middle - begun)
                ours_s.append(time.perf_counter() - middle)
                tokens.append(count)
    found = ratio(plain_s, ours_s)
    speeds = {"ours": sum(tokens) / sum(ours_s), "plain": sum(tokens) / sum(plain_s)}
    console.print(
        f"layers {', '.join(map(str, layers))}: {speeds['ours']:.0f} tokens/s, the plain way {speeds['plain']:.0f}; "
        f"paired ratio {found}; once before, for {sum(map(len, (e.ids for e in examples)))} tokens: {once:.1f} s"
    )
    if json is not None:
        figures = {"machine": machine(), "layers": layers, "tokens_per_s": speeds, "ratio": found.as_json()}
        write_json(json, {**figures, "cache_s": once, "batch_tokens": BATCH_TOKENS})


def transformers_model(model: str, folder: Path, dtype: torch.dtype) -> Any:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise SettingsError("bench train compares with transformers: pip install transformers") from None
    convert(model, folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return loaded.eval().requires_grad_(False)
