"""What clients may send: OpenAI's fields, vLLM's additions, and `memory`.

Types are strict ("16" is no number), numbers finite and bounded. Fields we know but do not serve are refused, because
ignoring them would change the answer in silence; unknown ones pass and are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.errors import RequestError

INT64 = (1 << 63) - 1
MOST_CHOICES = 128  # OpenAI's bound on n
MOST_STOPS = 64
MOST_BIASES = 1024
MOST_REDIRECTS = 64
MOST_OPTIONS = 1024

Int = Annotated[int, Field(ge=-INT64 - 1, le=INT64)]
Count = Annotated[int, Field(ge=0, le=INT64)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]


class Wire(BaseModel):
    """A part of a request. Whatever is not declared is kept in `model_extra`."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class StreamOptions(Wire):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class RedirectChoice(Wire):
    source: Annotated[str, Field(min_length=1, max_length=1024)] = Field(
        alias="from", description="a name in the prompt"
    )
    target: Annotated[str, Field(min_length=1, max_length=1024)] = Field(
        alias="to", description="the name whose rows token-id memories read there"
    )
    mode: Literal["auto", "one_to_one", "average", "copy", "left_pad", "right_pad"] = "auto"
    occurrence: Literal["all", "last"] = "all"


class MemoryChoice(Wire):
    enabled: bool = Field(True, description="false: answer without the attached memories")
    trace: bool = Field(
        False, description="answer with memory_trace: each token's gate and n-gram at every Engram layer"
    )
    redirect: Annotated[list[RedirectChoice], Field(max_length=MOST_REDIRECTS)] = Field(
        default_factory=list, description="names of the prompt that token-id memories (STEM) shall read as others"
    )


JsonSchema = dict[str, Any] | bool


class NamedSchema(Wire):
    name: str | None = None
    description: str | None = None
    definition: JsonSchema | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="answers always follow the schema")


class ResponseFormat(Wire):
    """OpenAI's way to say what the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(Wire):
    """vLLM's way; one of the first five."""

    definition: JsonSchema | str | None = Field(None, alias="json", description="a JSON schema, or its text")
    json_object: bool | None = Field(None, description="any JSON object")
    regex: Annotated[str, Field(min_length=1)] | None = Field(None, description="the whole answer matches")
    choice: (
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MOST_OPTIONS)] | None
    ) = Field(None, description="the answer is one of these")
    grammar: Annotated[str, Field(min_length=1)] | None = Field(None, description="Lark, or llama.cpp's GBNF")
    whitespace_pattern: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="a regular expression: what may stand between the tokens of JSON"
    )
    disable_any_whitespace: bool | None = Field(False, description="at most one blank between the tokens of JSON")


class SamplingFields(Wire):
    """What completions and chat have in common."""

    model: str | None = Field(None, description="a name from /v1/models; default: the first of them")
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = 1
    max_tokens: Count | None = None
    min_tokens: Count | None = 0
    temperature: Annotated[float, Field(ge=0, le=1000)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, le=INT64)] | None = Field(0, description="0 and -1: all tokens")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = 1.0
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASES)] | None = (
        Field(None, description="token id → what is added to its logit")
    )
    seed: Int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[Int], Field(max_length=MOST_BIASES)] | None = None
    include_stop_str_in_output: bool | None = False
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = Field(False, description="logprobs name tokens as token_id:N")
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = Field(
        None, description="requests share cached prefixes only with the same salt"
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    memory: MemoryChoice | None = None
    timings: bool | None = Field(False, description="answer with usage.timings; in a stream, in its last chunk")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def traced(self) -> bool:
        return self.memory is not None and self.memory.trace


class CompletionRequest(SamplingFields):
    prompt: str | list[Int] | list[str] | list[list[Int]] | None = Field(None, description="texts, or token ids")
    max_tokens: Count | None = 16
    echo: bool | None = False
    logprobs: Count | None = Field(None, description="alternatives per token, up to --max-logprobs")
    add_special_tokens: bool | None = True


class ContentPart(Wire):
    type: str
    text: str | None = None


class ChatMessage(Wire):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None
    name: str | None = None


class ChatRequest(SamplingFields):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Count | None = Field(None, description="alternatives per token, up to --max-logprobs")
    echo: bool | None = Field(False, description="with continue_final_message: begin with the last message")
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    add_special_tokens: bool | None = False
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(Wire):
    """A text (`prompt`) or a conversation (`messages`)."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = Field(None, description="what the template shall tell the model of")
    return_token_strs: bool | None = False


class DetokenizeRequest(Wire):
    model: str | None = None
    tokens: list[Int]


def _nothing(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _at_most_one(value: Any) -> bool:
    return value is None or value == 1


# Fields we know and do not serve → whether a value asks for nothing.
UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        ("suffix", "use_beam_search", "prompt_embeds", "truncate_prompt_tokens", "allowed_token_ids", "bad_words"),
        _nothing,
    ),
    **dict.fromkeys(("tools", "functions", "function_call", "audio", "prediction", "web_search_options"), _nothing),
    **dict.fromkeys(("chat_template", "documents", "logprob_token_ids"), _nothing),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), _nothing),
    "prompt_logprobs": lambda value: value is None,
    "best_of": _at_most_one,
    "tool_choice": lambda value: value in (None, "none", "auto"),
    "modalities": lambda value: value in (None, ["text"]),
    "length_penalty": _at_most_one,
}
# Fields without influence on the answer.
HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "request_id",
        "session_id",
        "priority",
        "spaces_between_special_tokens",
        "parallel_tool_calls",
    }
)


def check_extra_fields(extra: Mapping[str, Any] | None) -> int:
    """How many fields nobody knows. Raises RequestError for one that we know and do not serve."""
    extra = extra or {}
    for name, asks_for_nothing in UNSUPPORTED.items():
        if name in extra and not asks_for_nothing(extra[name]):
            raise RequestError(f"{name} is not supported by this server; leave it out", param=name)
    return sum(name not in UNSUPPORTED and name not in HARMLESS for name in extra)
