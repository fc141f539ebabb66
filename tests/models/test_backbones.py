"""Every supported architecture computes what transformers computes on the same weights, through the engine."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from server.commands.convert import convert
from server.errors import UnsupportedModel
from server.models.config import ModelConfig
from server.models.source import open_source
from tests.backbones import BACKBONES, WINDOW, save_backbone
from tests.engines import drive, engine_on, greedy_reference, logits_of
from tests.tiny import VOCAB

# fp32 sums in another order; the logits have a magnitude of about 10.
TOLERANCE = 1e-3


def prompt_of(length: int, seed: int = 1) -> tuple[int, ...]:
    return tuple(int(t) for t in np.random.default_rng(seed).integers(1, VOCAB, length))


@pytest.mark.parametrize("cpu_kernels", ["auto", "off"])
@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_matches_transformers_in_chunks_in_decode_and_after_a_prefix_hit(
    name: str, cpu_kernels: str, tmp_path: Path
) -> None:
    reference = save_backbone(tmp_path, name)
    prompt = prompt_of(150)
    assert len(prompt) > 4 * WINDOW
    engine = engine_on(str(tmp_path), max_num_batched_tokens=37, cpu_kernels=cpu_kernels)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    assert torch.allclose(logits_of(engine, prompt), expected, atol=TOLERANCE)
    together = [prompt[:40], prompt[:9], prompt_of(70, seed=2)]  # before, at and past the window
    for given, tokens in zip(together, drive(engine, together, max_tokens=32), strict=True):
        assert tokens == greedy_reference(reference, given, tokens)
    hits = engine.scheduler.prefix_hits
    again = prompt[:40] + prompt_of(5, seed=3)
    tokens = drive(engine, [again], max_tokens=8)[0]
    assert engine.scheduler.prefix_hits > hits
    assert tokens == greedy_reference(reference, again, tokens)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_whole_prompt_in_one_step_matches_transformers(name: str, tmp_path: Path) -> None:
    reference = save_backbone(tmp_path, name)
    prompt = prompt_of(90)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    assert torch.allclose(logits_of(engine_on(str(tmp_path)), prompt), expected, atol=TOLERANCE)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_converted_backbone_is_the_same_model_to_transformers_and_to_us(name: str, tmp_path: Path) -> None:
    reference = save_backbone(tmp_path / "saved", name)
    convert(str(tmp_path / "saved"), tmp_path / "converted")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", attn_implementation="eager").eval()
    prompt = torch.tensor([prompt_of(90)])
    with torch.inference_mode():
        assert torch.equal(again(prompt).logits, reference(prompt).logits)
    ours = [open_source(str(tmp_path / folder)).config for folder in ("saved", "converted")]
    assert ours[0] == ours[1]


@pytest.mark.parametrize(
    ("hf_class", "change", "words"),
    [
        ("MixtralForCausalLM", {}, ["MixtralForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"]),
        ("Gemma3ForConditionalGeneration", {}, ["Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"]),
        ("Gemma3ForCausalLM", {"final_logit_softcapping": 30.0}, ["final_logit_softcapping", "30.0", "none"]),
        ("Gemma3ForCausalLM", {"hidden_activation": "relu"}, ["relu", "gelu_pytorch_tanh"]),
        ("Qwen2ForCausalLM", {"hidden_act": "gelu"}, ["gelu", "silu"]),
        (
            "Qwen3ForCausalLM",
            {"rope_scaling": {"rope_type": "longrope"}},
            ["longrope", "default, linear, llama3, yarn"],
        ),
        (
            "Qwen3ForCausalLM",
            {"use_sliding_window": True, "layer_types": ["linear_attention"] * 2},
            ["linear_attention", "full_attention, sliding_attention"],
        ),
    ],
)
def test_what_is_not_computed_is_refused_with_what_is(
    hf_class: str, change: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    shape = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    values = {"architectures": [hf_class], "num_attention_heads": 4, **shape, **change}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UnsupportedModel) as caught:
        open_source(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("hf_class", "change", "windows"),
    [
        ("MistralForCausalLM", {}, (4096, 4096)),
        ("MistralForCausalLM", {"sliding_window": None}, (0, 0)),
        ("Qwen2ForCausalLM", {"sliding_window": 16}, (0, 0)),
        ("Qwen2ForCausalLM", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, (0, 16)),
        ("Gemma3ForCausalLM", {"sliding_window": 16, "sliding_window_pattern": 2}, (16, 0)),
    ],
)
def test_windows_of_configs_that_leave_things_out(
    hf_class: str, change: dict[str, Any], windows: tuple[int, ...]
) -> None:
    """The defaults are those of transformers' configuration classes; published configs rely on them."""
    shape = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    values = {"architectures": [hf_class], "num_attention_heads": 4, **shape, **change}
    assert ModelConfig.from_hf(values).features.windows == windows
