"""The sampler keeps what its parameters say, draws with the right frequencies, and ignores the batch around a row."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.runtime.messages import SamplingParams
from server.runtime.sampler import SHORTLIST, sample
from server.runtime.sequence import Sequence
from server.view import BARE


def sequence(params: SamplingParams, tokens: tuple[int, ...] = (1,), prompt: int = 1, seed: int = 0) -> Sequence:
    made = Sequence.create("r", 0, tokens[:prompt], params, BARE, seed=seed, eos_ids=(0,), max_model_len=10_000)
    for token in tokens[prompt:]:
        made.append(token)
    return made


def draws(logits: torch.Tensor, params: SamplingParams, count: int) -> np.ndarray:
    rows = [sequence(params, seed=seed) for seed in range(count)]
    return np.array([s.token_id for s in sample(logits.repeat(count, 1), rows)])


def test_temperature_zero_takes_the_most_likely() -> None:
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    tokens = [s.token_id for s in sample(logits.clone(), [sequence(SamplingParams(temperature=0))] * 8)]
    assert tokens == logits.argmax(-1).tolist()


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    for temperature in (0.5, 1.0, 2.0):
        counts = np.bincount(draws(logits, SamplingParams(temperature=temperature), 20_000), minlength=5)
        expected = torch.softmax(logits.double() / temperature, -1).numpy() * 20_000
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert chi_square < 18.5  # 4 degrees of freedom, p = 0.001


def test_filters_keep_exactly_the_set_they_define() -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    logits = probabilities.log()
    cases = [
        (SamplingParams(top_k=2), {0, 1}),
        (SamplingParams(top_p=0.5), {0, 1}),
        (SamplingParams(top_p=0.39), {0}),
        (SamplingParams(top_p=0.86), {0, 1, 2, 3}),
        (SamplingParams(min_p=0.3), {0, 1, 2}),
        (SamplingParams(top_k=3, top_p=0.75), {0, 1}),  # of the mass that top_k leaves: 0.7 / 0.85 > 0.75
        (SamplingParams(top_k=1, temperature=5.0), {0}),
    ]
    for params, kept in cases:
        assert set(draws(logits, params, 3000)) == kept, params


def test_a_flat_distribution_is_filtered_beyond_the_shortlist() -> None:
    vocab = SHORTLIST * 4
    tokens = draws(torch.zeros(vocab), SamplingParams(top_p=0.75), 4000)
    assert SHORTLIST < len(set(tokens)) <= math.ceil(0.75 * vocab)


@given(st.integers(1, 6), st.integers(0, 2**63 - 1), st.sampled_from([(0, 1.0), (5, 1.0), (0, 0.8), (7, 0.9)]))
def test_a_row_is_drawn_alike_alone_and_in_a_batch(others: int, seed: int, filters: tuple[int, float]) -> None:
    generator = torch.Generator().manual_seed(seed % 1000)
    logits = torch.randn(others + 1, 300, generator=generator)
    params = SamplingParams(top_k=filters[0], top_p=filters[1])
    rows = [sequence(params, seed=seed)] + [sequence(SamplingParams(), seed=i) for i in range(others)]
    together = sample(logits.clone(), rows)[0]
    alone = sample(logits[:1].clone(), rows[:1])[0]
    assert together.token_id == alone.token_id


def test_penalties_count_what_vllm_counts() -> None:
    logits = torch.zeros(1, 6)
    params = SamplingParams(temperature=0, logprobs=6, presence_penalty=0.5, frequency_penalty=0.25)
    tokens = (1, 2, 3, 3, 4)
    adjusted = logits.clone()
    chosen = sample(adjusted, [sequence(params, tokens, prompt=2)])[0]
    assert torch.allclose(adjusted[0], torch.tensor([0, 0, 0, -1.0, -0.75, 0]))
    assert chosen.logprobs is not None and math.isclose(chosen.logprobs.logprob, -math.log(6), rel_tol=1e-6)
    adjusted = torch.tensor([[1.0, 2.0, -2.0, 4.0, 0.0, 1.0]])
    sample(adjusted, [sequence(SamplingParams(temperature=0, repetition_penalty=2.0), tokens, prompt=2)])
    assert adjusted.tolist() == [[1.0, 1.0, -4.0, 2.0, 0.0, 1.0]]


def test_min_tokens_forbids_the_end_and_bias_moves_it() -> None:
    logits = torch.tensor([[9.0, 1.0, 0.0]])
    assert sample(logits.clone(), [sequence(SamplingParams(temperature=0, min_tokens=2))])[0].token_id == 1
    assert sample(logits.clone(), [sequence(SamplingParams(temperature=0, min_tokens=0))])[0].token_id == 0
    biased = SamplingParams(temperature=0, logit_bias=((2, 100.0),))
    assert sample(logits.clone(), [sequence(biased)])[0].token_id == 2


def test_logprobs_are_the_models_own_and_ranked() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    rows = [sequence(SamplingParams(temperature=t, logprobs=k), seed=4) for t, k in ((0, 0), (1.0, 3), (0, 5))]
    reference = torch.log_softmax(logits.double(), -1)
    for i, sampled in enumerate(sample(logits.clone(), rows)):
        own = sampled.logprobs
        assert own is not None
        assert math.isclose(own.logprob, float(reference[i, sampled.token_id]), abs_tol=1e-5)  # fp32 log-softmax
        assert own.rank == int((reference[i] > reference[i, sampled.token_id]).sum()) + 1
        assert [t for t, _ in own.top] == reference[i].argsort(descending=True)[: rows[i].params.logprobs].tolist()
