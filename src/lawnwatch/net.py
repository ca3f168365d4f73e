"""The guarded HTTP client: fetches what strangers' URLs point at, and nothing else.

The address that is dialled is the address that was checked, on every hop: names are resolved here, every address is
held against the networks that a stranger must not reach, and the connection goes to exactly that address, while Host
and TLS server name stay those of the URL. Bytes are counted after decompression, and everything has a deadline.

Who asks many hosts must not let one of them decide the pace. A request waits for its host first (at most `per_host` at
once, none while the host rests) and takes one of the `concurrency` slots only then, so waiting costs nobody a slot, and
no image's deadline runs while it waits. A host that fails `host_failures` URLs in a row rests for `host_pause` seconds;
when it still fails after that, it is down: its images end as `host_down` at once, but for those that try again after
each further pause. `Retry-After` makes the whole host rest, not only the image that was told.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any
from urllib.parse import urljoin, urlsplit

import h2.exceptions
import httpcore
import httpx

from lawnwatch import __version__, log
from lawnwatch.config import FetchSettings
from lawnwatch.errors import BlockedSource, ImageTooLarge, LawnwatchError

# Python's `is_global` calls NAT64, `::127.0.0.1`, 6to4 and multicast global, so the networks are listed.
FORBIDDEN_V4 = [
    ip_network("0.0.0.0/8"),
    ip_network("10.0.0.0/8"),
    ip_network("100.64.0.0/10"),  # carrier-grade NAT
    ip_network("127.0.0.0/8"),
    ip_network("169.254.0.0/16"),  # link-local: the clouds' metadata servers
    ip_network("172.16.0.0/12"),
    ip_network("192.0.0.0/24"),
    ip_network("192.0.2.0/24"),
    ip_network("192.88.99.0/24"),
    ip_network("192.168.0.0/16"),
    ip_network("198.18.0.0/15"),
    ip_network("198.51.100.0/24"),
    ip_network("203.0.113.0/24"),
    ip_network("224.0.0.0/4"),
    ip_network("240.0.0.0/4"),
]
GLOBAL_V6 = ip_network("2000::/3")
FORBIDDEN_V6 = [ip_network(each) for each in ("2001::/23", "2001:db8::/32", "3fff::/20")]
NAT64 = ip_network("64:ff9b::/96")
SIX_TO_FOUR = ip_network("2002::/16")
PORTS = frozenset({80, 443})
MAX_RETRY_AFTER = 20.0  # seconds; a source may ask for a day
BACKOFF = 0.5  # seconds; the first retry waits up to twice that
REDIRECTS = frozenset({301, 302, 303, 307, 308})
# What a host does wrong as a whole; every other failure is that of one URL.
HOST_FAULTS = frozenset({"connect", "connection", "timeout"})
# What httpcore lets through while it reads: a broken TLS record is an OSError, a broken HTTP/2 frame h2's own.
UNMAPPED = (OSError, h2.exceptions.H2Error)
HEADERS = (
    (b"User-Agent", f"lawnwatch/{__version__}".encode()),
    (b"Accept", b"image/*"),
    (b"Accept-Encoding", b"identity"),
)
RESOLVERS = 256  # names looked up at once; one whose server is silent holds its thread for some 20 s, wanted or not
DRAIN_BYTES = 65_536  # the longest unwanted body that is read, so that its connection can be used again

logger = log.get(__name__)


class FetchFailed(LawnwatchError):
    """A source did not give its picture.

    Args:
        reason: a short stable code, such as `http_404` or `timeout`.
        permanent: the source says so for good; another try is pointless.
    """

    status, exit_code, code = 502, 5, "fetch_failed"

    def __init__(self, message: str, *, reason: str, permanent: bool = False, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.permanent = permanent
        self.retry_after = retry_after


class Refused(BlockedSource):
    """A URL that is not fetched.

    Args:
        reason: a short stable code, such as `private_address`.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class NotModified(LawnwatchError):
    """The source still has what it had when it gave this ETag or Last-Modified."""

    status, exit_code, code = 304, 1, "not_modified"


@dataclass(frozen=True)
class Fetched:
    """What a source gave.

    Attributes:
        data: the body after decompression.
        etag, last_modified: what lets us ask later whether it changed; None when the source says nothing usable.
        attempts: tries that were needed.
        seconds: time spent with the source, waiting for its turn not included.
    """

    data: bytes
    etag: str | None
    last_modified: str | None
    attempts: int
    seconds: float


def is_public(address: str, allowed: Iterable[str] = ()) -> bool:
    """Whether a numeric address may be dialled: global unicast after unwrapping IPv4 inside IPv6, or in `allowed`."""
    ip: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    if any(ip in ip_network(each) for each in allowed):
        return True
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped:
            ip = ip.ipv4_mapped
        elif ip in NAT64:
            ip = IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip in SIX_TO_FOUR:
            ip = IPv4Address((int(ip) >> 80) & 0xFFFFFFFF)
        else:
            return ip in GLOBAL_V6 and not any(ip in network for network in FORBIDDEN_V6)
    return not any(ip in network for network in FORBIDDEN_V4)


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Resolves a name, refuses it when any of its addresses is not public, and dials the checked address."""

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        self._allowed = tuple(allowed)
        self._inner = httpcore.AnyIOBackend()
        # Of its own: a name server that is silent must not hold the few threads that everything else shares.
        self._resolvers = ThreadPoolExecutor(max_workers=RESOLVERS, thread_name_prefix="resolve")
        self._free = asyncio.Semaphore(RESOLVERS)

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address that answers; `timeout` holds for name and addresses together.

        It begins with the look for the name: that those of other hosts take all threads is not this host's fault.
        """
        looking = await self._look_up(host, port)
        try:
            async with asyncio.timeout(timeout):
                addresses = await self._resolved(host, looking)
                for number, address in enumerate(addresses, start=1):
                    try:
                        return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
                    except (httpcore.ConnectError, httpcore.ConnectTimeout):
                        if number == len(addresses):
                            raise
        except TimeoutError:
            raise httpcore.ConnectTimeout(f"no connection to {host} within {timeout:g} s") from None
        raise httpcore.ConnectError(f"{host} has no address")

    async def _look_up(self, host: str, port: int) -> Future[Any]:
        """Ask for a name's addresses as soon as a thread is free."""
        loop = asyncio.get_running_loop()

        def freed(_: object) -> None:
            with suppress(RuntimeError):  # the run ended before the name server answered
                loop.call_soon_threadsafe(self._free.release)

        await self._free.acquire()
        looking = self._resolvers.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        looking.add_done_callback(freed)
        return looking

    async def _resolved(self, host: str, looking: Future[Any]) -> list[str]:
        try:
            found = await asyncio.wrap_future(looking)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"{host} has no address: {error}") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            if not is_public(address, self._allowed):
                raise Refused(f"{host} is at {address}, which must not be reached from here.", reason="private_address")
        return addresses

    async def connect_unix_socket(self, path: str, timeout: float | None = None, socket_options: Any = None) -> Any:
        raise Refused("Unix sockets are never fetched from.", reason="scheme")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _Host:
    """What one host may be asked, and how it has behaved."""

    def __init__(self, settings: FetchSettings) -> None:
        self._settings = settings
        self._slots = asyncio.Semaphore(settings.per_host)
        self._failing: set[str] = set()  # the URLs that failed since the last one that did not
        self._rests = 0  # taken in a row without a success between them
        self._rest_until = 0.0
        self.users = 0

    async def enter(self) -> None:
        """Wait for a free slot and for the end of the host's rest.

        Raises:
            FetchFailed: the host still failed after a rest.
        """
        await self._slots.acquire()
        try:
            while (rest := self._rest_until - time.monotonic()) > 0:
                if self._rests > 1:
                    raise FetchFailed(
                        f"The host failed {self._settings.host_failures} times in a row, and again after "
                        f"{self._settings.host_pause:g} s.",
                        reason="host_down",
                    )
                await asyncio.sleep(rest)
        except BaseException:
            self._slots.release()
            raise

    def leave(self) -> None:
        self._slots.release()

    def answered(self) -> None:
        self._failing.clear()
        self._rests = 0

    def failed(self, url: str, *, started: float) -> None:
        now = time.monotonic()
        if started < self._rest_until:
            return  # a request from before the rest says nothing about the host after it
        # URLs are counted, not tries: one broken picture that is tried again and again is no broken host.
        self._failing.add(url)
        if len(self._failing) >= self._settings.host_failures:
            self._rests += 1
            self._rest_until = now + self._settings.host_pause

    def rest(self, seconds: float) -> None:
        """The host itself asked to be left alone."""
        self._rest_until = max(self._rest_until, time.monotonic() + seconds)

    @property
    def forgettable(self) -> bool:
        return self.users == 0 and not self._failing and self._rest_until < time.monotonic()


class _Connections:
    """Connections that are kept alive: idle HTTP/1.1 ones are used again, an HTTP/2 one carries many requests at once.

    httpcore's own pool asks every connection's socket for every request whether it is still good, which at 32
    connections costs more than the request itself; here only the one that is to be used is asked.

    Args:
        most: connections kept for later; beyond it, those of the origins that were not used for the longest go.
        options: how a connection is made.
    """

    def __init__(self, most: int, **options: Any) -> None:
        self._most, self._options = most, options
        # By origin, the least recently used first.
        self._idle: dict[str, list[httpcore.AsyncHTTPConnection]] = {}  # HTTP/1.1, used by nobody
        self._shared: dict[str, httpcore.AsyncHTTPConnection] = {}  # HTTP/2

    @asynccontextmanager
    async def asked(self, request: httpcore.Request) -> AsyncIterator[httpcore.Response]:
        """The response to a request; its connection can be used again when the block has read the whole body."""
        origin = str(request.url.origin)
        while True:
            connection = await self._kept(origin) or httpcore.AsyncHTTPConnection(request.url.origin, **self._options)
            try:
                response = await connection.handle_async_request(request)
                break
            except httpcore.ConnectionNotAvailable:  # an HTTP/2 server that wants no more requests on it
                self._shared.pop(origin, None)
        multiplexed = response.extensions.get("http_version") == b"HTTP/2"
        if multiplexed:
            shared = self._shared.pop(origin, connection)
            self._shared[origin] = shared if shared.is_available() else connection
        try:
            yield response
        finally:
            await response.aclose()
            if connection.is_idle() and not multiplexed:
                self._idle[origin] = [*self._idle.pop(origin, []), connection]
            elif connection.is_idle() and self._shared.get(origin) is not connection:
                await connection.aclose()  # two were made at once; one is enough
            await self._shrink()

    async def aclose(self) -> None:
        self._most = 0
        await self._shrink()

    async def _kept(self, origin: str) -> httpcore.AsyncHTTPConnection | None:
        shared = self._shared.get(origin)
        if shared is not None and shared.is_available() and not (shared.is_idle() and shared.has_expired()):
            return shared
        while kept := self._idle.get(origin):
            connection = kept.pop()  # the one that was used last is the least likely to have been closed
            if not connection.has_expired():
                return connection
            await connection.aclose()
        self._idle.pop(origin, None)
        return None

    async def _shrink(self) -> None:
        surplus = sum(map(len, self._idle.values())) + len(self._shared) - self._most
        while surplus > 0 and (connection := self._oldest()):
            surplus -= 1
            await connection.aclose()

    def _oldest(self) -> httpcore.AsyncHTTPConnection | None:
        """A connection that nobody uses, taken out."""
        for origin, kept in list(self._idle.items()):
            if kept:
                return kept.pop(0)
            del self._idle[origin]
        for origin, shared in self._shared.items():
            if shared.is_idle() or shared.is_closed():
                return self._shared.pop(origin)
        return None


@dataclass
class _Clock:
    """The seconds that one image may still spend with its source."""

    left: float

    @contextmanager
    def running(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.left = max(0.0, self.left - (time.monotonic() - started))


class Fetcher:
    """Fetches pictures with the limits of the settings; one for a run, used by many tasks at once.

    Args:
        settings: the limits.
        backend: how connections are made; the guard unless a test brings a resolver of its own.

    Attributes:
        waiting: fetches under way that hold no slot because their host is busy, rests, or is to be asked again later.
        in_flight: fetches that hold one of the `concurrency` slots.
    """

    def __init__(self, settings: FetchSettings, *, backend: httpcore.AsyncNetworkBackend | None = None) -> None:
        self._settings = settings
        self._hosts: dict[str, _Host] = {}
        self._slots = asyncio.Semaphore(settings.concurrency)
        self.waiting = 0
        self.in_flight = 0
        # httpcore, not httpx: it lets us choose who dials, never reads the environment (a proxy would dial unchecked
        # addresses), and follows no redirect by itself.
        self._connections = _Connections(
            settings.concurrency,
            ssl_context=ssl.create_default_context(),
            keepalive_expiry=10.0,
            http1=True,
            http2=True,
            network_backend=backend or GuardedBackend(settings.allow_cidrs),
        )
        self._timeouts = {
            "connect": settings.connect_timeout,
            "read": settings.read_timeout,
            "write": settings.read_timeout,
        }

    async def __aenter__(self) -> Fetcher:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connections.aclose()

    async def fetch(self, url: str, *, etag: str | None = None, last_modified: str | None = None) -> Fetched:
        """Fetch one URL, with retries and redirects, within the total deadline.

        Args:
            etag, last_modified: what the source said last time; it is then asked only for something newer.

        Raises:
            NotModified: the source has nothing newer.
            BlockedSource: scheme, user info, port, host or address must not be fetched.
            ImageTooLarge: more bytes than `max_bytes`.
            FetchFailed: everything else that can go wrong with a source.
        """
        async with self.fetching(url, etag=etag, last_modified=last_modified) as fetched:
            return fetched

    @asynccontextmanager
    async def fetching(
        self, url: str, *, etag: str | None = None, last_modified: str | None = None
    ) -> AsyncIterator[Fetched]:
        """As `fetch`, but one of the `concurrency` slots stays taken until the block ends.

        Who works on the body inside the block has at most `concurrency` bodies in memory, and what is slow there slows
        the fetching.
        """
        try:
            fetched = await self._tries(url, _conditions(etag, last_modified))
        except LawnwatchError:
            raise
        except Exception as error:
            raise unforeseen(error, url) from error
        try:
            yield fetched
        finally:
            self._give_slot()

    async def _tries(self, url: str, conditions: list[tuple[bytes, bytes]]) -> Fetched:
        clock = _Clock(self._settings.total_timeout)
        for attempt in range(1, self._settings.attempts + 1):
            try:
                data, headers = await self._follow(mapped(url, self._settings.origin_map), conditions, clock)
            except FetchFailed as error:
                # Full jitter, so that the retries of many workers do not come in waves.
                pause = random.uniform(0, BACKOFF * 2**attempt) if error.retry_after is None else error.retry_after  # noqa: S311
                hopeless = error.permanent or error.reason == "host_down"
                if hopeless or attempt == self._settings.attempts or pause >= clock.left:
                    raise
                with clock.running(), self._aside():
                    await asyncio.sleep(pause)
            else:
                spent = self._settings.total_timeout - clock.left
                return Fetched(
                    data, _validator(headers, b"etag", 255), _validator(headers, b"last-modified", 64), attempt, spent
                )
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _follow(
        self, url: str, conditions: list[tuple[bytes, bytes]], clock: _Clock
    ) -> tuple[bytes, dict[bytes, bytes]]:
        """One try: every redirect is a URL like the first, checked and dialled anew. Returns with a slot taken.

        A hop gives back its slots before the next one waits for its host, so that hosts which redirect to each other
        cannot wait in a circle.
        """
        secure = False
        for _ in range(self._settings.max_redirects + 1):
            target = checked_url(url, self._settings)
            if secure and target.scheme == "http":
                raise Refused("The source redirects from https to http.", reason="redirect_to_http")
            secure = target.scheme == "https"
            async with self._turn(host_of(target)) as host:
                done = False
                try:
                    answer = await self._hop(url, target, host, conditions, clock)
                    done = not isinstance(answer, str)
                finally:
                    if not done:
                        self._give_slot()
            if not isinstance(answer, str):
                return answer
            url = answer
        raise FetchFailed(
            f"More than {self._settings.max_redirects} redirects.", reason="too_many_redirects", permanent=True
        )

    async def _hop(
        self, url: str, target: httpx.URL, host: _Host, conditions: list[tuple[bytes, bytes]], clock: _Clock
    ) -> str | tuple[bytes, dict[bytes, bytes]]:
        """One request: where it redirects to, or the body with its headers. The host hears how it went."""
        started = time.monotonic()
        try:
            with clock.running():
                async with asyncio.timeout(clock.left), self._request(target, conditions) as response:
                    headers = {key.lower(): value for key, value in response.headers}
                    status = response.status
                    if status < 500:
                        host.answered()
                    if status in REDIRECTS and b"location" in headers:
                        await _drain(response, headers)
                        return _joined(url, headers[b"location"])
                    if status == 304 and conditions:
                        raise NotModified("The source has nothing newer.")
                    if status != 200:
                        await _drain(response, headers)
                        raise _refusal(status, headers)
                    return await self._body(response, headers), headers
        except TimeoutError:
            host.failed(url, started=started)
            raise FetchFailed(f"No answer within {self._settings.total_timeout:g} s.", reason="timeout") from None
        except FetchFailed as error:
            if error.reason in HOST_FAULTS or error.reason.startswith("http_5"):
                host.failed(url, started=started)
            if error.retry_after is not None:
                host.rest(error.retry_after)
            raise

    @asynccontextmanager
    async def _request(self, url: httpx.URL, conditions: list[tuple[bytes, bytes]]) -> AsyncIterator[httpcore.Response]:
        headers = [(b"Host", url.netloc), *HEADERS, *conditions]
        address = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        request = httpcore.Request(b"GET", address, headers=headers, extensions={"timeout": self._timeouts})
        try:
            async with self._connections.asked(request) as response:
                yield response
        except httpcore.TimeoutException as error:
            raise FetchFailed(f"The source is too slow ({type(error).__name__}).", reason="timeout") from error
        except httpcore.ConnectError as error:
            raise FetchFailed(f"No connection: {error}.", reason="connect") from error
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError, *UNMAPPED) as error:
            raise FetchFailed(f"The connection broke ({type(error).__name__}).", reason="connection") from error

    async def _body(self, response: httpcore.Response, headers: dict[bytes, bytes]) -> bytes:
        """The body, decompressed piece by piece so that a bomb is noticed at the cap, not after it."""
        cap = self._settings.max_bytes
        encoding = headers.get(b"content-encoding", b"identity").strip().lower().decode("latin-1")
        if encoding not in ("identity", "", "gzip", "deflate"):
            raise FetchFailed(f"Unasked content encoding {encoding[:20]!r}.", reason="encoding", permanent=True)
        inflater = zlib.decompressobj(wbits=47) if encoding in ("gzip", "deflate") else None
        body = bytearray()
        try:
            async for raw in response.aiter_stream():
                body += inflater.decompress(raw, cap + 1 - len(body)) if inflater else raw
                if len(body) > cap:
                    raise ImageTooLarge(f"The source sends more than {cap:,} bytes.")
        except zlib.error as error:
            raise FetchFailed(f"The compressed body is damaged: {error}.", reason="encoding") from error
        if inflater is not None and not inflater.eof:
            raise FetchFailed("The compressed body is cut short.", reason="short_body")
        declared = headers.get(b"content-length", b"").decode("latin-1")
        if inflater is None and declared.isdecimal() and int(declared) != len(body):
            raise FetchFailed(f"{len(body)} of {declared} bytes came.", reason="short_body")
        return bytes(body)

    @asynccontextmanager
    async def _turn(self, name: str) -> AsyncIterator[_Host]:
        """Wait for the host, then for a slot; the caller gives the slot back, for it may outlive the host's turn."""
        host = self._hosts.setdefault(name, _Host(self._settings))
        host.users += 1
        try:
            with self._aside():
                await host.enter()
            try:
                await self._slots.acquire()
                self.in_flight += 1
                yield host
            finally:
                host.leave()
        finally:
            host.users -= 1
            if host.forgettable:  # a million hosts must not be remembered at once
                self._hosts.pop(name, None)

    def _give_slot(self) -> None:
        self.in_flight -= 1
        self._slots.release()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1


def mapped(url: str, origins: dict[str, str]) -> str:
    """The URL that is really fetched: development may play a part of the web on loopback."""
    for prefix, target in origins.items():
        if url.startswith(prefix):
            return target + url.removeprefix(prefix)
    return url


def checked_url(url: str, settings: FetchSettings) -> httpx.URL:
    """The URL as it goes over the wire (host in IDNA, path percent-encoded), when it may be tried at all.

    Raises:
        BlockedSource: not http(s), with user info, an odd port, or a host outside the allow-list.
    """
    # One parser for the checks and for the request: where two differ, a host could pass under another's name.
    try:
        parsed = httpx.URL(url)
        authority = urlsplit(url).netloc
    except (httpx.InvalidURL, UnicodeError, ValueError) as error:
        raise Refused(f"Not a URL that can be fetched: {error}.", reason="bad_url") from None
    if parsed.scheme not in ("http", "https") or not parsed.raw_host:
        raise Refused(
            f"Only http and https are fetched; received {parsed.scheme[:20] or 'no scheme'!r}.", reason="scheme"
        )
    if parsed.userinfo or "@" in authority:
        raise Refused("A source URL must not hold a user or a password.", reason="user_info")
    odd_allowed = bool(settings.allow_cidrs) and 0 < (parsed.port or 80) < 65536
    if parsed.port is not None and parsed.port not in PORTS and not odd_allowed:
        raise Refused(f"Only the ports 80 and 443 are fetched from; received {parsed.port}.", reason="port")
    host = host_of(parsed)
    if settings.allow_hosts and not any(host == each or host.endswith("." + each) for each in settings.allow_hosts):
        raise Refused(f"{host} is not on the list of allowed hosts.", reason="host_not_allowed")
    return parsed


def host_of(url: httpx.URL) -> str:
    """The host's one name: in ASCII, lower case, without the root's dot."""
    return url.raw_host.decode("ascii").lower().rstrip(".")


def unforeseen(error: Exception, url: str) -> FetchFailed:
    """A fault that nobody foresaw, as the failure of the one source that caused it; the log has the whole of it."""
    logger.error("a source failed for a reason that is not its own; please report it", url=url, exc_info=error)
    return FetchFailed(f"A fault of ours: {type(error).__name__}: {error}.", reason="internal")


def _joined(url: str, location: bytes) -> str:
    """Where a redirect leads. Raises Refused when that is no URL."""
    try:
        return urljoin(url, _text(location))
    except ValueError as error:
        raise Refused(f"The source redirects to what is not a URL: {error}.", reason="bad_url") from None


def _conditions(etag: str | None, last_modified: str | None) -> list[tuple[bytes, bytes]]:
    """The headers that ask only for something newer."""
    given = ((b"If-None-Match", etag), (b"If-Modified-Since", last_modified))
    return [(name, value.encode("latin-1", "replace")) for name, value in given if value]


def _validator(headers: dict[bytes, bytes], name: bytes, longest: int) -> str | None:
    """An ETag or Last-Modified to ask with next time; a part of one would never match."""
    value = headers.get(name, b"").decode("latin-1").strip()
    return value if 0 < len(value) <= longest and value.isprintable() else None


def _text(value: bytes) -> str:
    """A header's value; servers send UTF-8 though the standard says Latin-1."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


async def _drain(response: httpcore.Response, headers: dict[bytes, bytes]) -> None:
    """Read a short body that nobody wants, for an unread one costs the connection."""
    declared = headers.get(b"content-length", b"").decode("latin-1")
    if declared.isdecimal() and int(declared) <= DRAIN_BYTES:
        async for _ in response.aiter_stream():
            pass


def _refusal(status: int, headers: dict[bytes, bytes]) -> FetchFailed:
    later = status in (408, 425, 429) or status >= 500
    wait = headers.get(b"retry-after")
    return FetchFailed(
        f"The source answered {status}.",
        reason=f"http_{status}",
        permanent=not later,
        retry_after=retry_after(wait.decode("latin-1")) if later and wait else None,
    )


def retry_after(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header (seconds or a date), at most MAX_RETRY_AFTER; None without one."""
    if not value:
        return None
    try:
        seconds = (
            float(value)
            if value.strip().isdecimal()
            else (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        )
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)
