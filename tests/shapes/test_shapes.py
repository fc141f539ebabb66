"""The GPU's path without a GPU: no tensor on the wrong side, no wait within a capture, nothing compiled while serving.

Where torch is built for CUDA, as its default wheels for Linux are. Values are not computed: `tests/gpu` needs a device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.memory.conftest import *  # noqa: F403  packs
from tests.memory.stems import save_stem
from tests.shapes.gpu import missing

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no GPU of shapes: {missing()}")


def run(script: str, *arguments: str, **variables: str) -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def faults(told: dict[str, Any]) -> list[dict[str, Any]]:
    """What a GPU would refuse, be slowed down by in every step, or read wrongly."""
    launching = "device_runner.py", "launch"
    return [
        found
        for found in told["findings"]
        if found["kind"] != "sync" or any(all(word in frame for word in launching) for frame in found["stack"])
    ]


@pytest.fixture(scope="module")
def stem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stem(tmp_path_factory.mktemp("stems") / "s", {2: torch.randn(49152, 160)}, 64)


@pytest.mark.parametrize(
    "tier, parts, block_size", [("pinned", 1, 16), ("pinned", 1, 256), ("mapped", 4, 16), ("device", 1, 16)]
)
def test_decode_steps_are_captured_and_launched_ahead(
    tier: str, parts: int, block_size: int, tiny_llama_folder: Path, pack_a: Path, stem: Path
) -> None:
    told = run("serve.py", tier, str(block_size), str(tiny_llama_folder), f"a={pack_a}", f"s={stem}")
    assert faults(told) == []
    assert told["late"] == []
    assert told["ahead"] > 30 and told["counts"]["replays"] >= parts * told["ahead"]
    assert (
        f"5 CUDA graphs of 1, 2, 4, 8, 12 sequences{f', each in {parts} parts' * (parts > 1)}"
        in told["report"]["decode"]
    )
    assert "fallback" not in told["report"]
    assert ("lookup_kernel" in told["kernels"]) == (tier != "mapped") and "prefill_kernel" in told["kernels"]


@pytest.mark.parametrize("verb", ["table", "sweep"])
def test_the_commands_measure(verb: str, tmp_path: Path) -> None:
    sizes = {"SHAPE": "tiny", "TABLE_GIB": "0.01", "SEQUENCES": "4", "PAIR_SECONDS": "0.2", "OUT": str(tmp_path)}
    told = run("measure.py", verb, **sizes)
    assert faults(told) == [] and told["counts"]["replays"] > 50


FAULTS = """
import torch
from tests.shapes.gpu import GPU, simulated

with simulated() as told:
    values, host = torch.ones(4, device=GPU), torch.ones(4)
    total = values + 1
    try:
        values + host
    except RuntimeError:
        pass
    total.sum().item()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    total.copy_(host.pin_memory(), non_blocking=True)
    total.copy_(host)
    total[total > 0]
    graph.capture_end()
print(sorted(found.kind for found in told.findings))
"""


def test_what_a_gpu_would_mind_is_found() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "['capture', 'capture', 'mixed', 'sync']", done.stderr
