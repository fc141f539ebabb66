"""A server whose model has a STEM memory: choosing it, doing without it, and redirects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.api.live import LiveServer
from tests.memory.stems import save_stem


@pytest.fixture(scope="module")
def server(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    tables = {layer: torch.randn(49152, 160, generator=torch.Generator().manual_seed(layer)) for layer in (1, 2)}
    pack = save_stem(tmp_path_factory.mktemp("packs") / "stem", tables, 64)
    flags = {"model": str(tiny_llama_folder), "dtype": "float32", "max_model_len": 256, "kv_bytes": 16 << 20}
    live = LiveServer({**flags, "memory": [f"s={pack}"], "edits_db": str(pack.parent / "edits.db")})
    yield live
    assert live.stop() == 0


def ask(server: LiveServer, memory: dict[str, Any] | None, **more: Any) -> Any:
    body = {"prompt": "The capital of Spain is far. Spain", "max_tokens": 4, "temperature": 0, "logprobs": 0}
    return server.request("/v1/completions", {**body, **({"memory": memory} if memory else {}), **more})


def test_the_model_is_named_after_its_memory_and_there_is_none_without(server: LiveServer) -> None:
    assert [model["id"] for model in server.request("/v1/models").json["data"]] == ["tiny-llama+s"]


def test_doing_without_is_refused_with_the_flag_to_set(server: LiveServer) -> None:
    reply = ask(server, {"enabled": False})
    assert reply.status == 400
    assert "--keep-up-projection" in reply.json["error"]["message"]


def test_a_redirect_changes_the_answer_and_lists_its_places(server: LiveServer) -> None:
    plain = ask(server, None).json
    reply = ask(server, {"redirect": [{"from": "Spain", "to": "Germany"}]}, return_token_ids=True).json
    ids = reply["choices"][0]["prompt_token_ids"]
    (redirect,) = reply["memory"]["redirects"]
    assert (redirect["prompt"], redirect["from"], redirect["to"]) == (0, "Spain", "Germany")
    places = redirect["positions"]
    assert len(places) == 2
    assert ids[places[0]] == ids[places[1]]  # " Spain", both times
    assert reply["choices"][0]["logprobs"]["token_logprobs"] != plain["choices"][0]["logprobs"]["token_logprobs"]
    assert "memory" not in plain


def test_a_kept_redirect_acts_unasked_until_it_is_removed(server: LiveServer) -> None:
    plain = ask(server, None).json["choices"]
    asked = ask(server, {"redirect": [{"from": "Spain", "to": "Germany"}]}).json["choices"]
    kept = server.request("/v1/memory/redirects", {"from": "Spain", "to": "Germany"})
    absent = server.request("/v1/memory/redirects", {"from": "Portugal", "to": "Germany"})
    assert (kept.status, absent.status) == (201, 201) and kept.json["active"]
    assert ask(server, None).json["choices"] == asked != plain
    assert (
        ask(server, {"redirect": [{"from": "Spain", "to": "Spain"}]}).json["choices"] == plain
    )  # its own counts first
    for edit in (kept, absent):
        assert server.request(f"/v1/memory/edits/{edit.json['id']}", method="DELETE").status == 200
    assert ask(server, None).json["choices"] == plain


def test_facts_are_refused_where_no_memory_takes_them(server: LiveServer) -> None:
    reply = server.request("/v1/memory/facts", {"prompt": "a", "completion": "b"})
    assert reply.status == 409 and "Engram" in reply.json["error"]["message"]


def test_a_redirect_to_itself_changes_nothing(server: LiveServer) -> None:
    plain = ask(server, None).json["choices"]
    assert ask(server, {"redirect": [{"from": "Spain", "to": "Spain"}]}).json["choices"] == plain


def test_a_source_that_is_not_in_the_prompt_is_refused_by_name(server: LiveServer) -> None:
    reply = ask(server, {"redirect": [{"from": "Portugal", "to": "Germany"}]})
    assert (reply.status, reply.json["error"]["param"]) == (400, "memory")
    assert "'Portugal'" in reply.json["error"]["message"]


def test_without_a_token_id_memory_a_redirect_is_refused(live: LiveServer) -> None:
    reply = ask(live, {"redirect": [{"from": "Spain", "to": "Germany"}]})
    assert reply.status == 400
    assert "token ids" in reply.json["error"]["message"]
