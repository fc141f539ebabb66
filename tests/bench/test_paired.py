"""Paired figures: what is true lies within the interval, a few very slow steps move nothing, orders are balanced."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from server.bench.arms import balanced
from server.bench.paired import middle_half, ratio


def steps(seed: int, turns: int = 400, noise: float = 0.05) -> tuple[list[float], list[float]]:
    """Seconds of two arms in turns, the first 2 % slower, with noise of their own and drift that they share."""
    generator = np.random.default_rng(seed)
    drift = 0.03 * np.exp(np.cumsum(generator.normal(0, 0.02, turns)))
    slower, faster = (drift * cost * np.exp(generator.normal(0, noise, turns)) for cost in (1.02, 1.0))
    return slower.tolist(), faster.tolist()


def test_the_middle_halfs_interval_holds_the_truth_and_is_narrower_than_the_medians() -> None:
    inside, widths = 0, []
    for seed in range(40):
        pair = steps(seed)
        middle, median = middle_half(*pair), ratio(*pair)
        low, high = middle["ci95"]
        inside += low <= 1.02 <= high
        widths.append((high - low) / (median.ci95[1] - median.ci95[0]))
    assert inside >= 34  # 95 % of 40 are 38; chance leaves fewer than 34 once in 300 times
    assert np.median(widths) < 0.92


def test_single_slow_steps_move_the_middle_half_by_less_than_half_a_per_cent() -> None:
    slower, faster = steps(1)
    before = middle_half(slower, faster)["mean"]
    for at in range(0, 400, 40):  # somebody else's work hits one arm at a time
        (slower if at % 80 else faster)[at] *= 5
    assert middle_half(slower, faster)["mean"] == pytest.approx(before, abs=0.005)


def test_each_arm_stands_at_each_place_once() -> None:
    names = ["a", "b", "c", "d"]
    orders = balanced(names, random.Random(3))
    assert all(sorted(order) == names for order in orders)
    places = Counter((name, place) for order in orders for place, name in enumerate(order))
    assert set(places.values()) == {1} and len(places) == 16
    assert orders != balanced(names, random.Random(4))
