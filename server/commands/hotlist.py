"""`hotlist`: makes a pack's hot list from a text of the kind that the server will read: the first start is warm then.

Counts the text's n-grams, as the pack addresses them, and keeps the most frequent of each layer and order. Of a text
that is given on purpose every n-gram may be kept; what the server itself saves holds only those of several requests.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from server.errors import PackError, SettingsError
from server.memory.addressing import from_config, windows_of
from server.memory.attachment import fingerprint
from server.memory.compression import compression_map, map_sha256
from server.memory.hot_list import HotList, hot_list_path, hottest
from server.memory.pack import StemConfig, read_config
from server.models.source import open_source
from server.settings import DEFAULT_MODEL

PIECE = 1 << 20  # tokens whose windows are held at once


def hotlist(*, model: str = DEFAULT_MODEL, memory: Path, corpus: Path, most: int = 200_000) -> tuple[Path, HotList]:
    """Writes the list, at most `most` n-grams of each layer and order; returns it and where it is.

    Raises PackError for a pack or text that cannot be read, SettingsError where the list cannot be written.
    """
    config = read_config(memory)
    source = open_source(model)
    if isinstance(config, StemConfig):
        addresser = from_config(config.addressing())
    else:
        mapping = compression_map(source.tokenizer.backend)
        config.check_backbone(
            hidden_size=source.config.hidden_size,
            num_layers=source.config.num_layers,
            vocab_size=source.config.vocab_size,
            sha256=map_sha256(mapping),
            compressed=int(mapping.max()) + 1,
        )
        addresser = from_config(config.addressing(), tokenizer=source.tokenizer.backend)
    windows, blocked = windows_of(source.tokenizer.encode(read_corpus(corpus)), addresser.n)
    lists = {}
    for layer in addresser.layer_ids:
        parts = range(0, len(windows), PIECE)
        mix = np.concatenate([addresser.mix(layer, windows[at : at + PIECE], blocked[at : at + PIECE]) for at in parts])
        for index, order in enumerate(addresser.orders):
            lists[layer, order] = hottest(*np.unique(mix[:, index], return_counts=True), most)
    made = HotList(fingerprint(memory, config.layer_ids), lists, time.time())
    path = hot_list_path(made.fingerprint)
    try:
        made.write(path)
    except OSError as error:
        raise SettingsError(f"the hot list cannot be written to {path}: {error.strerror}; set XDG_CACHE_HOME") from None
    return path, made


def read_corpus(path: Path) -> str:
    """Raises PackError for a file that is no text, or an empty one."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PackError(f"--corpus {path} is no readable UTF-8 text: {error}") from None
    if not text.strip():
        raise PackError(f"--corpus {path} is empty; give a text of the kind that the server will read")
    return text
