"""Decode steps that stay on the device, with one in flight, give the tokens of the engine that computes eagerly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.runtime.device_runner import DeviceRunner
from server.runtime.engine import Engine
from server.runtime.messages import SamplingParams, Submit, TokenOutput
from server.runtime.overlap import OverlappedEngine
from tests.backbones import save_backbone
from tests.engines import drive, engine_on, outputs_of, tokens_of
from tests.tiny import VOCAB

BACKBONES = ("llama", "qwen3", "gemma 3, linear rope", "smollm3, llama 3 rope and window")


@pytest.fixture(autouse=True, scope="module")
def references():
    """Kernels by their torch references: through Triton's interpreter a step takes seconds (tests/kernels)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.language.interpreting", False)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made: dict[str, str] = {}
    for name in BACKBONES:
        folder: Path = tmp_path_factory.mktemp("backbone")
        save_backbone(folder, name)
        made[name] = str(folder)
    return made


@pytest.fixture(scope="module")
def eager(folders: dict[str, str]) -> dict[str, Engine]:
    return {
        name: engine_on(folder, prefix_cache="off", max_model_len=96, block_size=8) for name, folder in folders.items()
    }


def device_engine(folder: str, blocks: int = 60, **flags: object) -> OverlappedEngine:
    """An engine on the device path with at most `blocks` KV blocks of 8 tokens."""
    engine = engine_on(folder, device_path=True, block_size=8, max_model_len=96, kv_bytes=blocks * BLOCK_BYTES, **flags)
    assert isinstance(engine, OverlappedEngine)
    return engine


BLOCK_BYTES = 8 * 4 * 2 * 2 * 24 * 4  # tokens, layers, keys and values, heads, at most 24 values a head, fp32


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, VOCAB, (length,), generator=generator).tolist())


def params_of(data: st.DataObject) -> SamplingParams:
    """Mostly what the device samples for by itself, now and then what needs logits on the host."""
    drawn = data.draw(st.sampled_from(("greedy", "sampled", "sampled", "filtered", "penalties", "logprobs", "least")))
    return SamplingParams(
        max_tokens=data.draw(st.integers(1, 14)),
        temperature=0.0 if drawn in ("greedy", "least") else 1.0,
        seed=data.draw(st.integers(0, 2**64 - 1)),
        ignore_eos=data.draw(st.booleans()),
        stop_token_ids=frozenset(data.draw(st.sets(st.integers(1, VOCAB - 1), max_size=12))),
        top_k=5 if drawn == "filtered" else 0,
        top_p=0.7 if drawn == "filtered" else 1.0,
        presence_penalty=0.5 if drawn == "penalties" else 0.0,
        logprobs=2 if drawn == "logprobs" else None,
        min_tokens=3 if drawn == "least" else 0,
    )


@pytest.mark.parametrize("name", BACKBONES)
@settings(max_examples=15)
@given(data=st.data())
def test_any_workload_gives_the_tokens_of_sequences_computed_eagerly_alone(
    name: str, folders: dict[str, str], eager: dict[str, Engine], data: st.DataObject
) -> None:
    shared = prompt_of(7, data.draw(st.integers(0, 30)))
    submits = [
        Submit(
            f"r{i}",
            shared + prompt_of(i, data.draw(st.integers(1, 30))),
            params_of(data),
            n=data.draw(st.sampled_from((1, 1, 2))),
        )
        for i in range(data.draw(st.integers(1, 5)))
    ]
    expected = {}
    for submit in submits:
        expected |= {key: tokens_of(outputs) for key, outputs in outputs_of(eager[name], [submit]).items()}
    engine = device_engine(
        folders[name],
        data.draw(st.integers(13, 30)),
        max_num_seqs=data.draw(st.integers(1, 6)),
        max_num_batched_tokens=data.draw(st.sampled_from((3, 16, 64))),
    )
    arrivals = {i: data.draw(st.integers(0, 6)) for i in range(len(submits))}
    victim, moment = data.draw(st.sampled_from([*range(len(submits)), None])), data.draw(st.integers(1, 10))
    answers: dict[tuple[str, int], list[int]] = {key: [] for key in expected}
    step = 0
    while not engine.idle or any(arrival >= step for arrival in arrivals.values()):
        for i, submit in enumerate(submits):
            if arrivals[i] == step:
                engine.submit(submit)
        if step == moment and victim is not None:
            engine.abort(f"r{victim}")
        engine.scheduler.check()
        for output in engine.step().outputs:
            assert output.finish_reason != "error", output.error
            answers[output.request_id, output.index] += output.token_ids
        engine.scheduler.check()
        step += 1
    for key, tokens in expected.items():
        if key[0] == f"r{victim}":
            assert tokens[: len(answers[key])] == answers[key]
        else:
            assert answers[key] == tokens
    assert engine.stats().blocks_used == 0 and not engine._requests
