"""Ingest: claim → fetch → validate → put → record, image by image, each at most once and resumable at any point.

An image that cannot be had ends as a recorded reason and does not stop the others. Bytes go to the store under their
SHA-256 before the record says so, so a record that says `stored` always has its object.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lawnwatch import images
from lawnwatch.catalog import Catalog, ImageRecord, utc_now, worker_name
from lawnwatch.config import Settings
from lawnwatch.errors import BlockedSource, DataError, ImageError, Unavailable
from lawnwatch.net import Fetched, Fetcher, FetchFailed, Refused
from lawnwatch.store import ObjectStore

PROGRESS_SECONDS = 2.0
BAD = ("quarantined", "blocked", "gone", "failed")


@dataclass
class IngestReport:
    """What one run did, in images."""

    claimed: int = 0
    stored: int = 0
    quarantined: int = 0
    blocked: int = 0
    gone: int = 0
    failed: int = 0
    bytes: int = 0
    seconds: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)
    message: str = ""


def run(
    settings: Settings,
    catalog: Catalog,
    store: ObjectStore,
    *,
    labels: list[str] | None = None,
    limit: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> IngestReport:
    """Fetch, validate and store every pending image.

    Args:
        labels: only these labels.
        limit: at most so many images.
        progress: gets a line every few seconds.

    Raises:
        DataError: an empty catalog, an unknown label, or more failed images than `max_bad_ratio`; by then everything
            is recorded.
        Unavailable: database or store do not answer; what was claimed is given back.
    """
    if catalog.status().total == 0:
        raise DataError(
            "The catalog is empty: there is nothing to fetch.",
            hint="Add image records with `lawnwatch catalog add` or `lawnwatch catalog import`.",
        )
    return asyncio.run(_Run(settings, catalog, store, labels, limit, progress).whole())


class _Run:
    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        store: ObjectStore,
        labels: list[str] | None,
        limit: int | None,
        progress: Callable[[str], None],
    ) -> None:
        self.settings, self.catalog, self.store = settings, catalog, store
        self.labels, self.limit, self.progress = labels, limit, progress
        self.worker = worker_name()
        self.report = IngestReport()
        self.reasons: Counter[str] = Counter()
        self.threads = ThreadPoolExecutor(max_workers=settings.fetch.concurrency, thread_name_prefix="ingest")
        self.started = time.monotonic()
        self.total = 0

    async def whole(self) -> IngestReport:
        pending = await self._blocking(self.catalog.status)
        self.total = pending.by_state.get("pending", 0) + pending.by_state.get("claimed", 0)
        self.total = min(self.total, self.limit) if self.limit else self.total
        # A lease outlives the slowest image of its batch, so no living worker's claim runs out.
        lease = 2 * self.settings.fetch.total_timeout + 60
        batch = self.settings.fetch.concurrency * 2
        ticker = asyncio.create_task(self._tick())
        held: list[int] = []
        try:
            async with Fetcher(self.settings.fetch) as fetcher:
                while True:
                    wanted = batch if self.limit is None else min(batch, self.limit - self.report.claimed)
                    if wanted <= 0:
                        break
                    claim = partial(
                        self.catalog.claim, wanted, worker=self.worker, lease_seconds=lease, labels=self.labels
                    )
                    records = await self._blocking(self.catalog.retried, claim)
                    if not records:
                        break
                    held = [record.id for record in records]
                    self.report.claimed += len(records)
                    await self._batch(fetcher, records)
                    held = []
        finally:
            ticker.cancel()
            if held:
                self._give_back(held)
            self.threads.shutdown(wait=False, cancel_futures=True)
        return self._finished()

    async def _batch(self, fetcher: Fetcher, records: list[ImageRecord]) -> None:
        gate = asyncio.Semaphore(self.settings.fetch.concurrency)

        async def one(record: ImageRecord) -> tuple[int, dict[str, Any]]:
            async with gate:
                return record.id, await self._image(fetcher, record)

        # A task group: when the store fails, the batch's other images are cancelled, not left running.
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(record)) for record in records]
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        outcomes = [task.result() for task in tasks]
        await self._blocking(self.catalog.retried, partial(self.catalog.finish, self.worker, outcomes))
        for _, values in outcomes:
            state = str(values["state"])
            setattr(self.report, state, getattr(self.report, state) + 1)
            self.report.bytes += values.get("bytes") or 0
            if state != "stored":
                self.reasons[str(values["reason"]).partition(":")[0]] += 1

    async def _image(self, fetcher: Fetcher, record: ImageRecord) -> dict[str, Any]:
        """One image's road; whatever its source does wrong becomes a state and a reason."""
        attempts = record.attempts + 1
        try:
            fetched = await fetcher.fetch(record.url)
            return {**await self._blocking(self._keep, fetched), "attempts": attempts, "fetched_at": utc_now()}
        except BlockedSource as error:
            state, reason = "blocked", f"{error.reason if isinstance(error, Refused) else error.code}: {error.message}"
        except FetchFailed as error:
            state = "gone" if error.permanent else "failed"
            reason = f"{error.reason}: {error.message}"
        except ImageError as error:
            state, reason = "quarantined", f"{error.code}: {error.message}"
        return {"state": state, "reason": reason[:500], "attempts": attempts, "fetched_at": utc_now()}

    def _keep(self, fetched: Fetched) -> dict[str, Any]:
        """Validate by decoding, then put under the SHA-256; runs in a thread."""
        data = fetched.data
        cap = self.settings.images.max_pixels
        info = images.inspect(data, max_pixels=cap)
        rgb = images.decode(data, size=images.SIZE, max_pixels=cap)
        sha256 = hashlib.sha256(data).hexdigest()
        key = f"images/{sha256[:2]}/{sha256}.{images.EXTENSIONS[info.format]}"
        self.store.put(key, data, content_type=images.MEDIA_TYPES[info.format], if_absent=True, sha256=sha256)
        return {
            "state": "stored",
            "reason": None,
            "object_key": key,
            "sha256": sha256,
            "phash": f"{images.phash(rgb):016x}",
            "width": info.width,
            "height": info.height,
            "bytes": info.bytes,
            "format": info.format,
            "brightness": images.brightness(rgb),
            "sharpness": images.sharpness(rgb),
            "etag": fetched.etag,
            "last_modified": fetched.last_modified,
        }

    async def _blocking(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, lambda: function(*args, **kwargs))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            self.progress(self._line())

    def _line(self) -> str:
        report = self.report
        done = sum(getattr(report, state) for state in ("stored", *BAD))
        rate = done / max(time.monotonic() - self.started, 1e-9)
        left = (self.total - done) / rate if rate else 0.0
        bad = ", ".join(f"{getattr(report, state)} {state}" for state in BAD if getattr(report, state))
        return (
            f"{done} of {self.total} images, {report.stored} stored{', ' + bad if bad else ''}, "
            f"{rate:.0f}/s, about {max(left, 0):.0f} s left"
        )

    def _give_back(self, held: list[int]) -> None:
        """Undo the claims of an interrupted batch, so that the next run need not wait for the lease."""
        try:
            self.catalog.finish(self.worker, ((number, {"state": "pending"}) for number in held))
        except Unavailable:
            self.progress("the database is gone; the claims come back when their lease runs out")

    def _finished(self) -> IngestReport:
        report = self.report
        report.seconds = round(time.monotonic() - self.started, 3)
        report.reasons = dict(self.reasons.most_common())
        bad = sum(getattr(report, state) for state in BAD)
        if report.claimed == 0:
            report.message = "Nothing new: no image record is pending."
            return report
        why = ", ".join(f"{count} {reason}" for reason, count in report.reasons.items())
        report.message = (
            f"{report.stored} of {report.claimed} images stored in {report.seconds:.1f} s"
            + (f"; {bad} not usable ({why})" if bad else "")
            + "."
        )
        if bad / report.claimed > self.settings.data.max_bad_ratio:
            raise DataError(
                f"{bad} of {report.claimed} images could not be used ({why}); at most "
                f"{self.settings.data.max_bad_ratio:.0%} may fail. All outcomes are recorded.",
                hint="Look at `lawnwatch catalog status`; `lawnwatch catalog retry` fetches them again, "
                "LAWNWATCH_DATA__MAX_BAD_RATIO allows more.",
            )
        return report
