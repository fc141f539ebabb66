"""The sampler: one token per row of logits, vectorised over rows, the noise keyed by (seed, position).

    logits ─ bias, penalties, min_tokens, grammar ─► greedy rows: argmax
                                                 └► others: / temperature ─ filters ─ inverse CDF at u(seed, pos)

Sampling reads the cumulative distribution of what the filters keep, in the vocabulary's order, at one uniform number:
batch composition cannot change the draw, and a decode step on a GPU (`kernels/sampling.py`) makes the same. Of equally
likely tokens at a filter's edge the first in the vocabulary stay. Log-probabilities are those of the model's own
logits, before any of the above.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import language
from kernels import sampling as kernel
from server.runtime.grammar import constrain_
from server.runtime.messages import Logprobs
from server.runtime.philox import uniform
from server.runtime.sequence import Sequence

# Sorting a whole vocabulary costs milliseconds per row; the most likely tokens nearly always hold all the mass that
# top-p keeps. Where they do not, the row is sorted whole.
SHORTLIST = 512
LEAST_SHARE = 1e-9  # a top_p of 0 in fp32 would keep nothing on a device


@dataclass(frozen=True, slots=True)
class Sampled:
    token_id: int
    logprobs: Logprobs | None


def sample(logits: Tensor, sequences: list[Sequence]) -> list[Sampled]:
    """logits[N, V] fp32, one row per sequence whose next token is wanted → N tokens. `logits` is overwritten."""
    wanted = [i for i, s in enumerate(sequences) if s.params.logprobs is not None]
    raw = torch.log_softmax(logits[wanted], dim=-1) if wanted else None
    adjust_(logits, sequences)
    constrain_(logits, sequences)
    tokens = logits.max(dim=-1).indices  # twice as fast as argmax on CPU
    drawn = [i for i, s in enumerate(sequences) if s.params.temperature > 0]
    if drawn:
        tokens[drawn] = draw(logits if len(drawn) == len(sequences) else logits[drawn], [sequences[i] for i in drawn])
    ids = tokens.tolist()
    logprobs: dict[int, Logprobs] = {}
    if raw is not None:
        chosen = [ids[i] for i in wanted]
        counts = [sequences[i].params.logprobs or 0 for i in wanted]
        logprobs = dict(zip(wanted, describe(raw, chosen, counts), strict=True))
    return [Sampled(token, logprobs.get(i)) for i, token in enumerate(ids)]


def adjust_(logits: Tensor, sequences: list[Sequence]) -> None:
    """Logit bias, penalties and min_tokens, in place, for the rows that ask for them.

    Presence and frequency count generated tokens, repetition the prompt's as well (the meaning vLLM gives them).
    """
    for row, sequence in zip(logits, sequences, strict=True):
        params = sequence.params
        if params.logit_bias:
            ids, bias = zip(*params.logit_bias, strict=True)
            row[list(ids)] += torch.tensor(bias, dtype=row.dtype, device=row.device)
        if params.repetition_penalty != 1.0:
            seen = torch.from_numpy(np.unique(sequence.tokens[: sequence.length])).to(row.device)
            values = row[seen]
            row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        if (params.presence_penalty or params.frequency_penalty) and sequence.generated:
            generated = sequence.tokens[sequence.prompt_len : sequence.length]
            ids_, counts = (torch.from_numpy(a).to(row.device) for a in np.unique(generated, return_counts=True))
            row[ids_] -= params.presence_penalty + params.frequency_penalty * counts.to(row.dtype)
        if sequence.generated < params.min_tokens and sequence.stop_ids and sequence.constraint is None:
            row[[i for i in sequence.stop_ids if i < row.numel()]] = -torch.inf


def draw(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """One token per row of logits[N, V] at temperature > 0 → int64 [N]."""
    if logits.is_cuda and language.available:
        return draw_on_device(logits, sequences)
    device = logits.device
    vocab = logits.shape[1]
    temperature = torch.tensor([s.params.temperature for s in sequences], dtype=logits.dtype, device=device)
    probabilities = torch.softmax(logits / temperature[:, None], dim=-1)
    u = uniform(np.array([s.seed for s in sequences], np.uint64), np.array([s.length for s in sequences], np.uint64))
    points = torch.from_numpy(u).to(device)
    tokens = torch.empty(len(sequences), dtype=torch.int64, device=device)
    plain = [i for i, s in enumerate(sequences) if not is_filtered(s, vocab)]
    if plain:
        tokens[plain] = _invert(probabilities[plain].double().cumsum(-1), points[plain])
    for i, sequence in enumerate(sequences):
        if is_filtered(sequence, vocab):
            tokens[i] = _draw_filtered(probabilities[i], sequence, points[i])
    return tokens


def draw_on_device(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """The same by the kernel of decode steps."""
    params, device = [sequence.params for sequence in sequences], logits.device
    return kernel.sample(
        logits,
        torch.tensor([each.temperature for each in params], device=device),
        torch.tensor([sequence.seed for sequence in sequences], dtype=torch.uint64).view(torch.int64).to(device),
        torch.tensor([sequence.length for sequence in sequences], device=device),
        kernel.Filters(
            torch.tensor([each.top_k or logits.shape[1] for each in params], device=device),
            torch.tensor([max(each.top_p, LEAST_SHARE) for each in params], device=device),
            torch.tensor([each.min_p for each in params], device=device),
        ),
    )


def is_plain(sequence: Sequence) -> bool:
    """Whether its next token is the largest of the model's own logits, or drawn from them, filtered or not, and nothing
    more is asked for."""
    params = sequence.params
    return (
        sequence.constraint is None
        and params.logprobs is None
        and not params.logit_bias
        and params.repetition_penalty == 1.0
        and not params.presence_penalty
        and not params.frequency_penalty
        and not (sequence.generated < params.min_tokens and sequence.stop_ids)
    )


def is_filtered(sequence: Sequence, vocab: int) -> bool:
    params = sequence.params
    return 0 < params.top_k < vocab or params.top_p < 1.0 or params.min_p > 0.0


def _draw_filtered(probabilities: Tensor, sequence: Sequence, point: Tensor) -> Tensor:
    """Keeps the k most likely; of these, those above min_p · the best; of these, the least that hold top_p."""
    params, vocab = sequence.params, probabilities.numel()
    limit = params.top_k if 0 < params.top_k < vocab else vocab
    values, ids = probabilities.topk(min(limit, SHORTLIST))
    kept = _kept(values, params.top_p, params.min_p, 1.0)
    if limit > SHORTLIST and kept == values.numel():
        values, ids = probabilities.topk(limit)
        kept = _kept(values, params.top_p, params.min_p, 1.0)
    if limit < vocab:
        kept = _kept(values, params.top_p, params.min_p, float(values.double().sum()))
    chosen = _first_of_equals(probabilities, values, ids, kept).sort().values
    cumulative = probabilities[chosen].double().cumsum(-1)
    return chosen[_invert(cumulative[None], point[None])[0]]


def _first_of_equals(probabilities: Tensor, values: Tensor, ids: Tensor, kept: int) -> Tensor:
    """ids[kept] of the most likely tokens; `topk` may have taken any of those that are as likely as the last."""
    last = values[kept - 1]
    surely = int((values[:kept] > last).sum())
    if surely == kept - 1 and (kept < len(values) and values[kept] < last):
        return ids[:kept]
    equals = (probabilities == last).nonzero()[:, 0]
    return torch.cat((ids[:surely], equals[: kept - surely]))


def _kept(values: Tensor, top_p: float, min_p: float, total: float) -> int:
    """How many of the descending `values` survive min_p and top_p; `total` is the mass they were chosen from."""
    count = int((values >= min_p * values[0]).sum()) if min_p > 0 else values.numel()
    if top_p < 1.0:
        before = values[:count].double().cumsum(-1) - values[:count]
        count = int((before < top_p * total).sum())
    return max(count, 1)


def _invert(cumulative: Tensor, points: Tensor) -> Tensor:
    """The first index whose cumulative mass [N, K] passes point · total, per row."""
    targets = points[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp_(max=cumulative.shape[1] - 1)


def describe(logprobs: Tensor, chosen: list[int], counts: list[int]) -> list[Logprobs]:
    """Log-probability, rank and the most likely alternatives of one chosen token per row of logprobs[N, V]."""
    picked = torch.tensor(chosen, device=logprobs.device)[:, None]
    own = logprobs.gather(1, picked)
    ranks = (logprobs > own).sum(-1).add_(1).tolist()
    most = max(counts)
    values, ids = logprobs.topk(most, dim=-1) if most else (logprobs[:, :0], picked[:, :0])
    tops = [
        tuple(zip(i[:k], v[:k], strict=True)) for i, v, k in zip(ids.tolist(), values.tolist(), counts, strict=True)
    ]
    return [Logprobs(*row) for row in zip(chosen, own[:, 0].tolist(), ranks, tops, strict=True)]
