"""From a request's fields to the engine's `SamplingParams`, with every value checked against this model."""

from __future__ import annotations

from server.api.schemas import SamplingFields
from server.api.structured import grammar_of
from server.errors import RequestError
from server.runtime.messages import SamplingParams

# Below this, dividing logits by the temperature overflows before it changes anything: it is greedy.
COLDEST = 1e-4
MOST_NAMED = 5


def sampling_params(
    request: SamplingFields, *, max_tokens: int, logprobs: int | None, prompt_logprobs: bool, vocab_size: int
) -> SamplingParams:
    """Raises RequestError for token ids outside the vocabulary and for min_tokens above max_tokens."""
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise RequestError(f"min_tokens is {min_tokens}, more than max_tokens, {max_tokens}", param="min_tokens")
    temperature = _or(request.temperature, 1.0)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature if temperature >= COLDEST else 0.0,
        top_k=max(request.top_k or 0, 0),
        top_p=_or(request.top_p, 1.0),
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        logit_bias=_biases(request, vocab_size),
        stop_token_ids=frozenset(check_ids(request.stop_token_ids or [], vocab_size, "stop_token_ids")),
        ignore_eos=bool(request.ignore_eos),
        seed=request.seed,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar_of(request),
        trace=request.traced,
        timings=bool(request.timings),
    )


def check_logprobs(asked: int | None, most: int, param: str) -> int | None:
    """The number of alternatives. Raises RequestError above the server's limit."""
    if asked is not None and asked > most:
        raise RequestError(f"{param} is {asked} and the limit is {most}; raise it with --max-logprobs", param=param)
    return asked


def answer_length(asked: int | None, prompt_tokens: int, context: int, *, param: str = "max_tokens") -> int:
    """How many tokens the answer may have; None asks for all the room there is. Raises RequestError beyond it."""
    room = context - prompt_tokens
    if asked is not None and asked > room:
        raise RequestError(
            f"{param} is {asked} and the prompt has {prompt_tokens} tokens, together more than the context of "
            f"{context}; set {param} to {room} or less, or raise --max-model-len",
            param=param,
        )
    return room if asked is None else asked


def check_ids(token_ids: list[int], vocab_size: int, param: str) -> list[int]:
    """Raises RequestError for an id the model has no embedding for."""
    for token_id in (min(token_ids), max(token_ids)) if token_ids else ():
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{param}: token id {token_id} is out of vocabulary; it has {vocab_size} tokens, 0 to {vocab_size - 1}",
                param=param,
            )
    return token_ids


def _biases(request: SamplingFields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    given = request.logit_bias or {}
    wrong = [key for key in given if not (key.isascii() and key.isdigit() and len(key) < 10)]
    if wrong:
        named = ", ".join(repr(key[:40]) for key in wrong[:MOST_NAMED])
        raise RequestError(
            f"logit_bias: keys must be token ids, written as numbers; these are none: {named}", param="logit_bias"
        )
    biases = {int(key): bias for key, bias in given.items()}
    check_ids(list(biases), vocab_size, "logit_bias")
    return tuple(biases.items())


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
