"""The default model over HTTP: what a newcomer sees first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch

from tests.api.live import LiveServer

QUESTION = "The capital of France is"


@pytest.fixture(scope="module")
def server(smollm2_folder: Path) -> Iterator[LiveServer]:
    """Served from its Hugging Face folder, the weights that transformers reads."""
    server = LiveServer({"model": str(smollm2_folder), "dtype": "float32", "max_model_len": 512, "kv_bytes": 64 << 20})
    yield server
    assert server.stop() == 0


@pytest.mark.slow
def test_paris_streams_for_the_capital_of_france(server: LiveServer) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused") as client:
        chunks = client.completions.create(
            model="smollm2-135m", prompt=QUESTION, max_tokens=4, temperature=0, stream=True
        )
        texts = [chunk.choices[0].text for chunk in chunks]
    assert len(texts) == 4 and texts[0] == " Paris"


@pytest.mark.slow
def test_a_schema_shapes_what_the_model_knows(server: LiveServer) -> None:
    schema = {
        "type": "object",
        "properties": {"country": {"const": "France"}, "capital": {"type": "string", "maxLength": 12}},
        "required": ["country", "capital"],
        "additionalProperties": False,
    }
    named = {"type": "json_schema", "json_schema": {"name": "capital", "schema": schema}}
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused") as client:
        answer = client.chat.completions.create(
            model="smollm2-135m",
            messages=[{"role": "user", "content": "What is the capital of France? Answer with JSON."}],
            response_format=named,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=60,
        )
    said = json.loads(answer.choices[0].message.content or "")
    assert said["country"] == "France" and "Paris" in said["capital"]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.slow
def test_scores_over_http_are_those_of_a_plain_forward(server: LiveServer, smollm2_folder: Path) -> None:
    """Within 1e-3: sums run in another order than in transformers, both in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "The quick brown fox jumps over the lazy dog. 서울은 대한민국의 수도이다."
    ids = AutoTokenizer.from_pretrained(smollm2_folder)(text)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    fields = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}
    logprobs = server.request("/v1/completions", fields).json["choices"][0]["logprobs"]
    for position, token in enumerate(ids[1:]):
        assert abs(logprobs["token_logprobs"][position + 1] - float(expected[position, token])) < 1e-3
        best = max(logprobs["top_logprobs"][position + 1].values())
        assert abs(best - float(expected[position].max())) < 1e-3
