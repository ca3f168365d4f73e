"""How much a client may ask that is no picture: state, documents, history.

Questions take no place: nothing of admission keeps a client that asks in a loop from taking the processor from those
whose pictures wait. So each client has a share of it for its questions. What goes beyond waits for its turn, and is
refused when that is too far off.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lawnwatch.errors import Overloaded
from lawnwatch.serving import problems
from lawnwatch.serving.admission import Admission

# Seconds of a client's share that a question takes: what memory answers; one record or picture; a page of records, or
# of another kind, which is large. A core works for less than a third of them.
IN_MEMORY, ONE, PAGE = 1 / 200, 1 / 100, 1 / 10
SAVED = 2.0  # seconds of its share that a client may use at once
PATIENCE = 5.0  # longest that a question waits for its turn, and then for a thread
THREADS = 2  # that work for one client: more would wait for the GIL in front of those that predict
UNDER_WAY = 64  # of a client's questions: those that wait for a thread, have it, or whose answer is being sent
# How a machine asks whether the server lives is never refused, and waits no longer than this.
PROBES = frozenset({"/health", "/ready", "/metrics", "/v2/health/live", "/v2/health/ready"})
PROBE_PATIENCE = 0.25


@dataclass
class Asker:
    """A client that asked lately.

    Attributes:
        turn: when its next question has its turn, in the loop's time.
        under_way: its questions that memory does not answer.
        threads: for these.
    """

    turn: float
    under_way: int = 0
    threads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(THREADS))


class QuestionsMiddleware:
    """Lets each client ask as much as its share allows. Stands inside of admission: what was let in there passes."""

    def __init__(self, app: ASGIApp, *, admission: Admission) -> None:
        self._app = app
        self._admission = admission
        self._askers: dict[str, Asker] = {}
        self._swept = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or "body" in scope["state"]:
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        share = _share(path)
        asker = self._asker(scope["state"]["client"])
        try:
            if wait := self._wait(asker, share, probe=path in PROBES):
                await asyncio.sleep(wait)
            if share == IN_MEMORY:
                await self._app(scope, receive, send)
            else:
                await self._work(asker, scope, receive, send)
        except Overloaded as error:
            scope["state"]["refused"] = True
            await problems.of(error, path)(scope, receive, send)

    def _asker(self, client: str) -> Asker:
        now = asyncio.get_running_loop().time()
        if now - self._swept > SAVED:
            self._swept = now
            self._askers = {
                name: asker for name, asker in self._askers.items() if asker.under_way or asker.turn > now - SAVED
            }
        return self._askers.setdefault(client, Asker(now - SAVED))

    def _wait(self, asker: Asker, share: float, *, probe: bool) -> float:
        """Seconds until the turn of a question that takes this share. Raises Overloaded."""
        now = asyncio.get_running_loop().time()
        turn = max(asker.turn, now - SAVED)
        wait = max(0.0, turn - now)
        if wait <= PATIENCE:
            asker.turn = turn + share
        elif not probe:
            raise self._refusal("This client asks more than its share of the server allows.", wait)
        return min(wait, PROBE_PATIENCE) if probe else wait

    async def _work(self, asker: Asker, scope: Scope, receive: Receive, send: Send) -> None:
        """Have a thread answer. Raises Overloaded."""
        if asker.under_way >= UNDER_WAY:
            raise self._refusal(f"This client has {UNDER_WAY} questions under way.", 1)
        asker.under_way += 1
        working = False

        async def sent(message: Message) -> None:
            done()  # the thread's work: who takes the answer slowly keeps none
            await send(message)

        def done() -> None:
            nonlocal working
            if working:
                working = False
                asker.threads.release()

        try:
            try:
                working = await asyncio.wait_for(asker.threads.acquire(), PATIENCE)
            except TimeoutError:
                raise self._refusal("The questions of this client before this one take too long.", 1) from None
            await self._app(scope, receive, sent)
        finally:
            done()
            asker.under_way -= 1

    def _refusal(self, what: str, wait: float) -> Overloaded:
        self._admission.metrics.refused.labels("questions").inc()
        seconds = math.ceil(wait)
        return Overloaded(what, hint=f"Try again in {seconds} s, and ask less at once.", retry_after=seconds)


def _share(path: str) -> float:
    if path == "/predictions" or path.startswith(("/docs/", "/reports/")):
        return PAGE
    return ONE if path.startswith("/predictions/") else IN_MEMORY
