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
from lawnwatch.errors import LawnwatchError, Unavailable
from lawnwatch.ids import random_bytes
from lawnwatch.store import ObjectStore

logger = log.get(__name__)

BATCH = 100  # rows of one INSERT
LINGER = 0.5  # seconds that the first row of a batch waits for company: a transaction costs as much as 20 rows
PAGE = 200  # most records of one page
QUEUED_IMAGE_BYTES = 16_000_000  # pictures waiting for the store; beyond it a record goes without its picture

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
    answered.

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
        while not (self._closing.is_set() and self._queue.empty()):
            batch = self._next_batch()
            if batch:
                self._write([self._keep_image(*entry) for entry in batch])

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
                self._insert(rows)
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
            except Exception as error:  # refused, or a fault of ours: the thread must outlive it
                if len(rows) == 1:
                    self._drop("database")
                    logger.error(
                        "prediction refused by the database",
                        id=rows[0]["id"],
                        error=str(error),
                        exc_info=not isinstance(error, LawnwatchError),
                    )
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
