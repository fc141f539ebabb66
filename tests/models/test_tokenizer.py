"""Token ids equal transformers', and decoding gives the text back."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from server.errors import BrokenModel, UnknownModel, UnsupportedModel
from server.models.source import ModelSource
from server.models.tokenizer import PRE_TOKENIZERS, Tokenizer, backend_from_file, backend_from_gguf

# transformers' GGUF conversion leaves out the step that sets digits apart; merges show it only beside these digits.
UNUSUAL_DIGITS = "3.14159 and 1,000,000 and ١٢٣ and ²³ and Ⅳ"
CORPUS = [
    "",
    "The capital of France is Paris.",
    "12345",
    "3.14159 and 1,000,000",
    UNUSUAL_DIGITS,
    "서울은 대한민국의 수도이다. 한글과 ㅋㅋㅋ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🙂🙃 flags 🇰🇷",
    "def f(x):\n\treturn {'a': x ** 2}  # it's\n\n\n    pass\r\n",
    "\x00\x01\x02\x07\x1b[31m\x7f\x80\x9f",
    " ",
    "   ",
    " a  b   c ",
    "\n\n \t \n",
    "I'll we've DON'T they'Re",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "text<|endoftext|>text <|im_end|> <|im_end",
    "e\u0301 vs \u00e9, ﬁ ligature, zero\u200bwidth, bom\ufeff",
    "日本語と中文 العربية עברית हिन्दी ไทย",
    "https://example.org/a?b=c&d=%20#e_f-g",
    "a" * 300,
]
Trained = tuple[dict[str, int], list[tuple[str, str]]]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def ours(smollm2: ModelSource) -> Tokenizer:
    return smollm2.tokenizer


@pytest.fixture(scope="module")
def from_folder(smollm2_folder: Path) -> Any:
    """transformers on the folder that convert writes."""
    return AutoTokenizer.from_pretrained(smollm2_folder)


@pytest.fixture(scope="module")
def from_gguf(smollm2: ModelSource) -> Any:
    """transformers' own conversion of the same GGUF: it shares no code with ours."""
    return AutoTokenizer.from_pretrained(smollm2.path.parent, gguf_file=smollm2.path.name)


@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_the_corpus_has_transformers_ids(ours: Tokenizer, from_folder: Any, from_gguf: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == from_folder(text, add_special_tokens=False).input_ids
    if text != UNUSUAL_DIGITS:
        assert ids == from_gguf(text, add_special_tokens=False).input_ids
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == from_folder.decode(ids, skip_special_tokens=skip)


@given(text=ANY_TEXT)
def test_any_text_has_transformers_ids(ours: Tokenizer, from_folder: Any, text: str) -> None:
    assert ours.encode(text) == from_folder(text, add_special_tokens=False).input_ids


def test_every_digit_is_a_token_of_its_own(ours: Tokenizer) -> None:
    assert [ours.id_to_token(i) for i in ours.encode("12345")] == list("12345")


def test_special_tokens_are_single_ids_and_dropped_from_text(ours: Tokenizer) -> None:
    assert ours.encode("<|im_end|>") == [2]
    assert ours.special_ids == frozenset(range(17))
    assert ours.eos_token_ids == (2,)
    assert ours.decode([*ours.encode("yes"), 2]) == "yes"
    assert ours.decode([2], skip_special_tokens=False) == "<|im_end|>"


def test_ids_beyond_the_vocabulary_are_no_error(ours: Tokenizer) -> None:
    assert ours.vocab_size == 49152
    assert ours.id_to_token(49152) is None
    assert ours.decode([*ours.encode("yes"), 60_000]) == "yes"


def test_a_folders_tokenizer_is_its_tokenizer_json_without_truncation(tmp_path: Path, ours: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(ours.backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer(backend_from_file(tmp_path / "tokenizer.json"), (2,))
    assert [again.encode(text) for text in CORPUS] == [ours.encode(text) for text in CORPUS]


def test_a_folder_without_a_readable_tokenizer_says_so(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UnknownModel, match=r"no tokenizer\.json"):
        backend_from_file(path)
    path.write_text('{"version": "1.0", "model"')
    with pytest.raises(BrokenModel, match="no readable tokenizer"):
        backend_from_file(path)


# The other splitting rules, on a vocabulary trained here


@pytest.fixture(scope="module")
def trained() -> Trained:
    """Vocabulary and merges of a byte-level BPE trained on the corpus, as tokenizer.json spells them."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS * 3, trainer)
    described = json.loads(backend.to_str())["model"]
    return described["vocab"], [tuple(pair) for pair in described["merges"]]


def metadata_of(trained: Trained, pre: str, **more: Any) -> dict[str, Any]:
    vocabulary, merges = trained
    tokens = [*sorted(vocabulary, key=lambda token: vocabulary[token]), "<|begin|>", "<tool>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(vocabulary) + [3, 4],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": len(vocabulary),
        **more,
    }


def reference(pre: str, trained: Trained) -> Any:
    """transformers' class for the rule; for Llama 3, its converter's expression on a plain tokenizer."""
    vocabulary, merges = trained
    if pre == "gpt-2":
        return GPT2Tokenizer(vocab=vocabulary, merges=merges, add_prefix_space=False).backend_tokenizer
    if pre == "qwen2":
        return Qwen2Tokenizer(vocab=vocabulary, merges=merges).backend_tokenizer
    pattern = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe"])
def test_a_ggufs_splitting_rule_gives_the_ids_of_transformers(trained: Trained, pre: str) -> None:
    ours, theirs = backend_from_gguf(metadata_of(trained, pre), Path("a.gguf")), reference(pre, trained)
    for text in CORPUS:
        text = text.replace("<|endoftext|>", "")  # the reference's own special token
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text


def test_the_rules_differ_where_they_should(trained: Trained) -> None:
    counts = {}
    for pre in PRE_TOKENIZERS:
        backend = backend_from_gguf(metadata_of(trained, pre), Path("a.gguf"))
        counts[pre] = [len(piece) for piece, _ in backend.pre_tokenizer.pre_tokenize_str("12345")]
    assert counts == {"smollm": [1] * 5, "gpt-2": [5], "llama-bpe": [3, 2], "qwen2": [1] * 5}


def test_a_gguf_says_whether_texts_begin_with_bos(trained: Trained) -> None:
    bos = metadata_of(trained, "smollm")["tokenizer.ggml.bos_token_id"]
    for pre, more, begins in [
        ("llama-bpe", {}, True),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, False),
        ("gpt-2", {}, False),
        ("gpt-2", {"tokenizer.ggml.add_bos_token": True}, True),
    ]:
        tokenizer = Tokenizer(backend_from_gguf(metadata_of(trained, pre, **more), Path("a.gguf")), ())
        assert (tokenizer.encode("hi", add_special_tokens=True)[0] == bos) is begins
        assert tokenizer.encode("hi")[0] != bos


def test_user_defined_tokens_are_whole_but_not_special(trained: Trained) -> None:
    tokenizer = Tokenizer(backend_from_gguf(metadata_of(trained, "gpt-2"), Path("a.gguf")), ())
    ids = tokenizer.encode("a<tool>b")
    assert len(ids) == 3 and tokenizer.decode(ids) == "a<tool>b"
    assert ids[1] not in tokenizer.special_ids


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"tokenizer.ggml.model": "llama"}, UnsupportedModel, ["'llama'", "folder"]),
        ({"tokenizer.ggml.pre": "tekken"}, UnsupportedModel, ["'tekken'", "smollm"]),
        ({"tokenizer.ggml.pre": ["smollm"]}, UnsupportedModel, ["['smollm']"]),
        ({"tokenizer.ggml.merges": None}, BrokenModel, ["lacks tokenizer.ggml.merges"]),
        ({"tokenizer.ggml.merges": ["a zebra"]}, BrokenModel, ["merges"]),
        ({"tokenizer.ggml.merges": [1, 2]}, BrokenModel, ["merges"]),
        ({"tokenizer.ggml.token_type": [1]}, BrokenModel, ["1 token types"]),
    ],
)
def test_a_gguf_tokenizer_we_cannot_build_is_refused_in_one_line(
    trained: Trained, more: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        backend_from_gguf(metadata_of(trained, "smollm", **more), Path("a.gguf"))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("token", ["a b", "$B:x"])
def test_a_first_token_that_no_template_can_hold_is_refused(trained: Trained, token: str) -> None:
    metadata = metadata_of(trained, "llama-bpe")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], token]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 3]
    metadata["tokenizer.ggml.bos_token_id"] = len(metadata["tokenizer.ggml.tokens"]) - 1
    with pytest.raises(BrokenModel, match="begins texts with"):
        backend_from_gguf(metadata, Path("a.gguf"))


def test_a_first_token_below_none_is_left_out(trained: Trained) -> None:
    metadata = metadata_of(trained, "llama-bpe") | {"tokenizer.ggml.bos_token_id": -1_000_000}
    tokenizer = Tokenizer(backend_from_gguf(metadata, Path("a.gguf")), ())
    assert tokenizer.encode("a", add_special_tokens=True) == tokenizer.encode("a")


def test_a_text_that_needs_a_token_which_is_not_there_is_refused_in_one_line() -> None:
    backend = tokenizers.Tokenizer(models.WordPiece({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(BrokenModel, match="cannot read this text"):
        Tokenizer(backend, ()).encode("b")
