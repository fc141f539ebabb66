"""A pack that does not fit, or is damaged, is refused with both values; a stored old pack keeps loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from server.commands.attach import attach
from server.errors import PackError, TableError
from server.memory.addressing import windows_of
from server.memory.attached import AttachedPack, open_pack, read_memory
from server.memory.engram import Engram
from server.memory.layer import EngramShape
from server.memory.short_conv import ConvRead, ConvSlots
from server.models.source import ModelSource
from tests.engines import engine_on
from tests.memory.reference import ReferenceEngram
from tests.memory.test_forms import LENGTHS, batch_of, steps_of

STORED = Path(__file__).parent.parent / "data" / "pack-v1"


@pytest.fixture
def copy(fresh_pack: Path, tmp_path: Path) -> Path:
    shutil.copytree(fresh_pack, tmp_path / "pack")
    return tmp_path / "pack"


def opened(tiny_llama_folder: Path, pack: Path) -> None:
    engine_on(str(tiny_llama_folder), memory=(str(pack),))


def change_config(pack: Path, **values: Any) -> None:
    path = pack / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": 96}, "hidden size of 96 and the model has 64"),
        ({"vocab_size": 1000}, "vocabulary of 1000 and the model has 49152"),
        ({"compressed_vocab_size": 31000}, "31000.*32873"),
        ({"compression_sha256": "0" * 64}, "0000000000.*and the model has [0-9a-f]{64}"),
        ({"layer_ids": [1, 9]}, "9"),
        ({"head_dim": 8}, "16 values.*8|8.*16"),
        ({"format_version": 99}, "format 99"),
        ({"kind": ["engram"]}, r"kind \['engram'\]"),
        ({"layer_ids": 1}, "layer_ids = 1; it must be a list of whole numbers"),
        ({"layer_ids": ["1", "../3"]}, "layer_ids = .*; it must be a list of whole numbers"),
        ({"layer_ids": []}, "layer_ids"),
        ({"norm_eps": "small"}, "norm_eps = 'small'; it must be a number"),
        ({"form": ["paper"]}, "form = .*; it must be a text"),
        ({"rule": 3}, "rule = 3; it must be an object"),
        ({"rule": {"stem_layers": [1, 3], "vocab_size": 9}}, "a rule for n-grams at none"),
        ({"norm_eps": float("nan")}, "norm_eps = nan; it must be a number from 0 to 1"),
        ({"dilation": 1 << 62}, "dilation as 4611686018427387904; at most 1024"),
        ({"kernel_size": 1 << 40}, "kernel size as 1099511627776; at most 1024"),
        ({"kernel_size": 1000}, r"conv has shape \[64, 4\] and config.json needs \[64, 1000\]"),
        ({"branches": 1 << 40}, "branches as 1099511627776; at most 1024"),
        ({"primes": {"1": [["3"]], "3": [[3]]}}, "primes is 3; it must be a whole number"),
        ({"primes": {"1": [None], "3": [None]}}, "primes is None; it must be a whole number"),
        ({"primes": {"1": [[3, 5, 7, 11], [13, 17, 19, 23]], "3": [[3, 5, 7, 11], [13, 17, 19, 23]]}}, "503"),
    ],
)
def test_a_pack_of_another_model_is_refused_with_both_values(
    tiny_llama_folder: Path, copy: Path, values: dict[str, Any], words: str
) -> None:
    change_config(copy, **values)
    with pytest.raises(PackError, match=words) as refusal:
        opened(tiny_llama_folder, copy)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_modules_that_are_not_finite_are_refused(tiny_llama_folder: Path, copy: Path, value: float) -> None:
    modules = load_file(copy / "modules.safetensors")
    modules["layers.3.conv"][5, 1] = value
    save_file(modules, copy / "modules.safetensors")
    with pytest.raises(PackError, match=r"layers\.3\.conv holds NaN or infinity"):
        opened(tiny_llama_folder, copy)


def harm_config(pack: Path) -> None:
    (pack / "config.json").write_text("{")


def harm_modules(pack: Path) -> None:
    (pack / "modules.safetensors").write_bytes(b"no safetensors")


def cut_table(pack: Path) -> None:
    with open(pack / "table-1.safetensors", "r+b") as table:
        table.truncate(10_000)


def foreign_table(pack: Path) -> None:
    (pack / "table-1.safetensors").write_bytes(b"\x00" * 64)


def lose_table(pack: Path) -> None:
    (pack / "table-3.safetensors").unlink()


@pytest.mark.parametrize("harm", [harm_config, harm_modules, cut_table, foreign_table, lose_table])
def test_a_damaged_pack_is_refused_in_one_line(
    tiny_llama_folder: Path, copy: Path, harm: Callable[[Path], None]
) -> None:
    harm(copy)
    with pytest.raises((PackError, TableError)) as refusal:
        opened(tiny_llama_folder, copy)
    assert str(copy) in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_no_pack_can_be_is_not_made(tiny_llama_folder: Path, tmp_path: Path) -> None:
    model = str(tiny_llama_folder)
    for sizes, words in [
        ({"layers": (1, 4)}, "layer 4 and the model has layers 0..3"),
        ({"layers": (1, 1)}, "--layers"),
        ({"orders": (3,)}, "--orders is 3"),
        ({"rows": 0}, "--rows is 0"),
    ]:
        with pytest.raises(PackError, match=words):
            attach(model=model, out=tmp_path / "new", **{"rows": 10, **sizes})
    assert not list(tmp_path.iterdir())


def test_a_stored_pack_of_format_1_opens_and_addresses_the_rows_it_did(smollm2: ModelSource) -> None:
    expected = json.loads((STORED / "expected.json").read_text())
    pack = open_pack(
        STORED,
        name="old",
        tokenizer=smollm2.tokenizer.backend,
        hidden_size=64,
        intermediate_size=160,
        num_layers=4,
        vocab_size=49152,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert isinstance(pack, AttachedPack)
    for layer, (rows, _) in pack.address(*windows_of(np.array(expected["ids"]), 3)).items():
        assert rows.tolist() == expected["rows"][str(layer)]
    assert round(float(pack.modules[1].key_value.weight.sum()), 3) == expected["sum_of_key_weights"]


@pytest.mark.parametrize("kind", ["prefill", "chunks", "decode"])
def test_four_branches_match_the_reference(copy: Path, mapping: list[int], kind: str) -> None:
    """The paper's multi-branch form: a key and a norm per branch, one value shared."""
    branches, size = 4, 64
    generator = torch.Generator().manual_seed(4)
    modules = load_file(copy / "modules.safetensors")
    shapes = {
        "key_value.weight": ((branches + 1) * size, 128),
        "key_value.bias": ((branches + 1) * size,),
        "key_norm.weight": (branches, size),
        "query_norm.weight": (branches, size),
        "conv_norm.weight": (branches, size),
        "conv": (branches * size, 4),
    }
    for name, shape in shapes.items():
        modules[f"layers.1.{name}"] = torch.randn(shape, generator=generator) * (1.0 if "norm" in name else 0.3)
    save_file(modules, copy / "modules.safetensors")
    reference = ReferenceEngram(copy, mapping)
    shape = EngramShape(size, 128, branches, 4, 3, reference.config["norm_eps"])
    engram = Engram(shape, torch.float32).requires_grad_(False)
    engram.load_state_dict({name: modules[f"layers.1.{name}"] for name in shapes})
    ids = [torch.randint(0, 49152, (n,), generator=generator).tolist() for n in LENGTHS]
    hidden = [torch.randn(n, branches, size, generator=generator) for n in LENGTHS]
    expected = [reference(h.double(), i, 1) for h, i in zip(hidden, ids, strict=True)]
    rows = [reference.tables[1][torch.tensor(reference.rows(i, 1))].flatten(1).float() for i in ids]
    slots = ConvSlots(101 * 4, branches * size, torch.float32, torch.device("cpu"))
    found = [torch.zeros_like(h) for h in hidden]
    for pieces in steps_of(kind):
        at = ConvRead.of(batch_of(pieces), 4, 3)
        inputs = [torch.cat([source[i][start:stop] for i, start, stop in pieces]) for source in (hidden, rows)]
        added = engram(inputs[0], inputs[1], slots, at)
        first = 0
        for i, start, stop in pieces:
            found[i][start:stop] = added[first : first + stop - start]
            first += stop - start
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours.double(), theirs, atol=2e-5)  # fp32 against float64


def test_a_pack_whose_rule_has_other_heads_is_refused_before_anything_of_that_size_is_made(
    tiny_llama_folder: Path, copy: Path
) -> None:
    content = json.loads((copy / "config.json").read_text())
    names = ("layer_ids", "max_ngram_size", "n_head_per_ngram", "engram_vocab_size", "pad_id", "seed")
    rule = {name: content[name] for name in (*names, "compressed_vocab_size")}
    change_config(copy, rule=rule, n_head_per_ngram=1 << 40)
    with pytest.raises(PackError, match="1099511627776 heads per n-gram; its rule has 4"):
        opened(tiny_llama_folder, copy)


def test_a_config_that_nests_without_end_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text("[" * 100_000)
    with pytest.raises(PackError, match="not valid JSON: it nests deeper than 64 levels"):
        read_memory(copy)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64])
def test_modules_of_a_type_that_no_module_has_are_refused(
    tiny_llama_folder: Path, copy: Path, dtype: torch.dtype
) -> None:
    modules = load_file(copy / "modules.safetensors")
    modules["layers.1.conv"] = modules["layers.1.conv"].to(dtype)
    save_file(modules, copy / "modules.safetensors")
    with pytest.raises(PackError, match=f"layers.1.conv is {dtype}"):
        opened(tiny_llama_folder, copy)
