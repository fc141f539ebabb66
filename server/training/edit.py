"""One text taught to a memory that knows already: only rows that its n-grams address change, no more than will do.

    loss = cross-entropy of the learnt tokens  +  weight · mean squared change of the rows

Projections, norms and convolution stay as they are, so that whatever else the memory knows is disturbed only through
rows it shares with the text; the second term keeps those near where they were. The states below the first memory layer
are computed once. Stops as soon as every learnt token is the best by far, or after a bounded number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.batch import Ints
from server.training.activations import learnt_places
from server.training.data import Example
from server.training.frozen import Frozen
from server.training.layout import Layout
from server.training.loss import scores_of
from server.training.memory import TaughtMemory, joined

STEPS, RATE = 60, 0.03
SURE = 0.05  # mean loss at which a text counts as learnt
HOLD = 1.0  # weight of the rows' mean squared change


@dataclass(frozen=True, slots=True)
class Edit:
    """rows: layer → (row ids [U] in the table, their new values fp32 [U, D]). learnt: every token is the best one."""

    rows: dict[int, tuple[Ints, Tensor]]
    loss_before: float
    loss_after: float
    steps: int
    learnt: bool


def teach_text(
    frozen: Frozen,
    memory: TaughtMemory,
    examples: Sequence[Example],
    *,
    steps: int = STEPS,
    rate: float = RATE,
    hold: float = HOLD,
    between: Callable[[], object] = lambda: None,
) -> Edit:
    """Optimises the rows that the examples address; `memory` holds their masters (`start.teachable`) and keeps the
    result. `between` is called after every step: sleep there to leave cores to others, raise there to give up.
    """
    for parameter in memory.parameters():
        parameter.requires_grad_(False)
    layout = Layout.of([example.ids for example in examples], frozen.device)
    places = joined(memory.places([example.ids for example in examples]))
    first = min(memory.layer_ids)
    with torch.no_grad():
        states = frozen.states(layout, between=False, until=first)
        for hidden in states:
            state = hidden
    at, labels = learnt_places(examples, frozen.device)
    origin = {layer: rows.values.clone() for layer, rows in memory.rows.items()}
    before, losses = 0.0, torch.zeros(0)
    done, learnt = 0, False
    while True:
        step, _ = memory.read(layout, places)
        losses, right = scores_of(frozen.logits(frozen.run(state, layout, first, step)[at]), labels)
        learnt = bool(right.all())
        before = before if done else float(losses.detach().mean())
        if done == steps or (learnt and float(losses.detach().mean()) < SURE):
            break
        changes = [(leaf.values - origin[layer][leaf.distinct]).pow(2).mean() for layer, leaf in step.leaves.items()]
        torch.autograd.backward(losses.mean() + hold * torch.stack(changes).sum())
        for layer, leaf in step.leaves.items():
            assert leaf.values.grad is not None
            memory.rows[layer].update(leaf.distinct, leaf.values.grad, rate)
        done += 1
        between()
    touched = {layer: (rows.taught, rows.values[: len(rows.taught)].clone()) for layer, rows in memory.rows.items()}
    return Edit(touched, before, float(losses.detach().mean()), done, learnt)
