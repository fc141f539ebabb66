"""Tokenizer: text to token ids and back, with Hugging Face's `tokenizers` underneath and without transformers.

Two ways to one: a folder's tokenizer.json, or a GGUF's vocabulary and merges put together as the original was.
Torch-free. It knows no chat format (`chat.py`) and no streaming (the detokeniser's work).
Splitting rules of byte-level BPE vocabularies: the published tokenizer.json of each model named in `PRE_TOKENIZERS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from server.errors import BrokenModel, UnknownModel, UnsupportedModel


class Tokenizer:
    """`backend` is the raw tokenizer; `special_ids` are dropped by `decode` unless asked for."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_token_ids: Sequence[int]) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        self.backend = backend
        self.eos_token_ids = tuple(eos_token_ids)
        added = backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)

    @property
    def vocab_size(self) -> int:
        """Tokens with a text, added ones among them; a model's embedding may have more rows."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text. Special tokens written out in it become their ids, as with transformers.

        Raises BrokenModel where the vocabulary lacks what the text needs, such as its own unknown token.
        """
        try:
            return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except (TypeError, ValueError):  # no text
            raise
        except Exception as error:  # the library raises plain Exception
            raise BrokenModel(f"the model's tokenizer cannot read this text: {error}") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that form no character become U+FFFD, ids beyond the vocabulary nothing."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token; None beyond the vocabulary."""
        return self.backend.id_to_token(token_id)


def backend_from_file(path: Path) -> tokenizers.Tokenizer:
    """A tokenizer.json. Raises UnknownModel without one, BrokenModel if it cannot be read."""
    if not path.is_file():
        raise UnknownModel(
            f"{path.parent} has no tokenizer.json; save one with transformers' AutoTokenizer(...).save_pretrained"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise BrokenModel(f"{path} is no readable tokenizer: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True, slots=True)
class Rules:
    """How a byte-level vocabulary splits text before merging. `words` None: GPT-2's own expression."""

    words: str | None = None
    digits_apart: bool = False
    normal_form_c: bool = False
    ignore_merges: bool = False
    begins_with_bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.digits_apart:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.words is not None:
            steps.append(pre_tokenizers.Split(Regex(self.words), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.words is None))
        return pre_tokenizers.Sequence(steps)


def _words(digits: str) -> str:
    """The expression of Llama 3 and Qwen 2, which differ in how many digits stay together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# by tokenizer.ggml.pre
PRE_TOKENIZERS = {
    "smollm": Rules(digits_apart=True),
    "gpt-2": Rules(),
    "llama-bpe": Rules(words=_words(r"\p{N}{1,3}"), ignore_merges=True, begins_with_bos=True),
    "qwen2": Rules(words=_words(r"\p{N}"), normal_form_c=True),
}
BYTE_LEVEL = "gpt2"  # GGUF's name for byte-level BPE
CONTROL, USER_DEFINED = 3, 4


def backend_from_gguf(metadata: Mapping[str, Any], path: Path) -> tokenizers.Tokenizer:
    """The tokenizer a GGUF describes. Raises UnsupportedModel for other kinds, BrokenModel for missing parts."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind != BYTE_LEVEL or pre not in list(PRE_TOKENIZERS):
        raise UnsupportedModel(
            f"{path} has a tokenizer of kind {kind!r}, pre-tokenizer {pre!r}; supported: {BYTE_LEVEL} with "
            f"{', '.join(PRE_TOKENIZERS)}; serve the model's Hugging Face folder instead"
        )
    tokens, merges, types = (_part(metadata, key, path) for key in ("tokens", "merges", "token_type"))
    if len(types) != len(tokens):
        raise BrokenModel(f"{path} has {len(tokens)} tokens and {len(types)} token types")
    rules = PRE_TOKENIZERS[pre]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        bpe = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=rules.ignore_merges)
    except Exception as error:  # the library raises plain Exception, and the file's values may be of any type
        raise BrokenModel(f"{path} has merges that do not fit its tokens: {str(error).splitlines()[0]}") from None
    backend = tokenizers.Tokenizer(bpe)
    if rules.normal_form_c:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = rules.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, types, strict=True))
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in kinds if k == CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in kinds if k == USER_DEFINED])
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    begins = metadata.get("tokenizer.ggml.add_bos_token", rules.begins_with_bos)
    if begins and isinstance(bos, int) and 0 <= bos < len(tokens):
        try:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A $B", special_tokens=[(tokens[bos], bos)]
            )
        except ValueError as error:
            raise BrokenModel(f"{path} begins texts with {tokens[bos]!r}, which cannot be done: {error}") from None
    return backend


def _part(metadata: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    part = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(part, list):
        raise BrokenModel(f"{path} lacks tokenizer.ggml.{key}")
    return part
