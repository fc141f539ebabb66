"""Packs over HTTP: an admin attaches and removes them while others stream; nothing outside --packs-dir is opened."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.api.routes.memory import PackChange, confined
from server.commands.attach import attach
from server.errors import Forbidden, RequestError
from tests.api.live import LiveServer, Reply

PACKS, COMPLETIONS = "/v1/memory/packs", "/v1/completions"
USER, ADMIN = {"Authorization": "Bearer user-key"}, {"Authorization": "Bearer admin-key"}


@pytest.fixture(scope="module")
def folder(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """--packs-dir with a pack in it and several things that are none; beside it a pack that must stay out of reach."""
    root = tmp_path_factory.mktemp("root")
    packs = root / "packs"
    packs.mkdir()
    for out in (packs / "one", root / "outside"):
        attach(model=str(tiny_llama_folder), out=out, layers=(1,), rows=100, dim=8, heads=2, dtype="float32")
    (packs / "link").symlink_to(root / "outside")
    (packs / "inner-link").symlink_to(packs / "one")
    shutil.copytree(packs / "one", packs / "leaking")
    (packs / "leaking" / "table-1.safetensors").unlink()
    (packs / "leaking" / "table-1.safetensors").symlink_to(root / "outside" / "table-1.safetensors")
    (packs / "empty").mkdir()
    shutil.copytree(packs / "one", packs / "foreign")
    config = json.loads((packs / "foreign" / "config.json").read_text())
    (packs / "foreign" / "config.json").write_text(json.dumps({**config, "hidden_size": 63}))
    (packs / "file").write_text("x")
    return packs


@pytest.fixture(scope="module")
def server(tiny_llama_folder: Path, folder: Path) -> Iterator[LiveServer]:
    flags = {"model": str(tiny_llama_folder), "dtype": "float32", "kv_bytes": 16 << 20, "max_model_len": 2048}
    keys = {"api_key": ["user-key"], "admin_key": "admin-key"}
    live = LiveServer({**flags, **keys, "packs_dir": str(folder), "memory": [f"first={folder / 'one'}"]})
    yield live
    assert live.stop() == 0


def post(server: LiveServer, name: str, path: str, headers: dict[str, str] = ADMIN) -> Reply:
    return server.request(PACKS, {"name": name, "path": path}, headers=headers)


def delete(server: LiveServer, name: str, headers: dict[str, str] = ADMIN) -> Reply:
    return server.request(f"{PACKS}/{name}", headers=headers, method="DELETE")


def ask(server: LiveServer, **fields: Any) -> Reply:
    return server.request(COMPLETIONS, {"prompt": "a", "max_tokens": 1, **fields}, headers=USER)


def test_a_pack_comes_is_named_by_requests_and_goes(server: LiveServer) -> None:
    before = [model["id"] for model in server.request("/v1/models", headers=USER).json["data"]]
    assert before == ["tiny-llama+first", "tiny-llama"]
    made = post(server, "mine", "one")
    assert made.status == 201
    change = PackChange.model_validate(made.json)
    assert change.packs == ["first", "mine"] and change.load_seconds > 0 and change.pause_seconds < 0.1
    models = [model["id"] for model in server.request("/v1/models", headers=USER).json["data"]]
    assert models == ["tiny-llama+first", "tiny-llama+first+mine", "tiny-llama+mine", "tiny-llama"]
    for model in models:
        assert ask(server, model=model).json["model"] == model
    assert server.request("/v1/models/tiny-llama+mine", headers=USER).json["memory"] == ["mine"]
    assert ask(server).json["model"] == "tiny-llama+first"  # who names no model is not surprised
    assert delete(server, "mine").status == 200
    assert ask(server, model="tiny-llama+mine").status == 404
    assert server.request(PACKS, headers=USER).json == {"packs": ["first"], "models": before}


def test_streams_go_on_while_packs_come_and_go(server: LiveServer) -> None:
    replies: list[Reply] = []
    fields = {"max_tokens": 600, "ignore_eos": True, "temperature": 0, "model": "tiny-llama+first"}
    threads = [threading.Thread(target=lambda: replies.append(ask(server, **fields))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        assert post(server, "second", "one").status == 201
        assert delete(server, "second").status == 200
    for thread in threads:
        thread.join()
    assert [reply.status for reply in replies] == [200] * 4
    assert len({reply.json["choices"][0]["text"] for reply in replies}) == 1
    assert server.request("/ready").status == 200


def test_only_the_admin_changes_packs(server: LiveServer) -> None:
    for headers, status in ((USER, 403), ({}, 401)):
        assert post(server, "mine", "one", headers).status == status
        assert delete(server, "first", headers).status == status


@pytest.mark.parametrize(
    ("name", "path", "status", "words"),
    [
        ("x", "../outside", 403, "outside --packs-dir"),
        ("x", "/etc", 403, "outside --packs-dir"),
        ("x", ".", 403, "outside --packs-dir"),
        ("x", "link", 403, "outside --packs-dir"),
        ("x", "leaking", 403, "leads out of --packs-dir"),
        ("x", "nowhere", 400, "no pack 'nowhere'"),
        ("x", "file", 400, "no pack 'file'"),
        ("x", "empty", 400, "no memory pack"),
        ("x", "foreign", 400, "hidden size of 63"),
        ("x", "a\0b", 400, "no pack"),
        ("x", "one/" * 2000, 400, "path"),
        ("first", "one", 409, "attached already"),
        ("a+b", "one", 400, "name must be"),
        ("../x", "one", 400, "name must be"),
        ("", "one", 400, "name"),
    ],
)
def test_what_must_not_be_attached_is_refused(
    server: LiveServer, name: str, path: str, status: int, words: str
) -> None:
    reply = post(server, name, path)
    assert reply.status == status and words in reply.json["error"]["message"], reply.json


def test_a_memory_that_is_not_there_is_404(server: LiveServer) -> None:
    assert delete(server, "nobody").status == 404


def test_links_within_the_folder_are_followed(folder: Path) -> None:
    assert confined(str(folder), "inner-link") == folder / "one"
    assert confined(str(folder), str(folder / "one")) == folder / "one"


def test_without_packs_dir_nothing_can_be_attached(tmp_path: Path) -> None:
    with pytest.raises(Forbidden, match="--packs-dir"):
        confined("", "one")
    os.symlink("ring", tmp_path / "ring")
    with pytest.raises(RequestError):
        confined(str(tmp_path), "ring")


def test_an_idle_server_notices_a_table_that_was_harmed(server: LiveServer, folder: Path) -> None:
    shutil.copytree(folder / "one", folder / "brittle")
    assert post(server, "brittle", "brittle").status == 201
    (folder / "brittle" / "table-1.safetensors").touch()
    assert wait_for(server, 503) and "table-1" in server.request("/ready").json["error"]["message"]
    assert ask(server, model="tiny-llama").status == 200  # others are served on
    assert ask(server, model="tiny-llama+brittle").status == 500
    assert delete(server, "brittle").status == 200
    assert wait_for(server, 200)


def wait_for(server: LiveServer, status: int) -> bool:
    """Whether /ready says so within ten seconds."""
    return any(server.request("/ready").status == status or threading.Event().wait(0.1) for _ in range(100))
