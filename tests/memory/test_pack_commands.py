"""`pack`, `convert-stem` and `attach --stem`: what is read from the new tables, and what an interruption leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from server.cache.row_table import RowTable
from server.commands import pack as pack_module
from server.commands.attach_stem import attach_stem
from server.commands.convert_stem import convert_stem
from server.commands.pack import pack
from server.errors import PackError
from tests.engines import engine_on, logits_of
from tests.memory.reference import reference_logits
from tests.memory.stems import save_stem
from tests.memory.test_memory import TOLERANCE


def all_rows(path: Path) -> torch.Tensor:
    table = RowTable.open(path)
    raw = np.empty((table.rows, table.row_bytes), np.uint8)
    table.gather(np.arange(table.rows), raw)
    out = torch.empty(table.rows, table.dim)
    table.row_type.decode(torch.from_numpy(raw), out)
    table.close()
    return out


@pytest.mark.parametrize("layout", ["packed", "apart"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "int8", "float8_e4m3", "float8_e4m3_e8m0"])
def test_a_rewritten_table_holds_the_same_rows_to_its_types_precision(tmp_path: Path, layout: str, dtype: str) -> None:
    rows = {layer: torch.randn(300, 64, generator=torch.Generator().manual_seed(layer)) for layer in (0, 2)}
    source = save_stem(tmp_path / "in", rows, 8)
    out = pack(source=source, out=tmp_path / "out", layout=layout, dtype=dtype)
    # Half a step: none; 2^-9 of a value; 1/254 of a row's largest; 2^-4 of a value, and of the smallest float8 normal.
    relative = {"auto": 0.0, "bfloat16": 2**-8, "int8": 0.0}.get(dtype, 2**-4)
    absolute = {"auto": 0.0, "bfloat16": 0.0, "int8": 4.5 / 254}.get(dtype, 1e-3)
    for layer, expected in rows.items():
        assert torch.allclose(all_rows(out / f"table-{layer}.safetensors"), expected, rtol=relative, atol=absolute)
    config = json.loads((out / "config.json").read_text())
    assert config["row_type"] == ("float32" if dtype == "auto" else dtype)
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "table-0.safetensors", "table-2.safetensors"]


class Power:
    """Stands in for `chunks`: notes where each reading begins, and cuts the power after `left` chunks in all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
        self.left, self.begun, self.inner = left, [], pack_module.chunks
        monkeypatch.setattr(pack_module, "CHUNK_BYTES", 4 * 16 * 10)  # ten rows of sixteen values
        monkeypatch.setattr(pack_module, "chunks", self)

    def __call__(self, table: RowTable, count: Any, first: int = 0) -> Iterator[Any]:
        self.begun.append(first)
        for chunk in self.inner(table, count, first):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield chunk


@pytest.mark.parametrize("layout", ["packed", "apart"])
@pytest.mark.parametrize("dtype", ["auto", "int8", "float8_e4m3"])
def test_an_interrupted_run_goes_on_after_the_last_rows_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, dtype: str
) -> None:
    source = save_stem(tmp_path / "in", {layer: torch.randn(50, 16) for layer in (0, 1)}, 8)
    whole = pack(source=source, out=tmp_path / "whole", layout=layout, dtype=dtype)
    scans = dtype == "float8_e4m3"  # five chunks more to find a table's scale
    power = Power(monkeypatch, 8 + 10 * scans)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pack(source=source, out=out, layout=layout, dtype=dtype)
    assert not out.exists() and not (tmp_path / "out.partial" / "table-1.safetensors").exists()
    with pytest.raises(PackError, match="left from another run"):
        pack(source=source, out=out, layout=layout, dtype="bfloat16")
    power.left, power.begun = 100, []
    pack(source=source, out=out, layout=layout, dtype=dtype)
    assert power.begun == [30]  # of the second table, three chunks were written; no scale is sought again
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}
    assert not (tmp_path / "out.partial").exists()


def test_rows_of_the_same_type_are_copied_bit_for_bit(tmp_path: Path) -> None:
    """Also where encoding again would round otherwise, and from a packed row back to values and scales apart."""
    source = save_stem(tmp_path / "in", {0: torch.randn(40, 32) * torch.rand(40, 1) * 9}, 8)
    for dtype in ("int8", "float8_e4m3", "float8_e4m3_e8m0"):
        first = pack(source=source, out=tmp_path / f"{dtype}-1", dtype=dtype)
        second = pack(source=first, out=tmp_path / f"{dtype}-2", layout="apart")
        third = pack(source=second, out=tmp_path / f"{dtype}-3", layout="packed")
        name = "table-0.safetensors"
        assert (first / name).read_bytes() == (third / name).read_bytes()
        assert torch.equal(all_rows(first / name), all_rows(second / name))


def test_a_row_that_is_not_finite_is_named(tmp_path: Path) -> None:
    table = torch.randn(50, 16)
    table[37, 5] = float("nan")
    source = save_stem(tmp_path / "in", {0: table}, 8)
    with pytest.raises(PackError, match="NaN or infinity in row 37"):
        pack(source=source, out=tmp_path / "out")


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, dict[int, torch.Tensor]]:
    """A checkpoint of eleven column shards (so that text order is not rank order), layers 3 and 1 in that order."""
    folder = tmp_path / "checkpoint"
    (folder / "stem_shards").mkdir(parents=True)
    tables = {layer: torch.randn(20, 44) for layer in (3, 1)}
    for rank in range(11):
        part = {
            f"stem_embeddings.{i}.weight": t[:, 4 * rank : 4 * rank + 4].clone() for i, t in enumerate(tables.values())
        }
        torch.save(part, folder / "stem_shards" / f"stem_model_mp{rank}.pt")
    torch.save({"state": torch.zeros(1)}, folder / "stem_shards" / "stem_optim_mp0.pt")
    params = {"model": {"stem_layers": [3, 1], "dim": 16, "n_layers": 5}}
    (folder / "params.json").write_text(json.dumps(params))
    return folder, tables


def test_a_reference_checkpoint_is_joined_in_rank_order(
    shards: tuple[Path, dict[int, torch.Tensor]], tmp_path: Path
) -> None:
    folder, tables = shards
    out = convert_stem(source=folder, out=tmp_path / "out", dtype="float32")
    for layer, expected in tables.items():
        assert torch.equal(all_rows(out / f"table-{layer}.safetensors"), expected)


class Harm:
    """What a harmful pickle holds: something that runs when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('it ran')",)


def test_a_pickle_that_would_run_something_is_refused(
    shards: tuple[Path, dict[int, torch.Tensor]], tmp_path: Path
) -> None:
    folder, _ = shards
    torch.save({"stem_embeddings.0.weight": Harm()}, folder / "stem_shards" / "stem_model_mp4.pt")
    with pytest.raises(PackError, match=r"mp4\.pt is no file of tensors"):
        convert_stem(source=folder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"dim": 16, "n_layers": 1 << 40}, "has 2 tables; params.json names 1099511627775 layers"),
        ({"dim": 16, "n_layers": float("inf")}, "no readable JSON with dim and n_layers"),
        ({"dim": 16, "n_layers": 5, "stem_layers": ["1", "../3"]}, "no readable JSON with dim and n_layers"),
    ],
)
def test_parameters_that_no_checkpoint_has_are_refused_at_once(
    shards: tuple[Path, dict[int, torch.Tensor]], tmp_path: Path, model: dict[str, Any], words: str
) -> None:
    folder, _ = shards
    (folder / "params.json").write_text(json.dumps({"model": model}))
    with pytest.raises(PackError, match=words):
        convert_stem(source=folder, out=tmp_path / "out")


@pytest.mark.parametrize("part", [3, torch.zeros(1).to_sparse()], ids=["a number", "sparse"])
def test_parts_that_are_no_dense_tensors_are_refused(
    shards: tuple[Path, dict[int, torch.Tensor]], tmp_path: Path, part: Any
) -> None:
    folder, _ = shards
    torch.save({"stem_embeddings.0.weight": part}, folder / "stem_shards" / "stem_model_mp4.pt")
    with pytest.raises(PackError, match="no dense tensors"):
        convert_stem(source=folder, out=tmp_path / "out")


def test_a_missing_shard_is_named(shards: tuple[Path, dict[int, torch.Tensor]], tmp_path: Path) -> None:
    folder, _ = shards
    (folder / "stem_shards" / "stem_model_mp4.pt").unlink()
    with pytest.raises(PackError, match=r"ranks \[0, 1, 2, 3, 5"):
        convert_stem(source=folder, out=tmp_path / "out")


@pytest.fixture(scope="module")
def context_free(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama without attention in layer 0: there the feed-forward input depends on the token alone."""
    folder = tmp_path_factory.mktemp("models") / "context-free"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    model.save_pretrained(folder)
    for file in tiny_llama_folder.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_rows_that_are_exactly_the_up_projection_change_nothing(
    context_free: Path, prompt: tuple[int, ...], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(context_free, dtype=torch.float64).eval()
    block = model.model.layers[0]
    with torch.no_grad():
        rows = block.mlp.up_proj(block.post_attention_layernorm(model.model.embed_tokens.weight))
    stem = save_stem(tmp_path / "stem", {0: rows}, 64)
    found = logits_of(engine_on(str(context_free), memory=(f"s={stem}",)), prompt, ("s",))
    assert torch.allclose(found.double(), reference_logits(model, [], prompt), atol=TOLERANCE)


def test_calibrated_rows_are_the_mean_over_a_tokens_occurrences(
    tiny_llama_folder: Path, backbone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no weight on the prediction, against transformers' up-projection in float64."""
    monkeypatch.setattr("server.commands.attach_stem.PRIOR", 1e-9)
    text = tmp_path / "text.txt"
    text.write_text("The cat saw the dog. The dog saw the cat, and the cat ran. " * 3)
    out = attach_stem(model=str(tiny_llama_folder), out=tmp_path / "s", layers=(2,), calibrate=text, dtype="float32")
    from server.models.source import open_source

    ids = open_source(str(tiny_llama_folder)).tokenizer.encode(text.read_text())
    ups: list[torch.Tensor] = []
    handle = backbone.model.layers[2].mlp.up_proj.register_forward_hook(lambda m, a, o: ups.append(o[0]))
    reference_logits(backbone, [], tuple(ids))
    handle.remove()
    rows = all_rows(out / "table-2.safetensors")
    assert rows.shape == (49152, 160)
    assert torch.isfinite(rows).all()
    for token in set(ids):
        expected = ups[0][[i for i, each in enumerate(ids) if each == token]].mean(0)
        assert torch.allclose(rows[token].double(), expected, atol=TOLERANCE)
