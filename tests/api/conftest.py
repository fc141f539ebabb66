"""One live server over the tiny random model for all tests of this room that do not disturb it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.api.live import LiveServer


@pytest.fixture(scope="session")
def live(tiny_llama_folder: Path) -> Iterator[LiveServer]:
    """fp32, 256 tokens of context, few enough sequences that some requests wait."""
    flags = {"model": str(tiny_llama_folder), "dtype": "float32", "max_model_len": 256, "max_num_seqs": 16}
    server = LiveServer({**flags, "kv_bytes": 16 << 20, "max_body_bytes": 1 << 20})
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="session")
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id
