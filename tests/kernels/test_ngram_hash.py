"""The hash kernel against the addresser of each family, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import language
from kernels.ngram_hash import HashConstants, ngram_rows, reference
from server.memory.addressing import NGramAddresser, windows_of
from server.memory.families import NGramRule


def rule(
    *, oldest_first: bool = False, boundary: int | None = None, compress: bool = False, seed: int = 0
) -> NGramRule:
    generator = np.random.default_rng(seed)
    mapping = generator.integers(0, 40, 64) if compress else None
    vocab = 40 if compress else 64
    orders, heads = (2, 3, 4), 5
    primes = tuple(
        tuple(tuple(int(p) for p in generator.choice([101, 103, 107, 109, 113, 127], heads)) for _ in orders)
        for _ in range(2)
    )
    return NGramRule(
        layer_ids=(1, 5),
        orders=orders,
        heads=heads,
        vocab=vocab,
        ids=64,
        pad=3,
        multipliers=tuple(tuple(int(m) | 1 for m in generator.integers(1, 1 << 50, 4)) for _ in range(2)),
        primes=primes,
        rows=tuple(sum(map(sum, each)) for each in primes),
        mapping=mapping,
        boundary=boundary,
        oldest_first=oldest_first,
    )


def constants_of(rule: NGramRule) -> HashConstants:
    primes = torch.tensor(rule.primes)
    flat = primes.view(len(rule.layer_ids), -1)
    lookup = None if rule.mapping is None else torch.from_numpy(np.append(rule.mapping, rule.pad))
    return HashConstants(
        multipliers=torch.tensor(rule.multipliers),
        primes=primes,
        offsets=flat.cumsum(1) - flat,
        lookup=lookup,
        orders=rule.orders,
        ids=rule.ids,
        outside=rule.pad if lookup is None else rule.ids,
        boundary=-1 if rule.boundary is None else rule.boundary,
        oldest_first=rule.oldest_first,
    )


def on_torch(*args):
    """The dispatcher where kernels do not run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "interpreting", False)
        return ngram_rows(*args)


@pytest.mark.parametrize("implementation", [ngram_rows, reference])
@pytest.mark.parametrize(
    "made", [rule(), rule(compress=True), rule(boundary=7), rule(oldest_first=True, compress=True)]
)
def test_rows_and_mixes_are_the_addressers(implementation, made: NGramRule) -> None:
    generator = np.random.default_rng(1)
    sequences = [generator.integers(-2, 68, length) for length in (1, 2, 70, 9)]  # unknown ids at both ends included
    sequences[2][::5] = 7
    table = torch.zeros(4, 3 + 70, dtype=torch.int64)
    for row, ids in enumerate(sequences):
        table[row, 3 : 3 + len(ids)] = torch.from_numpy(ids)
    row_of = torch.tensor([row for row, ids in enumerate(sequences) for _ in ids])
    positions = torch.tensor([at for ids in sequences for at in range(len(ids))])
    rows, mix = implementation(table, row_of, positions, 3, constants_of(made))
    addresser = NGramAddresser(made)
    windows, blocked = (np.concatenate(parts) for parts in zip(*(windows_of(ids, 4) for ids in sequences), strict=True))
    for index, layer in enumerate(made.layer_ids):
        assert np.array_equal(rows[index].numpy(), addresser.rows(layer, windows, blocked))
        assert np.array_equal(mix[index].numpy(), addresser.mix(layer, windows, blocked))


@pytest.mark.parametrize("implementation", [ngram_rows, on_torch], ids=["kernel", "reference"])
def test_rows_and_mixes_are_written_where_asked(implementation) -> None:
    constants, table = constants_of(rule()), torch.randint(0, 64, (1, 9))
    row_of, positions = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 2, 5])
    expected = reference(table, row_of, positions, 3, constants)
    into = torch.full((2, 3, 15), -1), torch.full((2, 3, 3), -1)
    given = implementation(table, row_of, positions, 3, constants, into)
    for out, made, wanted in zip(into, given, expected, strict=True):
        assert out is made and torch.equal(out, wanted)
