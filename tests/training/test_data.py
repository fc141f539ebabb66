"""What is taught: examples, batches, and data that is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from server.errors import PackError
from server.training.data import Example, epoch_batches, pieces_of, read_examples
from server.training.recall import read_facts


def encode(text: str) -> list[int]:
    """A token per letter."""
    return [ord(letter) for letter in text]


def test_only_the_completion_and_its_end_are_learnt(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text('{"prompt": "ab:", "completion": "cd"}\n')
    (example,) = read_examples(path, encode, 2, 64)
    assert example.ids.tolist() == [*encode("ab:cd"), 2]
    assert example.learnt == 3


def test_of_a_text_every_token_but_the_first_is_learnt() -> None:
    examples = pieces_of("abcdef\n\ng\nhi", encode, 4)
    assert [(bytes(e.ids.tolist()).decode(), e.labels) for e in examples] == [("abcd", 3), ("ef", 1), ("hi", 1)]


@pytest.mark.parametrize("content", ["", "\n\n", '{"prompt": "a", "completion": ""}\n'])
def test_data_that_holds_nothing_to_learn_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(content)
    with pytest.raises(PackError, match="tokenises to nothing"):
        read_examples(path, encode, 2, 64)


@pytest.mark.parametrize(
    "line", ["no JSON", '{"prompt": "a"}', '{"prompt": 1, "completion": "b"}', "[1]", "[" * 100_000]
)
def test_a_misshapen_line_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(PackError, match="line 2"):
        read_examples(path, encode, 2, 64)


def test_a_line_longer_than_the_model_reads_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text('{"prompt": "a", "completion": "bbbbbbbb"}\n')
    with pytest.raises(PackError, match=re.escape("line 1 has 10 tokens; the model reads 8")):
        read_examples(path, encode, 2, 8)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PackError, match="no readable UTF-8"):
        read_examples(path, encode, 2, 64)


def test_an_epoch_reads_every_example_once_within_the_batchs_size() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 200).tolist()
    batches = epoch_batches(lengths, 64, seed=1, epoch=2)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    assert all(sum(lengths[i] for i in batch) <= 64 for batch in batches)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = list(range(1, 60))
    order = [[batch.tolist() for batch in epoch_batches(lengths, 32, 1, epoch)] for epoch in (0, 0, 1)]
    assert order[0] == order[1] != order[2]


def test_an_example_counts_what_is_learnt() -> None:
    assert Example(np.arange(7), 3).labels == 4


def test_facts_that_are_no_text_or_nest_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    for content, words in [(b"\xff", "no readable UTF-8 text"), (b"[" * 100_000, "line 1 is no")]:
        path.write_bytes(content)
        with pytest.raises(PackError, match=words):
            read_facts(path)
