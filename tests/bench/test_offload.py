"""`bench offload` on a tiny model: the arms read the same text, and the figures have the promised names."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from server.bench import arms, offload
from server.cache.counters import LayerCounters
from server.runtime import load


def test_it_runs_and_writes_what_it_promises(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "CONCURRENCY", (1, 2))
    for module in (load, offload):  # more threads spend their time handing over, and would stay for other tests
        monkeypatch.setattr(module, "cpu_quota", lambda: 1)
    for module in (arms, offload):
        monkeypatch.setattr(module, "ROUND", 40)
    text = "".join(f"The number {n} comes before {n + 1}; and then\n" for n in range(20_000))
    monkeypatch.setattr(arms, "texts", lambda: iter([("numbers", text)]))
    out = tmp_path / "offload.json"
    offload.run(model=str(tiny_llama_folder), parameters=1_000_000, seconds=0.1, json=out)
    result = json.loads(out.read_text())
    for name in ("offload_over_resident", "offload_over_none"):
        for count in ("1", "2"):
            pair = result["ratios"][name]["throughput"][count]
            assert pair["ci95"][0] <= pair["median"] <= pair["ci95"][1]
            middle = pair["middle_half"]
            assert middle["ci95"][0] <= middle["mean"] <= middle["ci95"][1]
    figures = result["memory"]["2"]
    assert figures["offload"]["bytes_per_token"] == 2 * 16 * 80  # two layers, 16 rows of 80 bytes each
    assert figures["offload"]["hit_rate"] == 0
    assert 0 < figures["cached"]["hit_rate"] <= 1
    assert figures["cached"]["bytes_per_token"] == pytest.approx(2560 * (1 - figures["cached"]["hit_rate"]), rel=0.02)
    assert set(result["stem"]["ratios"]) >= {"stem offload_over_stem resident", "engram+stem offload_over_none"}
    assert 0 < result["counting_share_of_step"] < 1


def test_what_is_counted_belongs_to_the_steps_that_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several rounds: what starting and warming them reads is of no step."""

    class Memory:
        """Also the engine: stalls as long as each step takes."""

        def __init__(self) -> None:
            self.stall_s = 0.0
            self.runner = SimpleNamespace(memories=self)

        def counters(self) -> tuple[LayerCounters, ...]:
            return (LayerCounters("t", 1, fetch_s=self.stall_s, stall_s=self.stall_s),)

        def step(self) -> None:
            self.stall_s += 1.0

    def start(engine: Memory, pieces: object) -> None:
        engine.stall_s += 1000.0

    ticks = itertools.count()
    monkeypatch.setattr(arms, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    monkeypatch.setattr(arms, "start", start)
    monkeypatch.setattr(arms, "warm_pages", lambda arm, pieces: None)
    bare = SimpleNamespace(runner=SimpleNamespace(memories=None), step=lambda: None, stall_s=0.0)
    both = {"none": arms.Arm(bare), "offload": arms.Arm(Memory())}  # type: ignore[arg-type]
    arms.alternate(both, [(1,)], 1, 5 * 2 * arms.ROUND)
    assert len(both["offload"].seconds) > arms.ROUND  # several rounds
    assert offload.memory_figures(both["offload"], 1)["stall_share"] == 1.0
