"""The threads that predict, and whose turn it is."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Whose request is being answered; admission sets it, and tasks that a request starts inherit it.
current_client: ContextVar[str] = ContextVar("current_client", default="")


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
        self._waiting: dict[str, deque[tuple[Future[Any], Callable[[], Any]]]] = {}
        self._running: dict[str, int] = {}
        self._used: dict[str, float] = {}  # seconds, of the clients that wait or run; the others are forgotten
        self._tokens: queue.SimpleQueue[bool] = queue.SimpleQueue()  # one for each job; False ends a thread
        self._threads = [
            threading.Thread(target=self._run, name=f"predict-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Calls that no thread has begun."""
        return self._tokens.qsize()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue a call for the current client."""
        client = current_client.get()
        future: Future[T] = Future()
        with self._lock:
            if client not in self._used:  # a newcomer has neither debts nor savings
                self._used[client] = min(self._used.values(), default=0.0)
            self._waiting.setdefault(client, deque()).append((future, lambda: fn(*args, **kwargs)))
        self._tokens.put(True)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads after the work that waits, or without it."""
        if cancel_futures:
            with self._lock:
                for line in self._waiting.values():
                    for future, _ in line:
                        future.cancel()
        for _ in self._threads:
            self._tokens.put(False)
        if wait:
            for thread in self._threads:
                thread.join()

    def _run(self) -> None:
        while self._tokens.get():
            client, future, work = self._next()
            begun = time.perf_counter()
            result, fault = None, None
            if future.set_running_or_notify_cancel():
                try:
                    result = work()
                except BaseException as error:  # noqa: BLE001 - whoever waits for the result gets it
                    fault = error
            self._account(client, time.perf_counter() - begun)
            if fault is not None:
                future.set_exception(fault)
            elif not future.cancelled():
                future.set_result(result)
            del future, work, result, fault  # a thread that waits keeps nobody's picture

    def _next(self) -> tuple[str, Future[Any], Callable[[], Any]]:
        with self._lock:
            client = min(self._waiting, key=self._used.__getitem__)
            line = self._waiting[client]
            future, work = line.popleft()
            if not line:
                del self._waiting[client]
            self._running[client] = self._running.get(client, 0) + 1
            return client, future, work

    def _account(self, client: str, seconds: float) -> None:
        with self._lock:
            self._used[client] += seconds
            self._running[client] -= 1
            if not self._running[client]:
                del self._running[client]
                if client not in self._waiting:
                    del self._used[client]
