"""Tiny random decoders without files: what tests of a GPU can build where no loader's packages are installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from server.batch import Batch
from server.models.attention.base import AttentionBackend
from server.models.attention.kv_cache import KVCache
from server.models.config import ModelConfig
from server.models.decoder import Decoder
from server.view import BARE

BLOCK_SIZE = 8
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 0,
}
# name → its config.json beyond SHAPE
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "query_pre_attn_scalar": 32,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def random_decoder(
    kind: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **shape: int
) -> Decoder:
    """Weights large enough that different tokens give clearly different logits; the same at every call."""
    config = ModelConfig.from_hf({**SHAPE, **KINDS[kind], **shape})
    generator = torch.Generator().manual_seed(0)
    with torch.device(device):
        model = Decoder(config, config.max_position_embeddings, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(values if parameter.dim() > 1 and parameter.shape[0] > 8 else values + 1.0)
    return model.eval()


@torch.inference_mode()
def logits_of(model: Decoder, kind: type[Any], ids: list[int]) -> torch.Tensor:
    """[T, V]: all positions of one sequence, computed in one batch by a backend of this kind."""
    device = model.embed.device
    count = len(ids)
    blocks = 1 + np.arange(-(-count // BLOCK_SIZE))
    cache = KVCache(model.config, len(blocks) + 1, BLOCK_SIZE, model.dtype, device)
    attention: AttentionBackend = kind(model.config, cache)
    at = np.arange(count)
    batch = Batch(
        token_ids=torch.tensor(ids, device=device),
        positions=torch.from_numpy(at).to(device),
        slots=torch.from_numpy(at + BLOCK_SIZE).to(device),
        block_table=torch.from_numpy(blocks[None]).to(device),
        host_blocks=blocks[None],
        query_start=np.array([0, count]),
        context_len=np.array([count]),
        views=(BARE,),
        view_of=np.zeros(count, np.int64),
        windows=np.array(ids)[:, None],
        blocked=np.zeros((count, 1), np.bool_),
        sample_at=torch.zeros(0, dtype=torch.int64, device=device),
        block_size=BLOCK_SIZE,
    )
    return model.logits(model(batch, attention))


def chosen(model: Decoder, kind: type[Any], prompt: list[int], count: int) -> list[int]:
    """The greedy answer, every token by a pass over all before it."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_of(model, kind, ids)[-1].argmax()))
    return ids[len(prompt) :]
