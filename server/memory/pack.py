"""Pack: a memory on disk, apart from its backbone, as an adapter is.

    PACK/
      config.json            what it is: addressing constants, shapes, the backbone it was made for
      modules.safetensors    projections, norms, convolution: `layers.<l>.<name>`
      table-<l>.safetensors  one table per layer, read in place
      README.md              for people

The stored form is the contract: `format_version` 1 keeps loading. Everything that decides an address is stored and
checked against what the tokenizer and the seeds give: a table read at wrong addresses is silently wrong, so it is
refused loudly. A STEM pack (kind "stem") has config.json and tables only. Source of the addressing constants: arXiv
2601.07372 and its released demo.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from server.errors import PackError
from server.json_text import parsed
from server.memory.layer import EngramShape

FORMAT_VERSION = 1
CONFIG, MODULES = "config.json", "modules.safetensors"


def table_file(layer: int) -> str:
    return f"table-{layer}.safetensors"


@dataclass(frozen=True, slots=True)
class PackConfig:
    """config.json of an Engram pack. Field names of the addressing are those of the released demo."""

    layer_ids: tuple[int, ...]
    max_ngram_size: int
    n_head_per_ngram: int
    engram_vocab_size: tuple[int, ...]  # base rows per head, one per order
    head_dim: int
    pad_id: int
    seed: int
    hidden_size: int
    vocab_size: int
    compressed_vocab_size: int
    compression_sha256: str
    multipliers: dict[str, list[int]]
    primes: dict[str, list[list[int]]]
    backbone: dict[str, Any]  # name, fingerprint, num_layers
    row_type: str = "bfloat16"
    kernel_size: int = 4
    norm_eps: float = 1e-6
    branches: int = 1
    form: str = "paper"  # which of `attached.FORMS` reads the rows
    dilation: int = 0  # of the convolution; 0: the longest order
    rule: dict[str, Any] = field(default_factory=dict)  # addressing in another family's fields, instead of these
    trained_steps: int = 0
    kind: str = "engram"
    format_version: int = FORMAT_VERSION
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def row_width(self) -> int:
        """Values a token reads per layer: orders · heads · head_dim."""
        orders = len(self.primes[str(self.layer_ids[0])])
        return orders * self.n_head_per_ngram * self.head_dim

    def addressing(self) -> dict[str, Any]:
        """The part that decides addresses, in the demo's field names or its family's, for `addressing.from_config`."""
        constants = {"multipliers": self.multipliers or None, "primes": self.primes}
        if self.rule:
            return {**self.rule, **constants}
        names = ("layer_ids", "max_ngram_size", "n_head_per_ngram", "engram_vocab_size", "pad_id", "seed")
        return {name: getattr(self, name) for name in (*names, "compressed_vocab_size")} | constants

    @classmethod
    def read(cls, folder: Path) -> PackConfig:
        """Raises PackError naming the folder and what is wrong with it."""
        config = read_config(folder)
        if not isinstance(config, cls):
            raise PackError(f"{folder} is a pack of kind {config.kind!r}; an Engram pack is needed here")
        return config

    @classmethod
    def of(cls, content: dict[str, Any], path: Path) -> PackConfig:
        return cls(**known_fields(content, cls, OPTIONAL, path))

    def write(self, folder: Path) -> None:
        write_config(folder, asdict(self))

    def check_backbone(self, *, hidden_size: int, num_layers: int, vocab_size: int) -> None:
        """Raises PackError, with both values, unless the pack fits this backbone. A vocabulary of 0 is not stated."""
        pairs: list[tuple[str, object, object]] = [("hidden size", self.hidden_size, hidden_size)]
        if self.vocab_size:
            pairs.append(("vocabulary", self.vocab_size, vocab_size))
        check_pairs(pairs)
        check_layers(self.layer_ids, num_layers)

    def check_compression(self, *, sha256: str, compressed: int) -> None:
        """Raises PackError, with both values, unless the tokenizer compresses as the pack's did, if that is stated."""
        if self.compression_sha256:
            check_pairs(
                [
                    ("compressed vocabulary", self.compressed_vocab_size, compressed),
                    ("compression map SHA-256", self.compression_sha256, sha256),
                ]
            )


OPTIONAL = {"row_type", "kernel_size", "norm_eps", "branches", "form", "dilation", "rule", "trained_steps", "extra"}


def engram_shape(config: PackConfig) -> EngramShape:
    return EngramShape(
        config.hidden_size,
        config.row_width,
        config.branches,
        config.kernel_size,
        config.dilation or config.max_ngram_size,
        config.norm_eps,
    )


@dataclass(frozen=True, slots=True)
class StemConfig:
    """config.json of a STEM pack: one row of `intermediate_size` values per token id, at each of `layer_ids`.

    `calibration`: what the rows were made from; for people.
    """

    layer_ids: tuple[int, ...]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    backbone: dict[str, Any]  # name, fingerprint, num_layers
    row_type: str = "bfloat16"
    calibration: dict[str, Any] = field(default_factory=dict)
    trained_steps: int = 0
    kind: str = "stem"
    format_version: int = FORMAT_VERSION

    def addressing(self) -> dict[str, Any]:
        """The part that decides addresses, in the reference repository's field names."""
        return {"stem_layers": list(self.layer_ids), "vocab_size": self.vocab_size}

    @classmethod
    def of(cls, content: dict[str, Any], path: Path) -> StemConfig:
        optional = {"row_type", "calibration", "trained_steps"}
        return cls(**known_fields(content, cls, optional, path))

    def write(self, folder: Path) -> None:
        write_config(folder, asdict(self))

    def check_backbone(self, *, hidden_size: int, intermediate_size: int, num_layers: int, vocab_size: int) -> None:
        """Raises PackError, with both values, unless the pack fits this backbone."""
        pairs = [
            ("hidden size", self.hidden_size, hidden_size),
            ("feed-forward width", self.intermediate_size, intermediate_size),
            ("vocabulary", self.vocab_size, vocab_size),
        ]
        check_pairs(pairs)
        check_layers(self.layer_ids, num_layers)


def read_config(folder: Path) -> PackConfig | StemConfig:
    """A pack's config.json, of either kind. Raises PackError naming the folder and what is wrong with it."""
    path, content = folder / CONFIG, read_content(folder)
    if "format_version" not in content:
        raise PackError(f"{path} has no format_version, and no field that tells another memory; it is not a pack's")
    kinds: dict[str, type[PackConfig] | type[StemConfig]] = {"engram": PackConfig, "stem": StemConfig}
    kind = content.get("kind")
    if content["format_version"] != FORMAT_VERSION or kind not in list(kinds):
        raise PackError(
            f"{path} is kind {kind!r}, format {content['format_version']}; this server reads "
            f"kinds 'engram' and 'stem', format {FORMAT_VERSION}"
        )
    return kinds[kind].of(content, path)


def read_content(folder: Path) -> dict[str, Any]:
    """config.json, the text part of a multimodal model's on top. Raises PackError."""
    path = folder / CONFIG
    try:
        content = parsed(path.read_text(encoding="utf-8"))
    except OSError:
        raise PackError(f"{folder} is no memory pack: it has no readable {CONFIG}") from None
    except ValueError as error:
        raise PackError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise PackError(f"{path} holds a {type(content).__name__}; a config is needed")
    inner = content.get("text_config")
    text = inner.items() if isinstance(inner, dict) else ()
    return {**content, **{name: value for name, value in text if value is not None}}


def write_config(folder: Path, content: dict[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def known_fields(
    content: dict[str, Any], kind: type[PackConfig] | type[StemConfig], optional: set[str], path: Path
) -> dict[str, Any]:
    """The content's fields that this version knows, lists as tuples.

    Raises PackError if one that is needed is missing, or one is of another type than it must be.
    """
    hints = get_type_hints(kind)
    missing = hints.keys() - content.keys() - optional
    if missing:
        raise PackError(f"{path} lacks {', '.join(sorted(missing))}")
    return {name: checked(content[name], hint, f"{path} has {name}") for name, hint in hints.items() if name in content}


def checked(value: Any, hint: Any, where: str) -> Any:
    """The value if it is as a field's type says. Raises PackError, which begins with `where`."""
    words, fits = KINDS[get_origin(hint) or hint]
    if not fits(value):
        raise PackError(f"{where} = {value!r}; it must be {words}")
    return tuple(value) if isinstance(value, list) else value


def is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


# A field's type → what a value must be, in words and as a check.
KINDS: Mapping[type, tuple[str, Callable[[Any], bool]]] = {
    int: ("a whole number from 0 on", is_whole),
    float: ("a number from 0 to 1", lambda value: type(value) in (int, float) and 0 <= value <= 1),
    str: ("a text", lambda value: isinstance(value, str)),
    dict: ("an object", lambda value: isinstance(value, dict)),
    tuple: (
        "a list of whole numbers",
        lambda value: isinstance(value, list) and bool(value) and all(map(is_whole, value)),
    ),
}


def check_pairs(pairs: Sequence[tuple[str, object, object]]) -> None:
    for what, mine, theirs in pairs:
        if mine != theirs:
            raise PackError(f"the pack was made for a {what} of {mine} and the model has {theirs}")


def check_layers(layers: Sequence[int], num_layers: int) -> None:
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise PackError(f"the pack reads at layer {layer} and the model has layers 0..{num_layers - 1}")
