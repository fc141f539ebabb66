"""How many KV blocks there are, and why that many."""

from __future__ import annotations

from dataclasses import dataclass

from server.errors import CapacityError
from server.runtime.host import available_memory
from server.settings import GIB, Settings

DEFAULT_KV_BYTES = 2 * GIB


@dataclass(frozen=True, slots=True)
class KVPlan:
    blocks: int
    block_bytes: int
    reason: str


def plan_kv(settings: Settings, *, block_bytes: int, max_len: int, available: int | None = None) -> KVPlan:
    """Blocks for the KV cache; `block_bytes` counts everything stored per block, `max_len` the longest sequence.

    Never more than all running sequences at full length could use. Raises CapacityError if not even one sequence of
    `max_len` tokens fits, naming the value that would.
    """
    available = available_memory() if available is None else available
    one = -(-max_len // settings.block_size) + 1  # block 0 is padding
    most = settings.max_num_seqs * (one - 1) + 1
    if settings.kv_bytes:
        budget, source = settings.kv_bytes, "--kv-bytes"
    else:
        budget = min(DEFAULT_KV_BYTES, available // 4)
        source = "2 GiB, the default" if budget == DEFAULT_KV_BYTES else "a quarter of the free memory"
    blocks = min(budget // block_bytes, most)
    if blocks < one:
        longest = max((budget // block_bytes - 1) * settings.block_size, 0)
        raise CapacityError(
            f"{source} holds {longest} tokens of KV cache and one sequence of --max-model-len {max_len} needs more; "
            f"set --kv-bytes {one * block_bytes} or --max-model-len {max(longest, settings.block_size)}"
        )
    if blocks * block_bytes > available:
        raise CapacityError(
            f"the KV cache would take {blocks * block_bytes} bytes and {available} are free; "
            f"set --kv-bytes {available // 2}"
        )
    reason = f"all of --max-num-seqs {settings.max_num_seqs} at full length" if blocks == most else source
    return KVPlan(blocks, block_bytes, reason)
