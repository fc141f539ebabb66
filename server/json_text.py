"""JSON that people hand over, as plain values: whatever is wrong with it is a ValueError of one line.

Bounded depth, because a value that nests a thousand levels deep can be read and then neither shown nor copied.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

MOST_DEPTH = 64


def parsed(text: str | bytes) -> Any:
    """The values of a JSON text. Raises ValueError for what is no JSON or nests deeper than MOST_DEPTH."""
    try:
        value = json.loads(text)
    except RecursionError:
        _too_deep()
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [inner for outer in level for inner in _items(outer)]
        if not level:
            return value
    _too_deep()


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _too_deep() -> NoReturn:
    raise ValueError(f"it nests deeper than {MOST_DEPTH} levels")
