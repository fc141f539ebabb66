"""`bench offload` on a tiny model: the arms read the same text, and the figures have the promised names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.bench import arms, offload
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
