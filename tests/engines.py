"""Engines for tests: built in this process over a real model, driven step by step."""

from __future__ import annotations

from typing import Any

import torch

from server.runtime.engine import Engine
from server.runtime.load import load
from server.runtime.messages import SamplingParams, Submit, TokenOutput
from server.runtime.process import build_engine
from server.settings import Settings

# Two tokens whose logits differ by less may swap when sums run in another order (the design's rule).
TIE = 1e-3


def settings_for(model: str, **flags: Any) -> Settings:
    small = {"dtype": "float32", "threads": 1, "max_model_len": 256, "kv_bytes": 64 << 20}
    return Settings(**{"model": model, **small, **flags})


def engine_on(model: str, *, device_path: bool = False, **flags: Any) -> Engine:
    """A fresh engine over a loaded model, fp32 unless told otherwise. `device_path`: as on a GPU, without graphs."""
    settings = settings_for(model, **flags)
    return build_engine(settings, load(settings, device_path=device_path))


def outputs_of(engine: Engine, submits: list[Submit]) -> dict[tuple[str, int], list[TokenOutput]]:
    """Submits all, steps to the end, checks the books after every step."""
    for submit in submits:
        engine.submit(submit)
    collected: dict[tuple[str, int], list[TokenOutput]] = {}
    while not engine.idle:
        for output in engine.step().outputs:
            collected.setdefault((output.request_id, output.index), []).append(output)
        engine.scheduler.check()
    return collected


def tokens_of(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def drive(engine: Engine, prompts: list[tuple[int, ...]], **params: Any) -> list[list[int]]:
    """Greedy answers to the prompts, computed together."""
    chosen = SamplingParams(**{"temperature": 0, "ignore_eos": True, **params})
    submits = [Submit(f"r{i}", prompt, chosen) for i, prompt in enumerate(prompts)]
    collected = outputs_of(engine, submits)
    return [tokens_of(collected[f"r{i}", 0]) for i in range(len(prompts))]


def logits_of(engine: Engine, prompt: tuple[int, ...], packs: tuple[str, ...] = ()) -> torch.Tensor:
    """Logits [T, V] of all prompt positions, computed through the scheduler, in its chunks."""
    hidden: list[torch.Tensor] = []
    model = engine.runner.model
    handle = model.norm.register_forward_hook(lambda module, args, out: hidden.append(out.clone()))
    try:
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=True)  # no prefix hits
        outputs_of(engine, [Submit("logits", prompt, params, packs)])
    finally:
        handle.remove()
    with torch.inference_mode():
        return model.logits(torch.cat(hidden))


def greedy_reference(model: Any, prompt: tuple[int, ...], answer: list[int]) -> list[int]:
    """The reference's greedy choice at every position of `answer`, given `answer`; ties keep the answer's token."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].float()
    best = logits.max(-1)
    given = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return [
        a if float(b - g) < TIE else int(i) for a, b, g, i in zip(answer, best.values, given, best.indices, strict=True)
    ]
