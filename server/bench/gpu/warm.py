"""A cache that has read the first half of the text, as a server's has what came before: the second half is new to it.

Hit rates are then those of text never seen, after a history of only so much text in so many languages: less than a
server that has run for a day would find. N-grams enter by frequency, the hottest first, the way a hot list does.
"""

from __future__ import annotations

import numpy as np

from server.batch import Ints
from server.bench.gpu.trace import Trace, spoken
from server.cache.hot_rows import HotRows
from server.memory.addressing import windows_of
from server.memory.attachment import Attachment

CHUNK = 1 << 16  # entries that enter at once


def warm(hot: HotRows, pack: Attachment, trace: Trace, languages: int, vocab: int) -> int:
    """How many n-grams entered. Before the cache is used."""
    entered = 0
    for (_, layer), source in hot.sources.items():
        if source.table is not pack.tables.get(layer):
            continue
        mixes = np.concatenate([mixes_of(pack, layer, trace, language, vocab) for language in range(languages)])
        for index, order in enumerate(source.orders):
            keys, counts = np.unique(mixes[:, index], return_counts=True)
            hottest = np.argsort(-counts, kind="stable")[: hot.pools[source.entry_bytes].capacity]
            for at in range(0, len(hottest), CHUNK):
                some = keys[hottest[at : at + CHUNK]]
                row_ids = pack.addresser.rows_of_mix(layer, order, some)
                entered += hot.adopt(source, index, some, counts[hottest[at : at + CHUNK]], row_ids)
    return entered


def mixes_of(pack: Attachment, layer: int, trace: Trace, language: int, vocab: int) -> Ints:
    """[T, O] the hashes of the text's first half, told in a language."""
    half = trace.ids[: trace.half].astype(np.int64)[None]
    ids = spoken(half, np.array([language]), vocab)[0]
    mix: Ints = pack.addresser.mix(layer, *windows_of(ids, pack.addresser.n))
    return mix
