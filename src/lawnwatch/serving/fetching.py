"""A picture by its URL, by the same guarded client that ingest uses, from the hosts of an allow-list only."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.types import Receive

from lawnwatch.config import FetchSettings, Settings
from lawnwatch.errors import BlockedSource
from lawnwatch.serving.admission import Admission, Sender, unless_gone
from lawnwatch.serving.metrics import Metrics
from lawnwatch.serving.problems import NotEnabled, SourceFailed

if TYPE_CHECKING:
    from lawnwatch.net import Fetcher


class PictureFetcher:
    """Fetches at most `url_concurrency` pictures at once; one more is refused, for waiting would hold its client.

    These places are shared as those of the threads are: a client that has most loses one to a client that has fewer.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        serving = settings.serving
        self._on = bool(serving.url_hosts)
        self._places = Admission(
            serving.url_concurrency, serving.url_concurrency, max_wait=serving.max_wait, metrics=metrics
        )
        self._settings = FetchSettings(
            concurrency=serving.url_concurrency,
            per_host=serving.url_concurrency,
            connect_timeout=min(5.0, serving.url_timeout),
            read_timeout=serving.url_timeout,
            total_timeout=serving.url_timeout,
            attempts=1,  # the client can ask again, and knows better whether it wants to
            max_bytes=serving.max_upload_bytes,
            max_redirects=settings.fetch.max_redirects,
            allow_hosts=[host.lower().strip(".") for host in serving.url_hosts],
            allow_cidrs=settings.fetch.allow_cidrs,
            host_failures=1_000_000,  # no rest for a host: whoever waited for its end would hold a place
        )
        self._fetcher: Fetcher | None = None

    async def fetch(self, url: str, client: str, receive: Receive) -> bytes:
        """The bytes at a URL, for a client.

        Args:
            receive: the request's, whose body was read: what it returns next is the disconnect.

        Raises:
            NotEnabled: no host is allowed.
            BlockedSource: this URL, or one it redirects to, is not allowed.
            ImageTooLarge: more bytes than an upload may have.
            SourceFailed: the host did not give it.
            Overloaded: as many are fetched already, or another needed the place more.
            ClientGone: the client went away.
        """
        if not self._on:
            raise NotEnabled(
                "This server fetches no pictures by URL.",
                hint="Send the picture itself to POST /predict, or set LAWNWATCH_SERVING__URL_HOSTS.",
            )
        sender = Sender(self._places, client)
        try:
            sender.take()
            async with asyncio.timeout(self._settings.total_timeout) as sender.clock:
                picture = await unless_gone(receive, self._fetched(url))
            sender.check()
            return picture
        except TimeoutError:
            sender.check()
            raise SourceFailed("The picture did not come in time.", hint="Try again later.") from None
        finally:
            sender.leave()

    async def _fetched(self, url: str) -> bytes:
        # Only now: a server that has this off does without the HTTP client's memory and start.
        from lawnwatch.net import Fetcher, FetchFailed, Refused

        if self._fetcher is None:
            self._fetcher = Fetcher(self._settings)
        try:
            return (await self._fetcher.fetch(url)).data
        except FetchFailed as error:
            raise SourceFailed(f"The picture's host did not give it ({error.reason}).", hint="Check the URL.") from None
        except Refused as error:
            if error.reason != "private_address":
                raise
            # Its own words name the address, which is nobody's business outside.
            raise BlockedSource("The URL's host must not be reached from here.", hint="Send the picture.") from None
