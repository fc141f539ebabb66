"""SmolLM2 twice: ours by name, and transformers' own model filled with the same dequantised weights in fp32."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from server.models.source import open_source
from server.models.weights import tensors

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "12345 + 67890 =",
    "서울은 대한민국의 수도이며",
    "🙂 Emoji and text: 👩‍👩‍👧",
    "SELECT name FROM users WHERE",
    "The mitochondria is the",
    "Water boils at",
    "To be, or not to be,",
    "In 1969, humans first",
    "The quick brown fox",
    "import numpy as np\n",
    "Dear Sir or Madam,",
    "Photosynthesis converts",
    "The opposite of hot is",
    "A list of three fruits: apple,",
    "Newton's second law states that",
    "  \n\t leading spaces and tabs",
    "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.fixture(scope="session")
def smollm2_reference() -> Any:
    source = open_source("builtin:smollm2-135m")
    model = LlamaForCausalLM(LlamaConfig(**source.config.to_hf())).float().eval()
    weights = dict(tensors(source, torch.float32))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected  # tied
    return model


@pytest.fixture(scope="session")
def smollm2_prompts() -> list[tuple[int, ...]]:
    tokenizer = open_source("builtin:smollm2-135m").tokenizer
    return [tuple(tokenizer.encode(text)) for text in PROMPTS]
