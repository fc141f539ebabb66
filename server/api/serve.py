"""`run`: bind, start the engine, answer HTTP, drain and end. uvicorn carries the protocol.

SIGTERM ─► /ready 503, new requests 503 ─► running ones finish, at most --drain-seconds ─► the rest is aborted ─► end
a second signal ends at once
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import logging
import signal
import socket
import ssl
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from server.api.app import create_app
from server.api.auth import Keys, check_exposure, is_loopback
from server.api.protocol import BoundedProtocol
from server.errors import SettingsError
from server.logs import configure
from server.models.source import open_source
from server.runtime.client import EngineClient
from server.settings import Settings, flag

logger = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75
# After draining, the last bytes leave within this time.
LINGER_SECONDS = 5


def run(settings: Settings, announce: Callable[[EngineClient], None] = lambda client: None) -> None:
    """Serves until a signal. `announce` is called when requests are taken. Raises EngramError if it cannot start."""
    configure(settings, "api")
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(settings, announce))


async def serve(settings: Settings, announce: Callable[[EngineClient], None]) -> None:
    listener = bind(settings.host, settings.port)
    try:
        keys = Keys(settings, loopback=is_loopback(listener.getsockname()[0]))
        check_exposure(listener.getsockname()[0], settings, keys)
        check_tls(settings)
        source = open_source(settings.model)
        client = await EngineClient.start(settings)
        try:
            app = create_app(settings, client, source, keys)
            renderer = app.state.service.renderer
            if renderer is not None:
                renderer.start()
            await app.state.service.edits.start()
            gc.collect()
            gc.freeze()  # what lives as long as the server need not be looked through again: 15 µs per token
            config = uvicorn.Config(
                app,
                http=BoundedProtocol,
                ws="none",
                host=settings.host,
                port=settings.port,
                log_config=None,
                log_level=settings.log_level,
                access_log=False,
                lifespan="off",
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=LINGER_SECONDS,
                server_header=False,
                **tls(settings),
            )
            try:
                await DrainingServer(config, client, settings.drain_seconds, announce).serve(sockets=[listener])
            finally:
                await app.state.service.edits.close()
                if renderer is not None:
                    renderer.close()
        finally:
            await client.close()
    finally:
        listener.close()


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which on the first signal lets the engine finish before it stops listening."""

    def __init__(
        self,
        config: uvicorn.Config,
        client: EngineClient,
        drain_seconds: float,
        announce: Callable[[EngineClient], None],
    ) -> None:
        super().__init__(config)
        self._client, self._drain_seconds, self._announce = client, drain_seconds, announce
        self._draining: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # somebody else began to listen while we loaded
            raise _cannot_listen(self.config.host, self.config.port, error) from None
        if self.started:
            self._announce(self._client)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called from a signal's context. The signal is not raised again at the end: draining is what it asked for."""
        self._loop.call_soon_threadsafe(self._leave, sig)

    def _leave(self, sig: int) -> None:
        if self._draining is None:
            logger.info("%s: draining for at most %.0f s", signal.Signals(sig).name, self._drain_seconds)
            self._draining = asyncio.create_task(self._drain())
        else:
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        await self._client.drain(self._drain_seconds)
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket bound before anything is loaded. Raises SettingsError if the address is in use or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from None
    return listener


def tls(settings: Settings) -> dict[str, Any]:
    """uvicorn's TLS options that are set; none without a certificate."""
    names = ("ssl_certfile", "ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers")
    given = {name: getattr(settings, name) for name in names if getattr(settings, name)}
    if given and not settings.ssl_certfile:
        raise SettingsError(f"{', '.join(map(flag, given))} need a certificate: give --ssl-certfile")
    return given


def check_tls(settings: Settings) -> None:
    """Reads certificate and key before anything is loaded. Raises SettingsError for what cannot be used."""
    if not tls(settings):
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(
            settings.ssl_certfile, settings.ssl_keyfile or None, lambda: settings.ssl_keyfile_password
        )
        if settings.ssl_ca_certs:
            context.load_verify_locations(settings.ssl_ca_certs)
        if settings.ssl_ciphers:
            context.set_ciphers(settings.ssl_ciphers)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise SettingsError(
            f"TLS cannot be set up with --ssl-certfile {settings.ssl_certfile} and the other --ssl flags: "
            f"{error.strerror or error if isinstance(error, OSError) else error}"
        ) from None


def _cannot_listen(host: str, port: int, error: OSError) -> SettingsError:
    return SettingsError(
        f"cannot listen on {host}:{port}: {error.strerror or error}; choose another with --port or --host"
    )


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed: it halves the cost of a write."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
