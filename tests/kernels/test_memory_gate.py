"""Gate, short convolution and STEM kernels against the formulas in float64, outputs poisoned first.

Tolerance: inputs and outputs are rounded to their own type, sums run in fp32, so bf16 results may be one unit in the
last place (2^-8 relative) off and fp32 ones 1e-5.
"""

from __future__ import annotations

import math

import pytest
import torch

from kernels import memory_gate, short_conv, stem_rows
from kernels.memory_gate import GateWeights

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def alpha64(hidden, key, gain, zero_is_plus: bool) -> torch.Tensor:
    q, k = hidden.double(), key.double()
    score = (q * k * gain.double()).sum(-1) / math.sqrt(q.shape[-1])
    score = score / ((q.pow(2).mean(-1) + 1e-6).sqrt() * (k.pow(2).mean(-1) + 1e-6).sqrt())
    sign = torch.where(score < 0, -1.0, 1.0) if zero_is_plus else score.sign()
    return torch.sigmoid(sign * score.abs().clamp_min(1e-6).sqrt())


@pytest.mark.parametrize("implementation", [memory_gate.gate, memory_gate.reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_is_plus", [False, True])
def test_the_gate_adds_its_share_of_the_value(implementation, dtype: torch.dtype, zero_is_plus: bool) -> None:
    tokens, branches, width = 5, 2, 48
    hidden, wide = random(tokens, branches, width, dtype=dtype), random(tokens, 3 * width, dtype=dtype, seed=1)
    key, value = wide[:, : 2 * width].view(tokens, branches, width), wide[:, 2 * width :]
    key[3] = 0  # a score of exactly zero
    gain = random(branches, width, seed=2)
    dead = torch.tensor([False, True, False, False, False])
    alpha = alpha64(hidden, key, gain, zero_is_plus).masked_fill(dead[:, None], 0.0)
    expected = hidden.double() + alpha[..., None] * value.double()[:, None]
    got = implementation(hidden, key, value, GateWeights(gain, 1e-6, 1e-6, zero_is_plus=zero_is_plus), dead=dead)
    torch.testing.assert_close(got.double(), alpha, atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kernels", [(memory_gate.gate, short_conv.short_conv), (memory_gate.reference, short_conv.reference)]
)
def test_the_convolution_reads_its_inputs_back_from_the_slots(kernels, dtype: torch.dtype) -> None:
    gate, conv = kernels
    branches, width, taps, dilation, block_size = 2, 40, 4, 3, 4
    lengths = [13, 5]
    block_table = torch.tensor([[5, 2, 7, 1], [3, 6, 0, 0]])
    slots = torch.full(
        (8 * block_size, branches * width), math.nan, dtype=dtype
    )  # poisoned: unwritten ones are not read
    gain, conv_gain = random(branches, width, seed=3), random(branches, width, seed=4)
    weights = GateWeights(gain, 1e-6, 1e-6, conv_gain, 1e-5)
    weight = random(branches * width, taps, seed=5)
    hidden = random(sum(lengths), branches, width, dtype=dtype, seed=6)
    wide = random(sum(lengths), 3 * width, dtype=dtype, seed=7)
    key, value = wide[:, : 2 * width].view(-1, branches, width), wide[:, 2 * width :]
    positions = torch.cat([torch.arange(n) for n in lengths])
    sequence_of = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))
    at = block_table[sequence_of, positions // block_size] * block_size + positions % block_size

    alpha = alpha64(hidden, key, gain, False)
    gated = alpha[..., None] * value.double()[:, None]
    normed = gated * torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + 1e-5) * conv_gain.double()
    normed = normed.to(dtype).double().flatten(1)  # as it is stored
    expected = hidden.double() + gated
    for begin, length in zip((0, lengths[0]), lengths, strict=True):
        for t in range(length):
            total = torch.zeros(branches * width, dtype=torch.float64)
            for j in range(taps):
                read = t - (taps - 1 - j) * dilation
                if read >= 0:
                    total += weight[:, j].double() * normed[begin + read]
            expected[begin + t] += torch.nn.functional.silu(total).view(branches, width)

    got_alpha = gate(hidden, key, value, weights, slots, at)
    conv(hidden, got_alpha, value, weight, slots, block_table, sequence_of, positions, block_size, dilation)
    torch.testing.assert_close(hidden.double(), expected, atol=4 * TOLERANCE[dtype], rtol=4 * TOLERANCE[dtype])


@pytest.mark.parametrize(
    "kernels", [(memory_gate.gate, short_conv.short_conv), (memory_gate.reference, short_conv.reference)]
)
@pytest.mark.parametrize("with_conv", [False, True])
def test_nothing_is_written_for_a_dead_token_and_hidden_is_not_the_total(kernels, with_conv: bool) -> None:
    gate, conv = kernels
    tokens, width, block_size = 3, 24, 4
    hidden, wide = random(tokens, 1, width), random(tokens, 2 * width, seed=1)
    key, value = wide[:, :width].view(tokens, 1, width), wide[:, width:]
    value[1] = math.nan  # a dead token's rows are whatever stood there
    total = random(tokens, 1, width, seed=2)
    before, hidden_before, dead = total.clone(), hidden.clone(), torch.tensor([False, True, False])
    weights = GateWeights(random(1, width, seed=3), 1e-6, 1e-6, random(1, width, seed=4) if with_conv else None)
    if with_conv:
        slots, at = torch.full((16, width), 7.0), torch.tensor([4, 9, 12])
        block_table, positions = torch.tensor([[1], [2], [3]]), at % block_size
        alpha = gate(hidden, key, value, weights, slots, at, dead)
        assert torch.equal(total, before) and (slots[9] == 7).all() and (slots[4] != 7).any()
        conv(
            total, alpha, value, random(width, 4, seed=5), slots, block_table, torch.arange(tokens), positions,
            block_size, 3, dead,
        )  # fmt: skip
    else:
        gate(hidden, key, value, weights, dead=dead, total=total)
    assert torch.equal(hidden, hidden_before)
    assert torch.equal(total[1], before[1])
    assert (total[[0, 2]] != before[[0, 2]]).all() and total.isfinite().all()


@pytest.mark.parametrize("implementation", [stem_rows.gated_rows, stem_rows.reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stem_multiplies_the_gate_by_the_tokens_own_row(implementation, dtype: torch.dtype) -> None:
    gate, rows = random(6, 1500, dtype=dtype), random(3, 1500, dtype=dtype, seed=1)
    inverse = torch.tensor([2, 0, 0, 1, 2, 1])
    expected = torch.nn.functional.silu(gate.double()) * rows.double()[inverse]
    torch.testing.assert_close(
        implementation(gate, rows, inverse).double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )
