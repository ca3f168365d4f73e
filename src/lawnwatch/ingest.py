"""Ingest: claim → fetch → validate → put → record, image by image, each at most once and resumable at any point.

The steps run side by side: a claimer keeps a little more work claimed than can be done at once, each image is fetched
and put by a task of its own, and a recorder writes outcomes in groups. An image that cannot be had ends as a recorded
reason and does not stop the others. Bytes go to the store under their SHA-256 before the record says so, so a record
that says `stored` always has its object.

Memory is bounded whatever happens: at most `fetch.concurrency` bodies are alive, because the slot of a fetch is given
back only when its bytes are in the store, and at most DECODED_PIXELS are being decoded, because a picture waits until
there is room for its own. When store or database are away, that is nobody's fault but ours: the work is
tried again for PATIENCE seconds, then the run ends as Unavailable and gives its claims back.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import hashlib
import itertools
import os
import random
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from lawnwatch import images, log
from lawnwatch.catalog import Catalog, ImageRecord, Label, worker_name
from lawnwatch.config import Settings
from lawnwatch.database import utc_now
from lawnwatch.errors import BlockedSource, DataError, ImageError, LawnwatchError, Unavailable
from lawnwatch.net import Fetched, Fetcher, FetchFailed, Refused, unforeseen
from lawnwatch.store import ObjectStore

PROGRESS_SECONDS = 2.0
RATE_SECONDS = 30.0  # the rate shown is that of so many last seconds
RECORD_SECONDS = 0.5
RECORD_IMAGES = 64
LEASE_SECONDS = 120.0  # how long the claims of a worker that died on another machine are waited for
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
LARGE_BYTES = 1 << 20
DECODED_PIXELS = 60_000_000  # decoded at once; a picture of 50 million takes 340 MB, and a fetch pod has 1 GiB
CLAIM_AHEAD = 2  # images claimed and not waiting for their host, per slot
CLAIM_WINDOW = 32  # images claimed in all, per slot: how far a busy or resting host's images are passed over
PATIENCE = 60.0  # seconds that a store or database may be away before the run gives up
OTHERS_LOOK_SECONDS = 0.5
OTHERS_SECONDS = 600.0  # without one finished image of theirs until other runs are not waited for any more
GIVE_BACK_SECONDS = 10.0  # for the claims of an interrupted run
BAD = ("quarantined", "blocked", "gone", "failed")

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series beside each counter, which nobody reads
logger = log.get(__name__)
T = TypeVar("T")


@dataclass
class IngestReport:
    """What one run did, in images.

    Attributes:
        worker_died: records that this run found to have killed worker after worker; they are `failed`, not claimed.
    """

    claimed: int = 0
    stored: int = 0
    quarantined: int = 0
    blocked: int = 0
    gone: int = 0
    failed: int = 0
    worker_died: int = 0
    bytes: int = 0
    seconds: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)
    message: str = ""


@dataclass
class IngestPlan:
    """How the pending images are shared among runs side by side.

    Attributes:
        pending: images to fetch.
        batches: the command line of each run, without the program's name.
    """

    pending: int
    batches: list[list[str]]
    message: str = ""


def plan(
    settings: Settings, catalog: Catalog, *, labels: list[str] | None = None, limit: int | None = None
) -> IngestPlan:
    """Share the pending images among equal runs of about `data.batch_images`, at most `data.max_batches`.

    What other runs have claimed counts too, for a run that was killed has claims as well until their lease runs out.
    The runs claim what they fetch, so they may run in any order, at once or one after the other, and be repeated.

    Raises:
        DataError: an empty catalog, or an unknown label.
    """
    pending = _unfinished(catalog, labels)
    pending = min(pending, limit) if limit else pending
    if not pending:
        return IngestPlan(0, [], "Nothing new: no image record is pending.")
    count = min(-(-pending // settings.data.batch_images), settings.data.max_batches)
    share, rest = divmod(pending, count)
    only = [f"--labels={','.join(labels)}"] if labels else []
    batches = [["ingest", *only, f"--limit={share + (number < rest)}"] for number in range(count)]
    claimed = _count(catalog, labels, ImageRecord.state == "claimed")
    others = f" Other runs have claimed {claimed:,}; they are waited for." if claimed else ""
    return IngestPlan(pending, batches, f"{pending:,} image(s) to fetch in {count} batch(es).{others}")


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

    When nothing is pending any more, what other runs have claimed is waited for: they finish it, or it comes back when
    they are dead.

    Args:
        labels: only these labels.
        limit: at most so many images.
        progress: gets a line every few seconds.

    Raises:
        DataError: an empty catalog, an unknown label, or more failed images than `max_bad_ratio`; by then everything
            is recorded.
        Unavailable: database or store stayed away for PATIENCE seconds, and what was claimed is given back; or other
            runs finished none of their images for OTHERS_SECONDS.
        KeyboardInterrupt: SIGINT or SIGTERM; what was finished is recorded, the rest is given back.
    """
    total = _unfinished(catalog, labels)
    _hand_back_memory()
    ingest = _Run(settings, catalog, store, labels, limit, progress, min(total, limit) if limit else total)
    with interruptible() as interruption:
        return asyncio.run(interruption.heeded(ingest.whole()))


def _unfinished(catalog: Catalog, labels: list[str] | None) -> int:
    """How many records are pending, or claimed by runs of which some may be dead. Raises DataError."""
    with catalog.session() as session:
        if session.scalar(sa.select(ImageRecord.id).limit(1)) is None:
            raise DataError(
                "The catalog is empty: there is nothing to fetch.",
                hint="Add image records with `lawnwatch catalog add` or `lawnwatch catalog import`.",
            )
    return _count(catalog, labels, ImageRecord.state.in_(("pending", "claimed")))


def _count(catalog: Catalog, labels: list[str] | None, *conditions: sa.ColumnElement[bool]) -> int:
    with catalog.session() as session:
        query = sa.select(sa.func.count()).select_from(ImageRecord).where(*conditions)
        if labels:
            known = dict(session.execute(sa.select(Label.name, Label.id).where(Label.name.in_(labels))).all())
            if unknown := set(labels) - known.keys():
                raise DataError(
                    f"The catalog has no label {', '.join(sorted(unknown))}.",
                    hint="`lawnwatch catalog status` lists the labels.",
                )
            query = query.where(ImageRecord.label_id.in_(known.values()))
        return int(session.scalar(query) or 0)


# --- being interrupted ----------------------------------------------------------------------------------------------


class Interruption:
    """SIGINT or SIGTERM while a run is under way: the run is cancelled and cleans up, then the signal takes effect."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._cancel: Callable[[], object] = lambda: None

    async def heeded(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work` in this loop; a signal cancels it, once: a second one does not disturb the cleaning up."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(work)
        self._cancel = partial(loop.call_soon_threadsafe, task.cancel)
        try:
            return await task
        finally:
            self._cancel = lambda: None

    def came(self, number: int, _frame: object) -> None:
        if self.signal is None:
            self.signal = number
            self._cancel()


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Turn SIGINT and SIGTERM into a cancellation of the work inside, and raise them again when it has cleaned up."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption  # signals reach the main thread only
        return
    before = {number: signal.signal(number, interruption.came) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    except asyncio.CancelledError:
        if interruption.signal is None:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if interruption.signal is not None:
            signal.raise_signal(interruption.signal)


# --- one run --------------------------------------------------------------------------------------------------------


class _Run:
    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        store: ObjectStore,
        labels: list[str] | None,
        limit: int | None,
        progress: Callable[[str], None],
        total: int,
    ) -> None:
        self.settings, self.catalog, self.store = settings, catalog, store
        self.labels, self.limit, self.progress, self.total = labels, limit, progress, total
        self.worker = worker_name()
        self.report = IngestReport()
        self.reasons: Counter[str] = Counter()
        self.metrics = IngestMetrics(settings.metrics_dir)
        self.held: set[int] = set()  # claimed and not recorded yet
        self.outcomes: list[tuple[int, dict[str, Any]]] = []
        self.moved = asyncio.Event()  # an image needs no slot any more
        self.recordable = asyncio.Event()  # a whole group of outcomes waits, or all there will be for now
        self.others = 0  # images that other runs have claimed, since this one waits for them
        self.others_since = 0.0
        self.stopping = threading.Event()  # for the threads, which nobody can cancel
        # The database has threads of its own: a claim must not stand in line behind slow puts.
        self.workers = ThreadPoolExecutor(settings.fetch.concurrency, thread_name_prefix="ingest")
        self.database = ThreadPoolExecutor(2, thread_name_prefix="catalog")
        self.room = Room(DECODED_PIXELS)
        self.began = utc_now()
        self.started = time.monotonic()
        self.recent: deque[tuple[float, int]] = deque([(self.started, 0)])

    async def whole(self) -> IngestReport:
        try:
            async with Fetcher(self.settings.fetch) as fetcher, asyncio.TaskGroup() as group:
                beside = [
                    group.create_task(each) for each in (self._recorder(), self._ticker(fetcher), self._renewer())
                ]
                async with asyncio.TaskGroup() as images_:
                    await self._claimer(fetcher, images_)
                for task in beside:
                    task.cancel()
            await self._record()
            self.report.worker_died = await self._in_database(self._given_up)
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None
        finally:
            self.stopping.set()
            await self._give_back()
            self.workers.shutdown(wait=False, cancel_futures=True)
            self.database.shutdown(wait=False, cancel_futures=True)
            self.report.seconds = round(time.monotonic() - self.started, 3)
            self.report.reasons = dict(self.reasons.most_common())
            self.metrics.write(self.report, in_flight=0)
            self.metrics.close()
        return self._finished()

    # --- the pipeline -----------------------------------------------------------------------------------------------

    async def _claimer(self, fetcher: Fetcher, group: asyncio.TaskGroup) -> None:
        """Start a task per pending image, as far ahead as there are slots to fill.

        Records whose worker died come last, a group at a time: nothing is claimed beside one.
        """
        slots = self.settings.fetch.concurrency
        while (left := slots if self.limit is None else self.limit - self.report.claimed) > 0:
            active = len(self.held) - len(self.outcomes) - fetcher.waiting
            wanted = min(slots * CLAIM_AHEAD - active, slots * CLAIM_WINDOW - len(self.held))
            if wanted < min(slots, left):
                self.moved.clear()
                with suppress(TimeoutError):  # a host that goes to rest frees room too, and says nothing
                    async with asyncio.timeout(0.1):
                        await self.moved.wait()
                continue
            if self.limit is not None:
                wanted = min(wanted, left)
            records = await self._claim(wanted)
            for record in records:
                group.create_task(self._image(fetcher, record))
            if not records and not self.held and not await self._others_are_at_work():
                return
            while self.held and not (records and records[0].lost_claims == 0):
                self.moved.clear()
                await self.moved.wait()

    async def _claim(self, wanted: int) -> list[ImageRecord]:
        def claim() -> list[ImageRecord]:
            if self.stopping.is_set():
                return []
            return self.catalog.claim(
                wanted,
                worker=self.worker,
                lease_seconds=LEASE_SECONDS,
                labels=self.labels,
                suspects=not self.held,
            )

        claiming = asyncio.get_running_loop().run_in_executor(
            self.database, partial(self.catalog.retried, claim, patience=PATIENCE)
        )
        try:
            records = await asyncio.shield(claiming)
        except asyncio.CancelledError:
            # The thread goes on; what it claims must be given back too.
            self.stopping.set()
            with suppress(LawnwatchError):
                self.held |= {record.id for record in await claiming}
            raise
        self.others = 0 if records else self.others
        self.report.claimed += len(records)
        self.held |= {record.id for record in records}
        return records

    async def _others_are_at_work(self) -> bool:
        """Whether other runs have claims; then a moment has passed, after which some may have come back.

        Raises:
            Unavailable: they have finished none of them for OTHERS_SECONDS, which is longer than an image takes.
        """
        others, now = await self._in_database(partial(_unfinished, self.catalog, self.labels)), time.monotonic()
        if others != self.others:
            self.others, self.others_since = others, now
        if others and now - self.others_since > OTHERS_SECONDS:
            raise Unavailable(
                f"Other runs have claimed {others:,} image(s) and finished none of them for {OTHERS_SECONDS:g} s. All "
                "that this run did is recorded.",
                hint="Look at the other runs, and run this again when they have ended.",
            )
        if others:
            await asyncio.sleep(OTHERS_LOOK_SECONDS)
        return others > 0

    async def _image(self, fetcher: Fetcher, record: ImageRecord) -> None:
        """One image's road; whatever its source does wrong becomes a state and a reason."""
        try:
            async with fetcher.fetching(record.url) as fetched:
                self.metrics.fetched(fetched)
                values = await asyncio.get_running_loop().run_in_executor(self.workers, self._keep, fetched, record.url)
        except BlockedSource as error:
            values = _bad("blocked", error.reason if isinstance(error, Refused) else error.code, error)
        except FetchFailed as error:
            values = _bad("gone" if error.permanent else "failed", error.reason, error)
        except ImageError as error:
            values = _bad("quarantined", error.code, error)
        self.outcomes.append((record.id, {**values, "attempts": record.attempts + 1, "fetched_at": utc_now()}))
        self.moved.set()
        if len(self.outcomes) >= min(RECORD_IMAGES, len(self.held)):
            self.recordable.set()

    def _keep(self, fetched: Fetched, url: str) -> dict[str, Any]:
        """Validate by decoding, then put under the SHA-256; runs in a thread."""
        try:
            values = self._described(fetched)
        except ImageError:
            raise
        except Exception as error:  # a fault of the store must end the run, one with a picture must not
            raise unforeseen(error, url) from error
        # Put outright, not if absent: asking first costs a round trip for every image, and an object that rotted
        # under this key is mended on the way.
        patiently(
            partial(
                self.store.put,
                values["object_key"],
                fetched.data,
                content_type=images.MEDIA_TYPES[values["format"]],
                sha256=values["sha256"],
            ),
            self.stopping,
        )
        return values

    def _described(self, fetched: Fetched) -> dict[str, Any]:
        """What the record says of a stored picture. Raises ImageError when it is none."""
        data = fetched.data
        info, rgb = images.inspect_and_decode(data, max_pixels=self.settings.images.max_pixels, room=self.room.taken)
        sha256 = hashlib.sha256(data).hexdigest()
        return {
            "state": "stored",
            "reason": None,
            "object_key": object_key(sha256, info.format),
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

    async def _recorder(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(RECORD_SECONDS):
                    await self.recordable.wait()
            self.recordable.clear()
            await self._record()

    async def _record(self) -> None:
        """Write the outcomes that wait."""
        while group := self.outcomes[: RECORD_IMAGES * 4]:
            await self._in_database(partial(self.catalog.finish, self.worker, group))
            del self.outcomes[: len(group)]
            self.held -= {number for number, _ in group}
            for _, values in group:
                state = str(values["state"])
                setattr(self.report, state, getattr(self.report, state) + 1)
                self.report.bytes += values.get("bytes") or 0
                if state != "stored":
                    self.reasons[str(values["reason"]).partition(":")[0]] += 1
            self.moved.set()

    async def _renewer(self) -> None:
        """Keep the claims of what still waits: a long queue is no dead worker."""
        while True:
            await asyncio.sleep(LEASE_SECONDS / 3)
            with suppress(Unavailable):  # the recorder will say so, if it lasts
                renew = partial(self.catalog.renew, self.worker, sorted(self.held), lease_seconds=LEASE_SECONDS)
                await asyncio.get_running_loop().run_in_executor(self.database, renew)

    async def _give_back(self) -> None:
        """Record what is finished and undo the other claims, so that the next run need not wait for the lease."""
        if not self.held:
            return
        done = {number for number, _ in self.outcomes}
        rest: list[tuple[int, dict[str, Any]]] = [(each, {"state": "pending"}) for each in sorted(self.held - done)]
        finish = partial(self.catalog.finish, self.worker, [*self.outcomes, *rest])
        try:
            async with asyncio.timeout(GIVE_BACK_SECONDS):
                await asyncio.get_running_loop().run_in_executor(
                    self.database, partial(self.catalog.retried, finish, patience=GIVE_BACK_SECONDS / 2)
                )
        except (Unavailable, TimeoutError):
            self.progress("the database is gone; the claims come back when their lease runs out")

    def _given_up(self) -> int:
        """How many records ended since this run began because worker after worker died with them."""
        return _count(
            self.catalog,
            self.labels,
            ImageRecord.state == "failed",
            ImageRecord.reason.startswith("worker_died:"),
            ImageRecord.updated_at >= self.began,
        )

    async def _in_database(self, work: Callable[[], T]) -> T:
        """Do `work` in a thread, again for a while if the database is away; not any more once the run is stopping."""

        def unless_stopping() -> T:
            if self.stopping.is_set():
                raise Unavailable("The run is ending.")
            return work()

        return await asyncio.get_running_loop().run_in_executor(
            self.database, partial(self.catalog.retried, unless_stopping, patience=PATIENCE)
        )

    # --- what people see --------------------------------------------------------------------------------------------

    async def _ticker(self, fetcher: Fetcher) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            self.progress(self._line(fetcher))
            self.report.seconds = round(time.monotonic() - self.started, 3)
            self.metrics.write(self.report, in_flight=fetcher.in_flight)

    def _line(self, fetcher: Fetcher) -> str:
        report, now = self.report, time.monotonic()
        done = sum(getattr(report, state) for state in ("stored", *BAD))
        self.recent.append((now, done))
        while len(self.recent) > 2 and now - self.recent[1][0] >= RATE_SECONDS:
            self.recent.popleft()
        since, before = self.recent[0]
        rate = (done - before) / max(now - since, 1e-9)
        total = max(self.total, done)  # more may have been added since
        left = f"about {(total - done) / rate:,.0f} s left" if rate else "nothing finished of late"
        bad = "".join(f", {getattr(report, state):,} {state}" for state in BAD if getattr(report, state))
        waiting = f", {fetcher.waiting:,} waiting for their host" if fetcher.waiting else ""
        if self.others:
            waiting += f", waiting for {self.others:,} that other runs have claimed"
        return f"{done:,} of {total:,} images, {report.stored:,} stored{bad}{waiting}, {rate:,.1f}/s, {left}"

    def _finished(self) -> IngestReport:
        report = self.report
        bad = sum(getattr(report, state) for state in BAD)
        given_up = report.worker_died
        died = f" {given_up:,} failed as worker_died: one run after the other died with them." if given_up else ""
        if report.claimed == 0:
            report.message = f"Nothing new: no image record is pending.{died}"
            return report
        why = ", ".join(f"{count} {reason}" for reason, count in report.reasons.items())
        report.message = (
            f"{report.stored} of {report.claimed} images stored in {report.seconds:.1f} s"
            + (f"; {bad} not usable ({why})" if bad else "")
            + f".{died}"
        )
        if bad / report.claimed > self.settings.data.max_bad_ratio:
            raise DataError(
                f"{bad} of {report.claimed} images could not be used ({why}); at most "
                f"{self.settings.data.max_bad_ratio:.0%} may fail.{died} All outcomes are recorded.",
                hint="Look at `lawnwatch catalog status`; `lawnwatch catalog retry` fetches them again, "
                "LAWNWATCH_DATA__MAX_BAD_RATIO allows more.",
            )
        return report


def _hand_back_memory() -> None:
    """What is larger than a small photo goes back to the system at once; elsewhere than glibc: nothing.

    Left alone, the heap of each thread keeps what its largest picture took.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


class Room:
    """What threads share by size, first come, first served, so that small ones cannot starve a large one.

    Args:
        size: what there is in all; who wants more than that gets all of it.
    """

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._line: deque[object] = deque()
        self._moved = threading.Condition()

    @contextmanager
    def taken(self, wanted: int) -> Iterator[None]:
        """Wait until there is room, and have it until the block ends."""
        wanted, me = min(wanted, self._size), object()
        with self._moved:
            self._line.append(me)
            self._moved.wait_for(lambda: self._line[0] is me and wanted <= self._free)
            self._line.popleft()
            self._free -= wanted
            self._moved.notify_all()  # there may be room for the next one too
        try:
            yield
        finally:
            with self._moved:
                self._free += wanted
                self._moved.notify_all()


def object_key(sha256: str, format_: str) -> str:
    """Where a picture of these bytes lies in the store."""
    return f"images/{sha256[:2]}/{sha256}.{images.EXTENSIONS[format_]}"


def patiently(work: Callable[[], T], stopping: threading.Event) -> T:
    """Do `work` on the store, again for PATIENCE seconds while the store is away; blocks, so it belongs in a thread.

    Raises:
        Unavailable: the store stayed away, or `stopping` was set.
    """
    end: float | None = None
    for attempt in range(1000):
        try:
            return work()
        except Unavailable as error:
            end = end or time.monotonic() + PATIENCE
            pause = random.uniform(0.1, min(0.2 * 2 ** min(attempt, 10), 5.0))  # noqa: S311
            if time.monotonic() + pause > end:
                raise
            if attempt == 0:
                logger.warning("the store is away, trying again", seconds=PATIENCE, fault=error.message)
            if stopping.wait(pause):
                raise
    raise AssertionError("unreachable: the patience ends first")


def _bad(state: str, reason: str, error: LawnwatchError) -> dict[str, Any]:
    return {"state": state, "reason": f"{reason}: {error.message}"[:500]}


def first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that ended a task group; those after it are its consequences."""
    found: BaseException = errors
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


# --- metrics --------------------------------------------------------------------------------------------------------


class IngestMetrics:
    """The run's figures for Prometheus' textfile collector.

    The collector refuses a series that another file has, so each of the runs side by side has a file and a label of
    its own. Their places are numbered and used again by later runs: the label's values stay few.

    Args:
        folder: where `lawnwatch_ingest.prom` is written, or the first `lawnwatch_ingest_N.prom` that no run at work
            writes; None: nowhere.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file: Path | None = None
        self._lock: int | None = None
        self._slot = "0"
        if folder is not None:
            try:
                self._take(folder)
            except OSError as error:
                logger.warning("the metrics cannot be written", fault=error.strerror)
        self._registry = CollectorRegistry()
        self._fetch_seconds = Histogram(
            "lawnwatch_ingest_fetch_seconds",
            "Time with the source of each fetched image, waiting for its turn not included.",
            labelnames=["slot"],
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=self._registry,
        ).labels(self._slot)
        self._report = IngestReport()
        self._in_flight = 0
        self._registry.register(self)

    def _take(self, folder: Path) -> None:
        """The first place that is free; the kernel frees that of a run that was killed."""
        folder.mkdir(parents=True, exist_ok=True)
        for slot in itertools.count():
            # Beside the file, which is replaced at every write; the collector passes by all but *.prom.
            lock = os.open(folder / f".lawnwatch_ingest_{slot}.lock", os.O_RDONLY | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(lock)
                if isinstance(error, BlockingIOError):
                    continue
                raise
            self._file = folder / f"lawnwatch_ingest{f'_{slot}' if slot else ''}.prom"
            self._lock, self._slot = lock, str(slot)
            return

    def close(self) -> None:
        """Leave the place, and the last figures in it, to the next run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def fetched(self, fetched: Fetched) -> None:
        self._fetch_seconds.observe(fetched.seconds)

    def write(self, report: IngestReport, *, in_flight: int) -> None:
        """Replace the file by the figures as they are now; a full disk here is no reason to stop fetching."""
        self._report, self._in_flight = report, in_flight
        if self._file is None:
            return
        try:
            write_to_textfile(str(self._file), self._registry)
        except OSError as error:
            logger.warning("the metrics cannot be written", fault=error.strerror)

    def collect(self) -> Iterator[Metric]:
        """What Prometheus calls: the report's own counts, so that both always agree."""
        images_ = CounterMetricFamily(
            "lawnwatch_ingest_images", "Images by what became of them.", labels=["outcome", "slot"]
        )
        for state in ("stored", *BAD):
            images_.add_metric([state, self._slot], getattr(self._report, state))
        yield images_
        bytes_ = CounterMetricFamily("lawnwatch_ingest_bytes", "Bytes of the images stored.", labels=["slot"])
        bytes_.add_metric([self._slot], self._report.bytes)
        yield bytes_
        for name, meaning, value in (
            ("in_flight", "Images being fetched or put now.", self._in_flight),
            ("duration_seconds", "Time since the run began.", self._report.seconds),
        ):
            gauge = GaugeMetricFamily(f"lawnwatch_ingest_{name}", meaning, labels=["slot"])
            gauge.add_metric([self._slot], value)
            yield gauge
