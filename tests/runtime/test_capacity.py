"""The plan: made from headers, and what is loaded afterwards takes as much as it said."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from server.cache.row_types import row_type
from server.cache.table_writer import write_sparse_table
from server.cli import main
from server.commands.attach import attach, fresh_config
from server.commands.plan import lines
from server.errors import CapacityError
from server.memory.engram import Engram
from server.memory.pack import MODULES, engram_shape, table_file
from server.models.source import open_source
from server.runtime.capacity import GPU_SHARE, Wanted, plan, plan_kv, planned_weight_bytes
from server.runtime.load import load, prepare, weight_bytes
from server.runtime.process import build_engine
from server.runtime.report import describe_places
from tests.engines import settings_for


@pytest.fixture(scope="module")
def pack(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plan") / "engram"
    return attach(model=str(tiny_llama_folder), out=out, layers=(1, 3), rows=500, dim=16, heads=4, dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_take_what_the_plan_said(tiny_llama_folder: Path, dtype: str) -> None:
    settings = settings_for(str(tiny_llama_folder), dtype=dtype)
    loaded = load(settings)
    assert loaded.plan.weights == weight_bytes(loaded.model) == prepare(settings).plan.weights


def test_a_plan_says_where_every_table_goes_and_why(
    tiny_llama_folder: Path, pack: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--memory", f"a={pack}", "--placement", "a/1=device", "--kv-bytes", "64M", "--host-memory-limit", "1G"]
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sys.argv", ["engram-server", "plan", str(tiny_llama_folder), *flags])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    shown = capsys.readouterr().out
    sizes = [prepare(settings_for(str(tiny_llama_folder), memory=(f"a={pack}",))).plan.places[i].need for i in (0, 1)]
    assert f"table a/1 │ device │ {sizes[0].nbytes:,}" in " ".join(shown.split()).replace("│ ", "│ ")
    assert "asked for: --placement a/1=device" in shown
    assert "the page cache serves as well" in shown
    assert "1,073,741,824" in shown


@pytest.mark.parametrize("tier", ["device", "mapped"])
def test_beside_a_gpu_plan_and_report_say_who_looks_rows_up(tiny_llama_folder: Path, pack: Path, tier: str) -> None:
    """A pack with one table that only the host reads is staged as a whole."""
    settings = settings_for(str(tiny_llama_folder), memory=(f"a={pack}",), placement=("a/1=device", f"a/3={tier}"))
    gpu = torch.device("cuda")
    reasons = {what: why for what, _, _, why in lines(replace(prepare(settings), device=gpu), settings)}
    loaded = load(settings, device_path=True)
    told = dict(describe_places(replace(loaded, device=gpu)))
    assert told["table a/1"].endswith("; staged: no decode step runs on the device")  # none is built yet
    build_engine(settings, loaded)
    told = dict(describe_places(replace(loaded, device=gpu)))
    if tier == "device":
        assert reasons["table a/1"].endswith("decode steps look rows up on the GPU")
        assert told["table a/1"].endswith("; direct: rows lie on the device")
    else:
        assert reasons["table a/1"].endswith("rows are staged, as other tables of its pack are")
        assert reasons["table a/3"].endswith("rows are staged: a GPU cannot read a mapped file itself")
        assert told["table a/1"].endswith("; staged: as other tables of its pack are")
        assert told["table a/3"].endswith("; staged: a GPU cannot read a mapped file itself")


def pack_with_sparse_table(folder: Path, model: str, nbytes: int) -> Path:
    """An Engram pack whose one table takes so many bytes in a file full of holes."""
    heads, dim = 4, 128
    rows = nbytes // (2 * heads * dim * 2)
    config = fresh_config(open_source(model), (1,), rows, dim, heads, (2, 3), 0, "bfloat16")
    folder.mkdir()
    total = sum(sum(order) for order in config.primes["1"])
    write_sparse_table(folder / table_file(1), total, dim, row_type("bfloat16"))
    engram = Engram(engram_shape(config), torch.float32)
    save_file({f"layers.1.{name}": torch.zeros_like(p) for name, p in engram.named_parameters()}, folder / MODULES)
    config.write(folder)
    return folder


def test_starting_on_100_gb_takes_what_starting_on_1_gb_takes(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Mapped, so that no byte is read: within 10 %, the best of some starts in turns on a busy machine."""
    model = str(tiny_llama_folder)
    packs = {size: pack_with_sparse_table(tmp_path / str(size), model, size * 10**9) for size in (1, 100)}
    best = dict.fromkeys(packs, float("inf"))
    for turn in range(40):
        for size, pack in packs.items():
            begun = time.perf_counter()
            loaded = load(settings_for(model, memory=(str(pack),)))
            best[size] = min(best[size], time.perf_counter() - begun)
            assert loaded.memories is not None
            loaded.memories.close()
        if turn > 3 and best[100] <= 1.1 * best[1]:
            return
    raise AssertionError(f"best starts: {best}")


def test_a_gpu_gives_most_of_what_is_left_to_keys_and_values(tiny_llama_folder: Path) -> None:
    settings = settings_for(str(tiny_llama_folder), kv_bytes=0, max_num_seqs=10_000)
    sizes = {"block_bytes": 1 << 20, "max_len": 256, "available": 80 << 30}
    gpu = plan_kv(settings, **sizes, share=GPU_SHARE * (70 << 30))
    assert gpu.nbytes == GPU_SHARE * (70 << 30) and "75% of the device memory" in gpu.reason
    cpu = plan_kv(settings, **sizes)
    assert cpu.nbytes == 2 << 30
    few = plan_kv(
        settings_for(str(tiny_llama_folder), kv_bytes=0, max_num_seqs=2), **sizes, share=GPU_SHARE * (70 << 30)
    )
    assert few.blocks == 2 * 256 // 16 + 1  # never more than can be used
    with pytest.raises(CapacityError, match="--kv-bytes"):
        plan_kv(settings, **sizes, share=0)


def test_tables_asked_onto_a_gpu_have_their_room_before_keys_and_values(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = pack_with_sparse_table(tmp_path / "large", str(tiny_llama_folder), 1 << 26)
    settings = settings_for(
        str(tiny_llama_folder), memory=(f"a={large}",), placement=("device",), kv_bytes=0, max_num_seqs=10_000
    )
    prepared = prepare(settings)
    (table,) = [place.need.nbytes for place in prepared.plan.places]
    gpu, config, left = torch.device("cuda"), prepared.source.config, 2 * table
    free = planned_weight_bytes(config, prepared.dtype, gpu, frozenset()) + settings.staging + left
    monkeypatch.setattr("server.runtime.capacity._free_memory", lambda device: free)
    found = plan(Wanted(settings, config, prepared.packs, prepared.dtype, gpu, prepared.max_len, frozenset()), None)
    assert found.tier("a/1") == "device"
    assert 0 <= GPU_SHARE * (left - table) - found.kv.nbytes < found.kv.block_bytes
