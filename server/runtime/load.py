"""Loading: from settings to a model on its device, with attention, KV blocks and memories, and a report of it all."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from server.errors import CapacityError, SettingsError
from server.models.attention.kv_cache import KVCache, kv_bytes_per_token
from server.models.attention.sdpa import SdpaBackend
from server.models.decoder import Decoder
from server.models.prepack import can_prepack, prepack
from server.models.source import ModelSource, open_source
from server.models.weights import tensors
from server.runtime.capacity import KVPlan, plan_kv
from server.runtime.host import cpu_quota
from server.settings import Settings

LONGEST_DEFAULT = 8192


@dataclass(slots=True)
class Loaded:
    """Everything the engine runs on."""

    source: ModelSource
    model: Decoder
    attention: SdpaBackend
    kv: KVPlan
    max_len: int
    device: torch.device
    dtype: torch.dtype


def choose_device(settings: Settings) -> torch.device:
    """Raises SettingsError for a device that is not there."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device is cuda and no CUDA device is usable here; use --device cpu")
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(settings.device)


def choose_dtype(settings: Settings, source: ModelSource, device: torch.device) -> torch.dtype:
    """The flag's, else the checkpoint's; a CPU without bf16 instructions falls back to fp32."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)  # type: ignore[no-any-return]
    dtype: torch.dtype = getattr(torch, source.config.dtype)
    if device.type == "cpu" and (dtype == torch.float16 or not can_prepack(torch.bfloat16, device)):
        return torch.float32 if not can_prepack(torch.bfloat16, device) else torch.bfloat16
    return dtype


def context_limit(settings: Settings, source: ModelSource) -> int:
    """Tokens of prompt and answer together. Raises SettingsError above the model's own limit."""
    own = source.config.max_position_embeddings
    if settings.max_model_len > own:
        raise SettingsError(
            f"--max-model-len is {settings.max_model_len} and {source.name} was made for {own} positions; "
            f"set --max-model-len {own} or less"
        )
    return settings.max_model_len or min(own, LONGEST_DEFAULT)


def build_model(source: ModelSource, dtype: torch.dtype, device: torch.device, max_len: int) -> Decoder:
    """The backbone with its weights, on `device`, prepacked where that helps. One tensor at a time is in flight."""
    with torch.device(device):
        model = Decoder(source.config, max_len, dtype)
    with torch.inference_mode():
        model.load(tensors(source, dtype))
        if can_prepack(dtype, device):
            prepack(model)
    return model.eval()


def load(settings: Settings) -> Loaded:
    """Loads the backbone. Raises ModelError, SettingsError or CapacityError."""
    torch.set_num_threads(settings.threads or cpu_quota())
    source = open_source(settings.model)
    device = choose_device(settings)
    dtype = choose_dtype(settings, source, device)
    max_len = context_limit(settings, source)
    model = build_model(source, dtype, device, max_len)
    kv = plan_kv(
        settings, block_bytes=settings.block_size * kv_bytes_per_token(source.config, dtype), max_len=max_len
    )
    try:
        cache = KVCache(source.config, kv.blocks, settings.block_size, dtype, device)
    except (RuntimeError, MemoryError) as error:
        raise CapacityError(
            f"no room for {kv.blocks * kv.block_bytes} bytes of KV cache; set --kv-bytes lower"
        ) from error
    attention = SdpaBackend(source.config, cache)
    return Loaded(source, model, attention, kv, max_len, device, dtype)


def weight_bytes(model: Decoder) -> int:
    """Bytes of the weights as stored, a tied embedding counted once unless its packed form is apart."""
    seen = {p.data_ptr(): p.nbytes for p in model.parameters()}
    packed = [m.packed for m in model.modules() if hasattr(m, "packed")]
    return sum(seen.values()) + sum(p.numel() * p.element_size() for p in packed)


def mebibytes(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB"


def describe(loaded: Loaded, settings: Settings) -> list[tuple[str, str]]:
    """The start-up report."""
    kv = loaded.kv
    tokens = (kv.blocks - 1) * settings.block_size
    threads = f", {torch.get_num_threads()} threads" if loaded.device.type == "cpu" else ""
    layout = " prepacked for oneDNN" if can_prepack(loaded.dtype, loaded.device) else ""
    return [
        ("model", f"{loaded.source.name} ({loaded.source.config.architecture}) from {loaded.source.path}"),
        ("device", f"{loaded.device}{threads}"),
        ("dtype", f"{str(loaded.dtype).removeprefix('torch.')}{layout}"),
        ("weights", mebibytes(weight_bytes(loaded.model))),
        (
            "KV cache",
            f"{mebibytes(kv.blocks * kv.block_bytes)} in {kv.blocks:,} blocks of {settings.block_size} tokens "
            f"= {tokens:,} tokens ({kv.reason})",
        ),
        ("context", f"{loaded.max_len:,} tokens, {settings.max_num_seqs} sequences at once"),
    ]

