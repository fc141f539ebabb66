"""The loss over candidates: exact where it is whole, without bias where the rest is sampled."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from server.training import loss
from server.training.frozen import Frozen
from server.training.loss import CandidateLoss

VOCAB, HIDDEN = 600, 16


@pytest.fixture
def head() -> Any:
    weight = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))
    return cast(Frozen, SimpleNamespace(decoder=SimpleNamespace(head=SimpleNamespace(weight=weight))))


@pytest.fixture
def states() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return 0.3 * torch.randn(8, HIDDEN, generator=generator), torch.randint(100, (8,), generator=generator)


def test_with_most_of_the_vocabulary_as_candidates_it_is_cross_entropy(
    head: Any, states: tuple[torch.Tensor, torch.Tensor]
) -> None:
    normed, labels = states
    found, right = CandidateLoss(head, torch.arange(VOCAB))(normed, labels, torch.Generator())
    logits = normed @ head.decoder.head.weight.T
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, reduction="none"))
    assert torch.equal(right, logits.argmax(1) == labels)


def test_the_sampled_part_of_the_partition_sum_is_right_on_average(
    head: Any, states: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "SAMPLED", 50)
    normed, labels = states
    candidates = CandidateLoss(head, torch.arange(100))
    assert not candidates.whole
    logits = (normed @ head.decoder.head.weight.T).double()
    chosen = logits.gather(1, labels[:, None])[:, 0]
    generator = torch.Generator().manual_seed(2)
    sums = [torch.exp(candidates(normed, labels, generator)[0].double() + chosen) for _ in range(4000)]
    # the mean of 4,000 draws of 50 of 500 terms each, whose spread is below 15 % a draw
    torch.testing.assert_close(torch.stack(sums).mean(0), logits.exp().sum(1), rtol=0.02, atol=0)


def test_draws_depend_on_the_generator_alone(
    head: Any, states: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "SAMPLED", 50)
    candidates = CandidateLoss(head, torch.arange(100))
    found = [candidates(*states, torch.Generator().manual_seed(seed))[0] for seed in (7, 7, 8)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
