"""From files to a trainer: the frozen backbone, the pack's masters, cached states, all checked before time is spent.

A pack that was never taught starts from zero rows and a random value projection, as long as the stream is at that
layer: an exact no-op like the fresh pack itself, in which the first gradient of a row already points where the row has
to go, and in which every row that no data addresses stays silent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from server.batch import Ints
from server.cache.row_table import Table
from server.errors import PackError
from server.memory.addressing import Addresser, from_config
from server.memory.attached import check_compression, load_modules, read_memory
from server.memory.attachment import fingerprint, open_tables
from server.memory.engram import Engram
from server.memory.pack import PackConfig, StemConfig
from server.models.source import ModelSource
from server.models.weights import fingerprint as model_fingerprint
from server.training.activations import Bare, States, read_bare
from server.training.data import Example, digest
from server.training.engram import TaughtEngram
from server.training.frozen import Frozen
from server.training.layout import Layout
from server.training.loop import Part, Recipe, Trainer
from server.training.loss import CandidateLoss
from server.training.memory import TaughtMemory, addresses
from server.training.rows import TrainedRows
from server.training.stem import TaughtStem

READ = "states.json"
VALUE_GAIN = (
    5.0  # a fresh value projection gives, for rows of size 1 and an open gate, this many times the stream's RMS
)

Advance = Callable[[int], object]


@dataclass(slots=True)
class Opened:
    """A pack opened to be taught. `fresh`: an Engram that never was."""

    folder: Path
    config: PackConfig | StemConfig
    addresser: Addresser
    tables: Mapping[int, Table]
    modules: dict[int, Engram]

    @property
    def fresh(self) -> bool:
        return isinstance(self.config, PackConfig) and self.config.trained_steps == 0


def open_to_teach(folder: Path, source: ModelSource, device: torch.device) -> Opened:
    """Raises PackError for a pack of another backbone, a damaged one, or an Engram of a form that is only served."""
    stored, model = read_memory(folder), source.config
    if isinstance(stored, StemConfig):
        stored.check_backbone(
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_layers=model.num_layers,
            vocab_size=model.vocab_size,
        )
        addresser = from_config(stored.addressing())
        return Opened(
            folder, stored, addresser, open_tables(folder, addresser, stored.intermediate_size, folder.name), {}
        )
    config = stored.config
    stored.check_shape()
    config.check_backbone(hidden_size=model.hidden_size, num_layers=model.num_layers, vocab_size=model.vocab_size)
    if stored.foreign or config.form != "paper" or config.branches != 1:
        raise PackError(
            f"{folder} holds a memory of {stored.family} with layers of the form {config.form!r} and {config.branches} "
            "branches; train teaches packs of the form 'paper' with 1: make one with engram-server attach"
        )
    addresser = from_config(config.addressing(), tokenizer=source.tokenizer.backend)
    check_compression(config, addresser)
    stored.check_rows(addresser)
    modules: dict[int, Engram] = {}
    for layer in config.layer_ids:
        module = load_modules(stored, layer, Engram, torch.float32)
        assert isinstance(module, Engram)
        modules[layer] = module.to(device)
    return Opened(folder, config, addresser, stored.open_tables(folder.name), modules)


def teachable(opened: Opened, frozen: Frozen, taught: Sequence[Example], read: Sequence[Example]) -> TaughtMemory:
    """The memory with masters of all rows that these examples address; those of `read` teach no rows of their own.

    Nor does an example's first token, unless something is learnt right after it: every later token attends to it (an
    attention sink), so that what is added there disturbs any text that begins alike.
    """
    mine: dict[int, list[Ints]] = {layer: [] for layer in opened.addresser.layer_ids}
    others: dict[int, list[Ints]] = {layer: [np.empty(0, np.int64)] for layer in opened.addresser.layer_ids}
    for example in taught:
        first = min(example.learnt - 1, 1)
        for layer, ids in addresses(opened.addresser, example.ids).items():
            others[layer].append(ids[:first].ravel())
            mine[layer].append(ids[first:].ravel())
    for example in read:
        for layer, ids in addresses(opened.addresser, example.ids).items():
            others[layer].append(ids.ravel())
    rows = {
        layer: TrainedRows.of(
            table,
            np.concatenate(mine[layer]),
            np.concatenate(others[layer]),
            fresh=opened.fresh,
            device=frozen.device,
        )
        for layer, table in opened.tables.items()
    }
    if isinstance(opened.config, StemConfig):
        return TaughtStem(opened.addresser, rows, frozen)
    return TaughtEngram(opened.addresser, rows, opened.modules)


@torch.no_grad()
def begin_fresh(memory: TaughtEngram, scales: Mapping[int, float], seed: int) -> None:
    """Zero rows, random values: W_V of σ VALUE_GAIN · `scales[layer]` / sqrt(C · D)."""
    generator = torch.Generator().manual_seed(seed)
    for layer, rows in memory.rows.items():
        rows.values.zero_()
        module = memory.modules[layer]
        hidden, width = module.shape.hidden_size, module.shape.row_width
        drawn = torch.randn(hidden, width, generator=generator)
        module.key_value.weight[-hidden:] = drawn.to(rows.values.device) * VALUE_GAIN * scales[layer] / math.sqrt(width)


def stamp_of(
    source: ModelSource, opened: Opened, parts: Sequence[Sequence[Example]], recipe: Recipe, dtype: str
) -> str:
    """What a checkpoint belongs to. The number of epochs is left out: a run may be made longer."""
    settings = asdict(recipe)
    del settings["epochs"]
    return json.dumps(
        {
            "model": model_fingerprint(source),
            "pack": fingerprint(opened.folder, opened.config.layer_ids),
            "data": digest(*parts),
            "dtype": dtype,
            **settings,
        },
        sort_keys=True,
    )


def build_trainer(
    frozen: Frozen,
    opened: Opened,
    taught: Sequence[Example],
    retained: Sequence[Example],
    measured: Sequence[Example],
    recipe: Recipe,
    work: Path,
    key: str,
    advance: Advance,
) -> tuple[Trainer, Part, float]:
    """(the trainer at its first step, the general text it is measured on, the bare backbone's perplexity of the data).

    Reads the bare backbone once over everything, unless `work`, the folder for states, has what it would give;
    `advance(tokens)` is called as it goes. `key`: the backbone's fingerprint.
    """
    stem = isinstance(opened.config, StemConfig)
    memory = teachable(opened, frozen, taught, (*retained, *measured))
    first, hidden = min(memory.layer_ids), frozen.config.hidden_size
    key = json.dumps([key, str(frozen.dtype), stem, list(memory.layer_ids), digest(taught, retained)])
    report = work / READ
    bare = Bare.found(report, key)
    if bare is None:
        report.unlink(missing_ok=True)  # until the states are whole again
    states = {first: States(work / "taught.states", taught, hidden, frozen.dtype)}
    own = {
        layer: States(work / f"retained-{layer}.states", retained, hidden, frozen.dtype)
        for layer in (memory.layer_ids if retained else ())
    }
    if bare is None:
        bare = read_bare(frozen, taught, states, between=False, measure=True, advance=advance)
        if retained:
            read_bare(frozen, retained, own, between=stem, measure=False, advance=advance)
        bare.write(report, key)
    part, kept = Part(taught, memory.places([example.ids for example in taught]), states), None
    if retained:
        kept = Part(retained, memory.places([example.ids for example in retained]), own)
    if opened.fresh and isinstance(memory, TaughtEngram):
        begin_fresh(memory, stream_scales(frozen, taught, memory.layer_ids), recipe.seed)
    loss = CandidateLoss(frozen, torch.tensor(sorted(bare.candidates)))
    trainer = Trainer(frozen, memory, part, kept, loss, recipe)
    general = Part(measured, memory.places([example.ids for example in measured]), {})
    return trainer, general, bare.perplexity


@torch.no_grad()
def stream_scales(frozen: Frozen, examples: Sequence[Example], layers: Sequence[int]) -> dict[int, float]:
    """RMS of the bare stream before these layers: its median over the tokens of the first examples."""
    layout = Layout.of([example.ids for example in examples[:32]], frozen.device)
    found = list(frozen.states(layout, between=False, until=max(layers)))
    return {layer: float(found[layer].pow(2).mean(-1).sqrt().median()) for layer in layers}
