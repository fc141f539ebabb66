"""`response_format` and `structured_outputs`: from a request's fields to the grammar its answer must follow.

Checks shapes and sizes only; whether a schema, expression or grammar can be used shows when the engine compiles it,
which it does before the answer begins, so that this too is a 400.
"""

from __future__ import annotations

from typing import Any

from server.api.schemas import ResponseFormat, SamplingFields, StructuredOutputs
from server.api.sse import compact
from server.errors import RequestError
from server.runtime.messages import Grammar

MOST_BYTES = 64 << 10
# Without a bound, a small model that has begun to indent may never stop.
WHITESPACE = r"[ \t\r\n]{1,64}"
# What vLLM has besides.
UNSUPPORTED = frozenset({"structural_tag", "disable_additional_properties"})
ANY_OBJECT = {"type": "object"}


def grammar_of(body: SamplingFields) -> Grammar | None:
    """None: any text. Raises RequestError for more than one shape, an empty one, or one that is too large."""
    found = [*_from_format(body.response_format), *_from_outputs(body.structured_outputs)]
    if not found:
        return None
    if len(found) > 1:
        names = " and ".join(grammar.param for grammar in found)
        raise RequestError(f"{names} both say what the answer must look like; give one", param=found[1].param)
    (grammar,) = found
    try:
        size = len(grammar.text.encode())
    except UnicodeEncodeError:
        raise RequestError(
            f"{grammar.param} holds a lone surrogate, which is no character", param=_top(grammar.param)
        ) from None
    if size > MOST_BYTES:
        raise RequestError(
            f"{grammar.param} has {size} bytes and the limit is {MOST_BYTES}; make it smaller",
            param=_top(grammar.param),
        )
    return grammar


def _from_format(given: ResponseFormat | None) -> list[Grammar]:
    if given is None or given.type == "text":
        return []
    if given.type == "json_object":
        return [Grammar("json", compact(ANY_OBJECT), "response_format", WHITESPACE)]
    if given.json_schema is None or given.json_schema.definition is None:
        raise RequestError(
            "response_format of type json_schema needs json_schema: {name, schema}", param="response_format"
        )
    return [_json(given.json_schema.definition, "response_format.json_schema.schema", WHITESPACE)]


def _from_outputs(given: StructuredOutputs | None) -> list[Grammar]:
    if given is None:
        return []
    for name in UNSUPPORTED.intersection(given.model_extra or {}):
        if (given.model_extra or {})[name]:
            raise RequestError(f"structured_outputs.{name} is not supported by this server", param="structured_outputs")
    found = []
    whitespace = given.whitespace_pattern or (r"[ ]{0,1}" if given.disable_any_whitespace else WHITESPACE)
    if given.definition is not None:
        found.append(_json(given.definition, "structured_outputs.json", whitespace))
    if given.json_object:
        found.append(_json(ANY_OBJECT, "structured_outputs.json_object", whitespace))
    if given.regex is not None:
        found.append(Grammar("regex", given.regex, "structured_outputs.regex"))
    if given.choice is not None:
        found.append(Grammar("choice", compact(given.choice), "structured_outputs.choice"))
    if given.grammar is not None:
        found.append(Grammar("grammar", given.grammar, "structured_outputs.grammar"))
    return found


def _json(schema: Any, param: str, whitespace: str) -> Grammar:
    try:
        text = schema if isinstance(schema, str) else compact(schema)
    except (RecursionError, ValueError) as error:
        raise RequestError(f"{param} cannot be read: {error}", param=_top(param)) from None
    return Grammar("json", text, param, whitespace)


def _top(param: str) -> str:
    return param.split(".")[0]
