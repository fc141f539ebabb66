"""Trained rows: Adam as published, on touched rows only."""

from __future__ import annotations

import numpy as np
import torch

from server.training.rows import BETAS, EPS, TrainedRows


def some_rows() -> TrainedRows:
    torch.manual_seed(0)
    return TrainedRows(torch.randn(5, 4), taught=np.array([3, 8, 11]), read=np.array([5, 20]))


def test_rows_touched_by_every_step_move_as_torchs_adam_moves_them() -> None:
    rows = some_rows()
    reference = torch.nn.Parameter(rows.values[:3].clone())
    adam = torch.optim.Adam([reference], lr=0.1, betas=BETAS, eps=EPS)
    for step in range(5):
        gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        reference.grad = gradient.clone()
        adam.step()
        rows.update(torch.arange(3), gradient, 0.1)
    # the same formula in another order of operations: a few units in the last place
    torch.testing.assert_close(rows.values[:3], reference.detach(), rtol=1e-5, atol=1e-6)


def test_a_row_that_a_step_does_not_touch_keeps_value_and_moments() -> None:
    rows = some_rows()
    before = rows.values.clone()
    rows.update(torch.tensor([0, 2]), torch.ones(2, 4), 0.1)
    assert torch.equal(rows.values[1], before[1])
    assert not rows.mean[1].any() and not rows.square[1].any() and rows.touches[1] == 0
    assert not torch.equal(rows.values[0], before[0])


def test_rows_only_read_never_change() -> None:
    rows = some_rows()
    before = rows.values.clone()
    rows.update(torch.tensor([1, 3, 4]), torch.ones(3, 4), 0.1)
    assert torch.equal(rows.values[3:], before[3:])


def test_the_bias_correction_counts_a_rows_own_touches() -> None:
    often, seldom = some_rows(), some_rows()
    for _ in range(7):
        often.update(torch.tensor([0]), torch.ones(1, 4), 0.1)
    seldom.update(torch.tensor([0]), torch.ones(1, 4), 0.1)
    often.update(torch.tensor([1]), torch.ones(1, 4), 0.1)
    seldom.update(torch.tensor([1]), torch.ones(1, 4), 0.1)
    assert torch.equal(often.values[1], seldom.values[1])


def test_places_lead_from_row_ids_to_their_masters() -> None:
    rows = some_rows()
    assert rows.places(np.array([[11, 5], [3, 20]])).tolist() == [[2, 3], [0, 4]]
