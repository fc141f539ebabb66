"""However its tokens were scheduled, a sequence answers the same: alone, batched, chunked, after hits, preempted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import NotReady, QueueFull, RequestError
from server.runtime.engine import Engine
from server.runtime.messages import SamplingParams, Submit
from tests.engines import drive, engine_on, logits_of, outputs_of, tokens_of
from tests.tiny import VOCAB, save_tiny_llama

# fp32 sums of a batch may run in another order than alone; the design's tolerance for teacher-forced logits.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder)
    return str(folder)


@pytest.fixture(scope="module")
def alone(tiny: str) -> Engine:
    return engine_on(tiny, prefix_cache="off", max_model_len=96, block_size=8)


def small_engine(tiny: str, blocks: int, **flags: object) -> Engine:
    """An engine with at most `blocks` KV blocks of 8 tokens."""
    block_bytes = 8 * 3 * 2 * 2 * 16 * 4  # tokens, layers, keys and values, heads, head_dim, fp32
    return engine_on(tiny, block_size=8, max_model_len=96, kv_bytes=blocks * block_bytes, **flags)


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, VOCAB, (length,), generator=generator).tolist())


@settings(max_examples=25)
@given(st.data())
def test_any_schedule_gives_the_tokens_of_a_sequence_alone(tiny: str, alone: Engine, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=6))
    shared = data.draw(st.integers(0, 40))
    prompts = [(prompt_of(7, shared) + prompt_of(i, length))[:80] for i, length in enumerate(lengths)]
    expected = [drive(alone, [prompt], max_tokens=10)[0] for prompt in prompts]
    engine = small_engine(
        tiny,
        data.draw(st.integers(13, 40)),
        max_num_seqs=data.draw(st.integers(1, 6)),
        max_num_batched_tokens=data.draw(st.integers(1, 50)),
    )
    params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.submit(Submit(f"r{i}", prompt, params))
    victim = data.draw(st.sampled_from([*range(len(prompts)), None]))
    answers: dict[str, list[int]] = {f"r{i}": [] for i in range(len(prompts))}
    step = 0
    while not engine.idle:
        for output in engine.step().outputs:
            answers[output.request_id] += output.token_ids
        engine.scheduler.check()
        step += 1
        if step == 3 and victim is not None:
            engine.abort(f"r{victim}")
            engine.scheduler.check()
    for i, tokens in enumerate(expected):
        assert answers[f"r{i}"] == tokens or (i == victim and tokens[: len(answers[f"r{i}"])] == answers[f"r{i}"])
    assert engine.stats().blocks_used == 0 and not engine._requests


@pytest.mark.parametrize("budget", [1, 7, 8, 64])
def test_chunks_give_the_logits_of_the_whole(tiny: str, budget: int) -> None:
    prompt = prompt_of(3, 70)
    whole = logits_of(engine_on(tiny, max_num_batched_tokens=128), prompt)
    assert torch.allclose(logits_of(engine_on(tiny, max_num_batched_tokens=budget), prompt), whole, atol=TOLERANCE)


def test_decoding_one_by_one_gives_the_tokens_of_decoding_padded(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [prompt_of(i, length) for i, length in enumerate((3, 70, 20, 41))]
    padded = drive(engine_on(tiny, cpu_kernels="off"), prompts, max_tokens=12)
    monkeypatch.setattr("server.models.attention.sdpa.CALL_COST_TOKENS", 0)
    engine = engine_on(tiny, cpu_kernels="off")  # the kernels pad nothing
    groups: list[int] = []
    attention, plan = engine.runner.attention, engine.runner.attention.plan
    monkeypatch.setattr(attention, "plan", lambda batch: (plan(batch), groups.append(len(attention.plans[0].groups))))
    assert drive(engine, prompts, max_tokens=12) == padded
    assert max(groups) == 4  # the path was taken


def test_sampled_answers_survive_preemption(tiny: str) -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=5, ignore_eos=True, logprobs=2)
    submits = [Submit(f"r{i}", prompt_of(i, 30), params) for i in range(4)]
    calm = outputs_of(small_engine(tiny, 60), submits)
    engine = small_engine(tiny, 16)
    pressed = outputs_of(engine, submits)
    assert engine.stats().preemptions_total > 0
    for key, outputs in calm.items():
        assert tokens_of(outputs) == tokens_of(pressed[key])
        assert pressed[key][0].queued_s is not None and pressed[key][1].queued_s is None


def test_forks_share_the_prompt_and_differ_by_seed(tiny: str) -> None:
    engine = engine_on(tiny, block_size=8)
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=11, ignore_eos=True)
    prompt = prompt_of(1, 41)
    together = outputs_of(engine, [Submit("n", prompt, params, n=4)])
    assert {tuple(tokens_of(together["n", i])) for i in range(4)}.__len__() > 1
    assert [together["n", i][0].cached_tokens for i in range(4)] == [0, 40, 40, 40]
    for i in range(4):
        single = SamplingParams(max_tokens=8, temperature=1.0, seed=11 + i, ignore_eos=True)
        alone = outputs_of(engine_on(tiny), [Submit("x", prompt, single)])
        assert tokens_of(alone["x", 0]) == tokens_of(together["n", i])


def test_prompt_logprobs_are_those_of_the_whole_prompt(tiny: str) -> None:
    prompt = prompt_of(2, 50)
    engine = engine_on(tiny, max_num_batched_tokens=16)
    reference = torch.log_softmax(logits_of(engine, prompt).double(), -1)
    drive(engine, [prompt], max_tokens=1)  # the prefix is cached now, and must not be used for scoring
    params = SamplingParams(max_tokens=0, temperature=0, logprobs=1, prompt_logprobs=True)
    (output,) = outputs_of(engine, [Submit("score", prompt, params)])["score", 0]
    assert output.token_ids == () and output.finish_reason == "length"
    scored = output.prompt_logprobs
    assert scored is not None and len(scored) == 50 and scored[0] is None
    for position, entry in enumerate(scored[1:], start=1):
        assert entry is not None and entry.token_id == prompt[position]
        assert abs(entry.logprob - float(reference[position - 1, prompt[position]])) < TOLERANCE
        assert entry.top[0][0] == int(reference[position - 1].argmax())


def test_a_failed_step_ends_its_own_requests_and_no_others(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_on(tiny)
    expected = drive(engine_on(tiny), [prompt_of(1, 10)], max_tokens=5)[0]
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    run = engine.runner.run
    with monkeypatch.context() as broken:
        broken.setattr(engine.runner, "run", lambda works: 1 / 0)
        engine.submit(Submit("doomed", prompt_of(1, 10), params, n=2))
        failed = engine.step().outputs
    assert [o.finish_reason for o in failed] == ["error"] and "division by zero" in str(failed[0].error)
    assert engine.runner.run == run
    engine.scheduler.check()
    rest = outputs_of(engine, [Submit("after", prompt_of(1, 10), params)])
    assert tokens_of(rest["after", 0]) == expected
    assert tokens_of(rest["doomed", 1]) == expected  # the fork that waited computes the prompt itself


def test_bad_requests_are_refused_and_change_nothing(tiny: str) -> None:
    engine = engine_on(tiny, max_waiting=0, max_num_seqs=1)
    params = SamplingParams()
    cases = [
        (Submit("a", (), params), "empty"),
        (Submit("a", tuple([1] * 256), params), "256"),
        (Submit("a", (VOCAB,), params), "outside 0..198"),
        (Submit("a", (-1,), params), "outside"),
        (Submit("a", (1,), params, packs=("nope",)), "nope"),
    ]
    for submit, words in cases:
        with pytest.raises(RequestError, match=words):
            engine.submit(submit)
    assert engine.idle and not engine._requests
    engine.submit(Submit("a", (1,), params))
    with pytest.raises(QueueFull, match="--max-waiting"):
        engine.submit(Submit("b", (1,), params))
    engine.draining = True
    with pytest.raises(NotReady):
        engine.submit(Submit("c", (1,), params))


def test_the_context_bounds_the_answer(tiny: str) -> None:
    engine = engine_on(tiny, max_model_len=32)
    params = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
    outputs = outputs_of(engine, [Submit("a", prompt_of(0, 20), params)])["a", 0]
    assert len(tokens_of(outputs)) == 12 and outputs[-1].finish_reason == "length"
