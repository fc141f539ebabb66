"""ModelConfig: the numbers a dense decoder is built from, read from and written to Hugging Face's config.json.

Torch-free: the API process reads it too. It knows no tensors and no files; `source.py` finds the files, `weights.py`
checks tensors against it. What differs between architectures stands in `families.py`, rope settings in `rope.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from server.errors import BrokenModel, UnsupportedModel
from server.models.families import FAMILIES, NULLABLE, Features, family_of
from server.models.rope import RopeScaling, rope_scaling, rope_values, scaling_to_hf
from server.models.values import Values, token_ids

DType = Literal["bfloat16", "float16", "float32"]
MOST_LAYERS = 10_000  # a config is held in memory layer by layer, before any weight is looked for


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
    features: Features
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
        kept = {k: v for k, v in values.items() if v is not None or k in NULLABLE}
        given = Values({**family.defaults, **kept})
        _refuse_quantised(given)
        rope = rope_values(given, "full_attention")
        layers = given.integer("num_hidden_layers", most=MOST_LAYERS)
        heads = given.integer("num_attention_heads")
        ends = (generation or {}).get("eos_token_id")
        if ends is None:
            ends = values.get("eos_token_id", family.defaults["eos_token_id"])
        return cls(
            architecture=family.architecture,
            vocab_size=given.integer("vocab_size"),
            hidden_size=given.integer("hidden_size"),
            intermediate_size=given.integer("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=given.integer("num_key_value_heads", heads),
            head_dim=given.integer("head_dim", given.integer("hidden_size") // heads),
            rms_norm_eps=given.number("rms_norm_eps"),
            rope_theta=rope.number("rope_theta"),
            rope_scaling=rope_scaling(rope, given.integer("max_position_embeddings")),
            max_position_embeddings=given.integer("max_position_embeddings"),
            tie_word_embeddings=bool(given.values["tie_word_embeddings"]),
            features=family.features(given, layers),
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
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling_to_hf(self.rope_scaling),
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "eos_token_id": _one_or_list(self.eos_token_ids),
            "bos_token_id": self.bos_token_id,
            "torch_dtype": self.dtype,
            **family.written(self.features),
        }


def _refuse_quantised(given: Values) -> None:
    quantised = given.values.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unnamed") if isinstance(quantised, Mapping) else "unnamed"
        raise UnsupportedModel(
            f"the model's weights are quantised ({method}); supported: bfloat16, float16 and float32 safetensors, GGUF"
        )


def _dtype(name: Any) -> DType:
    plain = str(name).removeprefix("torch.")
    for known in get_args(DType):
        if plain == known:
            return known  # type: ignore[no-any-return]
    raise UnsupportedModel(f"the model's dtype is {name!r}; supported: {', '.join(get_args(DType))}")


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else next(iter(ids), None)
