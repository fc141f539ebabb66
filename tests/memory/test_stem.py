"""STEM in the running engine against the formula inside transformers' model, float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from server.errors import PackError, RequestError
from server.runtime.engine import Engine
from server.runtime.load import load, weight_bytes
from server.runtime.messages import SamplingParams, Submit
from server.runtime.process import ready_message
from server.runtime.report import describe
from tests.engines import engine_on, logits_of, outputs_of, settings_for, tokens_of
from tests.memory.reference import ReferenceEngram, attached, reference_logits
from tests.memory.stems import Redirects, save_stem, with_stem
from tests.memory.test_memory import BLOCK, ONE, TOLERANCE, last_logits

Make = Callable[..., Engine]
HIDDEN, INNER = 64, 160


@pytest.fixture(scope="module")
def stem_pack(backbone: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 1 and 2, rows of the size that up-projections have here; layer 1 carries an Engram too (`pack_a`)."""
    generator = torch.Generator().manual_seed(7)
    vocab = backbone.config.vocab_size
    tables = {layer: torch.randn(vocab, INNER, generator=generator) for layer in (1, 2)}
    return save_stem(tmp_path_factory.mktemp("packs") / "stem", tables, HIDDEN)


@pytest.fixture
def engine(tiny_llama_folder: Path, stem_pack: Path) -> Make:
    def make(*more: str, **flags: Any) -> Engine:
        return engine_on(str(tiny_llama_folder), memory=(f"s={stem_pack}", *more), block_size=BLOCK, **flags)

    return make


def stem_logits(
    model: Any, packs: list[Path], ids: tuple[int, ...], engrams: Any = (), redirects: Redirects | None = None
) -> torch.Tensor:
    with torch.no_grad(), with_stem(model, packs, list(ids), redirects), attached(model, list(engrams), list(ids)):
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


@pytest.mark.parametrize("budget", [1, 7, 512])
def test_chunks_of_any_size_match_the_formula(
    engine: Make, backbone: Any, stem_pack: Path, prompt: tuple[int, ...], budget: int
) -> None:
    expected = stem_logits(backbone, [stem_pack], prompt)
    found = logits_of(engine(max_num_batched_tokens=budget), prompt, ("s",))
    assert torch.allclose(found.double(), expected, atol=TOLERANCE)
    assert (expected - reference_logits(backbone, [], prompt)).abs().max() > 1  # the rows matter in this test


def test_decoded_tokens_match_the_formula(
    engine: Make, backbone: Any, stem_pack: Path, prompt: tuple[int, ...]
) -> None:
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    submits = [Submit(f"r{i}", prompt[: 20 + i], params, ("s",)) for i in range(4)]
    answers = outputs_of(engine(), submits)
    for submit in submits:
        answer = tokens_of(answers[submit.request_id, 0])
        logits = stem_logits(backbone, [stem_pack], (*submit.token_ids, *answer))[len(submit.token_ids) - 1 : -1]
        gap = logits.max(-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert gap.max() < TOLERANCE


@pytest.mark.parametrize("beyond", [0, 1, 7, 9])
def test_a_prefix_hit_changes_nothing(
    engine: Make, backbone: Any, stem_pack: Path, prompt: tuple[int, ...], beyond: int
) -> None:
    made = engine()
    outputs_of(made, [Submit("first", prompt[: 5 * BLOCK], ONE, ("s",))])
    longer = prompt[: 5 * BLOCK + beyond]
    found = last_logits(made, Submit("second", longer, ONE, ("s",)))
    assert made.scheduler.prefix_hits > 0
    assert torch.allclose(found.double(), stem_logits(backbone, [stem_pack], longer)[-1], atol=TOLERANCE)


def test_engram_and_stem_share_a_layer(
    engine: Make, backbone: Any, stem_pack: Path, pack_a: Path, reference_a: ReferenceEngram, prompt: tuple[int, ...]
) -> None:
    made = engine(f"a={pack_a}")
    both = stem_logits(backbone, [stem_pack], prompt, [reference_a])
    assert torch.allclose(logits_of(made, prompt, ("s", "a")).double(), both, atol=TOLERANCE)
    alone = stem_logits(backbone, [stem_pack], prompt)
    assert torch.allclose(logits_of(made, prompt, ("s",)).double(), alone, atol=TOLERANCE)
    begins = []
    prefetcher = made.runner.memories.prefetcher  # type: ignore[union-attr]
    inner = prefetcher.begin
    prefetcher.begin = lambda lookups: begins.append([(x.layer, x.dedup) for x in lookups]) or inner(lookups)  # type: ignore[method-assign]
    outputs_of(made, [Submit("x", prompt[:9], ONE, ("s", "a"))])
    assert begins == [[(1, False), (1, True), (2, True), (3, False)]]  # one begin a step, in the order of reading


def test_each_distinct_row_is_read_once_a_step(engine: Make, prompt: tuple[int, ...]) -> None:
    made = engine(prefetch="off")
    outputs_of(made, [Submit("x", (5, 9, 5, 5, 9, 77), ONE, ("s",))])
    assert [(c.layer, c.rows) for c in made.stats().memory] == [(1, 3), (2, 3)]


def test_the_up_projection_is_gone_and_the_report_says_so(tiny_llama_folder: Path, stem_pack: Path) -> None:
    bare = load(settings_for(str(tiny_llama_folder), cpu_weights="once"))
    settings = settings_for(str(tiny_llama_folder), memory=(f"s={stem_pack}",), cpu_weights="once")
    loaded = load(settings)
    assert weight_bytes(bare.model) - weight_bytes(loaded.model) == 2 * HIDDEN * INNER * 4
    lines = dict(describe(loaded, settings))
    assert lines["up-projections"].startswith("0 MiB at 2 layers not loaded")
    assert lines["memory s"].startswith("STEM at layers 1, 2")
    assert ready_message(settings, loaded).models == (("tiny-llama+s", ("s",)),)


def test_a_request_without_stem_is_refused_unless_the_up_projection_was_kept(
    engine: Make, backbone: Any, stem_pack: Path, prompt: tuple[int, ...]
) -> None:
    with pytest.raises(RequestError, match="'s' stands in .* --keep-up-projection"):
        engine().submit(Submit("x", prompt, ONE))
    kept = engine(keep_up_projection=True)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    answers = outputs_of(kept, [Submit("off", prompt[:30], params), Submit("on", prompt[:30], params, ("s",))])
    for request, packs in (("off", []), ("on", [stem_pack])):
        answer = tokens_of(answers[request, 0])
        logits = stem_logits(backbone, packs, (*prompt[:30], *answer))[29:-1]
        gap = logits.max(-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert gap.max() < TOLERANCE


def test_two_stem_packs_on_a_layer_are_refused_with_both_names(engine: Make, stem_pack: Path) -> None:
    with pytest.raises(PackError, match="'s' and 't' both replace the up-projection of layer 1"):
        engine(f"t={stem_pack}")


@pytest.mark.parametrize(
    ("vocab", "width", "told"),
    [(100, INNER, "vocabulary of 100 and the model has 49152"), (49152, 8, "width of 8 and the model has 160")],
)
def test_a_pack_for_another_model_is_refused_with_both_values(
    tiny_llama_folder: Path, tmp_path: Path, vocab: int, width: int, told: str
) -> None:
    pack = save_stem(tmp_path / "p", {1: torch.zeros(vocab, width)}, HIDDEN)
    with pytest.raises(PackError, match=told):
        engine_on(str(tiny_llama_folder), memory=(f"s={pack}",))


def test_redirected_positions_read_other_rows_or_their_mean(
    engine: Make, backbone: Any, stem_pack: Path, prompt: tuple[int, ...]
) -> None:
    redirects = {3: (77,), 10: (5, 900, 31), 11: (5, 900, 31), 40: (1234,)}
    made = engine(max_num_batched_tokens=16)
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=True)
    hidden: list[torch.Tensor] = []
    handle = made.runner.model.norm.register_forward_hook(lambda module, args, out: hidden.append(out.clone()))
    outputs_of(made, [Submit("x", prompt[:60], params, ("s",), redirects=tuple(redirects.items()))])
    handle.remove()
    with torch.inference_mode():
        found = made.runner.model.logits(torch.cat(hidden))
    expected = stem_logits(backbone, [stem_pack], prompt[:60], redirects=redirects)
    assert torch.allclose(found.double(), expected, atol=TOLERANCE)
    assert (expected - stem_logits(backbone, [stem_pack], prompt[:60])).abs().max() > 0.1


def test_requests_with_other_redirects_share_no_prefix(
    engine: Make, backbone: Any, stem_pack: Path, prompt: tuple[int, ...]
) -> None:
    """In one batch and one after another: each reads its own redirects, none a cached block of another."""
    made = engine()
    choices: list[Redirects] = [{}, {2: (50,)}, {2: (50, 60)}, {30: (50,)}]
    for turn in range(2):
        for number, redirects in enumerate(choices):
            submit = Submit(f"{turn}-{number}", prompt[:40], ONE, ("s",), redirects=tuple(redirects.items()))
            found = last_logits(made, submit)
            expected = stem_logits(backbone, [stem_pack], prompt[:40], redirects=redirects)[-1]
            assert torch.allclose(found.double(), expected, atol=TOLERANCE), (turn, redirects)
    assert made.scheduler.prefix_hits == 4 * 32  # each found its own blocks the second time
