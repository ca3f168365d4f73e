"""The guarded HTTP client: fetches what strangers' URLs point at, and nothing else.

The address that is dialled is the address that was checked, on every hop: names are resolved here, every address is
held against the networks that a stranger must not reach, and the connection goes to exactly that address, while Host
and TLS server name stay those of the URL. Bytes are counted after decompression, and everything has a deadline.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore
import httpx

from lawnwatch import __version__
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
MAX_RETRY_AFTER = 20.0
BACKOFF = 0.5


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


@dataclass(frozen=True)
class Fetched:
    """What a source gave: the body after decompression, and what lets us ask later whether it changed."""

    data: bytes
    etag: str | None
    last_modified: str | None
    attempts: int


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

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        for number, address in enumerate(addresses := await self._resolve(host, port)):
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if number == len(addresses) - 1:
                    raise
        raise httpcore.ConnectError(f"{host} has no address")

    async def _resolve(self, host: str, port: int) -> list[str]:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
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


class Fetcher:
    """Fetches pictures with the limits of the settings; one for a run, used by many tasks at once.

    Args:
        settings: the limits.
        backend: how connections are made; the guard unless a test brings a resolver of its own.
    """

    def __init__(self, settings: FetchSettings, *, backend: httpcore.AsyncNetworkBackend | None = None) -> None:
        self._settings = settings
        self._hosts: dict[str, asyncio.Semaphore] = {}
        transport = httpx.AsyncHTTPTransport()
        # httpx has no public way to choose who dials; its transport is a thin layer over this pool.
        transport._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl.create_default_context(),
            max_connections=settings.concurrency,
            max_keepalive_connections=settings.concurrency,
            keepalive_expiry=10.0,
            http1=True,
            http2=True,
            network_backend=backend or GuardedBackend(settings.allow_cidrs),
        )
        self._client = httpx.AsyncClient(
            transport=transport,
            trust_env=False,  # a proxy of the environment would dial unchecked addresses
            follow_redirects=False,
            timeout=httpx.Timeout(settings.read_timeout, connect=settings.connect_timeout, pool=None),
            headers={"User-Agent": f"lawnwatch/{__version__}", "Accept": "image/*", "Accept-Encoding": "identity"},
        )

    async def __aenter__(self) -> Fetcher:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def fetch(self, url: str) -> Fetched:
        """Fetch one URL, with retries and redirects, within the total deadline.

        Raises:
            BlockedSource: scheme, user info, port, host or address must not be fetched.
            ImageTooLarge: more bytes than `max_bytes`.
            FetchFailed: everything else that can go wrong with a source.
        """
        end = time.monotonic() + self._settings.total_timeout
        for attempt in range(1, self._settings.attempts + 1):
            try:
                async with asyncio.timeout(max(0.0, end - time.monotonic())):
                    data, headers = await self._follow(mapped(url, self._settings.origin_map))
                return Fetched(data, _short(headers.get("etag")), _short(headers.get("last-modified")), attempt)
            except TimeoutError:
                raise FetchFailed(f"No answer within {self._settings.total_timeout:g} s.", reason="timeout") from None
            except FetchFailed as error:
                # Full jitter, so that the retries of many workers do not come in waves.
                pause = random.uniform(0, BACKOFF * 2**attempt) if error.retry_after is None else error.retry_after  # noqa: S311
                last = attempt == self._settings.attempts or time.monotonic() + pause >= end
                if error.permanent or last:
                    raise
                await asyncio.sleep(pause)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _follow(self, url: str) -> tuple[bytes, httpx.Headers]:
        """One try: every redirect is a URL like the first, checked and dialled anew."""
        for _ in range(self._settings.max_redirects + 1):
            host = checked_url(url, self._settings)
            async with self._slot(host), self._request(url) as response:
                if response.has_redirect_location:
                    target = urljoin(url, response.headers["location"])
                    if urlsplit(url).scheme == "https" and urlsplit(target).scheme == "http":
                        raise Refused("The source redirects from https to http.", reason="redirect_to_http")
                    url = target
                    continue
                _refuse_status(response)
                return await self._body(response), response.headers
        raise FetchFailed(
            f"More than {self._settings.max_redirects} redirects.", reason="too_many_redirects", permanent=True
        )

    @asynccontextmanager
    async def _request(self, url: str) -> AsyncIterator[httpx.Response]:
        try:
            async with self._client.stream("GET", url) as response:
                yield response
        except httpx.TimeoutException as error:
            raise FetchFailed(f"The source is too slow ({type(error).__name__}).", reason="timeout") from error
        except httpx.ConnectError as error:
            raise FetchFailed(f"No connection: {error}.", reason="connect") from error
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise Refused(f"Not a URL that can be fetched: {error}.", reason="bad_url") from error
        except (httpx.HTTPError, httpx.StreamError, zlib.error) as error:
            raise FetchFailed(f"The connection broke ({type(error).__name__}).", reason="connection") from error

    async def _body(self, response: httpx.Response) -> bytes:
        """The body, decompressed piece by piece so that a bomb is noticed at the cap, not after it."""
        cap = self._settings.max_bytes
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", "", "gzip", "deflate"):
            raise FetchFailed(f"Unasked content encoding {encoding[:20]!r}.", reason="encoding", permanent=True)
        inflater = zlib.decompressobj(wbits=47) if encoding in ("gzip", "deflate") else None
        body = bytearray()
        async for raw in response.aiter_raw(65536):
            body += inflater.decompress(raw, cap + 1 - len(body)) if inflater else raw
            if len(body) > cap:
                raise ImageTooLarge(f"The source sends more than {cap:,} bytes.")
        if inflater is not None and not inflater.eof:
            raise FetchFailed("The compressed body is cut short.", reason="short_body")
        declared = response.headers.get("content-length", "")
        if inflater is None and declared.isdecimal() and int(declared) != len(body):
            raise FetchFailed(f"{len(body)} of {declared} bytes came.", reason="short_body")
        return bytes(body)

    @asynccontextmanager
    async def _slot(self, host: str) -> AsyncIterator[None]:
        async with self._hosts.setdefault(host, asyncio.Semaphore(self._settings.per_host)):
            yield


def mapped(url: str, origins: dict[str, str]) -> str:
    """The URL that is really fetched: development may play a part of the web on loopback."""
    for prefix, target in origins.items():
        if url.startswith(prefix):
            return target + url.removeprefix(prefix)
    return url


def checked_url(url: str, settings: FetchSettings) -> str:
    """The URL's host, when the URL may be tried at all.

    Raises:
        BlockedSource: not http(s), with user info, an odd port, or a host outside the allow-list.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower().rstrip("."), parts.port
    except ValueError as error:
        raise Refused(f"Not a URL: {error}.", reason="bad_url") from None
    if parts.scheme not in ("http", "https") or not host:
        raise Refused(
            f"Only http and https are fetched; received {parts.scheme[:20] or 'no scheme'!r}.", reason="scheme"
        )
    if parts.username is not None or parts.password is not None:
        raise Refused("A source URL must not hold a user or a password.", reason="user_info")
    if port is not None and port not in PORTS and not settings.allow_cidrs:
        raise Refused(f"Only the ports 80 and 443 are fetched from; received {port}.", reason="port")
    if settings.allow_hosts and not any(host == each or host.endswith("." + each) for each in settings.allow_hosts):
        raise Refused(f"{host} is not on the list of allowed hosts.", reason="host_not_allowed")
    return host


def _refuse_status(response: httpx.Response) -> None:
    status = response.status_code
    if status == 200:
        return
    later = status in (408, 425, 429) or status >= 500
    raise FetchFailed(
        f"The source answered {status}.",
        reason=f"http_{status}",
        permanent=not later,
        retry_after=retry_after(response.headers.get("retry-after")) if later else None,
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


def _short(value: str | None) -> str | None:
    return value[:64] if value else None
