"""Constants of released checkpoints, each family's own way of writing them down, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from server.errors import PackError
from server.memory.addressing import from_config, windows_of
from server.memory.compression import compression_map
from server.memory.constants import PrimeWalk, drawn_multipliers, is_prime, splitmix64
from server.models.source import ModelSource
from tests.memory.test_addressing import DEEPSEEK, DEMO, QWEN, scalar_rows
from tests.memory.test_compression import small_tokenizer

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "engram_vectors.json").read_text(encoding="utf-8"))
PEFT = {
    "engram_vocab_size_per_ngram": [400, 600],
    "ngram_sizes": [2, 3],
    "max_ngram_size": 3,
    "n_head_per_ngram": 4,
    "target_layers": [5, 2],
    "seed": 11,
    "pad_id": 3,
    "enable_tokenizer_compression": False,
    "compressed_vocab_size": 1000,
}


def without(config: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def as_lists(primes: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    return [list(order) for order in primes]


def test_deepseek_constants_are_the_released_ones() -> None:
    addresser, stored = from_config(DEEPSEEK), VECTORS["v41"]
    assert {str(layer): list(m) for layer, m in addresser.multipliers.items()} == stored["multipliers"]
    assert [as_lists(addresser.primes[layer]) for layer in (1, 14)] == stored["primes"]
    assert addresser.rows_per_table == {1: 384_006_168, 14: 384_016_682}
    assert (addresser.columns, addresser.n, addresser.orders, addresser.heads) == (24, 4, (2, 3, 4), 8)


def test_demo_constants_are_the_noted_ones() -> None:
    addresser, stored = from_config(DEMO), VECTORS["demo"]
    assert {str(layer): list(m) for layer, m in addresser.multipliers.items()} == stored["multipliers"]
    assert [as_lists(addresser.primes[layer]) for layer in (1, 15)] == stored["primes"]
    assert addresser.rows_per_table == {1: 10_344_164, 15: 10_348_242}


def test_qwen_constants_are_the_released_ones() -> None:
    addresser = from_config(QWEN)
    assert addresser.layer_ids == (1,)
    assert addresser.multipliers == {1: (23_703_573_157_769, 20_109_073_645_365, 8_052_911_324_071)}
    sizes = [prime for order in addresser.primes[1] for prime in order]
    assert (sizes[0], sizes[1], sizes[-1], len(sizes), sum(sizes)) == (
        20_000_003,
        20_000_023,
        20_000_171,
        16,
        320_001_446,
    )
    assert addresser.rows_per_table == {1: 320_001_536}


def test_qwen_numbers_its_heads_and_layers_across_tables() -> None:
    both, first = from_config(QWEN | {"ple_layer_ids": [20, 2]}), from_config(QWEN)
    assert both.layer_ids == (1, 19)
    assert both.primes[1] == first.primes[1] and both.multipliers[1] == first.multipliers[1]
    assert both.primes[19][0][0] == sympy.nextprime(20_000_171)
    assert both.multipliers[19] != both.multipliers[1]


def test_engram_peft_rows_are_those_of_the_library() -> None:
    """Figures printed by engram-peft 1.2.7's own hash for ids 7, 999, 1500, 3, 0; 1500 lies past its vocabulary."""
    addresser = from_config(PEFT)
    assert addresser.layer_ids == (2, 5)
    assert addresser.primes == {
        2: ((101, 103, 107, 109), (151, 157, 163, 167)),
        5: ((113, 127, 131, 137), (173, 179, 181, 191)),
    }
    assert addresser.multipliers == {
        2: (4_308_524_057_431_737, 1_122_399_134_323_185, 4_103_594_590_954_753),
        5: (6_415_066_104_410_027, 3_863_258_279_113_137, 4_480_196_012_898_559),
    }
    hashes = {
        5: [
            [42, 28, 124, 61, 121, 120, 11, 60],
            [62, 101, 76, 70, 129, 124, 133, 138],
            [78, 18, 98, 75, 102, 163, 153, 156],
            [41, 97, 6, 40, 159, 16, 25, 79],
            [88, 66, 123, 135, 124, 142, 77, 123],
        ],
        2: [
            [94, 50, 63, 3, 20, 50, 10, 149],
            [97, 9, 8, 95, 5, 24, 89, 11],
            [36, 78, 78, 23, 23, 84, 123, 141],
            [86, 72, 78, 19, 67, 19, 104, 76],
            [98, 52, 61, 40, 145, 32, 132, 127],
        ],
    }
    windows, blocked = windows_of([7, 999, 1500, 3, 0], addresser.n)
    for layer, expected in hashes.items():
        sizes = [prime for order in addresser.primes[layer] for prime in order]
        starts = np.cumsum([0, *sizes[:-1]])
        assert (addresser.rows(layer, windows, blocked) - starts).tolist() == expected


def test_engram_peft_leaves_added_tokens_uncompressed() -> None:
    tokenizer = small_tokenizer()
    base, size = tokenizer.get_vocab_size(with_added_tokens=False), tokenizer.get_vocab_size()
    mapping = compression_map(tokenizer)[:base]
    config = PEFT | {"enable_tokenizer_compression": True, "compressed_vocab_size": None}
    addresser = from_config(config, tokenizer=tokenizer)
    assert addresser.compressed_vocab == mapping.max() + 1
    ids = [0, size - 1, 1, base, 2, base - 1]
    kept = [id_ if id_ >= base else int(mapping[id_]) for id_ in ids]
    plain = from_config(PEFT | {"compressed_vocab_size": int(mapping.max()) + 1, "pad_id": int(mapping[3])})
    assert (addresser.rows(5, *windows_of(ids, 3)) == plain.rows(5, *windows_of(kept, 3))).all()


@pytest.mark.parametrize("config", [DEMO, DEEPSEEK], ids=["demo", "deepseek"])
def test_one_size_and_one_per_order_say_the_same(config: Mapping[str, Any]) -> None:
    size = 646_400 if config is DEMO else 16_000_000
    orders = 2 if config is DEMO else 3
    one, each = (from_config({**config, "engram_vocab_size": value}) for value in (size, [size] * orders))
    assert one.primes == each.primes


def test_a_multimodal_config_is_read_in_its_text_part() -> None:
    nested = {"model_type": "x", "eos_token_id": 248_044, "text_config": without(QWEN, "eos_token_id")}
    assert from_config(nested).multipliers == from_config(QWEN).multipliers
    assert from_config({"text_config": DEEPSEEK}).primes == from_config(DEEPSEEK).primes


def test_with_a_tokenizer_ids_and_pad_are_compressed_inside(smollm2: ModelSource) -> None:
    backend = smollm2.tokenizer.backend
    mapping = compression_map(backend)
    pad = int(np.flatnonzero(mapping != np.arange(len(mapping)))[0])  # a pad that compression moves
    config = without(DEMO, "compressed_vocab_size") | {"pad_id": pad}
    raw = from_config(config, tokenizer=backend)
    plain = from_config(config | {"pad_id": int(mapping[pad]), "compressed_vocab_size": int(mapping.max()) + 1})
    ids = [*backend.encode("The THE the  🙂 한국\n\n 안녕").ids, pad]
    dead = [place == 4 for place in range(len(ids))]
    compressed = mapping[ids]
    assert (raw.rows(15, *windows_of(ids, 3, dead)) == plain.rows(15, *windows_of(compressed, 3, dead))).all()


def test_texts_that_read_alike_read_the_same_rows(smollm2: ModelSource) -> None:
    backend = smollm2.tokenizer.backend
    addresser = from_config(without(DEMO, "compressed_vocab_size"), tokenizer=backend)
    lower, upper = (backend.token_to_id(token) for token in ("Ġthe", "The"))
    rows = [addresser.rows(1, *windows_of([first, second], 3)) for first, second in ((lower, upper), (upper, lower))]
    assert lower != upper and (rows[0] == rows[1]).all()


def test_an_id_past_the_tokenizer_counts_as_blocked(smollm2: ModelSource) -> None:
    addresser = from_config(without(DEMO, "compressed_vocab_size"), tokenizer=smollm2.tokenizer.backend)
    known = addresser.rows(1, *windows_of([5, 6, 7], 3, dead=[False, True, False]))
    for outside in (49_152, 10**9, -1, -(10**9)):
        assert (addresser.rows(1, *windows_of([5, outside, 7], 3)) == known).all()


def test_stored_multipliers_are_used() -> None:
    stored = {"1": [3, 5, 7], "15": [9, 11, 13]}
    addresser = from_config(DEMO | {"multipliers": stored})
    windows, blocked = windows_of([4, 5, 6, 7], 3)
    expected, _ = scalar_rows(
        [4, 5, 6, 7], 3, (2, 3), (9, 11, 13), addresser.primes[15], 2, vocab=99_092, dead=[False] * 4
    )
    assert addresser.rows(15, windows, blocked)[3].tolist() == expected


def test_a_pack_that_ships_its_own_constants_reads_the_same_rows() -> None:
    fresh = from_config(DEMO)
    constants = {
        "multipliers": {str(layer): list(m) for layer, m in fresh.multipliers.items()},
        "primes": {str(layer): as_lists(p) for layer, p in fresh.primes.items()},
    }
    shipped = from_config(json.loads(json.dumps(DEMO | constants)))
    windows, blocked = windows_of(range(50), 3)
    assert (shipped.rows(15, windows, blocked) == fresh.rows(15, windows, blocked)).all()


PRIMES = {str(layer): p for layer, p in zip((1, 15), VECTORS["demo"]["primes"], strict=True)}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no family": ({"hidden_size": 64}, "names no memory"),
    "rows": (
        DEEPSEEK | {"engram_num_embeddings": [384_006_168, 384_016_681]},
        "384006168, 384016681; the primes .* sum to 384006168, 384016682",
    ),
    "rows of one table of two": (DEEPSEEK | {"engram_num_embeddings": [384_006_168]}, "384006168; .* 384016682"),
    "no row counts": (without(DEEPSEEK, "engram_num_embeddings"), "engram_num_embeddings is None"),
    "no compressed size": (without(DEMO, "compressed_vocab_size"), "compressed_vocab_size is None"),
    "pad": (DEMO | {"pad_id": 99_092}, "pad_id is 99092; it must be an id below 99092"),
    "orders": (DEMO | {"max_ngram_size": 1}, "max_ngram_size is 1; it must be a whole number from 2"),
    "heads": (DEMO | {"n_head_per_ngram": 0}, "n_head_per_ngram is 0; it must be a whole number from 1"),
    "text for a number": (DEMO | {"seed": "0"}, "seed is 0; it must be a whole number"),
    "a layer twice": (DEMO | {"layer_ids": [1, 1]}, "layer_ids is 1, 1; it must name each layer once"),
    "no layers": (DEMO | {"layer_ids": []}, "layer_ids is empty"),
    "a layer below zero": (DEMO | {"layer_ids": [-1]}, "layer_ids is -1"),
    "qwen layers count from one": (QWEN | {"ple_layer_ids": [0]}, "ple_layer_ids is 0; .* from 1"),
    "qwen's end": (
        QWEN | {"eos_token_id": 248_320},
        "eos_token_id is 248320; it must be an id below vocab_size 248320",
    ),
    "sizes": (DEMO | {"engram_vocab_size": [1, 2, 3]}, "engram_vocab_size has 3 sizes; the memory has 2"),
    "multipliers missing": (DEMO | {"multipliers": {"1": [1, 3, 5]}}, "multipliers has no entry for layer 15"),
    "multipliers short": (DEMO | {"multipliers": {"1": [1, 3], "15": [1, 3, 5]}}, "layer 1 has 2 multipliers; 3"),
    "multiplier even": (DEMO | {"multipliers": {"1": [1, 3, 4], "15": [1, 3, 5]}}, "multiplier 4; it must be odd"),
    "multiplier wide": (DEMO | {"multipliers": {"1": [1, 3, 2**47 + 1], "15": [1, 3, 5]}}, "to 93078876567783"),
    "primes": (
        DEMO | {"primes": PRIMES | {"15": [PRIMES["1"][0], PRIMES["15"][1]]}},
        "primes of layer 15 are 16 that sum to 1034[0-9]{4}; its sizes give 16 that sum to 10348242",
    ),
    "the library's other engine": (PEFT | {"engine": "qwen_ple"}, "engine is 'qwen_ple'"),
    "the library's orders": (PEFT | {"ngram_sizes": [2, 2]}, "ngram_sizes is 2, 2; it needs distinct orders"),
    "token id without a vocabulary": ({"stem_layers": [1]}, "vocab_size is None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_impossible_config_is_refused_by_field_and_value(case: str) -> None:
    config, message = REFUSED[case]
    with pytest.raises(PackError, match=message) as raised:
        from_config(config)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_that_compresses_otherwise_is_refused_with_both_sizes(smollm2: ModelSource) -> None:
    for config in (DEMO, DEEPSEEK):
        with pytest.raises(PackError, match="compressed_vocab_size is 99092 and the tokenizer compresses to 32873"):
            from_config(config, tokenizer=smollm2.tokenizer)


@given(st.integers(-5, 10**5) | st.integers(0, 2**62))
def test_primality_is_decided_as_sympy_decides_it(number: int) -> None:
    assert is_prime(number) == sympy.isprime(number)


@pytest.mark.parametrize("number", [3_215_031_751, 3_825_123_056_546_413_051])
def test_numbers_that_fool_fewer_witnesses_are_not_prime(number: int) -> None:
    assert not is_prime(number)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 6)), max_size=8))
def test_a_walk_hands_out_the_smallest_unused_primes(asked: list[tuple[int, int]]) -> None:
    walk, used = PrimeWalk(), set[int]()
    for base, count in asked:
        expected: list[int] = []
        prime = base - 1
        while len(expected) < count:
            prime = sympy.nextprime(prime)
            if prime not in used:
                expected.append(prime)
        used.update(expected)
        assert walk.take(base, count) == tuple(expected)


@given(st.integers(1, 10**6), st.integers(0, 100), st.integers(0, 2**31))
def test_multipliers_are_odd_and_keep_every_product_below_2_to_63(vocab: int, layer: int, seed: int) -> None:
    for multiplier in drawn_multipliers(seed, layer, 4, vocab):
        assert multiplier % 2 == 1
        assert multiplier * (vocab - 1) < 2**63


def test_splitmix64_gives_the_published_stream() -> None:
    """First outputs for seed 1234567, as published with the generator's reference code."""
    golden, states = 0x9E3779B97F4A7C15, (1_234_567, 1_234_567 + 0x9E3779B97F4A7C15)
    assert golden == states[1] - states[0]
    assert [splitmix64(state) for state in states] == [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]


@pytest.mark.parametrize("heads", [4096, 1025])
def test_more_heads_than_primes_are_searched_for_are_refused_at_once(heads: int) -> None:
    config = {**DEMO, "n_head_per_ngram": heads, "layer_ids": [0, 1, 2, 3]}
    with pytest.raises(PackError, match=f"4 layers of 2 orders of {heads} heads.*at most 8192"):
        from_config(config)
