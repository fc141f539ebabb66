"""`inspect` on folders as they are released: headers only, and every promise checked."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from server.cache.row_types import row_type
from server.cache.table_writer import write_sparse_table
from server.commands.inspect import summary
from server.errors import PackError, TableError
from tests.memory.stems import save_stem

DEEPSEEK = {
    "engram_layer_ids": [1, 3],
    "engram_max_ngram_size": 3,
    "engram_n_heads": 2,
    "engram_vocab_size": 100,
    "engram_num_embeddings": [101 + 103 + 107 + 109, 113 + 127 + 131 + 137],
    "engram_compressed_vocab_size": 40,
    "engram_pad_token_id": 2,
    "vocab_size": 50,
}
QWEN = {
    "text_config": {
        "ple_layer_ids": [2],
        "ngram_size": 3,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 100,
        "make_ngram_vocab_size_divisible_by": 8,
        "vocab_size": 50,
        "eos_token_id": 3,
        "seed": 1234,
    }
}
PEFT = {
    "engram_vocab_size_per_ngram": [200, 200],
    "ngram_sizes": [2, 3],
    "n_head_per_ngram": 2,
    "target_layers": [1],
    "pad_id": 0,
}
ROWS = 101 + 103 + 107 + 109


def folder_of(path: Path, config: dict[str, Any], *files: dict[str, torch.Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    for number, tensors in enumerate(files):
        save_file(tensors, path / f"model-{number:05}.safetensors")
    return path


def deepseek_tables(rows: tuple[int, int] = (ROWS, 508)) -> list[dict[str, torch.Tensor]]:
    files = []
    for layer, count in zip((1, 3), rows, strict=True):
        prefix = f"model.layers.{layer}.engram.embed."
        values = torch.zeros(count, 64, dtype=torch.float8_e4m3fn)
        scales = torch.full((count, 2), 127, dtype=torch.uint8)
        files.append({prefix + "weight": values, prefix + "scale": scales})
    return files


def test_a_deepseek_checkpoint(tmp_path: Path) -> None:
    found = summary(folder_of(tmp_path, DEEPSEEK, *deepseek_tables()), verify=True)
    assert (found["family"], found["layers"], found["orders"], found["heads"]) == ("deepseek-v4.1", [1, 3], [2, 3], 2)
    assert [table["row_type"] for table in found["tables"]] == ["float8_e4m3_e8m0"] * 2
    assert [table["rows"] for table in found["tables"]] == [ROWS, 508]
    assert found["bytes"] == (ROWS + 508) * 66


def test_a_qwen_checkpoint_in_shards(tmp_path: Path) -> None:
    prefix = "model.language_model.layers.1.ple.ple_embedding.ngram_embedding"
    parts = [torch.zeros(106, 16, dtype=torch.bfloat16) for _ in range(4)]
    files = [{f"{prefix}.shard_{i}.weight": part} for i, part in enumerate(parts)]
    found = summary(folder_of(tmp_path, QWEN, *files))
    assert (found["family"], found["layers"], found["rows"]) == ("qwen-ple", [1], 424)  # 420, padded to eights
    assert found["tables"][0]["layout"] == "shards"


def test_an_engram_peft_adapter(tmp_path: Path) -> None:
    name = "1.multi_head_embedding.embedding.weight"
    found = summary(folder_of(tmp_path, PEFT, {name: torch.zeros(ROWS, 8)}))
    assert (found["family"], found["layers"], found["rows_per_token"]) == ("engram-peft", [1], 4)


def test_a_stem_pack(tmp_path: Path) -> None:
    found = summary(save_stem(tmp_path / "s", {2: torch.zeros(50, 24)}, 8))
    assert (found["family"], found["layers"], found["orders"], found["rows"]) == ("stem", [2], [1], 50)


def test_a_row_count_that_is_not_the_sum_of_the_primes_is_told_with_both_numbers(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, DEEPSEEK, *deepseek_tables((ROWS, 507)))
    with pytest.raises(PackError, match="layer 3 .* holds 507 rows; its config needs 508"):
        summary(folder)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no table of layer 3"):
        summary(folder_of(tmp_path, DEEPSEEK, deepseek_tables()[0]))


def test_verify_finds_a_scale_that_is_no_number(tmp_path: Path) -> None:
    files = deepseek_tables()
    files[1]["model.layers.3.engram.embed.scale"][77, 1] = 255
    folder = folder_of(tmp_path, DEEPSEEK, *files)
    summary(folder)
    with pytest.raises(PackError, match="NaN or infinity in row 77"):
        summary(folder, verify=True)


def test_fifty_gigabytes_take_no_second(tmp_path: Path) -> None:
    config = {"kind": "stem", "format_version": 1, "layer_ids": [0], "vocab_size": 50 << 20, "hidden_size": 8}
    config |= {"intermediate_size": 512, "backbone": {}, "row_type": "bfloat16"}
    folder = folder_of(tmp_path, config)
    write_sparse_table(folder / "table-0.safetensors", 50 << 20, 512, row_type("bfloat16"))
    begun = time.thread_time()  # other processes share the machine's cores
    assert summary(folder)["bytes"] == 50 << 30
    assert time.thread_time() - begun < 1
