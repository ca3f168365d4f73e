"""Who asks: the client of a request and, when keys are required, whether it may.

Decided at the head of a request, before its body is read and before a place is taken. The keys are held in memory and
read anew every few seconds: a request costs no query, a database that is down locks out nobody who was let in before,
and inventing keys costs the inventor more than it costs us.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address

from starlette.types import ASGIApp, Receive, Scope, Send

from lawnwatch import keys, log
from lawnwatch.errors import InputError, LawnwatchError, Unavailable
from lawnwatch.keys import ADMIN, PREDICT
from lawnwatch.serving import problems
from lawnwatch.serving.admission import header, swallow

logger = log.get(__name__)

REFRESH_SECONDS = 5.0  # until a revoked key is refused
UNKNOWN_SECONDS = 1.0  # a key that nobody knows may have been made just now: asked for, but no oftener than this
WAIT_SECONDS = 2.0  # for the keys to be read

# What each scope opens; all else is open to everybody: state, metrics, documentation, what a probe or rollout asks.
GUARDED = (
    ("/predictions", ADMIN),  # what others sent
    ("/reports/", ADMIN),
    ("/predict", PREDICT),
    ("/v2/models/", PREDICT),
)


class Unauthorized(InputError):
    """No key, or none that is good."""

    status, code = 401, "unauthorized"


class Forbidden(InputError):
    """A good key without the scope."""

    status, code = 403, "forbidden"


class KeyRing:
    """The keys that are good, in memory.

    Args:
        read: reads all keys; raises LawnwatchError when the database is down.
    """

    def __init__(self, read: Callable[[], Sequence[keys.Key]]) -> None:
        self._read = read
        self._keys: dict[str, keys.Key] | None = None
        self._read_at = float("-inf")
        self._reading = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="key-ring", daemon=True)

    def start(self) -> None:
        """Begin to follow the table."""
        self._thread.start()

    def stop(self) -> None:
        """Stop following; what is known stays good."""
        self._stop.set()

    @property
    def known(self) -> int:
        """Good keys in memory."""
        return len(self._keys or {})

    async def find(self, sent: str) -> keys.Key:
        """The key that somebody sent.

        Raises:
            Unauthorized: it is none, or revoked.
            Unavailable: the keys could not be read once yet.
        """
        parsed = keys.parsed(sent)
        if parsed is not None:
            if self._keys is None or (parsed[0] not in self._keys and self._is_old()):
                await self._wait()
            if self._keys is None:
                raise Unavailable("The keys cannot be read yet.", hint="Try again soon.")
            key = self._keys.get(parsed[0])
            if key is not None and key.opens(parsed[1]):
                return key
        raise Unauthorized("This API key is not good: unknown, revoked or mistyped.", hint=HINT)

    def refresh(self) -> None:
        """Read the keys; keep what is known when that fails."""
        with self._reading:
            try:
                found = self._read()
            except Exception as error:  # whatever it is: the thread goes on asking, or no new key would ever be good
                logger.warning(
                    "the API keys cannot be read; those known stay good",
                    error=str(error),
                    exc_info=not isinstance(error, LawnwatchError),
                )
                return
            finally:
                self._read_at = time.monotonic()
            self._keys = {key.id: key for key in found if key.revoked_at is None}

    def _is_old(self) -> bool:
        return time.monotonic() - self._read_at > UNKNOWN_SECONDS and not self._reading.locked()

    async def _wait(self) -> None:
        """For the keys to be read; by one request, while the others make do with what is known."""
        reading = asyncio.get_running_loop().run_in_executor(None, self._refresh_if_old)
        await asyncio.wait({reading}, timeout=WAIT_SECONDS)

    def _refresh_if_old(self) -> None:
        if self._is_old():
            self.refresh()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.refresh()
            self._stop.wait(REFRESH_SECONDS)


HINT = "Send it as `Authorization: Bearer lw_…` or `X-API-Key: lw_…`; `lawnwatch key create` makes one."


class ClientMiddleware:
    """Puts `client` into `scope["state"]`, a key's id or the client's host, and `key`: the id or None.

    Args:
        ring: the keys; None lets everybody in.
        trusted: proxies whose X-Forwarded-For is believed.
        on_refused: told of every refusal.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        ring: KeyRing | None,
        trusted: Sequence[IPv4Network | IPv6Network],
        on_refused: Callable[[], None],
    ) -> None:
        self._app = app
        self._ring = ring
        self._trusted = trusted
        self._on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["client"], state["key"] = self._address(scope), None
        needed = needed_scope(scope["path"])
        if self._ring is not None and needed is not None:
            try:
                key = await self._checked(self._ring, scope, needed)
            except LawnwatchError as error:
                self._on_refused()
                if header(scope, b"connection").lower() == "close":
                    await swallow(receive)
                await problems.of(error, scope["path"])(scope, receive, send)
                return
            state["client"] = state["key"] = key.id
        await self._app(scope, receive, send)

    async def _checked(self, ring: KeyRing, scope: Scope, needed: str) -> keys.Key:
        sent = header(scope, b"x-api-key").strip()
        kind, _, token = header(scope, b"authorization").strip().partition(" ")
        if kind.lower() == "bearer":
            sent = token.strip()
        if not sent:
            raise Unauthorized("This server answers holders of an API key only.", hint=HINT)
        key = await ring.find(sent)
        if needed not in key.scopes and ADMIN not in key.scopes:
            raise Forbidden(
                f"Key {key.id} has no scope `{needed}`.", hint=f"`lawnwatch key create --scope {needed}` makes one."
            )
        return key

    def _address(self, scope: Scope) -> str:
        peer = str(scope["client"][0]) if scope.get("client") else "unknown"
        if self._trusted and self._is_trusted(peer):
            # All lines of that name are one list. From the right: what a trusted proxy wrote is true, what stands left
            # of it was sent by anybody.
            lines = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"]
            for hop in reversed(",".join(lines).split(",")):
                if not _is_address(hop.strip()):
                    break
                peer = hop.strip()
                if not self._is_trusted(peer):
                    break
        return _host_of(peer) if ":" in peer else peer

    def _is_trusted(self, address: str) -> bool:
        if not _is_address(address):
            return False
        ip = ip_address(address)
        mapped = getattr(ip, "ipv4_mapped", None)  # how a socket of both families shows an IPv4 peer
        return any((mapped or ip) in network for network in self._trusted)


@lru_cache(maxsize=4096)
def _host_of(address: str) -> str:
    """One name for all that a host of IPv6 may call itself: it has a network of /64 to choose from."""
    ip = IPv6Address(address)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return address if ip.is_link_local else str(IPv6Network((ip, 64), strict=False))


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def needed_scope(path: str) -> str | None:
    """The scope that a path asks for; None: none."""
    return next((scope for prefix, scope in GUARDED if path.startswith(prefix)), None)
