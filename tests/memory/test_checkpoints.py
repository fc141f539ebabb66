"""The memory of a Qwen or DeepSeek checkpoint folder, served in place or taken out as a pack.

The reference is transformers' Llama in float64 with transformers' own PLE layer, or the V4.1 formula, in front of a
block. Checkpoints of one residual stream, because the backbones have one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

from server.commands.inspect import summary
from server.commands.pack import pack
from server.errors import PackError
from server.memory.checkpoints import dequantised
from tests.engines import engine_on, logits_of

HIDDEN, VOCAB, EOS, LAYER = 64, 49152, 17, 1
# fp32 against float64 through four layers, as in test_memory; logits reach 60.
TOLERANCE = 1e-3
Add = Callable[[torch.Tensor, list[int]], torch.Tensor]


@contextmanager
def added(model: Any, layer: int, ids: list[int], add: Add) -> Iterator[None]:
    """Within the block, `add(hidden[T, H], ids)` joins the residual stream in front of the block."""
    block = model.model.layers[layer]
    handle = block.register_forward_pre_hook(lambda module, args: (args[0] + add(args[0][0], ids)[None], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def reference(model: Any, prompt: tuple[int, ...], add: Add) -> torch.Tensor:
    with torch.no_grad(), added(model, LAYER, list(prompt), add):
        logits: torch.Tensor = model(torch.tensor([prompt])).logits[0]
    return logits


def write(folder: Path, config: dict[str, Any], *files: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for number, tensors in enumerate(files):
        save_file(tensors, folder / f"model-{number:05}.safetensors")
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Add]:
    """A multimodal folder: text_config inside, table in three shards over two files, other tensors beside."""
    torch.manual_seed(3)
    config = Qwen4ExpTextConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        hc_count=2,
        num_hidden_layers=4,
        ple_layer_ids=[LAYER + 1],
        ple_embed_dim=48,
        heads_per_ngram=3,
        ngram_vocab_size_base=301,
        make_ngram_vocab_size_divisible_by=12,
        eos_token_id=EOS,
    )
    config.hc_count = 1  # which its own check would not have
    layer = Qwen4ExpTextPLELayer(config, LAYER, 0).eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(0, 0.3 if "norm" in name else 2 / math.sqrt(parameter[0].numel()))
        layer.ple_embedding.ngram_embedding.weight.normal_()
    prefix = f"model.language_model.layers.{LAYER}.ple."
    state = layer.state_dict()
    table = state["ple_embedding.ngram_embedding.weight"]
    parts = {f"{prefix}ple_embedding.ngram_embedding.shard_{i}.weight": t.clone() for i, t in enumerate(table.chunk(3))}
    small = {prefix + name: t for name, t in state.items() if not name.startswith("ple_embedding.")}
    draft = {f"mtp.layers.{LAYER}.ple.key_proj.weight": torch.full((3, 3), float("nan"))}
    first, *others = parts.items()
    folder = tmp_path_factory.mktemp("qwen") / "checkpoint"
    content = {"model_type": "qwen4_exp", "text_config": config.to_dict() | {"eos_token_id": EOS}}
    write(folder, content, {first[0]: first[1], **draft}, {**dict(others), **small})
    exact = layer.double()
    return folder, lambda hidden, ids: exact(hidden[None], torch.tensor([ids]), None)[0]


def block_scaled(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float8 values and e8m0 scales for blocks of `block` by `block`, and so that the blocks differ."""
    rows, columns = -(-weight.shape[0] // block), -(-weight.shape[1] // block)
    exponents = torch.randint(-3, 3, (rows, columns))
    whole = exponents.repeat_interleave(block, 0).repeat_interleave(block, 1)[: weight.shape[0], : weight.shape[1]]
    return (weight / 2.0**whole).to(torch.float8_e4m3fn), (exponents + 127).to(torch.uint8)


@pytest.fixture(scope="module")
def deepseek(mapping: list[int], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Add]:
    """Table and wkv in float8 with e8m0 scales, as released: 32 values a scale, blocks of 32 by 32."""
    torch.manual_seed(4)
    primes = [sympy.prime(sympy.primepi(499) + 1 + i) for i in range(4)]
    values = torch.randn(sum(primes), 32).to(torch.float8_e4m3fn)
    exponents = torch.randint(125, 129, (sum(primes), 1), dtype=torch.uint8)
    wkv, blocks = block_scaled(torch.randn(2 * HIDDEN, 128) / 4, 32)
    query, key = (1 + 0.3 * torch.randn(1, HIDDEN)).bfloat16(), (1 + 0.3 * torch.randn(1, HIDDEN)).bfloat16()
    config = {
        "engram_layer_ids": [LAYER],
        "engram_max_ngram_size": 3,
        "engram_n_heads": 2,
        "engram_num_embeddings": [sum(primes)],
        "engram_vocab_size": 500,
        "engram_compressed_vocab_size": max(mapping) + 1,
        "engram_pad_token_id": 2,
        "engram_head_dim": 32,
        "hidden_size": HIDDEN,
        "hc_mult": 1,
        "vocab_size": VOCAB,
        "num_hidden_layers": 4,
        "rms_norm_eps": 1e-20,
    }
    prefix = f"layers.{LAYER}.engram."
    folder = tmp_path_factory.mktemp("deepseek") / "checkpoint"
    small = {"wkv.weight": wkv, "wkv.scale": blocks.view(torch.float8_e8m0fnu), "q_weight": query, "k_weight": key}
    write(
        folder,
        config,
        {prefix + "embed.weight": values, prefix + "embed.scale": exponents.view(torch.float8_e8m0fnu)},
        {prefix + name: tensor for name, tensor in small.items()},
    )
    table = values.double() * 2.0 ** (exponents.double() - 127)
    whole = blocks.repeat_interleave(32, 0).repeat_interleave(32, 1)
    weight = wkv.double() * 2.0 ** (whole.double() - 127)
    return folder, deepseek_formula(mapping, primes, table, weight, query.double()[0], key.double()[0])


def deepseek_formula(
    mapping: list[int],
    primes: list[int],
    table: torch.Tensor,
    weight: torch.Tensor,
    query: torch.Tensor,
    key_weight: torch.Tensor,
) -> Add:
    """Hash and gate by the words of the released rule, a token at a time, in float64."""
    import numpy as np

    half = max(1, (2**63 - 1) // (max(mapping) + 1) // 2)
    drawn = np.random.default_rng(10007 * LAYER).integers(0, half, size=3, dtype=np.int64)
    multipliers = [2 * int(r) + 1 for r in drawn]

    def add(hidden: torch.Tensor, ids: list[int]) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        small, pad = [mapping[i] for i in ids], mapping[2]
        for t, h in enumerate(hidden):
            looked = [small[t - back] if t >= back else pad for back in range(3)]
            rows, start = [], 0
            for head, prime in enumerate(primes):
                mix = 0
                for back in range(2 + head // 2):
                    mix ^= looked[back] * multipliers[back]
                rows.append(mix % prime + start)
                start += prime
            k, value = (weight @ table[rows].flatten()).split(HIDDEN)
            score = float((h * query * k * key_weight).sum()) / math.sqrt(HIDDEN)
            score /= math.sqrt(float((h * h).mean()) + 1e-20) * math.sqrt(float((k * k).mean()) + 1e-20)
            root = math.sqrt(max(abs(score), 1e-6)) * (-1 if score < 0 else 1)
            out[t] = value / (1 + math.exp(-root))
        return out

    return add


@pytest.fixture(scope="module")
def told(prompt: tuple[int, ...]) -> tuple[int, ...]:
    """Text with ends of text inside."""
    return (*prompt[:11], EOS, EOS, *prompt[13:30], EOS, *prompt[31:48])


@pytest.mark.parametrize("family", ["qwen", "deepseek"])
@pytest.mark.parametrize("budget", [512, 7])
def test_a_checkpoint_folder_serves_in_place(
    tiny_llama_folder: Path,
    backbone: Any,
    told: tuple[int, ...],
    request: pytest.FixtureRequest,
    family: str,
    budget: int,
) -> None:
    folder, add = request.getfixturevalue(family)
    engine = engine_on(str(tiny_llama_folder), memory=(f"m={folder}",), max_num_batched_tokens=budget)
    expected = reference(backbone, told, add)
    assert torch.allclose(logits_of(engine, told, ("m",)).double(), expected, atol=TOLERANCE)
    assert (expected - backbone(torch.tensor([told])).logits[0]).abs().max() > 1


@pytest.mark.parametrize("family", ["qwen", "deepseek"])
@pytest.mark.parametrize("layout", ["packed", "apart"])
def test_the_memory_taken_out_gives_the_same_logits(
    tiny_llama_folder: Path,
    told: tuple[int, ...],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    family: str,
    layout: str,
) -> None:
    folder, _ = request.getfixturevalue(family)
    out = pack(source=folder, out=tmp_path / "out", layout=layout)
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md",
        "config.json",
        "modules.safetensors",
        f"table-{LAYER}.safetensors",
    ]
    found = [
        logits_of(engine_on(str(tiny_llama_folder), memory=(f"m={place}",)), told, ("m",)) for place in (folder, out)
    ]
    assert torch.equal(*found)  # same rows, same modules, same sums
    told_by = summary(out)
    assert (told_by["family"], told_by["layers"], told_by["heads"]) == ("engram", [LAYER], 3 if family == "qwen" else 2)


def test_a_float8_matrix_comes_out_as_bfloat16(
    deepseek: tuple[Path, Add], tmp_path: Path, tiny_llama_folder: Path
) -> None:
    out = pack(source=deepseek[0], out=tmp_path / "out")
    wkv = load_file(out / "modules.safetensors")[f"layers.{LAYER}.wkv.weight"]
    stored = load_file(deepseek[0] / "model-00001.safetensors")
    values, scales = (stored[f"layers.{LAYER}.engram.wkv.{kind}"] for kind in ("weight", "scale"))
    assert wkv.dtype == torch.bfloat16
    for row, column in ((0, 0), (40, 100), (127, 31)):
        exponent = int(scales.view(torch.uint8)[row // 32, column // 32]) - 127
        assert float(wkv[row, column]) == float(values[row, column]) * 2.0**exponent  # 4 bits of mantissa fit


@pytest.mark.parametrize("block", [32, 64, 128])
def test_the_scales_shape_tells_the_blocks(block: int) -> None:
    """Also where the last block is cut, and with float scales of one per block."""
    weight = torch.randn(200, 130)
    values, scales = block_scaled(weight, block)
    expected = values.float() * 2.0 ** (
        scales.float().repeat_interleave(block, 0).repeat_interleave(block, 1)[:200, :130] - 127
    )
    assert torch.equal(dequantised(values, scales, "w").float(), expected)
    assert torch.equal(dequantised(values, 2.0 ** (scales.float() - 127), "w").float(), expected)
    with pytest.raises(PackError, match=r"w is \[200, 130\] and its scales are \[3, 9\]"):
        dequantised(values, torch.ones(3, 9), "w")


def change(folder: Path, out: Path, **values: Any) -> Path:
    """The folder with another config, its weights linked."""
    content = json.loads((folder / "config.json").read_text())
    inner = content.get("text_config", content)
    inner.update(values)
    out.mkdir()
    (out / "config.json").write_text(json.dumps(content))
    for file in folder.glob("*.safetensors"):
        (out / file.name).hardlink_to(file)
    return out


@pytest.mark.parametrize(
    ("family", "values", "words"),
    [
        ("qwen", {"hidden_size": 2560}, "hidden size of 2560 and the model has 64"),
        ("qwen", {"hc_count": 4}, "made for 4 residual streams and the model has 1"),
        ("qwen", {"vocab_size": 248320}, "vocabulary of 248320 and the model has 49152"),
        ("qwen", {"ngram_vocab_size_base": 401}, "holds 1920 rows of 8 values; config.json needs 2520 rows of 8"),
        ("qwen", {"ple_conv_kernel_size": 3}, r"conv1d.weight has shape \[64, 1, 4\] and config.json needs"),
        ("deepseek", {"hidden_size": 5120}, "hidden size of 5120 and the model has 64"),
        ("deepseek", {"engram_compressed_vocab_size": 99092}, "is 99092 and the tokenizer compresses to 32873"),
        ("deepseek", {"engram_num_embeddings": [2048]}, "is 2048; the primes from engram_vocab_size 500 sum to 2"),
        ("deepseek", {"hidden_size": None}, "config.json does not state the memory's hidden size"),
    ],
)
def test_a_checkpoint_for_another_model_is_refused_with_both_values(
    tiny_llama_folder: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    family: str,
    values: dict[str, Any],
    words: str,
) -> None:
    folder = change(request.getfixturevalue(family)[0], tmp_path / "changed", **values)
    with pytest.raises(PackError, match=words) as refusal:
        engine_on(str(tiny_llama_folder), memory=(f"m={folder}",))
    assert "\n" not in str(refusal.value)
