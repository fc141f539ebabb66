"""`bench peers` and `bench quantized` on a tiny model: they run, and their arithmetic is right."""

import json
from pathlib import Path

import pytest
import torch

from server.bench import peers, quantized
from server.errors import NotReady, SettingsError
from tests.engines import engine_on
from tests.tiny import VOCAB, save_tiny_llama


def figures(speed: float, ttft: float) -> dict[str, dict[str, float]]:
    return {**{load: {"tokens_per_s": speed} for load in ("1", "8", "32")}, "long prompt": {"ttft_ms": ttft}}


def test_ratios_are_taken_round_by_round() -> None:
    """The machine's speed moves between rounds; a ratio of medians would mix them."""
    rounds = [
        {"ours": figures(10, 50), "vLLM": figures(5, 100)},
        {"ours": figures(40, 10), "vLLM": figures(30, 10)},
        {"ours": figures(2, 300), "vLLM": figures(1, 900)},
    ]
    ratios = peers.summary(rounds)["ratios"]["ours over vLLM"]
    assert ratios["8"] == {"median": 2.0, "least": pytest.approx(4 / 3), "most": 2.0}
    assert ratios["ttft of 512"]["median"] == 2.0  # theirs over ours: above 1, ours is sooner


def test_no_prompt_is_handed_out_twice() -> None:
    texts = peers.Texts([(i, i) for i in range(4)])
    assert texts.take(3, 1) == [(0,), (1,), (2,)]
    with pytest.raises(SettingsError, match="--rounds"):
        texts.take(2, 1)


def test_a_peer_that_ends_is_named_with_its_last_words(tmp_path: Path) -> None:
    peer = peers.Peer("theirs", ["sh", "-c", "echo no such model; exit 3"], "m", "/health", port=1)
    with pytest.raises(NotReady, match=r"theirs.*no such model"):
        peer.start(tmp_path / "log")


def test_our_own_arms_are_measured_and_ended(tiny_llama_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    result = peers.run(model=str(tiny_llama_folder), memory=False, rounds=1, tokens=8, json=out)
    assert json.loads(out.read_text())["figures"] == result["figures"]
    assert all(result["figures"]["ours"][load]["tokens_per_s"] > 0 for load in ("1", "8", "32"))
    assert result["figures"]["ours"]["long prompt"]["ttft_ms"] > 0


def test_perplexity_is_the_models_own_over_all_tokens_but_the_first(tmp_path: Path) -> None:
    reference = save_tiny_llama(tmp_path)
    pieces = [tuple(range(1, 60)), tuple(range(60, 0, -1))]
    engine = engine_on(str(tmp_path))
    assert max(map(max, pieces)) < VOCAB
    losses = [
        reference(torch.tensor([p]), labels=torch.tensor([p])).loss.detach().double() * (len(p) - 1) for p in pieces
    ]
    expected = float(torch.exp(sum(losses) / sum(len(p) - 1 for p in pieces)))
    assert quantized.perplexity(engine, pieces) == pytest.approx(expected, rel=1e-4)  # fp32 sums in another order
