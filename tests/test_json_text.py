"""JSON from outside: values, or a ValueError of one line."""

from __future__ import annotations

import pytest

from server.errors import EngramError
from server.json_text import MOST_DEPTH, parsed


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_values_come_as_they_are() -> None:
    assert parsed('{"a": [1, {"b": null}], "c": 0.5}') == {"a": [1, {"b": None}], "c": 0.5}
    assert parsed(nested(MOST_DEPTH)) is not None


@pytest.mark.parametrize("text", ["", "{", "nul", "9" * 5000, nested(MOST_DEPTH + 1), nested(900), "[" * 100_000])
def test_whatever_is_wrong_is_a_value_error_of_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        parsed(text)


def test_a_name_of_several_lines_makes_no_message_of_several() -> None:
    assert str(EngramError("no tensor 'a\nb\u2028c'")) == EngramError("no tensor 'a\nb\u2028c'").message
    assert str(EngramError("a\nb\u2028c")) == "a b c"
