"""Random schemas, expressions and grammars: none hangs, none panics, and whatever is allowed is accepted."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import numpy as np
import pytest

from server.errors import RequestError
from server.runtime.grammar import Constraint, Grammars
from server.runtime.messages import Grammar

# Half a second is 25 times the worst that was seen on an idle machine.
SLOWEST = 0.5
ATOMS = [
    "a",
    ".",
    r"\d",
    r"\w",
    "[a-z]",
    "[^x]",
    "é",
    r"\p{L}",
    r"\x00",
    "^",
    "$",
    r"\b",
    "(?i)a",
    r"\u{1F600}",
    "\\",
    "[",
]
KEYWORDS = [
    "type", "properties", "items", "enum", "const", "anyOf", "allOf", "oneOf", "$ref", "$defs", "pattern",
    "minLength", "maxLength", "minimum", "maximum", "multipleOf", "required", "additionalProperties",
    "patternProperties", "prefixItems", "minItems", "maxItems", "format", "not", "if", "then", "uniqueItems",
    "propertyNames", "$id", "title", "default", "exclusiveMinimum", "minProperties",
]  # fmt: skip
TYPES = ["string", "integer", "number", "object", "array", "null", "boolean", "date-time", "#/$defs/a", "#", "uuid"]
RULES = [
    "start: ",
    "a: ",
    "b: ",
    "T: ",
    "root ::= ",
    "a ::= ",
    "%ignore /x/",
    "%import common.INT",
    'start: %json {"type":1}',
]
PARTS = ['"x"', "/a+/", "a", "b", "T", "|", "(", ")", "*", "+", "~3..5", "{2,3}", "?", "<|im_end|>", "<[5]>", "[", "]"]


class Nonsense:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def grammar(self) -> Grammar:
        kind: Any = self.rng.choice(["regex", "json", "grammar", "choice"])
        made = {"regex": self.regex, "json": lambda: json.dumps(self.schema()), "grammar": self.rules}
        texts = ["a", "\x00", "é", "<|im_end|>", "a\nb", "\\", '"']
        text = made[kind]() if kind in made else json.dumps(self.rng.choices(texts, k=3))
        return Grammar(kind, text, "field", r"[ \t\r\n]{1,64}")

    def regex(self, depth: int = 0) -> str:
        pick = self.rng.randrange(12) if depth < 5 else 0
        if pick < 3:
            return self.rng.choice(ATOMS)
        first, second = self.regex(depth + 1), self.regex(depth + 1)
        most = self.rng.choice([0, 3, 50, 5000, 10**9])
        forms = [first + second, f"({first}|{second})", f"({first})*", f"({first}){{{self.rng.randrange(5)},{most}}}"]
        return self.rng.choice([*forms, f"({first})+?", f"(?:{first})&~({second})", f"({first})?"])

    def schema(self, depth: int = 0) -> Any:
        if depth < 5 and self.rng.random() < 0.3:
            return {"type": "object", "properties": {name: self.schema(depth + 1) for name in "ab"}}
        return {self.rng.choice(KEYWORDS): self.value(depth) for _ in range(self.rng.randrange(1, 4))}

    def value(self, depth: int) -> Any:
        numbers = [0, -1, 5, 10**20, -(10**300), 1e308, 1e-300, 3.7, 2**63]
        plain = [self.rng.choice(TYPES), self.rng.choice(numbers), self.rng.choice([True, None]), self.regex(), {}, []]
        if depth > 4 or self.rng.random() < 0.5:
            return self.rng.choice(plain)
        inner = [self.schema(depth + 1) for _ in range(self.rng.randrange(1, 3))]
        return self.rng.choice([inner[0], inner, dict(zip(["a", "", "é"], inner, strict=False))])

    def rules(self) -> str:
        lines = range(self.rng.randrange(1, 5))
        return "\n".join(
            self.rng.choice(RULES) + " ".join(self.rng.choices(PARTS, k=self.rng.randrange(6))) for _ in lines
        )


def follow(constraint: Constraint, rng: random.Random, tokens: int) -> float:
    """Says random allowed tokens; the longest that one took."""
    slowest = 0.0
    for _ in range(tokens):
        allowed = np.flatnonzero(constraint.mask())
        assert len(allowed), "nothing may follow, and the answer is not complete"
        begun = time.perf_counter()
        constraint.accept(int(rng.choice(allowed)))
        while constraint.pending is not None and constraint.settle() is None:
            time.sleep(0.0002)
        slowest = max(slowest, time.perf_counter() - begun)
        if constraint.complete or constraint.error is not None:
            assert constraint.error is None or "satisfy" not in constraint.error.message
            return slowest
    return slowest


@pytest.mark.timeout(1200)
def test_nonsense_is_refused_or_followed(smollm2: Any, soak_seconds: float) -> None:
    grammars = Grammars(lambda: smollm2.tokenizer, smollm2.config.vocab_size, smollm2.config.eos_token_ids)
    deadline, seed, refused = time.monotonic() + min(soak_seconds, 300), 0, 0
    while time.monotonic() < deadline:
        seed += 1
        grammar, rng = Nonsense(seed).grammar(), random.Random(seed)
        constraint = Constraint(grammars, grammar)
        while not constraint.ready and constraint.settle() is None:
            time.sleep(0.0002)
        if isinstance(constraint.error, RequestError):
            assert "not compiled" not in constraint.error.message, grammar
            refused += 1
        else:
            assert follow(constraint, rng, 40) < SLOWEST, grammar
    print(f"{seed} grammars, {refused} refused")
    assert 0 < refused < seed
