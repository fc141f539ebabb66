"""What convert writes, transformers loads without further arguments."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.commands import convert as convert_module
from server.commands.convert import convert
from server.errors import CapacityError, SettingsError, UnknownModel
from server.models.source import ModelSource, open_source
from server.models.weights import tensors


@pytest.fixture(scope="module")
def reference(smollm2_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2_folder)


def test_the_folder_holds_what_a_hugging_face_folder_holds(smollm2_folder: Path) -> None:
    assert sorted(path.name for path in smollm2_folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_transformers_has_the_same_tensors(reference: Any, smollm2: ModelSource) -> None:
    assert reference.dtype == torch.bfloat16
    theirs = reference.state_dict()
    for name, tensor in tensors(smollm2, torch.bfloat16):
        assert torch.equal(theirs[name], tensor), name
    assert reference.generation_config.eos_token_id == 2


def test_the_capital_of_france_is_paris(reference: Any, smollm2_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = reference.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


def test_the_tokenizer_carries_template_and_special_tokens(smollm2_folder: Path, smollm2: ModelSource) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    assert tokenizer.chat_template == smollm2.chat_template
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")


def test_our_own_reading_of_the_folder_is_the_same_model(smollm2_folder: Path, smollm2: ModelSource) -> None:
    again = open_source(str(smollm2_folder))
    assert again.config == smollm2.config
    assert again.chat_template == smollm2.chat_template
    assert again.special_tokens == smollm2.special_tokens
    assert again.tokenizer.backend.to_str() == smollm2.tokenizer.backend.to_str()


def test_a_folder_converts_to_another_dtype_and_keeps_its_own_files(tiny_llama_folder: Path, tmp_path: Path) -> None:
    convert(str(tiny_llama_folder), tmp_path / "half", dtype="float16")
    before = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert after.dtype == torch.float16
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, before[name].half())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "half" / name).read_bytes() == (tiny_llama_folder / name).read_bytes()


def test_an_empty_folder_is_filled_and_a_full_one_left_alone(tiny_llama_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    convert(str(tiny_llama_folder), out)
    before = (out / "config.json").read_bytes()
    with pytest.raises(SettingsError, match="--out"):
        convert(str(tiny_llama_folder), out)
    assert (out / "config.json").read_bytes() == before
    with pytest.raises(SettingsError, match="--out"):
        convert(str(tiny_llama_folder), out / "config.json")


def test_a_conversion_that_fails_leaves_nothing_behind(tiny_llama_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_llama_folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "tokenizer.json").unlink()
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(Exception, match=r"model\.layers\.4"):
        convert(str(broken), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_bad_arguments_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama_folder: Path) -> None:
    with pytest.raises(SettingsError, match="--dtype is 'int4'"):
        convert("builtin:smollm2-135m", tmp_path / "out", dtype="int4")
    with pytest.raises(UnknownModel):
        convert("no-such-model", tmp_path / "out")
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: full)
    with pytest.raises(CapacityError, match="1000 free"):
        convert(str(tiny_llama_folder), tmp_path / "out")
    assert not list(tmp_path.iterdir())
