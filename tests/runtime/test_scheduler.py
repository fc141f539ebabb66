"""Whatever is submitted, aborted or preempted: nothing leaks, everyone finishes, prefixes are shared only rightly."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from server.runtime.blocks import BlockPool, chain
from server.runtime.messages import SamplingParams
from server.runtime.scheduler import Scheduler
from server.runtime.sequence import Sequence
from server.view import MemoryView

MAX_LEN = 48
VIEWS = [MemoryView(), MemoryView((("a", "1"),)), MemoryView((), b"tenant")]


def sequence(name: str, tokens: list[int], max_tokens: int = 4, view: MemoryView = VIEWS[0]) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence.create(name, 0, tuple(tokens), params, view, seed=0, eos_ids=(), max_model_len=MAX_LEN)


def run_step(scheduler: Scheduler) -> list[Sequence]:
    """Computes one step as the engine does, with token (position mod 7) as every sample; returns those that ended."""
    ended = []
    works = scheduler.schedule()
    assert sum(w.tokens for w in works) <= scheduler.budget
    for work in works:
        assert work.start == work.sequence.computed and work.tokens >= 1
        assert len(work.sequence.blocks) * scheduler.pool.block_size >= work.start + work.tokens
        scheduler.computed(work)
    for work in works:
        if work.sequence.pending == 0:
            work.sequence.append(work.sequence.length % 7)
            if work.sequence.finish_reason:
                scheduler.finish(work.sequence)
                ended.append(work.sequence)
    scheduler.check()
    return ended


@settings(max_examples=150)
@given(st.data())
def test_any_schedule_finishes_and_leaks_nothing(data: st.DataObject) -> None:
    block_size = data.draw(st.sampled_from([1, 4, 8]))
    blocks = -(-MAX_LEN // block_size) + 1 + data.draw(st.integers(0, 20))
    pool = BlockPool(blocks, block_size, prefix_cache=data.draw(st.booleans()))
    scheduler = Scheduler(
        pool, max_num_seqs=data.draw(st.integers(1, 6)), max_num_batched_tokens=data.draw(st.integers(1, 40))
    )
    alive: dict[str, Sequence] = {}
    for number in range(data.draw(st.integers(1, 12))):
        tokens = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=MAX_LEN - 8))
        parent = sequence(f"r{number}", tokens, data.draw(st.integers(1, 8)), data.draw(st.sampled_from(VIEWS)))
        parent.children = [sequence(f"r{number}c{c}", tokens) for c in range(data.draw(st.integers(0, 2)))]
        for member in [parent, *parent.children]:
            alive[member.request_id] = member
        scheduler.add(parent)
        for _ in range(data.draw(st.integers(0, 3))):
            for done in run_step(scheduler):
                del alive[done.request_id]
        if alive and data.draw(st.booleans()):
            victim = data.draw(st.sampled_from(sorted(alive)))
            scheduler.finish(alive.pop(victim))
            scheduler.check()
    for _ in range(5000):
        if scheduler.idle:
            break
        for done in run_step(scheduler):
            del alive[done.request_id]
    assert not alive
    assert pool.used == 0 and pool.free == pool.usable


def test_the_youngest_is_preempted_and_comes_back() -> None:
    pool = BlockPool(13, 4, prefix_cache=False)
    scheduler = Scheduler(pool, max_num_seqs=4, max_num_batched_tokens=64)
    old, young = sequence("old", [1] * 20, 20), sequence("young", [2] * 20, 20)
    scheduler.add(old)
    scheduler.add(young)
    order = []
    while not scheduler.idle:
        order += [done.request_id for done in run_step(scheduler)]
    assert order == ["old", "young"]
    assert young.preemptions >= 1 and old.preemptions == 0
    assert young.generated == 20


def test_a_prefix_is_shared_only_under_the_same_view() -> None:
    prompt = list(range(16))
    for first in VIEWS:
        for second in VIEWS:
            pool = BlockPool(32, 4)
            scheduler = Scheduler(pool, max_num_seqs=1, max_num_batched_tokens=64)
            scheduler.add(sequence("a", prompt, 1, first))
            scheduler.add(sequence("b", prompt, 1, second))
            while not scheduler.idle:
                run_step(scheduler)
            assert scheduler.prefix_hits == (12 if first == second else 0)


def test_a_full_prompt_hit_leaves_one_token_to_compute() -> None:
    pool = BlockPool(32, 4)
    held = pool.allocate(3)
    assert held is not None
    tokens = np.arange(12)
    parent = VIEWS[0].key
    for i, block in enumerate(held):
        parent = chain(parent, tokens[4 * i : 4 * i + 4])
        pool.publish(block, parent)
    assert len(pool.match(VIEWS[0].key, tokens)[0]) == 2
    assert len(pool.match(VIEWS[0].key, np.arange(13))[0]) == 3
    assert pool.match(VIEWS[0].key, np.array([9, *range(1, 12)]))[0] == []


def test_cached_blocks_are_evicted_oldest_first_and_only_when_needed() -> None:
    pool = BlockPool(5, 2)
    blocks = pool.allocate(4)
    assert blocks is not None
    tokens, parent = np.arange(8), b"seed"
    for i, block in enumerate(blocks):
        parent = chain(parent, tokens[2 * i : 2 * i + 2])
        pool.publish(block, parent)
    pool.release(blocks)
    assert pool.free == 4
    assert pool.allocate(2) is not None  # takes the deepest two, so that the prefix's start survives
    assert pool.match(b"seed", np.arange(9))[0] == blocks[:2]
    assert pool.allocate(1) is None


def test_allocation_that_does_not_fit_changes_nothing() -> None:
    pool = BlockPool(4, 2)
    assert pool.allocate(4) is None
    assert pool.free == 3
