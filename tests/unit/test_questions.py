"""What a client may ask that is no picture. Numbers in names are rows of the fault catalogue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from lawnwatch.serving import questions
from lawnwatch.serving.admission import Admission
from lawnwatch.serving.questions import QuestionsMiddleware

pytestmark = pytest.mark.unit


class Asked:
    """The middleware around an application that answers at once, unless the path is one of `held`'s."""

    def __init__(self) -> None:
        self.admission = Admission(threads=1, places=1, max_wait=1)
        self.middleware = QuestionsMiddleware(self.app, admission=self.admission)
        self.working = self.sending = 0
        self.answered = asyncio.Event()
        self.taken = asyncio.Event()

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "held" in scope["path"]:
            self.working += 1
            await self.answered.wait()
            self.working -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if "held" in scope["path"]:
            self.sending += 1
            await self.taken.wait()
            self.sending -= 1
        await send({"type": "http.response.body", "body": b""})

    async def ask(self, path: str, client: str = "one", **state: Any) -> dict[str, Any]:
        said: dict[str, Any] = {}

        async def send(message: Any) -> None:
            said.update(message)

        scope = {"type": "http", "method": "GET", "path": path, "headers": [], "state": {"client": client, **state}}
        await self.middleware(scope, asyncio.Queue().get, send)
        return said | {"rests": scope["state"].get("refused", False)}  # type: ignore[attr-defined]

    @property
    def refused(self) -> float:
        return float(self.admission.metrics.refused.labels("questions")._value.get())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def test_12_a_flood_of_questions_waits_for_its_turns_and_no_other_client_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(questions, "SAVED", 0.1)
    monkeypatch.setattr(questions, "PATIENCE", 0.3)
    asked = Asked()
    begun = time.monotonic()
    flood = asyncio.gather(*(asked.ask("/model/info") for _ in range(200)))
    await asyncio.sleep(0.02)
    asking = time.monotonic()
    assert (await asked.ask("/model/info", "another"))["status"] == 200
    assert time.monotonic() - asking < 0.05
    answers = await flood
    answered = [each for each in answers if each["status"] == 200]
    # A tenth of a second saved and three of patience, at 200 a second; a few more on a machine that is busy meanwhile.
    assert 79 <= len(answered) <= 120 and time.monotonic() - begun >= 0.25
    refused = [each for each in answers if each["status"] == 503]
    assert len(refused) == 200 - len(answered) == asked.refused
    assert all((b"retry-after", b"1") in each["headers"] and each["rests"] for each in refused)


async def test_12_probes_are_never_refused_and_wait_for_a_moment_at_most() -> None:
    asked = Asked()
    flood = asyncio.gather(*(asked.ask("/model/info") for _ in range(2000)))
    await asyncio.sleep(0)
    begun = time.monotonic()
    for path in questions.PROBES:
        assert (await asked.ask(path))["status"] == 200
    assert time.monotonic() - begun < 2 * questions.PROBE_PATIENCE * len(questions.PROBES)
    flood.cancel()


async def test_what_admission_let_in_is_no_question() -> None:
    asked = Asked()
    begun = time.monotonic()
    for _ in range(2000):
        assert (await asked.ask("/predict/batch", body=b""))["status"] == 200
    assert time.monotonic() - begun < 5  # as questions they would take 8 s


async def test_12_one_client_has_two_threads_and_a_bounded_number_under_way() -> None:
    asked = Asked()
    flood = [asyncio.create_task(asked.ask("/predictions/held")) for _ in range(questions.UNDER_WAY + 3)]
    await until(lambda: asked.refused == 3)
    assert asked.working == questions.THREADS
    assert [(await each)["status"] for each in flood if each.done()] == [503] * 3
    other = asyncio.create_task(asked.ask("/predictions/held", "another"))
    await until(lambda: asked.working == questions.THREADS + 1)
    asked.answered.set()
    # Who takes an answer slowly keeps no thread, and is still one of those under way.
    await until(lambda: asked.sending == questions.UNDER_WAY + 1)
    assert (await asked.ask("/predictions/held"))["status"] == 503
    asked.taken.set()
    assert {(await each)["status"] for each in [*flood, other]} == {200, 503}
    assert (await asked.ask("/predictions/held"))["status"] == 200


async def test_28_questions_behind_those_that_hang_are_told_so_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "PATIENCE", 0.2)
    asked = Asked()
    hung = [asyncio.create_task(asked.ask("/predictions/held")) for _ in range(questions.THREADS)]
    await until(lambda: asked.working == questions.THREADS)
    assert (await asked.ask("/predictions"))["status"] == 503
    assert (await asked.ask("/model/info"))["status"] == 200
    asked.answered.set()
    asked.taken.set()
    assert {(await each)["status"] for each in hung} == {200}
    assert (await asked.ask("/predictions"))["status"] == 200


async def test_14_clients_that_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "SAVED", 0.05)
    asked = Asked()
    for number in range(500):
        await asked.ask("/health", f"client {number}")
    await asyncio.sleep(0.15)
    await asked.ask("/health")
    assert len(asked.middleware._askers) == 1
