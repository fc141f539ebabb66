"""Trained rows: the table's rows that some data addresses, as fp32 masters, with an Adam of their own.

    ids     sorted row ids of the table   | taught …            | only read …            |
    values  fp32 [N, D]                   | change              | stay as the table has them |
    moments fp32 [taught, D], twice, and how often each row was touched

A step reads distinct rows as one leaf tensor and updates exactly those: rows that a batch does not address keep value
and moments, whatever their number, and the bias correction counts a row's own touches. No weight decay, as in the
paper (arXiv 2601.07372 §4: Adam, five times the learning rate, no decay). Adam: arXiv 1412.6980.

Knows row ids; nothing of tokens, layers or losses.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from server.batch import Ints
from server.cache.row_table import Table

BETAS, EPS = (0.9, 0.99), 1e-8


class TrainedRows:
    """`taught`, `read`: row ids; those of `read` that are taught too count as taught."""

    def __init__(self, values: Tensor, taught: Ints, read: Ints) -> None:
        self.taught, self.read = taught, read
        self.values = values
        size = (len(taught), values.shape[1])
        self.mean, self.square = (torch.zeros(size, device=values.device) for _ in range(2))
        self.touches = torch.zeros(len(taught), 1, device=values.device)

    @classmethod
    def of(cls, table: Table, taught: Ints, read: Ints, *, fresh: bool, device: torch.device) -> TrainedRows:
        """Masters of the rows with these ids. `fresh`: of a table never taught, rows only read count as zero."""
        taught = np.unique(taught)
        read = np.setdiff1d(read, taught)
        values = torch.cat([decoded(table, taught), decoded(table, read)])
        if fresh:
            values[len(taught) :] = 0
        return cls(values.to(device), taught, read)

    def places(self, row_ids: Ints) -> Tensor:
        """Indices into `values` of table row ids, any shape. Every id must be taught or read."""
        at = np.searchsorted(self.taught, row_ids)
        known = at < len(self.taught)
        known &= self.taught[np.minimum(at, len(self.taught) - 1)] == row_ids
        other = len(self.taught) + np.searchsorted(self.read, row_ids)
        return torch.from_numpy(np.where(known, at, other)).to(self.values.device)

    def leaf(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(distinct places [U], their values [U, D] as a leaf with gradient, inverse of places' shape)."""
        distinct, inverse = torch.unique(places, return_inverse=True)
        return distinct, self.values[distinct].requires_grad_(), inverse

    @torch.no_grad()
    def update(self, distinct: Tensor, gradient: Tensor, lr: float) -> None:
        """One Adam step of the taught rows among `distinct`; those only read stay."""
        taught = distinct < len(self.taught)
        if not taught.all():
            distinct, gradient = distinct[taught], gradient[taught]
        touches = self.touches[distinct] + 1
        mean = self.mean[distinct].lerp_(gradient, 1 - BETAS[0])
        square = self.square[distinct].lerp_(gradient * gradient, 1 - BETAS[1])
        self.touches[distinct], self.mean[distinct], self.square[distinct] = touches, mean, square
        step = (mean / (1 - BETAS[0] ** touches)) / ((square / (1 - BETAS[1] ** touches)).sqrt_() + EPS)
        self.values.index_add_(0, distinct, step, alpha=-lr)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs to go on."""
        return {
            "values": self.values[: len(self.taught)],
            "mean": self.mean,
            "square": self.square,
            "touches": self.touches,
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        self.values[: len(self.taught)] = state["values"]
        for name in ("mean", "square", "touches"):
            getattr(self, name).copy_(state[name])


def decoded(table: Table, row_ids: Ints) -> Tensor:
    """fp32 [N, D] on the CPU. Raises TableError."""
    raw = np.empty((len(row_ids), table.row_bytes), np.uint8)
    table.gather(row_ids, raw)
    values = torch.empty(len(row_ids), table.dim)
    if len(row_ids):
        table.row_type.decode(torch.from_numpy(raw), values)
    return values
