"""The C kernels against formulas in float64. Skipped where there is no compiler: nobody calls them there.

Tolerances: fp32 sums of a few hundred terms and an exponential of 2e-7, 2e-5; bf16 results are rounded to 8 bits once,
2^-8 of the value.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kernels.cpu.build import NoKernels, library
from kernels.cpu.ops import CpuKernels, EngramLayer, Shape, Step
from tests.kernels.test_paged_attention import BLOCK_SIZE, attention64, paged

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-8}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    try:
        return CpuKernels(library(), request.param)
    except NoKernels as reason:
        pytest.skip(str(reason))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_norm_reads_the_stream_after_the_addition(kernels: CpuKernels, tokens: int, added: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    stream, weight = torch.randn(tokens, 96, generator=generator) * 3, torch.randn(96, generator=generator)
    delta = torch.randn(tokens, 96, generator=generator).to(kernels.dtype)
    total = stream.double() + delta.double() if added else stream.double()
    expected = total / (total.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    out = kernels.norm(stream, weight, 1e-5, delta if added else None)
    assert out.dtype == kernels.dtype
    close(out, expected)
    torch.testing.assert_close(stream.double(), total, atol=1e-6, rtol=1e-6)  # one fp32 addition


def test_pairs_turn_and_what_stands_beside_the_heads_stays(kernels: CpuKernels) -> None:
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(4, 5 * 32, generator=generator).to(kernels.dtype)
    heads, untouched = wide[:, :96].view(4, 3, 32), wide[:, 96:].clone()
    angle = torch.randn(4, 1, 16, generator=generator)
    rotation = torch.polar(torch.full_like(angle, 1.25), angle)
    pairs = torch.view_as_complex(heads.double().reshape(4, 3, 16, 2))
    expected = torch.view_as_real(pairs * rotation.to(torch.complex128)).flatten(-2)
    kernels.rotate_(heads, rotation)
    close(heads, expected)
    assert torch.equal(wide[:, 96:], untouched)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("tokens", [1, 600])  # from some size on, several threads
def test_gate_and_up_meet_from_either_half_of_one_matrix(kernels: CpuKernels, tokens: int, activation: str) -> None:
    both = (torch.randn(tokens, 2 * 96, generator=torch.Generator().manual_seed(2)) * 4).to(kernels.dtype)
    both[0, :6] = torch.tensor([-300.0, -90.0, -20.0, 0.0, 90.0, 300.0])  # beyond what an exponential holds
    gate, up = both.chunk(2, dim=-1)
    wide = gate.double()
    inner = wide if activation == "silu" else 2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    close(kernels.gated(gate, up, activation), wide * torch.sigmoid(inner) * up.double())


@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize(
    ("lengths", "threads"), [([1, 2, 63, 64, 65, 130], 1), ([1300], 2), ([600, 3], 2)],
    ids=["many", "one, split", "two, one of them split"],
)  # fmt: skip
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (7, 1, 32), (5, 5, 128), (12, 2, 96)])
def test_decode_reads_its_own_pages_alone(
    kernels: CpuKernels, heads: int, kv_heads: int, width: int, lengths: list[int], window: int, threads: int
) -> None:
    cache, table, contents = paged(lengths, kv_heads, width, kernels.dtype)
    last = torch.tensor([n - 1 for n in lengths])
    slots = table[torch.arange(len(lengths)), last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE
    query = torch.randn(len(lengths), heads, width, generator=torch.Generator().manual_seed(3)).to(kernels.dtype)
    newest = torch.stack([kv[-1] for kv in contents]).to(kernels.dtype).view(len(lengths), -1)
    cache.view(-1, cache.shape[-1])[slots] = math.nan  # the call itself has to write them
    qkv = torch.cat([query.view(len(lengths), -1), newest], dim=1)
    step = Step(slots, table.numpy(), np.array(lengths))
    shape = Shape(heads, kv_heads, width, BLOCK_SIZE, window, width**-0.5, threads)
    out = torch.full((len(lengths), heads * width), math.nan, dtype=kernels.dtype)
    kernels.attend(shape, step, qkv, cache, out)
    close(out.view(-1, heads, width), attention64(query, contents, [1] * len(lengths), window))


def test_tokens_that_do_not_decode_are_stored_and_not_attended(kernels: CpuKernels) -> None:
    cache = torch.zeros(3, BLOCK_SIZE, 2 * 32, dtype=kernels.dtype)
    qkv = torch.randn(4, 3 * 32, generator=torch.Generator().manual_seed(4)).to(kernels.dtype)
    out = torch.full((4, 32), 7.0, dtype=kernels.dtype)
    slots = torch.tensor([8, 17, 18, 19])
    step = Step(slots, np.array([[1]]), np.array([1]))
    kernels.attend(Shape(1, 1, 32, BLOCK_SIZE, 0, 1.0, 1), step, qkv, cache, out)
    assert torch.equal(cache.view(-1, 64)[slots], qkv[:, 32:])
    assert torch.equal(out[0], qkv[0, 64:])  # one key: its value
    assert out[1:].eq(7.0).all()


def test_widths_that_do_not_divide_into_vectors_are_refused(kernels: CpuKernels) -> None:
    assert kernels.serves(64, 576, 1536)
    assert not kernels.serves(20, 60)
    assert not kernels.serves(512, 576)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("tokens", "branches"), [(1, 1), (7, 1), (5, 2), (700, 1)])
def test_a_memory_layer_is_the_papers_formulas(kernels: CpuKernels, tokens: int, branches: int, added: bool) -> None:
    """Token t's convolution reads t - 9, t - 6, t - 3 and t; slots are given from the back, slot 0 stays zero."""
    width, kernel, dilation, eps = 96, 4, 3, (1e-6, 1e-5, 1e-5)
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, wide = random(tokens, branches * width) * 4, random(tokens, (branches + 1) * width).to(kernels.dtype)
    hidden[0] = 0  # a score of exactly 0 opens the gate by half
    gain, conv_gain, conv = random(branches, width), random(branches, width), random(branches * width, kernel)
    total = random(tokens, branches * width)
    slots = torch.arange(tokens, 0, -1)
    back = torch.arange(kernel - 1, -1, -1)[:, None] * dilation
    position = torch.arange(tokens) - back
    taps = torch.where(position < 0, 0, slots[position.clamp_min(0)])
    inputs = torch.zeros(tokens + 1, branches * width, dtype=kernels.dtype)

    def normed(x: torch.Tensor, eps: float) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    wide64 = wide.double().view(tokens, branches + 1, width)
    key, value = wide64[:, :branches], wide64[:, branches:]
    query = hidden.double().view(tokens, branches, width)
    score = (normed(key, eps[0]) * normed(query, eps[1]) * gain.double()).sum(-1, keepdim=True) / math.sqrt(width)
    alpha = torch.sigmoid(score.sign() * score.abs().clamp_min(1e-6).sqrt())
    gated = alpha * value
    stored = (normed(gated, eps[2]) * conv_gain.double()).flatten(1)
    layer = EngramLayer(gain, conv_gain, conv, *eps)
    out = kernels.engram(layer, hidden, wide, inputs, slots, taps, total if added else None)
    close(inputs[slots], stored)
    read = inputs.double()[taps]  # what was rounded is what is read
    mixed = torch.nn.functional.silu(torch.einsum("ktw,wk->tw", read, conv.double()))
    expected = gated.flatten(1) + mixed + (total.double() if added else 0)
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)  # a gate near its root's steep zero
    assert not inputs[0].any()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(64, 32), (97, 576), (1024, 96)])
def test_plain_rows_times_few_tokens(kernels: CpuKernels, rows: int, width: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, width, generator=generator).div_(math.sqrt(width)).to(kernels.dtype)
    bias = torch.randn(rows, generator=generator).to(kernels.dtype) if biased else None
    x = torch.randn(kernels.few, width, generator=generator).to(kernels.dtype)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert kernels.multiplies(weight)
    whole = kernels.multiply(x, weight, bias)
    close(whole, expected)
    for tokens in range(1, kernels.few):  # a token's answer does not depend on who is beside it
        assert torch.equal(kernels.multiply(x[:tokens], weight, bias), whole[:tokens])


def test_weights_that_do_not_divide_into_vectors_are_not_multiplied(kernels: CpuKernels) -> None:
    assert not kernels.multiplies(torch.ones(8, 33, dtype=kernels.dtype))
    assert not kernels.multiplies(torch.ones(64, 8, dtype=kernels.dtype).T)
    assert not kernels.multiplies(torch.ones(8, 32, dtype=torch.float16))
