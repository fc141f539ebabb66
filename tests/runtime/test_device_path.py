"""Decode steps that stay on the device, with one in flight, give the tokens of the engine that computes eagerly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.runtime.engine import Engine
from server.runtime.messages import SamplingParams, Submit
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
    kinds = ("greedy", "sampled", "filtered", "filtered", "penalties", "logprobs", "least")
    drawn = data.draw(st.sampled_from(kinds))
    return SamplingParams(
        max_tokens=data.draw(st.integers(1, 14)),
        temperature=0.0 if drawn in ("greedy", "least") else 1.0,
        seed=data.draw(st.integers(0, 2**64 - 1)),
        ignore_eos=data.draw(st.booleans()),
        stop_token_ids=frozenset(data.draw(st.sets(st.integers(1, VOCAB - 1), max_size=12))),
        top_k=data.draw(st.sampled_from((0, 1, 5, 40))) if drawn == "filtered" else 0,
        top_p=data.draw(st.sampled_from((1e-60, 0.3, 0.7, 1.0))) if drawn == "filtered" else 1.0,
        min_p=data.draw(st.sampled_from((0.0, 0.1, 1.0))) if drawn == "filtered" else 0.0,
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
    if victim is not None and arrivals[victim] > moment:
        victim = None
    while not engine.idle or any(arrival >= step for arrival in arrivals.values()):
        for i, submit in enumerate(submits):
            if arrivals[i] == step:
                engine.submit(submit)
        if step == moment and victim is not None:
            engine.abort(f"r{victim}")
        engine.scheduler.check()
        for output in engine.step().outputs:
            assert output.finish_reason != "error", output.error
            assert output.request_id != f"r{victim}" or step < moment
            answers[output.request_id, output.index] += output.token_ids
        engine.scheduler.check()
        step += 1
    for key, tokens in expected.items():
        if key[0] == f"r{victim}":
            assert tokens[: len(answers[key])] == answers[key]
        else:
            assert answers[key] == tokens
    assert engine.stats().blocks_used == 0 and not engine._requests


GREEDY = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)


def test_decode_steps_are_launched_before_the_last_ones_are_read(folders: dict[str, str]) -> None:
    engine = device_engine(folders["llama"])
    outputs = outputs_of(engine, [Submit(f"r{i}", prompt_of(i, 5), GREEDY) for i in range(3)])
    assert all(len(tokens_of(told)) == 10 for told in outputs.values())
    # the prompt gives the first token, the second step is launched when asked for, and eight ahead
    assert engine.launched_ahead == 8


def test_filters_are_the_devices_own(folders: dict[str, str]) -> None:
    engine = device_engine(folders["llama"])
    chosen = SamplingParams(max_tokens=10, ignore_eos=True, seed=3, top_k=20, top_p=0.9, min_p=0.01)
    outputs_of(engine, [Submit(f"r{i}", prompt_of(i, 5), chosen) for i in range(3)])
    assert engine.launched_ahead == 8


def test_whoever_ends_in_flight_leaves_nothing_behind(folders: dict[str, str], eager: dict[str, Engine]) -> None:
    answer = drive(eager["llama"], [prompt_of(1, 12)], max_tokens=10)[0]
    stop = next(token for i, token in enumerate(answer) if i >= 4 and token not in answer[:i])
    engine = device_engine(folders["llama"], max_num_seqs=1)
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True, stop_token_ids=frozenset({stop}))
    outputs = outputs_of(engine, [Submit("a", prompt_of(1, 12), params), Submit("b", prompt_of(1, 12), GREEDY)])
    assert tokens_of(outputs["a", 0]) == answer[: answer.index(stop) + 1]
    assert outputs["a", 0][-1].finish_reason == "stop"
    # computed in the row and blocks that the step in flight still wrote to
    assert tokens_of(outputs["b", 0]) == answer
    assert engine.stats().blocks_used == 0


def test_an_abort_in_flight_frees_at_once_and_disturbs_nobody(
    folders: dict[str, str], eager: dict[str, Engine]
) -> None:
    expected = drive(eager["qwen3"], [prompt_of(i, 14) for i in range(3)], max_tokens=10)
    engine = device_engine(folders["qwen3"], blocks=13, max_num_seqs=3)
    for i in range(2):
        engine.submit(Submit(f"r{i}", prompt_of(i, 14), GREEDY))
    answers: dict[str, list[int]] = {}
    for _ in range(3):
        for output in engine.step().outputs:
            answers.setdefault(output.request_id, []).extend(output.token_ids)
    assert engine._flight is not None
    used = engine.pool.used
    engine.abort("r0")
    assert engine.pool.used < used
    told = len(answers["r0"])
    engine.submit(Submit("r2", prompt_of(2, 14), GREEDY))
    while not engine.idle:
        for output in engine.step().outputs:
            answers.setdefault(output.request_id, []).extend(output.token_ids)
        engine.scheduler.check()
    assert [answers["r1"], answers["r2"]] == expected[1:] and answers["r0"] == expected[0][:told]


def test_an_engine_whose_last_sequence_is_aborted_in_flight_is_idle(folders: dict[str, str]) -> None:
    engine = device_engine(folders["llama"])
    engine.submit(Submit("a", prompt_of(1, 9), GREEDY))
    engine.step(), engine.step()
    engine.abort("a")
    assert engine.idle and engine.step().outputs == ()
    engine.scheduler.check()
    assert len(tokens_of(outputs_of(engine, [Submit("b", prompt_of(1, 9), GREEDY)])["b", 0])) == 10


def test_a_step_that_fails_in_flight_ends_its_requests_and_no_others(
    folders: dict[str, str], eager: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = drive(eager["llama"], [prompt_of(1, 10)], max_tokens=10)[0]
    engine = device_engine(folders["llama"])
    with monkeypatch.context() as broken:
        engine.submit(Submit("doomed", prompt_of(1, 10), GREEDY))
        engine.step(), engine.step()
        broken.setattr(engine.runner.steps, "launch", lambda *arguments: 1 / 0)
        (told,) = engine.step().outputs  # of the step in flight, which did not fail
        failed = engine.step().outputs
    assert told.finish_reason is None and list(told.token_ids) == expected[2:3]
    assert [o.finish_reason for o in failed] == ["error"] and "division by zero" in str(failed[0].error)
    engine.scheduler.check()
    assert tokens_of(outputs_of(engine, [Submit("after", prompt_of(1, 10), GREEDY)])["after", 0]) == expected


def test_traced_and_scored_sequences_are_computed_eagerly(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = device_engine(folders["llama"])
    monkeypatch.setattr(engine.runner, "launch", lambda works: pytest.fail("a decode step was launched"))
    traced = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, trace=True)
    assert len(tokens_of(outputs_of(engine, [Submit("a", prompt_of(1, 6), traced)])["a", 0])) == 4
    scored = SamplingParams(max_tokens=0, temperature=0, logprobs=1, prompt_logprobs=True)
    (told,) = outputs_of(engine, [Submit("b", prompt_of(1, 1), scored)])["b", 0]
    assert told.prompt_logprobs == (None,)


def test_who_biases_logits_is_sampled_on_the_host_beside_others(folders: dict[str, str]) -> None:
    engine = device_engine(folders["llama"])
    biased = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logit_bias=((17, 1e4),))
    together = outputs_of(engine, [Submit("a", prompt_of(1, 6), biased), Submit("b", prompt_of(2, 6), GREEDY)])
    assert tokens_of(together["a", 0]) == [17] * 6
    assert tokens_of(together["b", 0]) == drive(device_engine(folders["llama"]), [prompt_of(2, 6)], max_tokens=10)[0]
    assert engine.launched_ahead == 3  # of b alone, once a has ended


def test_a_row_taken_over_is_not_taken_for_the_one_before(folders: dict[str, str], eager: dict[str, Engine]) -> None:
    engine = device_engine(folders["llama"], max_num_seqs=1, prefix_cache="off")
    for length in range(9, 22):  # one of these goes on at the very position where the row's last sequence stopped
        first = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
        outputs_of(engine, [Submit("before", prompt_of(1, 9), first)])
        prompt = prompt_of(2, length)
        assert drive(engine, [prompt], max_tokens=4) == drive(eager["llama"], [prompt], max_tokens=4)


def test_steps_are_launched_ahead_while_others_wait_for_blocks(folders: dict[str, str]) -> None:
    engine = device_engine(folders["llama"], blocks=13, prefix_cache="off")
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    for i in range(3):
        engine.submit(Submit(f"r{i}", prompt_of(i, 50), params))
    ahead = 0
    while not engine.idle:
        before = engine.launched_ahead
        engine.step()
        ahead += engine.launched_ahead > before and bool(engine.scheduler.waiting)
    assert ahead > 20


def test_who_comes_while_a_step_is_in_flight_is_admitted_after_it(folders: dict[str, str]) -> None:
    engine = device_engine(folders["llama"])
    params = SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)
    engine.submit(Submit("a", prompt_of(1, 9), params))
    for _ in range(4):
        engine.step()
    assert engine._flight is not None
    engine.submit(Submit("b", prompt_of(2, 9), params))
    told = [output.request_id for _ in range(2) for output in engine.step().outputs]
    assert told == ["a", "a", "b"]
