"""Settings: one plain dataclass, the single source of truth for flags, environment variables and the documentation.

A field `max_num_seqs` is the flag `--max-num-seqs` and the variable `ENGRAM_MAX_NUM_SEQS`; flags win. The metadata
carries the help text; `docs/configuration.md` is generated from it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Any

from server.errors import SettingsError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
DEFAULT_MODEL = "builtin:smollm2-135m"
SIZE_SUFFIXES = {"k": KIB, "m": MIB, "g": GIB, "t": 1 << 40}


def setting(default: Any, help: str, group: str, *, choices: tuple[str, ...] = ()) -> Any:
    metadata = {"help": help, "group": group, "choices": choices}
    if isinstance(default, tuple):
        return field(default=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Settings:
    """All of `serve`'s settings. Sizes in bytes, times in seconds."""

    model: str = setting(DEFAULT_MODEL, "builtin name, Hugging Face folder, .gguf file or hub id", "model")
    served_model_name: str = setting("", "name in /v1/models; default: taken from the model", "model")
    dtype: str = setting("auto", "weights and activations", "model", choices=("auto", "bfloat16", "float16", "float32"))
    device: str = setting("auto", "where the backbone runs", "model", choices=("auto", "cpu", "cuda"))
    threads: int = setting(0, "compute threads of the engine; 0: as many as the CPU quota gives", "model")
    max_model_len: int = setting(0, "longest prompt + answer in tokens; 0: the model's own limit, at most 8192", "model")

    memory: tuple[str, ...] = setting((), "memory pack to attach: PATH or NAME=PATH; may be repeated", "memory")
    prefetch: str = setting("on", "fetch rows ahead of the layer that reads them", "memory", choices=("on", "off"))
    staging: int = setting(64 * MIB, "bytes of staging buffers for fetched rows", "memory")

    max_num_seqs: int = setting(64, "sequences running at once", "scheduler")
    max_num_batched_tokens: int = setting(512, "tokens computed per step: decode first, the rest prefill", "scheduler")
    kv_bytes: int = setting(0, "bytes for KV blocks; 0: a quarter of free memory, at most 2 GiB", "scheduler")
    block_size: int = setting(32, "tokens per KV block", "scheduler")
    prefix_cache: str = setting("on", "share KV blocks of equal prompt prefixes", "scheduler", choices=("on", "off"))

    host: str = setting("127.0.0.1", "address to bind", "http")
    port: int = setting(8000, "port to bind", "http")
    max_logprobs: int = setting(20, "most alternatives a request may ask for", "http")
    max_body_bytes: int = setting(16 * MIB, "largest request body", "http")
    max_waiting: int = setting(1024, "requests waiting before new ones are refused with 429", "http")
    drain_seconds: float = setting(15.0, "on SIGTERM, finish running requests for this long, then abort", "http")
    log_level: str = setting("info", "how much to log", "http", choices=("debug", "info", "warning", "error"))
    in_process: bool = setting(False, "run the engine in a thread of the API process (debugging)", "http")

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            choices = f.metadata["choices"]
            if choices and value not in choices:
                raise SettingsError(f"{flag(f.name)} is {value!r}; it must be one of {', '.join(choices)}")
            if isinstance(value, (int, float)) and value < 0:
                raise SettingsError(f"{flag(f.name)} is {value}; it must not be negative")
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{flag(name)} is {getattr(self, name)}; it must be at least 1")
        if self.port > 65535:
            raise SettingsError(f"--port is {self.port}; it must be at most 65535")


def flag(name: str) -> str:
    """`max_num_seqs` → `--max-num-seqs`."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """`max_num_seqs` → `ENGRAM_MAX_NUM_SEQS`."""
    return "ENGRAM_" + name.upper()


def parse_size(text: str | int) -> int:
    """Bytes from "512M", "2GiB", "1048576". Raises SettingsError."""
    lowered = str(text).strip().lower().removesuffix("ib").removesuffix("b")
    scale = SIZE_SUFFIXES.get(lowered[-1:], 1)
    number = lowered[:-1] if scale > 1 else lowered
    try:
        return int(float(number) * scale)
    except ValueError:
        raise SettingsError(f"{text!r} is no size; write bytes or a number with K, M, G or T, such as 512M") from None


def from_environment(environ: dict[str, str] | None = None) -> dict[str, str]:
    """The settings that ENGRAM_* variables give, as text by field name. Raises SettingsError on an unknown one."""
    environ = dict(os.environ) if environ is None else environ
    return {f.name: environ[variable(f.name)] for f in fields(Settings) if variable(f.name) in environ}
