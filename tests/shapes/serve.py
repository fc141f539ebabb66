"""Serves on a GPU of shapes and prints what it told: `python tests/shapes/serve.py TIER MODEL NAME=PACK …`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

from server.runtime import load as loading
from server.runtime.messages import SamplingParams, Submit
from server.runtime.overlap import OverlappedEngine
from server.runtime.process import build_engine
from server.settings import Settings
from tests.shapes.gpu import GPU, simulated

PROMPT = tuple(range(5, 40))
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
WAYS: list[dict[str, Any]] = [
    {}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}, {"temperature": 1.0, "min_p": 0.1},
    {"logprobs": 2}, {"frequency_penalty": 0.5, "repetition_penalty": 1.1}, {"logit_bias": ((7, 1.0),)},
    {"prompt_logprobs": True}, {"trace": True},
]  # fmt: skip


def served(settings: Settings) -> dict[str, Any]:
    loading.choose_device = lambda settings: GPU
    packs = tuple(spec.partition("=")[0] for spec in settings.memory)
    with simulated() as told:
        loaded = loading.load(settings)
        engine = build_engine(settings, loaded)
        assert isinstance(engine, OverlappedEngine)
        at_start = set(told.launches)
        for together in (1, 3):  # sequences that begin together; more join while they decode
            for number, way in enumerate(WAYS):
                for each in range(together):
                    seen = packs[: (number + each) % (len(packs) + 1)]
                    prompt = PROMPT[: 1 + 11 * each] if each else PROMPT
                    engine.submit(Submit(f"{number}.{each}", prompt, replace(GREEDY, **way), seen))
                for _ in range(12):
                    check(engine)
        while not engine.idle:
            check(engine)
        if loaded.memories is not None:
            loaded.memories.close()
        findings = [{"kind": f.kind, "what": f.what, "stack": f.stack} for f in told.findings]
        report = dict(loaded.device_path.report() if loaded.device_path is not None else [])
    late = [name for name, key in told.launches if (name, key) not in at_start]
    return {
        "findings": findings, "late": late, "counts": dict(told.counts), "ahead": engine.launched_ahead,
        "report": report, "kernels": sorted({name for name, _ in told.launches}),
    }  # fmt: skip


def check(engine: OverlappedEngine) -> None:
    for output in engine.step().outputs:
        assert output.error is None, output.error


def main() -> None:
    tier, block_size, model, *packs = sys.argv[1:]
    settings = Settings(
        model=model, memory=tuple(packs), placement=(tier,), keep_up_projection=True, dtype="bfloat16",
        max_model_len=256, kv_bytes=64 << 20, max_num_seqs=12, device_cache=0 if tier == "device" else 1 << 20,
        block_size=int(block_size), staging=8 << 20,
    )  # fmt: skip
    print(json.dumps(served(settings)))


if __name__ == "__main__":
    main()
