"""The threads that predict, and whose turn it is."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextvars import ContextVar
from itertools import chain
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Whose request is being answered; admission sets it, and tasks that a request starts inherit it.
current_client: ContextVar[str] = ContextVar("current_client", default="")


class Job(Future[T]):
    """A call that waits its turn; given up, it leaves the line at once and lets go of what it holds."""

    def __init__(self, pool: FairPool, client: str, work: Callable[[], T]) -> None:
        super().__init__()
        self.client = client
        self.work: Callable[[], T] | None = work
        self._pool = pool

    def cancel(self) -> bool:
        """True unless it has begun."""
        cancelled = super().cancel()
        if cancelled:
            self._pool.forget(self)
        return cancelled


class FairPool(Executor):
    """A few threads for many clients: a free thread works for the client that has had the least of their time.

    So a client that sends a hundred requests, or the largest pictures, delays its own requests and hardly those of
    others: start-time fair queueing (Goyal, Vin and Cheng, 1996) by measured seconds. The threads take their work
    from here themselves; handing it out from the event loop would leave each idle for one of its turns.

    Args:
        threads: how many.
    """

    def __init__(self, threads: int) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[Job[Any]]] = {}
        self._running: dict[str, int] = {}
        self._used: dict[str, float] = {}  # seconds, of the clients that wait or run; the others are forgotten
        self._tokens: queue.SimpleQueue[bool] = queue.SimpleQueue()  # one for each job ever queued; False ends a thread
        self._threads = [
            threading.Thread(target=self._run, name=f"predict-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Calls that no thread has begun."""
        with self._lock:
            return sum(len(line) for line in self._waiting.values())

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue a call for the current client."""
        client = current_client.get()
        job = Job(self, client, lambda: fn(*args, **kwargs))
        with self._lock:
            if client not in self._used:  # a newcomer has neither debts nor savings
                self._used[client] = min(self._used.values(), default=0.0)
            self._waiting.setdefault(client, deque()).append(job)
        self._tokens.put(True)
        return job

    def forget(self, job: Job[Any]) -> None:
        """Take a job that was cancelled out of its line, if no thread has done so; its picture goes with it."""
        job.work = None
        with self._lock:
            line = self._waiting.get(job.client)
            if line is None or job not in line:
                return
            line.remove(job)
            if not line:
                del self._waiting[job.client]
                if job.client not in self._running:
                    del self._used[job.client]

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads after the work that waits, or without it."""
        if cancel_futures:
            with self._lock:
                waiting = list(chain.from_iterable(self._waiting.values()))
            for job in waiting:
                job.cancel()
        for _ in self._threads:
            self._tokens.put(False)
        if wait:
            for thread in self._threads:
                thread.join()

    def _run(self) -> None:
        while self._tokens.get():
            job = self._next()
            if job is None:  # what this was the token of was cancelled
                continue
            begun = time.perf_counter()
            result, fault = None, None
            work = job.work
            if job.set_running_or_notify_cancel() and work is not None:
                try:
                    result = work()
                except BaseException as error:  # noqa: BLE001 - whoever waits for the result gets it
                    fault = error
            self._account(job.client, time.perf_counter() - begun)
            job.work = None
            if fault is not None:
                job.set_exception(fault)
            elif not job.cancelled():
                job.set_result(result)
            del job, work, result, fault  # a thread that waits keeps nobody's picture

    def _next(self) -> Job[Any] | None:
        with self._lock:
            if not self._waiting:
                return None
            client = min(self._waiting, key=self._used.__getitem__)
            line = self._waiting[client]
            job = line.popleft()
            if not line:
                del self._waiting[client]
            self._running[client] = self._running.get(client, 0) + 1
            return job

    def _account(self, client: str, seconds: float) -> None:
        with self._lock:
            self._used[client] += seconds
            self._running[client] -= 1
            if not self._running[client]:
                del self._running[client]
                if client not in self._waiting:
                    del self._used[client]
