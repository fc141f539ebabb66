"""Values: a JSON object read with checks: a wrong type is a broken model, not a TypeError later. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.errors import BrokenModel

INT64_MAX = (1 << 63) - 1
SMALLEST, LARGEST = 1e-30, 1e30  # of a number that is no count: beyond them sums of float64 overflow


@dataclass(frozen=True, slots=True)
class Values:
    """A model's settings by key, as its config.json gives them."""

    values: Mapping[str, Any]

    def _get(self, key: str, default: float | None) -> Any:
        if key not in self.values and default is None:
            raise BrokenModel(f"the model's config lacks {key}")
        return self.values.get(key, default)

    def integer(self, key: str, default: int | None = None, least: int = 1, most: int = INT64_MAX) -> int:
        """A whole number from `least` to `most`. Raises BrokenModel."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise BrokenModel(f"the model's config has {key} = {value!r}; it must be a whole number from {least} on")
        if value > most:
            raise BrokenModel(f"the model's config has {key} = {value}; more than {most} are no model's")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number from SMALLEST to LARGEST. Raises BrokenModel."""
        value = self._get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not SMALLEST <= value <= LARGEST:
            raise BrokenModel(
                f"the model's config has {key} = {value!r}; it must be a number from {SMALLEST} to {LARGEST}"
            )
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; false where the key is missing."""
        return bool(self.values.get(key, False))

    def per_layer(self, key: str, layers: int) -> list[Any] | None:
        """One item per layer, or None where there is no such list. Raises BrokenModel for a list of another length."""
        items = self.values.get(key)
        if items is None:
            return None
        if not isinstance(items, list) or len(items) < layers:
            raise BrokenModel(f"the model's config has {key} = {items!r}; it must list {layers} layers")
        return items[:layers]


def token_ids(key: str, value: Any) -> tuple[int, ...]:
    """One id, a list of ids or nothing, as a tuple. Raises BrokenModel."""
    ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= INT64_MAX for i in ids):
        raise BrokenModel(f"{key} is {value!r}; it must be a token id or a list of them")
    return tuple(ids)
