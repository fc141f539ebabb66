"""Model names: the backbone's, and a plus for each memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.runtime.names import MOST_LISTED, model_of, name_of, served_models

NAMES = st.lists(st.sampled_from("abcdef"), unique=True, max_size=6)


def test_every_choice_of_two_memories_is_listed_the_default_first() -> None:
    assert served_models("m", ("a", "b"), ("a", "b")) == (
        ("m+a+b", ("a", "b")),
        ("m+a", ("a",)),
        ("m+b", ("b",)),
        ("m", ()),
    )
    assert [name for name, _ in served_models("m", ("a", "b"), ("a",))] == ["m+a", "m+a+b", "m+b", "m"]
    assert [name for name, _ in served_models("m", ("s", "a"), ("s", "a"), frozenset("s"))] == ["m+s+a", "m+s"]
    assert served_models("m", (), ()) == (("m", ()),)


@given(NAMES, NAMES)
def test_each_listed_name_means_what_it_is_listed_with(attached: list[str], default: list[str]) -> None:
    models = served_models("m+x", attached, default)
    assert len(models) == len(dict(models)) <= 2**MOST_LISTED + 3
    assert all(model_of(name, "m+x", attached) == chosen for name, chosen in models)


@given(NAMES, st.data())
def test_any_choice_in_any_order_is_a_model(attached: list[str], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(attached), unique=True) if attached else st.just([]))
    expected = tuple(name for name in attached if name in chosen)
    assert model_of(name_of("m", chosen), "m", attached) == expected


def test_other_names_are_no_model() -> None:
    for name in ("", "m+", "m+c", "m+a+a", "a", "m+b", "ma", "M"):
        assert model_of(name, "m", ("a",)) is None
    assert model_of("m", "m", ("s",), frozenset("s")) is None
