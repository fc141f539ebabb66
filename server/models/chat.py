"""Chat templates: a conversation as the text a model was trained on, by the model's own jinja2 template.

The environment is the one Hugging Face templates are written for: blocks trimmed, `break` and `continue`, `tojson`
without HTML escapes, `raise_exception`, `strftime_now`, `{% generation %}`. Templates come with models and messages
from strangers, so both run in jinja2's immutable sandbox, on plain JSON values alone.
Knows no roles and no tokenizer; the text's special tokens become ids when it is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from server.errors import RequestError

# Other names clients give a message's reasoning; templates read the first, gpt-oss's the second.
REASONING = ("reasoning_content", "thinking", "reasoning")


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> str:
    """The conversation as text, equal to transformers' `apply_chat_template(..., tokenize=False)`.

    `special_tokens` are `bos_token`, `eos_token` and the like; `kwargs` (tools, documents, the client's own) reach
    the template as they are. Raises RequestError for what the template refuses or cannot render.
    """
    if not messages:
        raise RequestError("messages is empty; it needs at least one message", param="messages")
    compiled = _compile(template)
    try:
        values = json.loads(json.dumps({"tools": None, "documents": None, **(special_tokens or {}), **kwargs}))
        conversation = [_message(json.loads(json.dumps(message))) for message in messages]
        return compiled.render({**values, "messages": conversation, "add_generation_prompt": add_generation_prompt})
    except Exception as error:  # a template is a program: it can fail in any way a program can
        raise _refused(error) from None


def _message(given: dict[str, Any]) -> dict[str, Any]:
    """Without the keys whose value is null, which templates would print, and with reasoning under its usual names."""
    message = {key: value for key, value in given.items() if value is not None}
    reasoning = next((message[name] for name in REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _refused(error: Exception) -> RequestError:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, TemplateError) and not isinstance(error, TemplateSyntaxError):
        return RequestError(f"the chat template refused the messages: {text}", param="messages")
    return RequestError(f"the chat template could not render the messages: {text}", param="messages")


class _Namespace(Namespace):
    """jinja2's `namespace`, without underscore names: they would lead out of the sandbox.

    `*args` alone, so that `namespace(self=...)` stays a legal call.
    """

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot hold the name {name!r}")


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training masks; for rendering it is a scope."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own protocol

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: Any) -> NoReturn:
    raise TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace, dict=_dict
    )
    return environment


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    try:
        return _environment().from_string(template)
    except (TemplateSyntaxError, RecursionError) as error:
        raise RequestError(f"the chat template is no valid template: {' '.join(str(error).split())}") from None
