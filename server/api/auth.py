"""Who asks: API keys by their hashes, the admin key, and the `Caller` that every request carries.

    Authorization: Bearer KEY   or   X-Api-Key: KEY   ──▶ SHA-256 ──▶ compared with every known digest ──▶ Caller

Keys arrive hashed already (`settings.hashed_key`); none is kept, logged or echoed. Without any key the server answers
everyone, and whoever reaches it under one of this machine's own names may administer it: it listens on loopback then,
unless --no-auth says otherwise, and in that case nobody is admin without a key.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from hmac import compare_digest
from pathlib import Path

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import response_of
from server.api.metrics import RequestMetrics
from server.errors import Forbidden, SettingsError, Unauthorized
from server.settings import Settings, hashed_key

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ANONYMOUS, ADMIN = "anonymous", "admin"
SALT_BYTES = 16
# What needs no key: probes, and pages that hold nothing of anyone's.
OPEN = frozenset({"/", "/health", "/ready", "/version", "/docs", "/docs/oauth2-redirect", "/openapi.json"})
OPEN_FOLDER = "/static/"


@dataclass(frozen=True, slots=True)
class Caller:
    """A tenant; keys of one name are one. `salt` seeds its share of the prefix cache, which nobody else finds."""

    name: str
    salt: bytes = field(repr=False)
    is_admin: bool = False

    def prefix_salt(self, own: str | None) -> bytes:
        """The salt of one request, which may bring a further one of its own."""
        return self.salt + (own or "").encode()


class Keys:
    """The known keys. `required`: whether a request must bring one."""

    def __init__(self, settings: Settings, *, loopback: bool = True) -> None:
        """Raises SettingsError for a keys file that cannot be read, or one key under two names."""
        self._callers: dict[bytes, Caller] = {}
        named: dict[str, Caller] = {}
        for name, digest in _named(settings):
            caller = named.setdefault(name, Caller(name, secrets.token_bytes(SALT_BYTES), name == ADMIN))
            if self._callers.setdefault(digest, caller) is not caller:
                raise SettingsError(f"the keys {self._callers[digest].name!r} and {name!r} are the same; change one")
        self.required = any(not caller.is_admin for caller in self._callers.values())
        # With no key at all, whoever sits at this machine is its operator.
        self._anyone_is_admin = loopback and not self._callers

    def knows(self, name: str) -> bool:
        """Whether requests can still come from a caller of this name."""
        return name in {caller.name for caller in self._callers.values()} or (name == ANONYMOUS and not self.required)

    def caller(self, scope: Scope) -> Caller | None:
        """Who sent this request; None for a key that is not known, or none where one is needed."""
        presented, host = None, b""
        for name, value in scope["headers"]:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                presented = value[7:].strip()
            elif name == b"x-api-key" and presented is None:
                presented = value
            elif name == b"host":
                host = value
        if presented is not None and self._callers:
            found = self._lookup(hashlib.sha256(presented).digest())
            if found is not None or self.required:
                return found
        if self.required:
            return None
        # A page of another site that made its own name point here still names itself in Host.
        return Caller(ANONYMOUS, b"", self._anyone_is_admin and is_loopback(host.decode("latin-1")))

    def _lookup(self, digest: bytes) -> Caller | None:
        """Compares with all of them, each in constant time, whether or not one has matched."""
        found = None
        for known, caller in self._callers.items():
            if compare_digest(known, digest):
                found = caller
        return found


def _named(settings: Settings) -> Iterable[tuple[str, bytes]]:
    """Name and SHA-256 of each key."""
    for key in settings.api_key:
        digest = bytes.fromhex(key.removeprefix("sha256:"))
        # A name of its own, the same whatever other keys there are: what a tenant owns must not change hands.
        yield f"key-{hashlib.blake2b(digest, digest_size=4, person=b'engram-key-name').hexdigest()}", digest
    if settings.api_keys_file:
        yield from keys_of_file(Path(settings.api_keys_file))
    if settings.admin_key:
        yield ADMIN, bytes.fromhex(settings.admin_key.removeprefix("sha256:"))


def keys_of_file(path: Path) -> list[tuple[str, bytes]]:
    """Lines `name: key`, blank ones and # comments aside. Raises SettingsError naming the line, never its key."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--api-keys-file {path} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, separator, key = (part.strip() for part in line.partition(":"))
        origin = f"--api-keys-file {path}, line {number}"
        if not separator or not NAME.fullmatch(name) or name in (ADMIN, ANONYMOUS):
            raise SettingsError(
                f"{origin}: write NAME: KEY, the name of letters, digits, '.', '_' and '-', not 'admin'"
            )
        found.append((name, bytes.fromhex(hashed_key(key, origin).removeprefix("sha256:"))))
    if not found:
        raise SettingsError(f"--api-keys-file {path} holds no key; write lines NAME: KEY, or leave the flag out")
    return found


def check_exposure(address: str, settings: Settings, keys: Keys) -> None:
    """Raises SettingsError if a server without keys would be reachable from elsewhere."""
    if not keys.required and not settings.no_auth and not is_loopback(address):
        raise SettingsError(
            f"--host {settings.host} can be reached from other machines and no key is set; set --api-key, "
            f"--api-keys-file or ENGRAM_API_KEY, or say --no-auth if everyone may use this server"
        )


def is_loopback(host: str) -> bool:
    """Whether a host, with or without port, is this machine's own name for itself."""
    name = host.strip().lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Auth:
    """Puts the Caller into the request's state, or answers 401 before anything of the body is read."""

    def __init__(self, app: ASGIApp, keys: Keys, metrics: RequestMetrics) -> None:
        self.app, self.keys, self._metrics = app, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        caller = self.keys.caller(scope)
        if caller is None:
            path = scope["path"]
            if path not in OPEN and not path.startswith(OPEN_FOLDER):
                self._metrics.refused["unauthorized"] += 1
                error = Unauthorized("no API key, or one this server does not know; send Authorization: Bearer KEY")
                response = response_of(error)
                response.headers["WWW-Authenticate"] = "Bearer"
                return await response(scope, receive, send)
            caller = Caller(ANONYMOUS, b"")
        scope.setdefault("state", {})["caller"] = caller
        await self.app(scope, receive, send)


def caller_of(request: Request) -> Caller:
    """The tenant that a route serves."""
    caller: Caller = request.state.caller
    return caller


def require_admin(request: Request) -> Caller:
    """Raises Forbidden unless the caller may change what the server serves. A FastAPI dependency."""
    caller = caller_of(request)
    if not caller.is_admin:
        raise Forbidden("only the admin key may do this; start the server with --admin-key and send that key")
    return caller
