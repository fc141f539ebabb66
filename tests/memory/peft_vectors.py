"""Makes tests/data/engram-peft: a tiny Llama with its tokenizer, an adapter of engram-peft, and the library's logits.

    python tests/memory/peft_vectors.py FOLDER        needs engram-peft 1.2.7, peft, accelerate and jaxtyping

The library wants Python 3.12's `typing.override` and imports its trainers at once; both are stood in for.
"""

from __future__ import annotations

import sys
import types
import typing
from pathlib import Path
from typing import Any

import torch
import typing_extensions
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

IDS = (5, 9, 40, 41, 9, 5, 88, 120, 7, 7, 7, 63, 5, 9, 40, 19, 2, 77, 101, 88, 9, 5, 9, 128, 41, 60, 127)


def library() -> Any:
    typing.override = typing_extensions.override  # type: ignore[attr-defined]
    trainers = types.ModuleType("engram_peft.trl")
    trainers.create_engram_sft_trainer = trainers.prepare_engram_for_sft = None  # type: ignore[attr-defined]
    sys.modules["engram_peft.trl"] = trainers
    import engram_peft

    return engram_peft


def tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over lower and upper case, so that compression has something to join; two added tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["[UNK]", "[PAD]", "[EOS]", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    words += ["the", "The", "THE", "café", "cafe", "of", "Of", "capital", "Capital", "is"]
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.WordPiece()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")
    made.add_tokens(["<added>", "<Added>"])
    return made


def main(out: Path) -> None:
    peft = library()
    words = tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(words), num_key_value_heads=1, max_position_embeddings=64, **shape)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 2, 1
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    model.save_pretrained(out / "model")
    words.save_pretrained(out / "model")
    sizes = {"engram_vocab_size_per_ngram": [200, 270], "n_head_per_ngram": 2, "embedding_dim": 16}
    places = {"target_layers": [2, 1], "hc_mult": 2, "conv_kernel_size": 3, "conv_dilation": 2, "seed": 7}
    made = peft.get_engram_model(model, peft.EngramConfig(**sizes, **places, tokenizer_name_or_path=None), words)
    with torch.no_grad():
        for name, parameter in made.engram_layers.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.7)
        logits = made.eval()(input_ids=torch.tensor([IDS])).logits[0]
    made.save_pretrained(str(out / "adapter"))
    save_file({"ids": torch.tensor(IDS), "logits": logits.contiguous()}, out / "expected.safetensors")
    print(f"{out}: logits of {len(IDS)} tokens, {made.config.compressed_vocab_size} compressed ids")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
