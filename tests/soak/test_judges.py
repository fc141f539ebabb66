"""Programs of others as judges: the LiteLLM gateway and the lm-evaluation-harness against a live server.

They bring a hundred packages, so they live in an environment of their own, whose Python JUDGES_PYTHON names;
`make soak-judges` makes it. Without it these tests are skipped, and say so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.live import Live, live_server

PYTHON = os.environ.get("JUDGES_PYTHON", sys.executable)

# name, context, continuations; no context ends in a blank, so that the harness cuts where a tokenizer does
TASK = [
    ("The capital of France is", [" Paris", " Berlin", " the city of Lyon"]),
    ("Water boils at one hundred", [" degrees", " kilometres", " people, more or less"]),
    ("서울은 대한민국의", [" 수도이다.", " 강이다."]),
    ("def add(a, b):\n    return", [" a + b", " a - b", " None"]),
    ("The opposite of hot is", [" cold", " warm", " a very long answer that goes on and on"]),
]
YAML = """\
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
metadata: {{version: 1}}
"""

LITELLM = """
import asyncio, json, sys
import litellm
base = sys.argv[1]
litellm.telemetry = False
ask = dict(model="openai/judged", api_base=base, api_key="none", max_tokens=8, temperature=0,
           messages=[{"role": "user", "content": "What is the capital of France?"}])
whole = litellm.completion(**ask)
parts = list(litellm.completion(**ask, stream=True, stream_options={"include_usage": True}))
rebuilt = litellm.stream_chunk_builder(parts, messages=ask["messages"])
other = asyncio.run(litellm.acompletion(**{**ask, "model": "hosted_vllm/judged"}))
text = litellm.text_completion(model="text-completion-openai/judged", api_base=base, api_key="none",
                               prompt="The capital of France is", max_tokens=4, temperature=0, logprobs=1)
shaped = litellm.completion(**{**ask, "max_tokens": 40}, response_format={
    "type": "json_schema", "json_schema": {"name": "n", "schema": {
        "type": "object", "properties": {"city": {"enum": ["Paris", "Berlin"]}}, "required": ["city"],
        "additionalProperties": False}}})
errors = {}
for name, change in {"bad": {"temperature": -1.0}, "model": {"model": "openai/none"}}.items():
    try:
        litellm.completion(**{**ask, **change}, num_retries=0)
    except Exception as error:
        errors[name] = type(error).__name__
print(json.dumps({
    "whole": whole.choices[0].message.content, "usage": whole.usage.completion_tokens,
    "rebuilt": rebuilt.choices[0].message.content, "rebuilt_usage": rebuilt.usage.completion_tokens,
    "other": other.choices[0].message.content, "text": text.choices[0].text,
    "logprobs": len(text.choices[0].logprobs.token_logprobs), "shaped": shaped.choices[0].message.content,
    "errors": errors}))
"""


def needs(package: str) -> None:
    found = subprocess.run([PYTHON, "-c", f"import {package}"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip(f"{package} is not installed in {PYTHON}; make soak-judges makes an environment that has it")


def judged(*arguments: str) -> str:
    environment = {
        **os.environ,
        "OPENAI_API_KEY": "none",
        "HF_DATASETS_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "1",
    }
    done = subprocess.run([PYTHON, *arguments], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def server(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    flags = ["--model", str(smollm2_folder), "--served-model-name", "judged", "--dtype", "float32"]
    flags += ["--max-model-len", "1024", "--kv-bytes", "256M"]
    with live_server(tmp_path_factory.mktemp("judges") / "log", *flags) as live:
        yield live


@pytest.mark.timeout(900)
def test_the_harness_finds_the_log_likelihoods_of_a_plain_forward(
    server: Live, smollm2_folder: Path, tmp_path: Path
) -> None:
    """Within 1e-3: fp32 sums over at most a dozen tokens, in another order than in transformers."""
    needs("lm_eval")
    rows = [{"context": context, "choices": choices} for context, choices in TASK]
    (tmp_path / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "capitals.yaml").write_text(YAML.format(data=tmp_path / "capitals.jsonl"))
    arguments = f"model=judged,base_url={server.url}/v1/completions,num_concurrent=4,tokenized_requests=True"
    judged(
        *("-m", "lm_eval", "--model", "local-completions", "--model_args", arguments, "--tasks", "capitals"),
        *(
            "--include_path",
            str(tmp_path),
            "--output_path",
            str(tmp_path / "out"),
            "--log_samples",
            "--batch_size",
            "3",
        ),
    )
    (samples,) = (tmp_path / "out").rglob("samples_capitals_*.jsonl")
    found = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda s: s["doc_id"])
    assert len(found) == len(TASK)
    likelihood = plain_forward(smollm2_folder)
    for sample, (context, choices) in zip(found, TASK, strict=True):
        assert sample["doc"]["context"] == context
        for response, choice in zip(sample["filtered_resps"], choices, strict=True):
            expected, greedy = likelihood(context, choice)
            assert abs(float(response[0]) - expected) < 1e-3, (context, choice)
            assert str(response[1]) == str(greedy)
    assert found[0]["acc"] == 1.0  # Paris


def plain_forward(folder: Path) -> Any:
    """(context, continuation) → log-likelihood, and whether every token was the most likely, by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def likelihood(context: str, continuation: str) -> tuple[float, bool]:
        before = len(tokenizer(context)["input_ids"])
        ids = torch.tensor(tokenizer(context + continuation)["input_ids"])
        with torch.inference_mode():
            scores = model(ids[None]).logits[0].log_softmax(-1)[before - 1 : -1]
        own = scores.gather(1, ids[before:, None])[:, 0]
        return float(own.double().sum()), bool((scores.argmax(-1) == ids[before:]).all())

    return likelihood


@pytest.mark.timeout(600)
def test_the_gateway_asks_streams_rebuilds_and_maps_errors(server: Live) -> None:
    needs("litellm")
    answer = json.loads(judged("-c", LITELLM, f"{server.url}/v1").splitlines()[-1])
    assert answer["whole"] == answer["rebuilt"] == answer["other"] and answer["text"].startswith(" Paris")
    assert answer["usage"] == answer["rebuilt_usage"] == 8 and answer["logprobs"] == 4
    assert json.loads(answer["shaped"])["city"] in ("Paris", "Berlin")
    assert answer["errors"] == {"bad": "BadRequestError", "model": "NotFoundError"}
