"""A decode step served by the device: rows to the bit those of the host's path, and the same added to the same tokens.

On CPU the kernels are their torch references; one test of each kind runs them through Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import language
from server.batch import Ints
from server.memory.addressing import NGramAddresser, from_config, windows_of
from server.memory.device_address import DeviceAddresses
from server.memory.device_memory import DeviceMemory
from server.memory.edits import EditedRows, Overlay
from server.memory.memories import Memories
from server.view import BARE, MemoryView
from tests.engines import engine_on
from tests.memory.device_steps import DUMMIES, Decoding
from tests.memory.stems import save_stem
from tests.memory.test_addressing import DEMO, QWEN
from tests.memory.test_checkpoints import deepseek, qwen  # noqa: F401  fixtures
from tests.memory.test_families import PEFT

HIDDEN = 64
# fp32 on both sides; products of other batch widths, and the kernels' sums, run in another order. Values reach 100.
TOLERANCE = 1e-3


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "interpreting", False)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "interpreting", True)


@pytest.fixture(scope="module")
def stem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(5)
    tables = {layer: torch.randn(49152, 160, generator=generator) for layer in (1, 2)}
    return save_stem(tmp_path_factory.mktemp("stems") / "s", tables, HIDDEN)


def memories_of(folder: Path, packs: Sequence[Path], **flags: Any) -> Memories:
    chosen = {"placement": ("pinned",), "keep_up_projection": True, "hot_list": "off", **flags}
    specs = tuple(f"p{number}={pack}" for number, pack in enumerate(packs))
    memories = engine_on(str(folder), memory=specs, **chosen).runner.memories
    assert memories is not None
    return memories


def texts(count: int, longest: int, seed: int = 0, vocab: int = 49152) -> list[Ints]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab, int(generator.integers(3, longest + 1))) for _ in range(count)]


def view_of(memories: Memories, *numbers: int, overlays: tuple[Overlay, ...] = ()) -> MemoryView:
    return MemoryView(tuple(memories.packs[number].id for number in numbers), overlays=overlays)


def paired(made: Callable[[], Memories], ids: Sequence[Ints], views: Callable[[Memories], list[MemoryView]]) -> Any:
    """Host's and device's memories, each with its own convolution slots, over the same sequences."""
    sides = []
    for _ in range(2):
        memories = made()
        decoding = Decoding(memories, ids, views(memories))
        for pack in memories.packs:
            pack.allocate_conv(decoding.slots, torch.device("cpu"))
        sides.append((memories, decoding))
    return sides


def compare(sides: Any, device: DeviceMemory, steps: int) -> None:
    """Steps through all sequences; rows must be equal, and what is added as close as sums in another order are."""
    (host, host_side), (_, device_side) = sides
    generator = torch.Generator().manual_seed(7)
    lengths = np.array([len(sequence) for sequence in host_side.ids])
    for step in range(steps):
        positions = np.minimum(step, lengths - 1)
        assert device.serves(device_side.views)
        prepare(device, device_side, positions)
        sees = device.sees(device_side.views)
        batch = device_side.device(positions, sees)
        found, expected = device.begin(batch), host.begin(host_side.host(positions))
        count = len(positions)
        for layer in range(4):
            hidden = torch.randn(count + DUMMIES, HIDDEN, generator=generator)
            dense = torch.randn(count + DUMMIES, 160, generator=generator)
            before = hidden.clone()
            if expected is not None and layer in expected.layers:
                wanted = expected.add(layer, hidden[:count].clone())
                got = found.add(layer, hidden)
                for reading in expected.readings[layer]:
                    mine = next(r for r in found.readings[layer] if r.pack.name == reading.pack.name)
                    at = slice(None) if reading.seen.tokens is None else reading.seen.tokens
                    assert torch.equal(mine.rows[:count][at], reading.rows())
                torch.testing.assert_close(got[:count], wanted, atol=TOLERANCE, rtol=1e-5)
                nobody = torch.stack([reading.unseen for reading in found.readings[layer]]).all(0)
                assert torch.equal(got[nobody], before[nobody])
            elif layer in found.layers:
                assert torch.equal(found.add(layer, hidden), before)
            if expected is not None and layer in expected.up_layers:
                assert torch.equal(found.up(layer, dense)[:count], expected.up(layer, dense[:count]))
            elif layer in found.up_layers:
                assert torch.equal(found.up(layer, dense), dense)
        found.join()
        device.between(batch)


def prepare(device: DeviceMemory, side: Decoding, positions: Ints) -> None:
    """As before a launch; n-grams are told when asked for."""

    def windows() -> Any:
        batch = side.host(positions)
        return batch.windows, batch.blocked

    device.prepare(side.views, positions=positions, windows=windows)


# ── addresses ──────────────────────────────────────────────────────────────────────────────────────────────────────

RULES = {
    "paper": DEMO,
    "deepseek": {
        "engram_layer_ids": [1, 14], "engram_max_ngram_size": 4, "engram_n_heads": 2, "engram_vocab_size": 500,
        "engram_num_embeddings": [3144, 3424], "engram_compressed_vocab_size": 200, "engram_pad_token_id": 2,
    },
    "qwen": {**QWEN, "vocab_size": 60, "eos_token_id": 7, "ple_layer_ids": [2, 5]},
    "engram-peft": PEFT,
    "token ids": {"stem_layers": [1, 3], "vocab_size": 50},
}  # fmt: skip


@pytest.mark.parametrize("family", RULES)
@settings(deadline=None)
@given(data=st.data())
def test_addresses_are_the_addressers_for_any_tokens(family: str, data: st.DataObject) -> None:
    addresser = from_config(RULES[family])
    known = st.integers(-3, 70) if isinstance(addresser, NGramAddresser) else st.integers(0, 49)
    common = st.sampled_from([7, 2, 0]) | known  # boundaries and pads often
    ids = [np.array(data.draw(st.lists(common, min_size=1, max_size=12)), np.int64) for _ in range(3)]
    pad = addresser.n - 1 + data.draw(st.integers(0, 2))
    table = torch.full((3, pad + 12), 9, dtype=torch.int64)
    for row, sequence in enumerate(ids):
        table[row, pad : pad + len(sequence)] = torch.from_numpy(sequence)
    side = Decoding.__new__(Decoding)
    side.ids, side.pad, side.tokens, side.blocks = ids, pad, table.numpy(), np.ones((3, 3), np.int64)
    positions = np.array([data.draw(st.integers(0, len(sequence) - 1)) for sequence in ids])
    batch = side.device(positions, np.ones((1, 3), bool), dummies=0)
    words = DeviceAddresses.words(addresser, 5)
    found = DeviceAddresses(addresser, 5, torch.zeros(words, dtype=torch.int64)).of(batch)
    windows, blocked = zip(*(windows_of(sequence, addresser.n) for sequence in ids), strict=True)
    at = [(w[p], b[p]) for w, b, p in zip(windows, blocked, positions, strict=True)]
    expected = addresser.address(np.stack([w for w, _ in at]), np.stack([b for _, b in at]))
    for layer, (rows, mix) in expected.items():
        assert np.array_equal(found[layer][0].numpy(), rows)
        assert np.array_equal(found[layer][1].numpy(), mix)


# ── rows, and what is added ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("placement", "kind"),
    [("pinned", kind) for kind in ("float32", "bfloat16", "int8", "float8_e4m3", "float8_e4m3_e8m0")]
    + [("device", "int8"), ("mapped", "int8"), ("mapped", "float32")],
)
def test_every_token_reads_the_rows_and_the_convolution_of_the_hosts_path(
    tiny_llama_folder: Path, make_pack: Callable[..., Path], placement: str, kind: str
) -> None:
    folder = make_pack(f"{placement}-{kind}", 1, dtype=kind, dim=32)
    ids = texts(5, 14)

    def made() -> Memories:
        return memories_of(tiny_llama_folder, [folder], placement=(placement,))

    sides = paired(made, ids, lambda memories: [view_of(memories, 0)] * len(ids))
    compare(sides, DeviceMemory(sides[1][0], 8, use_kernels=False), 14)


TIERS = {
    "direct": ("pinned",),
    "staged": ("mapped",),
    "first staged": ("pinned", "p0=mapped"),
    "second staged in part": ("pinned", "p1/3=mapped"),
    "stem staged": ("device", "p2=mapped"),
}


@pytest.mark.parametrize("use_kernels", [False, True], ids=["modules", "kernels"])
@pytest.mark.parametrize("tiers", TIERS)
def test_each_token_reads_the_packs_it_sees_and_no_other(
    tiny_llama_folder: Path, pack_a: Path, pack_b: Path, stem: Path, tiers: str, use_kernels: bool
) -> None:
    ids = texts(6, 12, seed=1)

    def views(memories: Memories) -> list[MemoryView]:
        seen = [(0,), (1,), (0, 1, 2), (2,), (0, 2)]
        return [view_of(memories, *numbers) for numbers in seen] + [BARE]

    def made() -> Memories:
        return memories_of(tiny_llama_folder, [pack_a, pack_b, stem], placement=TIERS[tiers])

    sides = paired(made, ids, views)
    device = DeviceMemory(sides[1][0], 8, use_kernels=use_kernels)
    assert bool(device.staged.packs) == (tiers != "direct") and bool(device.rows.served) == (tiers != "staged")
    compare(sides, device, 12)


@pytest.mark.parametrize("use_kernels", [False, True], ids=["modules", "kernels"])
@pytest.mark.parametrize("family", ["qwen", "deepseek"])
def test_the_released_forms_are_served(
    request: pytest.FixtureRequest, tiny_llama_folder: Path, family: str, use_kernels: bool
) -> None:
    folder, _ = request.getfixturevalue(family)
    ids = texts(4, 12, seed=2)
    ids[0][::3] = 17  # an end of text for Qwen

    def views(memories: Memories) -> list[MemoryView]:
        return [view_of(memories, 0)] * 3 + [BARE]

    sides = paired(lambda: memories_of(tiny_llama_folder, [folder]), ids, views)
    device = DeviceMemory(sides[1][0], 8, use_kernels=use_kernels)
    assert bool(device.fused) == (use_kernels and family == "deepseek")
    compare(sides, device, 12)


def test_an_adapter_of_engram_peft_is_served() -> None:
    stored = Path(__file__).parent.parent / "data" / "engram-peft"
    flags = {"max_model_len": 64, "placement": ("pinned",)}
    made = [engine_on(str(stored / "model"), memory=(f"a={stored / 'adapter'}",), **flags) for _ in range(2)]
    device = DeviceMemory(made[1].runner.memories, 5)
    vocab = made[0].runner.model.config.vocab_size
    ids, hidden = texts(3, 9, seed=3, vocab=vocab), made[0].runner.model.config.hidden_size
    opened = [engine.runner.memories for engine in made]
    sides = [(memories, Decoding(memories, ids, [view_of(memories, 0)] * 3)) for memories in opened]
    for memories, decoding in sides:
        memories.packs[0].allocate_conv(decoding.slots, torch.device("cpu"))
    for step in range(9):
        positions = np.minimum(step, np.array([len(sequence) - 1 for sequence in ids]))
        device.prepare(sides[1][1].views)
        found = device.begin(sides[1][1].device(positions, device.sees(sides[1][1].views)))
        expected = sides[0][0].begin(sides[0][1].host(positions))
        for layer in expected.layers:
            state = torch.randn(3 + DUMMIES, hidden)
            wanted = expected.add(layer, state[:3].clone())
            torch.testing.assert_close(found.add(layer, state)[:3], wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("interpreted")
def test_the_kernels_themselves_serve_a_step(tiny_llama_folder: Path, make_pack: Callable[..., Path]) -> None:
    folder = make_pack("interpreted", 1, dim=8, heads=2)
    ids = [sequence[:5] for sequence in texts(2, 6, seed=4)]

    def views(memories: Memories) -> list[MemoryView]:
        return [view_of(memories, 0), BARE]

    sides = paired(lambda: memories_of(tiny_llama_folder, [folder]), ids, views)
    compare(sides, DeviceMemory(sides[1][0], 4), 5)


# ── edits and redirects ────────────────────────────────────────────────────────────────────────────────────────────


def overlay_of(memories: Memories, ids: Sequence[Ints], seed: int, share: float = 0.4) -> Overlay:
    generator, rows = np.random.default_rng(seed), {}
    pack = memories.packs[0]
    for layer in pack.tables:
        read = [pack.address(*windows_of(sequence, memories.window))[layer][0].ravel() for sequence in ids]
        distinct = np.unique(np.concatenate(read))
        chosen = distinct[generator.random(len(distinct)) < share]
        values = generator.normal(size=(len(chosen), pack.tables[layer].dim)).astype(np.float32)
        rows[pack.content, layer] = EditedRows(chosen, values)
    return Overlay(rows)


@pytest.mark.parametrize("tiers", ["direct", "staged", "first staged"])
def test_edited_rows_are_read_by_those_who_see_them_and_the_tenants_count_last(
    tiny_llama_folder: Path, pack_a: Path, pack_b: Path, tiers: str
) -> None:
    ids = texts(5, 12, seed=5)

    def views(memories: Memories) -> list[MemoryView]:
        everyone, tenant, other = (overlay_of(memories, ids, seed) for seed in (1, 2, 3))
        seen = [(), (everyone,), (everyone, tenant), (tenant,), (everyone, other)]
        return [view_of(memories, 0, 1, overlays=overlays) for overlays in seen]

    sides = paired(lambda: memories_of(tiny_llama_folder, [pack_a, pack_b], placement=TIERS[tiers]), ids, views)
    device = DeviceMemory(sides[1][0], 8)
    compare(sides, device, 12)
    plain = [view_of(memories, 0, 1) for memories, _ in sides]
    for (_, decoding), view in zip(sides, plain, strict=True):
        decoding.views = [view] * len(ids)
    compare(sides, device, 6)  # and nobody does any more


def test_more_edits_than_a_list_holds_go_the_hosts_way(
    tiny_llama_folder: Path, pack_a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories = memories_of(tiny_llama_folder, [pack_a])
    ids = texts(2, 12)
    overlay = overlay_of(memories, ids, 1)
    most = max(len(rows.ids) for rows in overlay.rows.values())
    view = view_of(memories, 0, overlays=(overlay,))
    for held, served in ((most, True), (most - 1, False)):
        monkeypatch.setattr("server.memory.device_memory.MOST_EDITS", held)
        assert DeviceMemory(memories, 4).serves([BARE, view]) == served


def test_a_redirect_ahead_goes_the_hosts_way_and_one_behind_does_not_matter(
    tiny_llama_folder: Path, stem: Path, pack_a: Path
) -> None:
    memories = memories_of(tiny_llama_folder, [stem, pack_a])
    device = DeviceMemory(memories, 4)
    places = ((3, (5,)), (4, (6, 7)))
    redirected = MemoryView((memories.packs[0].id,), redirects=places)
    assert not device.serves([redirected])
    assert not device.serves([BARE, redirected], np.array([9, 4]))
    assert device.serves([BARE, redirected], np.array([0, 5]))
    assert device.serves([MemoryView((memories.packs[1].id,), redirects=places)])  # no token-id table is read


# ── what cannot be served ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_pack_with_a_table_the_device_cannot_read_is_staged_and_the_others_are_direct(
    tiny_llama_folder: Path, pack_a: Path, pack_b: Path
) -> None:
    memories = memories_of(tiny_llama_folder, [pack_a, pack_b], placement=("p0=pinned", "p1/3=mapped"))
    device = DeviceMemory(memories, 4)
    direct = {name: transport.direct for name, transport in device.rows.transports.items()}
    assert direct == {"p0/1": True, "p0/3": True, "p1/1": False, "p1/3": False}
    assert [pack.name for pack in device.staged.packs] == ["p1"]
    assert device.serves([view_of(memories, 0), BARE]) and device.serves([BARE, view_of(memories, 0, 1)])
    assert device.sees([view_of(memories, 0), BARE]).tolist() == [[True, False], [False, False]]
    assert not device.serves([BARE] * 5)
    assert not device.serves([MemoryView((("p0", "of another content"),))])


def test_a_step_that_sees_no_staged_pack_asks_for_no_tokens(
    tiny_llama_folder: Path, pack_a: Path, pack_b: Path
) -> None:
    memories = memories_of(tiny_llama_folder, [pack_a, pack_b], placement=("p0=pinned", "p1=mapped"))
    (ids,) = texts(1, 8)
    decoding = Decoding(memories, [ids], [view_of(memories, 0)])
    for pack in memories.packs:
        pack.allocate_conv(decoding.slots, torch.device("cpu"))
    device = DeviceMemory(memories, 4)

    def nobody_asks() -> Any:
        raise AssertionError("the host was to wait for the step before")

    for views, waits in (([view_of(memories, 0)], False), ([view_of(memories, 0, 1)], True)):
        device.prepare(views, positions=np.array([2]), windows=nobody_asks)
        step = device.begin(decoding.device(np.array([2]), device.sees(views)))
        hidden = torch.zeros(1 + DUMMIES, HIDDEN)
        if waits:
            with pytest.raises(AssertionError, match="wait for the step before"):
                step.add(1, hidden)
        else:
            step.add(1, hidden)
            step.add(3, hidden)


@pytest.mark.parametrize("tier", ["pinned", "mapped"])
def test_a_table_that_fails_is_served_no_longer(tiny_llama_folder: Path, pack_a: Path, tier: str) -> None:
    memories = memories_of(tiny_llama_folder, [pack_a], placement=(tier,))
    device = DeviceMemory(memories, 4)
    view = view_of(memories, 0)
    assert device.serves([view])
    next(iter(memories.packs[0].tables.values())).fault = "gone"
    assert not device.serves([view]) and device.serves([BARE])
