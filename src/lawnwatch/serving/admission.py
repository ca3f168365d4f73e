"""Who gets in, decided before a body is read.

A request to a guarded path passes three doors. At its head: is there a model, is the process staying, is the
declared length allowed, is there a place? While its body arrives: bytes, time and the memory of all bodies
together are bounded. Then it waits for a thread.

There are as many places as requests can be answered within `max_wait` seconds at the measured speed, and never more
than `places`; one more is refused at once with 503 and Retry-After. A wait of seconds serves a client better than a
refusal: those that come back at once burn the processor that would have answered them, which makes the measured speed
less, and so the places.

When all places are taken, a client that has fewer of them than another by two gets in all the same: the one with most
loses its newest (McKenney, "Stochastic fairness queueing", 1990). So one flood costs others nothing, and with
`turns.FairPool` their pictures do not stand behind it either.

The same holds for the memory of bodies that are on their way.

A body that takes longer than a second to arrive gives its place back and stands in a separate, bounded line
of slow senders, so that slow senders cannot take the service away from the others; it takes a place again
when it is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Executor, Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import chain
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lawnwatch.errors import LawnwatchError, NoModel, Overloaded, Unavailable
from lawnwatch.serving import problems
from lawnwatch.serving.intake import Intake
from lawnwatch.serving.metrics import Metrics
from lawnwatch.serving.problems import BodyTooLarge, BodyTooSlow, ClientGone, ModelFailed
from lawnwatch.serving.turns import current_client

UNWATCHED = 0.25  # seconds of work or waiting for it until somebody looks whether the client is still there
PATIENCE = 1.0  # seconds until a sender counts as slow
SLOW_SENDERS = 64
BODY_MEMORY = 256_000_000  # bytes of all bodies that are held at once
SLOW_MEMORY = BODY_MEMORY // 2  # of those whose senders are slow
SWALLOW_BYTES = 4_000_000  # of a refused body, for clients that close after the answer
SWALLOW_SECONDS = 1.0

T = TypeVar("T")


class Draining(Unavailable):
    """The process is ending; another one takes over."""

    code = "draining"


@dataclass
class Admission:
    """The places, who has them, and what is known of how fast they become free.

    Attributes:
        places: requests that may be under way or waiting for a thread, however fast they go.
        max_wait: seconds that the last of those who wait may have before it.
        taken: places in use.
        held: bytes of bodies in memory.
        service_seconds: moving average of the time a thread works on a request.
    """

    threads: int
    places: int
    max_wait: float
    taken: int = 0
    held: int = 0
    service_seconds: float = 0.02
    draining: bool = False
    metrics: Metrics = field(default_factory=Metrics)
    _holders: dict[str, dict[Sender, None]] = field(default_factory=dict)  # each client's, oldest first
    _slow: dict[Sender, None] = field(default_factory=dict)  # those without a place, the latest to become slow last

    @property
    def slow(self) -> int:
        """Senders whose body takes its time."""
        return len(self._slow)

    @property
    def limit(self) -> int:
        """Places at the measured speed."""
        return min(self.places, self.threads + int(self.max_wait * self.threads / self.service_seconds))

    def refuse(self, reason: str, error: LawnwatchError) -> LawnwatchError:
        """Count a refusal and hand back its error."""
        self.metrics.refused.labels(reason).inc()
        return error

    def enter(self, sender: Sender) -> None:
        """Take a place. Raises Overloaded when there is none."""
        limit = self.limit
        if self.taken >= limit and not self._push_out(sender.client):
            wait = max(1, min(30, math.ceil(self.taken * self.service_seconds / self.threads)))
            raise self.refuse(
                "queue_full",
                Overloaded(
                    f"All {limit} places are taken.",
                    hint=f"Try again in {wait} s; sending more at once makes no answer come sooner.",
                    retry_after=wait,
                ),
            )
        self.taken += 1
        self._holders.setdefault(sender.client, {})[sender] = None

    def leave(self, sender: Sender) -> None:
        """Give a place back."""
        self.taken -= 1
        mine = self._holders[sender.client]
        del mine[sender]
        if not mine:
            del self._holders[sender.client]

    def _push_out(self, newcomer: str) -> bool:
        """Take the newest place that has not begun from who has most; False when that is no more than the newcomer."""
        most = max(self._holders.values(), key=len, default={})
        if len(most) < len(self._holders.get(newcomer, {})) + 2:
            return False
        return any(sender.push_out("pushed_out") for sender in reversed(most))

    def slow_down(self, sender: Sender) -> None:
        """Put a sender without a place into the line of the slow; without memory for it there it is pushed out."""
        fits = self._make_room_among_the_slow(sender, sender.held)
        self._slow[sender] = None
        if not fits:
            sender.push_out("memory")

    def speed_up(self, sender: Sender) -> None:
        """Take a sender out of the line of the slow, if it is there."""
        self._slow.pop(sender, None)

    def hold(self, sender: Sender, count: int) -> None:
        """Count bytes that a sender's body has more. Raises Overloaded when there is no memory for them."""
        fits = True
        if (over := self.held + count - BODY_MEMORY) > 0:
            everybody = [*self._slow, *chain.from_iterable(self._holders.values())]
            fits = self._make_room(everybody, sender, count, over)
        if fits and sender in self._slow:
            fits = self._make_room_among_the_slow(sender, count)
        if not fits:
            raise self.refuse("memory", Overloaded("Too many large bodies at once.", hint="Try again.", retry_after=2))
        sender.held += count
        self.held += count

    def _make_room_among_the_slow(self, newcomer: Sender, count: int) -> bool:
        """Slow senders keep what they hold for long: half of the memory is always for the others."""
        over = sum(each.held for each in self._slow) + count - SLOW_MEMORY
        return over <= 0 or self._make_room(list(self._slow), newcomer, count, over)

    def _make_room(self, senders: list[Sender], newcomer: Sender, count: int, over: int) -> bool:
        """Push out bodies on their way, of who holds most and the newest first, until `over` bytes are free.

        False when those who hold more than the newcomer have not so many; then all keep theirs.
        """
        held: dict[str, int] = {}
        for each in senders:
            held[each.client] = held.get(each.client, 0) + each.held
        own = held.get(newcomer.client, 0) + count
        losers = []
        senders.reverse()
        for each in sorted(senders, key=lambda each: -held[each.client]):
            if over > 0 and held[each.client] > own and each.held and each.arriving:
                losers.append(each)
                over -= each.held
                held[each.client] -= each.held
        if over > 0:
            return False
        for each in losers:
            each.push_out("memory")
        return True

    def worked(self, seconds: float) -> None:
        """Learn how long a thread worked on a request."""
        self.service_seconds = max(1e-4, self.service_seconds + 0.05 * (seconds - self.service_seconds))


class AdmissionMiddleware:
    """The three doors, as ASGI middleware around the guarded paths.

    Puts into `scope["state"]`: `body` (bytes), `deadline` (loop time), `arrived` (perf_counter at the head)
    and `body_seconds`; `refused` (bool) when there was no room.

    Args:
        intake: what the POST bodies of a path may be; None where they are not guarded.
        check: raises NoModel when nothing can be answered.
        timeout: seconds for the whole request.
        direct: routes by path that are called from here when a request has no query: they need nothing of what
            routing does, which costs more than all that is done here.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        admission: Admission,
        intake: Callable[[str], Intake | None],
        check: Callable[[], object],
        timeout: float,
        direct: Mapping[str, Callable[[Request], Awaitable[Response]]],
    ) -> None:
        self._app = app
        self._admission = admission
        self._intake = intake
        self._check = check
        self._timeout = timeout
        self._direct = direct

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and scope["method"] == "POST"
        intake = self._intake(scope["path"]) if guarded else None
        if intake is None:
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        sender = Sender(self._admission, state.get("client") or _peer(scope))
        ended = False

        async def arriving() -> Message:
            nonlocal ended
            message = await receive()
            ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
            return message

        try:
            self._at_the_head(scope, intake)
            sender.enter()
            state["arrived"] = time.perf_counter()
            state["deadline"] = asyncio.get_running_loop().time() + self._timeout
            state["body"] = await self._body(arriving, sender, intake)
            sender.whole()
            state["body_seconds"] = time.perf_counter() - state["arrived"]
            admit(sender)
            endpoint = self._direct.get(scope["path"]) if not scope["query_string"] else None
            if endpoint is None:
                await self._app(scope, receive, send)
                return
            response = await endpoint(Request(scope, receive))
        except LawnwatchError as error:
            if error.status == HTTPStatus.INTERNAL_SERVER_ERROR and not isinstance(error, ModelFailed):
                raise  # told in a sentence and logged in full further out
            response = problems.of(error, scope["path"])
            state["refused"] = isinstance(error, Overloaded)
            if not ended and header(scope, b"connection").lower() == "close" and not header(scope, b"expect"):
                await swallow(receive)
        finally:
            sender.leave()
        await response(scope, receive, send)

    def _at_the_head(self, scope: Scope, intake: Intake) -> None:
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

    async def _body(self, receive: Receive, sender: Sender, intake: Intake) -> bytes:
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._timeout) as sender.clock:
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
            sender.check()
            raise self._admission.refuse(
                "too_slow",
                BodyTooSlow(
                    f"The body did not arrive within {self._timeout:.0f} s; {size} bytes came.",
                    hint="Send a smaller picture or use a faster connection.",
                ),
            ) from None
        finally:
            sender.clock = None

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


class Sender:
    """One request's hold on places and memory.

    Attributes:
        client: whose request it is.
        held: bytes of its body in memory.
        clock: the time limit of what can be pushed out by ending it: a body's arrival.
        whole_only: its work is in several jobs, of which none is taken away.
        pushed_out: it lost its place or memory to another; it ends with 503.
    """

    def __init__(self, admission: Admission, client: str) -> None:
        self.client = client
        self.held = 0
        self.clock: asyncio.Timeout | None = None
        self.whole_only = False
        self.pushed_out = False
        self._admission = admission
        self._job: Future[Any] | None = None
        self._placed = False
        self._timer: asyncio.TimerHandle | None = None

    def enter(self) -> None:
        """Take a place, while the body arrives; to be given up for the line of the slow. Raises Overloaded."""
        self.take()
        self._timer = asyncio.get_running_loop().call_later(PATIENCE, self._is_slow)

    def take(self) -> None:
        """Take a place. Raises Overloaded."""
        self._admission.enter(self)
        self._placed = True

    def _give(self) -> None:
        if self._placed:
            self._admission.leave(self)
        self._placed = False

    def _is_slow(self) -> None:
        # With the slow line full the sender keeps its place: then it is bounded by the request's time alone.
        if self._placed and self._admission.slow < SLOW_SENDERS:
            self._give()
            self._admission.slow_down(self)

    @property
    def arriving(self) -> bool:
        """Its body is on its way, and can be pushed out."""
        return self.clock is not None and not self.pushed_out and not self.clock.expired()

    def hold(self, count: int) -> None:
        """Count bytes more. Raises Overloaded when there is no memory for them, or when it was pushed out."""
        self.check()
        self._admission.hold(self, count)

    def whole(self) -> None:
        """The body is whole: a slow sender takes a place again, or is refused.

        Raises:
            Overloaded: there is none; or it was pushed out while the last piece was being read.
        """
        if self._timer is not None:
            self._timer.cancel()
        self.check()
        if not self._placed:
            self._admission.speed_up(self)
            self.take()

    def check(self) -> None:
        """Raises Overloaded when it was pushed out."""
        if self.pushed_out:
            raise _pushed_out() from None

    def waits(self, job: Future[Any]) -> None:
        """Its work is queued as this job."""
        self._job = job

    def push_out(self, reason: str) -> bool:
        """Give place and memory to another and end with 503; False once its work has begun."""
        if self.clock is not None and self.arriving:
            self.clock.reschedule(asyncio.get_running_loop().time())
        elif self._job is None or self.whole_only or not self._job.cancel():
            return False
        self.pushed_out = True
        self._release()
        self.count(reason)
        return True

    def count(self, reason: str) -> None:
        """Count that it was refused."""
        self._admission.metrics.refused.labels(reason).inc()

    def leave(self) -> None:
        """The request is over, or lost what it had."""
        if self._timer is not None:
            self._timer.cancel()
        self._release()

    def _release(self) -> None:
        self._give()
        self._admission.speed_up(self)
        self._admission.held -= self.held
        self.held = 0


_current_sender: ContextVar[Sender | None] = ContextVar("_current_sender", default=None)


def admit(sender: Sender) -> None:
    """From here on the current task's work in threads is this sender's."""
    current_client.set(sender.client)
    _current_sender.set(sender)


def keep_whole() -> None:
    """From here on the current request's work is in several jobs, and none of them is given to another."""
    sender = _current_sender.get()
    if sender is not None:
        sender.whole_only = True


def _pushed_out() -> Overloaded:
    return Overloaded(
        "All room is taken, and others have less of it.",
        hint="Try again, with fewer or smaller requests at once.",
        retry_after=1,
    )


async def in_thread(pool: Executor, receive: Receive, deadline: float, work: Callable[[], T]) -> T:
    """Run `work` in the pool; give it up while it still waits for a thread and nobody waits for it.

    Args:
        receive: the request's, whose body was read: what it returns next is the disconnect.
        deadline: loop time after which work that has not begun is given up.

    Raises:
        ClientGone: the client went away.
        Overloaded: no thread became free before the deadline, or others needed the place more.
    """
    job = pool.submit(work)
    sender = _current_sender.get()
    if sender is not None:
        sender.waits(job)
    try:
        return await _result(job, receive, deadline, sender)
    except asyncio.CancelledError:
        job.cancel()
        raise


async def _result(job: Future[T], receive: Receive, deadline: float, sender: Sender | None) -> T:
    done: asyncio.Future[T] = asyncio.wrap_future(job)
    await asyncio.wait({done}, timeout=min(UNWATCHED, max(0.0, deadline - asyncio.get_running_loop().time())))
    if done.done() and not done.cancelled():
        return done.result()
    gone = asyncio.ensure_future(_disconnected(receive))
    waited_for: set[asyncio.Future[Any]] = {done, gone}
    try:
        left = max(0.0, deadline - asyncio.get_running_loop().time())
        await asyncio.wait(waited_for, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if done.cancelled():
            raise _pushed_out()
        if done.done():
            return done.result()
        if not job.cancel():  # it is running: let it end, its thread is not free before that
            await asyncio.wait({done})
        elif sender is not None:
            sender.count("gone" if gone.done() else "deadline")
        if gone.done():
            raise ClientGone
        if job.cancelled():
            raise Overloaded("No thread became free in time.", hint="Try again.", retry_after=2)
        return done.result()
    finally:
        gone.cancel()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work as long as the client is there; `receive` as for `in_thread`. Raises ClientGone."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    waited_for: set[asyncio.Future[Any]] = {working, gone}
    try:
        await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        working.cancel()
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


def _peer(scope: Scope) -> str:
    return str(scope["client"][0]) if scope.get("client") else ""
