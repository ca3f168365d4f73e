"""Recheck: which sources died or changed, which objects rotted, and what could be repaired.

The stored records are walked, those first that were looked at the longest ago. Each object is read and its SHA-256
compared; each source is asked conditionally whether it still gives the same picture. An object that is missing or
rotten is put back from a source that still gives the same bytes, its own or that of another record of the same
picture. When no source does, the records are quarantined as `object_lost`, so that no snapshot takes them. A picture
whose object is sound stays stored whatever became of its source.

Every outcome is recorded at once, so a recheck may be interrupted and run again at any time.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa

from lawnwatch import images
from lawnwatch.catalog import Catalog, ImageRecord, SourceStatus
from lawnwatch.config import Settings
from lawnwatch.database import utc_now
from lawnwatch.errors import BlockedSource, ImageTooLarge, InputError, NotFound
from lawnwatch.ingest import CLAIM_WINDOW, PATIENCE, first_error, interruptible, patiently
from lawnwatch.net import Fetcher, FetchFailed, NotModified
from lawnwatch.store import ObjectStore

PROGRESS_SECONDS = 2.0
PAGE = 500  # records read at once
LISTED = 100  # the most records that each list of the report names
OTHER_SOURCES = 10  # the most other records of the same picture that are asked for its bytes
READ_BYTES = 1 << 20
LOST = "object_lost: the stored object is missing or damaged, and no source gives its bytes any more"
T = TypeVar("T")


@dataclass
class RecheckReport:
    """What one recheck found, in image records; the lists name the first hundred.

    Attributes:
        same, changed, gone, unreachable: what the sources said.
        sound: objects that are what their hash says.
        repaired: objects that were rotten or missing and were put back from a source.
        lost: records quarantined because their object could not be put back.
    """

    checked: int = 0
    same: int = 0
    changed: int = 0
    gone: int = 0
    unreachable: int = 0
    sound: int = 0
    repaired: int = 0
    lost: int = 0
    seconds: float = 0.0
    changed_urls: list[str] = field(default_factory=list)
    gone_urls: list[str] = field(default_factory=list)
    repaired_urls: list[str] = field(default_factory=list)
    lost_urls: list[str] = field(default_factory=list)
    message: str = ""


@dataclass(frozen=True)
class Stored:
    """What a recheck needs to know of a stored record."""

    id: int
    url: str
    object_key: str
    sha256: str
    format: str
    etag: str | None
    last_modified: str | None


def run(
    settings: Settings,
    catalog: Catalog,
    store: ObjectStore,
    *,
    limit: int | None = None,
    older_than_days: float = 0.0,
    sources: bool = True,
    objects: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> RecheckReport:
    """Look at the stored records anew, and repair what can be repaired.

    Args:
        limit: at most so many records, those first that were looked at the longest ago.
        older_than_days: only records that were not looked at in so many days.
        sources: ask every source. Without it, sources are asked only for the bytes of broken objects.
        objects: read every object.
        progress: gets a line every few seconds.

    Raises:
        InputError: neither sources nor objects.
        Unavailable: database or store stayed away; what was found by then is recorded.
        KeyboardInterrupt: SIGINT or SIGTERM; what was found by then is recorded.
    """
    if not sources and not objects:
        raise InputError("Neither sources nor objects are to be rechecked.", hint="Leave one of the two options out.")
    before = utc_now() - timedelta(days=older_than_days)
    recheck = _Recheck(settings, catalog, store, sources, objects, progress)
    with interruptible() as interruption:
        return asyncio.run(interruption.heeded(recheck.whole(before, limit)))


class _Recheck:
    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        store: ObjectStore,
        sources: bool,
        objects: bool,
        progress: Callable[[str], None],
    ) -> None:
        self.settings, self.catalog, self.store = settings, catalog, store
        self.sources, self.objects, self.progress = sources, objects, progress
        self.report = RecheckReport()
        self.stopping = threading.Event()
        self.workers = ThreadPoolExecutor(settings.fetch.concurrency, thread_name_prefix="recheck")
        self.database = ThreadPoolExecutor(2, thread_name_prefix="catalog")
        self.started = time.monotonic()

    async def whole(self, before: datetime, limit: int | None) -> RecheckReport:
        # Records under way: few enough to be nothing, enough to pass over those whose host is busy or rests.
        window = asyncio.Semaphore(CLAIM_WINDOW * self.settings.fetch.concurrency)
        try:
            async with Fetcher(self.settings.fetch) as fetcher, asyncio.TaskGroup() as group:
                ticker = group.create_task(self._ticker())
                async with asyncio.TaskGroup() as records:
                    async for record in self._walk(before, limit):
                        await window.acquire()
                        task = records.create_task(self._record(fetcher, record))
                        task.add_done_callback(lambda _: window.release())
                ticker.cancel()
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None
        finally:
            self.stopping.set()
            self.workers.shutdown(wait=False, cancel_futures=True)
            self.database.shutdown(wait=False, cancel_futures=True)
        report = self.report
        report.seconds = round(time.monotonic() - self.started, 3)
        report.message = self._line() + (
            f" {report.lost:,} could not be repaired and were quarantined; `lawnwatch catalog retry --state "
            "quarantined` fetches them again when their source is back."
            if report.lost
            else ""
        )
        return report

    async def _walk(self, before: datetime, limit: int | None) -> AsyncIterator[Stored]:
        """The stored records that were last looked at before that moment, page by page along the index of ids.

        Of more than `limit`, those that were never looked at, then those that were looked at the longest ago.
        """
        left = limit
        for looked_at in (False, True):
            if looked_at and left:
                before = await self._in_database(partial(self._longest_ago, before, left))
            last = 0
            while left is None or left > 0:
                page = await self._in_database(
                    partial(self._page, before if looked_at else None, last, min(PAGE, left) if left else PAGE)
                )
                for record in page:
                    yield record
                if not page:
                    break
                last = page[-1].id
                left = None if left is None else left - len(page)

    def _page(self, before: datetime | None, last: int, size: int) -> list[Stored]:
        """The next records after id `last`: looked at until that moment, or never."""
        columns = [getattr(ImageRecord, name) for name in Stored.__dataclass_fields__]
        chosen = ImageRecord.checked_at.is_(None) if before is None else ImageRecord.checked_at <= before
        query = (
            sa.select(*columns)
            .where(ImageRecord.state == "stored", ImageRecord.id > last, chosen)
            .order_by(ImageRecord.id)
            .limit(size)
        )
        with self.catalog.session() as session:
            return [Stored(*row) for row in session.execute(query)]

    def _longest_ago(self, before: datetime, count: int) -> datetime:
        """The moment until which `count` records were last looked at: sorted once, not for every page."""
        query = (
            sa.select(ImageRecord.checked_at)
            .where(ImageRecord.state == "stored", ImageRecord.checked_at <= before)
            .order_by(ImageRecord.checked_at)
            .offset(count - 1)
            .limit(1)
        )
        with self.catalog.session() as session:
            return session.scalar(query) or before

    # --- one record -------------------------------------------------------------------------------------------------

    async def _record(self, fetcher: Fetcher, record: Stored) -> None:
        sound = not self.objects or await self._in_store(partial(self._is_sound, record))
        values: dict[str, Any] = await self._ask(fetcher, record) if self.sources else {}
        mended = sound or await self._repair(fetcher, record)
        lost = await self._in_database(partial(self._write, record, values, mended))
        self.report.checked += 1
        if self.sources:
            self._count(values["source_status"], record.url)
        if self.objects and mended:
            self._count("sound" if sound else "repaired", record.url)
        for url in lost:
            self._count("lost", url)

    def _is_sound(self, record: Stored) -> bool:
        digest = hashlib.sha256()
        try:
            with self.store.open(record.object_key) as stream:
                while block := stream.read(READ_BYTES):
                    digest.update(block)
        except NotFound:
            return False
        return digest.hexdigest() == record.sha256

    async def _ask(self, fetcher: Fetcher, record: Stored) -> dict[str, Any]:
        """What the source says now, as columns."""
        status: SourceStatus
        try:
            async with fetcher.fetching(record.url, etag=record.etag, last_modified=record.last_modified) as fetched:
                if hashlib.sha256(fetched.data).hexdigest() == record.sha256:
                    return {"source_status": "same", "etag": fetched.etag, "last_modified": fetched.last_modified}
            status = "changed"
        except NotModified:
            status = "same"
        except ImageTooLarge:
            status = "changed"
        except BlockedSource:
            status = "gone"
        except FetchFailed as error:
            status = "gone" if error.permanent else "unreachable"
        return {"source_status": status}

    async def _repair(self, fetcher: Fetcher, record: Stored) -> bool:
        """Put the object back from any source that still gives its bytes; whether that was possible."""

        def sources() -> list[str]:
            with self.catalog.session() as session:
                query = (
                    sa.select(ImageRecord.url)
                    .where(ImageRecord.sha256 == record.sha256)
                    .order_by(ImageRecord.id != record.id, ImageRecord.id)
                    .limit(1 + OTHER_SOURCES)
                )
                return list(session.scalars(query))

        for url in await self._in_database(sources):
            try:
                async with fetcher.fetching(url) as fetched:
                    if hashlib.sha256(fetched.data).hexdigest() != record.sha256:
                        continue
                    put = partial(
                        self.store.put,
                        record.object_key,
                        fetched.data,
                        content_type=images.MEDIA_TYPES[record.format],
                        sha256=record.sha256,
                    )
                    await self._in_store(put)
                    return True
            except (BlockedSource, ImageTooLarge, FetchFailed):
                continue
        # Another record of the same picture may have been luckier at the same time.
        return await self._in_store(partial(self._is_sound, record))

    def _write(self, record: Stored, values: dict[str, Any], mended: bool) -> list[str]:
        """Record what was found; returns the URLs of the records that lost their object, copies included."""
        with self.catalog.session() as session:
            session.execute(
                sa.update(ImageRecord)
                # Not the record of somebody who retried or quarantined it meanwhile.
                .where(ImageRecord.id == record.id, ImageRecord.state == "stored", ImageRecord.sha256 == record.sha256)
                .values(**values, checked_at=utc_now())
            )
            if mended:
                return []
            losing = (ImageRecord.state == "stored", ImageRecord.sha256 == record.sha256)
            urls = list(session.scalars(sa.select(ImageRecord.url).where(*losing).order_by(ImageRecord.id)))
            session.execute(sa.update(ImageRecord).where(*losing).values(state="quarantined", reason=LOST))
            return urls

    def _count(self, found: str, url: str) -> None:
        setattr(self.report, found, getattr(self.report, found) + 1)
        listed = getattr(self.report, f"{found}_urls", None)
        if listed is not None and len(listed) < LISTED:
            listed.append(url)

    # --- threads and people -----------------------------------------------------------------------------------------

    async def _in_store(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.workers, partial(patiently, work, self.stopping))

    async def _in_database(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self.database, partial(self.catalog.retried, work, patience=PATIENCE)
        )

    async def _ticker(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            rate = self.report.checked / max(time.monotonic() - self.started, 1e-9)
            self.progress(f"{self._line()} {rate:,.1f}/s")

    def _line(self) -> str:
        report = self.report
        said = [f"{getattr(report, each):,} {each}" for each in ("same", "changed", "gone", "unreachable")]
        kept = [f"{getattr(report, each):,} {each}" for each in ("sound", "repaired", "lost")]
        return (
            f"{report.checked:,} image(s) rechecked."
            + (f" Sources: {', '.join(said)}." if self.sources else "")
            + (f" Objects: {', '.join(kept)}." if self.objects else "")
        )
