"""What the commands for one GPU are made of: refusals, journals, tables, text, arms that must agree, the report."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels import rms_norm
from server.bench.gpu import report, test_run, trace, transformers_peer
from server.bench.gpu.arms import Memory, direct_arm, on_device, staged_arm
from server.bench.gpu.dense_cases import DENSE
from server.bench.gpu.device import refusal
from server.bench.gpu.journal import Budget, Journal, read
from server.bench.gpu.kernel_case import Sizes, judged
from server.bench.gpu.kernel_run import cases
from server.bench.gpu.models import backbone, config_of, engrams, stem_layers, weight_bytes, without_up
from server.bench.gpu.scene import Scene, check_room, drawn_lengths
from server.bench.gpu.session import clear_capacity
from server.bench.gpu.tables import MadeUp, make, of_type, random_rows, table_bytes
from server.bench.gpu.trace import Trace, spoken
from server.errors import CapacityError, SettingsError, StepFailed

CPU = torch.device("cpu")
TINY = config_of("tiny")


def sizes(seed: int = 0) -> Sizes:
    return Sizes(TINY, torch.float32, 24, 4, 70, CPU, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("gpu", "triton", "words"),
    [
        (None, True, "no CUDA device is usable by torch 2.11.0"),
        (("Tesla T4", (7, 5)), True, "Tesla T4 has compute capability 7.5 and 8.0 or newer is needed"),
        (("NVIDIA A100", (8, 0)), False, "Triton is not installed beside torch 2.11.0"),
    ],
)
def test_a_device_that_will_not_do_is_refused_with_the_reason(gpu: Any, triton: bool, words: str) -> None:
    assert words in str(refusal("2.11.0", gpu, triton))


def test_an_ampere_with_triton_will_do() -> None:
    assert refusal("2.11.0", ("NVIDIA A100", (8, 0)), True) is None


def test_a_table_is_cut_to_the_room_there_is_and_says_so() -> None:
    assert table_bytes(93, 200 << 30) == (93 << 30, "93 GiB of table")
    nbytes, words = table_bytes(93, 60 << 30)
    assert nbytes == 48 << 30 and words == "48.0 GiB of table: TABLE_GIB=93 does not fit into this machine's RAM"
    with pytest.raises(CapacityError, match="set TABLE_GIB=2.000"):
        table_bytes(93, 8 << 30)


def test_a_driver_that_refuses_a_table_ends_in_one_line_with_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(address: int, nbytes: int) -> None:
        raise OSError(1, "operation not permitted")

    monkeypatch.setattr("server.cache.cuda_memory.register", refused)
    shape = MadeUp("engram/1", 1 << 16, 80, of_type("float8_e4m3"))
    with pytest.raises(
        CapacityError, match=r"refused .*operation not permitted.*raise .*ulimit -l.* or lower TABLE_GIB"
    ):
        make(shape, torch.device("cuda"))


@pytest.mark.parametrize("name", ["bfloat16", "int8", "float8_e4m3", "float8_e4m3_e8m0"])
def test_made_up_rows_hold_values_only(name: str) -> None:
    shape = MadeUp("t", 3000, 96, of_type(name))
    raw = random_rows(np.random.default_rng(0), shape.rows, shape)
    values = torch.empty(shape.rows, shape.dim)
    shape.row_type.decode(torch.from_numpy(raw), values)
    assert values.isfinite().all() and 0 < values.abs().max() < 1 and shape.row_bytes % 16 == 0


def test_a_table_is_filled_to_its_last_row() -> None:
    shape = MadeUp("t", (32 << 20) // 80 * 2 + 77, 80, of_type("int8"))
    raw = make(shape, CPU).table.raw
    scales = raw[:, 80:84].contiguous().view(torch.float32)
    assert (scales == 2.0**-10).all() and not torch.equal(raw[:1000], raw[(32 << 20) // 96 :][:1000])


def test_sequences_that_do_not_fit_are_refused_with_the_number_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 << 30, 80 << 30))
    lengths = drawn_lengths(512)
    with pytest.raises(CapacityError) as refused:
        check_room(lengths, 8, 147_456, torch.device("cuda"))
    fits = int(str(refused.value).rpartition("SEQUENCES=")[2])
    assert 300 < fits < 512
    check_room(lengths[:fits], 8, 140_000, torch.device("cuda"))


def test_device_memory_that_runs_out_names_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 80 << 30))
    for config, cure in (({"sequences": 512}, "set SEQUENCES=256"), ({"case": "norm"}, "take SHAPE=qwen3-4b")):
        with (
            pytest.raises(CapacityError, match=f"1.0 of 80.0 GiB were free; {cure}"),
            clear_capacity(config),
        ):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def test_the_papers_lengths_lie_between_100_and_1024() -> None:
    lengths = drawn_lengths(512)
    assert lengths.min() >= 100 and lengths.max() < 1024 and abs(lengths.mean() - 562) < 30


def test_the_trace_is_what_its_recipe_makes() -> None:
    assert np.array_equal(trace.made().ids, Trace.stored().ids)
    assert trace.TRACE.stat().st_size < 300 << 10


def test_languages_share_no_ngram_and_repeat_as_the_text_does() -> None:
    ids, vocab = Trace.stored().ids[:4000].astype(np.int64)[None], 151_936
    text = len(np.unique(np.lib.stride_tricks.sliding_window_view(ids[0], 2), axis=0))
    told = [spoken(ids, np.array([language]), vocab)[0] for language in range(3)]
    assert np.array_equal(told[0], ids[0])
    pairs = [set(zip(each[:-1].tolist(), each[1:].tolist(), strict=True)) for each in told]
    assert [len(each) for each in pairs] == [text] * 3
    assert len(pairs[0] | pairs[1] | pairs[2]) > 0.999 * 3 * text
    assert max(each.max() for each in told) < vocab


def test_pieces_come_from_the_half_that_a_warm_cache_has_not_read() -> None:
    stored = Trace.stored()
    pieces = stored.pieces(5, 9000, 151_936)
    later = set(np.unique(stored.ids[stored.half :]).tolist())
    assert set(np.unique(pieces).tolist()) <= later
    assert np.array_equal(stored.pieces(5, 10, 151_936, first=7)[:, :3], pieces[:, 7:10])


def test_a_journal_knows_only_what_was_measured_on_its_device_at_its_commit(tmp_path: Path) -> None:
    device = {"gpu": "A", "commit": "1", "date": "2026-01-01"}
    journal = Journal(tmp_path / "out", device, home=tmp_path / "home")
    journal.add("table", {"arm": "direct"}, {"x": 1}, 2.0)
    again = Journal(tmp_path / "elsewhere", device, home=tmp_path / "home")
    assert len(read(tmp_path / "elsewhere/gpu.json")) == 1  # a fresh folder of results has them all
    assert again.find("table", {"arm": "direct"}) == {"x": 1} and again.find("table", {"arm": "staged"}) is None
    other = Journal(tmp_path / "out", {**device, "commit": "2"}, home=tmp_path / "home")
    assert other.find("table", {"arm": "direct"}) is None
    other.add("table", {"arm": "direct"}, {"x": 2}, 2.0)
    assert len(read(tmp_path / "out/gpu.json")) == 2


def test_results_of_another_kind_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text('{"format": 7}')
    with pytest.raises(SettingsError, match="holds no results of format 1 .*move it away"):
        Journal(tmp_path, {}, home=tmp_path)


def test_a_budget_allows_what_ends_in_time() -> None:
    budget = Budget(100.0)
    assert budget.allows(90) and not budget.allows(101)


def test_every_kernel_has_a_case() -> None:
    helpers = {"__init__", "aot", "language", "reads", "shortlist", "weights"}  # the last two of `sampling`
    named = {path.stem for path in (report.ROOT / "kernels").glob("*.py")} - helpers
    folder = report.ROOT / "server/bench/gpu"
    used = (folder / "dense_cases.py").read_text() + (folder / "row_cases.py").read_text()
    assert all(f"{name}." in used for name in named), named


def test_every_case_is_within_its_tolerance_on_fresh_input() -> None:
    class Tiny:
        tiny, device, shape = True, CPU, "tiny"

        def say(self, line: str) -> None: ...

    from server.bench.gpu.kernel_run import Room

    seed = secrets.randbits(30)
    for name, build in cases(Room(Tiny(), 1.0)).items():  # type: ignore[arg-type]
        case = build(sizes(seed))
        assert judged(case) <= case.limit, f"{name}, seed {seed}"


@pytest.mark.parametrize("wrong", ["left out", "off by a little"])
def test_a_wrong_kernel_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = rms_norm.add_rms_norm

    def norm(stream, delta, weight, eps, dtype):
        out = right(stream, delta, weight, eps, dtype)
        if wrong == "left out":
            made = torch.empty_like(out)
            made[:-1] = out[:-1]
            return made
        return out * (1 + 1e-4)

    monkeypatch.setattr(rms_norm, "add_rms_norm", norm)
    case = DENSE["residual and norm"](sizes())
    assert judged(case) > case.limit


def test_the_shapes_are_qwen3s() -> None:
    small, large = backbone_bytes("qwen3-4b"), backbone_bytes("qwen3-8b")
    assert abs(small / 2 - 4.02e9) < 0.02e9 and abs(large / 2 - 8.19e9) < 0.02e9


def backbone_bytes(shape: str) -> int:
    from server.models.decoder import Decoder

    with torch.device("meta"):
        model = Decoder(config_of(shape), 8, torch.bfloat16)
    return sum({id(p): p.nbytes for p in model.parameters()}.values())


def test_without_up_projections_a_third_of_those_blocks_is_gone_and_the_rest_is_shared() -> None:
    model = backbone(TINY, 32, CPU)
    layers = stem_layers(TINY)
    thin = without_up(model, layers)
    assert weight_bytes(model) - weight_bytes(thin) == len(layers) * TINY.hidden_size * TINY.intermediate_size * 4
    assert thin.embed is model.embed and thin.blocks[0] is model.blocks[0] and model.without_up == frozenset()


def scene_and_engrams() -> tuple[Scene, Any, Any]:
    made = engrams(TINY, 1 << 21, CPU)
    scene = Scene.of(TINY, drawn_lengths(2, 40), 6, CPU, languages=2)
    return scene, backbone(TINY, scene.max_len, CPU), made


def test_the_papers_memory_is_1280_wide_in_two_layers() -> None:
    _, _, made = scene_and_engrams()
    assert made.config.row_width == 1280 and made.config.layer_ids == (1, 2)
    assert made.addresser.orders == (2, 3) and all(m.table.row_bytes == 80 for m in made.made.values())


def test_all_arms_compute_the_same_logits() -> None:
    scene, model, made = scene_and_engrams()
    logits = {}
    for name in ("direct", "cached", "staged", "resident"):
        pack = made.pack()
        if name == "resident":
            pack = made.pack(on_device(pack, CPU), name="resident")
        memory = Memory.of([pack], scene, (1 << 20) if name == "cached" else 0)
        arm = (staged_arm if name == "staged" else direct_arm)(scene, model, memory).arm
        arm.enter(3)
        logits[name] = [arm.launch(step).logits.clone() for step in range(2)]
        memory.close()
    for name in ("cached", "resident"):  # the same rows, read elsewhere
        assert all(torch.equal(a, b) for a, b in zip(logits["direct"], logits[name], strict=True)), name
    worst = max(float((a - b).abs().max()) for a, b in zip(logits["direct"], logits["staged"], strict=True))
    assert worst < 2e-4  # other operators, fp32
    assert (
        max(float((a - b).abs().max()) for a, b in zip(logits["direct"][:1], logits["direct"][1:2], strict=True)) > 0.01
    )


def test_the_text_replaces_what_was_sampled() -> None:
    scene, model, made = scene_and_engrams()
    memory = Memory.of([made.pack()], scene)
    arm: Any = direct_arm(scene, model, memory).arm
    arm.enter(2)
    sampled = [arm.launch(step).tokens() for step in range(3)]
    text = scene.text(2)
    held = arm.steps.tokens[:2, arm.steps.pad :][:, : text.shape[1]].numpy()
    assert np.array_equal(held, text)
    rows = np.arange(2)
    assert [step != text[rows, scene.lengths + at + 1].tolist() for at, step in enumerate(sampled)] == [True] * 3
    memory.close()


@pytest.mark.slow
def test_transformers_computes_the_same_model() -> None:
    model = backbone(TINY, 64, CPU)
    theirs = transformers_peer.model_of("tiny", model, CPU)
    ids = torch.randint(0, TINY.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits[0]
    assert torch.allclose(logits_of(model, ids[0]), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.slow
def test_transformers_prefills_every_prompt_and_a_request_that_fails_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.generation.continuous_batching import cache, model_runner

    found, search = [], cache.PagedAttentionCache.search_prefix_match

    def spied(self: Any, request: str, ids: list[int]) -> int:
        found.append(search(self, request, ids))
        return found[-1]

    monkeypatch.setattr(cache.PagedAttentionCache, "search_prefix_match", spied)
    monkeypatch.setattr(cache, "get_device_and_memory_breakdown", None)  # put back after it is replaced
    monkeypatch.setattr(transformers_peer, "TINY_BLOCKS", {"num_blocks": 12, "max_batch_tokens": 512})
    monkeypatch.setattr(transformers_peer, "MASKED_AT_ONCE", 2)
    job = {"shape": "tiny", "device": "cpu", "sequences": 3, "new_tokens": 2, "longest": 600}  # blocks are of 256
    figures = transformers_peer.main(job)
    assert found == [0] * 5 and figures["tokens"] == 6 and figures["at_once"] == 2
    assert "sdpa" in figures["attention"]

    def broken(*arguments: Any) -> None:
        raise ValueError("out of order")

    monkeypatch.setattr(model_runner.ModelRunner, "compute_batch", broken)
    with pytest.raises(RuntimeError, match="2 of 2 requests failed: out of order"):
        transformers_peer.main(job)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    from server.models.attention.kv_cache import KVCache
    from server.models.attention.paged import PagedBackend
    from server.runtime.attention_probe import trial_batch

    batch = trial_batch((len(ids),), CPU)
    cache = KVCache(TINY, 8, batch.block_size, torch.float32, CPU)
    attention = PagedBackend(TINY, cache)
    attention.plan(batch)
    with torch.inference_mode():
        hidden: torch.Tensor = model.logits(model.states(ids, torch.arange(len(ids)), attention))
    return hidden


def test_a_job_of_the_tests_runs_compiled_and_apart_from_earlier_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    look = (
        "import os; print(os.environ.get('TRITON_INTERPRET'), os.listdir(), os.path.samefile('.', os.environ['OUT']))"
    )
    assert test_run.done([sys.executable, "-c", look], True, 60.0) == (0, "None [] True\n")
    started = "import os, subprocess; subprocess.run(['sh', '-c', 'echo so far; echo $$; sleep 60; true'])"
    code, output = test_run.done([sys.executable, "-c", started], False, 3)
    words, child = output.split("\n", 1)
    assert code == test_run.OUT_OF_TIME and words == "so far"
    state = Path(f"/proc/{int(child)}/stat")  # what it started is ended too, though maybe nobody asked how it ended
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_what_is_cut_off_is_no_failure_and_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "import sys, time; print('so far', flush=True); time.sleep(float(sys.argv[1])); sys.exit(int(sys.argv[2]))"

    class Session:
        tiny, device, budget, rows = True, CPU, Budget(2.0), []  # type: ignore[var-annotated]

        def measure(self, config: dict[str, Any], measure: Any, needs: float) -> Any:
            return measure()

        def table(self, title: str, columns: Any, rows: Any) -> None:
            self.rows += rows

        def say(self, line: str) -> None: ...

    def jobs(*asked: tuple[str, str, str]) -> Any:
        return lambda session: {name: [sys.executable, "-c", words, wait, code] for name, wait, code in asked}

    session: Any = Session()
    monkeypatch.setattr(test_run, "jobs", jobs(("a", "0", "0"), ("memcheck", "60", "0")))
    found = test_run.run(session, tmp_path)
    assert [row[:2] for row in session.rows] == [("a", "passed"), ("memcheck", "cut off")]
    assert not found["memcheck"]["ok"] and found["memcheck"]["last"] == "so far"  # so that the next run runs it
    monkeypatch.setattr(test_run, "jobs", jobs(("a", "0", "9")))
    with pytest.raises(StepFailed, match="failed: a"):
        test_run.run(session, tmp_path)


def test_the_page_holds_the_report_of_the_results_kept() -> None:
    text = report.PAGE.read_text()
    assert report.page(text, report.report(report.stored())) == text


def runs() -> list[dict[str, Any]]:
    device = {"gpu": "NVIDIA H100", "date": "2026-12-01 10:00", "torch": "2.11", "triton": "3.6", "commit": "abc"}
    ratio = {"median": 0.981, "ci95": [0.978, 0.984], "pairs": 40}
    table = {"arm_over_none": ratio, "table_gib": 93.0, "arms": {"arm": {"graphs": 1, "parts": 1}}}
    return [
        {"verb": "table", "config": {"shape": "qwen3-4b", "arm": "direct", "sequences": 512}, "device": device,
         "figures": table},
        {"verb": "table", "config": {"shape": "qwen3-8b", "arm": "direct", "sequences": 512},
         "device": {**device, "date": "2026-12-02 10:00"},
         "figures": {**table, "table_gib": 40.0, "arm_over_none": {**ratio, "median": 0.96}}},
        {"verb": "baseline", "config": {"shape": "qwen3-4b", "decode": 32}, "device": device,
         "figures": {"share": 0.75}},
    ]  # fmt: skip


def test_a_figure_stands_beside_its_bar_met_or_missed() -> None:
    lines = report.report(runs()).splitlines()
    direct = next(line for line in lines if line.startswith("| direct over none"))
    assert "0.9810 [0.9780, 0.9840], met" in direct and "0.9600 [0.9780, 0.9840] with 40 GiB, missed" in direct
    assert any(line.startswith("| decode at 32") and "0.750, met | not measured |" in line for line in lines)
    assert sum("not measured" in line for line in lines) > 15 and "### NVIDIA H100" in lines


def test_figures_of_a_cpu_are_never_reported(tmp_path: Path) -> None:
    made = [{**run, "device": {**run["device"], "gpu": "cpu"}} for run in runs()]
    assert report.report(made) == report.report([])
    source = tmp_path / "gpu.json"
    source.write_text(json.dumps({"format": 1, "runs": {str(i): run for i, run in enumerate(made)}}))
    with pytest.raises(SettingsError, match="holds no figure of a GPU"):
        report.save(source, tmp_path)


def test_saved_results_are_named_by_their_gpu_and_read_again(tmp_path: Path) -> None:
    source, kept = tmp_path / "gpu.json", tmp_path / "results"
    source.write_text(json.dumps({"format": 1, "runs": {str(i): run for i, run in enumerate(runs())}}, indent=2))
    assert report.save(source, kept).name == "nvidia-h100-2026-12-02.json"
    (kept / "cache-cpu.json").write_text('{"experiment": "cache"}')
    assert report.report(report.stored(kept)) == report.report(runs())
