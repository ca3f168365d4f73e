"""The API under attack and with its servers silent, through real sockets. Numbers are rows of the fault catalogue."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from select import select

import numpy as np
import pytest
import sqlalchemy as sa
from PIL import Image

import serving_bundle as sb
from api_process import Api, form, problem, wait_for
from lawnwatch import history
from lawnwatch.catalog import Catalog

pytestmark = pytest.mark.integration


@contextlib.contextmanager
def silent_server() -> Iterator[int]:
    """A port that takes connections and never says a word; what a host that hangs looks like."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield int(listener.getsockname()[1])


def posted(api: Api, data: bytes, source: str) -> int:
    """The status of one POST /predict from this address of the loopback network."""
    kind, body = form([("file", "photo.jpg", data)])
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", api.port), timeout=60, source_address=(source, 0)) as sock:
        sock.sendall(head.encode() + body)
        return int(sock.recv(65536).split(b" ")[1])


def question(api: Api, path: str, source: str = "127.0.0.1") -> socket.socket:
    """A connection from this address of the loopback network on which a GET was sent."""
    sock = socket.create_connection(("127.0.0.1", api.port), timeout=60, source_address=(source, 0))
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return sock


def test_12_a_flood_from_one_client_does_not_starve_another(start: Callable[..., Api]) -> None:
    api = start(LAWNWATCH_SERVING__THREADS="1", LAWNWATCH_SERVING__QUEUE="6")
    large, small = sb.picture(sb.YELLOW, size=(4000, 3000)), sb.picture(sb.YELLOW)
    stop, flood = threading.Event(), []

    def attack() -> None:
        while not stop.is_set():
            flood.append(posted(api, large, "127.0.0.2"))

    attackers = [threading.Thread(target=attack) for _ in range(16)]
    for attacker in attackers:
        attacker.start()
    try:
        wait_for(lambda: 503 in flood, 30)
        guest = [posted(api, small, "127.0.0.3") for _ in range(8)]
    finally:
        stop.set()
        for attacker in attackers:
            attacker.join()
    assert guest == [200] * 8
    assert set(flood) == {200, 503}
    assert api.metric('lawnwatch_predict_refused_total{reason="pushed_out"}') > 0


@pytest.mark.parametrize("path", ["/openapi.json", "/metrics", "/health", "/predictions?limit=200"])
def test_12_a_flood_of_questions_does_not_starve_who_sends_pictures(start: Callable[..., Api], path: str) -> None:
    api = start()
    data = sb.picture(sb.YELLOW)
    stop = threading.Event()

    def answers(seconds: float) -> int:
        end, count = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            assert posted(api, data, "127.0.0.3") == 200
            count += 1
        return count

    def attack() -> None:
        with socket.create_connection(("127.0.0.1", api.port), timeout=60, source_address=("127.0.0.2", 0)) as sock:
            while not stop.is_set():
                sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                head, _, body = sock.recv(65536).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200"), head
                left = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]) - len(body)
                while left > 0:
                    left -= len(sock.recv(65536))

    answers(1)
    calm = answers(3)
    with ThreadPoolExecutor(32) as attackers:
        flood = [attackers.submit(attack) for _ in range(32)]
        time.sleep(2)  # what such a client has saved is gone
        flooded = answers(3)
        stop.set()
    assert not any(each.exception() for each in flood)
    assert flooded > 0.25 * calm, f"{flooded} of {calm}"


def test_while_pictures_queue_the_event_loop_takes_no_core_from_the_threads(start: Callable[..., Api]) -> None:
    api = start(LAWNWATCH_SERVING__THREADS="1")
    assert api.process is not None
    loop, large = api.process.pid, sb.picture(sb.YELLOW, size=(4000, 3000))
    with ThreadPoolExecutor(16) as crowd:
        answers = [crowd.submit(posted, api, large, "127.0.0.2") for _ in range(48)]
        wait_for(lambda: os.sched_getscheduler(loop) == os.SCHED_BATCH, 30)
    assert {each.result() for each in answers} == {200}
    wait_for(lambda: os.sched_getscheduler(loop) == os.SCHED_OTHER, 5)


def test_10_half_open_and_idle_connections_take_nothing_from_others(start: Callable[..., Api]) -> None:
    api = start(LAWNWATCH_SERVING__QUEUE="2")
    with contextlib.ExitStack() as held:
        for number in range(300):
            sock = held.enter_context(socket.create_connection(("127.0.0.1", api.port), timeout=20))
            if number % 2:
                sock.sendall(b"POST /predict HTTP/1.1\r\nHo")
        assert [api.predict(sb.picture(sb.YELLOW)).status for _ in range(3)] == [200] * 3
        assert api.metric("lawnwatch_places_taken") == 0
        # They are cut 10 s after they were opened, with or without a first byte.
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(100) == b""


@pytest.mark.parametrize("most", [4096, 600], ids=["may be raised", "fixed"])
def test_10_idle_connections_take_no_file_from_others(start: Callable[..., Api], most: int) -> None:
    """The soft limit of open files is 1,024 nearly everywhere; the hard one need not be higher."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    api = start()
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    try:
        api.stop()
        api.launch = ["prlimit", f"--nofile={min(most, 1024)}:{most}"]
        api.start()
        with contextlib.ExitStack() as held:
            for _ in range(1_300):
                held.enter_context(socket.create_connection(("127.0.0.1", api.port), timeout=20))
            answers = [api.predict(sb.picture(sb.YELLOW)) for _ in range(3)]
            assert [answer.status for answer in answers] == [200] * 3
            wait_for(lambda: api.get(f"/predictions/{answers[-1].json['prediction_id']}/image").status == 200)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_10_slow_senders_of_large_bodies_take_no_memory_from_others(start: Callable[..., Api]) -> None:
    api = start()
    sizes = [20_000_000] * 12 + [15_990_000]  # all that bodies may have, but for 10 kB
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n"
    with contextlib.ExitStack() as held:

        def send(size: int) -> None:
            sock = held.enter_context(
                socket.create_connection(("127.0.0.1", api.port), timeout=20, source_address=("127.0.0.2", 0))
            )
            with contextlib.suppress(ConnectionError):  # refused, and told so
                sock.sendall(head % (size + 1) + b"\xff\xd8" + bytes(size - 2))  # the last byte never comes

        with ThreadPoolExecutor(len(sizes)) as pool:
            list(pool.map(send, sizes))
        guest = [posted(api, sb.picture(sb.YELLOW), "127.0.0.3") for _ in range(5)]
        wait_for(lambda: 0 < api.metric("lawnwatch_body_held_bytes") <= 128_000_000, 5)
        assert api.metric("lawnwatch_slow_senders") > 0
        guest += [posted(api, sb.picture(sb.YELLOW), "127.0.0.3") for _ in range(5)]
    assert guest == [200] * 10
    wait_for(lambda: api.metric("lawnwatch_body_held_bytes") == 0 and api.metric("lawnwatch_slow_senders") == 0)


def test_31_a_store_that_hangs_at_the_start_is_not_waited_for(start: Callable[..., Api]) -> None:
    first = start()
    sha256 = first.get("/model/info").json["model"]["sha256"]
    assert first.stop() == 0
    with silent_server() as port:
        begun = time.monotonic()
        api = start(
            bundle=False,
            home=first.home,
            LAWNWATCH_STORE_URL="s3://bucket",
            LAWNWATCH_STORE_ENDPOINT=f"http://127.0.0.1:{port}",
            LAWNWATCH_STORE_ACCESS_KEY="someone",
            LAWNWATCH_STORE_SECRET_KEY="a-secret-of-our-own",
        )
        # One request to such a store ends after three tries of 15 s each.
        assert time.monotonic() - begun < 30
        assert api.predict(sb.picture(sb.YELLOW)).json["model"]["sha256"] == sha256
        info = api.get("/model/info").json
        assert "has not answered" in info["reason"] and info["state"] == "ready"
        assert api.metric("lawnwatch_store_up") == 0
        assert "a-secret-of-our-own" not in api.log_text() + str(info)


def test_28_a_database_that_hangs_stops_neither_start_nor_answers_nor_the_end(start: Callable[..., Api]) -> None:
    with silent_server() as port:
        api = start(LAWNWATCH_DATABASE_URL=f"mysql+pymysql://someone:of-our-own@127.0.0.1:{port}/nothing")
        assert [api.predict(sb.picture(sb.YELLOW)).status for _ in range(3)] == [200] * 3
        assert api.get("/ready").status == 200
        begun = time.monotonic()
        assert api.stop() == 0
        assert time.monotonic() - begun < 25
        assert "of-our-own" not in api.log_text()


def test_28_questions_to_a_database_that_hangs_do_not_hide_the_metrics(start: Callable[..., Api]) -> None:
    with silent_server() as port, contextlib.ExitStack() as held:
        api = start(LAWNWATCH_DATABASE_URL=f"mysql+pymysql://someone:of-our-own@127.0.0.1:{port}/nothing")
        # Twice as many as there are threads, of 40 clients: one alone has two of them.
        asked = [held.enter_context(question(api, "/predictions", f"127.0.1.{n % 40 + 1}")) for n in range(80)]
        time.sleep(1)
        for path in ("/metrics", "/ready"):
            assert api.ask("GET", path, timeout=2).status == 200, path
        assert not select(asked, [], [], 0)[0], "the questions did not take all threads"
        api.stop(signal.SIGKILL)


def test_44_a_question_to_a_database_that_hangs_does_not_keep_the_process_from_ending(
    start: Callable[..., Api],
) -> None:
    with silent_server() as port:
        api = start(LAWNWATCH_DATABASE_URL=f"mysql+pymysql://someone:of-our-own@127.0.0.1:{port}/nothing")
        assert api.predict(sb.picture(sb.YELLOW)).status == 200  # and its record waits, too
        with question(api, "/predictions"):
            time.sleep(1)
            begun = time.monotonic()
            assert api.stop() == 0
            assert time.monotonic() - begun < 29
        assert "requests left behind" in api.log_text() and "Traceback" not in api.log_text()


def test_44_a_slow_sender_does_not_keep_the_process_from_ending(start: Callable[..., Api]) -> None:
    api = start(LAWNWATCH_SERVING__REQUEST_TIMEOUT="3")
    with socket.create_connection(("127.0.0.1", api.port), timeout=20) as sock:
        sock.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 5000\r\n\r\n\xff\xd8"
        )
        wait_for(lambda: api.metric("lawnwatch_places_taken") + api.metric("lawnwatch_slow_senders") == 1)
        begun = time.monotonic()
        assert api.stop() == 0
        assert time.monotonic() - begun < 15


def test_44_peers_that_stay_keep_no_record_from_being_written(start: Callable[..., Api]) -> None:
    """With everything as it is by default: a body that does not come, and answers that nobody takes."""
    api = start()
    made = {api.predict(sb.picture(sb.YELLOW)).json["prediction_id"] for _ in range(5)}
    with contextlib.ExitStack() as held:
        for request in (
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 5000\r\n\r\n\xff\xd8",
            b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n" * 20,
        ):
            sock = held.enter_context(socket.create_connection(("127.0.0.1", api.port), timeout=20))
            sock.sendall(request)
        wait_for(lambda: api.metric("lawnwatch_slow_senders") == 1)
        made |= {api.predict(sb.picture(sb.GREEN)).json["prediction_id"] for _ in range(20)}
        begun = time.monotonic()
        assert api.stop() == 0  # not killed
        assert time.monotonic() - begun < 25
    assert "Traceback" not in api.log_text()
    with Catalog(api.settings).session() as session:
        assert set(session.scalars(sa.select(history.PREDICTIONS.c.id))) == made


def test_46_many_of_the_largest_pictures_at_once_stay_within_bounded_memory(start: Callable[..., Api]) -> None:
    api = start()
    data = sb.picture(sb.YELLOW, size=(4000, 3000), quality=95)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: api.predict(data).status, range(48)))
    assert set(answers) <= {200, 503} and 200 in answers
    wait_for(lambda: api.metric("lawnwatch_body_held_bytes") == 0)
    assert api.metric("process_resident_memory_bytes") < 400_000_000


def test_46_slow_readers_of_large_pictures_hold_pieces_of_them(start: Callable[..., Api]) -> None:
    api = start()
    buffer = io.BytesIO()
    noise = np.random.default_rng(46).integers(0, 256, (2550, 2550, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG", compress_level=0)
    data = buffer.getvalue()
    path = f"/predictions/{api.predict(data).json['prediction_id']}/image"
    whole = wait_for(lambda: (found := api.get(path)).status == 200 and found)
    assert whole.body == data and int(whole.headers["content-length"]) == len(data) > 19_000_000
    assert whole.headers["content-type"] == "image/png"
    time.sleep(2)  # a trim of the heap
    before = api.metric("process_resident_memory_bytes")
    with contextlib.ExitStack() as held:
        for n in range(60):
            sock = held.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.bind((f"127.0.0.{2 + n % 4}", 0))
            sock.connect(("127.0.0.1", api.port))
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        wait_for(lambda: api.metric("lawnwatch_http_requests_in_flight") > 60)
        assert api.metric("process_resident_memory_bytes") - before < 60_000_000  # two pictures and a half were 50
        # Who reads slowly holds up nobody, and gets all of it as long as it reads on.
        assert api.get(path).body == data
        assert api.predict(sb.picture(sb.YELLOW)).status == 200
        got = sock.recv(1000)
        while len(got) < 300_000:
            got += sock.recv(65536)
        assert data.startswith(got.partition(b"\r\n\r\n")[2])
    wait_for(lambda: api.metric("lawnwatch_http_requests_in_flight") == 1)
    assert api.metric("process_open_fds") < 60  # the store's files are closed, too
    assert api.stop() == 0 and "Traceback" not in api.log_text()


def test_48_no_secret_is_said_anywhere(start: Callable[..., Api]) -> None:
    canary = "canary-5b1f0c"
    with socket.socket() as closed:  # bound and never listening
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        api = start(
            bundle=False,
            LAWNWATCH_DATABASE_URL=f"mysql+pymysql://someone:{canary}@127.0.0.1:{port}/nothing",
            LAWNWATCH_STORE_URL="s3://bucket",
            LAWNWATCH_STORE_ENDPOINT=f"http://127.0.0.1:{port}",
            LAWNWATCH_STORE_ACCESS_KEY="someone",
            LAWNWATCH_STORE_SECRET_KEY=canary,
        )
        problem(api.predict(sb.picture(sb.YELLOW)), 503, "no_model")
        wait_for(lambda: "store" in api.get("/model/info").json["reason"], 60)
        paths = (
            "/health",
            "/ready",
            "/metrics",
            "/model/info",
            "/predictions",
            "/openapi.json",
            "/reports/quality/latest",
        )
        said = b"".join(api.get(path).body for path in paths)
        assert api.stop() == 0
    assert canary.encode() not in said
    assert canary not in api.log_text() and str(api.home) not in said.decode()
