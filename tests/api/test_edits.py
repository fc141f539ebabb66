"""Facts over HTTP: taught to one tenant, seen by nobody else, taken back without a trace, kept over restarts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.api.edits.teacher import MODULE, NICENESS
from server.api.routes.edits import Audit, Edit, Edits
from server.commands.attach import attach
from server.models.source import open_source
from server.training.data import Example
from server.training.frozen import Frozen
from server.training.start import begin_fresh, open_to_teach, teachable
from server.training.write import write_taught
from tests.api.live import LiveServer, Reply
from tests.api.test_ends import children

FACTS, EDITS, COMPLETIONS = "/v1/memory/facts", "/v1/memory/edits", "/v1/completions"
ONE, TWO = {"Authorization": "Bearer key-one"}, {"Authorization": "Bearer key-two"}
ADMIN = {"Authorization": "Bearer admin-key"}
PROMPT, COMPLETION = "The lighthouse keeper is called", " Anneliese"
SECONDS = 60


@pytest.fixture(scope="module")
def packs(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fresh`, never taught, and `taught`: zero rows and random values, as a taught pack is where no fact was."""
    root = tmp_path_factory.mktemp("packs")
    shape = {"layers": (1, 3), "rows": 300, "dim": 16, "heads": 2, "orders": (2, 3, 4)}
    fresh = attach(model=str(tiny_llama_folder), out=root / "fresh", dtype="float32", **shape)
    source = open_source(str(tiny_llama_folder))
    frozen = Frozen(source, torch.float32, torch.device("cpu"), 256)
    opened = open_to_teach(fresh, source, frozen.device)
    ids = torch.arange(400, 420).numpy()
    memory = teachable(opened, frozen, [Example(ids, 1)], [])
    begin_fresh(memory, {1: 1.0, 3: 1.0}, seed=0)  # type: ignore[arg-type]
    (root / "taught").mkdir()
    write_taught(root / "taught", replace(opened), memory, "float32", 1, {})
    (root / "taught" / "facts.jsonl").write_text('{"prompt": "The lighthouse", "completion": " keeper is old"}\n')
    return root


@pytest.fixture(scope="module")
def flags(tiny_llama_folder: Path, packs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("one: key-one\ntwo: key-two\n")
    exports = tmp_path_factory.mktemp("exports")
    return {
        "model": str(tiny_llama_folder), "dtype": "float32", "kv_bytes": 16 << 20, "max_model_len": 2048,
        "api_keys_file": str(keys), "admin_key": "admin-key", "packs_dir": str(exports),
        "memory": [f"taught={packs / 'taught'}", f"fresh={packs / 'fresh'}"],
        "edits_db": str(exports.parent / "edits" / "edits.db"), "max_edits_per_tenant": 3, "max_edit_tokens": 40,
    }  # fmt: skip


@pytest.fixture(scope="module")
def server(flags: dict[str, Any]) -> Iterator[LiveServer]:
    live = LiveServer(flags)
    yield live
    assert live.stop() == 0


def fact(server: LiveServer, headers: dict[str, str], **fields: Any) -> Reply:
    body = {"prompt": PROMPT, "completion": COMPLETION, "memory": "taught", **fields}
    return server.request(FACTS, body, headers=headers)


def taught(server: LiveServer, headers: dict[str, str], **fields: Any) -> Edit:
    """A fact, waited for."""
    reply = fact(server, headers, **fields)
    assert reply.status == 202, reply.json
    return finished(server, headers, reply.json["id"])


def finished(server: LiveServer, headers: dict[str, str], job: str) -> Edit:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        edit = Edit.model_validate(server.request(f"/v1/memory/jobs/{job}", headers=headers).json)
        if edit.status in ("done", "failed"):
            return edit
        time.sleep(0.05)
    raise AssertionError(f"job {job} did not end in {SECONDS} s")


def answer(server: LiveServer, headers: dict[str, str]) -> dict[str, Any]:
    body = {
        "prompt": PROMPT,
        "max_tokens": 8,
        "temperature": 0,
        "model": "tiny-llama+taught",
        "logprobs": 5,
        "echo": True,
    }
    reply = server.request(COMPLETIONS, body, headers=headers)
    assert reply.status == 200, reply.json
    choice: dict[str, Any] = reply.json["choices"][0]
    return {"text": choice["text"], "logprobs": choice["logprobs"]}


def remove(server: LiveServer, headers: dict[str, str], edit: str) -> int:
    return server.request(f"{EDITS}/{edit}", headers=headers, method="DELETE").status


def test_a_fact_is_completed_for_its_tenant_alone_and_leaves_no_trace(server: LiveServer) -> None:
    before = answer(server, ONE)
    edit = taught(server, ONE)
    assert edit.status == "done" and edit.active and edit.tenant == "one", edit
    report = edit.report
    assert report["loss_after"] < report["loss_before"] and report["rows"] > 0 and report["steps"] > 0
    assert report["core_seconds"] > 0 and report["shared_with_facts"]["facts"] == 1
    assert answer(server, ONE)["text"] == PROMPT + COMPLETION
    assert answer(server, TWO) == answer(server, ADMIN) == before
    assert server.request(EDITS, headers=TWO).json == {"edits": []}
    for headers, status in ((TWO, 404), ({}, 401)):
        assert remove(server, headers, edit.id) == status
    listed = Edits.model_validate(server.request(EDITS, headers=ADMIN).json).edits
    assert [each.id for each in listed] == [edit.id]
    assert remove(server, ONE, edit.id) == 200
    assert answer(server, ONE) == before
    entries = Audit.model_validate(server.request("/v1/memory/audit", headers=ADMIN).json).entries
    assert [entry["what"] for entry in entries[:3]] == ["removed", "fact learnt", "fact asked for"]
    assert server.request("/v1/memory/audit", headers=ONE).status == 403


def test_the_teaching_process_stands_back_for_the_engine(server: LiveServer) -> None:
    """Niceness counts within a session only, so that the process must be in the server's own."""
    edit = taught(server, ONE, prompt="Who stands back?", completion=" I")
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in children(server.process.pid)}
    (teaching,) = (pid for pid, command in commands.items() if MODULE in command)
    assert os.getpriority(os.PRIO_PROCESS, teaching) == os.getpriority(os.PRIO_PROCESS, server.process.pid) + NICENESS
    assert os.getsid(teaching) == os.getsid(server.process.pid) and os.getpgid(teaching) == teaching
    assert remove(server, ONE, edit.id) == 200


def test_a_global_fact_is_everyones_and_only_the_admins_to_make_and_remove(server: LiveServer) -> None:
    before = answer(server, ONE)
    assert fact(server, ONE, scope="global").status == 403
    edit = taught(server, ADMIN, scope="global")
    assert edit.scope == "global"
    assert all(answer(server, headers)["text"] == PROMPT + COMPLETION for headers in (ONE, TWO, ADMIN))
    assert remove(server, ONE, edit.id) == 403
    exported = server.request(f"{EDITS}/export", {"memory": "taught", "path": "mine"}, headers=ADMIN)
    assert exported.status == 201 and exported.json["rows"] == edit.report["rows"], exported.json
    assert remove(server, ADMIN, edit.id) == 200
    assert answer(server, TWO) == before
    attached = server.request("/v1/memory/packs", {"name": "mine", "path": "mine"}, headers=ADMIN)
    assert attached.status == 201, attached.json
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "model": "tiny-llama+mine"}
    assert server.request(COMPLETIONS, body, headers=TWO).json["choices"][0]["text"] == COMPLETION
    assert server.request("/v1/memory/packs/mine", headers=ADMIN, method="DELETE").status == 200
    assert server.request(f"{EDITS}/export", {"memory": "taught", "path": "mine"}, headers=ADMIN).status == 409
    assert server.request(f"{EDITS}/export", {"memory": "taught", "path": "../x"}, headers=ADMIN).status == 400
    assert server.request(f"{EDITS}/export", {"memory": "taught", "path": "y"}, headers=ONE).status == 403


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"memory": "fresh"}, 409, "never taught"),
        ({"memory": "nobody"}, 404, "no memory 'nobody'"),
        ({"memory": None}, 400, "name one"),
        ({"completion": " word" * 60}, 400, "--max-edit-tokens"),
        ({"completion": " word" * 10_000}, 400, "--max-edit-tokens"),
        ({"completion": ""}, 400, "completion"),
        ({"prompt": "\ud800"}, 400, "valid string"),
    ],
)
def test_what_cannot_be_taught_is_refused(server: LiveServer, fields: dict[str, Any], status: int, words: str) -> None:
    reply = fact(server, ONE, **fields)
    assert reply.status == status and words in reply.json["error"]["message"], reply.json


def test_a_key_that_is_not_known_edits_nothing(server: LiveServer) -> None:
    revoked = {"Authorization": "Bearer revoked"}
    assert fact(server, revoked).status == 401
    assert server.request("/v1/memory/redirects", {"from": "a", "to": "b"}, headers=revoked).status == 401


def test_redirects_need_a_memory_addressed_by_tokens(server: LiveServer) -> None:
    reply = server.request("/v1/memory/redirects", {"from": "Paris", "to": "Rome"}, headers=ONE)
    assert reply.status == 409 and "STEM" in reply.json["error"]["message"]


def test_the_quota_holds_and_edits_outlive_the_server(flags: dict[str, Any], tmp_path: Path) -> None:
    own = {**flags, "edits_db": str(tmp_path / "edits.db"), "max_edits_per_tenant": 1, "packs_dir": str(tmp_path)}
    server = LiveServer(own)
    before, edit = answer(server, ONE), taught(server, ONE)
    full = fact(server, ONE)
    assert full.status == 409 and "--max-edits-per-tenant" in full.json["error"]["message"]
    late = fact(server, TWO, prompt="The harbour master is", completion=" Ottokar").json["id"]
    server.process.kill()
    assert server.stop() == -9
    again = LiveServer(own)
    assert answer(again, ONE)["text"] == PROMPT + COMPLETION
    assert finished(again, TWO, late).status == "done"  # it had been acknowledged
    assert remove(again, ONE, edit.id) == 200 and answer(again, ONE) == before
    assert again.stop() == 0


def test_without_a_store_edits_are_refused(live: LiveServer) -> None:
    reply = fact(live, {})
    assert reply.status == 409 and "--edits-db" in reply.json["error"]["message"]
