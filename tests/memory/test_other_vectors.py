"""Rows, mixes and windows of shapes, sizes and tokenizers drawn at random, against plain Python written from the rules.

Nothing here is taken from the addresser: primes by trial division, SplitMix64 and the compression anew, one token and
one look-back at a time. Only the paper's multipliers come from NumPy on both sides, because the rule names its stream.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from server.memory.addressing import from_config, windows_of
from server.memory.compression import compression_map
from tests.memory.test_compression import slow_map

Layers = dict[int, tuple[list[int], list[list[int]]]]  # layer → multipliers, primes per order


def next_primes(base: int, count: int, used: set[int]) -> list[int]:
    found: list[int] = []
    number = base
    while len(found) < count:
        if number > 1 and number not in used and all(number % d for d in range(2, int(number**0.5) + 1)):
            found.append(number)
        number += 1
    used.update(found)
    return found


def constants(
    layers: list[int], orders: list[int], heads: int, bases: list[int], draw: Callable[[int, int], list[int]]
) -> Layers:
    used: set[int] = set()
    made: Layers = {}
    for place, layer in enumerate(layers):
        primes = [next_primes(base, heads, used) for base in bases]
        made[layer] = (draw(place, layer), primes)
    return made


def numpys(seed: int, vocab: int, count: int) -> Callable[[int, int], list[int]]:
    half = max(1, (2**63 - 1) // vocab // 2)

    def draw(place: int, layer: int) -> list[int]:
        generator = np.random.default_rng(seed + 10007 * layer)
        return [2 * int(r) + 1 for r in generator.integers(0, half, size=count, dtype=np.int64)]

    return draw


def splitmix(seed: int, vocab: int, count: int) -> Callable[[int, int], list[int]]:
    half, mask, golden = max(1, (2**63 - 1) // vocab // 2), 2**64 - 1, 0x9E3779B97F4A7C15

    def draw(place: int, layer: int) -> list[int]:
        out = []
        for look in range(count):
            z = (seed + 10007 * place + golden * (look + 1) + golden) & mask
            z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
            out.append(2 * ((z ^ z >> 31) % half) + 1)
        return out

    return draw


def looked_at(
    ids: list[int], at: int, longest: int, pad: int, *, dead: list[bool], known: Callable[[int], bool], eos: int | None
) -> list[int | None]:
    """The ids at and before a place, None from the first one on that cannot be seen."""
    seen: list[int | None] = []
    for back in range(longest):
        place = at - back
        if place < 0 or dead[place] or not known(ids[place]) or (back and ids[place] == eos):
            return seen + [None] * (longest - back)
        seen.append(ids[place])
    return seen


def rows_of(seen: list[int], orders: list[int], multipliers: list[int], primes: list[list[int]]) -> list[int]:
    rows, start = [], 0
    for order, sizes in zip(orders, primes, strict=True):
        mix = 0
        for back in range(order):
            mix ^= seen[back] * multipliers[back]
        for prime in sizes:
            rows.append(start + mix % prime)
            start += prime
    return rows


def check(
    config: dict[str, Any],
    tokenizer: Any,
    made: Layers,
    orders: list[int],
    ids: list[int],
    dead: list[bool],
    *,
    pad: int,
    small: Callable[[int], int],
    known: Callable[[int], bool],
    eos: int | None = None,
) -> None:
    addresser = from_config(config, tokenizer=tokenizer)
    assert addresser.layer_ids == tuple(made)
    longest = max(orders)
    windows, blocked = windows_of(ids, longest, dead=dead)
    for layer, (multipliers, primes) in made.items():
        expected = []
        for at in range(len(ids)):
            seen = looked_at(ids, at, longest, pad, dead=dead, known=known, eos=eos)
            expected.append(rows_of([pad if i is None else small(i) for i in seen], orders, multipliers, primes))
        assert addresser.rows(layer, windows, blocked).tolist() == expected
        assert addresser.rows_per_table[layer] >= sum(map(sum, primes))


def texts() -> list[str]:
    latin = "The the THE café cafe CAFÉ naïve Straße STRASSE full half x 12 I İ ß ss fi"
    words = [*latin.split(), "한국", "서울", "Ｆｕｌｌ", "½", "1/2", "ﬁ", "\n", "\t"]
    draw = random.Random(4)
    return [" ".join(draw.choices(words, k=30)) for _ in range(60)]


def byte_level_bpe() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    made.train_from_iterator(texts(), trainer)
    made.add_tokens(["<tool>", "<Tool>"])
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"])
    made.train_from_iterator(texts(), trainer)
    return made


def sentence_pieces() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>")
    made.train_from_iterator(texts(), trainer)
    return made


MADE = {f.__name__: f() for f in (byte_level_bpe, word_piece, sentence_pieces)}


@pytest.fixture(scope="module", params=list(MADE))
def other(request: pytest.FixtureRequest) -> tuple[Tokenizer, list[int]]:
    tokenizer = MADE[request.param]
    return tokenizer, slow_map(tokenizer)


def test_other_tokenizers_compress_as_the_slow_way_says(other: tuple[Tokenizer, list[int]]) -> None:
    tokenizer, mapping = other
    assert compression_map(tokenizer).tolist() == mapping
    assert max(mapping) + 1 < len(mapping)  # there is something to join


def sequence(data: st.DataObject, vocab: int, special: int) -> tuple[list[int], list[bool]]:
    """Ids with one of them often, some of them none, and some dead."""
    ids = data.draw(st.lists(st.integers(-2, vocab + 1) | st.just(special), min_size=1, max_size=14))
    dead = data.draw(st.lists(st.sampled_from([False] * 4 + [True]), min_size=len(ids), max_size=len(ids)))
    return ids, dead


def sizes(data: st.DataObject, orders: int) -> tuple[int | list[int], list[int]]:
    """One base for all orders, or one each; as the config spells it, and as a list."""
    if data.draw(st.booleans()):
        size = data.draw(st.integers(1, 4000))
        return size, [size] * orders
    each = data.draw(st.lists(st.integers(1, 4000), min_size=orders, max_size=orders))
    return each, each


@settings(max_examples=40)
@given(data=st.data())
@pytest.mark.parametrize("spelling", ["paper", "deepseek"])
def test_paper_and_deepseek_rows_with_other_tokenizers(
    other: tuple[Tokenizer, list[int]], spelling: str, data: st.DataObject
) -> None:
    tokenizer, mapping = other
    longest, heads = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 4))
    layers = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True))
    spelt, bases = sizes(data, longest - 1)
    seed, pad = data.draw(st.integers(0, 99)), data.draw(st.integers(0, len(mapping) - 1))
    vocab = max(mapping) + 1
    orders = list(range(2, longest + 1))
    made = constants(layers, orders, heads, bases, numpys(seed, vocab, longest))
    if spelling == "paper":
        config: dict[str, Any] = {
            "layer_ids": layers,
            "max_ngram_size": longest,
            "n_head_per_ngram": heads,
            "engram_vocab_size": spelt,
            "pad_id": pad,
            "seed": seed,
        }
    else:
        config = {
            "engram_layer_ids": layers,
            "engram_max_ngram_size": longest,
            "engram_n_heads": heads,
            "engram_vocab_size": spelt,
            "engram_pad_token_id": pad,
            "engram_compressed_vocab_size": vocab,
            "engram_num_embeddings": [sum(map(sum, primes)) for _, primes in made.values()],
            "seed": seed,
        }
    ids, dead = sequence(data, len(mapping), pad)
    small = mapping.__getitem__
    known = range(len(mapping)).__contains__
    check(config, tokenizer, made, orders, ids, dead, pad=mapping[pad], small=small, known=known)


@settings(max_examples=60)
@given(st.data())
def test_qwen_rows_of_any_shape(data: st.DataObject) -> None:
    longest, heads = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 4))
    layers = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3, unique=True))
    vocab, base = data.draw(st.integers(1, 50)), data.draw(st.integers(2, 4000))
    eos, seed = data.draw(st.integers(0, vocab - 1)), data.draw(st.integers(0, 2**40))
    divisor = data.draw(st.integers(1, 130))
    orders = list(range(2, longest + 1))
    zero_based = sorted(layer - 1 for layer in layers)
    made = constants(zero_based, orders, heads, [base] * len(orders), splitmix(seed, vocab, longest))
    config = {
        "ple_layer_ids": layers,
        "ngram_size": longest,
        "heads_per_ngram": heads,
        "ngram_vocab_size_base": base,
        "make_ngram_vocab_size_divisible_by": divisor,
        "seed": seed,
        "eos_token_id": eos,
        "vocab_size": vocab,
    }
    ids, dead = sequence(data, vocab, eos)
    known = range(vocab).__contains__
    check(config, None, made, orders, ids, dead, pad=eos, small=int, known=known, eos=eos)
    padded = from_config(config).rows_per_table
    assert all(rows % divisor == 0 and rows - sum(map(sum, made[layer][1])) < divisor for layer, rows in padded.items())


@settings(max_examples=60)
@given(st.data())
def test_windows_of_any_sequence(data: st.DataObject) -> None:
    ids, dead = sequence(data, 6, 3)
    length = data.draw(st.integers(1, 6))
    boundary = data.draw(st.none() | st.integers(0, 6))
    windows, blocked = windows_of(ids, length, dead=dead, boundary=boundary)
    by_mask = windows_of(ids, length, dead=dead, boundary=np.array([i == boundary for i in ids], bool))
    assert windows.shape == blocked.shape == (len(ids), length) and windows.dtype == np.int64
    for t in range(len(ids)):
        for back in range(length):
            place = t - back
            if place < 0:
                assert blocked[t, back]
                continue
            assert windows[t, back] == ids[place]
            assert blocked[t, back] == (dead[place] or (back > 0 and ids[place] == boundary))
    assert (by_mask[0] == windows).all() and (by_mask[1] == blocked).all()
