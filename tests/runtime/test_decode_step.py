"""Decode steps driven by hand: rows and positions in, tokens out, nothing touched that is not theirs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from server.models import fused
from server.models.attention.kv_cache import KVCache
from server.models.attention.paged import PagedBackend
from server.models.attention.sdpa import SdpaBackend
from server.models.decoder import Decoder, States
from server.runtime.decode_graph import undone_if_it_fails
from server.runtime.decode_inputs import Sampling
from server.runtime.decode_step import DecodeSteps, bucket_sizes, no_room
from server.view import BARE
from tests.decoders import BLOCK_SIZE, chosen, random_decoder

CPU = torch.device("cpu")
WINDOW, MAX_LEN = 3, 64
PROMPTS = [[5, 9, 11, 2, 7, 30, 31, 8, 1], [3], [40, 41, 42, 43]]


def greedy(count: int) -> Sampling:
    return Sampling.plain(np.zeros(count), np.zeros(count, np.int64))


@pytest.fixture(params=["references", "interpreter"])
def kernels_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Kernels by their torch references, and through Triton's interpreter where that runs."""
    from tests.kernels.conftest import missing

    if request.param == "references":
        monkeypatch.setattr("kernels.language.interpreting", False)
    elif (reason := missing()) is not None:
        pytest.skip(reason)
    return str(request.param)


def decode_steps(model: Decoder, **options: object) -> DecodeSteps:
    cache = KVCache(model.config, 14, BLOCK_SIZE, torch.float32, CPU)
    sizes = dict(max_num_seqs=4, max_len=MAX_LEN, block_size=BLOCK_SIZE, window=WINDOW, dummy_block=13)
    return DecodeSteps(model, PagedBackend(model.config, cache), None, **sizes, **options, device=CPU, graphs=False)


def prefilled(steps: DecodeSteps) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The prompts in rows 2, 0 and 3, all but their last tokens computed. → rows, positions, block tables."""
    rows = np.array([2, 0, 3])
    tables = np.zeros((3, MAX_LEN // BLOCK_SIZE), np.int64)
    tables[:, :4] = 1 + np.arange(12).reshape(3, 4)
    for row, table, prompt in zip(rows, tables, PROMPTS, strict=True):
        ids, at = np.array(prompt), np.arange(len(prompt))
        for position in range(len(prompt) - 1):  # through the steps themselves, one token at a time
            steps.write_tokens(np.full(position + 1, row), at[: position + 1], ids[: position + 1])
            steps.launch(
                np.array([row]),
                np.array([position]),
                table[[position // BLOCK_SIZE]],
                greedy(1),
                [BARE],
            )
        steps.write_tokens(np.full(len(prompt), row), at, ids)
    return rows, np.array([len(prompt) - 1 for prompt in PROMPTS]), tables


def run(steps: DecodeSteps, count: int, read_late: bool) -> list[list[int]]:
    """`count` tokens after each prompt; read after each launch, or one launch later."""
    rows, positions, tables = prefilled(steps)
    answers: list[list[int]] = [[] for _ in PROMPTS]
    waiting = []
    for _ in range(count):
        blocks = tables[np.arange(3), positions // BLOCK_SIZE]
        waiting.append(steps.launch(rows, positions, blocks, greedy(3), [BARE] * 3))
        positions = positions + 1
        while len(waiting) > read_late:
            for answer, token in zip(answers, waiting.pop(0).tokens(), strict=True):
                answer.append(token)
    for launched in waiting:
        for answer, token in zip(answers, launched.tokens(), strict=True):
            answer.append(token)
    return answers


@pytest.mark.parametrize("states", [None, fused.states], ids=["operators", "fused"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_the_tokens_are_those_of_the_whole_context_computed_at_once(
    kind: str, states: States | None, kernels_by: str
) -> None:
    model = random_decoder(kind)
    count = 12 if kernels_by == "references" else 3
    expected = [chosen(model, SdpaBackend, prompt, count) for prompt in PROMPTS]
    model.fused = states
    for read_late in (False, True):
        assert run(decode_steps(model), count, read_late) == expected


def test_dummies_touch_their_own_row_and_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.language.interpreting", False)
    steps = decode_steps(random_decoder("llama"), buckets=(4,))
    steps.write_tokens(np.array([1]), np.array([0]), np.array([7]))
    before = steps.tokens.clone()
    steps.launch(np.array([1]), np.array([0]), np.array([2]), greedy(1), [BARE])
    changed = (steps.tokens != before).nonzero().tolist()
    assert {row for row, _ in changed} <= {1, 4} and [1, WINDOW - 1 + 1] in changed
    for layer in steps.attention.cache.layers:
        written = {int(block) for block in layer.flatten(1).any(1).nonzero()}
        assert written == {2, 13}  # block 0 stays zero: padding is read under a mask
    assert steps.blocks[1, 0] == 2 and steps.blocks[4, 0] == 13


def test_tokens_never_read_are_kept_while_others_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.language.interpreting", False)
    expected = run(decode_steps(random_decoder("llama")), 5, False)
    steps = decode_steps(random_decoder("llama"))
    rows, positions, tables = prefilled(steps)
    launched = []
    for step in range(5):
        at = positions + step
        blocks = tables[np.arange(3), at // BLOCK_SIZE]
        launched.append(steps.launch(rows, at, blocks, greedy(3), [BARE] * 3))
    assert [list(told) for told in zip(*(each.tokens() for each in launched), strict=True)] == expected


def test_buckets_end_with_the_most_sequences_there_can_be() -> None:
    assert bucket_sizes(1) == (1,)
    assert bucket_sizes(6) == (1, 2, 4, 6)
    assert bucket_sizes(32) == (1, 2, 4, 8, 16, 24, 32)
    assert bucket_sizes(20) == (1, 2, 4, 8, 16, 20)


@pytest.mark.parametrize("ended", [False, True], ids=["its end failed", "it ended"])
def test_a_capture_that_fails_leaves_stream_and_allocator_as_they_were(
    monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    said: list[object] = []

    def end(device: int, pool: object) -> None:
        if ended:  # the graph's own end has done it, and releases the pool itself
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        said.append(("end", device, pool))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "before")
    monkeypatch.setattr(torch.cuda, "set_stream", said.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *given: said.append(("release", *given)), raising=False)
    with undone_if_it_fails("pool", CPU):
        pass
    assert not said
    with pytest.raises(ZeroDivisionError), undone_if_it_fails("pool", CPU):
        raise ZeroDivisionError
    assert said == ["before", *([] if ended else [("end", 1, "pool"), ("release", 1, "pool")])]


def test_without_room_for_graphs_the_message_says_what_to_lower() -> None:
    message = no_room(64, 256, 1000)
    assert "--max-num-seqs 128" in message and "--kv-bytes" in message and "1000 bytes" in message
