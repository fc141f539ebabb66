"""Families: the supported architectures, and what sets each apart from a plain Llama, to and from config.json's keys.

Torch-free. A further dense architecture is one more entry: its names, what its config.json may leave out, a function
that reads its features and one that writes them back. Defaults and meanings: Hugging Face's configuration classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from server.errors import BrokenModel, UnsupportedModel
from server.models.rope import rope_values
from server.models.values import Values

Activation = Literal["silu", "gelu_pytorch_tanh"]
RotaryKind = Literal["global", "local", "none"]


@dataclass(frozen=True, slots=True)
class Features:
    """What a dense decoder has beyond, or instead of, a plain Llama's parts.

    windows       per layer, how many positions a token sees, itself among them; 0: all
    rotary        per layer, the frequencies its heads are rotated by; "none": not at all
    local_theta   base of the "local" frequencies, which are never stretched
    query_scale   what query · key is multiplied with; 0: 1 / sqrt(head size)
    """

    windows: tuple[int, ...]
    rotary: tuple[RotaryKind, ...]
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: Activation = "silu"
    norms_after: bool = False
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    query_scale: float = 0.0
    local_theta: float = 0.0


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture: `architecture` is its model_type and, if `gguf`, what a GGUF calls it."""

    architecture: str
    hf_class: str
    gguf: bool
    defaults: Mapping[str, Any]
    features: Callable[[Values, int], Features]
    written: Callable[[Features], dict[str, Any]]


def family_of(values: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises UnsupportedModel, naming the supported ones, or BrokenModel."""
    names = values.get("architectures") or []
    if not isinstance(names, list):
        raise BrokenModel(f"config.json has architectures = {names!r}; it must be a list of names")
    for family in FAMILIES.values():
        if family.hf_class in names or (not names and values.get("model_type") == family.architecture):
            return family
    found = ", ".join(map(str, names)) or values.get("model_type") or "nothing"
    supported = ", ".join(family.hf_class for family in FAMILIES.values())
    raise UnsupportedModel(f"config.json names the architecture {found}; supported: {supported}")


def _rotated(layers: int) -> tuple[RotaryKind, ...]:
    return tuple("global" for _ in range(layers))


def _activation(given: Values, key: str, wanted: Activation) -> Activation:
    act = given.values[key]
    known = {"swish": "silu", "gelu_tanh": "gelu_pytorch_tanh"}.get(str(act), act)
    if known != wanted:
        raise UnsupportedModel(f"the model's activation is {act!r}; supported for its architecture: {wanted}")
    return wanted


def _layer_types(given: Values, layers: int, otherwise: Callable[[int], bool]) -> list[bool]:
    """Per layer, whether it is of sliding attention; `otherwise` says so where `layer_types` does not."""
    types = given.per_layer("layer_types", layers)
    if types is None:
        return [otherwise(layer) for layer in range(layers)]
    for kind in types:
        if kind not in ("sliding_attention", "full_attention"):
            raise UnsupportedModel(
                f"the model has a layer of type {kind!r}; supported: full_attention, sliding_attention"
            )
    return [kind == "sliding_attention" for kind in types]


def _written_layer_types(windows: tuple[int, ...]) -> list[str]:
    return ["sliding_attention" if window else "full_attention" for window in windows]


# Llama


def _llama(given: Values, layers: int) -> Features:
    bias = given.flag("attention_bias")
    return Features(
        windows=(0,) * layers,
        rotary=_rotated(layers),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=given.flag("mlp_bias"),
        activation=_activation(given, "hidden_act", "silu"),
    )


def _llama_written(features: Features) -> dict[str, Any]:
    return {"attention_bias": features.attention_bias, "mlp_bias": features.mlp_bias, "hidden_act": "silu"}


# Mistral: a window over all layers


def _mistral(given: Values, layers: int) -> Features:
    _activation(given, "hidden_act", "silu")
    window = given.integer("sliding_window") if given.values["sliding_window"] is not None else 0
    return Features(windows=(window,) * layers, rotary=_rotated(layers))


def _mistral_written(features: Features) -> dict[str, Any]:
    return {"sliding_window": features.windows[0] or None, "hidden_act": "silu"}


# Qwen 2 and 3: a window over the last layers where it is switched on


def _qwen_windows(given: Values, layers: int) -> tuple[int, ...]:
    if not given.flag("use_sliding_window") or given.values["sliding_window"] is None:
        return (0,) * layers
    window, first = given.integer("sliding_window"), given.integer("max_window_layers", least=0)
    return tuple(window * sliding for sliding in _layer_types(given, layers, lambda layer: layer >= first))


def _qwen2(given: Values, layers: int) -> Features:
    _activation(given, "hidden_act", "silu")
    return Features(windows=_qwen_windows(given, layers), rotary=_rotated(layers), attention_bias=True)


def _qwen3(given: Values, layers: int) -> Features:
    _activation(given, "hidden_act", "silu")
    bias = given.flag("attention_bias")
    return Features(
        windows=_qwen_windows(given, layers),
        rotary=_rotated(layers),
        attention_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )


def _qwen_written(features: Features) -> dict[str, Any]:
    return {
        "use_sliding_window": any(features.windows),
        "sliding_window": max(features.windows) or None,
        "layer_types": _written_layer_types(features.windows),
        "attention_bias": features.attention_bias,
        "hidden_act": "silu",
    }


# SmolLM3: some layers without rotary embeddings


def _smollm3(given: Values, layers: int) -> Features:
    rotated = given.per_layer("no_rope_layers", layers)
    if rotated is None:
        interval = given.integer("no_rope_layer_interval")
        rotated = [(layer + 1) % interval != 0 for layer in range(layers)]
    windows = (0,) * layers
    if given.flag("use_sliding_window") and given.values["sliding_window"] is not None:
        window = given.integer("sliding_window")
        windows = tuple(window * s for s in _layer_types(given, layers, lambda layer: not rotated[layer]))
    return Features(
        windows=windows,
        rotary=tuple("global" if r else "none" for r in rotated),
        attention_bias=given.flag("attention_bias"),
        output_bias=given.flag("attention_bias"),
        mlp_bias=given.flag("mlp_bias"),
        activation=_activation(given, "hidden_act", "silu"),
    )


def _smollm3_written(features: Features) -> dict[str, Any]:
    return {
        **_llama_written(features),
        "pad_token_id": None,  # transformers' default may lie beyond the vocabulary
        "no_rope_layers": [int(kind != "none") for kind in features.rotary],
        "use_sliding_window": any(features.windows),
        "sliding_window": max(features.windows) or None,
        "layer_types": _written_layer_types(features.windows),
    }


# Gemma 3, text: norms after each half of a block too, weights stored minus one, local layers with their own frequencies


def _gemma3(given: Values, layers: int) -> Features:
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if given.values.get(key):
            raise UnsupportedModel(f"the model's config has {key} = {given.values[key]!r}; supported: none")
    pattern, window = given.integer("sliding_window_pattern"), given.integer("sliding_window")
    sliding = _layer_types(given, layers, lambda layer: bool((layer + 1) % pattern))
    local = rope_values(Values({**given.values, "rope_scaling": None}), "sliding_attention")
    if local.values["rope_type"] != "default":
        raise UnsupportedModel("the model stretches its local layers' frequencies; supported: default")
    split = given.values.get("rope_parameters")
    bias = given.flag("attention_bias")
    return Features(
        windows=tuple(window * s for s in sliding),
        rotary=tuple("local" if s else "global" for s in sliding),
        attention_bias=bias,
        output_bias=bias,
        qk_norm=True,
        activation=_activation(given, "hidden_activation", "gelu_pytorch_tanh"),
        norms_after=True,
        norm_offset=1.0,
        embed_scale=given.integer("hidden_size") ** 0.5,
        query_scale=given.number("query_pre_attn_scalar") ** -0.5,
        local_theta=local.number("rope_theta") if split else given.number("rope_local_base_freq"),
    )


def _gemma3_written(features: Features) -> dict[str, Any]:
    return {
        "hidden_activation": features.activation,
        "query_pre_attn_scalar": round(features.query_scale**-2),
        "sliding_window": max(features.windows) or 4096,
        "layer_types": _written_layer_types(features.windows),
        "attention_bias": features.attention_bias,
        "rope_local_base_freq": features.local_theta,
    }


COMMON: Mapping[str, Any] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "eos_token_id": None,
    "sliding_window": None,
}
QWEN = {**COMMON, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
NULLABLE = frozenset({"sliding_window"})  # keys whose null is a value of its own
FAMILIES = {
    family.architecture: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            True,
            {**COMMON, "max_position_embeddings": 2048, "eos_token_id": 2},
            _llama,
            _llama_written,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            False,
            {
                **COMMON,
                "max_position_embeddings": 131_072,
                "eos_token_id": 2,
                "sliding_window": 4096,
            },
            _mistral,
            _mistral_written,
        ),
        Family("qwen2", "Qwen2ForCausalLM", True, QWEN, _qwen2, _qwen_written),
        Family("qwen3", "Qwen3ForCausalLM", True, {**QWEN, "head_dim": 128}, _qwen3, _qwen_written),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            False,
            {
                **COMMON,
                "max_position_embeddings": 32768,
                "rope_theta": 2_000_000.0,
                "eos_token_id": 128_001,
                "tie_word_embeddings": True,
                "no_rope_layer_interval": 4,
            },
            _smollm3,
            _smollm3_written,
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            False,
            {
                **COMMON,
                "max_position_embeddings": 131_072,
                "rope_theta": 1_000_000.0,
                "rope_local_base_freq": 10_000.0,
                "eos_token_id": 1,
                "tie_word_embeddings": True,
                "head_dim": 256,
                "sliding_window": 4096,
                "sliding_window_pattern": 6,
                "query_pre_attn_scalar": 256,
                "hidden_activation": "gelu_pytorch_tanh",
            },
            _gemma3,
            _gemma3_written,
        ),
    )
}
