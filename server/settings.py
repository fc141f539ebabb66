"""Settings: one plain dataclass, the single source of truth for flags, variables, the YAML file and the documentation.

A field `max_num_seqs` is the flag `--max-num-seqs`, the variable `ENGRAM_MAX_NUM_SEQS` and the key `max-num-seqs` of
the file that `--config` names. Flags win over variables, variables over the file. The metadata carries the help text;
`docs/configuration.md` is generated from it. Each of the three gives text or plain values; `typed` makes the field's
type of them and names their origin where it cannot.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from server.errors import SettingsError
from server.metrics import buckets_from

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PLACEMENTS = ("auto", "device", "pinned", "mapped")
DEFAULT_MODEL = "builtin:smollm2-135m"
KEY, HASHED_KEY = re.compile(r"[\x21-\x7e]{1,512}"), re.compile(r"sha256:[0-9a-f]{64}")
MOST_DEPTH = 8  # of a YAML file, which needs two
SIZE_SUFFIXES = {"k": KIB, "m": MIB, "g": GIB, "t": 1 << 40}


def setting(
    default: Any, help: str, group: str, *, choices: tuple[str, ...] = (), size: bool = False, secret: bool = False
) -> Any:
    """A field with its help text. `size`: bytes, may be written 512M. `secret`: never shown; keys are kept hashed."""
    metadata = {"help": help, "group": group, "choices": choices, "size": size}
    return field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True, slots=True)
class Settings:
    """All of `serve`'s settings. Sizes in bytes, times in seconds."""

    model: str = setting(DEFAULT_MODEL, "builtin name, Hugging Face folder, .gguf file or hub id", "model")
    served_model_name: str = setting("", "name in /v1/models; default: taken from the model", "model")
    dtype: str = setting("auto", "weights and activations", "model", choices=("auto", "bfloat16", "float16", "float32"))
    quantize: str = setting(
        "none", "integer weights for steps of few tokens (CPU)", "model", choices=("none", "int8", "int4")
    )
    cpu_kernels: str = setting(
        "auto", "C kernels between the matrices of a step on CPU, built once by the C compiler that is there; auto: "
        "without them where there is none", "model", choices=("auto", "on", "off"),
    )  # fmt: skip
    cpu_weights: str = setting(
        "auto", "on CPU, once: weights in oneDNN's blocks; twice: as plain rows too, for single streams; auto: twice "
        "where a quarter of the free memory holds it", "model", choices=("auto", "once", "twice"),
    )  # fmt: skip
    device: str = setting("auto", "where the backbone runs", "model", choices=("auto", "cpu", "cuda"))
    cuda_graphs: str = setting(
        "on", "replay decode steps on a GPU as captured CUDA graphs", "model", choices=("on", "off")
    )
    threads: int = setting(0, "compute threads of the engine; 0: as many as the CPU quota gives", "model")
    max_model_len: int = setting(
        0, "longest prompt + answer in tokens; 0: the model's own limit, at most 8192", "model"
    )

    memory: tuple[str, ...] = setting((), "memory pack to attach: PATH or NAME=PATH; may be repeated", "memory")
    packs_dir: str = setting("", "folder that an admin may attach memory packs from while serving", "memory")
    edits_db: str = setting(
        "", "file that keeps facts and redirects taught while serving; without it there are none", "memory"
    )
    max_edits_per_tenant: int = setting(1000, "facts and redirects that one tenant may keep", "memory")
    max_edit_tokens: int = setting(128, "longest fact, prompt and completion together", "memory")
    prefetch: str = setting("on", "fetch rows ahead of the layer that reads them", "memory", choices=("on", "off"))
    keep_up_projection: bool = setting(
        False, "keep what a STEM memory replaces, so that requests may do without the memory", "memory"
    )
    placement: tuple[str, ...] = setting(
        ("auto",), "where tables live: auto, device, pinned or mapped; NAME=… for one pack, NAME/LAYER=… for one table",
        "memory",
    )  # fmt: skip
    read: str = setting(
        "mmap", "how mapped tables are read; pread is slower, and survives a failing disk", "memory",
        choices=("mmap", "pread"),
    )  # fmt: skip
    host_memory_limit: int = setting(
        0, "most bytes of RAM that tables may hold, resident pages of mapped ones included; 0: no limit", "memory",
        size=True,
    )  # fmt: skip
    staging: int = setting(64 * MIB, "bytes of staging buffers for fetched rows", "memory", size=True)
    device_cache: int = setting(
        0, "bytes of device memory that keep the rows most asked for; 0: none", "memory", size=True
    )
    hot_list: str = setting(
        "on", "keep the hottest n-grams over restarts (with a device cache)", "memory", choices=("on", "off")
    )

    max_num_seqs: int = setting(64, "sequences running at once", "scheduler")
    max_num_batched_tokens: int = setting(512, "tokens computed per step: decode first, the rest prefill", "scheduler")
    kv_bytes: int = setting(
        0, "bytes for KV blocks; 0: a quarter of free memory, 2 GiB at most; on a GPU three quarters of what is left",
        "scheduler", size=True,
    )  # fmt: skip
    block_size: int = setting(16, "tokens per KV block", "scheduler")
    prefix_cache: str = setting("on", "share KV blocks of equal prompt prefixes", "scheduler", choices=("on", "off"))

    host: str = setting("127.0.0.1", "address to bind", "http")
    port: int = setting(8000, "port to bind", "http")
    max_logprobs: int = setting(20, "most alternatives a request may ask for", "http")
    max_body_bytes: int = setting(16 * MIB, "largest request body", "http", size=True)
    max_waiting: int = setting(1024, "requests waiting before new ones are refused with 429", "http")
    max_waiting_tokens: int = setting(
        1_000_000, "prompt tokens waiting before new requests are refused with 429", "http"
    )
    max_concurrency_per_key: int = setting(0, "requests one API key may have running or waiting; 0: any number", "http")
    request_timeout: float = setting(3600.0, "longest time a request may take, its answer included; 0: any", "http")
    body_timeout: float = setting(60.0, "longest time a client may take to send a request", "http")
    drain_seconds: float = setting(15.0, "on SIGTERM, finish running requests for this long, then abort", "http")
    log_level: str = setting("info", "how much to log", "http", choices=("debug", "info", "warning", "error"))
    log_format: str = setting("text", "log lines for people or for machines", "http", choices=("text", "json"))
    log_prompts: bool = setting(False, "log the text of every prompt", "http")
    in_process: bool = setting(False, "run the engine in a thread of the API process (debugging)", "http")

    vllm_metrics: bool = setting(False, "export queued, running and KV use as vllm:… too, for gateways", "metrics")
    metrics_buckets: tuple[str, ...] = setting(
        (), "bounds of one histogram in place of its own: NAME=0.01:0.1:1; may be repeated", "metrics"
    )
    api_key: tuple[str, ...] = setting(
        (), "key that clients must send as Authorization: Bearer KEY; may be repeated", "security", secret=True
    )
    api_keys_file: str = setting("", "file of keys, one a line: NAME: KEY", "security")
    admin_key: str = setting(
        "", "key for changing what the server serves; works as an API key too", "security", secret=True
    )
    no_auth: bool = setting(False, "listen on other addresses than this machine's own without any key", "security")
    cors_origin: tuple[str, ...] = setting(
        (), "origin whose web pages may call this server, such as https://chat.example; may be repeated", "security"
    )
    ssl_certfile: str = setting("", "certificate chain in PEM; with it the server speaks TLS", "security")
    ssl_keyfile: str = setting("", "private key in PEM; default: in the certificate's file", "security")
    ssl_keyfile_password: str = setting("", "password of the private key", "security", secret=True)
    ssl_ca_certs: str = setting("", "CA certificates that client certificates are checked with", "security")
    ssl_cert_reqs: int = setting(0, "client certificates: 0 not asked for, 1 optional, 2 required", "security")
    ssl_ciphers: str = setting("", "cipher list in OpenSSL's form; default: Python's", "security")

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
        for asked in self.placement:
            if asked.rpartition("=")[2] not in PLACEMENTS:
                raise SettingsError(f"--placement is {asked!r}; write [NAME=]{'|'.join(PLACEMENTS)}")
        if self.port > 65535:
            raise SettingsError(f"--port is {self.port}; it must be at most 65535")
        buckets_from(self.metrics_buckets)
        if self.ssl_cert_reqs > 2:
            raise SettingsError(f"--ssl-cert-reqs is {self.ssl_cert_reqs}; it must be 0, 1 or 2")
        object.__setattr__(self, "api_key", tuple(hashed_key(key, "--api-key") for key in self.api_key))
        object.__setattr__(self, "admin_key", self.admin_key and hashed_key(self.admin_key, "--admin-key"))


def hashed_key(key: str, origin: str) -> str:
    """`sha256:` and the digest, which is all that is kept of a key; what has that form already stays as it is.

    Raises SettingsError, without the key, for one that no HTTP header can carry.
    """
    if HASHED_KEY.fullmatch(key):
        return key
    if not KEY.fullmatch(key):
        raise SettingsError(f"{origin}: a key is 1 to 512 visible ASCII characters without spaces")
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def cache_folder() -> Path:
    """Where files that can be made again are kept between runs: $XDG_CACHE_HOME/engram-server, or under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "engram-server"


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
    try:
        content = _yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path} cannot be read: {error}") from None
    except Exception as error:  # a malformed value fails in whatever way PyYAML meets it, with hardly a word
        said = " ".join(str(error).split()) or type(error).__name__
        raise SettingsError(f"--config {path} is not valid YAML: {said}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"--config {path} holds a {type(content).__name__}; it must hold lines such as port: 8000")
    named = {str(key): value for key, value in content.items()}
    return {_known(key, path): typed(_known(key, path), value, f"{key} in {path}") for key, value in named.items()}


def _yaml(text: str) -> Any:
    """Raises for what is no YAML, and for what no setting needs: aliases, which can make a few lines stand for
    gigabytes, lists within lists within lists, and integers of thousands of digits."""
    import yaml  # here, since most starts have no file

    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > MOST_DEPTH:
            raise ValueError(f"it has an alias (*name), or nests deeper than {MOST_DEPTH} levels")
    content = yaml.safe_load(text)
    str(content)  # fails for an integer that could not be shown
    return content


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
