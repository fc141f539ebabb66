"""The decoder computes what transformers computes on the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from server.models.prepack import can_prepack
from server.models.source import open_source
from server.runtime.load import build_model
from tests.engines import drive, engine_on, greedy_reference, logits_of
from tests.tiny import VOCAB, save_tiny_llama

# fp32 sums in another order: 30 layers of SmolLM2 differ by about 1e-4 in logits of magnitude 30.
TOLERANCE = 1e-3

VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "odd heads": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20, "hidden_size": 60},
    "no grouping": {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 80},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama 3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "yarn rope": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@pytest.mark.parametrize("cpu_kernels", ["auto", "off"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_random_llama_saved_by_transformers_matches_it(variant: str, cpu_kernels: str, tmp_path: Path) -> None:
    reference = save_tiny_llama(tmp_path, **VARIANTS[variant])
    generator = np.random.default_rng(1)
    prompt = tuple(int(t) for t in generator.integers(1, VOCAB, 150))
    engine = engine_on(str(tmp_path), max_num_batched_tokens=37, cpu_kernels=cpu_kernels)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    assert torch.allclose(logits_of(engine, prompt), expected, atol=TOLERANCE)
    tokens = drive(engine, [prompt[:40]], max_tokens=24)[0]
    assert tokens == greedy_reference(reference, prompt[:40], tokens)


def test_smollm2_logits_match_transformers(smollm2_reference: Any, smollm2_prompts: list[tuple[int, ...]]) -> None:
    engine = engine_on("builtin:smollm2-135m")
    for prompt in smollm2_prompts[:4]:
        with torch.inference_mode():
            expected = smollm2_reference(torch.tensor([prompt])).logits[0]
        assert torch.allclose(logits_of(engine, prompt), expected, atol=TOLERANCE)


def test_smollm2_greedy_tokens_match_transformers(
    smollm2_reference: Any, smollm2_prompts: list[tuple[int, ...]]
) -> None:
    engine = engine_on("builtin:smollm2-135m")
    answers = drive(engine, smollm2_prompts, max_tokens=64)
    for prompt, answer in zip(smollm2_prompts, answers, strict=True):
        assert answer == greedy_reference(smollm2_reference, prompt, answer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_held_once(dtype: torch.dtype) -> None:
    if not can_prepack(dtype, torch.device("cpu")):
        pytest.skip(f"this processor multiplies {dtype} without prepacked weights")
    source = open_source("builtin:smollm2-135m")
    model = build_model(source, dtype, torch.device("cpu"), 512)
    plain = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name)
    assert plain == source.config.vocab_size * source.config.hidden_size  # the embedding; the rest is packed
