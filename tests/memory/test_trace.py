"""Traced gates are those of an independent float64 implementation, however the tokens were scheduled, and cost the
others nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from server.memory.addressing import from_config, windows_of
from server.memory.deepseek import DeepSeekEngram
from server.memory.engram import Engram
from server.memory.layer import EngramShape, MemoryLayer
from server.memory.qwen_ple import QwenPLE
from server.memory.short_conv import ConvRead, ConvSlots
from server.runtime.engine import Engine
from server.runtime.messages import Gates, SamplingParams, Submit, TokenOutput
from tests.engines import drive, engine_on, outputs_of, tokens_of
from tests.memory.reference import ReferenceEngram, reference_logits

TRACED = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, trace=True)
# Gates lie in 0..1; fp32 against float64 through up to four layers.
TOLERANCE = 1e-4
BLOCK = 8


@pytest.fixture
def engine(tiny_llama_folder: Path, pack_a: Path, pack_b: Path) -> Callable[..., Engine]:
    def make(**flags: Any) -> Engine:
        memory = (f"a={pack_a}", f"b={pack_b}")
        return engine_on(str(tiny_llama_folder), memory=memory, block_size=BLOCK, **flags)

    return make


def gates_of(outputs: list[TokenOutput]) -> list[Gates]:
    return [gates for output in outputs for gates in output.gates]


def check(traced: list[Gates], references: dict[str, ReferenceEngram]) -> None:
    """Every position once, in order, with the gates that the references computed last."""
    assert [gates.position for gates in traced] == list(range(len(traced)))
    for position, gates in traced:
        expected = [(name, layer) for layer in (1, 3) for name in references]
        assert [(gate.memory, gate.layer) for gate in gates] == expected
        for gate in gates:
            assert abs(gate.gate - float(references[gate.memory].gates[gate.layer][position])) < TOLERANCE
            assert gate.ngram == min(position + 1, 3)


@pytest.mark.parametrize("flags", [{}, {"max_num_batched_tokens": 7}, {"prefetch": "off"}], ids=str)
def test_gates_of_prompt_and_answer_are_the_references(
    engine: Callable[..., Engine],
    backbone: Any,
    reference_a: ReferenceEngram,
    reference_b: ReferenceEngram,
    prompt: tuple[int, ...],
    flags: Any,
) -> None:
    made = engine(**flags)
    drive(made, [prompt], max_tokens=1)  # its prefix is cached now, and must not be used
    beside = [Submit("bare", prompt[:20], SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))]
    beside += [Submit("quiet", prompt[:30], SamplingParams(max_tokens=30, temperature=0, ignore_eos=True), ("b",))]
    collected = outputs_of(made, [*beside, Submit("t", prompt, TRACED, ("a", "b"))])
    answer = tokens_of(collected["t", 0])
    traced = gates_of(collected["t", 0])
    assert len(traced) == len(prompt) + len(answer) - 1  # the last token is never read
    reference_logits(backbone, [reference_a, reference_b], (*prompt, *answer[:-1]))
    check(traced, {"a": reference_a, "b": reference_b})
    assert not gates_of(collected["bare", 0]) and not gates_of(collected["quiet", 0])


def test_tracing_changes_no_token_and_survives_preemption(
    engine: Callable[..., Engine], backbone: Any, reference_a: ReferenceEngram, prompt: tuple[int, ...]
) -> None:
    plain, traced = (
        SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, trace=trace) for trace in (False, True)
    )
    calm = outputs_of(engine(), [Submit("t", prompt[:40], plain, ("a",))])["t", 0]
    token_bytes = 4 * (4 * 2 * 2 * 16 + 4 * 64)  # keys and values, and the convolutions' inputs, in fp32
    tight = engine(kv_bytes=20 * BLOCK * token_bytes, max_model_len=88)
    pressed = outputs_of(tight, [Submit(f"t{i}", prompt[:40], traced, ("a",)) for i in range(3)])
    assert tight.stats().preemptions_total > 0
    reference_logits(backbone, [reference_a], (*prompt[:40], *tokens_of(calm)[:-1]))
    for outputs in pressed.values():
        assert tokens_of(outputs) == tokens_of(calm)
        check(gates_of(outputs), {"a": reference_a})


def test_an_untraced_step_takes_no_gates(
    engine: Callable[..., Engine], prompt: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engram, "gates", lambda *args: pytest.fail("computed for nobody"))
    outputs_of(engine(), [Submit("t", prompt, SamplingParams(max_tokens=3), ("a", "b"))])


@pytest.mark.parametrize("form", [Engram, DeepSeekEngram, QwenPLE])
def test_every_form_tells_the_gate_its_forward_used(form: type[MemoryLayer]) -> None:
    """With a value of one everywhere, and a convolution of zero, a layer adds its gates themselves."""
    torch.manual_seed(0)
    layer = form(EngramShape(hidden_size=16, row_width=24, branches=3, kernel_size=2, dilation=2), torch.float32)
    hidden, rows = torch.randn(5, 3, 16), torch.randn(5, 24)
    rows[:, 0] = 1
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.zero_() if name.startswith("conv") and "norm" not in name else parameter.normal_()
            if name in ("key_value.weight", "wkv.weight", "value_proj.weight"):
                parameter[-16:] = 0
                parameter[-16:, 0] = 1
            if name == "key_value.bias":
                parameter[-16:] = 0
    slots = ConvSlots(10, layer.conv_width, torch.float32, torch.device("cpu")) if layer.has_conv else None
    read = ConvRead(torch.arange(1, 6), torch.zeros(2, 5, dtype=torch.int64)) if layer.has_conv else None
    with torch.no_grad():
        added, gates = layer(hidden, rows, slots, read), layer.gates(hidden, rows)
    assert torch.allclose(gates, added.mean((1, 2)), atol=1e-6)  # a mean of fp32 values in 0..1
    assert gates.std() > 0.01


def test_n_grams_end_at_boundaries_and_dead_tokens() -> None:
    from tests.memory.test_families import QWEN  # its end of text begins a new segment

    addresser = from_config(QWEN)
    eos = QWEN["eos_token_id"]
    windows, blocked = windows_of([5, 6, 7, eos, 8, 9], addresser.n, dead=[False, False, False, False, False, True])
    assert addresser.ngram_lengths(windows, blocked).tolist() == [1, 2, 3, 3, 1, 0]
    assert np.array_equal(windows[:, 0], [5, 6, 7, eos, 8, 9])


def test_costs_are_the_requests_own_rows_and_its_steps_waits(
    engine: Callable[..., Engine], prompt: tuple[int, ...]
) -> None:
    made = engine()
    timed = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, timings=True)
    plain = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    submits = [
        Submit("a", prompt, timed, ("a",)),
        Submit("bare", prompt, timed),
        Submit("quiet", prompt, plain, ("a",)),
    ]
    collected = outputs_of(made, submits)
    cost = collected["a", 0][-1].cost
    assert cost is not None and cost.rows == (90 + 4) * 8 * 2  # tokens read, rows of each, layers
    assert 0 <= cost.hits <= cost.rows and 0 <= cost.stall_s <= sum(c.stall_s for c in made.stats().memory)
    assert collected["bare", 0][-1].cost == (0.0, 0, 0.0)
    assert collected["quiet", 0][-1].cost is None
