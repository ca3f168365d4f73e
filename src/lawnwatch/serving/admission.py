"""Who gets in, decided before a body is read.

A request to a guarded path passes three doors. At its head: is there a model, is the process staying, is the
declared length allowed, is there a place? While its body arrives: bytes, time and the memory of all bodies
together are bounded. Then it waits for a thread. Places are `threads + queue`; one more is refused at once
with 503 and Retry-After, which keeps the accepted ones fast.

A body that takes longer than a second to arrive gives its place back and stands in a separate, bounded line
of slow senders, so that slow senders cannot take the service away from the others; it takes a place again
when it is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lawnwatch.errors import LawnwatchError, NoModel, Overloaded, Unavailable
from lawnwatch.serving import problems
from lawnwatch.serving.intake import Intake
from lawnwatch.serving.metrics import Metrics
from lawnwatch.serving.problems import BodyTooLarge, BodyTooSlow, ClientGone

PATIENCE = 1.0  # seconds until a sender counts as slow
SLOW_SENDERS = 64
BODY_MEMORY = 256_000_000  # bytes of all bodies that are held at once
SWALLOW_BYTES = 4_000_000  # of a refused body, for clients that close after the answer
SWALLOW_SECONDS = 1.0

T = TypeVar("T")


class Draining(Unavailable):
    """The process is ending; another one takes over."""

    code = "draining"


@dataclass
class Admission:
    """The places, and what is known of how fast they become free.

    Attributes:
        places: requests that may be under way or waiting for a thread.
        taken: places in use.
        slow: senders whose body takes its time.
        held: bytes of bodies in memory.
        service_seconds: moving average of the time a thread works on a request.
    """

    threads: int
    places: int
    taken: int = 0
    slow: int = 0
    held: int = 0
    service_seconds: float = 0.02
    draining: bool = False
    metrics: Metrics = field(default_factory=Metrics)

    def refuse(self, reason: str, error: LawnwatchError) -> LawnwatchError:
        """Count a refusal and hand back its error."""
        self.metrics.refused.labels(reason).inc()
        return error

    def enter(self) -> None:
        """Take a place. Raises Overloaded when there is none."""
        if self.taken >= self.places:
            wait = max(1, min(30, math.ceil(self.taken * self.service_seconds / self.threads)))
            raise self.refuse(
                "queue_full",
                Overloaded(
                    f"All {self.places} places are taken.",
                    hint=f"Try again in {wait} s; sending more at once makes no answer come sooner.",
                    retry_after=wait,
                ),
            )
        self.taken += 1

    def leave(self) -> None:
        """Give a place back."""
        self.taken -= 1

    def worked(self, seconds: float) -> None:
        """Learn how long a thread worked on a request."""
        self.service_seconds += 0.05 * (seconds - self.service_seconds)


class AdmissionMiddleware:
    """The three doors, as ASGI middleware around the guarded paths.

    Puts into `scope["state"]`: `body` (bytes), `deadline` (loop time), `arrived` (perf_counter at the head)
    and `body_seconds`.

    Args:
        intake: what the POST bodies of a path may be; None where they are not guarded.
        check: raises NoModel when nothing can be answered.
        timeout: seconds for the whole request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        admission: Admission,
        intake: Callable[[str], Intake | None],
        check: Callable[[], object],
        timeout: float,
    ) -> None:
        self._app = app
        self._admission = admission
        self._intake = intake
        self._check = check
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and scope["method"] == "POST"
        intake = self._intake(scope["path"]) if guarded else None
        if intake is None:
            await self._app(scope, receive, send)
            return
        sender = _Sender(self._admission)
        ended = False

        async def arriving() -> Message:
            nonlocal ended
            message = await receive()
            ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
            return message

        try:
            self._at_the_head(scope, intake)
            sender.enter()
            state = scope.setdefault("state", {})
            state["arrived"] = time.perf_counter()
            state["deadline"] = asyncio.get_running_loop().time() + self._timeout
            state["body"] = await self._body(arriving, sender, intake)
            sender.whole()
            state["body_seconds"] = time.perf_counter() - state["arrived"]
            await self._app(scope, receive, send)
        except LawnwatchError as error:
            response = problems.of(error, scope["path"])
            if header(scope, b"expect"):
                # The body was announced and never asked for: the connection has no clear next request.
                response.headers["Connection"] = "close"
            elif not ended and header(scope, b"connection").lower() == "close":
                await swallow(receive)
            await response(scope, receive, send)
        finally:
            sender.leave()

    def _at_the_head(self, scope: Scope, intake: Intake) -> None:
        if self._admission.draining:
            raise self._admission.refuse("draining", Draining("This server is ending.", hint="Try again."))
        try:
            self._check()
        except NoModel as error:
            raise self._admission.refuse("no_model", error) from None
        try:
            intake.check_media(header(scope, b"content-type"))
        except LawnwatchError as error:
            raise self._admission.refuse("media", error) from None
        length = header(scope, b"content-length")
        if length.isascii() and length.isdigit() and (len(length) > 15 or int(length) > intake.max_bytes):
            raise self._too_large(intake)

    async def _body(self, receive: Receive, sender: _Sender, intake: Intake) -> bytes:
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        self._admission.metrics.refused.labels("gone").inc()
                        raise ClientGone
                    piece = message.get("body", b"")
                    size += len(piece)
                    if size > intake.max_bytes:
                        raise self._too_large(intake)
                    sender.hold(len(piece))
                    pieces.append(piece)
                    if not message.get("more_body", False):
                        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        except TimeoutError:
            raise self._admission.refuse(
                "too_slow",
                BodyTooSlow(
                    f"The body did not arrive within {self._timeout:.0f} s; {size} bytes came.",
                    hint="Send a smaller picture or use a faster connection.",
                ),
            ) from None

    def _too_large(self, intake: Intake) -> LawnwatchError:
        return self._admission.refuse(
            "too_large",
            BodyTooLarge(
                f"The body is larger than {intake.what}.",
                hint="Send a smaller file.",
            ),
        )


async def swallow(receive: Receive) -> None:
    """Let a refused body arrive, within bounds, when its client wants the connection closed after the answer.

    A socket that is closed with unread bytes sends a reset, and a reset can overtake the refusal: the client would see
    a broken connection where it should read 503 and Retry-After.
    """
    left = SWALLOW_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SWALLOW_SECONDS):
            while left > 0:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
                left -= len(message.get("body", b""))


class _Sender:
    """One request's hold on places and memory."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._held = 0
        self._placed = False
        self._slow = False
        self._timer: asyncio.TimerHandle | None = None

    def enter(self) -> None:
        self._admission.enter()
        self._placed = True
        self._timer = asyncio.get_running_loop().call_later(PATIENCE, self._is_slow)

    def _is_slow(self) -> None:
        # With the slow line full the sender keeps its place: then it is bounded by the request's time alone.
        if self._placed and self._admission.slow < SLOW_SENDERS:
            self._admission.leave()
            self._placed = False
            self._slow = True
            self._admission.slow += 1

    def hold(self, count: int) -> None:
        if self._admission.held + count > BODY_MEMORY:
            raise self._admission.refuse(
                "memory", Overloaded("Too many large bodies at once.", hint="Try again.", retry_after=2)
            )
        self._held += count
        self._admission.held += count

    def whole(self) -> None:
        """The body is whole: a slow sender takes a place again, or is refused."""
        if self._timer is not None:
            self._timer.cancel()
        if self._slow:
            self._slow = False
            self._admission.slow -= 1
            self._admission.enter()
            self._placed = True

    def leave(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._placed:
            self._admission.leave()
        if self._slow:
            self._admission.slow -= 1
        self._admission.held -= self._held


async def in_thread(pool: Executor, receive: Receive, deadline: float, work: Callable[[], T]) -> T:
    """Run `work` in the pool; give it up while it still waits for a thread and nobody waits for it.

    Args:
        receive: the request's, whose body was read: what it returns next is the disconnect.
        deadline: loop time after which work that has not begun is given up.

    Raises:
        ClientGone: the client went away.
        Overloaded: no thread became free before the deadline.
    """
    job = pool.submit(work)
    done: asyncio.Future[T] = asyncio.wrap_future(job)
    gone = asyncio.ensure_future(_disconnected(receive))
    waited_for: set[asyncio.Future[Any]] = {done, gone}
    try:
        left = max(0.0, deadline - asyncio.get_running_loop().time())
        await asyncio.wait(waited_for, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            return done.result()
        if not job.cancel():  # it is running: let it end, its thread is not free before that
            await asyncio.wait({done})
        if gone.done():
            raise ClientGone
        if job.cancelled():
            raise Overloaded("No thread became free in time.", hint="Try again.", retry_after=2)
        return done.result()
    finally:
        gone.cancel()


async def _disconnected(receive: Callable[[], Awaitable[object]]) -> None:
    while True:
        message = await receive()
        if isinstance(message, dict) and message.get("type") == "http.disconnect":
            return


def header(scope: Scope, name: bytes) -> str:
    """One header of a request, empty when it was not sent."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value).decode("latin-1")
    return ""
