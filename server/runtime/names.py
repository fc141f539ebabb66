"""The names of models: the backbone's, and with a plus each memory that is read: `smollm2-135m+wordnet+mine`.

    served_models   the names a server lists        model_of   the memories behind a name, listed or not

Any choice of the attached memories is a model, in any order; listed are all choices of up to four, beyond that each
memory alone, and all of them. Knows names only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

Models = tuple[tuple[str, tuple[str, ...]], ...]
MOST_LISTED = 4


def served_models(
    base: str, attached: Sequence[str], default: Sequence[str], fixed: frozenset[str] = frozenset()
) -> Models:
    """(name, memories) of each listed model, the default first: the one with the memories of `default` still there.

    Every choice holds the `fixed` memories, without which the model is not whole.
    """
    free = [name for name in attached if name not in fixed]
    sizes = range(len(free), -1, -1) if len(free) <= MOST_LISTED else (len(free), 1, 0)
    choices = [
        tuple(name for name in attached if name in {*chosen, *fixed}) for k in sizes for chosen in combinations(free, k)
    ]
    first = tuple(name for name in attached if name in {*default, *fixed})
    return tuple((name_of(base, chosen), chosen) for chosen in dict.fromkeys([first, *choices]))


def name_of(base: str, memories: Sequence[str]) -> str:
    return "+".join((base, *memories))


def model_of(
    asked: str, base: str, attached: Sequence[str], fixed: frozenset[str] = frozenset()
) -> tuple[str, ...] | None:
    """The memories that the model `asked` reads, in attachment order; None if there is no such model."""
    if asked != base and not asked.startswith(base + "+"):
        return None
    named = asked[len(base) + 1 :].split("+") if asked != base else []
    if len(set(named)) != len(named) or not set(named) <= set(attached) or not fixed <= set(named):
        return None
    return tuple(name for name in attached if name in named)
