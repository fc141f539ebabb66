"""KV blocks: who holds which, and which hold a prefix that someone may want again.

    free, plain ──allocate──► held (ref ≥ 1) ──release──► free, plain          (not full, or prefix cache off)
                                │   ▲            └──────► free, cached ─┐      (full: its hash stays findable)
                                │   └────────────match────────────────┘
                                └ published: its hash is known once its tokens are computed

A block's hash is a chain: BLAKE2b over the parent's hash and the block's token ids, seeded by the memory view's key.
Two sequences meet in a block only if all tokens up to its end, the view and the tenant's salt agree. Knows ids of
blocks, never what is stored in them.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

import numpy as np

from server.batch import Ints


def chain(parent: bytes, token_ids: Ints) -> bytes:
    """The hash of a full block that follows `parent` (the view's key for the first block). 16 bytes."""
    return blake2b(parent + token_ids.astype(np.int64).tobytes(), digest_size=16).digest()


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. Block 0 is never handed out: padding points at it."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.block_size, self.num_blocks, self.prefix_cache = block_size, num_blocks, prefix_cache
        self._references = [0] * num_blocks
        self._plain = list(range(num_blocks - 1, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # free blocks with a hash, least recently freed first
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        return len(self._plain) + len(self._cached)

    @property
    def usable(self) -> int:
        return self.num_blocks - 1

    @property
    def used(self) -> int:
        return self.usable - self.free

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None (and nothing changed) if so many are not free."""
        if count > self.free:
            return None
        blocks = [self._take() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def _take(self) -> int:
        if self._plain:
            return self._plain.pop()
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        return block

    def match(self, seed: bytes, token_ids: Ints) -> tuple[list[int], list[bytes]]:
        """The longest chain of cached blocks that starts `token_ids`, one token short of all of it at most.

        Takes a reference on each block. One token is always left: its logits have to be computed.
        """
        blocks: list[int] = []
        hashes: list[bytes] = []
        if not self.prefix_cache:
            return blocks, hashes
        parent = seed
        for start in range(0, len(token_ids) - self.block_size, self.block_size):
            parent = chain(parent, token_ids[start : start + self.block_size])
            block = self._block_of.get(parent)
            if block is None:
                break
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
            blocks.append(block)
            hashes.append(parent)
        return blocks, hashes

    def publish(self, block: int, block_hash: bytes) -> None:
        """Makes a held, full, computed block findable. The first block of a hash stays; later twins are plain."""
        if self.prefix_cache and block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def release(self, blocks: list[int]) -> None:
        """Drops one reference on each; deepest first, so that a prefix's end is evicted before its start."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._plain.append(block)

    def forget(self) -> None:
        """Drops every cached prefix that nobody holds, and the hashes of those that are held."""
        self._plain.extend(self._cached)
        self._cached.clear()
        self._block_of.clear()
        self._hash_of.clear()

    def check(self, held: list[list[int]]) -> None:
        """Raises AssertionError unless the books agree with the block lists of all living sequences."""
        counts = [0] * self.num_blocks
        for blocks in held:
            for block in blocks:
                counts[block] += 1
        assert counts == self._references, "references differ from the holders"
        free = set(self._plain) | set(self._cached)
        assert len(free) == self.free, "a block is free twice"
        assert free == {b for b in range(1, self.num_blocks) if counts[b] == 0}, "a block leaked"
        assert {b: h for h, b in self._block_of.items()} == self._hash_of, "hash books differ"
