"""A tiny random Llama of transformers, saved as a folder: 199 tokens, three layers, no tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 199


def save_tiny_llama(folder: Path, **overrides: Any) -> LlamaForCausalLM:
    """Random weights large enough that different tokens give clearly different logits. Returns the fp32 model."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **overrides})).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.uniform_(-0.5, 1.5)
    model.save_pretrained(folder)
    return model
