"""Placement: every table gets a tier that has room for it, or the flag and the value that would help are named."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.cache.placement import Room, TableNeed, place_tables
from server.errors import CapacityError, SettingsError

GIB = 1 << 30
NEEDS = [TableNeed("a/1", 10 * GIB, 1 << 20), TableNeed("a/3", 1 * GIB, 1 << 20), TableNeed("b/1", 40 * GIB, 1 << 20)]


def tiers(asked: list[str], room: Room) -> list[str]:
    return [place.tier for place in place_tables(NEEDS, asked, room)]


def test_beside_a_cpu_tables_stay_where_they_are() -> None:
    assert tiers([], Room("cpu", 100 * GIB, 100 * GIB)) == ["mapped"] * 3
    assert tiers(["auto"], Room("cpu", 100 * GIB, 100 * GIB)) == ["mapped"] * 3


def test_beside_a_gpu_each_table_takes_the_first_tier_with_room() -> None:
    assert tiers([], Room("cuda", 70 * GIB, 45 * GIB)) == ["pinned", "device", "mapped"]
    assert tiers([], Room("cuda", 70 * GIB, 45 * GIB, host_limit=5 * GIB)) == ["mapped", "device", "mapped"]


def test_the_narrowest_wish_counts() -> None:
    room = Room("cpu", 100 * GIB, 100 * GIB)
    assert tiers(["pinned", "a=mapped", "a/3=device"], room) == ["mapped", "device", "pinned"]


def test_a_name_that_no_table_has_is_refused_with_those_there_are() -> None:
    with pytest.raises(SettingsError, match="names 'c', which is no table; there are a/1, a/3, b/1"):
        tiers(["c=device"], Room("cpu", GIB, GIB))


@pytest.mark.parametrize("tier", ["device", "pinned"])
def test_what_does_not_fit_is_refused_with_both_sizes_and_what_would(tier: str) -> None:
    with pytest.raises(CapacityError, match=rf"b/1 takes {40 * GIB} bytes and {30 * GIB} are left .*b/1=mapped$"):
        tiers([f"b={tier}"], Room("cpu", 30 * GIB, 30 * GIB))
    with pytest.raises(CapacityError) as error:
        tiers([f"b={tier}"], Room("cpu", 50 * GIB, 50 * GIB, host_limit=20 * GIB))
    limit = re.search(r"--host-memory-limit (\d+)", str(error.value))
    assert limit is not None
    needed = int(limit[1]) + sum(2 << 20 for _ in range(2))  # the mapped tables' steps come on top
    assert tiers([f"b={tier}"], Room("cpu", 50 * GIB, 50 * GIB, host_limit=needed))[2] == tier


def test_a_limit_below_two_steps_of_mapped_pages_is_refused_with_the_least_that_would_do() -> None:
    room = Room("cpu", 50 * GIB, 50 * GIB, host_limit=5 << 20)
    with pytest.raises(CapacityError, match=rf"--host-memory-limit is {5 << 20} bytes; .*set it to {6 << 20}"):
        tiers([], room)
    assert tiers([], Room("cpu", 50 * GIB, 50 * GIB, host_limit=6 << 20)) == ["mapped"] * 3


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    device=st.sampled_from(["cpu", "cuda"]),
    device_free=st.integers(0, 100),
    host_free=st.integers(0, 100),
    limit=st.integers(0, 100),
)
def test_what_auto_copies_never_exceeds_what_is_free(
    sizes: list[int], device: str, device_free: int, host_free: int, limit: int
) -> None:
    needs = [TableNeed(f"p/{i}", size, 0) for i, size in enumerate(sizes)]
    places = place_tables(needs, ["auto"], Room(device, device_free, host_free, limit))
    on_device = sum(place.need.nbytes for place in places if place.tier == "device")
    pinned = sum(place.need.nbytes for place in places if place.tier == "pinned")
    assert on_device <= device_free
    assert pinned <= (min(host_free, limit) if limit else host_free)
