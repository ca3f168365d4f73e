"""uvicorn, with what it lacks: limits for heads, readers and connections, and an end that drains and exits with 0."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import gc
import logging
import math
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from types import FrameType
from typing import Any, ClassVar, NoReturn

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from lawnwatch import log
from lawnwatch.config import Settings
from lawnwatch.errors import SettingsError
from lawnwatch.ids import random_bytes
from lawnwatch.serving import problems
from lawnwatch.serving.watcher import ModelWatcher
from lawnwatch.store import open_store

logger = log.get(__name__)

HEAD_SECONDS = 10.0  # from a connection, or a request's first byte, to the end of its headers
LINGER_SECONDS = 3.0  # an answered request may go on sending for so long before the connection is cut
KEEP_ALIVE_SECONDS = 30
MAX_HEAD_BYTES = 65_536
MAX_CONNECTIONS = 2_048
OTHER_FILES = 256  # open beside the connections: the store, the database, what is imported late
UNREAD_SECONDS = 10.0  # in which a client takes all that waits for it, or
UNREAD_BYTES = 500_000  # so much of it
# After a refusal for want of room a connection is not read for so long at least, then in its turn, so many a second.
# Hundreds that come back at once, whatever Retry-After says, would keep the event loop busy all the time, and the
# threads that answer wait for the GIL.
REST_SECONDS, MAX_REST_SECONDS = 0.25, 4.0
READ_AGAIN_PER_SECOND = 300
# From the end of draining to that of the process are 30 s: these for what is under way, 1 for it to notice that it was
# cut, 5 for the watcher, 11 for the records, 1 to spare. The chart kills 5 s later.
FINISH_SECONDS = 12.0
NOTICE_SECONDS = 1.0
# glibc's mallopt: one heap for all threads, and what is larger than a small photo goes back to the system at once.
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
LARGE_BYTES = 1 << 20
TRIM_SECONDS = 1.0


class Refused(Exception):
    """Ends the parsing of a request that was refused."""


class TimedProtocol(HttpToolsProtocol):
    """Cuts who never finishes a head, goes on sending after the answer, or does not read it; bounds heads and number.

    What runs for every request is a comparison or two: who does not read is looked for from outside, once a second.
    """

    max_connections = MAX_CONNECTIONS
    on_refusal: ClassVar[Callable[[int], None] | None] = None  # told the status
    _last_turn = 0.0  # of all connections: when the last of those that rest is read again, in the loop's time
    _clock: asyncio.TimerHandle | None = None
    _in_message = False
    _in_head = True
    _received = 0  # bytes that came last
    _head_bytes = 0  # of a head that those have not ended
    _trailing_bytes = 0  # since the body's last ones: trailers, for which the parser has no limit
    _declined: bytes | None = None  # a head, without the upgrade that it asks for
    _running: RequestResponseCycle | None = None
    _unread: tuple[float, int] | None = None  # when that many bytes waited for the client

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm(HEAD_SECONDS)
        if len(self.connections) > self.max_connections:
            self._make_way()

    def _make_way(self) -> None:
        """One connection too many: one on which nothing is asked ends, or else this one."""
        for each in self.connections:
            if isinstance(each, TimedProtocol) and each is not self and each.is_idle:
                each.transport.close()
                return
        self._refuse(
            503, "overloaded", "Too many connections are open.", "Try again in a moment.", (b"retry-after", b"1")
        )

    @property
    def is_idle(self) -> bool:
        """Nothing is asked and nothing waits to be sent."""
        answered = self.cycle is None or self.cycle.response_complete
        return answered and not self.transport.is_closing() and not self.transport.get_write_buffer_size()

    def cut_if_unread(self, now: float) -> None:
        """Called once a second: cut who leaves its answer where it is, also when the connection is being closed."""
        waiting = self.transport.get_write_buffer_size()
        if not waiting:
            self._unread = None
        elif self._unread is None or waiting > self._unread[1]:
            self._unread = now, waiting
        elif now - self._unread[0] >= UNREAD_SECONDS:
            if self._unread[1] - waiting < UNREAD_BYTES:
                self.transport.abort()
            self._unread = now, waiting

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        # uvicorn tells the request that was read last; with others behind it, that is not the one under way.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received = len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("")
        if self.transport.is_closing():
            return
        # The bytes in which a head begins may hold a body's end too and do not count; those after them are head.
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse_head()
        elif self._in_message:
            self._trailing_bytes += len(data)
            if self._trailing_bytes > MAX_HEAD_BYTES:
                self._refuse_trailers()

    def _parse(self, data: bytes | memoryview) -> None:
        """Feed the parser. What follows a head that asks for another protocol goes to a new one, as for any head.

        A server may answer as if nobody had asked (RFC 9110, 7.8), but httptools takes no body then: the answer would
        be to an empty one, and the body be the next request. Java's HttpClient asks with each first request.
        """
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if self._declined is None:  # CONNECT
                    return
                data = memoryview(data)[upgrade.args[0] :]
                head, self._declined = self._declined, None
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.parser.feed_data(head)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_message = self._in_head = True
        self._head_bytes = -self._received
        self._arm(HEAD_SECONDS)

    def on_headers_complete(self) -> None:
        self._disarm()
        if self._received > MAX_HEAD_BYTES or self._head_bytes >= 0:  # else it came in one small piece
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > MAX_HEAD_BYTES:
                self._refuse_head()
                raise Refused
        if self.parser.should_upgrade() and (method := self.parser.get_method()) != b"CONNECT":
            kept = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
            version = self.parser.get_http_version().encode()
            self._declined = b"%b %b HTTP/%b\r\n%b\r\n" % (method, self.url, version, b"".join(kept))
            return
        self._in_head = False
        self._trailing_bytes = -self._received
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._trailing_bytes = -self._received
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._declined is not None:
            return
        self._in_message = False
        self._disarm()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        answered = self._running
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._in_message:
            self._arm(LINGER_SECONDS)
        if answered is not None and answered.scope["state"].get("refused"):
            self._rest()

    def _rest(self) -> None:
        self.flow.pause_reading()
        now = self.loop.time()
        turn = max(now + REST_SECONDS, TimedProtocol._last_turn + 1 / READ_AGAIN_PER_SECOND)
        TimedProtocol._last_turn = min(turn, now + MAX_REST_SECONDS)
        self.loop.call_at(TimedProtocol._last_turn, self._wake)

    def _wake(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP is told so in the same form as every other error."""
        self._refuse(400, "bad_request", "This is not a valid HTTP request.")

    def _refuse_head(self) -> None:
        what = f"The head of the request has more than {MAX_HEAD_BYTES} bytes."
        self._refuse(431, "head_too_large", what, "Send fewer or shorter headers.")

    def _refuse_trailers(self) -> None:
        if self._running is not self.cycle or self.cycle.response_started:
            self.transport.abort()
            return
        what = f"More than {MAX_HEAD_BYTES} bytes follow the body's last."
        self._refuse(431, "head_too_large", what, "Send fewer or shorter trailers.")

    def _refuse(self, status: int, code: str, detail: str, hint: str = "", *headers: tuple[bytes, bytes]) -> None:
        """Answer before there is a request, and end the connection."""
        from lawnwatch.serving.envelope import CLOSED_POLICY, SECURITY_HEADERS

        if self.transport.is_closing():
            return
        body = bytes(problems.problem(status, code, detail, hint).body)
        head = (
            (b"content-type", b"application/problem+json"),
            (b"x-request-id", random_bytes(16).hex().encode()),
            *SECURITY_HEADERS,
            (b"content-security-policy", CLOSED_POLICY),
            *headers,
            (b"connection", b"close"),
            (b"content-length", b"%d" % len(body)),
        )
        first = b"HTTP/1.1 %d %b\r\n" % (status, HTTPStatus(status).phrase.encode())
        self.transport.write(first + b"".join(b"%b: %b\r\n" % each for each in head) + b"\r\n" + body)
        self.transport.close()
        if TimedProtocol.on_refusal is not None:
            TimedProtocol.on_refusal(status)

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
    """Ends in steps: not ready but answering; `drain_seconds` later no new connections; what is under way; exit 0.

    Args:
        finish_seconds: for what is under way; then all connections are cut, so that nobody keeps the records from
            being written.
        crowded: whether so many pictures wait that no thread runs out of them soon.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        drain_seconds: float,
        finish_seconds: float,
        on_drain: Callable[[], None],
        crowded: Callable[[], bool],
    ) -> None:
        super().__init__(config)
        self._crowded = crowded
        self._gives_way = False
        self._drain_seconds = drain_seconds
        self._finish_seconds = finish_seconds
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
        self._give_way(self._crowded())
        if counter % 10 == 0:
            now = time.monotonic()
            for each in list(self.server_state.connections):
                if isinstance(each, TimedProtocol):
                    each.cut_if_unread(now)
        if self._ends_at is not None and time.monotonic() >= self._ends_at:
            self.should_exit = True
        return await super().on_tick(counter)

    def _give_way(self, crowded: bool) -> None:
        """While pictures queue, this thread waits for a core instead of taking one from a thread that predicts.

        What it would bring has to wait anyway, and each interruption costs the other thread its caches.
        """
        if crowded == self._gives_way or not hasattr(os, "SCHED_BATCH"):
            return
        with contextlib.suppress(OSError):  # a sandbox may forbid it: all is as before then, only slower
            if crowded and os.sched_getscheduler(0) != os.SCHED_OTHER:
                return  # whoever started the process has chosen for it
            os.sched_setscheduler(0, os.SCHED_BATCH if crowded else os.SCHED_OTHER, os.sched_param(0))
            self._gives_way = crowded

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let what is under way finish, in bounds, then end the application."""
        loop = asyncio.get_running_loop()
        loop.call_later(self._finish_seconds, self._cut_all)
        loop.call_later(self._finish_seconds + NOTICE_SECONDS, self._leave_all)
        await super().shutdown(sockets)

    def _cut_all(self) -> None:
        """Requests whose client is gone end by themselves, where those that are cancelled leave a traceback."""
        for each in list(self.server_state.connections):
            each.transport.abort()

    def _leave_all(self) -> None:
        """What a thread works on or waits for cannot be cancelled; uvicorn would try, with a traceback for each."""
        if self.server_state.tasks:
            logger.warning("requests left behind", count=len(self.server_state.tasks))
            self.server_state.tasks.clear()


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


def config(app: Any, *, finish_seconds: float) -> uvicorn.Config:
    """uvicorn's settings for this API.

    Args:
        finish_seconds: when `Server` cuts the connections; it leaves what is still there a second later.
    """
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
        timeout_graceful_shutdown=math.ceil(finish_seconds + NOTICE_SECONDS) + 1,  # never reached
    )


def run(settings: Settings) -> None:
    """Serve until a signal ends it: not ready, drain, flush the records, end the process with 0.

    Raises:
        SettingsError: the address cannot be listened on.
    """
    _spare_memory()
    TimedProtocol.max_connections = min(MAX_CONNECTIONS, _open_files() - OTHER_FILES)
    serving = settings.serving
    sock = listen(serving.host, serving.port)
    watcher = ModelWatcher(settings, lambda: open_store(settings))
    watcher.start()  # the model is read and proven while the web framework is imported
    from lawnwatch.serving.app import create_app

    app = create_app(settings, watcher)
    TimedProtocol.on_refusal = app.state.api.metrics.count_refusal
    logger.info("serving", address=f"http://{serving.host}:{sock.getsockname()[1]}")
    finish = min(serving.request_timeout, FINISH_SECONDS)
    server = Server(
        config(app, finish_seconds=finish),
        drain_seconds=serving.drain_seconds,
        finish_seconds=finish,
        on_drain=app.state.api.drain,
        crowded=app.state.api.crowded,
    )
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(server.serve([sock]))
        if server.started:
            _end()


def _end() -> NoReturn:
    """All is written. Python would wait now for threads that wait for a frozen database, or work on what never ends."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _open_files() -> int:
    """How many files this process may open, once it allows itself what its connections need, if it may.

    The usual limit is 1,024: as many idle connections would leave none for the store and the next client.
    """
    wanted = MAX_CONNECTIONS + OTHER_FILES
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now != resource.RLIM_INFINITY and now < wanted:
        now = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (now, most))
    return wanted if now == resource.RLIM_INFINITY else now


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
