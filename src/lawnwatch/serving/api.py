"""What the routes share: the settings, the model, the places, the threads, the records."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client.core import Metric
from starlette.requests import Request
from starlette.responses import Response

from lawnwatch import images, keys, log, predictions
from lawnwatch.config import Settings
from lawnwatch.serving.admission import Admission, Draining
from lawnwatch.serving.clients import KeyRing
from lawnwatch.serving.metrics import Metrics, counter, gauge
from lawnwatch.serving.predictor import UNKNOWN_LABEL, Predictor
from lawnwatch.serving.turns import FairPool
from lawnwatch.serving.watcher import ModelWatcher
from lawnwatch.store import ObjectStore, open_store

# SQLAlchemy and the tables are imported when a record is written or read: they take a quarter of the time to the first
# answer, which needs neither.
if TYPE_CHECKING:
    from lawnwatch.database import Database

logger = log.get(__name__)

CROWD = 4  # pictures that wait, for each thread
UNCERTAIN_BELOW = 0.8  # answers less confident than this are kept with their picture under `uncertain`


class Api:
    """The service behind the routes; nothing is loaded before `start`."""

    def __init__(self, settings: Settings, watcher: ModelWatcher | None = None) -> None:
        self.settings = settings
        self.metrics = Metrics()
        serving = settings.serving
        self.admission = Admission(
            threads=serving.threads,
            places=serving.threads + serving.queue,
            max_wait=serving.max_wait,
            metrics=self.metrics,
        )
        self._databases: tuple[Database, Database] | None = None  # for questions, for our own threads
        self._opening = threading.Lock()
        self._migrated = False
        self._store: ObjectStore | None = None
        self.watcher = watcher or ModelWatcher(settings, lambda: open_store(settings))
        self.ring = KeyRing(self._read_keys) if serving.require_keys else None
        self.pool = FairPool(serving.threads)
        self.direct: dict[str, Callable[[Request], Awaitable[Response]]] = {}  # routes that admission calls itself
        self.writer: predictions.PredictionWriter | None = None
        self.metrics.observe(self._families)

    def start(self) -> None:
        """Begin to follow the release target and to write records."""
        self.watcher.start()
        if self.ring is not None:
            self.ring.start()
        self.writer = predictions.PredictionWriter(
            self._insert,
            lambda: open_store(self.settings),
            capacity=self.settings.serving.record_queue,
        )

    def stop(self) -> None:
        """After the last request: stop following, write what is queued."""
        self.drain()
        self.watcher.stop()
        if self.ring is not None:
            self.ring.stop()
        self.pool.shutdown(wait=False, cancel_futures=True)  # nobody waits for what it still works on
        if self.writer is not None and not self.writer.close():
            logger.error("predictions were not all written", drops=dict(self.writer.drops))

    def drain(self) -> None:
        """Not ready from now on, so that balancers send no more; what they send until they know is answered."""
        self.admission.draining = True

    @property
    def database(self) -> Database:
        """The database for the questions of clients; its tables are up to date. Raises Unavailable."""
        return self._opened()[0]

    def _opened(self) -> tuple[Database, Database]:
        """Two pools of connections, opened at first use: questions that wait for a slow answer may hold all of one, and
        records and keys must not wait for them.
        """
        with self._opening:
            if self._databases is None:
                from lawnwatch.database import Database

                self._databases = Database(self.settings), Database(self.settings)
        if not self._migrated:  # outside the lock: many may wait for a database that does not answer
            self._databases[1].migrate()
            self._migrated = True
        return self._databases

    def _insert(self, rows: Sequence[dict[str, Any]]) -> None:
        from lawnwatch import history

        history.insert(self._opened()[1], rows)

    def _read_keys(self) -> list[keys.Key]:
        from lawnwatch import key_table

        return key_table.list_keys(self._opened()[1])

    @property
    def store(self) -> ObjectStore:
        """The store, opened at first use. Raises Unavailable."""
        if self._store is None:
            self._store = open_store(self.settings)
        return self._store

    def crowded(self) -> bool:
        """So many pictures wait that no thread runs out of them within a few turns of the event loop."""
        return self.pool.waiting > CROWD * self.settings.serving.threads

    def admissible(self) -> Predictor:
        """The model that serves. Raises NoModel."""
        return self.watcher.require()

    def welcome(self) -> Predictor:
        """The model that serves, unless the process is ending. Raises Draining, NoModel."""
        if self.admission.draining:
            raise Draining("This server is ending.", hint="Send requests to another.")
        return self.watcher.require()

    def record(self, prediction: predictions.Prediction, picture: bytes | None) -> None:
        """Hand an answer to the writer, with its picture when the policy keeps it."""
        if self.writer is not None:
            self.writer.record(
                prediction,
                picture if self._keeps(prediction) else None,
                media_type=media_type(prediction.image_format),
            )

    def _keeps(self, prediction: predictions.Prediction) -> bool:
        policy = self.settings.serving.record_images
        if policy == "uncertain":
            return prediction.label == UNKNOWN_LABEL or prediction.confidence < UNCERTAIN_BELOW
        if policy == "sampled":
            # The end of an id is random: no further dice, and anybody can tell afterwards what had to be kept.
            return int(prediction.prediction_id[-8:], 16) < self.settings.serving.record_sample * 2**32
        return policy == "all"

    def _families(self) -> Iterable[Metric]:
        watcher, admission, writer = self.watcher, self.admission, self.writer
        loaded = watcher.current
        yield gauge("lawnwatch_places_taken", "Predictions under way or waiting.", admission.taken)
        yield gauge("lawnwatch_predict_queue", "Pictures that wait for a thread.", self.pool.waiting)
        yield gauge("lawnwatch_places", "Predictions that may be under way or wait.", admission.limit)
        yield gauge("lawnwatch_slow_senders", "Bodies that take their time.", admission.slow)
        yield gauge("lawnwatch_body_held_bytes", "Bodies in memory.", admission.held)
        yield gauge("lawnwatch_draining", "1 while the process is ending.", float(admission.draining))
        yield gauge("lawnwatch_model_ready", "1 when a verified model serves.", float(loaded is not None))
        yield gauge("lawnwatch_store_up", "1 when the store answered last.", float(watcher.store_reachable))
        yield counter("lawnwatch_model_rejections", "Bundles refused at load.", watcher.rejections)
        yield gauge("lawnwatch_model_rejected", "1 while the target is refused.", float(watcher.rejected is not None))
        if loaded is not None:
            model = loaded.predictor
            yield gauge(
                "lawnwatch_model_info",
                "The model that serves.",
                1,
                {"name": model.manifest.model_name, "version": str(model.version), "sha256": model.sha256},
            )
            yield gauge("lawnwatch_model_load_seconds", "Time to load and prove it.", loaded.load_seconds)
            yield gauge(
                "lawnwatch_model_golden_error_ratio",
                "Largest golden difference here.",
                model.golden.max_error,
            )
        if self.ring is not None:
            yield gauge("lawnwatch_api_keys", "Good API keys in memory.", self.ring.known)
        if writer is not None:
            yield gauge("lawnwatch_record_queue", "Records that wait to be written.", writer.depth)
            yield counter("lawnwatch_records_written", "Records written.", writer.written)
            yield counter(
                "lawnwatch_records_dropped",
                "Records or pictures not kept.",
                {str(reason): count for reason, count in writer.drops.items()},
                "reason",
            )


def named(model: Predictor) -> dict[str, Any]:
    """Which model answered, as every answer says it."""
    return {"name": model.manifest.model_name, "version": model.version, "sha256": model.sha256}


def media_type(image_format: str) -> str:
    """The media type of a picture that was kept."""
    return images.MEDIA_TYPES.get(image_format, "application/octet-stream")
