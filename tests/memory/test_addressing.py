"""Row ids against stored vectors, transformers, and a hash of plain Python integers, one token at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.memory.addressing import Addresser, from_config, windows_of

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "engram_vectors.json").read_text(encoding="utf-8"))
DEEPSEEK = {
    "engram_layer_ids": [1, 14],
    "engram_max_ngram_size": 4,
    "engram_n_heads": 8,
    "engram_vocab_size": 16_000_000,
    "engram_num_embeddings": [384_006_168, 384_016_682],
    "engram_compressed_vocab_size": 99_092,
    "engram_pad_token_id": 2,
}
DEMO = {
    "layer_ids": [1, 15],
    "max_ngram_size": 3,
    "n_head_per_ngram": 8,
    "engram_vocab_size": [646_400, 646_400],
    "pad_id": 2,
    "seed": 0,
    "compressed_vocab_size": 99_092,
}
QWEN = {
    "ple_layer_ids": [2],
    "ngram_size": 3,
    "heads_per_ngram": 8,
    "ngram_vocab_size_base": 20_000_000,
    "make_ngram_vocab_size_divisible_by": 128,
    "seed": 1234,
    "eos_token_id": 248_044,
    "vocab_size": 248_320,
}


def with_offsets(hashes: Sequence[Sequence[int]], primes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Hashes per head → rows of the layer's one table."""
    flat = [prime for order in primes for prime in order]
    starts = [sum(flat[:place]) for place in range(len(flat))]
    return [[value + start for value, start in zip(row, starts, strict=True)] for row in hashes]


def test_deepseek_rows_equal_the_stored_vectors() -> None:
    addresser, stored = from_config(DEEPSEEK), VECTORS["v41"]
    windows, blocked = windows_of(stored["ids"], addresser.n)
    assert addresser.rows(1, windows, blocked).tolist() == stored["rows_L1"]
    assert addresser.rows(14, windows, blocked).tolist() == stored["rows_L14"]


def test_a_dead_token_ends_the_look_back_of_those_after_it() -> None:
    addresser, stored = from_config(DEEPSEEK), VECTORS["v41"]
    plain = addresser.rows(1, *windows_of(stored["ids"], addresser.n))
    dead = addresser.rows(1, *windows_of(stored["ids"], addresser.n, dead=stored["dead"]))
    assert dead.tolist() == stored["rows_L1_dead"]
    place = stored["dead"].index(1)
    changed = np.flatnonzero((plain != dead).any(axis=1)).tolist()
    assert changed == list(range(place, place + addresser.n))


def test_demo_hashes_equal_the_stored_vectors() -> None:
    addresser, stored = from_config(DEMO), VECTORS["demo"]
    windows, blocked = windows_of(stored["ids"], addresser.n)
    assert addresser.rows(1, windows, blocked).tolist() == with_offsets(stored["hash_L1"], stored["primes"][0])
    assert addresser.rows(15, windows, blocked).tolist() == with_offsets(stored["hash_L15"], stored["primes"][1])


def scalar_rows(
    ids: Sequence[int],
    at: int,
    orders: Sequence[int],
    multipliers: Sequence[int],
    primes: Sequence[Sequence[int]],
    pad: int,
    *,
    vocab: int,
    dead: Sequence[bool],
    eos: int | None = None,
) -> tuple[list[int], list[int]]:
    """Rows and mixes of the token at one place, by the words of the rule, in Python's own integers."""
    looked: list[int] = []
    ended = False
    for back in range(max(orders)):
        place = at - back
        ended = ended or place < 0 or dead[place] or not 0 <= ids[place] < vocab
        ended = ended or (back > 0 and ids[place] == eos)
        looked.append(pad if ended else ids[place])
    rows, mixes, start = [], [], 0
    for order, sizes in zip(orders, primes, strict=True):
        mix = 0
        for back in range(order):
            mix ^= looked[back] * multipliers[back]
        mixes.append(mix)
        for prime in sizes:
            rows.append(mix % prime + start)
            start += prime
    return rows, mixes


def check_against_scalar(
    addresser: Addresser, ids: list[int], dead: list[bool], *, vocab: int, pad: int, eos: int | None
) -> None:
    windows, blocked = windows_of(ids, addresser.n, dead=dead)
    addressed = addresser.address(windows, blocked)
    assert list(addressed) == list(addresser.layer_ids)
    for layer, (rows, mix) in addressed.items():
        expected = [
            scalar_rows(
                ids,
                at,
                addresser.orders,
                addresser.multipliers[layer],
                addresser.primes[layer],
                pad,
                vocab=vocab,
                dead=dead,
                eos=eos,
            )
            for at in range(len(ids))
        ]
        assert rows.dtype == mix.dtype == np.int64
        assert rows.tolist() == [each[0] for each in expected]
        assert mix.tolist() == [each[1] for each in expected]
        assert (addresser.rows(layer, windows, blocked) == rows).all()
        assert (addresser.mix(layer, windows, blocked) == mix).all()


@st.composite
def sequences(draw: st.DrawFn, vocab: int) -> tuple[list[int], list[bool]]:
    """Ids, a few of them no ids at all, and which are dead."""
    ids = draw(st.lists(st.integers(-1, vocab), min_size=1, max_size=12))
    dead = draw(st.lists(st.sampled_from([False, False, False, True]), min_size=len(ids), max_size=len(ids)))
    return ids, dead


@given(st.data())
def test_paper_rows_equal_the_scalar_rule_for_any_shape(data: st.DataObject) -> None:
    vocab, longest = data.draw(st.integers(1, 200_000)), data.draw(st.integers(2, 6))
    config = {
        "layer_ids": data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=3, unique=True)),
        "max_ngram_size": longest,
        "n_head_per_ngram": data.draw(st.integers(1, 5)),
        "engram_vocab_size": data.draw(
            st.integers(1, 10**7) | st.lists(st.integers(1, 3000), min_size=longest - 1, max_size=longest - 1)
        ),
        "pad_id": data.draw(st.integers(0, vocab - 1)),
        "seed": data.draw(st.integers(0, 2**31)),
        "compressed_vocab_size": vocab,
    }
    ids, dead = data.draw(sequences(vocab))
    check_against_scalar(from_config(config), ids, dead, vocab=vocab, pad=config["pad_id"], eos=None)


@given(st.data())
def test_qwen_rows_equal_the_scalar_rule_for_any_shape(data: st.DataObject) -> None:
    vocab = data.draw(st.integers(1, 9) | st.integers(1, 300_000))
    config = {
        "ple_layer_ids": data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=3, unique=True)),
        "ngram_size": data.draw(st.integers(2, 5)),
        "heads_per_ngram": data.draw(st.integers(1, 5)),
        "ngram_vocab_size_base": data.draw(st.integers(1, 10**7)),
        "seed": data.draw(st.integers(0, 2**31)),
        "eos_token_id": data.draw(st.integers(0, vocab - 1)),
        "vocab_size": vocab,
    }
    ids, dead = data.draw(sequences(vocab))
    eos = config["eos_token_id"]
    check_against_scalar(from_config(config), ids, dead, vocab=vocab, pad=eos, eos=eos)


@pytest.mark.parametrize("config", [DEMO, DEEPSEEK, QWEN], ids=["demo", "deepseek", "qwen"])
@given(data=st.data())
def test_a_prefill_reads_the_rows_of_token_by_token_decoding(config: Mapping[str, Any], data: st.DataObject) -> None:
    addresser = from_config(config)
    near_eos = st.sampled_from([248_044, 7, 7, 99_000, 3]) if config is QWEN else st.integers(0, 99_091)
    ids = data.draw(st.lists(near_eos, min_size=1, max_size=10))
    whole = addresser.address(*windows_of(ids, addresser.n))
    for at in range(len(ids)):
        windows, blocked = windows_of(ids[: at + 1], addresser.n)
        for layer, (rows, mix) in addresser.address(windows[-1:], blocked[-1:]).items():
            assert (rows[0] == whole[layer][0][at]).all()
            assert (mix[0] == whole[layer][1][at]).all()


@pytest.mark.parametrize("config", [DEMO, DEEPSEEK, QWEN], ids=["demo", "deepseek", "qwen"])
def test_torch_gives_the_bits_of_numpy(config: Mapping[str, Any]) -> None:
    addresser, generator = from_config(config), np.random.default_rng(0)
    ids = generator.integers(-2, 248_400, size=300)
    ids[generator.integers(0, 300, size=20)] = 248_044
    windows, blocked = windows_of(ids, addresser.n, dead=generator.random(300) < 0.1)
    expected = addresser.address(windows, blocked)
    tensors = torch.from_numpy(windows), torch.from_numpy(blocked)
    for layer, (rows, mix) in addresser.address(*tensors).items():
        assert rows.dtype == mix.dtype == torch.int64
        assert (rows.numpy() == expected[layer][0]).all()
        assert (mix.numpy() == expected[layer][1]).all()
        assert torch.equal(addresser.rows(layer, *tensors), rows)
        assert torch.equal(addresser.mix(layer, *tensors), mix)


def test_wider_windows_and_int32_ids_address_the_same_rows() -> None:
    addresser = from_config(DEMO)
    ids = np.random.default_rng(0).integers(0, 99_092, size=40)
    expected = addresser.rows(1, *windows_of(ids, 3))
    windows, blocked = windows_of(ids, 7)
    assert (addresser.rows(1, windows, blocked) == expected).all()
    narrow = torch.from_numpy(windows.astype(np.int32)), torch.from_numpy(blocked)
    assert (addresser.rows(1, *narrow).numpy() == expected).all()


def test_the_callers_arrays_are_left_as_they_were() -> None:
    addresser = from_config(QWEN)
    windows, blocked = windows_of([5, 248_044, 6, -1, 7], 3, dead=[True, False, False, False, False])
    before = windows.copy(), blocked.copy()
    addresser.address(windows, blocked)
    assert (windows == before[0]).all() and (blocked == before[1]).all()


def test_no_tokens_have_no_rows() -> None:
    addresser = from_config(DEMO)
    rows, mix = addresser.address(np.empty((0, 3), np.int64), np.empty((0, 3), bool))[15]
    assert rows.shape == (0, 16) and mix.shape == (0, 2)


def test_a_window_too_short_is_refused_with_both_lengths() -> None:
    with pytest.raises(ValueError, match="hold 3 ids; this memory looks at 4"):
        from_config(DEEPSEEK).address(*windows_of([1, 2], 3))


def test_a_layer_without_a_table_is_refused() -> None:
    for config in (DEMO, {"stem_layers": [3], "vocab_size": 10}):
        with pytest.raises(KeyError):
            from_config(config).rows(2, *windows_of([1, 2], 3))


def test_qwen_rows_equal_transformers_with_eos_inside() -> None:
    modeling = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    configuration = pytest.importorskip("transformers.models.qwen4_exp.configuration_qwen4_exp")
    sizes = {
        "ple_layer_ids": [3, 1],
        "ngram_size": 4,
        "heads_per_ngram": 3,
        "ngram_vocab_size_base": 500,
        "make_ngram_vocab_size_divisible_by": 64,
        "seed": 77,
        "eos_token_id": 5,
        "vocab_size": 50,
    }
    theirs = configuration.Qwen4ExpTextConfig(
        **sizes, ple_embed_dim=36, hidden_size=36, num_hidden_layers=4, layer_types=["linear_attention"] * 4
    )
    ours = from_config(sizes)
    assert ours.layer_ids == (0, 2)
    generator = np.random.default_rng(3)
    ids = generator.integers(0, 50, size=(3, 60))
    ids[generator.random((3, 60)) < 0.2] = 5
    for ordinal, layer in enumerate(ours.layer_ids):
        embedding = modeling.Qwen4ExpTextNGramEmbedding(theirs, 36, layer, ordinal)
        weight = embedding.ngram_embedding.weight
        assert len(weight) == ours.rows_per_table[layer]
        # A row that holds its own number shows which rows were read; float32 counts exactly this far.
        assert len(weight) < 2**24
        weight.data = torch.arange(len(weight), dtype=torch.float32)[:, None].expand(weight.shape).contiguous()
        read = embedding(torch.from_numpy(ids), None).reshape(3, 60, ours.columns, -1)[..., 0].long().numpy()
        for sequence in range(3):
            assert (ours.rows(layer, *windows_of(ids[sequence], ours.n)) == read[sequence]).all()


def test_a_boundary_blocks_for_those_after_it_and_not_for_itself() -> None:
    windows, blocked = windows_of([9, 4, 9, 9], 3, boundary=4)
    assert windows.tolist() == [[9, 0, 0], [4, 9, 0], [9, 4, 9], [9, 9, 4]]
    assert blocked.tolist() == [[0, 1, 1], [0, 0, 1], [0, 1, 0], [0, 0, 1]]
    mask = np.array([False, True, False, False])
    assert (windows_of([9, 4, 9, 9], 3, boundary=mask)[1] == blocked).all()


def test_boundaries_given_with_the_window_are_those_qwen_finds_itself() -> None:
    addresser = from_config(QWEN)
    ids = [5, 248_044, 6, 7, 248_044, 248_044, 8, 9]
    found = addresser.address(*windows_of(ids, 3))[1][0]
    given_ = addresser.address(*windows_of(ids, 3, boundary=248_044))[1][0]
    assert (found == given_).all()


def test_a_token_id_memory_reads_the_row_of_the_token_itself() -> None:
    addresser = from_config({"stem_layers": [4, 7], "vocab_size": 100})
    assert (addresser.columns, addresser.n, addresser.orders, addresser.heads) == (1, 1, (1,), 1)
    assert addresser.rows_per_table == {4: 100, 7: 100}
    windows, blocked = windows_of([3, 99, 3], 2, dead=[False, True, False])
    for layer in (4, 7):
        assert addresser.rows(layer, windows, blocked).tolist() == [[3], [99], [3]]
        assert addresser.address(windows, blocked)[layer][1].tolist() == [[3], [99], [3]]


def test_addressing_arrays_loads_no_torch() -> None:
    code = (
        "import sys; from server.memory.addressing import from_config, windows_of\n"
        f"a = from_config({DEMO!r}); a.address(*windows_of([1, 2], 3)); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
