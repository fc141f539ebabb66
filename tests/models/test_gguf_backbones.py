"""A GGUF of each supported architecture and number format computes what transformers does on the same weights."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from server.errors import UnsupportedModel
from server.models.source import open_source
from tests.backbones import WINDOW, YARN, save_backbone
from tests.engines import engine_on, logits_of

# fp32 sums in another order; the logits have a magnitude of about 10.
TOLERANCE = 1e-3
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}  # K-quants pack 256
PROMPT = tuple(range(1, 100))

# of the K-quants: where a block's half-precision scales stand, and a size for them that makes weights of about 0.1
SCALES = {
    Kind.Q2_K: ((80, 82), 4e-3),
    Kind.Q3_K: ((108,), 1.5e-3),
    Kind.Q4_K: ((0, 2), 2e-4),
    Kind.Q5_K: ((0, 2), 1e-4),
    Kind.Q6_K: ((208,), 4e-5),
}
QUANTISED = (Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
Array = NDArray[Any]


def stored_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name.replace("model.layers.", "blk.")


def packed(weights: Array, kind: Kind, generator: np.random.Generator) -> Array:
    """Rows in the file's form; of K-quants, which the package cannot make, random blocks."""
    if kind not in SCALES:
        return quantize(weights, kind)
    offsets, scale = SCALES[kind]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = weights.shape
    blocks = generator.integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
    for offset in offsets:
        scales = generator.uniform(0.5, 1.0, blocks.shape[:2]) * scale
        blocks[..., offset : offset + 2] = scales.astype(np.float16)[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def permuted(rows: Array, heads: int) -> Array:
    """llama.cpp's order of a Llama's query and key rows: the halves of each head become neighbours."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(path: Path, architecture: str, model: Any, kind: Kind) -> None:
    """The model's weights as a GGUF, and into `model` what they are after packing."""
    config, generator = model.config, np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_eos_token_id(0)
    if architecture != "qwen2":  # whose head size follows from the others
        writer.add_key_length(config.head_dim)
    if config.model_type == "mistral":
        writer.add_sliding_window(config.sliding_window)
    if config.rope_parameters["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        weights = parameter.detach().numpy()
        raw, form = weights, None
        if weights.ndim > 1:
            raw, form = packed(weights, kind, generator), kind
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(dequantize(raw, kind)))
        for part, count in heads.items():
            if architecture == "llama" and part in name:
                raw = permuted(raw, count)
        writer.add_tensor(stored_name(name), np.ascontiguousarray(raw), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_same(path: Path, model: Any) -> None:
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    assert expected.std() > 0.5  # a model that says something
    engine = engine_on(str(path), max_num_batched_tokens=37)
    assert torch.allclose(logits_of(engine, PROMPT), expected, atol=TOLERANCE)


@pytest.mark.parametrize("kind", [*QUANTISED, *SCALES], ids=lambda kind: kind.name)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_gguf_matches_transformers_in_every_number_format(architecture: str, kind: Kind, tmp_path: Path) -> None:
    model = save_backbone(tmp_path / "saved", architecture, **WIDE, tie_word_embeddings=True)
    write(tmp_path / "tiny.gguf", architecture, model, kind)
    assert_same(tmp_path / "tiny.gguf", model)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"hidden_size": 64, "head_dim": 16}),
        ("qwen2", {"hidden_size": 64, "head_dim": 16, "rope_parameters": YARN}),
        ("qwen3", {"rope_parameters": YARN}),
    ],
    ids=["llama, biases", "qwen2", "qwen2, yarn", "qwen3, yarn"],
)
def test_a_gguf_keeps_biases_and_rope_scaling(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = save_backbone(tmp_path / "saved", architecture, **{**WIDE, **changes})
    write(tmp_path / "tiny.gguf", architecture, model, Kind.Q8_0)
    assert_same(tmp_path / "tiny.gguf", model)


def test_a_llama_with_a_window_is_mistral(tmp_path: Path) -> None:
    """llama.cpp has one name for both."""
    model = save_backbone(tmp_path / "saved", "mistral", **WIDE)
    write(tmp_path / "tiny.gguf", "llama", model, Kind.F16)
    assert open_source(str(tmp_path / "tiny.gguf")).config.features.windows == (WINDOW, WINDOW)
    assert_same(tmp_path / "tiny.gguf", model)


@pytest.mark.parametrize("architecture", ["gemma3", "smollm3", "qwen3moe"])
def test_another_architecture_is_refused_with_the_names_of_those_that_are_read(
    architecture: str, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", architecture)
    writer.add_tensor("token_embd.weight", np.zeros((3, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match=f"{architecture}.*llama, qwen2, qwen3.*folder"):
        open_source(str(tmp_path / "other.gguf"))
