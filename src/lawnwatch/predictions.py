"""What was answered: prediction records, the writer that never blocks a request, and the queries.

A prediction's id is a UUID of version 7: its text sorts by time, so that paging needs no offset and no second
column.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from sqlalchemy import (
    CHAR,
    JSON,
    BigInteger,
    Float,
    Index,
    Integer,
    LargeBinary,
    String,
    delete,
    insert,
    inspect,
    select,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Mapped, defer, mapped_column

from lawnwatch import log
from lawnwatch.catalog import Base, Catalog, UtcDateTime
from lawnwatch.errors import InputError, LawnwatchError, NotFound, Unavailable
from lawnwatch.store import ObjectStore

logger = log.get(__name__)

BATCH = 100  # rows of one INSERT
LINGER = 0.5  # seconds that the first row of a batch waits for company: a transaction costs as much as 20 rows
QUEUED_IMAGE_BYTES = 16_000_000  # pictures waiting for the store; beyond it a record goes without its picture
PAGE = 200  # most records of one page
SLACK = timedelta(minutes=5)  # between the time in an id and the record's own: ids never go back, clocks do
PRUNED = 500  # records deleted in one transaction

DropReason = Literal["queue_full", "database", "closing", "image_queue_full", "image_store"]
DROP_REASONS: tuple[DropReason, ...] = (
    "queue_full",
    "database",
    "closing",
    "image_queue_full",
    "image_store",
)


class PredictionRow(Base):
    """One answer of the API."""

    __tablename__ = "predictions"
    __table_args__ = (
        Index("ix_predictions_label_id", "label", "id"),
        Index("ix_predictions_client_id", "client", "id"),
        Index("ix_predictions_model_version_id", "model_version", "id"),
    )

    id: Mapped[str] = mapped_column(CHAR(36), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    request_id: Mapped[str] = mapped_column(String(64))
    client: Mapped[str | None] = mapped_column(CHAR(16))
    label: Mapped[str] = mapped_column(String(190))
    confidence: Mapped[float] = mapped_column(Float(53))
    probabilities: Mapped[dict[str, float]] = mapped_column(JSON)
    unknown_score: Mapped[float | None] = mapped_column(Float(53))
    model_name: Mapped[str] = mapped_column(String(190))
    model_version: Mapped[int] = mapped_column(Integer)
    bundle_sha256: Mapped[str] = mapped_column(CHAR(64))
    image_format: Mapped[str] = mapped_column(String(8))
    image_width: Mapped[int] = mapped_column(Integer)
    image_height: Mapped[int] = mapped_column(Integer)
    image_bytes: Mapped[int] = mapped_column(BigInteger)
    image_key: Mapped[str | None] = mapped_column(String(255))
    brightness: Mapped[float | None] = mapped_column(Float(53))
    sharpness: Mapped[float | None] = mapped_column(Float(53))
    embedding: Mapped[bytes | None] = mapped_column(LargeBinary(8192))
    total_ms: Mapped[float] = mapped_column(Float(53))


_clock = threading.Lock()
_last_milliseconds = 0
_sequence = 0


def new_id() -> str:
    """A UUID of version 7 whose text is greater than that of every id this process made before."""
    global _last_milliseconds, _sequence
    with _clock:
        now = time.time_ns() // 1_000_000
        if now > _last_milliseconds:
            _last_milliseconds, _sequence = now, 0
        else:  # the same millisecond, or a clock that was set back
            _sequence += 1
            if _sequence == 1 << 12:
                _last_milliseconds, _sequence = _last_milliseconds + 1, 0
        head = (_last_milliseconds << 16) | (7 << 12) | _sequence
    tail = (int.from_bytes(os.urandom(8), "big") >> 2) | (2 << 62)
    return str(uuid.UUID(int=(head << 64) | tail))


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer, as it is recorded.

    Attributes:
        client: id of the API key that asked; None when keys are not required: no address is ever kept.
        embedding: 1280 little-endian float16, as bytes.
        image_key: where the store holds the picture; None when it was not kept.
        sharpness: variance of the Laplacian at the model's input size.
    """

    prediction_id: str
    created_at: datetime
    label: str
    confidence: float
    probabilities: Mapping[str, float]
    unknown_score: float | None
    model_name: str
    model_version: int
    bundle_sha256: str
    image_format: str
    image_width: int
    image_height: int
    image_bytes: int
    total_ms: float
    request_id: str = ""
    client: str | None = None
    brightness: float | None = None
    sharpness: float | None = None
    embedding: bytes | None = None
    image_key: str | None = None

    def as_row(self) -> dict[str, Any]:
        """The values of one row of `predictions`."""
        values = {name: getattr(self, name) for name in self.__slots__}
        values["id"] = values.pop("prediction_id")
        values["probabilities"] = dict(self.probabilities)
        return values


@dataclass(frozen=True)
class PredictionPage:
    """Predictions, newest first; `next` is what `before` must be for the page after, None at the end."""

    items: list[Prediction]
    next: str | None


# --- writing ------------------------------------------------------------------------------------------------


class PredictionWriter:
    """A bounded queue and one thread that writes it to the database, pictures to the store.

    `record` never blocks and never raises; what cannot be kept is counted in `drops`. While the database is
    down the newest batch is held and tried again, the queue fills behind it, and requests go on being
    answered.

    Args:
        catalog: the database.
        open_store: opens the store, in the writer's thread and again as long as it fails.
        capacity: predictions that may wait.
        migrate: bring the database's tables up to date before the first write.
    """

    def __init__(
        self,
        catalog: Catalog,
        open_store: Callable[[], ObjectStore],
        *,
        capacity: int,
        migrate: bool = False,
    ) -> None:
        self._catalog = catalog
        self._open_store = open_store
        self._store: ObjectStore | None = None
        self._migrate = migrate
        self._queue: queue.Queue[tuple[Prediction, bytes | None, str]] = queue.Queue(capacity)
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._image_bytes = 0
        self._deadline = float("inf")
        self.written = 0
        self.drops: dict[DropReason, int] = dict.fromkeys(DROP_REASONS, 0)
        self._thread = threading.Thread(target=self._run, name="prediction-writer", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """Predictions that wait to be written."""
        return self._queue.qsize()

    def record(self, prediction: Prediction, image: bytes | None = None, *, media_type: str = "") -> bool:
        """Queue a prediction, with its picture when that is to be kept; False when it was dropped."""
        if self._closing.is_set():
            self._drop("closing")
            return False
        if image is not None:
            with self._lock:
                fits = self._image_bytes + len(image) <= QUEUED_IMAGE_BYTES
                self._image_bytes += len(image) if fits else 0
            if not fits:
                self._drop("image_queue_full")
                image = None
        try:
            self._queue.put_nowait((prediction, image, media_type))
        except queue.Full:
            self._release(image)
            self._drop("queue_full")
            return False
        return True

    def close(self, timeout: float = 10.0) -> bool:
        """Write what is queued and stop; True when everything was written within `timeout` seconds."""
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        self._thread.join(timeout + 1.0)
        return not self._thread.is_alive() and self._queue.empty() and not self.drops["closing"]

    def _run(self) -> None:
        self._prepare()
        while not (self._closing.is_set() and self._queue.empty()):
            batch = self._next_batch()
            if batch:
                self._write([self._keep_image(*entry) for entry in batch])

    def _prepare(self) -> None:
        """Bring the tables up to date early, so that the first `GET /predictions` finds them."""
        if self._migrate:
            try:
                self._catalog.migrate()
                self._migrate = False
            except (LawnwatchError, SQLAlchemyError) as error:
                logger.warning("the database is not ready; tried again with the first record", error=str(error))

    def _next_batch(self) -> list[tuple[Prediction, bytes | None, str]]:
        try:
            batch = [self._queue.get(timeout=0.2)]
        except queue.Empty:
            return []
        self._closing.wait(LINGER)
        while len(batch) < BATCH:
            try:
                batch.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return batch

    def _keep_image(self, prediction: Prediction, image: bytes | None, media_type: str) -> dict[str, Any]:
        row = prediction.as_row()
        if image is None:
            return row
        key = f"predictions/{prediction.created_at:%Y-%m-%d}/{prediction.prediction_id}"
        try:
            if time.monotonic() > self._deadline:
                raise Unavailable("The process is ending.")
            if self._store is None:
                self._store = self._open_store()
            self._store.put(key, image, content_type=media_type)
            row["image_key"] = key
        except (LawnwatchError, OSError) as error:
            self._drop("image_store")
            logger.warning("picture not kept", prediction_id=prediction.prediction_id, error=str(error))
        finally:
            self._release(image)
        return row

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Insert the rows; wait for a database that is down, and drop only what it refuses."""
        pause = 0.1
        while True:
            try:
                if self._migrate:
                    self._catalog.migrate()
                    self._migrate = False
                with self._catalog.session() as session:
                    session.execute(insert(PredictionRow), list(rows))
                self.written += len(rows)
                return
            except Unavailable as error:
                if time.monotonic() + pause > self._deadline:
                    self._drop("closing", len(rows))
                    logger.error("predictions lost at the end", count=len(rows), error=str(error))
                    return
                logger.warning("predictions wait for the database", count=len(rows), error=str(error))
                time.sleep(pause)
                pause = min(pause * 2, 1.0)
            except (LawnwatchError, SQLAlchemyError) as error:
                if len(rows) == 1:
                    self._drop("database")
                    logger.error("prediction refused by the database", id=rows[0]["id"], error=str(error))
                    return
                for row in rows:  # one bad row must not take its batch with it
                    self._write([row])
                return

    def _release(self, image: bytes | None) -> None:
        if image is not None:
            with self._lock:
                self._image_bytes -= len(image)

    def _drop(self, reason: DropReason, count: int = 1) -> None:
        with self._lock:
            self.drops[reason] += count


# --- reading ------------------------------------------------------------------------------------------------


def list_predictions(
    catalog: Catalog,
    *,
    limit: int = 50,
    before: str | None = None,
    label: str | None = None,
    version: int | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    min_confidence: float | None = None,
    max_confidence: float | None = None,
    client: str | None = None,
) -> PredictionPage:
    """Predictions, newest first, without their embeddings.

    Args:
        limit: 1 … 200.
        before: only predictions older than this id.
        label, version, client: only those with this label, model version, API key.
        since, until: only those made at or after, and before, these moments; UTC unless they say otherwise.
        min_confidence, max_confidence: only those at least, and at most, so confident.

    Raises:
        InputError: `limit` is out of range or `before` is no prediction id.
        Unavailable: the database does not answer.
    """
    if not 1 <= limit <= PAGE:
        raise InputError(f"limit must be 1 to {PAGE}; received {limit}.")
    query = select(PredictionRow).options(defer(PredictionRow.embedding)).order_by(PredictionRow.id.desc())
    if before is not None:
        query = query.where(PredictionRow.id < _checked(before))
    if since is not None:
        since = _utc(since)
        query = query.where(PredictionRow.id >= _first_id(since, -SLACK), PredictionRow.created_at >= since)
    if until is not None:
        until = _utc(until)
        query = query.where(PredictionRow.id < _first_id(until, SLACK), PredictionRow.created_at < until)
    for column, wanted in (
        (PredictionRow.label, label),
        (PredictionRow.model_version, version),
        (PredictionRow.client, client),
    ):
        if wanted is not None:
            query = query.where(column == wanted)
    if min_confidence is not None:
        query = query.where(PredictionRow.confidence >= min_confidence)
    if max_confidence is not None:
        query = query.where(PredictionRow.confidence <= max_confidence)
    with catalog.session() as session:
        items = [_prediction(row) for row in session.scalars(query.limit(limit + 1))]
    more = len(items) > limit
    return PredictionPage(items[:limit], items[limit - 1].prediction_id if more else None)


def get_prediction(catalog: Catalog, prediction_id: str) -> Prediction:
    """One prediction.

    Raises:
        InputError: not a prediction id.
        NotFound: no prediction has this id (or it is still being written).
        Unavailable: the database does not answer.
    """
    with catalog.session() as session:
        row = session.get(PredictionRow, _checked(prediction_id))
        if row is None:
            raise NotFound(f"No prediction {prediction_id}.", hint="GET /predictions lists them.")
        return _prediction(row)


def _checked(prediction_id: str) -> str:
    try:
        return str(uuid.UUID(prediction_id))
    except ValueError:
        raise InputError(
            f"{prediction_id[:60]!r} is not a prediction id.",
            hint="An id looks like 0198f2a4-7c1e-7b3a-9c55-3f0d1f2e4a6b.",
        ) from None


def _utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except OverflowError:
        raise InputError(f"{moment.isoformat()} is before or after all that a calendar knows.") from None


def _first_id(moment: datetime, shift: timedelta) -> str:
    """The least id of a moment: ids begin with their time, so the primary key finds a span without an index more."""
    return str(uuid.UUID(int=max(0, int((moment.timestamp() + shift.total_seconds()) * 1000)) << 80))


def _prediction(row: PredictionRow) -> Prediction:
    unloaded = inspect(row).unloaded
    values: dict[str, Any] = {
        name: None if name in unloaded else getattr(row, name)
        for name in Prediction.__slots__
        if name != "prediction_id"
    }
    created = values["created_at"]
    values["created_at"] = created if created.tzinfo else created.replace(tzinfo=UTC)
    return Prediction(prediction_id=row.id, **values)


# --- forgetting ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pruned:
    """What was deleted."""

    records: int
    pictures: int
    before: datetime | None
    message: str


def prune(
    catalog: Catalog, store: ObjectStore, *, days: int, progress: Callable[[str], None] = lambda _: None
) -> Pruned:
    """Delete the predictions older than `days`, each picture before the record that names it: a picture that nothing
    names could never be found again. Killed midway, it goes on where it stopped.

    Args:
        days: 0 keeps everything.

    Raises:
        InputError: `days` is negative.
        Unavailable: the database or the store does not answer.
    """
    if days < 0:
        raise InputError(f"days must be 0 or more; received {days}.")
    if days == 0:
        return Pruned(0, 0, None, "Predictions are kept for ever (LAWNWATCH_SERVING__RETENTION_DAYS is 0).")
    before = datetime.now(UTC) - timedelta(days=days)
    old = (
        select(PredictionRow.id, PredictionRow.image_key)
        .where(PredictionRow.created_at < before)
        .order_by(PredictionRow.created_at)
        .limit(PRUNED)
    )
    records = pictures = 0
    while True:
        with catalog.session() as session:
            batch = session.execute(old).all()
        if not batch:
            break
        for _, key in batch:
            if key is not None:
                store.delete(key)
                pictures += 1
        with catalog.session() as session:
            session.execute(delete(PredictionRow).where(PredictionRow.id.in_([identity for identity, _ in batch])))
        records += len(batch)
        progress(f"{records} predictions deleted")
    return Pruned(
        records,
        pictures,
        before,
        f"Deleted {records} predictions older than {days} days, {pictures} pictures with them.",
    )
