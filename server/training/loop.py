"""The training loop's one step, and what it is measured by. What surrounds it (files, signals, bars): `run.py`.

    loss = cross-entropy of the learnt tokens  +  weight · mean stray of retained text

"Stray" is how far a memory layer moves the stream at the bare backbone's own state, squared, over the layer's median
squared length: zero wherever the gate is shut. The median and not the token's own length, because a sequence's first
token carries a stream a hundred times longer than the rest, and what is added there reaches every later token
(attention sinks, arXiv 2309.17453). It needs the memory's modules alone, no pass through the backbone, so that each
step can look at as many retained tokens as taught ones for a hundredth of their price.

Rows: Adam on touched rows, five times the learning rate, no decay. Projections, norms, convolution: AdamW. The rate
rises over the first steps and falls along a half cosine. Everything random is drawn from (seed, step), so that a run
resumed from a checkpoint goes on as if it had never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from server.batch import Ints
from server.errors import PackError
from server.training.activations import States, learnt_places
from server.training.data import Example, epoch_batches
from server.training.frozen import Frozen
from server.training.layout import Layout
from server.training.loss import CandidateLoss, scores_of
from server.training.memory import Leaf, TaughtMemory, joined

WARMUP, FLOOR = 0.05, 0.05  # of all steps the rate rises for; of the rate that is left at the end
CLIP = 1.0  # largest norm of the modules' gradient
SCALED = 64  # examples that the length of the stream is taken from
DECAY = 0.01  # AdamW's, on projections


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to teach. `retain_weight`: of the stray of retained text. `batch_tokens`: of taught text in one step."""

    epochs: int = 40
    batch_tokens: int = 512
    lr: float = 3e-3
    row_lr: float = 5.0  # times lr
    retain_weight: float = 10.0
    seed: int = 0


@dataclass(slots=True)
class Part:
    """Examples, the rows their tokens read, and the states cached for them: before the first layer, or per layer."""

    examples: Sequence[Example]
    places: list[dict[int, Tensor]]
    states: dict[int, States]

    def layout(self, members: Ints, device: torch.device) -> Layout:
        return Layout.of([self.examples[member].ids for member in members], device)

    def rows(self, members: Ints) -> dict[int, Tensor]:
        return joined([self.places[member] for member in members])


@dataclass(frozen=True, slots=True)
class StepReport:
    """loss: mean over learnt tokens. verbatim: of the sequences, how many would have been continued word for word."""

    loss: float
    stray: float
    labels: int
    tokens: int
    right: int
    sequences: int


class Trainer:
    """`taught` with states before the first memory layer, `retained` (or None) with states at every memory layer."""

    def __init__(
        self,
        frozen: Frozen,
        memory: TaughtMemory,
        taught: Part,
        retained: Part | None,
        loss: CandidateLoss,
        recipe: Recipe,
    ) -> None:
        self.frozen, self.memory, self.taught, self.retained = frozen, memory, taught, retained
        self.loss, self.recipe = loss, recipe
        self.first = min(memory.layer_ids)
        self.scales = median_lengths(retained, frozen.device) if retained is not None else {}
        self.step = 0
        self.lengths = [len(example.ids) for example in taught.examples]
        self.per_epoch = [len(self.batches(epoch)) for epoch in range(recipe.epochs)]
        self.steps = sum(self.per_epoch)
        parameters = memory.parameters()
        matrices = [p for p in parameters if p.dim() > 1 and min(p.shape) > 1]
        rest = [p for p in parameters if not (p.dim() > 1 and min(p.shape) > 1)]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.99)) if parameters else None

    def batches(self, epoch: int) -> list[Ints]:
        return epoch_batches(self.lengths, self.recipe.batch_tokens, self.recipe.seed, epoch)

    def position(self) -> tuple[int, int]:
        """(epoch, batch within it) of the next step."""
        step = self.step
        for epoch, count in enumerate(self.per_epoch):
            if step < count:
                return epoch, step
            step -= count
        return self.recipe.epochs, 0

    def rate(self) -> float:
        """The learning rate of the next step."""
        warm = max(1, round(WARMUP * self.steps))
        if self.step < warm:
            return self.recipe.lr * (self.step + 1) / warm
        done = (self.step - warm) / max(1, self.steps - warm)
        return self.recipe.lr * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2)

    def advance(self) -> StepReport:
        """One step. Raises PackError for a loss that is not finite; rows and modules are then as they were."""
        epoch, index = self.position()
        members = self.batches(epoch)[index]
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        examples = [self.taught.examples[member] for member in members]
        layout = self.taught.layout(members, self.frozen.device)
        kept = self.retained_members()
        step, kept_rows = self.memory.read(
            layout, self.taught.rows(members), self.retained.rows(kept) if self.retained and kept is not None else None
        )
        hidden = self.taught.states[self.first].take(members, self.frozen.device)
        normed = self.frozen.run(hidden, layout, self.first, step)
        at, labels = learnt_places(examples, self.frozen.device)
        losses, right = self.loss(normed[at], labels, generator)
        total = losses.mean()
        stray = 0.0
        if self.retained is not None and kept is not None:
            strays = self.strays(kept, kept_rows)
            stray = float(strays.detach())
            total = total + self.recipe.retain_weight * strays
        if not math.isfinite(float(total.detach())):
            raise PackError(
                f"the loss is {float(total.detach())} at step {self.step + 1}; lower --lr (it is {self.recipe.lr})"
            )
        self.descend(total, step.leaves)
        self.step += 1
        ends = np.cumsum([example.labels for example in examples])
        whole = sum(bool(part.all()) for part in right.cpu().tensor_split(torch.from_numpy(ends[:-1])))
        return StepReport(float(losses.detach().mean()), stray, len(labels), layout.tokens, whole, len(examples))

    def retained_members(self) -> Ints | None:
        """The retained pieces that this step looks at: about as many tokens as it teaches, in their own order."""
        if self.retained is None:
            return None
        sizes = [len(example.ids) for example in self.retained.examples]
        count = max(1, round(self.recipe.batch_tokens * len(sizes) / sum(sizes)))
        generator = np.random.Generator(np.random.Philox(key=[self.recipe.seed + 1, self.step]))
        return np.sort(generator.permutation(len(sizes))[:count])

    def strays(self, members: Ints, rows: dict[int, Tensor]) -> Tensor:
        """The mean over tokens, summed over layers."""
        assert self.retained is not None
        layout = self.retained.layout(members, self.frozen.device)
        found = [
            self.memory.stray(layer, states.take(members, self.frozen.device), rows[layer], layout, self.frozen).mean()
            / self.scales[layer]
            for layer, states in self.retained.states.items()
        ]
        return torch.stack(found).sum()

    def descend(self, total: Tensor, leaves: dict[int, Leaf]) -> None:
        rate = self.rate()
        if self.optimiser is not None:
            self.optimiser.zero_grad()
        torch.autograd.backward(total)
        if self.optimiser is not None:
            torch.nn.utils.clip_grad_norm_(self.memory.parameters(), CLIP)
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            self.optimiser.step()
        for layer, leaf in leaves.items():
            gradient = leaf.values.grad
            assert gradient is not None
            self.memory.rows[layer].update(leaf.distinct, gradient, rate * self.recipe.row_lr)


def median_lengths(part: Part, device: torch.device) -> dict[int, float]:
    """Per layer the median squared length of the states of the first examples."""
    members = np.arange(min(SCALED, len(part.examples)))
    return {layer: float(states.take(members, device).pow(2).sum(-1).median()) for layer, states in part.states.items()}


@torch.no_grad()
def perplexity(frozen: Frozen, memory: TaughtMemory | None, part: Part, members: Sequence[int]) -> tuple[float, float]:
    """(perplexity of the learnt tokens, share of sequences all right) of these examples, over the whole vocabulary.

    `memory` None: the bare backbone's.
    """
    total, count, whole = 0.0, 0, 0
    for member in members:
        which = np.array([member])
        layout = part.layout(which, frozen.device)
        step = memory.look(layout, part.rows(which)) if memory is not None else None
        normed = frozen.run(frozen.embed(layout), layout, 0, step)
        at, labels = learnt_places([part.examples[member]], frozen.device)
        losses, right = scores_of(frozen.logits(normed[at]), labels)
        total, count, whole = total + float(losses.sum()), count + len(labels), whole + bool(right.all())
    return math.exp(total / max(1, count)), whole / max(1, len(members))
