"""A chat template renders to the text transformers renders, and nothing in a message gets out of the sandbox."""

from datetime import datetime
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from server.errors import RequestError
from server.models.chat import render
from server.models.source import ModelSource

# Written for this test, one for each thing that published templates do.
TEMPLATES = {
    "headers": (
        "{{ bos_token }}\n"
        "{% for message in messages %}\n"
        "    {{- '[' + message['role'] + ']\\n' + message.content | trim + eos_token }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    ),
    "tools as JSON": (
        "{% if tools is not none %}{{ tools | tojson(indent=2) }}{% else %}no tools{% endif %}"
        "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    ),
    "undefined or none": "{{ documents is defined }}{{ documents is none }}{{ tools is none }}{{ nothing is defined }}",
    "namespace and reversed loop": (
        "{% set ns = namespace(last=-1) %}"
        "{% for m in messages[::-1] %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% break %}{% endif %}"
        "{% endfor %}last user {{ ns.last }} from the end"
    ),
    "continue": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}-{% endfor %}",
    "generation mark": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% set inner = 1 %}{% endgeneration %}{{ inner is defined }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content }};{% endfor %}",
    "keys present": "{% for m in messages %}{{ m.keys() | list | sort | join(',') }};{% endfor %}",
    "macro and date": "{% macro say(x) %}<{{ x }}>{% endmacro %}{{ say(strftime_now('%Y')) }}{{ dict(a=1) }}",
    "client's own variable": "{{ 'think' if enable_thinking is defined and enable_thinking else 'answer' }}",
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "plain": [{"role": "user", "content": "  Hello <b>&</b> 한글 \n"}],
    "many turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2", "reasoning": "simple"},
        {"role": "user", "content": "{{ 7 * 7 }} {% raw %} <|im_end|>"},
    ],
    "null content": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": "é<"}}}]},
    ],
}
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def reference(smollm2: ModelSource) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=smollm2.tokenizer.backend, **SPECIALS)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_templates_render_as_transformers_renders_them(
    reference: PreTrainedTokenizerFast, template: str, messages: list[dict[str, Any]]
) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": 'a "quoted" <tag>'}}]
    for kwargs in ({}, {"tools": tools, "enable_thinking": True}):
        for prompt in (True, False):
            theirs = reference.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=prompt, **kwargs
            )
            ours = render(template, messages, add_generation_prompt=prompt, special_tokens=SPECIALS, **kwargs)
            assert ours == theirs


def test_the_default_models_template_renders_as_transformers_renders_it(
    reference: PreTrainedTokenizerFast, smollm2: ModelSource
) -> None:
    template = smollm2.chat_template
    assert template is not None
    messages = CONVERSATIONS["many turns"]
    theirs = reference.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert render(template, messages, special_tokens=smollm2.special_tokens) == theirs
    text = render(template, messages[1:2], special_tokens=smollm2.special_tokens)
    assert text.endswith("<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n")


def test_the_date_is_todays() -> None:
    assert render("{{ strftime_now('%Y-%m') }}", [{}]) == datetime.now().strftime("%Y-%m")


def test_a_template_in_a_message_stays_text() -> None:
    assert render("{{ messages[0].content }}", [{"content": "{{ messages.__class__ }}"}]) == "{{ messages.__class__ }}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages[0].content.format(messages) }}",
        "{% set n = namespace(__class__=1) %}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ range(10 ** 9) | list }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_nothing_leads_out_of_the_sandbox(template: str) -> None:
    with pytest.raises(RequestError) as caught:
        render(template, [{"content": "{0.__class__.__init__.__globals__}"}])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ messages.__class__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ ('{0.__cl' + 'ass__}').format(messages) }}",
    ],
)
def test_names_with_underscores_render_to_nothing(template: str) -> None:
    assert render(template, [{"content": "x"}]) == ""


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "refused the messages: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "could not render"),
        ("{{ messages[7].content.strip() }}", "refused"),
        ("{% for m in messages %}", "no valid template"),
        ("{{ 1 / 0 }}", "could not render"),
        ("{{ missing() }}", "missing"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_what_a_template_cannot_render_is_the_requests_error(template: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        render(template, [{"role": "user", "content": "x"}])
    assert "\n" not in str(caught.value) and caught.value.param in ("messages", None)


def test_no_messages_and_messages_beyond_json_are_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        render("x", [])
    with pytest.raises(RequestError, match="could not render"):
        render("x", [{"content": object()}])
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(RequestError, match="could not render"):
        render("x", [{"content": nested}])
