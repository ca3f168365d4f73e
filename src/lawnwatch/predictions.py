"""What was answered: prediction records, and the writer that never blocks a request.

A prediction's id is a UUID of version 7: its text sorts by time, so that paging needs no offset and no second
column. `history` has the table.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from lawnwatch import log
from lawnwatch.errors import Conflict, LawnwatchError, Unavailable
from lawnwatch.ids import random_bytes
from lawnwatch.store import ObjectStore

logger = log.get(__name__)

BATCH = 100  # rows of one INSERT
LINGER = 0.5  # seconds that the first row of a batch waits for company: a transaction costs as much as 20 rows
PAGE = 200  # most records of one page
STORE_PAUSE = 30.0  # seconds without a picture after one could not be put: records do not wait for a store that is down
STORE_PATIENCE = 10.0  # seconds that a batch of records waits for its pictures
QUEUED_IMAGE_BYTES = 8_000_000  # pictures waiting for the store, or one that is larger; beyond it records go without

DropReason = Literal["queue_full", "database", "closing", "image_queue_full", "image_store"]
DROP_REASONS: tuple[DropReason, ...] = (
    "queue_full",
    "database",
    "closing",
    "image_queue_full",
    "image_store",
)

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
    tail = (int.from_bytes(random_bytes(8)) >> 2) | (2 << 62)
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


class PredictionWriter:
    """A bounded queue and one thread that writes it to the database, pictures to the store.

    `record` never blocks and never raises; what cannot be kept is counted in `drops`. While the database is
    down the newest batch is held and tried again, the queue fills behind it, and requests go on being
    answered. While the store is down records are written without their pictures.

    Args:
        insert: writes rows of `predictions` in one transaction. Raises Unavailable while the database is away,
            another LawnwatchError when it refuses them.
        open_store: opens the store, in the writer's thread and again as long as it fails.
        capacity: predictions that may wait.
    """

    def __init__(
        self,
        insert: Callable[[Sequence[dict[str, Any]]], None],
        open_store: Callable[[], ObjectStore],
        *,
        capacity: int,
    ) -> None:
        self._insert = insert
        self._open_store = open_store
        self._store: ObjectStore | None = None
        self._hung: _Upload | None = None
        self._store_rests_until = 0.0
        self._queue: queue.Queue[tuple[Prediction, bytes | None, str]] = queue.Queue(capacity)
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._image_bytes = 0
        self._deadline = self._pictures_deadline = float("inf")
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
                fits = not self._image_bytes or self._image_bytes + len(image) <= QUEUED_IMAGE_BYTES
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
        now = time.monotonic()
        self._deadline, self._pictures_deadline = now + timeout, now + timeout / 2
        self._closing.set()
        self._thread.join(timeout + 1.0)
        return not self._thread.is_alive() and self._queue.empty() and not self.drops["closing"]

    def _run(self) -> None:
        while not (self._closing.is_set() and self._queue.empty()):
            batch = self._next_batch()
            if batch:
                self._write(self._rows(batch))

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

    def _rows(self, batch: Sequence[tuple[Prediction, bytes | None, str]]) -> list[dict[str, Any]]:
        """The rows of a batch, each naming its picture when the store has it."""
        pictures = {
            _picture_key(prediction): (image, media_type)
            for prediction, image, media_type in batch
            if image is not None
        }
        kept = self._kept(pictures) if pictures else set()
        rows = []
        for prediction, image, _ in batch:
            row = prediction.as_row()
            if image is not None:
                if (key := _picture_key(prediction)) in kept:
                    row["image_key"] = key
                else:
                    self._drop("image_store")
                self._release(image)
            rows.append(row)
        return rows

    def _kept(self, pictures: Mapping[str, tuple[bytes, str]]) -> set[str]:
        """Put pictures into the store; the keys of those that were put in time."""
        if time.monotonic() < self._store_rests_until or (self._hung is not None and self._hung.is_alive()):
            return set()
        upload = _Upload(self._opened_store, pictures)
        upload.start()
        patience = time.monotonic() + STORE_PATIENCE
        while upload.is_alive() and time.monotonic() < min(patience, self._pictures_deadline):
            upload.join(0.05)  # looks again, because `close` brings the deadline forward
        kept = upload.give_up()
        self._hung = upload if upload.is_alive() else None  # one that is over would keep its pictures in memory
        if upload.failed:
            self._store_rests_until = time.monotonic() + STORE_PAUSE
        if len(kept) < len(pictures):
            logger.warning("pictures not kept", count=len(pictures) - len(kept))
        return kept

    def _opened_store(self) -> ObjectStore:
        if self._store is None:
            self._store = self._open_store()
        return self._store

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Insert the rows; wait for a database that is down, and drop only what it refuses."""
        pause = 0.1
        while True:
            try:
                self._insert(rows)
                self.written += len(rows)
                return
            except Unavailable as error:
                if time.monotonic() + pause > self._deadline:
                    self._drop("closing", len(rows))
                    logger.error("predictions lost at the end", count=len(rows), error=str(error))
                    self._forget_pictures(rows)
                    return
                logger.warning("predictions wait for the database", count=len(rows), error=str(error))
                time.sleep(pause)
                pause = min(pause * 2, 1.0)
            except Exception as error:  # refused, or a fault of ours: the thread must outlive it
                if len(rows) == 1:
                    self._drop("database")
                    logger.error(
                        "prediction refused by the database",
                        id=rows[0]["id"],
                        error=str(error),
                        exc_info=not isinstance(error, LawnwatchError),
                    )
                    if not isinstance(error, Conflict):  # else the record is there already, and names the picture
                        self._forget_pictures(rows)
                    return
                for row in rows:  # one bad row must not take its batch with it
                    self._write([row])
                return

    def _forget_pictures(self, rows: Sequence[dict[str, Any]]) -> None:
        """Delete the pictures of rows that are dropped: nothing names them, so nothing could ever find them again."""
        for row in rows:
            if row["image_key"] is not None:
                _delete(self._opened_store, row["image_key"])

    def _release(self, image: bytes | None) -> None:
        if image is not None:
            with self._lock:
                self._image_bytes -= len(image)

    def _drop(self, reason: DropReason, count: int = 1) -> None:
        with self._lock:
            self.drops[reason] += count


class _Upload(threading.Thread):
    """Pictures on their way into the store, in a thread of their own: a put that hangs for a minute holds up no record.

    Ends at the first that fails. What is put after `give_up` is deleted, because no record will name it.
    """

    def __init__(self, open_store: Callable[[], ObjectStore], pictures: Mapping[str, tuple[bytes, str]]) -> None:
        super().__init__(name="picture-upload", daemon=True)
        self._open_store = open_store
        self._pictures = pictures
        self._lock = threading.Lock()
        self._given_up = False
        self._kept: set[str] = set()
        self.failed = False

    def run(self) -> None:
        for key, (image, media_type) in self._pictures.items():
            try:
                self._open_store().put(key, image, content_type=media_type)
            except Exception as error:  # whatever it is, the records go without their pictures
                self.failed = True
                logger.warning(
                    "picture not put", key=key, error=str(error), exc_info=not isinstance(error, LawnwatchError)
                )
                return
            with self._lock:
                if not self._given_up:
                    self._kept.add(key)
                    continue
            _delete(self._open_store, key)
            return

    def give_up(self) -> set[str]:
        """The keys of the pictures that were put; there will be no more."""
        with self._lock:
            self._given_up = True
            return self._kept


def _delete(open_store: Callable[[], ObjectStore], key: str) -> None:
    try:
        open_store().delete(key)
    except Exception as error:  # best effort: the store may be down
        logger.warning("picture not deleted", key=key, error=str(error), exc_info=not isinstance(error, LawnwatchError))


def _picture_key(prediction: Prediction) -> str:
    return f"predictions/{prediction.created_at:%Y-%m-%d}/{prediction.prediction_id}"
