"""From texts, token ids and conversations to prompts: token ids, and the text to echo."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.api.sampling import check_ids
from server.api.schemas import ChatMessage, ChatRequest, CompletionRequest
from server.api.service import Service
from server.errors import RequestError

MOST_PROMPTS = 1024
# Longer texts are tokenised beside the event loop (about 1 ms for this many characters).
QUICK_TEXT = 4096
# Of a template's variables, those that are the server's to set.
RESERVED = frozenset({"template", "messages", "special_tokens", "add_generation_prompt"})


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` is what the client wrote, or what its ids mean."""

    token_ids: tuple[int, ...]
    text: str


async def completion_prompts(service: Service, request: CompletionRequest) -> list[Prompt]:
    """One prompt per text or list of ids. Raises RequestError for empty ones and for those beyond the context."""
    given = request.prompt
    prompts: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not prompts:
        raise RequestError("prompt or prompt_embeds must be non-empty: the list has no prompt", param="prompt")
    if len(prompts) > MOST_PROMPTS:
        raise RequestError(f"prompt has {len(prompts)} prompts and the limit is {MOST_PROMPTS}", param="prompt")
    return [await _prompt(service, each, request.add_special_tokens is not False) for each in prompts]


async def _prompt(service: Service, given: str | list[int], add_special_tokens: bool) -> Prompt:
    if isinstance(given, str):
        ids = await encode(service, given, add_special_tokens, "prompt")
        return Prompt(check_length(service, ids, "prompt"), given)
    check_ids(given, service.vocab_size, "prompt")
    return Prompt(check_length(service, given, "prompt"), service.pieces.text(given, skip_special=False))


async def chat_prompt(service: Service, request: ChatRequest) -> Prompt:
    """The conversation through the model's template; `text` is the final message if the answer continues it."""
    if (
        request.continue_final_message
        and request.add_generation_prompt
        and "add_generation_prompt" in request.model_fields_set
    ):
        raise RequestError(
            "continue_final_message and add_generation_prompt cannot both be true", param="continue_final_message"
        )
    messages = message_dicts(request.messages)
    generate = request.add_generation_prompt is not False and not request.continue_final_message
    text = await conversation(service, messages, generate, request.chat_template_kwargs or {})
    final = ""
    if request.continue_final_message:
        final = str(messages[-1].get("content") or "").strip()
        if not final or final not in text:
            raise RequestError(
                "continue_final_message needs a last message whose text the chat template keeps", param="messages"
            )
        text = text[: text.rindex(final) + len(final)]
    ids = await encode(service, text, bool(request.add_special_tokens), "messages")
    return Prompt(check_length(service, ids, "messages"), final)


async def conversation(
    service: Service, messages: list[dict[str, Any]], add_generation_prompt: bool, options: Mapping[str, Any]
) -> str:
    """A conversation as the model's text. Raises RequestError if the model has no template or it refuses."""
    if service.renderer is None:
        raise RequestError(
            f"{service.name} has no chat template; use /v1/completions or serve a model that has one", param="messages"
        )
    if reserved := RESERVED & options.keys():
        raise RequestError(
            f"chat_template_kwargs must not name {', '.join(sorted(reserved))}", param="chat_template_kwargs"
        )
    special = service.source.special_tokens
    return await asyncio.to_thread(
        service.renderer.render,
        messages,
        add_generation_prompt=add_generation_prompt,
        special_tokens=special,
        **options,
    )


def message_dicts(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    return [_plain(message) for message in messages]


def _plain(message: ChatMessage) -> dict[str, Any]:
    """A message as templates know it, its text parts joined by newlines. Raises RequestError for other parts."""
    extra: Mapping[str, Any] = message.model_extra or {}
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                raise RequestError(
                    f"a content part of type {part.type[:40]!r} is not supported; this model reads text",
                    param="messages",
                )
        content = "\n".join(part.text or "" for part in content)
    return {**extra, "role": message.role, "content": content, "name": message.name}


async def encode(service: Service, text: str, add_special_tokens: bool, param: str) -> list[int]:
    """Token ids. A text that cannot fit is refused before it is tokenised."""
    tokenizer, context = service.source.tokenizer, service.context
    least = len(text) // service.longest_piece
    if least >= context:
        raise _too_long(f"at least {least}", context, param)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{param} holds a lone surrogate, which is no character", param=param) from None
    if len(text) <= QUICK_TEXT:
        return tokenizer.encode(text, add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)


def check_length(service: Service, token_ids: list[int], param: str) -> tuple[int, ...]:
    """Raises RequestError for no tokens at all, or more than leave room for an answer."""
    if not token_ids:
        raise RequestError(f"{param}: the prompt is empty; give at least one token", param=param)
    if len(token_ids) >= service.context:
        raise _too_long(str(len(token_ids)), service.context, param)
    return tuple(token_ids)


def _too_long(tokens: str, context: int, param: str) -> RequestError:
    return RequestError(
        f"the prompt has {tokens} tokens and the context is {context} with the answer; "
        f"shorten it or raise --max-model-len",
        param=param,
    )
