"""Cross-entropy over a large vocabulary at a fraction of its cost: candidates exactly, the rest by sampling.

    Z ≈ Σ_c exp l_c  +  (V - K) / S · Σ_s exp l_s       K candidates, S drawn anew for each step from the others

Candidates are all labels of the data and what the bare backbone likes best wherever something is learnt; the sampled
part estimates what is left of the partition sum without bias (importance sampling; Bengio & Senécal 2003). Where the
candidates are most of the vocabulary anyway, and whenever something is measured, all of it is computed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from server.training.frozen import Frozen

SAMPLED = 2048
LIKED = 8  # the backbone's best guesses per place that become candidates
WORTH = 0.5  # of the vocabulary: with more candidates than this, all of it is computed


class CandidateLoss:
    """`candidates`: distinct token ids; every label must be among them."""

    def __init__(self, frozen: Frozen, candidates: Tensor) -> None:
        self.head: Tensor = frozen.decoder.head.weight
        vocab = len(self.head)
        self.whole = len(candidates) + SAMPLED > WORTH * vocab
        if self.whole:
            return
        self.candidates = torch.unique(candidates).to(self.head.device)
        inside = torch.zeros(vocab, dtype=torch.bool, device=self.head.device)
        inside[self.candidates] = True
        self.others = (~inside).nonzero()[:, 0]
        self.place = torch.full((vocab,), -1, device=self.head.device)
        self.place[self.candidates] = torch.arange(len(self.candidates), device=self.head.device)
        self.weight = self.head[self.candidates]

    def __call__(self, normed: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """normed[N, H], labels[N] → (negative log-likelihoods [N], whether each label is the best candidate [N])."""
        if self.whole:
            return scores_of(F.linear(normed, self.head).float(), labels)
        drawn = torch.randint(len(self.others), (SAMPLED,), generator=generator).to(self.others.device)
        sampled = self.others[drawn]
        known = F.linear(normed, self.weight).float()
        rest = F.linear(normed, self.head[sampled]).float() + math.log(len(self.others) / SAMPLED)
        losses, _ = scores_of(torch.cat([known, rest], dim=1), self.place[labels])
        return losses, known.detach().argmax(1) == self.place[labels]


def scores_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Over all of `logits`: (negative log-likelihoods [N], whether each label is the best [N])."""
    return F.cross_entropy(logits, labels, reduction="none"), logits.detach().argmax(1) == labels
