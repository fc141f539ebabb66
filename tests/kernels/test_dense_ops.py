"""Norm, rotary and sampling kernels against float64 formulas and the sampler's own noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels import gated_product, language, rms_norm, rotary, sampling
from server.runtime.philox import uniform


@pytest.mark.parametrize("implementation", [rms_norm.add_rms_norm, rms_norm.reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_reads_the_stream_after_the_addition(implementation, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    stream, delta = torch.randn(3, 70, generator=generator), torch.randn(3, 70, generator=generator).to(dtype)
    weight = torch.randn(70, generator=generator)
    total = stream.double() + delta.double()
    expected = total / (total.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    out = implementation(stream, delta, weight, 1e-5, dtype)
    torch.testing.assert_close(stream.double(), total, atol=1e-6, rtol=1e-6)  # one fp32 addition
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7  # rounded once; the interpreter cuts instead
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("implementation", [rotary.rotate_, rotary.reference])
def test_pairs_turn_by_the_angle_of_their_position(implementation) -> None:
    angle = torch.outer(torch.arange(50.0), 0.5 ** torch.arange(6.0))
    table = torch.polar(torch.full_like(angle, 1.25), angle)
    wide = torch.randn(4, 3 * 12 + 5, generator=torch.Generator().manual_seed(1))
    heads, positions = wide[:, :36].view(4, 3, 12), torch.tensor([0, 3, 49, 7])
    pairs = torch.view_as_complex(heads.double().reshape(4, 3, 6, 2))
    expected = torch.view_as_real(pairs * table.to(torch.complex128)[positions][:, None]).flatten(-2)
    untouched = wide[:, 36:].clone()
    implementation(heads, table, positions)
    torch.testing.assert_close(heads.double(), expected, atol=1e-5, rtol=1e-5)  # fp32 products
    assert torch.equal(wide[:, 36:], untouched)


@pytest.mark.parametrize("implementation", [rotary.rotate_, rotary.reference])
def test_heads_are_normed_by_their_own_gain_before_they_turn(implementation) -> None:
    generator = torch.Generator().manual_seed(1)
    angle = torch.outer(torch.arange(50.0), 0.5 ** torch.arange(6.0))
    table = torch.polar(torch.ones_like(angle), angle)
    wide, gain = torch.randn(4, 3 * 12 + 5, generator=generator), torch.randn(3, 12, generator=generator)
    heads, positions = wide[:, :36].view(4, 3, 12), torch.tensor([0, 3, 49, 7])
    normed = heads.double() / (heads.double().pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * gain.double()
    pairs = torch.view_as_complex(normed.reshape(4, 3, 6, 2))
    expected = torch.view_as_real(pairs * table.to(torch.complex128)[positions][:, None]).flatten(-2)
    implementation(heads, table, positions, gain, 0.1)
    torch.testing.assert_close(heads.double(), expected, atol=1e-5, rtol=1e-5)  # fp32 products


@pytest.mark.parametrize("implementation", [gated_product.gated_product, gated_product.reference])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_the_activation_of_the_first_half_times_the_second(
    implementation, activation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated_product, "BLOCK", 32)
    both = (3 * torch.randn(3, 140, generator=torch.Generator().manual_seed(0))).to(dtype)
    gate, up = both.double().chunk(2, -1)
    active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    out = implementation(both, activation)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7  # rounded once; the interpreter cuts instead
    torch.testing.assert_close(out.double(), active * up, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("implementation", [sampling.sample, sampling.reference])
def test_a_draw_is_where_the_mass_passes_the_noise_of_its_seed_and_position(
    implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "BLOCK", 64)
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(12, 150, generator=generator)
    logits[1, 20] = logits[1, 90] = 9.0  # equals: the first wins
    temperature = torch.tensor([0.0, 0.0] + [0.2, 0.7, 1.0, 1.5, 3.0] * 2)
    seeds = torch.randint(0, 2**62, (12,), generator=generator)
    positions = torch.randint(0, 2**40, (12,), generator=generator)
    noise = uniform(seeds.numpy().astype(np.uint64), positions.numpy().astype(np.uint64))
    expected = logits.argmax(-1)
    expected[1] = 20
    for row in range(2, 12):
        mass = torch.softmax(logits[row].double() / temperature[row].double(), -1).cumsum(0)
        assert (mass - noise[row]).abs().min() > 1e-6  # no rounding decides this draw
        expected[row] = int((mass > noise[row]).nonzero()[0])
    assert torch.equal(implementation(logits, temperature, seeds, positions), expected)


def kept_by(weights: list[float], top_k: int, top_p: float, min_p: float) -> tuple[set[int], float]:
    """What the filters' definition leaves of the weights, and how near its edges are to another choice."""
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[:top_k]
    total, best = sum(weights[i] for i in order), weights[order[0]]
    left = [i for i in order if weights[i] >= min_p * best]
    near = min(abs(weights[i] - min_p * best) for i in order)
    found, before = set(), 0.0
    for i in left:
        if top_p < 1:
            near = min(near, abs(before - top_p * total))
            if before >= top_p * total:
                break
        found.add(i)
        before += weights[i]
    return found, near


@pytest.mark.parametrize("implementation", [sampling.sample, sampling.reference])
@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "with equals"])
@pytest.mark.parametrize("room", [256, 2], ids=["listed", "whole"])
def test_a_filtered_draw_is_from_the_tokens_the_filters_leave(
    implementation, coarse: bool, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "BLOCK", 64)
    monkeypatch.setattr(sampling, "LIST", room)
    generator = torch.Generator().manual_seed(3)
    vocab = 150
    shares, leasts = (1e-9, 0.1, 0.5, 0.9, 0.999, 1.0), (0.0, 0.05, 0.5, 1.0)
    choices = [(k, p, m) for k in (1, 2, 7, 60, vocab) for p in shares for m in leasts]
    if implementation is sampling.sample and language.interpreting and room < 256:  # half a second a row
        choices = choices[coarse::7]
    logits = 2 * torch.randn(len(choices), vocab, generator=generator)
    if coarse:
        logits = (logits * 2).round() / 2
    logits[5, 3:] = -torch.inf
    logits[6] = 0.0
    temperature = torch.tensor([(0.3, 1.0, 2.5, 0.0)[i % 4] for i in range(len(choices))])
    seeds = torch.randint(0, 2**62, (len(choices),), generator=generator)
    positions = torch.randint(0, 2**40, (len(choices),), generator=generator)
    columns = list(zip(*choices, strict=True))
    filters = sampling.Filters(torch.tensor(columns[0]), torch.tensor(columns[1]), torch.tensor(columns[2]))
    found = implementation(logits, temperature, seeds, positions, filters)
    noise = uniform(seeds.numpy().astype(np.uint64), positions.numpy().astype(np.uint64))
    clear = 0
    for row, (top_k, _, _) in enumerate(choices):
        if temperature[row] == 0:
            assert found[row] == logits[row].argmax()
            continue
        weights = torch.softmax(logits[row].double() / temperature[row].double(), -1)
        kept, near = kept_by(weights.tolist(), top_k, float(filters.top_p[row]), float(filters.min_p[row]))
        mass = torch.where(torch.tensor([i in kept for i in range(vocab)]), weights, 0.0).cumsum(0)
        point = noise[row] * mass[-1]
        # Equals of fp32 weights may be apart by rounding in float64 and the other way round: 1e-6 decides nothing.
        if (near > 1e-6 or len(kept) == 1) and (mass - point).abs().min() > 1e-6:
            clear += 1
            assert int(found[row]) == int((mass > point).nonzero()[0]), choices[row]
    assert clear > 0.5 * len(choices)


def test_the_reference_noise_is_the_samplers() -> None:
    seeds, positions = [0, 1, 2**63 + 5], [0, 77, 2**35]
    expected = uniform(np.array(seeds, np.uint64), np.array(positions, np.uint64))
    assert [sampling.uniform(s, p) for s, p in zip(seeds, positions, strict=True)] == expected.tolist()
