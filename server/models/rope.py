"""Rope settings: how rotary frequencies are stretched, read from and written to config.json's keys. Torch-free.

Both spellings are read: `rope_parameters` (transformers 5) and `rope_scaling` with `rope_theta` (older).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from server.errors import BrokenModel, UnsupportedModel
from server.models.values import Values

RopeKind = Literal["linear", "llama3", "yarn"]


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


def rope_values(given: Values, layer_type: str | None = None) -> Values:
    """Rope settings under one spelling: `rope_parameters`' keys, `rope_theta` among them.

    `layer_type`: the kind of layer whose settings are wanted, where the model has some per kind. Raises BrokenModel.
    """
    nested = given.values.get("rope_parameters") or given.values.get("rope_scaling") or {}
    if isinstance(nested, Mapping) and layer_type in nested:
        nested = nested[layer_type] or {}
    if not isinstance(nested, Mapping):
        raise BrokenModel(f"the model's rope settings are {nested!r}; they must be an object")
    rope = {"rope_theta": given.values["rope_theta"], **{k: v for k, v in nested.items() if v is not None}}
    rope.setdefault("rope_type", rope.get("type", "default"))
    return Values(rope)


def rope_scaling(rope: Values, max_position: int) -> RopeScaling | None:
    """None for plain rotary embeddings. Raises UnsupportedModel or BrokenModel."""
    kind = rope.values["rope_type"]
    if kind == "default":
        return None
    if kind not in get_args(RopeKind):
        raise UnsupportedModel(
            f"the model's rope scaling is {kind!r}; supported: default, {', '.join(get_args(RopeKind))}"
        )
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
    theta = rope.number("rope_theta")
    if theta <= 1:
        raise BrokenModel(f"the model's rope_theta is {theta}; YaRN needs one above 1")
    factor = rope.number("factor", max_position / original)
    return RopeScaling(
        "yarn",
        factor=factor,
        original_max_position=original,
        attention_factor=_yarn_attention_factor(rope, factor),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
    )


def _yarn_attention_factor(rope: Values, factor: float) -> float | None:
    """The factor as given, else DeepSeek's ratio of two mscales where both are there (transformers' rule)."""
    if "attention_factor" in rope.values:
        return rope.number("attention_factor")
    if not (rope.values.get("mscale") and rope.values.get("mscale_all_dim")):
        return None
    if factor <= 1:
        return 1.0
    own, all_dims = (0.1 * rope.number(key) * math.log(factor) + 1.0 for key in ("mscale", "mscale_all_dim"))
    return own / all_dims


def scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """`rope_scaling` as config.json holds it."""
    if scaling is None:
        return None
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
