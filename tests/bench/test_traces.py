"""Traces: the policies that the cache is measured against are what they are called."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.bench.traces import Zipf, belady, distinct, fitted_alpha, lru, next_uses


def all_of(trace: np.ndarray) -> list[slice]:
    return [slice(0, len(trace))]


def best_possible(trace: list[int], entries: int) -> int:
    """The most hits of any policy that may also leave a row out, by trying everything."""
    states = {frozenset[int](): 0}
    for row in trace:
        following: dict[frozenset[int], int] = {}
        for cached, hits in states.items():
            found = hits + (row in cached)
            with_row = cached | {row}
            sizes = range(max(len(with_row) - 1, 0), min(len(with_row), entries) + 1)
            for size in sizes:
                for kept in combinations(sorted(with_row), size):
                    key = frozenset(kept)
                    following[key] = max(following.get(key, 0), found)
        states = following
    return max(states.values())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.integers(1, 3))
def test_belady_hits_as_often_as_anyone_could(trace: list[int], entries: int) -> None:
    (rate,) = belady(np.array(trace), entries, all_of(np.array(trace)))
    assert round(rate * len(trace)) == best_possible(trace, entries)


def test_lru_is_che_s_formula_on_a_zipf_trace() -> None:
    """Σ (1 - e^(-p t)) = C gives t; the hit rate is Σ p (1 - e^(-p t)). Within 0.005, as simulations are of it."""
    zipf = Zipf.of(0.9, 5000, seed=1)
    trace = zipf.draw(150_000)
    p = np.diff(zipf.cumulative, prepend=0)
    low, high = 0.0, 1e9
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-p * middle)).sum() < 250 else (low, middle)
    (rate,) = lru(trace, 250, [slice(50_000, None)])
    assert rate == pytest.approx((p * (1 - np.exp(-p * low))).sum(), abs=0.005)


def test_next_uses_are_where_a_row_comes_again() -> None:
    assert next_uses(np.array([5, 7, 5, 5, 9])).tolist()[:4] == [2, 6, 3, 8]


def test_a_drift_changes_so_many_ranks_and_no_probability() -> None:
    zipf = Zipf.of(1.0, 1000, seed=0)
    before, optimum = zipf.order.copy(), zipf.optimum(100)
    zipf.drift(0.1)
    assert 80 <= (zipf.order != before).sum() <= 100  # some of the 100 chosen may draw themselves
    assert sorted(zipf.order) == list(range(1000))
    assert zipf.optimum(100) == optimum
    assert optimum == pytest.approx((1 / np.arange(1, 101)).sum() / (1 / np.arange(1, 1001)).sum())


def test_numbers_are_equal_where_order_and_key_are() -> None:
    numbers = distinct(np.array([[7, 7], [9, 7], [7, 9]]))
    assert numbers.tolist() == [0, 2, 1, 2, 0, 3]


def test_the_fitted_slope_is_the_traces_exponent() -> None:
    assert fitted_alpha(Zipf.of(1.0, 20_000, seed=3).draw(2_000_000)) == pytest.approx(1.0, abs=0.05)
