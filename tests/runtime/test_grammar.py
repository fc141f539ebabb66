"""A sequence under a grammar says what the grammar allows, whatever else happens to it, and slows nobody else."""

from __future__ import annotations

import itertools
import json
import re
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import RequestError
from server.runtime.engine import Engine
from server.runtime.grammar import Constraint, Grammars
from server.runtime.messages import Grammar, SamplingParams, Submit, TokenOutput
from tests.engines import engine_on, outputs_of, tokens_of

PROMPT = tuple(range(40, 70))


@pytest.fixture(scope="module")
def engine(tiny_llama_folder: Any) -> Engine:
    return engine_on(str(tiny_llama_folder), max_model_len=512, max_num_seqs=4)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Any) -> Any:
    return smollm2.tokenizer


def schema_of(schema: Any) -> Grammar:
    return Grammar("json", json.dumps(schema), "response_format", "[ ]{1,2}")


def constrained(grammar: Grammar, **more: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 200, "temperature": 1.0, "seed": 1, "grammar": grammar, **more})


def answers(engine: Engine, tokenizer: Any, submit: Submit) -> list[tuple[str, str | None]]:
    """Text and finish reason of every child."""
    collected = outputs_of(engine, [submit])
    return [
        (
            tokenizer.decode(tokens_of(collected[submit.request_id, i])),
            collected[submit.request_id, i][-1].finish_reason,
        )
        for i in range(submit.n)
    ]


# Everything bounded, so that a random model comes to an end.
names = st.text("abcxyz", min_size=1, max_size=3)
leaves = st.one_of(
    st.just({"type": "integer", "minimum": -99, "maximum": 9999}),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"type": "string", "maxLength": 6}),
    st.just({"type": "string", "pattern": "^[a-c]{2,5}$"}),
    st.builds(lambda values: {"enum": values}, st.lists(names, min_size=1, max_size=4, unique=True)),
    st.builds(lambda value: {"const": value}, st.one_of(names, st.integers(-5, 5), st.just('é"\\\n안'))),
)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def build(properties: dict[str, Any], needed: int) -> dict[str, Any]:
        required = sorted(properties)[:needed]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.builds(build, st.dictionaries(names, inner, max_size=3), st.integers(0, 3))


schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        objects(inner),
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3)),
        st.builds(lambda branches: {"anyOf": branches}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=5,
)


@settings(max_examples=25)
@given(schemas, st.integers(0, 99), st.booleans())
def test_answers_follow_any_schema(engine: Engine, tokenizer: Any, schema: Any, seed: int, greedy: bool) -> None:
    params = constrained(schema_of(schema), seed=seed, temperature=0.0 if greedy else 1.0, max_tokens=450)
    ((text, reason),) = answers(engine, tokenizer, Submit("s", PROMPT, params))
    assert reason == "stop", text
    jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("more", [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}], ids=str)
def test_expressions_and_choices_bind_every_way_of_sampling(engine: Engine, tokenizer: Any, more: Any) -> None:
    shapes = {
        Grammar("regex", r"[0-9]{3}-(yes|no)", "structured_outputs.regex"): r"[0-9]{3}-(yes|no)",
        Grammar("choice", '["red wine", "gr\\u00fcn", "a.b"]', "structured_outputs.choice"): r"red wine|grün|a\.b",
        Grammar("grammar", 'start: "x" ("," "y")~2', "structured_outputs.grammar"): r"x,y,y",
        Grammar("grammar", 'root ::= "x" ("," "y"){2}', "structured_outputs.grammar"): r"x,y,y",
    }
    for grammar, expression in shapes.items():
        ((text, reason),) = answers(engine, tokenizer, Submit("s", PROMPT, constrained(grammar, **more)))
        assert re.fullmatch(expression, text) and reason == "stop", text


def test_forks_begin_anew_and_seeds_repeat(engine: Engine, tokenizer: Any) -> None:
    params = constrained(Grammar("regex", "[a-z]{10}", "structured_outputs.regex"), seed=5)
    first = answers(engine, tokenizer, Submit("f", PROMPT, params, n=3))
    assert len({text for text, _ in first}) == 3 and all(re.fullmatch("[a-z]{10}", text) for text, _ in first)
    assert answers(engine, tokenizer, Submit("f", PROMPT, params, n=3)) == first


def test_preempted_sequences_say_the_same(tiny_llama_folder: Any, tokenizer: Any) -> None:
    params = constrained(Grammar("regex", "([a-z]{3} ){12}", "structured_outputs.regex"), seed=5)
    submits = [Submit(f"r{i}", tuple(range(40 + i, 70 + i)), params) for i in range(4)]
    block = 8 * 4 * 2 * 2 * 16 * 4  # tokens, layers, keys and values, heads, head_dim, fp32
    flags = {"max_model_len": 96, "block_size": 8}
    calm = outputs_of(engine_on(str(tiny_llama_folder), **flags), submits)
    tight = engine_on(str(tiny_llama_folder), kv_bytes=15 * block, **flags)
    pressed = outputs_of(tight, submits)
    assert tight.stats().preemptions_total > 0
    assert {k: tokens_of(v) for k, v in calm.items()} == {k: tokens_of(v) for k, v in pressed.items()}


def test_an_answer_cut_by_max_tokens_ends_with_length(engine: Engine, tokenizer: Any) -> None:
    params = constrained(Grammar("regex", "[a-z]{500}", "structured_outputs.regex"), max_tokens=5)
    ((text, reason),) = answers(engine, tokenizer, Submit("s", PROMPT, params))
    assert reason == "length" and re.fullmatch("[a-z]+", text)


def test_an_end_of_text_comes_only_where_the_answer_may_end(engine: Engine, tokenizer: Any) -> None:
    """With min_tokens or ignore_eos it comes later, but a complete answer ends even so."""
    open_end = Grammar("regex", "[a-z]{2,400}", "structured_outputs.regex")
    ends = tuple((i, 100.0) for i in engine.eos_ids)
    (soon,) = answers(engine, tokenizer, Submit("s", PROMPT, constrained(open_end, logit_bias=ends)))
    assert soon[1] == "stop" and 2 <= len(soon[0]) < 30
    late = constrained(open_end, logit_bias=ends, min_tokens=15)
    collected = outputs_of(engine, [Submit("s", PROMPT, late)])["s", 0]
    assert len(tokens_of(collected)) >= 16
    never = constrained(open_end, logit_bias=ends, ignore_eos=True, max_tokens=40)
    ((text, reason),) = answers(engine, tokenizer, Submit("s", PROMPT, never))
    assert reason == "length" and re.fullmatch("[a-z]+", text)
    short = constrained(Grammar("choice", '["ja"]', "structured_outputs.choice"), ignore_eos=True, min_tokens=30)
    assert answers(engine, tokenizer, Submit("s", PROMPT, short)) == [("ja", "stop")]


def test_logprobs_are_the_models_own(engine: Engine) -> None:
    params = constrained(Grammar("choice", '["zebra"]', "structured_outputs.choice"), logprobs=3)
    outputs = outputs_of(engine, [Submit("s", PROMPT, params)])["s", 0]
    first = outputs[0].logprobs[0]
    assert first.logprob < first.top[0][1] and first.rank > 1


def test_a_special_token_is_no_text(engine: Engine, tokenizer: Any) -> None:
    """The characters of one may be spelt, the token itself may not be said for them."""
    params = constrained(Grammar("regex", r"<\|im_end\|>", "structured_outputs.regex"))
    outputs = outputs_of(engine, [Submit("s", PROMPT, params)])["s", 0]
    assert tokenizer.decode(tokens_of(outputs)) == "<|im_end|>"


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────────

USELESS = [
    ("json", '{"type": "nonsense"}', "nonsense"),
    ("json", '{"type": "string", "minLength": 5, "maxLength": 2}', "minLength"),
    ("json", '{"not": {"type": "string"}}', "not"),
    ("json", '{"$ref": "http://127.0.0.1/schema"}', "127.0.0.1"),
    ("json", '{"$ref": "#/$defs/a"}', "defs"),
    ("json", "[]", "object"),
    ("json", "{", "JSON schema"),
    ("json", "false", "JSON schema"),
    ("json", json.dumps({"enum": [f"{i}" * 40 for i in range(1000)]}), ""),
    ("regex", "[0-9", "regular expression"),
    ("regex", "(?=a)b", "look"),
    ("regex", "(" * 5000 + "a" + ")" * 5000, "regular expression"),
    ("regex", "(a?){500}a{500}", "regular expression"),
    ("grammar", "start: x", "x"),
    ("grammar", "root ::= " + "(" * 5000, "grammar"),
    ("grammar", 'start: %json {"$ref": "file:///etc/passwd"}', "passwd"),
    ("grammar", '%llguidance {"no_forcing": false}\nstart: "a"', "%llguidance"),
    ("grammar", "start: /a+/ /a+/", ""),
    ("choice", json.dumps([f"{i} way" for i in range(20_000)]), "choices"),
    ("choice", '["\\ud800"]', "choices"),
]


@pytest.mark.parametrize("kind, text, word", USELESS, ids=lambda value: str(value)[:30])
def test_what_cannot_be_used_is_refused_in_one_line(engine: Engine, kind: Any, text: str, word: str) -> None:
    began = time.monotonic()
    collected = outputs_of(
        engine, [Submit("bad", PROMPT, constrained(Grammar(kind, text, "field"), max_tokens=3), n=2)]
    )
    ends = [outputs[-1] for outputs in collected.values()]
    if all(end.error is None for end in ends):
        assert word == ""  # large or endless, and usable
        return
    for end in ends:
        assert isinstance(end.error, RequestError) and end.error.param == "field" and end.finish_reason == "error"
        assert word in end.error.message and "\n" not in end.error.message and len(end.error.message) < 400
    assert time.monotonic() - began < 5
    assert engine.idle and not engine._requests and not engine._constrained


def test_a_grammar_that_goes_astray_ends_its_own_request(engine: Engine, tokenizer: Any) -> None:
    """An expression whose states explode as it is followed: refused in the middle, the other answer is whole."""
    astray = constrained(Grammar("regex", "([a-b]*a[a-b]{12}){3}c", "structured_outputs.regex"), max_tokens=400)
    plain = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    alone = tokens_of(outputs_of(engine, [Submit("alone", PROMPT, plain)])["alone", 0])
    both = outputs_of(engine, [Submit("astray", PROMPT, astray), Submit("plain", PROMPT, plain)])
    assert tokens_of(both["plain", 0]) == alone
    assert both["astray", 0][-1].finish_reason in ("error", "length", "stop")


# ── beside others ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_nobody_waits_for_a_grammar_that_compiles_or_thinks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler and masks that take 50 ms each: the plain sequence goes on meanwhile."""
    compile_, advance = Grammars.compile, Constraint._advance
    monkeypatch.setattr(Grammars, "compile", lambda self, grammar: (time.sleep(0.05), compile_(self, grammar))[1])
    monkeypatch.setattr(Constraint, "_advance", lambda self, token: (time.sleep(0.05), advance(self, token))[1])
    slow = constrained(Grammar("regex", "[q-t]{6}", "structured_outputs.regex"))
    engine.submit(Submit("slow", PROMPT, slow))
    engine.submit(Submit("plain", PROMPT, SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)))
    seen: list[TokenOutput] = []
    while not engine.idle:
        seen += engine.step().outputs
        engine.scheduler.check()
    order = [output.request_id for output in seen]
    assert order.index("slow") > 3  # it compiled
    between = [i for i, name in enumerate(order) if name == "slow"]
    assert max(b - a for a, b in itertools.pairwise(between)) > 3  # it thought
    assert len(order) > 200


def test_a_compiler_that_never_ends_is_given_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.runtime.grammar.COMPILE_SECONDS", 0.05)
    monkeypatch.setattr(Grammars, "compile", lambda self, grammar: time.sleep(0.3))
    collected = outputs_of(engine, [Submit("s", PROMPT, constrained(Grammar("regex", "never", "field")))])
    assert "not compiled after" in str(collected["s", 0][0].error)


def test_a_request_may_leave_while_its_grammar_compiles(engine: Engine) -> None:
    engine.submit(Submit("gone", PROMPT, constrained(Grammar("regex", "[u-w]{9}", "field")), n=3))
    engine.abort("gone")
    assert engine.idle and not engine._constrained
    engine.scheduler.check()
