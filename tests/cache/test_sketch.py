"""Sketch: counts many keys in little memory, never below the truth."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from server.cache.sketch import MOST, SMALLEST_WIDTH, Sketch


def hashes_of(keys: list[int]) -> np.ndarray:
    """Few distinct values in every bit range, so that keys share counters."""
    return np.array([key % 3 << 32 | key % 5 for key in keys], np.uint64)


def count(sketch: Sketch, keys: list[int]) -> None:
    if keys:
        distinct, counts = np.unique(hashes_of(keys), return_counts=True)
        sketch.add(distinct, counts)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 14), max_size=40), max_size=6))
def test_an_estimate_is_never_below_what_was_counted(batches: list[list[int]]) -> None:
    sketch = Sketch(1)
    for batch in batches:
        count(sketch, batch)
    truth = Counter(key for batch in batches for key in batch)
    estimates = sketch.estimate(hashes_of(list(range(15))))
    assert all(estimates[key] >= min(truth[key], MOST) for key in range(15))


def test_keys_apart_are_counted_apart() -> None:
    sketch = Sketch(1)
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 1 << 63, 1000).astype(np.uint64)
    counts = generator.integers(1, 100, 1000)
    sketch.add(hashes, counts)
    assert np.array_equal(sketch.estimate(hashes), counts)  # 1,000 keys in 262,144 counters of four rows
    assert not sketch.estimate(generator.integers(0, 1 << 63, 100).astype(np.uint64)).any()


def test_counting_stops_at_the_counters_end_and_does_not_wrap() -> None:
    sketch = Sketch(1)
    key = np.array([7], np.uint64)
    for _ in range(3):
        sketch.add(key, np.array([200]))
    assert sketch.estimate(key).tolist() == [255]


def test_halving_ages_every_count() -> None:
    sketch = Sketch(1)
    keys = np.array([1 << 40, 2 << 40, 3 << 40], np.uint64)
    sketch.add(keys, np.array([1, 10, 255]))
    sketch.halve()
    assert sketch.estimate(keys).tolist() == [0, 5, 127]


def test_raising_lifts_estimates_and_lowers_none() -> None:
    sketch = Sketch(1)
    keys = np.array([1 << 40, 2 << 40], np.uint64)
    sketch.add(keys, np.array([3, 9]))
    sketch.raise_to(keys, np.array([6, 6]))
    assert sketch.estimate(keys).tolist() == [6, 9]


def test_there_are_as_many_counters_as_asked_for_and_never_too_few() -> None:
    assert Sketch(1).nbytes == 4 * SMALLEST_WIDTH
    assert Sketch(SMALLEST_WIDTH + 1).nbytes == 8 * SMALLEST_WIDTH
