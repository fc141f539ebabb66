"""docs/api.md names every field a request may have, and no other; its numbers are the code's."""

from __future__ import annotations

import json
import re
from pathlib import Path

from server.api import replies, structured
from server.api.schemas import (
    HARMLESS,
    MOST_CHOICES,
    MOST_STOPS,
    UNSUPPORTED,
    ChatRequest,
    CompletionRequest,
    MemoryChoice,
    TokenizeRequest,
)

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def named(text: str) -> set[str]:
    return set(re.findall(r"`([a-z_]+)`", text))


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_table_has_every_field_in_the_endpoints_that_take_it() -> None:
    fields = {"C": set(CompletionRequest.model_fields), "H": set(ChatRequest.model_fields)}
    found: dict[str, set[str]] = {"C": set(), "H": set()}
    for cells in rows(section("Fields of a request")):
        for endpoint in cells[1].split():
            found[endpoint] |= named(cells[0])
    assert found == fields


def test_refused_and_accepted_fields_are_all_named() -> None:
    text = section("Fields of a request")
    refused = text.split("Refused with 400")[1].split("Accepted,")[0]
    assert set(UNSUPPORTED) <= named(refused) <= set(UNSUPPORTED) | {"none", "auto", "structured_outputs"}
    accepted = text.split("Accepted,")[1].split("Whatever else")[0]
    assert named(accepted) == HARMLESS


def test_memory_timings_and_tokenize_are_told_in_full() -> None:
    assert {name for cells in rows(section("Memory")) for name in named(cells[0])} == set(MemoryChoice.model_fields)
    told = {name for cells in rows(section("Timings")) for name in named(cells[0])}
    assert told == set(replies.Timings.model_fields)
    tokenize = next(cells for cells in rows(section("Other routes")) if "/tokenize" in cells[0])
    assert named(tokenize[1]) == set(TokenizeRequest.model_fields) - {"model"}


def test_the_examples_of_answers_are_answers() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    replies.MemoryTrace.model_validate(json.loads(example))


def test_its_numbers_are_the_codes() -> None:
    assert f"up to {MOST_CHOICES}" in PAGE and f"up to {MOST_STOPS};" in PAGE
    assert f"above {structured.MOST_BYTES >> 10} KiB" in PAGE
