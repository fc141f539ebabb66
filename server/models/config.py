"""ModelConfig: the numbers a dense decoder is built from, read from and written to Hugging Face's config.json.

Torch-free: the API process reads it too. It knows no tensors and no files; `source.py` finds the files, `weights.py`
checks tensors against it. Another architecture of the family is one more entry of `FAMILIES`, with its own defaults.
Keys and defaults: Hugging Face's LlamaConfig; both spellings of rope settings, `rope_parameters` (transformers 5) and
`rope_scaling` with `rope_theta` (older).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from server.errors import BrokenModel, UnsupportedModel

DType = Literal["bfloat16", "float16", "float32"]
RopeKind = Literal["linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class Family:
    """One supported architecture: its names, and what its config.json may leave out."""

    architecture: str
    hf_class: str
    defaults: Mapping[str, Any]


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    {
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "eos_token_id": 2,
    },
)
FAMILIES = {family.architecture: family for family in (LLAMA,)}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained length; each kind reads its own fields.

    `attention_factor` None means YaRN's own rule, 0.1 ln(factor) + 1.
    """

    kind: RopeKind
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A dense decoder's shape. `dtype` is what its weights were published in, `eos_token_ids` what ends an answer."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: DType

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise BrokenModel(
                f"the model has {self.num_heads} attention heads and {self.num_kv_heads} key-value heads; "
                f"the first must be a multiple of the second"
            )
        if self.head_dim % 2:
            raise BrokenModel(f"the model's head size is {self.head_dim}; rotary embeddings need an even one")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """From config.json's content and, where there is one, generation_config.json's, whose end tokens win.

        Raises UnsupportedModel for what this engine does not compute, BrokenModel for missing or impossible values.
        """
        family = family_of(values)
        given = _Values({**family.defaults, **{k: v for k, v in values.items() if v is not None}})
        _refuse_unsupported(given)
        rope = _rope_values(given)
        heads = given.integer("num_attention_heads")
        ends = (generation or {}).get("eos_token_id")
        if ends is None:
            ends = values.get("eos_token_id", family.defaults["eos_token_id"])
        return cls(
            architecture=family.architecture,
            vocab_size=given.integer("vocab_size"),
            hidden_size=given.integer("hidden_size"),
            intermediate_size=given.integer("intermediate_size"),
            num_layers=given.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=given.integer("num_key_value_heads", heads),
            head_dim=given.integer("head_dim", given.integer("hidden_size") // heads),
            rms_norm_eps=given.number("rms_norm_eps"),
            rope_theta=rope.number("rope_theta"),
            rope_scaling=_rope_scaling(rope, given.integer("max_position_embeddings")),
            max_position_embeddings=given.integer("max_position_embeddings"),
            tie_word_embeddings=bool(given.values["tie_word_embeddings"]),
            attention_bias=bool(given.values["attention_bias"]),
            mlp_bias=bool(given.values["mlp_bias"]),
            eos_token_ids=token_ids("eos_token_id", ends),
            bos_token_id=next(iter(token_ids("bos_token_id", values.get("bos_token_id"))), None),
            dtype=_dtype(given.values.get("dtype", given.values.get("torch_dtype", "float32"))),
        )

    def to_hf(self) -> dict[str, Any]:
        """config.json's content, in the older spellings, which old and new readers both understand."""
        family = FAMILIES[self.architecture]
        return {
            "architectures": [family.hf_class],
            "model_type": family.architecture,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None if self.rope_scaling is None else _scaling_to_hf(self.rope_scaling),
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "eos_token_id": _one_or_list(self.eos_token_ids),
            "bos_token_id": self.bos_token_id,
            "torch_dtype": self.dtype,
        }


def family_of(values: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises UnsupportedModel, naming the supported ones."""
    names = values.get("architectures") or []
    for family in FAMILIES.values():
        if family.hf_class in names or (not names and values.get("model_type") == family.architecture):
            return family
    found = ", ".join(map(str, names)) or values.get("model_type") or "nothing"
    raise UnsupportedModel(f"config.json names the architecture {found}; supported: {supported_architectures()}")


def supported_architectures() -> str:
    return ", ".join(family.hf_class for family in FAMILIES.values())


def token_ids(key: str, value: Any) -> tuple[int, ...]:
    """One id, a list of ids or nothing, as a tuple. Raises BrokenModel."""
    ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise BrokenModel(f"{key} is {value!r}; it must be a token id or a list of them")
    return tuple(ids)


@dataclass(frozen=True, slots=True)
class _Values:
    """JSON values with checked readers: a wrong type is a broken model, not a TypeError later."""

    values: Mapping[str, Any]

    def _get(self, key: str, default: float | None) -> Any:
        if key not in self.values and default is None:
            raise BrokenModel(f"the model's config lacks {key}")
        return self.values.get(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BrokenModel(f"the model's config has {key} = {value!r}; it must be a whole number above 0")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise BrokenModel(f"the model's config has {key} = {value!r}; it must be a number above 0")
        return float(value)


def _refuse_unsupported(given: _Values) -> None:
    act = given.values["hidden_act"]
    if act not in ("silu", "swish"):
        raise UnsupportedModel(f"the model's activation is {act!r}; supported: silu")
    if given.values.get("quantization_config"):
        method = given.values["quantization_config"].get("quant_method", "unnamed")
        raise UnsupportedModel(
            f"the model's weights are quantised ({method}); supported: bfloat16, float16 and float32 safetensors, GGUF"
        )


def _rope_values(given: _Values) -> _Values:
    """Rope settings under one spelling: `rope_parameters`' keys, `rope_theta` among them."""
    nested = given.values.get("rope_parameters") or given.values.get("rope_scaling") or {}
    if not isinstance(nested, Mapping):
        raise BrokenModel(f"the model's rope settings are {nested!r}; they must be an object")
    rope = {"rope_theta": given.values["rope_theta"], **{k: v for k, v in nested.items() if v is not None}}
    rope.setdefault("rope_type", rope.get("type", "default"))
    return _Values(rope)


def _rope_scaling(rope: _Values, max_position: int) -> RopeScaling | None:
    kind = rope.values["rope_type"]
    if kind == "default":
        return None
    if kind not in get_args(RopeKind):
        raise UnsupportedModel(f"the model's rope scaling is {kind!r}; supported: {', '.join(get_args(RopeKind))}")
    if rope.values.get("partial_rotary_factor", 1.0) != 1.0 or rope.values.get("truncate", True) is not True:
        raise UnsupportedModel("the model rotates part of each head, or does not truncate YaRN's range; not supported")
    if kind == "linear":
        return RopeScaling("linear", factor=rope.number("factor"))
    original = rope.integer("original_max_position_embeddings", max_position)
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position=original,
        )
    factor = rope.number("factor", max_position / original)
    return RopeScaling(
        "yarn",
        factor=factor,
        original_max_position=original,
        attention_factor=_yarn_attention_factor(rope, factor),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
    )


def _yarn_attention_factor(rope: _Values, factor: float) -> float | None:
    """The factor as given, else DeepSeek's ratio of two mscales where both are there (transformers' rule)."""
    if "attention_factor" in rope.values:
        return rope.number("attention_factor")
    if not (rope.values.get("mscale") and rope.values.get("mscale_all_dim")):
        return None
    if factor <= 1:
        return 1.0
    own, all_dims = (0.1 * rope.number(key) * math.log(factor) + 1.0 for key in ("mscale", "mscale_all_dim"))
    return own / all_dims


def _scaling_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    common: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return common
    common["original_max_position_embeddings"] = scaling.original_max_position
    if scaling.kind == "llama3":
        return {
            **common,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    if scaling.attention_factor is not None:
        common["attention_factor"] = scaling.attention_factor
    return {**common, "beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}


def _dtype(name: Any) -> DType:
    plain = str(name).removeprefix("torch.")
    for known in get_args(DType):
        if plain == known:
            return known  # type: ignore[no-any-return]
    raise UnsupportedModel(f"the model's dtype is {name!r}; supported: {', '.join(get_args(DType))}")


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else next(iter(ids), None)
