"""Integer weights: rounding within its bound, the same function at every batch size, refusals that say what to do."""

from pathlib import Path
from typing import Any

import pytest
import torch

from server.errors import SettingsError
from server.models.layers import Linear
from server.models.quantize import FEW, GROUP, QuantizedLinear
from server.runtime.load import load
from server.runtime.report import describe
from tests.engines import drive, engine_on, logits_of, settings_for
from tests.tiny import save_tiny_llama

PROMPT = tuple(range(1, 60))


def linear(rows: int = 48, columns: int = 96, dtype: torch.dtype = torch.float32, bias: bool = False) -> Linear:
    torch.manual_seed(0)
    made = Linear(columns, rows, bias=bias, dtype=dtype)
    made.weight.data.normal_(0, 0.1)
    if made.bias is not None:
        made.bias.data.normal_()
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_weight_moves_by_half_a_step_at_most(bits: str, dtype: torch.dtype) -> None:
    plain = linear(dtype=dtype)
    rounded = QuantizedLinear(plain, bits).many.weight.double()
    weight = plain.weight.double()
    if bits == "int8":
        step = (weight.abs().amax(1, keepdim=True) / 127).expand_as(weight)
    else:
        groups = weight.view(48, -1, GROUP)
        step = ((groups.amax(-1) - groups.amin(-1)) / 15)[..., None].expand_as(groups).reshape(weight.shape)
    # bf16 rounds the scales, the zeros and the values: each by 2^-9 of a magnitude of up to 8 steps (127 in int8)
    slack = 0.01 if dtype == torch.float32 else (0.75 if bits == "int8" else 0.15)
    assert ((rounded - weight).abs() <= (0.5 + slack) * step).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_few_tokens_and_many_are_multiplied_by_the_same_values(bits: str, bias: bool) -> None:
    quantised = QuantizedLinear(linear(bias=bias), bits)
    x = torch.randn(FEW[bits] + 3, 96)
    together = quantised(x)
    alone = torch.cat([quantised(x[i : i + 1]) for i in range(len(x))])
    # fp32 sums of 96 products in another order
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_quantised_model_stays_near_the_plain_one_in_prefill_and_decode(bits: str, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    plain, quantised = engine_on(str(tmp_path)), engine_on(str(tmp_path), quantize=bits)
    expected, found = logits_of(plain, PROMPT), logits_of(quantised, PROMPT)
    error = float((found - expected).norm() / expected.norm())
    # normal weights move by 0.6 % (int8) and 8 % (int4) of their spread; three layers of random maps amplify it
    assert 0 < error < (0.04 if bits == "int8" else 0.5)
    chunked = logits_of(engine_on(str(tmp_path), quantize=bits, max_num_batched_tokens=1), PROMPT)
    assert torch.allclose(chunked, found, atol=1e-3)  # fp32 sums in another order
    assert len(drive(quantised, [PROMPT], max_tokens=5)[0]) == 5


@pytest.mark.parametrize(
    ("changes", "flags", "words"),
    [
        ({"hidden_size": 60, "head_dim": 20, "num_attention_heads": 3, "num_key_value_heads": 1}, {}, ["60", "int8"]),
        ({}, {"device": "meta"}, ["meta", "--device cpu"]),
    ],
)
def test_what_cannot_be_quantised_says_what_to_use(
    changes: dict[str, Any], flags: dict[str, Any], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_llama(tmp_path, **changes)
    if flags:
        monkeypatch.setattr("server.runtime.load.choose_device", lambda settings: torch.device("meta"))
    with pytest.raises(SettingsError, match="--quantize is int4") as caught:
        load(settings_for(str(tmp_path), quantize="int4"))
    assert all(word in str(caught.value) for word in words)


def test_the_start_up_report_says_so(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    settings = settings_for(str(tmp_path), quantize="int8")
    assert "int8 for steps of up to" in dict(describe(load(settings), settings))["weights"]


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_a_range_are_what_they_were(bits: str, dtype: torch.dtype) -> None:
    """Of padding tokens: all zeros, or one value throughout."""
    weight = torch.zeros(32, 64, dtype=dtype)
    weight[1] = 0.01
    weight[2] = torch.linspace(-1, 1, 64)
    linear = Linear.of(weight, None)
    many = QuantizedLinear(linear, bits).many.weight
    torch.testing.assert_close(many[[0, 1]], weight[[0, 1]], atol=0, rtol=0.01)
    assert torch.isfinite(many).all()
