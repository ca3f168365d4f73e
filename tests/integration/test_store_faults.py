"""The S3 store when the network, the server or the settings fail: FAULTS 29, 35 and 48, on a real MinIO."""

from __future__ import annotations

import http.server
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from faults import Fault, FaultProxy
from lawnwatch.config import Settings
from lawnwatch.errors import IntegrityError, LawnwatchError, NotFound, SettingsError, Unavailable
from lawnwatch.store import open_store, s3, sha256_of
from lawnwatch.store.s3 import S3Store

pytestmark = pytest.mark.integration
DATA = os.urandom(300_000)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bounds, reached sooner."""
    monkeypatch.setattr(s3, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(s3, "CONNECT_SECONDS", 1.0)


@pytest.fixture
def proxy(minio: Any) -> Iterator[FaultProxy]:
    with FaultProxy(minio.endpoint) as proxy:
        yield proxy


@pytest.fixture
def direct(minio: Any, tmp_path: Path) -> S3Store:
    """The bucket as others see it."""
    return opened(tmp_path, minio.settings())


@pytest.fixture
def store(direct: S3Store, minio: Any, proxy: FaultProxy, tmp_path: Path) -> S3Store:
    """The same bucket through the proxy."""
    return opened(tmp_path, minio.settings(direct.bucket) | {"store_endpoint": proxy.endpoint})


def opened(home: Path, named: dict[str, str], environment: str = "development") -> S3Store:
    store = open_store(Settings(home=home, environment=environment, **named))
    assert isinstance(store, S3Store)
    return store


@contextmanager
def within(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


def every_call(store: S3Store) -> list[Callable[[], object]]:
    def read() -> bytes:
        with store.open("a") as stream:
            return stream.read()

    return [
        lambda: store.put("a", b"x"),
        lambda: store.put("a", b"x", if_absent=True),
        lambda: store.get("a"),
        read,
        lambda: store.stat("a"),
        lambda: list(store.list()),
        lambda: store.delete("a"),
    ]


def at_once(calls: list[Callable[[], object]]) -> list[object]:
    """The outcome of each call, result or error; all run side by side, so that waiting is waited for once."""
    outcomes: list[object] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            outcomes[number] = calls[number]()
        except LawnwatchError as error:
            outcomes[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


# --- the network ----------------------------------------------------------------------------------------------------


def test_29_a_read_that_breaks_is_tried_again(store: S3Store, direct: S3Store, proxy: FaultProxy) -> None:
    direct.put("a", DATA)
    proxy.down = Fault("cut", after=100_000, times=2)
    assert store.get("a") == DATA
    assert proxy.down.times == 0


def test_29_a_read_that_keeps_breaking_ends(store: S3Store, direct: S3Store, proxy: FaultProxy) -> None:
    direct.put("a", DATA)
    for kind in ("cut", "freeze"):
        proxy.down = Fault(kind, after=100_000, times=99)  # type: ignore[arg-type]
        with within(12), pytest.raises(Unavailable, match="does not answer"):
            store.get("a")
        assert proxy.down.times == 99 - s3.TRIES


def test_29_a_stream_that_breaks_never_ends_as_if_whole(store: S3Store, direct: S3Store, proxy: FaultProxy) -> None:
    direct.put("a", DATA)
    for kind in ("cut", "freeze"):
        proxy.down = Fault(kind, after=150_000)  # type: ignore[arg-type]
        with within(5), store.open("a") as stream:
            assert stream.read(100_000) == DATA[:100_000]
            with pytest.raises(Unavailable, match="does not answer"):
                stream.read()
    assert store.get("a") == DATA


@pytest.mark.parametrize("if_absent", [False, True])
def test_29_half_a_put_is_sent_again_and_never_seen(
    store: S3Store, direct: S3Store, proxy: FaultProxy, if_absent: bool
) -> None:
    proxy.up = Fault("cut", after=150_000, times=2)
    written = store.put("a", DATA, if_absent=if_absent)
    assert proxy.up.times == 0 and direct.stat("a") == written
    proxy.up = Fault("cut", after=150_000, times=99)
    with within(10), pytest.raises(Unavailable):
        store.put("b", DATA, if_absent=if_absent)
    assert direct.stat("b") is None
    with pytest.raises(Unavailable):
        store.put("a", DATA[::-1])
    assert direct.get("a") == DATA


def test_29_an_answer_that_is_lost_is_no_second_object(store: S3Store, direct: S3Store, proxy: FaultProxy) -> None:
    """The server created it, nobody heard: the second try meets the first one's object and reports it as stored."""
    proxy.down = Fault("cut", after=0)
    written = store.put("a", DATA, if_absent=True)
    assert written.sha256 == sha256_of(DATA) and direct.get("a") == DATA


def test_a_byte_changed_on_the_way_is_refused_by_the_server(
    store: S3Store, direct: S3Store, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.up = Fault("flip", after=150_000)
    with pytest.raises(IntegrityError, match="not what was sent"):
        store.put("a", DATA)
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    large = tmp_path / "large"
    large.write_bytes(os.urandom(11 << 20))
    proxy.up = Fault("flip", after=7 << 20)
    with pytest.raises(IntegrityError, match="not what was sent"):
        store.put("b", large)
    assert proxy.up.times == 0
    assert list(direct.list()) == [] and uploads(direct) == []


def test_bytes_that_are_not_the_hashed_ones_are_refused_by_the_server(
    direct: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a file changes after it was hashed: what is signed and sent is consistent, and not what was asked for."""
    send = direct._client._put_object
    monkeypatch.setattr(direct._client, "_put_object", lambda b, n, data, headers: send(b, n, data + b"!", headers))
    with pytest.raises(IntegrityError, match="ChecksumMismatch"):
        direct.put("a", DATA)
    assert direct.stat("a") is None


def test_29_parts_that_fail_are_taken_back(
    store: S3Store, direct: S3Store, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    large = tmp_path / "large"
    large.write_bytes(os.urandom(11 << 20))
    direct.put("a", b"old")
    proxy.up = Fault("cut", after=7 << 20)  # the second part, once: sent again
    assert store.put("b", large).size == 11 << 20
    proxy.up = Fault("cut", after=7 << 20, times=1 + s3.TRIES)
    monkeypatch.setattr(proxy.up, "after", 1 << 20)  # and each further try of it
    with within(15), pytest.raises(Unavailable):
        store.put("a", large)
    assert direct.get("a") == b"old" and uploads(direct) == []


def uploads(store: S3Store) -> list[str]:
    return [upload.object_name for upload in store._client._list_multipart_uploads(store.bucket).uploads]


def test_29_a_slow_server_is_only_slow(store: S3Store, proxy: FaultProxy, tmp_path: Path) -> None:
    """A part takes longer than the connect timeout and than the silence that is borne: nothing is silent."""
    large = tmp_path / "large"
    large.write_bytes(os.urandom(12_000_000))
    proxy.rate = 6_000_000
    started = time.monotonic()
    store.put("a", large)
    assert time.monotonic() - started > 1.5, "not slow enough to show anything"
    proxy.rate = 10_000_000
    assert store.get("a") == large.read_bytes()
    proxy.rate, proxy.delay = 0, 0.2
    assert store.stat("a") is not None


def test_29_refused_connections(store: S3Store, proxy: FaultProxy, direct: S3Store) -> None:
    proxy.refuse = True
    proxy.up = Fault("cut", after=0, times=99)  # those that stand
    with within(10):
        assert [type(outcome) for outcome in at_once(every_call(store))] == [Unavailable] * 7
    proxy.refuse, proxy.up = False, None
    store.put("a", b"x")
    assert direct.get("a") == b"x"


# --- the server -----------------------------------------------------------------------------------------------------


def test_29_frozen_killed_and_back(start_minio: Callable[[], Any], tmp_path: Path) -> None:
    """Every call ends in bounded time while the server is frozen or gone; the next one after its return works."""
    minio = start_minio()
    store = opened(tmp_path, minio.settings("pictures"))
    store.put("kept", DATA)
    process = minio.server.process
    process.send_signal(signal.SIGSTOP)
    try:
        with within(12):
            outcomes = at_once([*every_call(store), lambda: opened(tmp_path, minio.settings("pictures"))])
    finally:
        process.send_signal(signal.SIGCONT)
    assert [type(outcome) for outcome in outcomes] == [Unavailable] * 8
    assert store.get("kept") == DATA
    minio.server.stop(signal.SIGKILL)
    with within(8):
        outcomes = at_once([*every_call(store), lambda: opened(tmp_path, minio.settings("pictures"))])
    assert [type(outcome) for outcome in outcomes] == [Unavailable] * 8
    assert minio.secret_key not in " ".join(map(str, outcomes))
    minio.server.start()
    assert store.get("kept") == DATA
    store.put("after", b"x", if_absent=True)
    assert {info.key for info in store.list()} >= {"kept", "after"}


def test_29_killed_while_a_put_is_under_way(start_minio: Callable[[], Any], tmp_path: Path) -> None:
    """Readers see the old object, whole, when the server is back; and the put can be repeated."""
    minio = start_minio()
    with FaultProxy(minio.endpoint) as proxy:
        store = opened(tmp_path, minio.settings("pictures") | {"store_endpoint": proxy.endpoint})
        store.put("a", DATA)
        proxy.rate = 100_000
        outcomes: list[object] = []
        writer = threading.Thread(target=lambda: outcomes.extend(at_once([lambda: store.put("a", DATA[::-1])])))
        passed = proxy.passed["up"]
        writer.start()
        while proxy.passed["up"] < passed + 100_000:
            time.sleep(0.05)
        minio.server.stop(signal.SIGKILL)
        writer.join()
        assert [type(outcome) for outcome in outcomes] == [Unavailable]
        minio.server.start()
        proxy.rate = 0
        assert store.get("a") == DATA
        store.put("a", DATA[::-1])
        assert store.get("a") == DATA[::-1]


class Answering(http.server.BaseHTTPRequestHandler):
    """Any HTTP server: every request gets `status`, `kind` and `body`."""

    status, kind, body, retry_after = 200, "text/html", b"<!doctype html><p>Welcome", ""

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("content-type", self.kind)
        self.send_header("content-length", str(len(self.body)))
        if self.retry_after:
            self.send_header("retry-after", self.retry_after)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def answering(**attributes: object) -> Iterator[str]:
    handler = type("Handler", (Answering,), attributes)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({}, SettingsError),
        ({"kind": "application/xml"}, SettingsError),
        ({"kind": "application/xml", "body": b""}, SettingsError),
        ({"kind": "application/xml", "body": b"\xff\xfe\x00"}, SettingsError),
        ({"kind": "application/xml", "body": b"<html/>", "status": 400}, LawnwatchError),
        ({"status": 404}, SettingsError),
        ({"status": 403}, SettingsError),
        ({"status": 307}, SettingsError),
        ({"status": 502, "retry_after": "15"}, Unavailable),
        ({"status": 503, "body": b"", "retry_after": "15"}, Unavailable),
    ],
    ids=["html", "html as xml", "nothing", "no text", "odd xml", "404", "403", "redirect", "502", "503"],
)
def test_what_is_no_s3_server_is_said_to_be_none(
    tmp_path: Path, minio: Any, answer: dict[str, object], error: type[LawnwatchError]
) -> None:
    with answering(**answer) as endpoint:
        named = minio.settings() | {"store_endpoint": endpoint}
        with within(10), pytest.raises(error, match=endpoint) as caught:
            opened(tmp_path, named)
        assert minio.secret_key not in str(caught.value)


def test_35_a_full_server_says_so(start_minio: Callable[[], Any], tmp_path: Path) -> None:
    """A MinIO whose disk holds 20 MB: no half object, what is there stays, and room helps."""
    minio = start_minio()
    minio.server.stop()
    *_, data, _, _, _ = minio.server.argv
    # A name space of its own, so that neither root nor a clean-up is needed for the mount.
    mount = f'mount -t tmpfs -o size=20m small {data} && exec "$@"'
    minio.server.argv = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", *minio.server.argv]
    minio.server.start()
    store = opened(tmp_path, minio.settings("pictures"))
    content = os.urandom(4_000_000)
    with within(10), pytest.raises(Unavailable, match=r"is full \(XMinioStorageFull\)"):
        for number in range(6):
            store.put(f"a/{number}", content)
    kept = [info.key for info in store.list()]
    assert 2 <= len(kept) < 6 and all(store.get(key) == content for key in kept)
    for key in kept:
        store.delete(key)
    for _ in range(100):  # MinIO frees deleted objects in the background
        try:
            store.put("a/after", content)
            break
        except Unavailable:
            time.sleep(0.1)
    assert store.get("a/after") == content


# --- the settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["store_access_key", "store_secret_key"])
def test_wrong_keys_are_a_settings_error_and_are_not_repeated(minio: Any, tmp_path: Path, wrong: str) -> None:
    named = minio.settings() | {wrong: "not-the-right-one-at-all"}
    with within(5), pytest.raises(SettingsError, match="refused the keys") as caught:
        opened(tmp_path, named)
    for secret in ("not-the-right-one-at-all", minio.secret_key, minio.access_key):
        assert secret not in str(caught.value)


def test_keys_that_are_changed_while_it_runs(direct: S3Store, minio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from minio.credentials import StaticProvider

    monkeypatch.setattr(direct._client, "_provider", StaticProvider(minio.access_key, "no-longer-the-right-one"))
    outcomes = at_once(every_call(direct))
    assert [type(outcome) for outcome in outcomes] == [SettingsError] * 7
    assert "no-longer-the-right-one" not in " ".join(map(str, outcomes))


def test_no_such_bucket(minio: Any, tmp_path: Path) -> None:
    """Made in development, demanded in production; and one that is deleted under way is not mistaken for empty."""
    named = minio.settings()
    with pytest.raises(SettingsError, match="has no bucket"):
        opened(tmp_path, named, "production")
    store = opened(tmp_path, named)
    assert opened(tmp_path, named, "production").stat("a") is None
    store._client.remove_bucket(store.bucket)
    for outcome in at_once(every_call(store)):
        assert isinstance(outcome, SettingsError) and "has no bucket" in str(outcome)


def test_two_processes_may_make_the_bucket_at_once(minio: Any, tmp_path: Path) -> None:
    named = minio.settings()
    assert {type(outcome) for outcome in at_once([lambda: opened(tmp_path, named)] * 8)} == {S3Store}


def test_clocks_that_differ(direct: S3Store, minio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client signs with the time of this machine; here an hour ahead."""
    monkeypatch.setattr("minio.time.utcnow", lambda: datetime.now(UTC) + timedelta(hours=1))
    with pytest.raises(Unavailable, match="clocks"):
        opened(tmp_path, minio.settings())
    for outcome in at_once(every_call(direct)):
        assert isinstance(outcome, LawnwatchError) and "clock" in str(outcome)


@pytest.mark.parametrize(
    ("named", "match"),
    [
        ({"store_url": "s3://Not_A_Bucket"}, "bucket"),
        ({"store_url": "s3:///prefix"}, "bucket"),
        ({"store_endpoint": "http://"}, "a host"),
        ({"store_endpoint": "http://127.0.0.1:none"}, "127.0.0.1:none"),
        ({"store_endpoint": "http://127.0.0.1:9/minio"}, "without a path"),
        ({"store_endpoint": "ftp://127.0.0.1:9"}, "must be http"),
        ({"store_endpoint": "http://root:hunter22@127.0.0.1:9"}, "user or password"),
    ],
)
def test_settings_that_name_no_store(minio: Any, tmp_path: Path, named: dict[str, str], match: str) -> None:
    with pytest.raises(SettingsError, match=match) as caught:
        opened(tmp_path, minio.settings() | named)
    assert "hunter22" not in str(caught.value)


def test_what_others_keep_in_the_bucket_is_no_object_of_ours(direct: S3Store, tmp_path: Path, minio: Any) -> None:
    direct.put("a/b", b"x")
    for name in ("a/", "a/with space", ".hidden"):
        direct._client._put_object(direct.bucket, name, b"", {})
    assert [info.key for info in direct.list()] == ["a/b"]
    inner = opened(tmp_path, minio.settings(direct.bucket) | {"store_url": f"s3://{direct.bucket}/a"})
    assert [info.key for info in inner.list()] == ["b"] and inner.get("b") == b"x"
    with pytest.raises(NotFound):
        inner.get("a/b")
