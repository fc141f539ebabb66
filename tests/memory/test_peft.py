"""engram-peft's adapters serve as packs: logits equal the library's own full forward pass, stored in tests/data.

Its incremental decoding is no reference. `peft_vectors.py` made the stored files; where the library is installed they
are made anew and compared.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.commands.inspect import summary
from server.commands.pack import pack
from server.errors import PackError
from server.runtime.messages import SamplingParams, Submit
from tests.engines import engine_on, logits_of, outputs_of, tokens_of
from tests.memory.test_memory import ONE, last_logits

STORED = Path(__file__).parent.parent / "data" / "engram-peft"
# fp32 on both sides, sums in another order, four layers, two branches; logits reach 8.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def expected() -> tuple[tuple[int, ...], torch.Tensor]:
    stored = load_file(STORED / "expected.safetensors")
    return tuple(stored["ids"].tolist()), stored["logits"]


def opened(adapter: Path = STORED / "adapter", **flags: Any) -> Any:
    return engine_on(str(STORED / "model"), memory=(f"a={adapter}",), max_model_len=64, block_size=4, **flags)


@pytest.mark.parametrize("budget", [512, 5, 1])
def test_prefill_in_chunks_of_any_size_gives_the_librarys_logits(
    expected: tuple[tuple[int, ...], torch.Tensor], budget: int
) -> None:
    ids, logits = expected
    engine = opened(max_num_batched_tokens=budget, max_num_seqs=1)
    assert torch.allclose(logits_of(engine, ids, ("a",)), logits, atol=TOLERANCE)
    assert (logits_of(engine, ids) - logits).abs().max() > 1  # without the memory they are others


def test_a_prefix_hit_gives_the_librarys_logits(expected: tuple[tuple[int, ...], torch.Tensor]) -> None:
    ids, logits = expected
    engine = opened()
    outputs_of(engine, [Submit("first", ids[:16], ONE, ("a",))])
    found = last_logits(engine, Submit("second", ids[:19], ONE, ("a",)))
    assert engine.scheduler.prefix_hits >= 12
    assert torch.allclose(found, logits[18], atol=TOLERANCE)


def test_decoding_goes_on_as_a_prefill_of_all_tokens_does(expected: tuple[tuple[int, ...], torch.Tensor]) -> None:
    ids, _ = expected
    engine = opened()
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    answer = tokens_of(outputs_of(engine, [Submit("x", ids[:9], params, ("a",))])["x", 0])
    logits = logits_of(opened(), (*ids[:9], *answer), ("a",))[8:-1]
    gap = logits.max(-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert gap.max() < TOLERANCE


def test_an_adapter_written_as_a_pack_serves_the_same(
    expected: tuple[tuple[int, ...], torch.Tensor], tmp_path: Path
) -> None:
    ids, logits = expected
    out = pack(source=STORED / "adapter", out=tmp_path / "out")
    assert torch.allclose(logits_of(opened(out), ids, ("a",)), logits, atol=TOLERANCE)


def test_inspect_tells_an_adapter_by_its_own_words() -> None:
    found = summary(STORED / "adapter", verify=True)
    assert (found["family"], found["layers"], found["orders"], found["heads"]) == ("engram-peft", [1, 2], [2, 3], 2)
    assert (found["head_dim"], found["compressed_vocab_size"]) == (4, 70)


def lose_a_norm(folder: Path) -> None:
    weights = load_file(folder / "engram_adapters.safetensors")
    del weights["2.gating.norm_h.1.weight"]
    save_file(weights, folder / "engram_adapters.safetensors")


def unlike_norms(folder: Path) -> None:
    weights = load_file(folder / "engram_adapters.safetensors")
    weights["2.gating.norm_h.1.weight"] = torch.ones(3)
    save_file(weights, folder / "engram_adapters.safetensors")


def add_lora(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def only_a_pickle(folder: Path) -> None:
    (folder / "engram_adapters.safetensors").rename(folder / "engram_weights.pt")


def another_width(folder: Path) -> None:
    change(folder, hidden_size=32)


def another_tokenizer(folder: Path) -> None:
    change(folder, compressed_vocab_size=71)


def another_engine(folder: Path) -> None:
    change(folder, engine="qwen_ple")


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lose_a_norm, "lacks the tensor 2.gating.norm_h.1.weight"),
        (unlike_norms, "the tensors of layer 2 do not go together"),
        (add_lora, "LoRA weights beside the memory"),
        (only_a_pickle, "engram_weights.pt, which this server does not unpickle"),
        (another_width, "hidden size of 32 and the model has 24"),
        (another_tokenizer, "compressed_vocab_size is 71 and the tokenizer compresses to 70"),
        (another_engine, "engine is 'qwen_ple'"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(tmp_path: Path, harm: Callable[[Path], None], words: str) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(STORED / "adapter", adapter)
    harm(adapter)
    with pytest.raises(PackError, match=words):
        opened(adapter)


@pytest.mark.skipif(
    importlib.util.find_spec("engram_peft") is None,
    reason="engram-peft is not installed; the stored logits of its version 1.2.7 are compared above",
)
def test_the_stored_logits_are_the_installed_librarys(
    expected: tuple[tuple[int, ...], torch.Tensor], tmp_path: Path
) -> None:
    script = Path(__file__).parent / "peft_vectors.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, capture_output=True)
    assert torch.allclose(load_file(tmp_path / "expected.safetensors")["logits"], expected[1], atol=1e-5)  # same code
