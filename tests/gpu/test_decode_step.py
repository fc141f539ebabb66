"""Graphs replay what the step computes eagerly, without a wait on the host; and what is said where they do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from server.errors import CapacityError
from server.models import fused
from server.models.attention.kv_cache import KVCache
from server.models.attention.paged import PagedBackend
from server.models.attention.sdpa import SdpaBackend
from server.models.decoder import Decoder
from server.runtime import device_path
from server.runtime.decode_inputs import Sampling
from server.runtime.decode_step import DecodeSteps, Launched
from server.runtime.device_path import DevicePath
from server.view import BARE
from tests.decoders import BLOCK_SIZE, KINDS, chosen, logits_of, random_decoder

CUDA = torch.device("cuda")
MAX_LEN, MOST, PAGES = 128, 5, 16
# what token equality cannot bear: two tokens whose logits differ by less than this may swap
TIE = {torch.float32: 1e-2, torch.bfloat16: 0.3}  # TF32 and bf16 sums in another order


def decode_steps(model: Decoder, *, graphs: bool, buckets: tuple[int, ...] = (1, 2, 5)) -> DecodeSteps:
    model.fused = fused.states
    cache = KVCache(model.config, MOST * PAGES + 2, BLOCK_SIZE, model.dtype, CUDA)
    steps = DecodeSteps(
        model,
        PagedBackend(model.config, cache),
        None,
        max_num_seqs=MOST,
        max_len=MAX_LEN,
        block_size=BLOCK_SIZE,
        window=3,
        device=CUDA,
        dummy_block=MOST * PAGES + 1,
        buckets=buckets,
        graphs=graphs,
    )
    steps.capture()
    assert bool(steps.captured) == graphs
    return steps


def launch(steps: DecodeSteps, count: int, position: int, temperature: float = 0.0) -> Launched:
    """The step of `count` sequences in rows 0, 1, …, all at one position."""
    rows = np.arange(count)
    blocks = 1 + rows * PAGES + position // BLOCK_SIZE
    heat, seeds = np.full(count, temperature, np.float32), rows * 77
    return steps.launch(rows, np.full(count, position), blocks, Sampling.plain(heat, seeds), [BARE] * count)


def run(steps: DecodeSteps, count: int, length: int, temperature: float = 0.0) -> list[list[int]]:
    """`length` tokens of `count` sequences that begin with the tokens 3, 4, …; launched one step ahead."""
    steps.write_tokens(np.arange(count), np.zeros(count, np.int64), 3 + np.arange(count))
    told, last = [], None
    for position in range(length):
        following = launch(steps, count, position, temperature)
        if last is not None:
            told.append(last.tokens())
        last = following
    assert last is not None
    return [*told, last.tokens()]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_graph_gives_the_tokens_of_the_eager_step(kind: str, count: int, temperature: float) -> None:
    model = random_decoder(kind, device=CUDA)
    expected = run(decode_steps(model, graphs=False), count, 40, temperature)
    assert run(decode_steps(model, graphs=True), count, 40, temperature) == expected


@pytest.mark.parametrize("dtype", TIE)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_whole_context_by_torchs_operators(kind: str, dtype: torch.dtype) -> None:
    model = random_decoder(kind, dtype, CUDA)
    answers = np.array(run(decode_steps(model, graphs=True), 3, 40)).T.tolist()
    model.fused = None
    for first, answer in enumerate(answers, start=3):
        logits = logits_of(model, SdpaBackend, [first, *answer[:-1]])
        given = logits.gather(1, torch.tensor(answer, device=CUDA)[:, None])[:, 0]
        assert float((logits.max(-1).values - given).max()) < TIE[dtype]


def test_a_launch_waits_for_nothing() -> None:
    steps = decode_steps(random_decoder("qwen3", device=CUDA), graphs=True)
    run(steps, 3, 4)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        launched = [launch(steps, 3, position) for position in range(4, 6)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(len(each.tokens()) == 3 for each in launched)


def test_the_next_step_is_launched_before_the_last_one_is_done() -> None:
    steps = decode_steps(random_decoder("llama", device=CUDA), graphs=True)
    run(steps, 2, 4)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # clock cycles: about a tenth of a second
    first, second = launch(steps, 2, 4), launch(steps, 2, 5)
    for launched in (first, second):
        assert launched._done is not None and not launched._done.query()
    assert len(second.tokens()) == 2


def test_dummies_leave_the_padding_block_as_it_is() -> None:
    steps = decode_steps(random_decoder("llama", device=CUDA), graphs=True)
    run(steps, 3, 20)
    for layer in steps.attention.cache.layers:
        assert not layer[0].any()


def test_without_room_the_message_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: DecodeSteps, batch: object, arrive: object) -> None:
        torch.empty(1 << 46, dtype=torch.uint8, device=CUDA)

    monkeypatch.setattr(DecodeSteps, "_compute", full)
    with pytest.raises(CapacityError, match="--max-num-seqs 2"):
        decode_steps(random_decoder("llama", device=CUDA), graphs=True)


def test_a_failed_capture_leaves_steps_that_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host sync is not legal in a capture; the same steps then run eagerly."""
    inner = DecodeSteps._compute

    def syncing(self: DecodeSteps, batch: object, arrive: object) -> None:
        inner(self, batch, arrive)  # type: ignore[arg-type]
        self._sampled.tolist()

    model = random_decoder("llama", device=CUDA)
    expected = np.array([chosen(model, SdpaBackend, [first], 6) for first in (3, 4)]).T.tolist()
    path = DevicePath(MOST * PAGES + 1)
    attention = path.choose_attention(
        model.config, KVCache(model.config, MOST * PAGES + 2, BLOCK_SIZE, model.dtype, CUDA)
    )
    model.fused = fused.states if path.paged else None
    monkeypatch.setattr(DecodeSteps, "_compute", syncing)
    sizes = dict(max_num_seqs=MOST, max_len=MAX_LEN, block_size=BLOCK_SIZE, window=1)
    steps = path.build(model, attention, None, **sizes, graphs=True)
    assert steps is not None and not steps.captured and "capturing failed" in path.notes[0]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    held = torch.cuda.memory_reserved()
    torch.empty(256 << 20, dtype=torch.uint8, device=CUDA)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= held  # what was cached is given back, as it is not within a capture
    assert run(steps, 2, 6) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_pass_their_trial(kind: str, dtype: torch.dtype) -> None:
    assert device_path.unfit(CUDA) is None
    assert device_path.trial(random_decoder(kind).config, dtype, CUDA) is None
