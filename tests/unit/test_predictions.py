"""Prediction records: order of ids, the writer that never blocks, paging."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from lawnwatch import history, ids, predictions
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings
from lawnwatch.errors import DataError, InputError, NotFound, Unavailable
from lawnwatch.history import get_prediction, list_predictions
from lawnwatch.predictions import Prediction, PredictionWriter
from lawnwatch.serving import clients
from lawnwatch.serving.api import Api
from lawnwatch.store import LocalStore, ObjectStore, open_store

pytestmark = pytest.mark.unit


@pytest.fixture
def store(settings: Settings) -> ObjectStore:
    return open_store(settings)


class Interrupted(Catalog):
    """A catalog whose database can be away."""

    away = False

    @contextmanager
    def session(self) -> Iterator[Any]:
        if self.away:
            raise Unavailable("The database does not answer.")
        with super().session() as session:
            yield session


def prediction(label: str = "grass", **changes: Any) -> Prediction:
    values: dict[str, Any] = {
        "prediction_id": predictions.new_id(),
        "created_at": datetime.now(UTC),
        "label": label,
        "confidence": 0.9,
        "probabilities": {"dandelion": 0.1, "grass": 0.9},
        "unknown_score": 0.1,
        "model_name": "lawnwatch",
        "model_version": 3,
        "bundle_sha256": "a" * 64,
        "image_format": "JPEG",
        "image_width": 275,
        "image_height": 183,
        "image_bytes": 11_000,
        "total_ms": 7.5,
        "brightness": 0.5,
        "sharpness": 120.0,
        "embedding": b"\x00\x3c" * 1280,
    }
    return Prediction(**(values | changes))


def soon(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)


def test_ids_sort_by_time_even_when_the_clock_stands_or_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [predictions.new_id() for _ in range(10_000)]
    now = time.time_ns()
    monkeypatch.setattr(predictions.time, "time_ns", lambda: now - 10_000_000_000)
    ids += [predictions.new_id() for _ in range(10_000)]
    assert ids == sorted(ids) and len(set(ids)) == len(ids)
    assert {one[14] for one in ids} == {"7"} and {one[19] for one in ids} <= set("89ab")


def test_random_bytes_are_drawn_once_also_after_a_fork() -> None:
    drawn = [ids.random_bytes(16) for _ in range(1000)]
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writing, b"".join(ids.random_bytes(16) for _ in range(100)))
        os._exit(0)
    os.waitpid(child, 0)
    drawn += [ids.random_bytes(16) for _ in range(100)]
    theirs = os.read(reading, 1600)
    drawn += [theirs[at : at + 16] for at in range(0, 1600, 16)]
    assert len(set(drawn)) == 1200 and {len(each) for each in drawn} == {16}


def test_what_was_written_is_what_is_read(catalog: Catalog, store: ObjectStore) -> None:
    writer = PredictionWriter(partial(history.insert, catalog), lambda: store, capacity=10)
    one = prediction()
    assert writer.record(one, b"picture", media_type="image/jpeg")
    assert writer.close()
    read = get_prediction(catalog, one.prediction_id)
    assert read.image_key is not None and store.get(read.image_key) == b"picture"
    assert read.image_key == f"predictions/{one.created_at:%Y-%m-%d}/{one.prediction_id}"
    expected = one.as_row() | {"image_key": read.image_key}
    assert read.as_row() == expected
    assert writer.written == 1 and not any(writer.drops.values())


def test_pages_hold_everything_once_newest_first(catalog: Catalog, store: ObjectStore) -> None:
    made = [prediction("grass" if n % 3 else "dandelion") for n in range(25)]
    writer = PredictionWriter(partial(history.insert, catalog), lambda: store, capacity=100)
    for one in made:
        writer.record(one)
    assert writer.close()
    seen: list[str] = []
    before = None
    while True:
        page = list_predictions(catalog, limit=10, before=before)
        seen += [one.prediction_id for one in page.items]
        if (before := page.next) is None:
            break
    assert seen == [one.prediction_id for one in reversed(made)]
    grass = list_predictions(catalog, limit=200, label="grass")
    assert len(grass.items) == 16 and grass.next is None
    assert list_predictions(catalog, label="'; DROP TABLE predictions; --").items == []


def test_questions_that_make_no_sense_are_refused(catalog: Catalog) -> None:
    for limit in (0, -1, 201):
        with pytest.raises(InputError, match="limit"):
            list_predictions(catalog, limit=limit)
    with pytest.raises(InputError, match="not a prediction id"):
        list_predictions(catalog, before="zzz")
    with pytest.raises(NotFound):
        get_prediction(catalog, predictions.new_id())


def test_questions_wait_for_no_writer_and_no_writer_for_them(catalog: Catalog) -> None:
    with catalog.transaction() as writing:
        writing.execute(sa.insert(history.PREDICTIONS), [prediction().as_row()])
        assert list_predictions(catalog).items == []
        with catalog.reading() as reading:
            assert reading.scalar(sa.select(sa.func.count()).select_from(history.PREDICTIONS)) == 0
            writing.commit()
    assert len(list_predictions(catalog).items) == 1


def test_a_database_that_is_away_blocks_nobody_and_loses_nothing_that_fits(
    settings: Settings, catalog: Catalog, store: ObjectStore
) -> None:
    interrupted = Interrupted(settings)
    interrupted.away = True
    writer = PredictionWriter(partial(history.insert, interrupted), lambda: store, capacity=5)
    first = prediction()
    writer.record(first)
    soon(lambda: writer.depth == 0)  # the thread holds it and tries
    time.sleep(2 * predictions.LINGER)
    started = time.monotonic()
    kept = [writer.record(prediction()) for _ in range(50)]
    assert time.monotonic() - started < 0.5, "record must not wait"
    assert sum(kept) == 5 and writer.drops["queue_full"] == 45
    interrupted.away = False
    soon(lambda: writer.written == 6)
    assert writer.close()
    assert get_prediction(catalog, first.prediction_id).label == "grass"


def test_closing_gives_up_on_a_dead_database_in_time_and_counts(settings: Settings, store: ObjectStore) -> None:
    interrupted = Interrupted(settings)
    interrupted.away = True
    writer = PredictionWriter(partial(history.insert, interrupted), lambda: store, capacity=10)
    for _ in range(7):
        writer.record(prediction())
    started = time.monotonic()
    assert not writer.close(timeout=1.0)
    assert time.monotonic() - started < 4
    assert writer.drops["closing"] == 7
    assert not writer.record(prediction()) and writer.drops["closing"] == 8


def test_one_bad_record_does_not_take_the_others_with_it(catalog: Catalog, store: ObjectStore) -> None:
    twice = prediction()
    others = [prediction() for _ in range(5)]
    writer = PredictionWriter(partial(history.insert, catalog), lambda: store, capacity=20)
    for one in (twice, *others, twice):
        writer.record(one)
    assert writer.close()
    assert writer.drops["database"] == 1
    assert len(list_predictions(catalog).items) == 6


def test_a_store_that_fails_costs_the_picture_only(catalog: Catalog) -> None:
    def nowhere() -> ObjectStore:
        raise Unavailable("The store does not answer.")

    writer = PredictionWriter(partial(history.insert, catalog), nowhere, capacity=10)
    one = prediction()
    writer.record(one, b"picture")
    assert writer.close()
    assert get_prediction(catalog, one.prediction_id).image_key is None
    assert writer.drops["image_store"] == 1 and writer.written == 1


class Faulty(LocalStore):
    """A folder whose `put` does first what a test wants."""

    def __init__(self, folder: Path, before_put: Callable[[], None]) -> None:
        super().__init__(folder)
        self._before_put = before_put
        self.puts = 0

    def put(self, key: str, data: bytes, **options: Any) -> Any:
        self._before_put()
        info = super().put(key, data, **options)
        self.puts += 1
        return info


def test_29_a_store_that_fails_slowly_holds_up_no_record(catalog: Catalog, tmp_path: Path) -> None:
    def slowly() -> None:
        time.sleep(0.3)
        raise Unavailable("The store does not answer.")

    writer = PredictionWriter(
        partial(history.insert, catalog), lambda: Faulty(tmp_path / "store", slowly), capacity=200
    )
    for _ in range(200):
        assert writer.record(prediction(), b"picture")
    soon(lambda: writer.written == 200)
    assert writer.drops["image_store"] == 200 and sum(writer.drops.values()) == 200
    assert writer.close()


def test_29_pictures_are_kept_again_soon_after_the_store_is_back(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "STORE_PAUSE", 0.2)
    faults = [Unavailable("The store does not answer.")]

    def once() -> None:
        if faults:
            raise faults.pop()

    writer = PredictionWriter(partial(history.insert, catalog), lambda: Faulty(tmp_path / "store", once), capacity=10)
    writer.record(prediction(), b"picture")
    soon(lambda: writer.written == 1)
    time.sleep(0.3)
    one = prediction()
    writer.record(one, b"picture")
    assert writer.close()
    assert get_prediction(catalog, one.prediction_id).image_key and writer.drops["image_store"] == 1


def test_44_a_put_that_hangs_outlasts_no_end_and_leaves_no_picture_that_nothing_names(
    catalog: Catalog, tmp_path: Path
) -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        goes_on.wait(20)

    store = Faulty(tmp_path / "store", hang)
    writer = PredictionWriter(partial(history.insert, catalog), lambda: store, capacity=10)
    one = prediction()
    writer.record(one, b"picture")
    assert hangs.wait(5)
    assert writer.close(timeout=2.0), "the record was not written in time"
    assert writer.drops["image_store"] == 1 and get_prediction(catalog, one.prediction_id).image_key is None
    goes_on.set()
    soon(lambda: store.puts == 1)
    soon(lambda: not list(store.list()))


def test_the_picture_of_a_record_that_is_dropped_goes_with_it(catalog: Catalog, store: ObjectStore) -> None:
    def refuse(_: Any) -> None:
        raise DataError("The database refuses it.")

    writer = PredictionWriter(refuse, lambda: store, capacity=10)
    writer.record(prediction(), b"picture")
    writer.close()
    assert writer.drops["database"] == 1
    assert list(store.list()) == []

    # Written before, though the answer was lost: it is refused as a double, and its picture is another's business.
    twice = prediction()
    writer = PredictionWriter(partial(history.insert, catalog), lambda: store, capacity=10)
    for _ in range(2):
        writer.record(twice, b"picture")
    writer.close()
    assert writer.drops["database"] == 1
    assert [one.key for one in store.list()] == [get_prediction(catalog, twice.prediction_id).image_key]


def test_pictures_that_wait_are_bounded_in_bytes(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "QUEUED_IMAGE_BYTES", 1000)
    opened = threading.Event()

    def slow_store() -> ObjectStore:
        opened.wait(10)
        raise Unavailable("The store does not answer.")

    writer = PredictionWriter(partial(history.insert, catalog), slow_store, capacity=10)
    for _ in range(4):
        assert writer.record(prediction(), b"x" * 400)
    assert writer.drops["image_queue_full"] == 2
    opened.set()
    assert writer.close()
    assert writer.written == 4


def test_a_picture_larger_than_what_may_wait_is_kept_when_none_waits(
    catalog: Catalog, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "QUEUED_IMAGE_BYTES", 1000)
    writer = PredictionWriter(partial(history.insert, catalog), lambda: store, capacity=10)
    large = prediction()
    writer.record(large, b"x" * 5000)
    writer.record(prediction(), b"x")
    assert writer.close()
    assert writer.drops["image_queue_full"] == 1
    key = get_prediction(catalog, large.prediction_id).image_key
    assert key is not None
    assert len(store.get(key)) == 5000


def test_a_pool_without_a_free_connection_is_a_database_that_does_not_answer(
    catalog: Catalog, store: ObjectStore
) -> None:
    catalog.engine = sa.create_engine(
        catalog.engine.url, poolclass=sa.QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.05
    )
    writer = PredictionWriter(partial(history.insert, catalog), lambda: store, capacity=10)
    with catalog.engine.connect():
        with pytest.raises(Unavailable, match="no connection free"):
            list_predictions(catalog)
        writer.record(prediction())
        soon(lambda: writer.depth == 0)
        time.sleep(2 * predictions.LINGER)
    soon(lambda: writer.written == 1)
    assert writer.close() and not any(writer.drops.values())


def test_questions_that_hold_every_connection_do_not_hold_up_records_and_keys(settings: Settings) -> None:
    api = Api(settings)
    pool = api.database.engine.pool
    assert isinstance(pool, sa.QueuePool)
    with ExitStack() as questions:
        for _ in range(15):  # as many as SQLAlchemy opens
            questions.enter_context(api.database.engine.connect())
        begun = time.monotonic()
        api._insert([prediction().as_row()])
        assert api._read_keys() == []
        assert time.monotonic() - begun < 5
    assert len(list_predictions(api.database).items) == 1


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_threads_of_records_and_keys_outlive_any_fault(
    catalog: Catalog, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = [RuntimeError("unheard of"), KeyError("another")]

    def insert(rows: Any) -> None:
        if faults:
            raise faults.pop()
        history.insert(catalog, rows)

    writer = PredictionWriter(insert, lambda: store, capacity=10)
    writer.record(prediction())
    soon(lambda: writer.drops["database"] == 1)
    faults.clear()
    for _ in range(3):
        writer.record(prediction())
    soon(lambda: writer.written >= 3)
    assert writer.close()

    asked = []

    def read() -> list[Any]:
        asked.append(1)
        raise RuntimeError("unheard of")

    monkeypatch.setattr(clients, "REFRESH_SECONDS", 0.01)
    ring = clients.KeyRing(read)
    ring.start()
    soon(lambda: len(asked) > 2)
    ring.stop()


def test_44_work_that_does_not_end_keeps_no_record_from_being_written(settings: Settings) -> None:
    api = Api(settings)
    api.start()
    endless = threading.Event()
    try:
        for _ in range(settings.serving.threads + 1):
            api.pool.submit(partial(endless.wait, 30))  # long enough to be waited for
        soon(lambda: api.pool.waiting == 1)
        api.record(prediction(), None)
        begun = time.monotonic()
        api.stop()
        assert time.monotonic() - begun < 10
        assert len(list_predictions(api.database).items) == 1
    finally:
        endless.set()


def test_the_api_brings_the_tables_up_to_date_at_first_use(settings: Settings) -> None:
    assert list_predictions(Api(settings).database).items == []


def test_a_picture_that_was_put_is_not_kept_in_memory(catalog: Catalog, store: ObjectStore) -> None:
    gone = threading.Event()

    class Picture(bytes):
        def __del__(self) -> None:
            gone.set()

    writer = PredictionWriter(partial(history.insert, catalog), lambda: store, capacity=10)
    writer.record(prediction(), Picture(b"picture"), media_type="image/jpeg")
    soon(lambda: writer.written == 1)
    assert gone.wait(5), "no other picture came to take its place"
    assert writer.close()
