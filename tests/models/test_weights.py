"""Tensors are the checkpoint's, whatever file they stand in, and a file that is not whole is refused first."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from server.errors import BrokenModel, ModelError, UnknownModel, UnsupportedModel
from server.models.source import ModelSource, open_source
from server.models.weights import expected_shapes, fingerprint, tensors

EMBEDDING = "model.embed_tokens.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def saved(folder: Path, *, shards: bool = False, **changes: Any) -> LlamaForCausalLM:
    """A tiny random Llama, saved by transformers."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))
    model.save_pretrained(folder, max_shard_size="12KB" if shards else "1GB")
    return model


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return dict(tensors(open_source(str(folder)), dtype))


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6, "hidden_size": 30},
    ],
    ids=["tied", "untied", "biases", "odd heads"],
)
def test_a_folder_gives_the_tensors_that_transformers_saved(
    tmp_path: Path, changes: dict[str, Any], shards: bool
) -> None:
    model = saved(tmp_path, shards=shards, **changes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is shards
    theirs = model.state_dict()
    if changes.get("tie_word_embeddings"):
        del theirs["lm_head.weight"]
    ours = opened(tmp_path)
    assert ours.keys() == theirs.keys() == expected_shapes(open_source(str(tmp_path)).config).keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_come_in_the_dtype_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    model = saved(tmp_path)
    for name, tensor in opened(tmp_path, dtype).items():
        assert torch.equal(tensor, model.state_dict()[name].to(dtype))


def test_a_gguf_gives_the_tensors_that_transformers_reads_from_it(smollm2: ModelSource) -> None:
    """transformers' own GGUF loader shares the dequantisation and nothing else: names and row order are its own."""
    config = LlamaConfig(**load_gguf_checkpoint(str(smollm2.path))["config"])
    with torch.device("meta"):
        shape_only = LlamaForCausalLM(config)
    theirs = load_gguf_checkpoint(str(smollm2.path), return_tensors=True, model_to_load=shape_only)["tensors"]
    ours = list(expected_shapes(smollm2.config))
    assert sorted(ours) == sorted(theirs)
    for name, tensor in tensors(smollm2, torch.float32):
        assert torch.equal(tensor, theirs[name]), name
        ours.remove(name)
    assert not ours


def test_a_tensor_of_the_wanted_dtype_is_mapped_not_copied(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    ours = opened(tmp_path)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(file) in line:
            start, end = (int(edge, 16) for edge in line.split()[0].split("-"))
            assert all(start <= tensor.data_ptr() < end for tensor in ours.values())
            return
    pytest.fail("the file is not mapped")


# Fingerprints


def test_the_fingerprint_is_the_same_before_and_after_conversion(smollm2: ModelSource, smollm2_folder: Path) -> None:
    assert fingerprint(open_source(str(smollm2_folder))) == fingerprint(smollm2)


def test_the_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    saved(tmp_path / "heads", num_key_value_heads=4)
    again = saved(tmp_path / "trained")
    with torch.no_grad():
        again.model.norm.weight[3] += 0.5
    again.save_pretrained(tmp_path / "trained")
    prints = [fingerprint(open_source(str(tmp_path / name))) for name in ("a", "a", "heads", "trained")]
    assert prints[0] == prints[1]
    assert len({*prints}) == 3


# Broken files


def rewritten(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        stored = {name: tensor.clone() for name, tensor in stored.items()}
        change(stored)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def emptied(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (rewritten(lambda t: t.__delitem__(QUERY)), BrokenModel, ["lacks", QUERY, "[32, 32]"]),
        (rewritten(lambda t: t.update({QUERY: torch.zeros(32, 16)})), BrokenModel, [QUERY, "[32, 16]", "[32, 32]"]),
        (rewritten(lambda t: t.update({"model.extra": torch.zeros(1)})), BrokenModel, ["model.extra"]),
        (
            rewritten(lambda t: t.update({QUERY: torch.zeros(32, 32, dtype=torch.int8)})),
            UnsupportedModel,
            [QUERY, "I8", "BF16"],
        ),
        (cut, BrokenModel, ["truncated", "model.safetensors"]),
        (emptied, BrokenModel, ["truncated", "model.safetensors"]),
        (pickled, UnknownModel, ["no model.safetensors", "save it as safetensors"]),
    ],
    ids=["missing", "shape", "foreign", "type", "cut", "empty", "pickle"],
)
def test_a_damaged_folder_is_refused_before_the_first_tensor(
    tmp_path: Path, damage: Callable[[Path], None], error: type[ModelError], words: list[str]
) -> None:
    saved(tmp_path)
    damage(tmp_path)
    with pytest.raises(error) as caught:
        next(tensors(open_source(str(tmp_path)), torch.float32))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def index_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    saved(tmp_path, shards=True)
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UnknownModel, match=gone.name):
        opened(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, shards=True)
    path, index = index_of(tmp_path)
    file = tmp_path / index["weight_map"][QUERY]
    save_file(load_file(file), tmp_path / "twice.safetensors")
    index["weight_map"]["again"] = "twice.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(BrokenModel, match="twice"):
        opened(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {EMBEDDING: "../other.safetensors"}, {EMBEDDING: 3}])
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, weight_map: Any) -> None:
    saved(tmp_path, shards=True)
    path, index = index_of(tmp_path)
    path.write_text(json.dumps({**index, "weight_map": weight_map}))
    with pytest.raises(BrokenModel, match="weight_map"):
        opened(tmp_path)


def test_rotary_frequencies_and_a_tied_head_in_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    model = saved(tmp_path, tie_word_embeddings=True)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": torch.zeros(96, 32)}
    rewritten(lambda t: t.update(extra))(tmp_path)
    ours = opened(tmp_path)
    assert not extra.keys() & ours.keys()
    assert torch.equal(ours[EMBEDDING], model.state_dict()[EMBEDDING])


def test_a_truncated_gguf_says_how_much_is_missing(tmp_path: Path, smollm2: ModelSource) -> None:
    part = tmp_path / "part.gguf"
    with smollm2.path.open("rb") as whole:
        part.write_bytes(whole.read(8 << 20))
    with pytest.raises(BrokenModel, match="truncated") as caught:
        open_source(str(part))
    assert str(8 << 20) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_lacks_layers_is_refused_before_a_model_of_them_is_built(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3000}))
    with pytest.raises(BrokenModel, match=r"lacks the tensor model\.layers\.2\."):
        tensors(open_source(str(tmp_path)), torch.float32)  # no tensor is asked for
