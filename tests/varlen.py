"""What torch's documentation says of `varlen_attn` over a paged cache, in float64, and what FlashAttention 2 wants."""

from __future__ import annotations

import torch
from torch import Tensor


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """query[T, Hq, D], key and value[blocks, block_size, Hk, D]. Queries are the last ones of their sequence's keys;
    of the keys around its own, each sees `window_size` to the left and to the right, -1: all.
    """
    assert cu_seq_k is not None and seqused_k is not None and block_table is not None and return_aux is None
    sequences, (_, block_size, kv_heads, width) = len(cu_seq_q) - 1, key.shape
    for tensor, shape in (
        (cu_seq_q, (sequences + 1,)),
        (cu_seq_k, (sequences + 1,)),
        (seqused_k, (sequences,)),
        (block_table, (sequences, block_table.shape[1])),
    ):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous() and tensor.shape == shape
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1 and value.shape == key.shape
    group, rest = divmod(query.shape[1], kv_heads)
    assert not rest and enable_gqa == (group > 1)
    counts = cu_seq_q.diff()
    assert counts.max() <= max_q and seqused_k.max() <= max_k <= block_table.shape[1] * block_size
    # elsewhere FlashAttention 2 splits contexts wrongly if left the choice
    assert num_splits == 1 or (num_splits is None and max_q == 1 and group > 1 and window_size == (-1, -1))
    out = torch.empty_like(query)
    for b, (start, stop) in enumerate(zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True)):
        used, (left, right) = int(seqused_k[b]), window_size
        pages = block_table[b, : -(-used // block_size)].long()
        k, v = (
            pool[pages].flatten(0, 1)[:used].double().repeat_interleave(group, dim=1).transpose(0, 1)
            for pool in (key, value)
        )
        ahead = torch.arange(used) - torch.arange(used - (stop - start), used)[:, None]
        seen = (ahead >= (-left if left >= 0 else -used)) & (ahead <= (right if right >= 0 else used))
        score = query[start:stop].double().transpose(0, 1) @ k.transpose(1, 2) * (scale or width**-0.5)
        out[start:stop] = (score.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1).to(out.dtype)
    return out
