"""What a memory knows and what it disturbs, asked of the engine that serves it: fetched rows, stored row type, and all.

    recall       of the pack's facts, how many a greedy continuation of the prompt gives back word for word
    perplexity   of general text, every token of every line but the first

Each with the memory and without. Knows engines and token ids; nothing of how the memory was taught.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.errors import PackError
from server.json_text import parsed
from server.models.tokenizer import Tokenizer
from server.runtime.engine import Engine
from server.runtime.messages import SamplingParams, Submit, TokenOutput
from server.training.data import read_text

PIECE = 256  # tokens of one line that are scored together


@dataclass(frozen=True, slots=True)
class Fact:
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Answer:
    """`said`: what the model wrote in the place of fact.completion, as many tokens; `ended`: it stopped there."""

    fact: Fact
    said: str
    ended: bool

    @property
    def right(self) -> bool:
        return self.said == self.fact.completion


def read_facts(path: Path) -> list[Fact]:
    """Raises PackError, with the line, for a file that is no JSONL of prompts and completions."""
    facts = []
    for number, line in enumerate(read_text(path, "the facts in").splitlines(), 1):
        try:
            entry = parsed(line)
            facts.append(Fact(str(entry["prompt"]), str(entry["completion"])))
        except (ValueError, KeyError, TypeError):
            raise PackError(f'{path}, line {number} is no {{"prompt": "...", "completion": "..."}}') from None
    return facts


def answers(engine: Engine, tokenizer: Tokenizer, facts: Sequence[Fact], packs: tuple[str, ...]) -> list[Answer]:
    """Greedy continuations of all prompts, one token longer than the completion, computed in batches."""
    submits = []
    for number, fact in enumerate(facts):
        params = SamplingParams(max_tokens=len(tokenizer.encode(fact.completion)) + 1, temperature=0)
        submits.append(Submit(f"fact-{number}", tuple(tokenizer.encode(fact.prompt)), params, packs))
    outputs = run(engine, submits)
    found = []
    for submit, fact in zip(submits, facts, strict=True):
        of_fact = outputs[submit.request_id]
        ids = [token for output in of_fact for token in output.token_ids]
        length = submit.params.max_tokens - 1
        ended = len(ids) == length + 1 and ids[-1] in tokenizer.eos_token_ids
        found.append(Answer(fact, tokenizer.decode(ids[:length]), ended))
    return found


def perplexity(engine: Engine, tokenizer: Tokenizer, lines: Sequence[str], packs: tuple[str, ...]) -> float:
    """exp of the mean negative log-likelihood of the lines' tokens, each line for itself."""
    submits = []
    for number, line in enumerate(lines):
        ids = tokenizer.encode(line)
        for at in range(0, len(ids), PIECE):
            if len(ids[at : at + PIECE]) > 1:
                params = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=True)
                submits.append(Submit(f"line-{number}-{at}", tuple(ids[at : at + PIECE]), params, packs))
    found = [
        scored.logprob
        for outputs in run(engine, submits).values()
        for scored in outputs[0].prompt_logprobs or ()
        if scored is not None
    ]
    return math.exp(-sum(found) / max(1, len(found)))


def run(engine: Engine, submits: Sequence[Submit]) -> dict[str, list[TokenOutput]]:
    """Everything the engine says to these requests, a queue's worth at a time. Raises what it refuses them with."""
    outputs: dict[str, list[TokenOutput]] = {submit.request_id: [] for submit in submits}
    for start in range(0, len(submits), engine.max_waiting):
        for submit in submits[start : start + engine.max_waiting]:
            engine.submit(submit)
        while not engine.idle:
            for output in engine.step().outputs:
                if output.error is not None:
                    raise output.error
                outputs[output.request_id].append(output)
    return outputs
