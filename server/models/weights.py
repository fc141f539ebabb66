"""Weights: a model's tensors under Hugging Face's names, one at a time, checked before the first is read.

Safetensors files are mapped and a tensor of the wanted dtype is not copied; a GGUF tensor is dequantised in slices of
at most `SLICE_BYTES`, so that loading needs one tensor's memory beyond the model's. It knows names and shapes and
nothing of how the decoder stores them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from server.errors import BrokenModel, UnknownModel, UnsupportedModel
from server.models.config import ModelConfig
from server.models.gguf_file import GgufFile
from server.models.source import ModelSource, read_json

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
GGUF_TOP = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", HEAD: "output.weight"}
GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
PERMUTED = "llama"  # the architecture whose query and key rows llama.cpp reorders; Qwen's it leaves as they are
GGUF_EXTRA = frozenset({"rope_freqs.weight"})  # read with the config
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SLICE_BYTES = 16 << 20
FINGERPRINT_ROWS = 64


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the model has, in loading order, with its shape."""
    features, hidden, inner = config.features, config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden, features.attention_bias),
        "self_attn.k_proj": (keys, hidden, features.attention_bias),
        "self_attn.v_proj": (keys, hidden, features.attention_bias),
        "self_attn.o_proj": (hidden, queries, features.output_bias),
        "mlp.gate_proj": (inner, hidden, features.mlp_bias),
        "mlp.up_proj": (inner, hidden, features.mlp_bias),
        "mlp.down_proj": (hidden, inner, features.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if features.norms_after:
        norms |= {"pre_feedforward_layernorm": hidden, "post_feedforward_layernorm": hidden}
    if features.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for norm, size in norms.items():
            shapes[f"{prefix}{norm}.weight"] = (size,)
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
    shapes[FINAL_NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def tensors(source: ModelSource, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor of `expected_shapes`, in `dtype`.

    Raises BrokenModel (missing, foreign, of another shape, truncated) and UnsupportedModel (stored in another type),
    both before anything of the sizes that the config names need be made.
    """
    if source.gguf:
        _check(source, _gguf_shapes(source.gguf, source.config))
        return _gguf_tensors(source, source.gguf, dtype)
    return _folder_tensors(_checked_files(source), expected_shapes(source.config), dtype)


def fingerprint(source: ModelSource) -> str:
    """SHA-256 in hex of the shape and of the bf16 values of the final norm and the first embedding rows.

    The same for a GGUF and the folder converted from it; different for another model or a further trained one.
    """
    config = source.config
    shape = (
        config.architecture,
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.tie_word_embeddings,
    )
    digest = hashlib.sha256(json.dumps(shape).encode())
    rows = min(FINGERPRINT_ROWS, config.vocab_size)
    for tensor in _head_of(source, rows):
        digest.update(tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _head_of(source: ModelSource, rows: int) -> tuple[Tensor, Tensor]:
    """The final norm and the first embedding rows, as stored."""
    if source.gguf is not None:
        _check(source, _gguf_shapes(source.gguf, source.config))
        data = source.gguf.map()
        norm = source.gguf.rows(data, GGUF_TOP[FINAL_NORM], 0, 1)[0]
        return torch.from_numpy(norm), torch.from_numpy(source.gguf.rows(data, GGUF_TOP[EMBEDDING], 0, rows))
    files = _checked_files(source)
    with safe_open(files[FINAL_NORM], framework="pt") as norms, safe_open(files[EMBEDDING], framework="pt") as table:
        return norms.get_tensor(FINAL_NORM).clone(), table.get_slice(EMBEDDING)[:rows]


def _check(source: ModelSource, found: dict[str, tuple[int, ...]]) -> None:
    """Raises BrokenModel unless the tensors found are those that the config says."""
    wanted = expected_shapes(source.config)
    for name, shape in wanted.items():
        if name not in found:
            raise BrokenModel(f"{source.path} lacks the tensor {name} of shape {list(shape)}")
        if found[name] != shape:
            raise BrokenModel(f"{source.path} has {name} of shape {list(found[name])}; its config says {list(shape)}")
    for name in found:
        if name not in wanted and not _ignorable(name):
            raise BrokenModel(f"{source.path} has the tensor {name}, which a model of its config does not have")


def _ignorable(name: str) -> bool:
    """Saved by some writers and implied by the rest: a tied head, and rotary frequencies of old checkpoints."""
    return name == HEAD or name.endswith("rotary_emb.inv_freq")


# Safetensors


def _folder_tensors(
    files: dict[str, Path], wanted: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for file in dict.fromkeys(files.values()):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping, only keys()
                if name in wanted:
                    yield name, opened.get_tensor(name).to(dtype)


def _checked_files(source: ModelSource) -> dict[str, Path]:
    """The file of every tensor in the folder, after checking names, shapes and types of all."""
    found: dict[str, tuple[int, ...]] = {}
    files: dict[str, Path] = {}
    for file in _safetensors_files(source.path):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping, only keys()
                    if name in files:
                        raise BrokenModel(f"{source.path} has {name} twice: in {files[name].name} and {file.name}")
                    part = opened.get_slice(name)
                    if part.get_dtype() not in FLOATS and not _ignorable(name):
                        raise UnsupportedModel(
                            f"{file} stores {name} as {part.get_dtype()}; supported: {', '.join(FLOATS)}"
                        )
                    found[name], files[name] = tuple(part.get_shape()), file
        except (SafetensorError, OSError) as error:
            raise BrokenModel(f"{file} is truncated or no safetensors file: {str(error).splitlines()[0]}") from None
    _check(source, found)
    return files


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise BrokenModel(f"{index} has no weight_map from tensors to files beside it")
        files = [folder / name for name in dict.fromkeys(names.values())]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            hint = "; save it as safetensors" if list(folder.glob("pytorch_model*.bin")) else ""
            raise UnknownModel(f"{folder} has no {file.name}{hint}")
    return files


# GGUF


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    if name in GGUF_TOP:
        return GGUF_TOP[name]
    _, _, layer, path = name.split(".", 3)
    part, kind = path.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_PARTS[part]}.{kind}"


def _gguf_shapes(gguf: GgufFile, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes under Hugging Face's names; a tensor without one keeps its own."""
    ours = {gguf_name(name): name for name in expected_shapes(config)}
    return {ours.get(name, name): tensor.shape for name, tensor in gguf.tensors.items() if name not in GGUF_EXTRA}


def _gguf_tensors(source: ModelSource, gguf: GgufFile, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    config, data = source.config, gguf.map()
    permuted = gguf.metadata.get("general.architecture") == PERMUTED
    for name, shape in expected_shapes(config).items():
        stored = gguf_name(name)
        rows, columns = gguf.tensors[stored].rows, shape[-1]
        tensor = torch.empty(rows, columns, dtype=dtype)
        step = max(1, SLICE_BYTES // (4 * columns))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            tensor[start:stop] = torch.from_numpy(gguf.rows(data, stored, start, stop))
        tensor = tensor.view(shape)
        if permuted and ".q_proj." in name:
            tensor = unpermute(tensor, config.num_heads)
        elif permuted and ".k_proj." in name:
            tensor = unpermute(tensor, config.num_kv_heads)
        yield name, tensor


def unpermute(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from llama.cpp's order (pairs i, i + D/2 beside each other) to Hugging Face's (halves)."""
    pairs = tensor.view(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
