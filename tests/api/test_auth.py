"""Keys: who is let in, as whom, what stays secret, and what a server without keys refuses to do."""

from __future__ import annotations

import ssl
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from server.api.auth import Keys, check_exposure, is_loopback, keys_of_file
from server.api.serve import check_tls
from server.errors import SettingsError
from server.settings import Settings
from tests.api.live import LiveServer

COMPLETIONS = "/v1/completions"
ALICE, BOB, LINE, ADMIN = "alice-secret-1", "bob-secret-2", "sk-of-the-command-line", "the-admin-secret"
OPEN = ("/health", "/ready", "/version", "/docs", "/openapi.json")
GUARDED = ("/v1/models", "/metrics", "/tokenizer_info", "/nowhere")


@pytest.fixture(scope="module")
def guarded(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with four keys, one origin, JSON log lines and one request at a time for each key."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys").write_text(f"# who may ask\nalice: {ALICE}\n\nbob: {BOB}\n")
    flags = {"model": str(tiny_llama_folder), "dtype": "float32", "kv_bytes": 16 << 20, "max_model_len": 2048}
    flags |= {"api_keys_file": str(folder / "keys"), "api_key": [LINE], "admin_key": ADMIN, "log_format": "json"}
    flags |= {"cors_origin": ["https://chat.example"], "max_concurrency_per_key": 2, "max_waiting_tokens": 3000}
    server = LiveServer({**flags, "log_level": "debug", "body_timeout": 0.5}, log=folder / "log")
    yield server
    assert server.stop() == 0


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_probes_and_pages_are_open_and_all_else_needs_a_key(guarded: LiveServer) -> None:
    assert [guarded.request(path).status for path in OPEN] == [200] * len(OPEN)
    for path in GUARDED:
        reply = guarded.request(path)
        assert reply.status == 401 and reply.headers["www-authenticate"] == "Bearer"
        assert reply.json["error"]["type"] == "AuthenticationError" and reply.headers["x-request-id"]


@pytest.mark.parametrize("key", [ALICE, BOB, LINE, ADMIN])
def test_each_key_is_let_in_both_ways(guarded: LiveServer, key: str) -> None:
    assert guarded.request("/v1/models", headers=bearer(key)).status == 200
    assert guarded.request("/v1/models", headers={"X-Api-Key": key}).status == 200
    assert guarded.request("/v1/models", headers={"Authorization": f"bearer {key}"}).status == 200


@pytest.mark.parametrize("key", ["", "wrong", ALICE[:-1], ALICE + "x", ALICE.upper(), "sha256:" + "0" * 64])
def test_no_other_key_is(guarded: LiveServer, key: str) -> None:
    assert guarded.request("/v1/models", headers=bearer(key)).status == 401
    assert guarded.request(COMPLETIONS, b"x" * 100, headers={"X-Api-Key": key}).status == 401


def test_the_client_raises_its_own_exception(guarded: LiveServer) -> None:
    for key, expected in ((ALICE, None), ("wrong", openai.AuthenticationError)):
        with openai.OpenAI(base_url=guarded.url + "/v1", api_key=key, max_retries=0) as client:
            if expected is None:
                assert client.models.list().data
            else:
                with pytest.raises(expected):
                    client.models.list()


def test_the_documentation_says_that_a_key_is_needed(guarded: LiveServer) -> None:
    document = guarded.request("/openapi.json").json
    assert document["security"] == [{"key": []}]
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


def cached(server: LiveServer, key: str, prompt: list[int], **fields: Any) -> int:
    body = {"prompt": prompt, "max_tokens": 1, **fields}
    usage = server.request(COMPLETIONS, body, headers=bearer(key)).json["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def test_a_prefix_is_found_by_the_key_that_computed_it_and_no_other(guarded: LiveServer) -> None:
    prompt = [5, 6, 7, 8] * 20
    assert [cached(guarded, ALICE, prompt) for _ in range(2)] == [0, 64]
    assert cached(guarded, BOB, prompt) == 0
    assert cached(guarded, ADMIN, prompt) == 0
    assert cached(guarded, ALICE, prompt, cache_salt="apart") == 0
    assert cached(guarded, ALICE, prompt) == 64


def test_only_the_origin_named_may_call_from_a_page(guarded: LiveServer) -> None:
    for origin, allowed in (("https://chat.example", True), ("https://evil.example", False)):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        preflight = guarded.request(COMPLETIONS, headers=asked, method="OPTIONS")
        assert preflight.status == (200 if allowed else 400)
        refused = guarded.request("/v1/models", headers={"Origin": origin})
        assert refused.status == 401  # and a page may read why
        for reply in (preflight, refused):
            assert (reply.headers.get("access-control-allow-origin") == origin) is allowed


def test_no_key_stands_in_settings_or_in_the_log(guarded: LiveServer) -> None:
    settings = Settings(api_key=(ALICE,), admin_key=ADMIN, ssl_keyfile_password="hush")
    assert not any(secret in f"{settings} {settings.api_key}" for secret in (ALICE, ADMIN, "hush"))
    guarded.request("/v1/models", headers=bearer(ALICE))
    guarded.request("/v1/models", headers=bearer("a-wrong-key-that-was-sent"))
    assert guarded.log is not None
    log = guarded.log.read_text()
    assert "alice" in log and not any(key in log for key in (ALICE, BOB, LINE, ADMIN, "a-wrong-key"))


# ── the keys themselves ─────────────────────────────────────────────────────────────────────────────────────────────


def scope(key: str | None = None, host: str = "127.0.0.1:8000") -> dict[str, Any]:
    headers = [(b"host", host.encode())]
    return {"headers": headers + ([(b"authorization", f"Bearer {key}".encode())] if key else [])}


def test_a_hashed_key_serves_as_well_as_the_key() -> None:
    hashed = Settings(api_key=(ALICE,)).api_key[0]
    assert Settings(api_key=(hashed,)) == Settings(api_key=(ALICE,))
    assert Keys(Settings(api_key=(hashed,))).caller(scope(ALICE)) is not None
    assert Keys(Settings(api_key=(hashed,))).caller(scope(hashed)) is None


def test_callers_have_names_and_salts_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"alice: {ALICE}\nbob: {BOB}\nalice: {ALICE}-next\n")
    keys = Keys(Settings(api_keys_file=str(tmp_path / "keys"), api_key=(LINE,), admin_key=ADMIN))
    callers = [keys.caller(scope(key)) for key in (ALICE, BOB, LINE, ADMIN, f"{ALICE}-next")]
    alice, bob, line, admin, rotated = callers
    assert alice is rotated and alice is not None
    assert [c.is_admin for c in callers if c] == [False, False, False, True, False]
    assert len({c.salt for c in callers if c}) == len({c.name for c in callers if c}) == 4
    assert line is not None and line.name.startswith("key-") and bob is not None and admin is not None
    assert all(c.salt not in repr(c).encode() for c in callers if c)


def test_the_name_of_a_key_without_one_depends_on_nothing_else() -> None:
    alone = Keys(Settings(api_key=(LINE,))).caller(scope(LINE))
    among = Keys(Settings(api_key=(ALICE, BOB, LINE))).caller(scope(LINE))
    assert alone is not None and among is not None and alone.name == among.name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no key"),
        ("justakey", "line 1: write NAME: KEY"),
        ("# x\nadmin: k", "line 2"),
        ("a b: k", "line 1"),
        ("a:", "visible ASCII"),
        ("a: k k", "visible ASCII"),
    ],
)
def test_a_wrong_keys_file_is_refused_by_its_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(SettingsError, match=words) as refused:
        keys_of_file(tmp_path / "keys")
    assert "justakey" not in str(refused.value)


def test_one_key_cannot_have_two_names(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"alice: {ALICE}\nbob: {ALICE}\n")
    with pytest.raises(SettingsError, match="'alice' and 'bob' are the same"):
        Keys(Settings(api_keys_file=str(tmp_path / "keys")))


@pytest.mark.parametrize("key", ["with space", "", "schlüssel", "x" * 513, "new\nline"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(key: str) -> None:
    with pytest.raises(SettingsError, match="--api-key") as refused:
        Settings(api_key=(key,))
    assert not key or key not in str(refused.value)


def test_without_keys_who_sits_at_the_machine_is_admin_and_a_page_elsewhere_is_not() -> None:
    alone = Keys(Settings())
    assert [alone.caller(scope(host=host)).is_admin for host in ("localhost", "[::1]:8000", "evil.example")] == [
        True,
        True,
        False,
    ]
    exposed = Keys(Settings(no_auth=True), loopback=False)
    assert not exposed.caller(scope()).is_admin
    with_admin = Keys(Settings(admin_key=ADMIN))
    assert [with_admin.caller(scope(key)).is_admin for key in (None, "other", ADMIN)] == [False, False, True]


def test_only_a_server_with_keys_is_reached_from_elsewhere() -> None:
    for address in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(SettingsError, match="--no-auth"):
            check_exposure(address, Settings(host=address), Keys(Settings()))
        with pytest.raises(SettingsError, match="--no-auth"):  # an admin key keeps nobody out
            check_exposure(address, Settings(host=address), Keys(Settings(admin_key=ADMIN)))
        check_exposure(address, Settings(host=address), Keys(Settings(api_key=(ALICE,))))
        check_exposure(address, Settings(host=address, no_auth=True), Keys(Settings()))
    check_exposure("127.0.0.1", Settings(), Keys(Settings()))


def test_loopback_is_this_machines_own_names_only() -> None:
    assert all(
        map(is_loopback, ("127.0.0.1", "127.9.9.9:80", "::1", "[::1]", "[::1]:8000", "localhost", "LOCALHOST:1"))
    )
    assert not any(map(is_loopback, ("", "0.0.0.0", "::", "localhost.example", "127.0.0.1.example", "10.0.0.1")))


# ── TLS ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1 with its key, in one file each."""
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


def test_the_server_speaks_tls(tiny_llama_folder: Path, certificate: Path) -> None:
    files = {"ssl_certfile": str(certificate / "cert.pem"), "ssl_keyfile": str(certificate / "key.pem")}
    server = LiveServer({"model": str(tiny_llama_folder), "kv_bytes": 16 << 20, "max_model_len": 256, **files})
    try:
        context = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
        with urllib.request.urlopen(f"https://127.0.0.1:{server.port}/ready", timeout=10, context=context) as reply:
            assert reply.status == 200
    finally:
        assert server.stop() == 0


def test_tls_that_cannot_work_is_said_before_anything_is_loaded(certificate: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text("no certificate")
    for settings, words in (
        (Settings(ssl_keyfile="key.pem"), "--ssl-certfile"),
        (Settings(ssl_certfile=str(tmp_path / "none.pem")), "No such file"),
        (Settings(ssl_certfile=str(tmp_path / "bad.pem")), "TLS cannot be set up"),
        (Settings(ssl_certfile=str(certificate / "cert.pem"), ssl_keyfile=str(certificate / "cert.pem")), "TLS"),
    ):
        with pytest.raises(SettingsError, match=words):
            check_tls(settings)
