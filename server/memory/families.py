"""Families: how each kind of checkpoint writes down the rule that turns token ids into row ids.

    rule_of(config, tokenizer=...) -> NGramRule | TokenIdRule

The family is told by its field names, in a checkpoint's own `config.json` (or its `text_config`):

    family         known by                      layer ids        base rows per head       ids        starts anew at
    paper, demo    max_ngram_size + layer_ids    0-based          engram_vocab_size        compressed
    DeepSeek-V4.1  engram_layer_ids              0-based          engram_vocab_size        compressed
    Qwen PLE       ple_layer_ids                 1-based, sorted  ngram_vocab_size_base    raw        EOS
    engram-peft    engram_vocab_size_per_ngram   0-based, sorted  that size // heads       compressed
    token id       stem_layers + vocab_size      0-based          -                        raw

`engram_vocab_size` is one int or one per order. Everything a rule holds is already compressed, 0-based and checked
against what the config promises: a table read at wrong addresses would be silently wrong. Knows no arrays and no
tables. Sources: the demo released with arXiv 2601.07372; the configs of DeepSeek-V4.1-Flash and Qwen3.8-Flash-Next;
engram-peft 1.2.7; for token ids arXiv 2601.10639.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from server.errors import PackError
from server.memory.compression import compression_map, rust_backend
from server.memory.constants import INT64_MAX, PrimeWalk, drawn_multipliers, split_multipliers

MOST_HEADS = 8192  # of all layers and orders together: their primes are searched for, a second's work

Config = Mapping[str, Any]
Primes = tuple[tuple[int, ...], ...]  # [order][head]


@dataclass(frozen=True, slots=True)
class NGramRule:
    """mix = x_0·m_0 XOR x_1·m_1 …, row = mix mod prime + offset. One table a layer, `layer_ids` in table order.

    `vocab`: size that the multipliers were drawn for (V'). `ids`: ids below it are addressable; others count as
    blocked. `mapping`: raw id → compressed, [ids], or None where ids come as they are hashed. `boundary`: a look-back
    ends at this id. `rows`: per table, padding included. `oldest_first`: x_0 is the window's oldest id, not its newest.
    """

    layer_ids: tuple[int, ...]
    orders: tuple[int, ...]
    heads: int
    vocab: int
    ids: int
    pad: int
    multipliers: tuple[tuple[int, ...], ...]
    primes: tuple[Primes, ...]
    rows: tuple[int, ...]
    mapping: npt.NDArray[np.int64] | None = None
    boundary: int | None = None
    oldest_first: bool = False


@dataclass(frozen=True, slots=True)
class TokenIdRule:
    """Row = token id, the same in the tables of all `layer_ids`."""

    layer_ids: tuple[int, ...]
    vocab: int


def rule_of(config: Config, tokenizer: Any = None) -> NGramRule | TokenIdRule:
    """The rule a config states. `tokenizer`: compress raw ids with it; None: ids and pad come compressed.

    Raises PackError for a config of no known family, a missing or impossible field, and promises that do not hold.
    """
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        config = {**config, **{name: value for name, value in inner.items() if value is not None}}
    if config.get("engram_vocab_size_per_ngram") is not None:
        return peft_rule(config, tokenizer)
    if config.get("engram_layer_ids") is not None:
        return deepseek_rule(config, tokenizer)
    if config.get("ple_layer_ids") is not None:
        return qwen_rule(config)
    if config.get("layer_ids") is not None and config.get("max_ngram_size") is not None:
        return paper_rule(config, tokenizer)
    if config.get("stem_layers") is not None:
        return TokenIdRule(layers_in(config, "stem_layers"), integer(config, "vocab_size", least=1))
    raise PackError(
        "this config names no memory addressed by token ids; it needs one of max_ngram_size with layer_ids, "
        "engram_layer_ids, ple_layer_ids, engram_vocab_size_per_ngram or stem_layers"
    )


def paper_rule(config: Config, tokenizer: Any) -> NGramRule:
    orders = tuple(range(2, integer(config, "max_ngram_size", least=2, most=64) + 1))
    layers, heads = layers_in(config, "layer_ids"), integer(config, "n_head_per_ngram", least=1, most=4096)
    bases = per_order(config, "engram_vocab_size", len(orders))
    mapping, vocab = compressed(config, "compressed_vocab_size", tokenizer)
    pad = pad_in(config, "pad_id", mapping, vocab)
    rule = hashed(layers, orders, heads, bases, vocab, pad, mapping, integer(config, "seed", default=0))
    return stored_multipliers(stored_primes(rule, config), config)


def deepseek_rule(config: Config, tokenizer: Any) -> NGramRule:
    """Released tables name their row counts: the sums of the primes must be those."""
    orders = tuple(range(2, integer(config, "engram_max_ngram_size", least=2, most=64) + 1))
    layers, heads = layers_in(config, "engram_layer_ids"), integer(config, "engram_n_heads", least=1, most=4096)
    bases = per_order(config, "engram_vocab_size", len(orders))
    mapping, vocab = compressed(config, "engram_compressed_vocab_size", tokenizer)
    pad = pad_in(config, "engram_pad_token_id", mapping, vocab)
    rule = hashed(layers, orders, heads, bases, vocab, pad, mapping, integer(config, "seed", default=0))
    promised = integers(config, "engram_num_embeddings")
    if promised != rule.rows:
        raise PackError(
            f"engram_num_embeddings is {listed(promised)}; the primes from engram_vocab_size "
            f"{config['engram_vocab_size']} sum to {listed(rule.rows)}: the tables would be read at wrong rows"
        )
    return stored_multipliers(stored_primes(rule, config), config)


def qwen_rule(config: Config) -> NGramRule:
    """Raw ids. Layers count from 1, and their multipliers from the first layer that has a table."""
    layers = tuple(sorted(layer - 1 for layer in layers_in(config, "ple_layer_ids", least=1)))
    orders = tuple(range(2, integer(config, "ngram_size", least=2, most=64) + 1))
    heads, vocab = integer(config, "heads_per_ngram", least=1, most=4096), integer(config, "vocab_size", least=1)
    base, seed = integer(config, "ngram_vocab_size_base", least=1), integer(config, "seed", default=1234)
    check_heads(layers, orders, heads)
    eos = integers(config, "eos_token_id")[0]
    if not 0 <= eos < vocab:
        raise PackError(f"eos_token_id is {eos}; it must be an id below vocab_size {vocab}")
    walk = PrimeWalk()
    primes = tuple(tuple(walk.take(base, heads) for _ in orders) for _ in layers)
    divisor = integer(config, "make_ngram_vocab_size_divisible_by", least=1, default=128)
    rule = NGramRule(
        layer_ids=layers,
        orders=orders,
        heads=heads,
        vocab=vocab,
        ids=vocab,
        pad=eos,
        boundary=eos,
        multipliers=tuple(split_multipliers(seed, ordinal, max(orders), vocab) for ordinal in range(len(layers))),
        primes=primes,
        rows=tuple(-(-total(layer) // divisor) * divisor for layer in primes),
    )
    return stored_multipliers(stored_primes(rule, config), config)


def peft_rule(config: Config, tokenizer: Any) -> NGramRule:
    """Two ways of the library's own, kept to the bit because its tables were trained with them:

    it compresses base tokens only (an added token's id, and any id with compression off, stays as it is), and it counts
    a window from its oldest id, so that of windows of 3 the 2-gram holds the two ids before the current one.
    """
    if config.get("engine", "deepseek") != "deepseek":
        raise PackError(f"engine is {config['engine']!r}; of engram-peft's engines this server reads 'deepseek'")
    orders = integers(config, "ngram_sizes") if config.get("ngram_sizes") is not None else (2, 3)
    if min(orders) < 1 or max(orders) > 64 or len(set(orders)) != len(orders):
        raise PackError(f"ngram_sizes is {listed(orders)}; it needs distinct orders from 1 to 64")
    layers, heads = layers_in(config, "target_layers"), integer(config, "n_head_per_ngram", least=1, most=4096)
    bases = tuple(size // heads for size in per_order(config, "engram_vocab_size_per_ngram", len(orders)))
    compresses = config.get("enable_tokenizer_compression", True)
    mapping, vocab = compressed(config, "compressed_vocab_size", tokenizer if compresses else None, base_only=True)
    pad = pad_in(config, "pad_id", mapping, INT64_MAX)
    seed = integer(config, "seed", default=0)
    rule = replace(
        hashed(tuple(sorted(layers)), orders, heads, bases, vocab, pad, mapping, seed),
        ids=INT64_MAX if mapping is None else len(mapping),
        oldest_first=True,
    )
    return stored_multipliers(stored_primes(rule, config), config)


def hashed(
    layers: tuple[int, ...],
    orders: tuple[int, ...],
    heads: int,
    bases: tuple[int, ...],
    vocab: int,
    pad: int,
    mapping: npt.NDArray[np.int64] | None,
    seed: int,
) -> NGramRule:
    """The paper's rule: one walk over the primes for the whole model, layers outermost, then orders."""
    check_heads(layers, orders, heads)
    walk = PrimeWalk()
    primes = tuple(tuple(walk.take(base, heads) for base in bases) for _ in layers)
    return NGramRule(
        layer_ids=layers,
        orders=orders,
        heads=heads,
        vocab=vocab,
        ids=vocab if mapping is None else len(mapping),
        pad=pad,
        mapping=mapping,
        multipliers=tuple(drawn_multipliers(seed, layer, max(orders), vocab) for layer in layers),
        primes=primes,
        rows=tuple(total(layer) for layer in primes),
    )


def check_heads(layers: Sequence[int], orders: Sequence[int], heads: int) -> None:
    """Raises PackError for more heads than a memory has: a prime of their own each would take a while to find."""
    asked = len(layers) * len(orders) * heads
    if asked > MOST_HEADS:
        raise PackError(
            f"the memory has {len(layers)} layers of {len(orders)} orders of {heads} heads, {asked} heads in all; "
            f"at most {MOST_HEADS} are read"
        )


def stored_primes(rule: NGramRule, config: Config) -> NGramRule:
    """Primes a pack ships must be those its sizes give, layer by layer and head by head."""
    if config.get("primes") is None:
        return rule
    for layer, computed in zip(rule.layer_ids, rule.primes, strict=True):
        stored = by_layer(config, "primes", layer)
        flat = [prime for order in stored for prime in (order if isinstance(order, Sequence) else [order])]
        for prime in flat:
            integer({"primes": prime}, "primes", least=1)
        expected = [prime for order in computed for prime in order]
        if flat != expected:
            raise PackError(
                f"primes of layer {layer} are {len(flat)} that sum to {sum(flat)}; its sizes give {len(expected)} "
                f"that sum to {sum(expected)}, from {expected[0]} to {expected[-1]}"
            )
    return rule


def stored_multipliers(rule: NGramRule, config: Config) -> NGramRule:
    """Multipliers a pack ships are used: NumPy does not promise its stream across versions."""
    if config.get("multipliers") is None:
        return rule
    stored = [tuple(by_layer(config, "multipliers", layer)) for layer in rule.layer_ids]
    for layer, multipliers in zip(rule.layer_ids, stored, strict=True):
        if len(multipliers) != max(rule.orders):
            raise PackError(
                f"layer {layer} has {len(multipliers)} multipliers; {max(rule.orders)} look-backs need one each"
            )
        for multiplier in multipliers:
            if type(multiplier) is not int or multiplier % 2 == 0 or not 0 < multiplier <= INT64_MAX // rule.vocab:
                raise PackError(
                    f"layer {layer} has the multiplier {multiplier}; it must be odd and from 1 to "
                    f"{INT64_MAX // rule.vocab} for a vocabulary of {rule.vocab}"
                )
    return replace(rule, multipliers=tuple(stored))


def compressed(
    config: Config, field: str, tokenizer: Any, *, base_only: bool = False
) -> tuple[npt.NDArray[np.int64] | None, int]:
    """The compression map, if there is a tokenizer to make it from, and the size V' that the multipliers are drawn for.

    `base_only`: added tokens keep their raw ids and do not count in V'.
    """
    if tokenizer is None:
        return None, integer(config, field, least=1)
    mapping = compression_map(tokenizer).astype(np.int64)
    base = rust_backend(tokenizer).get_vocab_size(with_added_tokens=False) if base_only else len(mapping)
    mapping[base:] = np.arange(base, len(mapping))
    if not base:
        raise PackError("the tokenizer has no tokens; a hashed memory needs some")
    vocab = int(mapping[:base].max()) + 1
    if config.get(field) is not None and integer(config, field) != vocab:
        raise PackError(
            f"{field} is {config[field]} and the tokenizer compresses to {vocab}: every multiplier would differ; "
            "the memory belongs to another tokenizer"
        )
    return mapping, vocab


def pad_in(config: Config, field: str, mapping: npt.NDArray[np.int64] | None, vocab: int) -> int:
    """The pad id as it is hashed. Given raw where there is a map, compressed where there is none."""
    pad, size = integer(config, field), vocab if mapping is None else len(mapping)
    if pad >= size:
        raise PackError(f"{field} is {pad}; it must be an id below {size}")
    return pad if mapping is None else int(mapping[pad])


def integer(
    config: Config, field: str, *, least: int = 0, most: int = INT64_MAX >> 16, default: int | None = None
) -> int:
    """A whole number within [least, most]. Raises PackError naming the field, its value and what it must be."""
    value = config.get(field)
    value = default if value is None else value
    if type(value) is not int or not least <= value <= most:
        raise PackError(f"{field} is {value}; it must be a whole number from {least} to {most}")
    return value


def integers(config: Config, field: str, *, least: int = 0) -> tuple[int, ...]:
    """One or more whole numbers; a single one may stand without brackets."""
    value = config.get(field)
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not values:
        raise PackError(f"{field} is empty; it needs at least one number")
    return tuple(integer({field: each}, field, least=least) for each in values)


def layers_in(config: Config, field: str, *, least: int = 0) -> tuple[int, ...]:
    layers = integers(config, field, least=least)
    if len(set(layers)) != len(layers):
        raise PackError(f"{field} is {listed(layers)}; it must name each layer once")
    return layers


def per_order(config: Config, field: str, orders: int) -> tuple[int, ...]:
    """One size for all orders, or one each."""
    sizes = integers(config, field, least=1)
    if not isinstance(config[field], Sequence):
        return sizes * orders
    if len(sizes) != orders:
        raise PackError(f"{field} has {len(sizes)} sizes; the memory has {orders} n-gram orders")
    return sizes


def by_layer(config: Config, field: str, layer: int) -> Sequence[Any]:
    table = config[field]
    values = table.get(str(layer), table.get(layer)) if isinstance(table, Mapping) else None
    if not isinstance(values, Sequence):
        raise PackError(f"{field} has no entry for layer {layer}; it needs one list a layer")
    return values


def total(primes: Primes) -> int:
    return sum(sum(order) for order in primes)


def listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
