"""What the frozen backbone computes once and training reads again and again.

    taught text     the hidden state before the first memory layer; below it nothing ever changes
    retained text   the bare backbone's state at every memory layer; there the memory should not stray from it
    learnt places   the bare backbone's loss, and its best guesses (candidates of `loss.py`)

States are kept in the model's dtype in files beside the checkpoint, mapped: the system keeps in RAM what fits. A run
that goes on finds them, and what was measured on the way, under a key of backbone, data and layers. A state of STEM's
is that between attention and feed-forward block. Knows the backbone; nothing of what memory is taught.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from server.batch import Ints
from server.errors import PackError
from server.training.data import Example, cut
from server.training.frozen import Frozen
from server.training.layout import Layout
from server.training.loss import LIKED, scores_of

READ_TOKENS = 1024  # of a forward pass without gradients


class States:
    """States of all tokens of some examples: one file, [tokens, H], example after example."""

    def __init__(self, path: Path, examples: Sequence[Example], hidden_size: int, dtype: torch.dtype) -> None:
        self.starts = np.cumsum([0] + [len(example.ids) for example in examples])
        size = int(self.starts[-1]) * hidden_size
        if not path.is_file() or path.stat().st_size != size * dtype.itemsize:
            reserve(path, size * dtype.itemsize)
        self.values = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(-1, hidden_size)

    def put(self, members: Ints, states: Tensor) -> None:
        """states[T, H] of these examples, one after another."""
        at = 0
        for member in members:
            start, stop = self.starts[member], self.starts[member + 1]
            self.values[start:stop] = states[at : at + stop - start]
            at += stop - start

    def take(self, members: Ints, device: torch.device) -> Tensor:
        """[T, H] fp32."""
        parts = [self.values[self.starts[member] : self.starts[member + 1]] for member in members]
        return torch.cat(parts).to(device).float()


def reserve(path: Path, nbytes: int) -> None:
    """A file of this size with its blocks on disk: writing to its mapping later cannot fail for want of room."""
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, nbytes))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise PackError(f"no room for {nbytes} bytes of states at {path}: {error.strerror}; make room") from None


@dataclass(slots=True)
class Bare:
    """Sums over what was read, and the candidates found."""

    loss: float = 0.0
    labels: int = 0
    candidates: set[int] = field(default_factory=set)

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.loss / max(1, self.labels)))

    def write(self, path: Path, key: str) -> None:
        """Says that the states beside `path` are whole, and of what."""
        path.write_text(json.dumps({"key": key, **asdict(self), "candidates": sorted(self.candidates)}))

    @classmethod
    def found(cls, path: Path, key: str) -> Bare | None:
        """What an earlier run left there, if it is of the same; None otherwise."""
        try:
            content = json.loads(path.read_text())
            return (
                cls(content["loss"], content["labels"], set(content["candidates"])) if content["key"] == key else None
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None


@torch.no_grad()
def read_bare(
    frozen: Frozen,
    examples: Sequence[Example],
    keep: dict[int, States],
    *,
    between: bool,
    measure: bool,
    advance: Callable[[int], object],
) -> Bare:
    """Runs the bare backbone over the examples. `keep`: layer → where its states go. `between`: states are those
    between attention and feed-forward block. `measure`: also the loss and the candidates at learnt places.
    """
    found = Bare()
    sizes = np.array([len(example.ids) for example in examples])
    order = np.argsort(sizes, kind="stable")
    last = len(frozen.blocks) if measure else max(keep) + between
    for members in cut(order, sizes, READ_TOKENS):
        layout = Layout.of([examples[member].ids for member in members], frozen.device)
        for layer, state in enumerate(frozen.states(layout, between=between, until=last)):
            if layer in keep:
                keep[layer].put(members, state)
        if measure:
            at, labels = learnt_places([examples[member] for member in members], frozen.device)
            logits = frozen.logits(frozen.final(state)[at])
            losses, _ = scores_of(logits, labels)
            found.loss += float(losses.sum())
            found.labels += len(labels)
            found.candidates |= set(labels.tolist()) | set(torch.topk(logits, LIKED).indices.flatten().tolist())
        advance(layout.tokens)
    return found


def learnt_places(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of a batch of these examples: flat indices [N] of the tokens before each learnt one, and those tokens [N]."""
    starts = np.cumsum([0] + [len(example.ids) for example in examples])
    places = [np.arange(start + e.learnt, start + len(e.ids)) for start, e in zip(starts[:-1], examples, strict=True)]
    flat = np.concatenate(places)
    ids = np.concatenate([example.ids for example in examples])
    return torch.from_numpy(flat - 1).to(device), torch.from_numpy(ids[flat]).to(device)
