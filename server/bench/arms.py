"""Arms: engines over one backbone that take turns step by step, over the same forced tokens of real text.

On a shared machine only this resolves a per cent: each turn gives one step of every arm, in random order, and so one
ratio for every pair. A small model's own greedy text repeats itself and would make hit rates meaningless, so the token
is sampled as ever and then replaced by the text's.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from server.bench.traces import texts
from server.cache.counters import LayerCounters
from server.cache.prefetcher import Prefetcher
from server.cache.row_table import Table
from server.memory.addressing import windows_of
from server.memory.memories import Memories
from server.models.attention.kv_cache import KVCache
from server.models.c_kernels import attention_over
from server.models.tokenizer import Tokenizer
from server.runtime.engine import Engine
from server.runtime.load import Loaded, device_cache, open_packs, placed, prepack_modules
from server.runtime.messages import SamplingParams, Submit
from server.runtime.process import build_engine
from server.runtime.sampler import Sampled, sample
from server.runtime.sequence import Sequence as Running
from server.settings import Settings

PROMPT_TOKENS, ROUND, WARM_TURNS = 64, 240, 6

Text = tuple[int, ...]


@dataclass(slots=True)
class Arm:
    """An engine, its steps' seconds, and what each of its tables had counted before and after each round of them."""

    engine: Engine
    seconds: list[float] = field(default_factory=list)
    counted: list[tuple[LayerCounters, LayerCounters]] = field(default_factory=list)

    def tables(self) -> tuple[LayerCounters, ...]:
        memories = self.engine.runner.memories
        return memories.counters() if memories is not None else ()


def build_arm(loaded: Loaded, settings: Settings, tier: str, tables: Mapping[str, Table] | None = None) -> Arm:
    """An engine over the loaded weights. `tables`: device tables made before, by name."""
    cache = KVCache(loaded.source.config, loaded.kv.blocks, settings.block_size, loaded.dtype, loaded.device)
    packs = open_packs(settings, loaded.source, loaded.dtype, loaded.device)
    for pack in packs:
        prepack_modules(pack, loaded.dtype, loaded.device, loaded.kernels, loaded.rows)
        pack.allocate_conv(loaded.kv.blocks * settings.block_size, loaded.device)
        for layer, table in pack.tables.items():
            known = (tables or {}).get(table.name)
            pack.tables[layer] = known if known is not None else placed(table, tier, loaded.device)
    hot = device_cache(settings, packs, loaded.device)
    prefetcher = Prefetcher(loaded.dtype, loaded.device, settings.staging, settings.prefetch == "on", hot)
    memories = Memories(packs, prefetcher) if packs else None
    attention = attention_over(loaded.source.config, cache, loaded.kernels)
    return Arm(build_engine(settings, replace(loaded, attention=attention, memories=memories)))


def pieces_of(tokenizer: Tokenizer, count: int, length: int) -> list[Text]:
    """`count` pieces of real text, `length` tokens each, from all over the first text there is."""
    _, text = next(iter(texts()))
    stride = len(text) // count
    made = []
    for index in range(count):
        ids = tokenizer.encode(text[index * stride : index * stride + 12 * length])
        made.append(tuple(ids[:length]))
    return made


def forced(texts: Mapping[str, Text]) -> Callable[..., list[Sampled]]:
    """A sampler that works as ever and then answers with the text's next token."""

    def sampled(logits: torch.Tensor, sequences: list[Running]) -> list[Sampled]:
        found = sample(logits, sequences)
        return [Sampled(texts[s.request_id][s.length], f.logprobs) for s, f in zip(sequences, found, strict=True)]

    return sampled


def start(engine: Engine, pieces: Sequence[Text]) -> None:
    """All pieces decoding from their prompts on, each seeing every pack of the engine."""
    for sequence in engine.scheduler.sequences():
        engine.abort(sequence.request_id)
    engine.pool.forget()
    named = {str(index): piece for index, piece in enumerate(pieces)}
    engine.runner.sample = forced(named)
    for name, piece in named.items():
        params = SamplingParams(max_tokens=len(piece) - PROMPT_TOKENS, temperature=0, ignore_eos=True)
        engine.submit(Submit(name, piece[:PROMPT_TOKENS], params, tuple(engine.packs)))
    while engine.scheduler.waiting or any(s.pending > 1 for s in engine.scheduler.running):
        engine.step()


def warm_pages(arm: Arm, pieces: Sequence[Text]) -> None:
    """Has the pages of the pieces' rows in the page cache, as if somebody had read them once; maps none of them."""
    memories = arm.engine.runner.memories
    for pack in memories.packs if memories is not None else ():
        for piece in pieces:
            for layer, (rows, _) in pack.address(*windows_of(piece, pack.addresser.n)).items():
                pack.tables[layer].page_in(np.unique(rows))


def alternate(arms: Mapping[str, Arm], pieces: Sequence[Text], count: int, seconds: float) -> None:
    """Steps of `count` sequences for about so many seconds: rounds of ROUND turns, each round over other pieces."""
    draw, orders = random.Random(count), list[list[str]]()
    for arm in arms.values():
        arm.seconds.clear()
        arm.counted.clear()
    ends, at = time.perf_counter() + seconds, 0
    first, before = next(iter(arms.values())), dict[str, tuple[LayerCounters, ...]]()
    while not first.seconds or time.perf_counter() < ends:
        chosen = [pieces[(at + index) % len(pieces)] for index in range(count)]
        at += count
        for arm in arms.values():
            warm_pages(arm, chosen)
            start(arm.engine, chosen)
        for turn in range(ROUND):
            if turn == WARM_TURNS:
                before = {name: arm.tables() for name, arm in arms.items()}
            orders = orders or balanced(list(arms), draw)
            for name in orders.pop():
                begun = time.perf_counter()
                arms[name].engine.step()
                if turn >= WARM_TURNS:
                    arms[name].seconds.append(time.perf_counter() - begun)
            if turn > 4 * WARM_TURNS and time.perf_counter() > ends:
                break
        for name, arm in arms.items():
            arm.counted.extend(zip(before[name], arm.tables(), strict=True))


def balanced(names: list[str], draw: random.Random) -> list[list[str]]:
    """As many orders as there are names, drawn at random, in which each name stands at each place once."""
    drawn = draw.sample(names, len(names))
    orders = [drawn[at:] + drawn[:at] for at in range(len(drawn))]
    return draw.sample(orders, len(orders))


def device_tables(arm: Arm) -> dict[str, Table]:
    memories = arm.engine.runner.memories
    assert memories is not None
    return {table.name: table for pack in memories.packs for table in pack.tables.values()}


def close(*arms: Arm) -> None:
    for arm in arms:
        memories = arm.engine.runner.memories
        if memories is not None:
            memories.close()
