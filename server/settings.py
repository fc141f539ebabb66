"""Settings: one plain dataclass, the single source of truth for flags, variables, the YAML file and the documentation.

A field `max_num_seqs` is the flag `--max-num-seqs`, the variable `ENGRAM_MAX_NUM_SEQS` and the key `max-num-seqs` of
the file that `--config` names. Flags win over variables, variables over the file. The metadata carries the help text;
`docs/configuration.md` is generated from it. Each of the three gives text or plain values; `typed` makes the field's
type of them and names their origin where it cannot.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from server.errors import SettingsError
from server.metrics import buckets_from

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
DEFAULT_MODEL = "builtin:smollm2-135m"
SIZE_SUFFIXES = {"k": KIB, "m": MIB, "g": GIB, "t": 1 << 40}


def setting(default: Any, help: str, group: str, *, choices: tuple[str, ...] = (), size: bool = False) -> Any:
    """A field with its help text. `size`: bytes, may be written 512M."""
    return field(default=default, metadata={"help": help, "group": group, "choices": choices, "size": size})


@dataclass(frozen=True, slots=True)
class Settings:
    """All of `serve`'s settings. Sizes in bytes, times in seconds."""

    model: str = setting(DEFAULT_MODEL, "builtin name, Hugging Face folder, .gguf file or hub id", "model")
    served_model_name: str = setting("", "name in /v1/models; default: taken from the model", "model")
    dtype: str = setting("auto", "weights and activations", "model", choices=("auto", "bfloat16", "float16", "float32"))
    device: str = setting("auto", "where the backbone runs", "model", choices=("auto", "cpu", "cuda"))
    threads: int = setting(0, "compute threads of the engine; 0: as many as the CPU quota gives", "model")
    max_model_len: int = setting(
        0, "longest prompt + answer in tokens; 0: the model's own limit, at most 8192", "model"
    )

    memory: tuple[str, ...] = setting((), "memory pack to attach: PATH or NAME=PATH; may be repeated", "memory")
    prefetch: str = setting("on", "fetch rows ahead of the layer that reads them", "memory", choices=("on", "off"))
    keep_up_projection: bool = setting(
        False, "keep what a STEM memory replaces, so that requests may do without the memory", "memory"
    )
    staging: int = setting(64 * MIB, "bytes of staging buffers for fetched rows", "memory", size=True)

    max_num_seqs: int = setting(64, "sequences running at once", "scheduler")
    max_num_batched_tokens: int = setting(512, "tokens computed per step: decode first, the rest prefill", "scheduler")
    kv_bytes: int = setting(
        0, "bytes for KV blocks; 0: a quarter of free memory, at most 2 GiB", "scheduler", size=True
    )
    block_size: int = setting(16, "tokens per KV block", "scheduler")
    prefix_cache: str = setting("on", "share KV blocks of equal prompt prefixes", "scheduler", choices=("on", "off"))

    host: str = setting("127.0.0.1", "address to bind", "http")
    port: int = setting(8000, "port to bind", "http")
    max_logprobs: int = setting(20, "most alternatives a request may ask for", "http")
    max_body_bytes: int = setting(16 * MIB, "largest request body", "http", size=True)
    max_waiting: int = setting(1024, "requests waiting before new ones are refused with 429", "http")
    drain_seconds: float = setting(15.0, "on SIGTERM, finish running requests for this long, then abort", "http")
    log_level: str = setting("info", "how much to log", "http", choices=("debug", "info", "warning", "error"))
    in_process: bool = setting(False, "run the engine in a thread of the API process (debugging)", "http")

    vllm_metrics: bool = setting(False, "export queued, running and KV use as vllm:… too, for gateways", "metrics")
    metrics_buckets: tuple[str, ...] = setting(
        (), "bounds of one histogram in place of its own: NAME=0.01:0.1:1; may be repeated", "metrics"
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            choices = f.metadata["choices"]
            if choices and value not in choices:
                raise SettingsError(f"{flag(f.name)} is {value!r}; it must be one of {', '.join(choices)}")
            if isinstance(value, (int, float)) and not value >= 0:  # NaN included
                raise SettingsError(f"{flag(f.name)} is {value}; it must not be negative")
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{flag(name)} is {getattr(self, name)}; it must be at least 1")
        if self.port > 65535:
            raise SettingsError(f"--port is {self.port}; it must be at most 65535")
        buckets_from(self.metrics_buckets)


def flag(name: str) -> str:
    """`max_num_seqs` → `--max-num-seqs`."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """`max_num_seqs` → `ENGRAM_MAX_NUM_SEQS`."""
    return "ENGRAM_" + name.upper()


def typed(name: str, value: object, origin: str) -> Any:
    """A field's value from text or a plain value. Raises SettingsError naming `origin`, such as "--port"."""
    f = FIELDS[name]
    if isinstance(f.default, tuple):
        listed = value if isinstance(value, (list, tuple)) else str(value).split(",")
        return tuple(str(item) for item in listed if item != "")
    if isinstance(f.default, bool):
        return _switch(value, origin)
    if f.metadata["size"]:
        return parse_size(str(value), origin)
    if isinstance(f.default, str):
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)  # YAML reads on as true
    try:
        return int(str(value)) if isinstance(f.default, int) else float(str(value))
    except ValueError:
        kind = "a whole number" if isinstance(f.default, int) else "a number"
        raise SettingsError(f"{origin} is {value!r}; it must be {kind}") from None


def _switch(value: object, origin: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if str(value).lower() not in known:
        raise SettingsError(f"{origin} is {value!r}; it must be true or false")
    return known[str(value).lower()]


def parse_size(text: str | int, origin: str = "a size") -> int:
    """Bytes from "512M", "2GiB", "1048576". Raises SettingsError naming `origin`."""
    lowered = str(text).strip().lower()
    lowered = lowered.removesuffix("ib") if lowered.endswith("ib") else lowered.removesuffix("b")
    scale = SIZE_SUFFIXES.get(lowered[-1:], 1)
    number = lowered[:-1] if scale > 1 else lowered
    try:
        return int(float(number) * scale)
    except (ValueError, OverflowError):
        raise SettingsError(f"{origin} is {text!r}; write bytes or a number with K, M, G or T, such as 512M") from None


def from_environment(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The settings that ENGRAM_* variables give, by field name. Raises SettingsError on a value that does not fit."""
    environ = os.environ if environ is None else environ
    return {n: typed(n, environ[variable(n)], variable(n)) for n in FIELDS if variable(n) in environ}


def from_file(path: Path) -> dict[str, Any]:
    """The settings of a YAML file, by field name. Raises SettingsError on an unreadable file or an unknown key."""
    import yaml  # here, since most starts have no file

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"--config {path} holds a {type(content).__name__}; it must hold lines such as port: 8000")
    named = {str(key): value for key, value in content.items()}
    return {_known(key, path): typed(_known(key, path), value, f"{key} in {path}") for key, value in named.items()}


def _known(key: str, path: Path) -> str:
    name = key.replace("-", "_")
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1)
        hint = (
            f"; did you mean {near[0].replace('_', '-')}?" if near else "; engram-server serve --help lists the names"
        )
        raise SettingsError(f"--config {path} sets {key!r}, which is no setting{hint}")
    return name


def resolve(flags: Mapping[str, object], config: Path | None = None) -> Settings:
    """Settings from the command line's flags (None: not given), over the environment, over the file at `config`."""
    given = {name: typed(name, value, flag(name)) for name, value in flags.items() if value is not None}
    return Settings(**{**(from_file(config) if config else {}), **from_environment(), **given})


FIELDS: Mapping[str, Field[Any]] = {f.name: f for f in fields(Settings)}
