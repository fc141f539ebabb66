"""Addresses on the device: which rows each token of a decode step reads, from the token table's copy there.

    tokens[R, pad + P] at (row_of[T], positions[T]) ─ one launch a pack ─→ per layer row_ids[T, C], keys[T, O]

The same bits as `addressing.py`'s on the host. Shapes: T tokens, L layers, O orders, C rows a token. Knows token ids
and constants; nothing of tables.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.ngram_hash import HashConstants, ngram_rows
from server.batch import DecodeBatch
from server.memory.addressing import Addresser, NGramAddresser


def hash_constants(addresser: NGramAddresser, device: torch.device) -> HashConstants:
    """The addresser's numbers as the hash kernel takes them."""
    rule = addresser.rule
    primes = torch.tensor(rule.primes, dtype=torch.int64)
    sizes = primes.flatten(1)
    lookup = None if rule.mapping is None else torch.tensor([*rule.mapping.tolist(), rule.pad], dtype=torch.int64)
    return HashConstants(
        multipliers=torch.tensor(rule.multipliers, dtype=torch.int64).to(device),
        primes=primes.to(device),
        offsets=(sizes.cumsum(1) - sizes).to(device),
        lookup=None if lookup is None else lookup.to(device),
        orders=rule.orders,
        ids=rule.ids,
        outside=rule.pad if rule.mapping is None else len(rule.mapping),
        boundary=-1 if rule.boundary is None else rule.boundary,
        oldest_first=rule.oldest_first,
    )


class DeviceAddresses:
    """One pack's. `keys`: int64 words on the device, `words` of them, that keep the last step's keys [L, T, O] from the
    first on; L is 1 for token ids, which are the same in every layer.
    """

    def __init__(self, addresser: Addresser, max_tokens: int, keys: Tensor) -> None:
        self.addresser, self._keys = addresser, keys
        self.constants = hash_constants(addresser, keys.device) if isinstance(addresser, NGramAddresser) else None
        self.tables = len(addresser.layer_ids) if self.constants is not None else 1
        with torch.inference_mode(False):
            self._rows = torch.zeros(
                self.tables * max_tokens * addresser.columns, dtype=torch.int64, device=keys.device
            )

    @staticmethod
    def words(addresser: Addresser, max_tokens: int) -> int:
        tables = len(addresser.layer_ids) if isinstance(addresser, NGramAddresser) else 1
        return tables * max_tokens * len(addresser.orders)

    def of(self, batch: DecodeBatch) -> dict[int, tuple[Tensor, Tensor]]:
        """Layer → (row_ids[T, C], keys[T, O]), rewritten by the next call. On the current stream; may be captured."""
        tokens, layers = batch.num_tokens, self.addresser.layer_ids
        shape = self.shape(tokens)
        keys = self._keys[: math.prod(shape)].view(shape)
        if self.constants is None:
            keys[0].copy_(batch.token_ids[:, None])
            return dict.fromkeys(layers, (keys[0], keys[0]))
        rows = self._rows[: self.tables * tokens * self.addresser.columns].view(self.tables, tokens, -1)
        ngram_rows(batch.tokens, batch.row_of, batch.positions, batch.pad, self.constants, (rows, keys))
        return {layer: (rows[index], keys[index]) for index, layer in enumerate(layers)}

    def shape(self, tokens: int) -> tuple[int, int, int]:
        """Of the keys [L, T, O] of a step, which lie from the first of the words on."""
        return self.tables, tokens, len(self.addresser.orders)
