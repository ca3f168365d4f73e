"""The guarded client against hostile and failing sources: FAULTS 15-22, on loopback and with a resolver of our own."""

from __future__ import annotations

import asyncio
import gzip
import http.server
import ipaddress
import random
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, ClassVar

import h2.config
import h2.connection
import h2.events
import httpcore
import pytest

from lawnwatch import net
from lawnwatch.config import FetchSettings
from lawnwatch.errors import BlockedSource, ImageTooLarge
from lawnwatch.net import Fetcher, FetchFailed, GuardedBackend, NotModified, Refused

pytestmark = pytest.mark.unit


class Web(http.server.ThreadingHTTPServer):
    """A loopback server whose pages are functions; counts what it is asked."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.hosts: list[str] = []
        self.connections = 0
        self.headers: list[Any] = []
        self.pages: dict[str, Callable[[http.server.BaseHTTPRequestHandler], None]] = {}
        super().__init__(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server_address[1]}"

    def get_request(self) -> Any:
        self.connections += 1
        return super().get_request()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up are what these tests are about


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        self.server.hosts.append(self.headers["Host"])
        self.server.headers.append(self.headers)
        self.server.pages[self.path](self)

    def log_message(self, format: str, *args: object) -> None:
        pass


def answer(status: int = 200, body: bytes = b"picture", **headers: str) -> Callable[[Any], None]:
    def page(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
        handler.close_connection = "Content_Length" in headers

    return page


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "BACKOFF", 0.01)


def settings(**changes: Any) -> FetchSettings:
    return FetchSettings(**{"allow_cidrs": ["127.0.0.0/8"], "connect_timeout": 2, "read_timeout": 1} | changes)


async def fetch(url: str, backend: httpcore.AsyncNetworkBackend | None = None, **changes: Any) -> net.Fetched:
    async with Fetcher(settings(**changes), backend=backend) as fetcher:
        return await fetcher.fetch(url)


def resolve(monkeypatch: pytest.MonkeyPatch, names: dict[str, list[list[str]]]) -> list[str]:
    """Answer names from a table, the n-th look with the n-th entry (the last one for ever); returns what was asked."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in names:
            return real(host, port, *args, **kwargs)
        asked.append(host)
        answers = names[host]
        now = answers[min(asked.count(host), len(answers)) - 1]
        return [entry for address in now for entry in real(address, port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


# --- what may be fetched --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/passwd", "scheme"),
        ("gopher://example.org/1", "scheme"),
        ("data:image/png;base64,AAAA", "scheme"),
        ("ftp://example.org/a.jpg", "scheme"),
        ("//example.org/a.jpg", "scheme"),
        ("http:///a.jpg", "scheme"),
        ("http://user@example.org/a.jpg", "user_info"),
        ("http://user:password@example.org/a.jpg", "user_info"),
        ("http://:@example.org/a.jpg", "user_info"),
        ("http://example.org:22/a.jpg", "port"),
        ("http://example.org:8080/a.jpg", "port"),
        ("http://example.org:0/a.jpg", "port"),
        ("http://example.org:99999/a.jpg", "port"),
        ("http://[::1/a.jpg", "bad_url"),
    ],
)
async def test_15_schemes_users_and_ports(url: str, reason: str) -> None:
    with pytest.raises(Refused) as caught:
        await fetch(url, allow_cidrs=[])
    assert caught.value.reason == reason


HOSTILE = [
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.8",
    "192.0.2.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::7f00:1",
    "64:ff9b:1:ffff::a00:1",
    "::ffff:0:127.0.0.1",
    "5f00::1",
    "4000::1",
    "2001:20::1",
    "2001:1ff:ffff::1",
    "100::1",
    "2001::1",
    "2001:0:7f00:1::",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a00:1::",
    "2002:a9fe:a9fe::",
    "3fff::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
]


@pytest.mark.parametrize("address", HOSTILE)
def test_16_addresses_that_must_not_be_dialled(address: str) -> None:
    assert not net.is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "185.199.108.133", "2606:50c0:8000::154", "64:ff9b::101:101", "2002:101:101::1"]
)
def test_16_addresses_that_may_be_dialled(address: str) -> None:
    assert net.is_public(address)


def test_16_no_address_of_a_forbidden_network_passes_in_any_embedding() -> None:
    random_ = random.Random(3)
    for network in net.FORBIDDEN_V4:
        for _ in range(50):
            v4 = ipaddress.IPv4Address(int(network.network_address) + random_.randrange(network.num_addresses))
            number = int(v4)
            embedded = (
                ipaddress.IPv6Address((0xFFFF << 32) | number),
                ipaddress.IPv6Address(number),
                ipaddress.IPv6Address((0x64FF9B << 96) | number),
                ipaddress.IPv6Address((0x2002 << 112) | (number << 80) | random_.getrandbits(80)),
            )
            assert not any(net.is_public(str(each)) for each in (v4, *embedded)), v4


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "0x7f000001",
        "127.1",
        "2130706433",
        "017700000001",
        "①②⑦.0.0.1",
        "0",
        "127.0.0.1.",
        "0177.0.0.1",
        "0x7f.1",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "[::1%25lo]",
        "[fe80::1%25lo]",
        "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ",
        "localhost。",
        "127。0。0。1",
    ],
)
async def test_16_ways_to_write_loopback(host: str) -> None:
    """Rejected at connect, whatever the spelling; a listener proves that nothing was dialled."""
    with pytest.raises((Refused, FetchFailed)) as caught:
        await fetch(f"http://{host}/a.jpg", allow_cidrs=[], attempts=1)
    if isinstance(caught.value, FetchFailed):
        assert caught.value.reason == "connect" and "address" in caught.value.message, "not even resolved"
    else:
        assert caught.value.reason in ("private_address", "bad_url")


async def test_16_one_bad_address_among_good_ones_refuses_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, {"mixed.example": [["1.1.1.1", "10.0.0.1"]]})
    with pytest.raises(Refused) as caught:
        await fetch("http://mixed.example/a.jpg", allow_cidrs=[])
    assert caught.value.reason == "private_address"


async def test_16_unix_sockets_are_refused() -> None:
    with pytest.raises(BlockedSource):
        await GuardedBackend().connect_unix_socket("/run/docker.sock")


async def test_17_a_redirect_to_a_private_address_is_refused(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    port = web.server_address[1]
    resolve(monkeypatch, {"public.example": [["127.0.0.1"]], "metadata.example": [["169.254.169.254"]]})
    for target in (f"http://metadata.example:{port}/", "http://169.254.169.254/latest", "file:///etc/passwd"):
        web.pages["/a"] = answer(302, b"", Location=target)
        with pytest.raises(Refused):
            await fetch(f"http://public.example:{port}/a")


@pytest.mark.parametrize("target", ["http://[/x", "http://[v1.x]/", "//a]b/", "http://\u2100.example/"])
async def test_17_a_redirect_to_what_is_no_url_is_refused(web: Web, target: str) -> None:
    web.pages["/a"] = answer(302, b"", Location=target.encode().decode("latin-1"))
    with pytest.raises(Refused) as caught:
        await fetch(f"{web.base}/a")
    assert caught.value.reason == "bad_url"


async def test_17_a_redirect_to_a_name_that_nobody_can_have_is_a_failure(web: Web) -> None:
    web.pages["/a"] = answer(302, b"", Location="http://xn--a/b")
    with pytest.raises(FetchFailed) as caught:
        await fetch(f"{web.base}/a", attempts=1)
    assert caught.value.reason == "connect"


async def test_17_redirects_are_followed_relative_and_counted(web: Web) -> None:
    for hop in range(12):
        web.pages[f"/{hop}"] = answer(302, b"", Location=f"{hop + 1}")
    web.pages["/12"] = answer()
    assert (await fetch(f"{web.base}/9")).data == b"picture"
    web.asked.clear()
    with pytest.raises(FetchFailed) as caught:
        await fetch(f"{web.base}/1")
    assert caught.value.reason == "too_many_redirects" and caught.value.permanent
    assert sum(web.asked.values()) == 4


@pytest.mark.parametrize(
    "url",
    ["http://good.example\\@evil.example/a", "http://evil.example#.good.example/", "http://evil.example?.good.example"],
)
async def test_17_the_host_that_is_checked_is_the_host_that_is_asked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = resolve(monkeypatch, {"evil.example": [["127.0.0.1"]], "good.example": [["127.0.0.1"]]})
    with pytest.raises(Refused):
        await fetch(url, allow_hosts=["good.example"])
    assert not asked


async def test_17_each_hop_must_be_on_the_list_of_hosts(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    port = web.server_address[1]
    resolve(monkeypatch, {name: [["127.0.0.1"]] for name in ("good.example", "a.good.example", "notgood.example")})
    web.pages["/a"] = answer(302, b"", Location=f"http://notgood.example:{port}/b")
    web.pages["/b"] = answer()
    assert (await fetch(f"http://a.good.example:{port}/b", allow_hosts=["good.example"])).data == b"picture"
    with pytest.raises(Refused) as caught:
        await fetch(f"http://good.example:{port}/a", allow_hosts=["good.example"])
    assert caught.value.reason == "host_not_allowed"


class Recording(httpcore.AsyncNetworkBackend):
    """The guard, with a note of what was really dialled."""

    def __init__(self, guard: GuardedBackend) -> None:
        self.guard, self.dialled = guard, []  # type: ignore[var-annotated]
        inner = guard._inner.connect_tcp

        async def connect_tcp(host: str, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
            self.dialled.append(host)
            return await inner(host, *args, **kwargs)

        guard._inner.connect_tcp = connect_tcp  # type: ignore[method-assign]

    async def connect_tcp(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        return await self.guard.connect_tcp(*args, **kwargs)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def test_18_the_checked_address_is_the_one_dialled(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is public when checked and loopback a moment later is asked once, so there is no later."""
    port = web.server_address[1]
    asked = resolve(monkeypatch, {"rebind.example": [["127.0.0.1"], ["10.0.0.1"]]})
    backend = Recording(GuardedBackend(["127.0.0.0/8"]))
    web.pages["/a"] = answer()
    assert (await fetch(f"http://rebind.example:{port}/a", backend)).data == b"picture"
    assert asked == ["rebind.example"]
    assert backend.dialled == ["127.0.0.1"], "an address, never a name that is resolved again"
    assert web.hosts == [f"rebind.example:{port}"], "Host stays that of the URL"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for secure.example and its key; the certificate is its own authority."""
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=secure.example",
         "-addext", "subjectAltName=DNS:secure.example", "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return certificate, key


@pytest.fixture
async def tls(certificate: tuple[Path, Path]) -> AsyncIterator[tuple[int, list[str | None], Path]]:
    """A TLS server with a certificate for secure.example: its port, the names that clients asked for, its authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    names: list[str | None] = []
    context.sni_callback = lambda _socket, name, _context: names.append(name)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        location = b"HTTP/1.1 302 Found\r\nLocation: http://secure.example/plain\r\nContent-Length: 0\r\n\r\n"
        found = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nConnection: close\r\n\r\npicture"
        writer.write(location if b"/down" in request else found)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    yield server.sockets[0].getsockname()[1], names, certificate[0]
    server.close()


async def test_18_tls_asks_for_and_verifies_the_name_of_the_url(
    tls: tuple[int, list[str | None], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, names, authority = tls
    resolve(monkeypatch, {name: [["127.0.0.1"]] for name in ("secure.example", "other.example")})
    with pytest.raises(FetchFailed):
        await fetch(f"https://secure.example:{port}/a", attempts=1)  # an authority that nobody trusts
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    assert (await fetch(f"https://secure.example:{port}/a")).data == b"picture"
    assert names[-1] == "secure.example"
    with pytest.raises(FetchFailed):
        await fetch(f"https://other.example:{port}/a", attempts=1)
    with pytest.raises(Refused) as caught:
        await fetch(f"https://secure.example:{port}/down")
    assert caught.value.reason == "redirect_to_http"


def test_the_environment_cannot_insert_a_proxy(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    web.pages["/a"] = answer()
    assert asyncio.run(fetch(f"{web.base}/a")).data == b"picture"


# --- sources that fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451, 204, 206, 304])
async def test_19_answers_for_good_are_not_asked_again(web: Web, status: int) -> None:
    web.pages["/a"] = answer(status, b"")
    with pytest.raises(FetchFailed) as caught:
        await fetch(f"{web.base}/a")
    assert (caught.value.reason, caught.value.permanent) == (f"http_{status}", True)
    assert web.asked["/a"] == 1


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
@pytest.mark.usefixtures("impatient")
async def test_21_answers_of_the_moment_are_asked_again(web: Web, status: int) -> None:
    web.pages["/a"] = answer(status, b"")
    with pytest.raises(FetchFailed) as caught:
        await fetch(f"{web.base}/a")
    assert (caught.value.reason, caught.value.permanent) == (f"http_{status}", False)
    assert web.asked["/a"] == 3


@pytest.mark.usefixtures("impatient")
async def test_21_a_source_that_recovers_is_fetched(web: Web) -> None:
    def flaky(handler: http.server.BaseHTTPRequestHandler) -> None:
        answer(*((503, b"") if web.asked["/a"] < 3 else (200, b"late")), ETag='"v1"')(handler)

    web.pages["/a"] = flaky
    fetched = await fetch(f"{web.base}/a")
    assert (fetched.data, fetched.attempts, fetched.etag) == (b"late", 3, '"v1"')


async def test_20_retry_after_is_honoured(web: Web) -> None:
    def later(handler: http.server.BaseHTTPRequestHandler) -> None:
        answer(429 if web.asked["/a"] == 1 else 200, b"picture", Retry_After="1")(handler)

    web.pages["/a"] = later
    started = time.monotonic()
    assert (await fetch(f"{web.base}/a")).attempts == 2
    assert 1 <= time.monotonic() - started < 3


async def test_20_a_retry_after_beyond_the_deadline_gives_up_at_once(web: Web) -> None:
    web.pages["/a"] = answer(503, b"", Retry_After="86400")
    started = time.monotonic()
    with pytest.raises(FetchFailed):
        await fetch(f"{web.base}/a", total_timeout=5)
    assert time.monotonic() - started < 2
    assert web.asked["/a"] == 1


def test_20_retry_after_in_all_its_forms() -> None:
    assert net.retry_after("7") == 7
    assert net.retry_after("99999999999999999999") == net.MAX_RETRY_AFTER
    in_ten = format_datetime(datetime.now(UTC) + timedelta(seconds=10), usegmt=True)
    assert 8 < (net.retry_after(in_ten) or 0) <= 10
    assert net.retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    for nonsense in ("", None, "soon", "-5", "1e400", "Wed, 99 Foo 2015"):
        assert net.retry_after(nonsense) is None


@pytest.mark.usefixtures("impatient")
async def test_21_resets_and_silence(web: Web) -> None:
    def reset(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        handler.connection.close()
        handler.close_connection = True

    web.pages["/reset"] = reset
    web.pages["/silent"] = lambda handler: time.sleep(3)
    for path, reason in (("/reset", "connection"), ("/silent", "timeout")):
        with pytest.raises(FetchFailed) as caught:
            await fetch(web.base + path, read_timeout=0.3)
        assert caught.value.reason == reason
        assert web.asked[path] == 3


async def test_21_a_broken_tls_record_is_a_broken_connection(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handshake is sound; what follows it cannot be decrypted."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
        channel = context.wrap_bio(received, sent, server_side=True)
        shaking = True
        while shaking:
            try:
                channel.do_handshake()
                shaking = False
            except ssl.SSLWantReadError:
                writer.write(sent.read())
                received.write(await reader.read(65_536))
        writer.write(sent.read())
        await reader.read(65_536)
        writer.write(b"\x17\x03\x03\x00\x30" + bytes(48))
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    resolve(monkeypatch, {"secure.example": [["127.0.0.1"]]})
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with pytest.raises(FetchFailed) as caught:
        await fetch(f"https://secure.example:{server.sockets[0].getsockname()[1]}/a", attempts=1)
    server.close()
    assert (caught.value.reason, caught.value.message) == ("connection", "The connection broke (SSLError).")


class Unforeseen(httpcore.AsyncNetworkBackend):
    """A network that fails as nobody foresaw."""

    async def connect_tcp(self, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
        raise RuntimeError("nobody foresaw this")


async def test_what_nobody_foresaw_is_a_failure_of_the_one_url() -> None:
    async with Fetcher(settings(concurrency=1), backend=Unforeseen()) as fetcher:
        for _ in range(2):
            with pytest.raises(FetchFailed, match="RuntimeError: nobody foresaw this") as caught:
                await fetcher.fetch("http://photos.example/a.jpg")
    assert (caught.value.reason, caught.value.permanent) == ("internal", False)
    assert isinstance(caught.value.__cause__, RuntimeError)


async def test_21_a_drip_is_cut_at_the_total_deadline(web: Web) -> None:
    def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.1)

    web.pages["/a"] = drip
    started = time.monotonic()
    with pytest.raises(FetchFailed) as caught:
        await fetch(f"{web.base}/a", total_timeout=1)
    assert caught.value.reason == "timeout"
    assert time.monotonic() - started < 2


async def test_21_nobody_listens() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(FetchFailed) as caught:
            await fetch(f"http://127.0.0.1:{closed.getsockname()[1]}/a", attempts=1)
    assert caught.value.reason == "connect"


@pytest.mark.usefixtures("impatient")
async def test_22_short_bodies(web: Web) -> None:
    packed = gzip.compress(random.Random(1).randbytes(10_000))
    web.pages["/a"] = answer(body=b"x" * 50, Content_Length="100")
    web.pages["/b"] = answer(body=packed[:5000], Content_Encoding="gzip")
    for path in ("/a", "/b"):
        with pytest.raises(FetchFailed) as caught:
            await fetch(web.base + path)
        assert not caught.value.permanent
        assert web.asked[path] == 3


async def test_22_compressed_bodies_are_unpacked_and_capped_by_what_they_hold(web: Web) -> None:
    web.pages["/good"] = answer(body=gzip.compress(b"y" * 1000), Content_Encoding="gzip")
    web.pages["/bomb"] = answer(body=gzip.compress(b"\0" * 30_000_000), Content_Encoding="gzip")
    web.pages["/odd"] = answer(body=b"?", Content_Encoding="br")
    assert (await fetch(f"{web.base}/good", max_bytes=1000)).data == b"y" * 1000
    with pytest.raises(ImageTooLarge):
        await fetch(f"{web.base}/good", max_bytes=999)
    with pytest.raises(ImageTooLarge):
        await fetch(f"{web.base}/bomb", max_bytes=1_000_000)
    assert web.asked["/bomb"] == 1
    with pytest.raises(FetchFailed) as caught:
        await fetch(f"{web.base}/odd")
    assert caught.value.reason == "encoding"


async def test_22_an_endless_body_ends_at_the_cap(web: Web) -> None:
    def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        while True:
            handler.wfile.write(b"x" * 65536)

    web.pages["/a"] = endless
    with pytest.raises(ImageTooLarge):
        await fetch(f"{web.base}/a", max_bytes=1_000_000)


# --- asking again later, and keeping connections --------------------------------------------------------------------


async def test_a_source_is_asked_only_for_something_newer(web: Web) -> None:
    def page(handler: http.server.BaseHTTPRequestHandler) -> None:
        known = handler.headers["If-None-Match"] == '"v1"' or handler.headers["If-Modified-Since"] == "yesterday"
        answer(304 if known else 200, b"" if known else b"picture", ETag='"v1"', Last_Modified="yesterday")(handler)

    web.pages["/a"] = page
    first = await fetch(f"{web.base}/a")
    assert (first.etag, first.last_modified) == ('"v1"', "yesterday")
    assert "If-None-Match" not in web.headers[0]
    async with Fetcher(settings()) as fetcher:
        for known in ({"etag": '"v1"'}, {"last_modified": "yesterday"}):
            with pytest.raises(NotModified):
                await fetcher.fetch(f"{web.base}/a", **known)
        assert (await fetcher.fetch(f"{web.base}/a", etag='"v0"')).data == b"picture"
    assert web.asked["/a"] == 4


async def test_an_etag_too_long_to_keep_is_none(web: Web) -> None:
    web.pages["/a"] = answer(ETag='"' + "x" * 300 + '"', Last_Modified="x" * 65)
    fetched = await fetch(f"{web.base}/a")
    assert (fetched.etag, fetched.last_modified) == (None, None)


async def test_connections_are_kept_and_used_again(web: Web) -> None:
    web.pages |= {"/a": answer(), "/gone": answer(404, b"no"), "/moved": answer(302, b"there", Location="/a")}
    async with Fetcher(settings(per_host=2)) as fetcher:
        for _ in range(5):
            await asyncio.gather(*(fetcher.fetch(f"{web.base}/{path}") for path in ("a", "moved", "a")))
            with pytest.raises(FetchFailed):
                await fetcher.fetch(f"{web.base}/gone")
    assert web.connections == 2, "as many as were ever used at once"


async def test_no_more_connections_are_kept_than_there_are_slots(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    port = web.server_address[1]
    resolve(monkeypatch, {f"{number}.example": [["127.0.0.1"]] for number in range(6)})
    web.pages["/a"] = answer()
    async with Fetcher(settings(concurrency=2)) as fetcher:
        for number in range(6):
            await fetcher.fetch(f"http://{number}.example:{port}/a")
        assert sum(map(len, fetcher._connections._idle.values())) == 2
        assert not fetcher._hosts, "hosts that behave are forgotten"


async def test_a_connection_that_the_server_closed_is_not_used_again(web: Web) -> None:
    web.pages["/a"] = answer()
    async with Fetcher(settings(attempts=1)) as fetcher:
        await fetcher.fetch(f"{web.base}/a")
        kept = next(iter(fetcher._connections._idle.values()))[0]
        await kept._connection._network_stream.aclose()  # type: ignore[union-attr]
        assert (await fetcher.fetch(f"{web.base}/a")).data == b"picture"
    assert web.connections == 2


class Http2(asyncio.Protocol):
    """The least that speaks HTTP/2: answers each request when all `at_once` are there."""

    connections = 0
    waiting: ClassVar[list[tuple[Http2, int]]] = []
    at_once = 1

    def connection_made(self, transport: Any) -> None:
        type(self).connections += 1
        self.transport = transport
        self.http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        self.http.initiate_connection()
        transport.write(self.http.data_to_send())

    def data_received(self, data: bytes) -> None:
        for event in self.http.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                Http2.waiting.append((self, event.stream_id))
        if len(Http2.waiting) >= Http2.at_once:
            for connection, stream in Http2.waiting:
                connection.http.send_headers(stream, [(":status", "200"), ("etag", '"two"')])
                connection.http.send_data(stream, b"picture", end_stream=True)
                connection.transport.write(connection.http.data_to_send())
            Http2.waiting.clear()
        self.transport.write(self.http.data_to_send())


class BrokenHttp2(Http2):
    """Begins an answer, and goes on with a frame that no stream may have."""

    def data_received(self, data: bytes) -> None:
        for event in self.http.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                self.http.send_headers(event.stream_id, [(":status", "200")])
                # DATA of stream 0, when the client has read the headers and waits for the body
                asyncio.get_running_loop().call_later(0.2, self.transport.write, b"\0\0\1\0\0\0\0\0\0x")
        self.transport.write(self.http.data_to_send())


async def test_21_a_broken_http2_frame_is_a_broken_connection(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.set_alpn_protocols(["h2"])
    server = await asyncio.get_running_loop().create_server(BrokenHttp2, "127.0.0.1", 0, ssl=context)
    resolve(monkeypatch, {"secure.example": [["127.0.0.1"]]})
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with pytest.raises(FetchFailed) as caught:
        await fetch(f"https://secure.example:{server.sockets[0].getsockname()[1]}/a", attempts=1)
    server.close()
    assert caught.value.reason == "connection"


async def test_http2_carries_many_requests_on_one_connection(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.set_alpn_protocols(["h2", "http/1.1"])
    server = await asyncio.get_running_loop().create_server(Http2, "127.0.0.1", 0, ssl=context)
    url = f"https://secure.example:{server.sockets[0].getsockname()[1]}/a"
    resolve(monkeypatch, {"secure.example": [["127.0.0.1"]]})
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    async with Fetcher(settings(per_host=6)) as fetcher:
        assert (await fetcher.fetch(url)).etag == '"two"'
        Http2.at_once = 6  # answered only when all six are under way at the same time
        found = await asyncio.gather(*(fetcher.fetch(url) for _ in range(6)))
    server.close()
    assert [each.data for each in found] == [b"picture"] * 6
    assert Http2.connections == 1


# --- many hosts -----------------------------------------------------------------------------------------------------


async def test_waiting_for_the_host_does_not_count_against_the_deadline(web: Web) -> None:
    def slow(handler: http.server.BaseHTTPRequestHandler) -> None:
        time.sleep(0.3)
        answer()(handler)

    web.pages["/a"] = slow
    async with Fetcher(settings(per_host=1, total_timeout=0.8, attempts=1)) as fetcher:
        found = await asyncio.gather(*(fetcher.fetch(f"{web.base}/a") for _ in range(5)))
    assert all(each.seconds < 0.8 for each in found)


async def test_23_a_host_that_hangs_holds_no_more_than_its_share(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    port = web.server_address[1]
    resolve(monkeypatch, {name: [["127.0.0.1"]] for name in ("hangs.example", "good.example")})
    others_are_done = threading.Event()

    def hangs(handler: http.server.BaseHTTPRequestHandler) -> None:
        assert others_are_done.wait(20)
        answer()(handler)

    web.pages |= {"/hangs": hangs, "/good": answer()}
    async with Fetcher(settings(per_host=2, concurrency=3, read_timeout=30)) as fetcher:
        hanging = [asyncio.create_task(fetcher.fetch(f"http://hangs.example:{port}/hangs")) for _ in range(20)]
        while web.asked["/hangs"] < 2:
            await asyncio.sleep(0.01)
        assert (fetcher.waiting, fetcher.in_flight) == (18, 2)
        await asyncio.gather(*(fetcher.fetch(f"http://good.example:{port}/good") for _ in range(10)))
        assert web.asked["/hangs"] == 2
        others_are_done.set()
        await asyncio.gather(*hanging)


@pytest.mark.usefixtures("impatient")
async def test_23_a_dead_host_is_left_alone_and_then_given_up(web: Web) -> None:
    web.pages |= {f"/{number}": answer(503, b"") for number in range(40)}
    limits = settings(host_failures=3, host_pause=0.2, per_host=2, attempts=2)
    async with Fetcher(limits) as fetcher:
        tasks = [fetcher.fetch(f"{web.base}/{number}") for number in range(40)]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        reasons = Counter(each.reason for each in found if isinstance(each, FetchFailed))
        assert set(reasons) <= {"http_503", "host_down"} and sum(reasons.values()) == 40
        assert reasons["host_down"] >= 30
        assert sum(web.asked.values()) <= 12, "three that fail, those under way, and the same after the rest"
        # After its rest a host gets another chance, and a success is all that it takes.
        web.pages = dict.fromkeys(web.pages, answer())
        await asyncio.sleep(0.25)
        assert (await fetcher.fetch(f"{web.base}/1")).data == b"picture"
        assert len(await asyncio.gather(*(fetcher.fetch(f"{web.base}/{number}") for number in range(40)))) == 40


@pytest.mark.usefixtures("impatient")
async def test_23_one_broken_picture_is_no_broken_host(web: Web) -> None:
    web.pages |= {"/broken": answer(500, b""), "/good": answer()}
    async with Fetcher(settings(host_failures=2, host_pause=600)) as fetcher:
        for _ in range(3):
            with pytest.raises(FetchFailed):
                await fetcher.fetch(f"{web.base}/broken")
        async with asyncio.timeout(10):
            assert (await fetcher.fetch(f"{web.base}/good")).data == b"picture"


async def test_20_retry_after_is_for_the_whole_host(web: Web) -> None:
    asked: list[tuple[str, float]] = []

    def page(handler: http.server.BaseHTTPRequestHandler) -> None:
        asked.append((handler.path, time.monotonic()))
        answer(429 if len(asked) == 1 else 200, b"picture", Retry_After="1")(handler)

    web.pages |= {"/a": page, "/b": page}
    async with Fetcher(settings()) as fetcher:
        first = asyncio.create_task(fetcher.fetch(f"{web.base}/a"))
        while not asked:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        await fetcher.fetch(f"{web.base}/b")
        await first
    assert all(moment - asked[0][1] > 0.9 for _, moment in asked[1:])


async def test_21_a_silent_name_server_counts_as_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    awake = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: awake.wait(20))
    async with asyncio.timeout(10):
        with pytest.raises(FetchFailed) as caught:
            await fetch("http://silent.example/a", connect_timeout=0.1, attempts=1)
    awake.set()
    assert caught.value.reason == "timeout"


class Silent:
    """Names that begin with `silent` get no answer until somebody wakes their server; all others are this machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.awake, self.asked, self.real = threading.Event(), threading.Semaphore(0), socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self.getaddrinfo)

    def getaddrinfo(self, host: str, *args: Any, **options: Any) -> Any:
        if host.startswith("silent"):
            self.asked.release()
            self.awake.wait(20)
            raise socket.gaierror(-3, "Temporary failure in name resolution")
        return self.real("127.0.0.1", *args, **options)


async def test_21_many_silent_names_leave_room_for_others(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given up after `connect_timeout`, each still holds a thread for as long as the resolver waits for its server."""
    silent, port = Silent(monkeypatch), web.server_address[1]
    web.pages["/a"] = answer()
    async with Fetcher(settings(connect_timeout=0.3, attempts=1, concurrency=32)) as fetcher:
        names = [f"http://silent{number}.example:{port}/a" for number in range(64)]
        lost = await asyncio.gather(*(fetcher.fetch(name) for name in names), return_exceptions=True)
        assert [each.reason for each in lost if isinstance(each, FetchFailed)] == ["timeout"] * 64
        async with asyncio.timeout(10):
            assert (await fetcher.fetch(f"http://good.example:{port}/a")).data == b"picture"
        silent.awake.set()


async def test_21_waiting_for_the_names_of_others_is_not_the_hosts_own_time(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(net, "RESOLVERS", 4)
    silent, port = Silent(monkeypatch), web.server_address[1]
    web.pages["/a"] = answer()
    async with Fetcher(settings(connect_timeout=0.4, attempts=1)) as fetcher:
        lost = [asyncio.create_task(fetcher.fetch(f"http://silent{n}.example:{port}/a")) for n in range(4)]
        for _ in lost:
            await asyncio.to_thread(silent.asked.acquire)
        good = [asyncio.create_task(fetcher.fetch(f"http://good{n}.example:{port}/a")) for n in range(4)]
        await asyncio.gather(*lost, return_exceptions=True)
        await asyncio.sleep(0.5)  # all threads are held for longer than a connection may take
        assert not any(task.done() for task in good)
        silent.awake.set()
        assert [fetched.data for fetched in await asyncio.gather(*good)] == [b"picture"] * 4


async def test_one_host_gets_no_more_than_its_share(web: Web) -> None:
    now, most, lock = 0, 0, threading.Lock()

    def busy(handler: http.server.BaseHTTPRequestHandler) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        answer()(handler)

    web.pages["/a"] = busy
    async with Fetcher(settings(per_host=3)) as fetcher:
        await asyncio.gather(*(fetcher.fetch(f"{web.base}/a") for _ in range(20)))
    assert most == 3


async def test_an_origin_is_played_elsewhere_in_development(web: Web) -> None:
    web.pages["/x/a.jpg"] = answer()
    fetched = await fetch(
        "https://photos.example/set/a.jpg", origin_map={"https://photos.example/set/": f"{web.base}/x/"}
    )
    assert fetched.data == b"picture"
