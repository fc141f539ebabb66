"""Addressers: which rows a token reads, as a pure function of the token ids that end at it.

    windows[T, n] ─ latch ─ compress ─ · multipliers ─ XOR ─→ mix[T, O] ─ mod primes ─ + offsets ─→ rows[T, C]

Shapes: T tokens, n the longest n-gram, O orders, C = O · heads rows a token (order by order, head by head), one table a
layer. windows: raw ids, column s the s-th predecessor; blocked: before the sequence's start, or a token that takes part
in no n-gram. Three rules hold for every hashed family:

    latch       from the first blocked position backwards every id reads as the pad; a blocked token itself too
    boundary    a look-back that meets the boundary id (Qwen's EOS) reads it and all before it as the pad
    unknown     a negative id, or one past the vocabulary, counts as blocked

NumPy arrays and torch tensors go through the same operators, on any device, to the same bits; int64 throughout. Knows
token ids and constants; nothing of tables, sequences or models. Source: arXiv 2601.07372 and the released code of its
families (`families.py`).
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from server.batch import Bools, Ints
from server.memory.families import NGramRule, Primes, TokenIdRule, rule_of

if TYPE_CHECKING:
    from torch import Tensor

Ids = TypeVar("Ids", Ints, "Tensor")


class Addresser(ABC):
    """Token ids → row ids. Layer ids are 0-based block indices, in table order.

    orders, heads        n-gram lengths, and hashes of each; token-id tables: (1,), 1
    columns, n           C rows a token reads per layer; ids a window must hold
    rows_per_table       rows of each layer's table, padding included
    primes, multipliers  per layer: [order][head], [look-back]; empty for token-id tables
    compressed_vocab     number of distinct ids that are hashed, or rows of a token-id table
    """

    layer_ids: tuple[int, ...]
    orders: tuple[int, ...]
    heads: int
    columns: int
    n: int
    rows_per_table: dict[int, int]
    primes: dict[int, Primes]
    multipliers: dict[int, tuple[int, ...]]
    compressed_vocab: int

    @abstractmethod
    def address(self, windows: Ids, blocked: Any) -> Mapping[int, tuple[Ids, Ids]]:
        """Per layer (rows int64[T, C], mix int64[T, O]), all layers in one pass.

        windows[T, n'] and blocked[T, n'] with n' ≥ n. Raises ValueError for shorter windows.
        """

    @abstractmethod
    def rows(self, layer_id: int, windows: Ids, blocked: Any) -> Ids:
        """int64[T, C] absolute row ids in the layer's table. Raises KeyError for a layer without one."""

    @abstractmethod
    def mix(self, layer_id: int, windows: Ids, blocked: Any) -> Ids:
        """int64[T, O] the hash before the modulus, one per order: equal mixes read equal rows."""

    @abstractmethod
    def rows_of_mix(self, layer_id: int, order: int, mix: Ints) -> Ints:
        """int64[M, heads] the rows of mix[M], all of one order: those that `rows` gives an n-gram of this hash.

        A mix that no token-id table can have leads past its end. Raises KeyError for a layer without a table.
        """


def from_config(config: Mapping[str, Any], *, tokenizer: Any = None) -> Addresser:
    """The addresser of a checkpoint's or pack's config; `families.py` lists the field names.

    With a tokenizer, windows hold raw ids; without, ids and pad count as compressed already, and the config must give
    the compressed size. Raises PackError, with both numbers, for sizes that do not agree.
    """
    rule = rule_of(config, tokenizer)
    return TokenIdAddresser(rule) if isinstance(rule, TokenIdRule) else NGramAddresser(rule)


def windows_of(
    ids: Sequence[int] | Ints, n: int, dead: Sequence[bool] | Bools | None = None, boundary: int | Bools | None = None
) -> tuple[Ints, Bools]:
    """A whole sequence's windows int64[T, n] and blocked bool[T, n], as one prefill sees it.

    `dead[T]`: tokens that take part in no n-gram. `boundary`: an id, or bool[T], at which look-backs end: blocked for
    the tokens after it, not for itself. Places before the start hold 0 and are blocked.
    """
    tokens = np.asarray(ids, np.int64)
    at = np.arange(len(tokens))[:, None] - np.arange(n)
    blocked = at < 0
    at = np.maximum(at, 0)
    windows = np.where(blocked, 0, tokens[at])
    if dead is not None:
        blocked |= np.asarray(dead, bool)[at]
    if boundary is not None:
        ends = np.asarray(tokens == boundary if isinstance(boundary, (int, np.integer)) else boundary, bool)
        blocked[:, 1:] |= ends[at[:, 1:]]
    return windows, blocked


@dataclass(frozen=True, slots=True)
class Constants:
    """A rule's numbers as arrays of the kind and on the device of the ids, for L layers.

    multipliers [n, L, 1]; primes [L, 1, O, heads]; offsets [L, 1, C]; lookup [ids + 1], its last entry the pad.
    """

    xp: Any
    multipliers: Any
    primes: Any
    offsets: Any
    lookup: Any


class NGramAddresser(Addresser):
    """The multiply-XOR-mod hash of every Engram family, from its rule."""

    def __init__(self, rule: NGramRule) -> None:
        self.rule = rule
        self.layer_ids, self.orders, self.heads = rule.layer_ids, rule.orders, rule.heads
        self.columns, self.n = len(rule.orders) * rule.heads, max(rule.orders)
        self.rows_per_table = dict(zip(rule.layer_ids, rule.rows, strict=True))
        self.primes = dict(zip(rule.layer_ids, rule.primes, strict=True))
        self.multipliers = dict(zip(rule.layer_ids, rule.multipliers, strict=True))
        self.compressed_vocab, self.pad, self.boundary = rule.vocab, rule.pad, rule.boundary
        self._lookup = None if rule.mapping is None else np.append(rule.mapping, rule.pad)
        self._outside = rule.pad if rule.mapping is None else len(rule.mapping)  # what a blocked place reads
        contiguous = self.orders == tuple(range(self.orders[0], self.n + 1))
        self._planes = slice(self.orders[0] - 1, self.n) if contiguous else [order - 1 for order in self.orders]
        self._constants: dict[tuple[Any, int | None], Constants] = {}

    def address(self, windows: Ids, blocked: Any) -> Mapping[int, tuple[Ids, Ids]]:
        constants = self._constants_for(windows, None)
        mix = self._mix(windows, blocked, constants)
        rows = self._rows(mix, constants)
        return {layer: (rows[index], mix[index]) for index, layer in enumerate(self.layer_ids)}

    def rows(self, layer_id: int, windows: Ids, blocked: Any) -> Ids:
        constants = self._constants_for(windows, layer_id)
        return cast(Ids, self._rows(self._mix(windows, blocked, constants), constants)[0])

    def mix(self, layer_id: int, windows: Ids, blocked: Any) -> Ids:
        return cast(Ids, self._mix(windows, blocked, self._constants_for(windows, layer_id))[0])

    def rows_of_mix(self, layer_id: int, order: int, mix: Ints) -> Ints:
        primes = np.array(self.primes[layer_id], np.int64)
        index = self.orders.index(order)
        before = int(primes[:index].sum())
        sizes = primes[index]
        rows: Ints = mix[:, None] % sizes + (before + np.cumsum(sizes) - sizes)
        return rows

    def _hashed_ids(self, windows: Any, blocked: Any, constants: Constants) -> Any:
        """[T, n] compressed ids, the pad wherever the three rules put it."""
        if windows.shape[1] < self.n:
            raise ValueError(f"windows hold {windows.shape[1]} ids; this memory looks at {self.n}")
        windows = windows[:, : self.n]
        out = blocked[:, : self.n] | (windows < 0) | (windows >= self.rule.ids)
        if self.boundary is not None:
            out[:, 1:] |= windows[:, 1:] == self.boundary
        for place in range(1, self.n):
            out[:, place] |= out[:, place - 1]
        known = constants.xp.where(out, self._outside, windows)
        return known if constants.lookup is None else constants.lookup[known]

    def _mix(self, windows: Any, blocked: Any, constants: Constants) -> Any:
        """[L, T, O]. One plane a look-back: planes[s] becomes the hash of the window's first s + 1 ids."""
        ids = self._hashed_ids(windows, blocked, constants)
        if self.rule.oldest_first:
            ids = constants.xp.flip(ids, (1,))
        planes = ids.T[:, None] * constants.multipliers
        for place in range(1, self.n):
            planes[place] ^= planes[place - 1]
        return planes[self._planes].swapaxes(0, 1).swapaxes(1, 2)

    def _rows(self, mix: Any, constants: Constants) -> Any:
        """[L, T, C]. `%` takes the divisor's sign in NumPy and torch alike."""
        rows = (mix[..., None] % constants.primes).reshape(*mix.shape[:2], self.columns)
        rows += constants.offsets
        return rows

    def _constants_for(self, ids: Any, layer_id: int | None) -> Constants:
        """For one layer, or for all of them."""
        device = None if isinstance(ids, np.ndarray) else ids.device
        key = (device, layer_id)
        if key not in self._constants:
            self._constants[key] = self._make_constants(device, layer_id)
        return self._constants[key]

    def _make_constants(self, device: Any, layer_id: int | None) -> Constants:
        layers = self.layer_ids if layer_id is None else (layer_id,)
        torch: Any = None if device is None else sys.modules["torch"]  # who holds a tensor has imported it

        def array(values: Any) -> Any:
            made = np.array(values, np.int64)
            return made if device is None else torch.from_numpy(made).to(device)

        primes = np.array([self.primes[layer] for layer in layers], np.int64)
        sizes = primes.reshape(len(layers), 1, self.columns)
        return Constants(
            xp=np if device is None else torch,
            multipliers=array(list(zip(*(self.multipliers[layer] for layer in layers), strict=True)))[..., None],
            primes=array(primes[:, None]),
            offsets=array(np.cumsum(sizes, axis=-1) - sizes),
            lookup=None if self._lookup is None else array(self._lookup),
        )


class TokenIdAddresser(Addresser):
    """Row = token id; nothing is blocked, and an id past the table is left to the table to refuse."""

    def __init__(self, rule: TokenIdRule) -> None:
        self.layer_ids, self.compressed_vocab = rule.layer_ids, rule.vocab
        self.orders, self.heads, self.columns, self.n = (1,), 1, 1, 1
        self.rows_per_table = dict.fromkeys(rule.layer_ids, rule.vocab)
        self.primes, self.multipliers = {}, {}

    def address(self, windows: Ids, blocked: Any) -> Mapping[int, tuple[Ids, Ids]]:
        ids = windows[:, :1]
        return dict.fromkeys(self.layer_ids, (ids, ids))

    def rows(self, layer_id: int, windows: Ids, blocked: Any) -> Ids:
        if layer_id not in self.rows_per_table:
            raise KeyError(layer_id)
        return windows[:, :1]

    def mix(self, layer_id: int, windows: Ids, blocked: Any) -> Ids:
        return self.rows(layer_id, windows, blocked)

    def rows_of_mix(self, layer_id: int, order: int, mix: Ints) -> Ints:
        if layer_id not in self.rows_per_table:
            raise KeyError(layer_id)
        return mix[:, None]
