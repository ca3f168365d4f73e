"""uvicorn, with what it lacks: a time limit for request heads, and an end that drains and exits with 0."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lawnwatch import log
from lawnwatch.config import Settings
from lawnwatch.errors import SettingsError
from lawnwatch.serving import problems
from lawnwatch.serving.watcher import ModelWatcher
from lawnwatch.store import open_store

logger = log.get(__name__)

HEAD_SECONDS = 10.0  # from a connection, or a request's first byte, to the end of its headers
LINGER_SECONDS = 3.0  # an answered request may go on sending for so long before the connection is cut
KEEP_ALIVE_SECONDS = 30
MAX_HEAD_BYTES = 65_536
# glibc's mallopt: one heap for all threads, and what is larger than a small photo goes back to the system at once.
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
LARGE_BYTES = 1 << 20
TRIM_SECONDS = 1.0


class TimedProtocol(HttpToolsProtocol):
    """Closes connections that never finish a request's head, or that keep sending after the answer."""

    _clock: asyncio.TimerHandle | None = None
    _in_message = False
    _head_bytes = 0
    _in_head = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            # A head of endless headers; the first piece of a body may be in the same bytes, hence the room.
            if self._head_bytes > MAX_HEAD_BYTES + 262_144:
                self.transport.abort()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_message = self._in_head = True
        self._head_bytes = 0
        self._arm(HEAD_SECONDS)

    def on_headers_complete(self) -> None:
        self._disarm()
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_message = False
        self._disarm()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_message and not self.transport.is_closing():
            self._arm(LINGER_SECONDS)

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP is told so in the same form as every other error."""
        body = bytes(problems.problem(400, "bad_request", "This is not a valid HTTP request.").body)
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/problem+json\r\n"
            b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        self.transport.close()

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._clock = self.loop.call_later(seconds, self._cut)

    def _disarm(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _cut(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.abort()


class Server(uvicorn.Server):
    """Ends in steps: not ready but answering; `drain_seconds` later no new connections; what is under way; exit 0."""

    def __init__(self, config: uvicorn.Config, *, drain_seconds: float, on_drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain_seconds = drain_seconds
        self._on_drain = on_drain
        self._ends_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain; second: at once. It is not raised again: being told to end is no failure."""
        if self._ends_at is None:
            self._on_drain()
            # Whoever keeps a connection makes the next one elsewhere. (uvicorn takes the first up once a second.)
            self.config.encoded_headers = [*self.config.encoded_headers, (b"connection", b"close")]
            self.server_state.default_headers = [*self.server_state.default_headers, (b"connection", b"close")]
            self._ends_at = time.monotonic() + self._drain_seconds
        else:
            self._ends_at = time.monotonic()
            self.force_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """What was made until now lives as long as the process: the collector need not look at it again."""
        await super().startup(sockets)
        gc.collect()
        gc.freeze()

    async def on_tick(self, counter: int) -> bool:
        """Called every 0.1 s; True ends the main loop."""
        if self._ends_at is not None and time.monotonic() >= self._ends_at:
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a taken port is said in a sentence.

    Raises:
        SettingsError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        taken = error.errno == errno.EADDRINUSE
        raise SettingsError(
            f"The API cannot listen on {host}:{port}: {'the port is taken' if taken else error.strerror}.",
            hint="Choose another with --port or LAWNWATCH_SERVING__PORT.",
        ) from error
    return sock


def config(app: Any, *, graceful_seconds: float) -> uvicorn.Config:
    """uvicorn's settings for this API."""
    return uvicorn.Config(
        app,
        http=TimedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,  # lawnwatch.log has set up logging; uvicorn's lines go the same way
        log_level="error",  # a line for every malformed request would be a gift to an attacker
        access_log=False,
        server_header=False,
        date_header=True,
        proxy_headers=False,
        backlog=2048,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(graceful_seconds)),
    )


def run(settings: Settings) -> None:
    """Serve until a signal ends it: not ready, drain, flush the records, return.

    Raises:
        SettingsError: the address cannot be listened on.
    """
    _spare_memory()
    serving = settings.serving
    sock = listen(serving.host, serving.port)
    watcher = ModelWatcher(settings, lambda: open_store(settings))
    watcher.start()  # the model is read and proven while the web framework is imported
    from lawnwatch.serving.app import create_app

    app = create_app(settings, watcher)
    logger.info("serving", address=f"http://{serving.host}:{sock.getsockname()[1]}")
    Server(
        config(app, graceful_seconds=serving.request_timeout),
        drain_seconds=serving.drain_seconds,
        on_drain=app.state.api.drain,
    ).run([sock])


def _spare_memory() -> None:
    """A heap for each thread, and heaps that never shrink, cost a third of the process; elsewhere than glibc: nothing.

    Pictures of all sizes leave holes in the heap as large as the model; handing them back takes 2 ms a second of a
    thread that holds no GIL.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        return
    libc.mallopt(M_ARENA_MAX, 1)
    libc.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)

    def trim() -> None:
        while True:
            time.sleep(TRIM_SECONDS)
            libc.malloc_trim(0)

    threading.Thread(target=trim, name="malloc-trim", daemon=True).start()
