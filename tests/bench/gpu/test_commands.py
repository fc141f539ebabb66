"""The commands for one GPU, on a CPU at tiny sizes, on a machine that lacks what only the API needs."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.bench.gpu.bare import ROOT, run

TINY = ("--device", "cpu", "--shape", "tiny")


def command(folder: Path, verb: str, *flags: str, **variables: str) -> tuple[str, dict[str, Any]]:
    """What a verb said, and the runs in its file."""
    tiny = TINY[:2] if verb == "test" else TINY
    done = run(folder, "-m", "server.bench.gpu", verb, *tiny, "--out", "out", *flags, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((folder / "out/gpu.json").read_text())
    assert content == json.loads((folder / "build/gpu/gpu.json").read_text())
    return done.stdout, content["runs"]


def test_the_machine_of_these_tests_lacks_what_it_should(tmp_path: Path) -> None:
    done = run(tmp_path, "-c", "import torch, transformers; import pydantic")
    assert done.returncode and done.stderr.strip().endswith("No module named 'pydantic'")


def test_kernels_are_right_and_filed_with_the_device_beside_each(tmp_path: Path) -> None:
    said, runs = command(tmp_path, "kernels", "--only", "lookup")
    cases = {run["config"]["case"]: run for run in runs.values() if "case" in run["config"]}
    assert {"lookup, misses", "lookup, mixed", "lookup, hits", "lookup of int8 rows"} <= cases.keys()
    for case in cases.values():
        assert case["figures"]["deviation"] == 0 and case["figures"]["us"] > 0
        assert {"gpu", "torch", "triton", "commit", "command", "date"} <= case["device"].keys()
    assert "rows" in said and "not measured" in said  # no bar is met on a CPU
    again, _ = command(tmp_path, "kernels", "--only", "lookup")
    assert "measured in" not in again and "lookup, misses" in again


def test_arms_take_turns_and_what_is_measured_is_not_measured_again(tmp_path: Path) -> None:
    flags = ("--sequences", "3", "--pair-seconds", "0.1")
    said, runs = command(tmp_path, "table", *flags, ARMS="direct-1g,staged")
    figures = {run["config"]["arm"]: run["figures"] for run in runs.values()}
    assert figures.keys() == {"direct-1g", "staged"}
    cached, staged = figures["direct-1g"], figures["staged"]
    assert 0 < cached["arms"]["arm"]["hit_rate"] < 1  # the second half of the text, after the first
    assert cached["arm_over_none"]["pairs"] >= 12 and staged["arms"]["arm"]["stall_us"] > 0
    assert staged["arms"]["arm"]["table_bytes_per_step"] == pytest.approx(3 * 2 * 16 * 80)  # all rows of all layers
    said, runs = command(tmp_path, "table", *flags, ARMS="direct-1g,staged,offload,stem")
    assert said.count("measured in") == 2 and len(runs) == 4
    resident = next(run["figures"] for run in runs.values() if run["config"]["arm"] == "offload")
    assert resident["arms"]["resident"]["link_bytes_per_step"] == 0 < resident["arms"]["arm"]["link_bytes_per_step"]
    assert resident["arms"]["resident"]["rows_per_step"] == resident["arms"]["arm"]["rows_per_step"] == 3 * 2 * 16


def test_streams_end_and_tell_their_times(tmp_path: Path) -> None:
    _, runs = command(tmp_path, "sweep", "--sequences", "1", "--pair-seconds", "0.2")
    figures = {run["config"]["part"]: run["figures"] for run in runs.values()}
    assert figures["turns"]["arms"]["arm"]["host_step_us"] > 0
    streams = figures["streams"]
    assert streams["tokens_per_s"] > 0 and streams["ttft_ms"]["p50"] > 0 and streams["itl_ms"]["p99"] > 0


@pytest.mark.slow
def test_the_baseline_answers_as_many_tokens_as_transformers(tmp_path: Path) -> None:
    said, runs = command(tmp_path, "baseline", "--sequences", "2", "--pair-seconds", "0.1")
    figures = {run["config"].get("engine", "decode"): run["figures"] for run in runs.values()}
    assert figures["ours"]["tokens"] == figures["transformers"]["tokens"] == 16
    assert figures["decode"]["share"] > 0 and "over transformers" in said


def test_a_command_leaves_for_the_next_run_what_its_time_does_not_allow(tmp_path: Path) -> None:
    flags = ("--only", "lookup, m")
    done = run(tmp_path, "-m", "server.bench.gpu", "kernels", *TINY, *flags, GPU_SECONDS="1")
    assert "left for the next run: shape tiny" in done.stdout and not (tmp_path / "build").exists()
    _, runs = command(tmp_path, "kernels", *flags)
    assert runs_of(runs) == {"lookup, misses", "lookup, mixed"}


def runs_of(runs: dict[str, Any]) -> set[str]:
    return {run["config"]["case"] for run in runs.values() if "case" in run["config"]}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("kernels",), "error: no CUDA device is usable by torch"),
        (("table", "--device", "cpu"), "error: SHAPE is qwen3-4b on the CPU"),
        (("table", *TINY, "--arms", "fast"), "error: ARMS names 'fast'; there are direct,"),
        (("sweep", "--device", "cpu", "--shape", "huge"), "error: SHAPE is huge on the CPU"),
    ],
)
def test_what_is_in_the_way_is_one_line(tmp_path: Path, words: tuple[str, ...], line: str) -> None:
    done = run(tmp_path, "-m", "server.bench.gpu", *words)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(line) and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_tests_run_without_the_plugins_of_the_whole_suite(tmp_path: Path) -> None:
    _, runs = command(tmp_path, "test")
    figures = {run["config"]["job"]: run["figures"] for run in runs.values()}
    assert figures.keys() == {"tests/gpu", "tests/kernels"}
    assert "skipped" in figures["tests/gpu"]["last"] and "passed" in figures["tests/kernels"]["last"]
    assert (tmp_path / "out/tests-kernels.log").stat().st_size


def test_without_pytest_the_tests_say_what_does_without(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "server.bench.gpu", "test", "--device", "cpu", without="pytest")
    assert done.returncode == 2 and "has no pytest; make gpu-kernels compares every kernel" in done.stderr


def test_every_target_names_a_verb() -> None:
    listed = run_make("help")
    targets = set(re.findall(r"make (gpu-[a-z]+)", listed))
    assert targets == {f"gpu-{verb}" for verb in ("test", "kernels", "table", "sweep", "baseline", "report")}
    for target in targets:
        line = run_make("-n", target, "GPU_PYTHON=python9").strip()
        assert line == f"python9 -m server.bench.gpu {target.removeprefix('gpu-')}"


def run_make(*words: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(
        ["make", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_every_verb_of_the_targets_is_one_of_the_commands(tmp_path: Path) -> None:
    helped = run(tmp_path, "-m", "server.bench.gpu", "--help").stdout
    assert all(f" {verb} " in helped for verb in ("test", "kernels", "table", "sweep", "baseline", "report", "trace"))
