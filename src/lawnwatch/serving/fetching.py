"""A picture by its URL, by the same guarded client that ingest uses, from the hosts of an allow-list only."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from lawnwatch.config import FetchSettings, Settings
from lawnwatch.errors import BlockedSource, Overloaded
from lawnwatch.serving.problems import NotEnabled, SourceFailed

if TYPE_CHECKING:
    from lawnwatch.net import Fetcher


class PictureFetcher:
    """Fetches at most `url_concurrency` pictures at once; one more is refused, for waiting would hold its client."""

    def __init__(self, settings: Settings) -> None:
        serving = settings.serving
        self._on = bool(serving.url_hosts)
        self._places = serving.url_concurrency
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

    async def fetch(self, url: str) -> bytes:
        """The bytes at a URL.

        Raises:
            NotEnabled: no host is allowed.
            BlockedSource: this URL, or one it redirects to, is not allowed.
            ImageTooLarge: more bytes than an upload may have.
            SourceFailed: the host did not give it.
            Overloaded: as many are fetched already.
        """
        if not self._on:
            raise NotEnabled(
                "This server fetches no pictures by URL.",
                hint="Send the picture itself to POST /predict, or set LAWNWATCH_SERVING__URL_HOSTS.",
            )
        if self._places == 0:
            raise Overloaded("As many pictures are being fetched as may be.", hint="Try again.", retry_after=1)
        self._places -= 1
        try:
            return await self._fetched(url)
        finally:
            self._places += 1

    async def _fetched(self, url: str) -> bytes:
        # Only now: a server that has this off does without the HTTP client's memory and start.
        from lawnwatch.net import Fetcher, FetchFailed, Refused

        if self._fetcher is None:
            self._fetcher = Fetcher(self._settings)
        try:
            async with asyncio.timeout(self._settings.total_timeout):
                return (await self._fetcher.fetch(url)).data
        except TimeoutError:
            raise SourceFailed("The picture did not come in time.", hint="Try again later.") from None
        except FetchFailed as error:
            raise SourceFailed(f"The picture's host did not give it ({error.reason}).", hint="Check the URL.") from None
        except Refused as error:
            if error.reason != "private_address":
                raise
            # Its own words name the address, which is nobody's business outside.
            raise BlockedSource("The URL's host must not be reached from here.", hint="Send the picture.") from None
