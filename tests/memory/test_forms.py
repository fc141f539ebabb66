"""The released forms of an Engram layer, alone, over ragged batches, against transformers or a float64 formula."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

from server.batch import Batch
from server.memory.addressing import from_config, windows_of
from server.memory.attached import FORMS
from server.memory.deepseek import DeepSeekEngram
from server.memory.layer import EngramShape
from server.memory.qwen_ple import QwenPLE
from server.memory.short_conv import ConvRead, ConvSlots
from server.runtime.messages import Submit
from tests.engines import engine_on, logits_of, outputs_of
from tests.memory.test_memory import ONE, last_logits

# fp32 sums of at most 64 products in another order; values reach about 10.
TOLERANCE = 5e-5
BLOCK, BRANCHES, HIDDEN, EOS, VOCAB = 4, 4, 32, 7, 50
LENGTHS = (23, 1, 14)


def batch_of(pieces: list[tuple[int, int, int]]) -> Batch:
    """(sequence, start, stop) of every piece of the step. A sequence's blocks lie backwards and far apart."""
    positions = [position for _, start, stop in pieces for position in range(start, stop)]
    table = np.array([[100 - 9 * sequence - page for page in range(8)] for sequence, _, _ in pieces])
    counts = np.array([stop - start for _, start, stop in pieces])
    rows = np.repeat(np.arange(len(pieces)), counts)
    slots = table[rows, np.array(positions) // BLOCK] * BLOCK + np.array(positions) % BLOCK
    return Batch(
        token_ids=torch.zeros(len(positions), dtype=torch.int64),
        positions=torch.tensor(positions),
        slots=torch.from_numpy(slots),
        block_table=torch.from_numpy(table),
        host_blocks=table,
        query_start=np.concatenate([[0], np.cumsum(counts)]),
        context_len=np.array([stop for _, _, stop in pieces]),
        views=(),
        view_of=np.zeros(len(positions), np.int64),
        windows=np.zeros((len(positions), 1), np.int64),
        blocked=np.zeros((len(positions), 1), bool),
        sample_at=torch.zeros(0, dtype=torch.int64),
        block_size=BLOCK,
    )


def steps_of(kind: str) -> list[list[tuple[int, int, int]]]:
    """The whole ragged batch as steps: at once, in chunks of five that interleave, or token by token."""
    size = {"prefill": 100, "chunks": 5, "decode": 1}[kind]
    steps: list[list[tuple[int, int, int]]] = []
    for start in range(0, max(LENGTHS), size):
        pieces = [(i, start, min(start + size, n)) for i, n in enumerate(LENGTHS) if start < n]
        steps.append(pieces[::-1])
    return steps


@pytest.fixture(scope="module")
def ple() -> Any:
    """transformers' layer with random weights, small primes, hc = 4; its index among PLE layers is 1."""
    torch.manual_seed(0)
    config = Qwen4ExpTextConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        hc_count=BRANCHES,
        num_hidden_layers=8,
        ple_layer_ids=[2, 5],
        ple_embed_dim=64,
        ple_conv_kernel_size=4,
        ngram_size=3,
        heads_per_ngram=4,
        ngram_vocab_size_base=97,
        make_ngram_vocab_size_divisible_by=16,
        seed=1234,
        eos_token_id=EOS,
        rms_norm_eps=1e-6,
    )
    layer = Qwen4ExpTextPLELayer(config, 4, 1).eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(0, 0.3 if "norm" in name else 1.0 / math.sqrt(parameter[0].numel()))
        layer.ple_embedding.ngram_embedding.weight.normal_()
    return layer, config


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    """Ragged, with ends of text inside: at the very start, twice in a row, and last."""
    generator = np.random.default_rng(5)
    made = [generator.integers(0, VOCAB, length).tolist() for length in LENGTHS]
    made[0][0] = made[0][9] = made[0][10] = made[0][-1] = EOS
    made[2][5] = EOS
    return made


@pytest.mark.parametrize("kind", ["prefill", "chunks", "decode"])
@torch.no_grad()
def test_the_qwen_form_equals_transformers_layer(ple: Any, sequences: list[list[int]], kind: str) -> None:
    theirs, config = ple
    hidden = [torch.randn(n, BRANCHES * HIDDEN, generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    expected = [theirs(h[None], torch.tensor([ids]), None)[0] for h, ids in zip(hidden, sequences, strict=True)]
    addresser = from_config(config.to_dict())
    shape = EngramShape(HIDDEN, 64, BRANCHES, 4, 3, config.rms_norm_eps)
    ours = QwenPLE(shape, torch.float32).eval()
    state = {n: t for n, t in theirs.state_dict().items() if not n.startswith("ple_embedding.")}
    ours.load_state_dict(state)
    table = theirs.ple_embedding.ngram_embedding.weight
    assert addresser.rows_per_table[4] == len(table)
    rows = [table[torch.from_numpy(addresser.rows(4, *windows_of(ids, 3)))].flatten(1) for ids in sequences]
    slots = ConvSlots(101 * BLOCK, ours.conv_width, torch.float32, torch.device("cpu"))
    for pieces in steps_of(kind):
        at = ConvRead.of(batch_of(pieces), 4, 3)
        inputs = torch.cat([hidden[i][start:stop] for i, start, stop in pieces]).view(-1, BRANCHES, HIDDEN)
        found = ours(inputs, torch.cat([rows[i][start:stop] for i, start, stop in pieces]), slots, at).flatten(1)
        wanted = torch.cat([expected[i][start:stop] for i, start, stop in pieces])
        assert torch.allclose(found, wanted, atol=TOLERANCE)
    assert max(e.abs().max() for e in expected) > 1  # there is something to get wrong


def deepseek_formula(layer: DeepSeekEngram, hidden: torch.Tensor, rows: torch.Tensor, eps: float) -> torch.Tensor:
    """Token by token and branch by branch, in float64."""
    out = torch.zeros_like(hidden, dtype=torch.float64)
    weights = {name: parameter.double() for name, parameter in layer.named_parameters()}
    for t in range(len(hidden)):
        projected = (weights["wkv.weight"] @ rows[t].double()).view(BRANCHES + 1, HIDDEN)
        for c in range(BRANCHES):
            h, key = hidden[t, c].double(), projected[c]
            q = h / math.sqrt(float(h @ h) / HIDDEN + eps) * weights["q_weight"][c]
            k = key / math.sqrt(float(key @ key) / HIDDEN + eps) * weights["k_weight"][c]
            score = float(q @ k) / math.sqrt(HIDDEN)
            root = math.sqrt(max(abs(score), 1e-6)) * (-1 if score < 0 else 1)
            out[t, c] = projected[BRANCHES] / (1 + math.exp(-root))
    return out


@pytest.fixture(scope="module")
def deepseek() -> DeepSeekEngram:
    torch.manual_seed(1)
    layer = DeepSeekEngram(EngramShape(HIDDEN, 48, BRANCHES, norm_eps=1e-20), torch.float32).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_(1.0 if parameter.shape[0] == BRANCHES else 0.0, 0.4)
    return layer


def test_the_deepseek_form_equals_the_formula(deepseek: DeepSeekEngram) -> None:
    hidden, rows = torch.randn(9, BRANCHES, HIDDEN), torch.randn(9, 48)
    found = deepseek(hidden, rows, None, None)
    assert torch.allclose(found.double(), deepseek_formula(deepseek, hidden, rows, 1e-20), atol=TOLERANCE)
    assert deepseek.conv_bytes_per_token == 0


def test_a_dead_token_passes_through_untouched(deepseek: DeepSeekEngram) -> None:
    hidden, rows = torch.randn(5, BRANCHES, HIDDEN), torch.randn(5, 48)
    dead = torch.tensor([False, True, False, False, True])
    found = deepseek(hidden, rows, None, None, dead)
    assert found[dead].abs().max() == 0
    assert torch.equal(found[~dead], deepseek(hidden, rows, None, None)[~dead])


def test_a_score_of_exactly_zero_opens_the_deepseek_gate_by_a_thousandth(deepseek: DeepSeekEngram) -> None:
    query = torch.zeros(1, BRANCHES, HIDDEN)
    key = torch.ones(1, BRANCHES, HIDDEN)
    query[..., 0] = 1
    key[..., 0] = 0  # disjoint: every product is exactly zero
    gates = deepseek.gate(query, key)
    assert torch.allclose(gates.double(), torch.tensor(1 / (1 + math.exp(-1e-3))).double(), atol=1e-7)  # fp32's digits


@pytest.mark.parametrize("form", ["deepseek-v4.1", "qwen-ple"])
def test_a_pack_of_another_form_serves_in_chunks_as_at_once(
    tiny_llama_folder: Path, pack_a: Path, prompt: tuple[int, ...], tmp_path: Path, form: str
) -> None:
    """Through the engine, the paper's addresses with another consumer: at once, in chunks, and after a prefix hit."""
    pack = tmp_path / "pack"
    shutil.copytree(pack_a, pack)
    content = json.loads((pack / "config.json").read_text())
    (pack / "config.json").write_text(json.dumps({**content, "form": form}))
    generator = torch.Generator().manual_seed(3)
    shape = EngramShape(64, 2 * 4 * 16)
    parameters = FORMS[form](shape, torch.float32).named_parameters()
    modules = {
        f"layers.{layer}.{name}": torch.randn(value.shape, generator=generator)
        for name, value in list(parameters)
        for layer in (1, 3)
    }
    save_file(modules, pack / "modules.safetensors")
    made = [
        engine_on(str(tiny_llama_folder), memory=(f"a={pack}",), max_num_batched_tokens=budget) for budget in (512, 7)
    ]
    whole, chunked = (logits_of(engine, prompt, ("a",)) for engine in made)
    assert torch.allclose(whole, chunked, atol=1e-3)  # as in test_memory: logits of 60 in fp32, four layers
    assert (whole - logits_of(made[0], prompt)).abs().max() > 1
    outputs_of(made[0], [Submit("first", prompt[:64], ONE, ("a",))])
    after = last_logits(made[0], Submit("second", prompt[:70], ONE, ("a",)))
    assert made[0].scheduler.prefix_hits >= 64
    assert torch.allclose(after, whole[69], atol=1e-3)
