"""What the server does to connections, before there is a request and after its answer: real sockets, an app of its own.

Numbers in names are the rows of the fault catalogue.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from lawnwatch.serving import server
from lawnwatch.serving.server import Server, config, listen

pytestmark = pytest.mark.integration

BIG = 30_000_000
unstuck = threading.Event()


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """/big overfills the buffers, /full has no room, /wait never answers, /stuck keeps a thread, /echo repeats."""
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
    if scope["path"] == "/stuck":
        await asyncio.get_running_loop().run_in_executor(None, unstuck.wait)
    if scope["path"] == "/wait":
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    scope["state"]["refused"] = scope["path"] == "/full"
    body = bytes(BIG) if scope["path"] == "/big" else b"hello"
    if scope["path"] == "/echo":
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]}
    )
    await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def serving(finish_seconds: float = 5.0, crowded: Callable[[], bool] = bool) -> AsyncIterator[tuple[Server, int]]:
    """A running server and its port."""
    sock = listen("127.0.0.1", 0)
    running = Server(
        config(app, finish_seconds=finish_seconds),
        drain_seconds=0,
        finish_seconds=finish_seconds,
        on_drain=lambda: None,
        crowded=crowded,
    )
    port = int(sock.getsockname()[1])
    task = asyncio.create_task(running._serve([sock]))
    while not running.started:
        await asyncio.sleep(0.01)
    try:
        yield running, port
    finally:
        running.should_exit = True
        await asyncio.wait_for(task, finish_seconds + 5)


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connected(port: int, sent: bytes = b"") -> Connection:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    await writer.drain()
    return reader, writer


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], Any]:
    """Status, headers and body of one answer."""
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    return int(head[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


async def until(condition: Any, seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("headers", [(), ("Connection: close",)], ids=["kept alive", "closing"])
async def test_10_an_answer_that_nobody_reads_is_not_kept(headers: tuple[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "UNREAD_SECONDS", 1.0)
    async with serving() as (running, port):
        reader, writer = await connected(port, get("/big", *headers))
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await until(lambda: running.server_state.connections)
        await until(lambda: not running.server_state.connections)
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        with contextlib.suppress(ConnectionError):
            assert len(await reader.read(-1)) < BIG
        writer.close()


async def test_a_refused_client_that_comes_back_at_once_is_heard_later_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "REST_SECONDS", 1.0)
    async with serving() as (_, port):
        reader, writer = await connected(port, get("/full"))
        await answer(reader)
        writer.write(get("/"))
        again = asyncio.create_task(answer(reader))
        for _ in range(3):
            other, _writer = await connected(port, get("/"))
            assert (await answer(other))[2] == b"hello"
            await asyncio.sleep(0.1)
        assert not again.done()
        assert (await again)[2] == b"hello"
        writer.close()


async def test_a_crowd_of_refused_clients_is_heard_again_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REST_SECONDS", 0.1)
    monkeypatch.setattr(server, "READ_AGAIN_PER_SECOND", 20)
    async with serving() as (_, port):
        crowd = [await connected(port, get("/full")) for _ in range(30)]
        for reader, _writer in crowd:
            await answer(reader)
        begun = time.monotonic()
        for _reader, writer in crowd:
            writer.write(get("/"))
        await asyncio.gather(*(answer(reader) for reader, _writer in crowd))
        assert time.monotonic() - begun > 1.0
        for _reader, writer in crowd:
            writer.close()


async def test_no_crowd_is_so_large_that_a_refused_client_rests_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "READ_AGAIN_PER_SECOND", 0.1)
    monkeypatch.setattr(server, "MAX_REST_SECONDS", 0.5)
    async with serving() as (_, port):
        crowd = [await connected(port, get("/full")) for _ in range(5)]
        for reader, writer in crowd:
            await answer(reader)
            writer.write(get("/"))
            assert (await answer(reader))[2] == b"hello"
            writer.close()


async def test_10_who_reads_slowly_but_reads_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "UNREAD_SECONDS", 1.0)
    async with serving() as (_, port):
        reader, writer = await connected(port, get("/big"))
        received = 0
        while piece := await reader.read(120_000):  # in some 5 s
            received += len(piece)
            if received > BIG:
                break
            await asyncio.sleep(0.02)
        writer.close()
    assert received > BIG


async def test_10_a_head_is_as_large_as_is_allowed_and_no_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 3.0)
    async with serving() as (_, port):
        for pieces in (1, 3):  # in one read of the server, and in several

            async def said(filler: int, end: bytes, pieces: int = pieces) -> tuple[int, dict[str, str], Any]:
                head = b"GET / HTTP/1.1\r\nHost: x\r\nX-Filler: " + b"a" * filler + end
                reader, writer = await connected(port)
                for at in range(pieces):
                    writer.write(head[at * len(head) // pieces : (at + 1) * len(head) // pieces])
                    await writer.drain()
                    await asyncio.sleep(0.1)
                try:
                    return await answer(reader)
                finally:
                    writer.close()

            assert (await said(65_000, b"\r\n\r\n"))[0] == 200
            status, headers, body = await said(66_000, b"\r\n\r\n")
            assert status == 431 and json.loads(body)["code"] == "head_too_large" and headers["x-request-id"]
        status, headers, _ = await said(110_000, b"")  # it has no end
        assert status == 431 and headers["connection"] == "close"


@pytest.mark.parametrize(
    ("length", "body"),
    [("Content-Length: 5", b"12345"), ("Transfer-Encoding: chunked", b"2\r\n12\r\n3\r\n345\r\n0\r\n\r\n")],
    ids=["length", "chunked"],
)
@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_who_would_rather_speak_http2_is_answered_all_the_same(length: str, body: bytes, size: int) -> None:
    """As Java's HttpClient and `curl --http2` do; the next request is none of the body's bytes."""
    lines = ["POST /echo?a=b HTTP/1.1", "Host: x", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", length]
    asked = "\r\n".join([*lines, "HTTP2-Settings: AAEAAEAAAAIAAAAB", "", ""]).encode() + body
    sent = asked * 2 + get("/")
    async with serving() as (_, port):
        reader, writer = await connected(port)
        for at in range(0, len(sent), size):
            writer.write(sent[at : at + size])
            await asyncio.sleep(0)
        for expected in (b"12345", b"12345", b"hello"):
            status, _, said = await answer(reader)
            assert (status, said) == (200, expected)
        writer.close()


@pytest.mark.parametrize("trailers", [b"a: b\r\n" * 20_000, b"a" * 120_000], ids=["many", "one"])
@pytest.mark.parametrize(("path", "status"), [("/echo", 431), ("/", 200)], ids=["waiting", "answered"])
async def test_10_what_follows_a_body_is_bounded(trailers: bytes, path: str, status: int) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n1\r\n0\r\nx: "
    async with serving() as (running, port):
        reader, writer = await connected(port, head.encode())
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 50_000_000:
                writer.write(trailers)
                await writer.drain()
                sent += len(trailers)
        assert sent < 10_000_000, "sockets' buffers hold a part of it"
        with contextlib.suppress(ConnectionError):  # a reset may overtake the answer
            assert (await answer(reader))[0] == status
        await until(lambda: not running.server_state.connections)
        writer.close()


async def test_13_requests_in_a_row_end_with_their_client(caplog: pytest.LogCaptureFixture) -> None:
    """One under way, and one that cannot be sent, each with others behind it."""
    async with serving() as (running, port):
        writers = [(await connected(port, get(path) * 5))[1] for path in ("/wait", "/big")]
        for writer in writers:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
        await until(lambda: len(running.server_state.tasks) == 2)
        for writer in writers:
            writer.transport.abort()
        await until(lambda: not running.server_state.tasks, 3)
    assert not caplog.text


async def test_what_is_not_http_is_told_so_with_an_id() -> None:
    async with serving() as (_, port):
        reader, writer = await connected(port, b"nonsense\r\n\r\n")
        status, headers, body = await answer(reader)
        assert status == 400 and json.loads(body)["code"] == "bad_request"
        assert len(headers["x-request-id"]) == 32 and headers["content-type"] == "application/problem+json"
        writer.close()


async def test_10_one_connection_too_many_takes_the_place_of_an_idle_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.TimedProtocol, "max_connections", 6)
    async with serving() as (running, port):
        busy = [await connected(port, get("/wait")) for _ in range(3)]
        idle = [await connected(port) for _ in range(10)]
        await until(lambda: len(running.server_state.connections) == 6)
        reader, writer = await connected(port, get("/"))
        assert (await answer(reader))[0] == 200
        busy += [await connected(port, get("/wait")) for _ in range(3)]
        await until(lambda: len(running.server_state.tasks) == 6)
        late, _ = await connected(port)
        status, headers, body = await answer(late)
        assert status == 503 and headers["retry-after"] == "1" and json.loads(body)["code"] == "overloaded"
        assert len(running.server_state.tasks) == 6, "nobody lost a request"
        for _, each in [*busy, *idle, (reader, writer)]:
            each.close()


async def test_44_nobody_who_stays_keeps_the_server_from_ending(caplog: pytest.LogCaptureFixture) -> None:
    begun = asyncio.get_running_loop().time()
    async with serving(finish_seconds=1.0) as (running, port):
        stuck = [await connected(port, get(path)) for path in ("/wait", "/big", "/big")]
        stuck.append(await connected(port, get("/big", "Connection: close")))
        stuck.append(await connected(port, b"POST / HT"))
        for _, writer in stuck:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
        await until(lambda: len(running.server_state.connections) == 5)
    assert asyncio.get_running_loop().time() - begun < 5
    assert "Exception" not in caplog.text and "Cancel" not in caplog.text
    for _, writer in stuck:
        writer.close()


@pytest.mark.parametrize("chosen", [os.SCHED_OTHER, os.SCHED_BATCH], ids=["default", "an operator's"])
async def test_the_scheduling_class_after_a_crowd_is_the_one_before(chosen: int) -> None:
    crowd = [True]
    os.sched_setscheduler(0, chosen, os.sched_param(0))
    try:
        async with serving(crowded=lambda: bool(crowd)):
            await until(lambda: os.sched_getscheduler(0) == os.SCHED_BATCH)
            crowd.clear()
            await asyncio.sleep(0.5)
            assert os.sched_getscheduler(0) == chosen
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


async def test_44_a_thread_that_does_not_come_back_is_left_behind(capfd: pytest.CaptureFixture[str]) -> None:
    unstuck.clear()
    try:
        async with serving(finish_seconds=0.3) as (running, port):
            await connected(port, get("/stuck"))
            await until(lambda: running.server_state.tasks)
            (task,) = running.server_state.tasks
            begun = time.monotonic()
            running.should_exit = True
            await until(lambda: running.lifespan.shutdown_event.is_set())
            assert time.monotonic() - begun < 0.3 + server.NOTICE_SECONDS + 1
            assert not task.done(), "it was cancelled"
    finally:
        unstuck.set()
    await task
    assert "Traceback" not in "".join(capfd.readouterr())
