"""A template from a stranger may be slow, greedy or mad: requests fail in time, and the next one is served."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from server.errors import RequestError
from server.models.chat import render
from server.models.renderer import Renderer

# What a message says decides what the template does, as in a template that behaves until it is triggered.
TEMPLATE = """\
{% set does = messages[0].content %}
{% if does == 'loops' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}
{% elif does == 'multiplies' %}{{ 'a' * (10 ** 10 + messages | length) }}
{% elif does == 'doubles' %}
{% set ns = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}
{% elif does == 'lists' %}
{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}
{% elif does == 'pads' %}{{ '%0999999999d' % (messages | length) }}
{% elif does == 'indents' %}{{ messages | tojson(indent=10 ** 9) }}
{% elif does == 'recurses' %}{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}
{% elif does == 'is long' %}{{ 'a' * (70000000 + messages | length) }}
{% elif does == 'reads' %}{% include '/etc/passwd' %}
{% else %}{{ messages[0].role }}: {{ does }}{% endif %}"""


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    made = Renderer(TEMPLATE, seconds=2.0, memory=256 << 20)
    made.start()
    yield made
    made.close()


def say(renderer: Renderer, text: str) -> str:
    return renderer.render([{"role": "user", "content": text}])


@pytest.mark.parametrize(
    "does", ["loops", "multiplies", "doubles", "lists", "pads", "indents", "recurses", "is long", "reads"]
)
def test_a_template_out_of_bounds_fails_its_request_and_no_other(renderer: Renderer, does: str) -> None:
    begun = time.monotonic()
    with pytest.raises(RequestError, match="the chat template") as refused:
        say(renderer, does)
    assert "\n" not in str(refused.value) and refused.value.param == "messages"
    assert say(renderer, "hello") == "user: hello"
    assert time.monotonic() - begun < 30  # a new child on a busy machine included


def test_it_renders_what_the_sandbox_renders(renderer: Renderer) -> None:
    messages = [{"role": "한글", "content": "🙂 <b>\n\t"}]
    assert renderer.render(messages) == render(TEMPLATE, messages)
    with pytest.raises(RequestError, match="empty"):
        renderer.render([])
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(RequestError, match="recursion"):
        renderer.render([{"content": nested}])


def test_threads_take_turns(renderer: Renderer) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda i=i: found.append(say(renderer, str(i)))) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(f"user: {i}" for i in range(16))


def test_a_child_that_dies_is_replaced(renderer: Renderer) -> None:
    say(renderer, "hello")
    assert renderer._child is not None
    renderer._child.kill()
    renderer._child.join()
    with pytest.raises(RequestError, match="ended its process"):
        say(renderer, "hello")
    assert say(renderer, "hello") == "user: hello"


@pytest.mark.parametrize(
    "escape",
    [
        "{{ lipsum.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ '' | attr('__class__') }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ [1, ''] | sort(attribute='__class__.__name__') | list }}",
        "{{ self._TemplateReference__context }}",
        "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
        "{% macro m() %}{% endmacro %}{{ m.__call__.__globals__ }}",
        "{{ dict.__subclasses__() }}",
        "{{ namespace(a=1) | attr('_Namespace__attrs') }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ '{0[__class__]}'.format(messages) }}",
        "{{ '{x.__class__}'.format_map({'x': 1}) }}",
        "{{ [].append.__self__ }}",
        "{{ strftime_now.__globals__ }}",
        "{{ messages[0].get.__self__.__class__ }}",
    ],
)
def test_a_hostile_template_learns_nothing_of_the_process(escape: str) -> None:
    try:
        text = render(escape, [{"role": "user", "content": "x"}])
    except RequestError as refused:
        text = "" if "unsafe" in refused.message or "undefined" in refused.message else refused.message
    assert text in ("", "[Undefined]") or "has no attribute" in text
