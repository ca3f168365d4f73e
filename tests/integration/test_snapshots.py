"""Snapshots on real servers, killed at every write, and the pipeline by which training reads them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from lawn import Lawn, Picture
from lawnwatch import dataset, images
from lawnwatch.catalog import Catalog, ImageRecord, SnapshotRecord
from lawnwatch.config import Settings
from lawnwatch.dataset import splits
from lawnwatch.errors import NotFound, Unavailable
from lawnwatch.store import LocalStore, open_store, sha256_of
from lawnwatch.store.s3 import S3Store

pytestmark = pytest.mark.integration
# Processes forked from one that has imported all this and started no thread.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


def fill(lawn: Lawn) -> None:
    """Pictures enough for all splits, with copies, and one that is labelled twice."""
    rng = np.random.default_rng(3)
    hashes = [int(value) for value in rng.integers(0, 2**63, 60)]
    found = [Picture(f"{n}.jpg", ("grass", "dandelion")[n % 2], phash=value) for n, value in enumerate(hashes)]
    found += [Picture(f"{n}-copy.jpg", ("grass", "dandelion")[n % 2], phash=hashes[n] ^ 0b101) for n in range(0, 60, 7)]
    lawn.put_all([*found, Picture("twice.jpg", "dandelion", phash=hashes[2])])


def state(lawn: Lawn) -> tuple[list[Any], list[Any], list[str]]:
    """What the tables and the store hold of a snapshot, but for points in time."""
    with lawn.catalog.session() as session:
        columns = (ImageRecord.url, ImageRecord.state, ImageRecord.reason, ImageRecord.group_id, ImageRecord.split)
        records = [tuple(row) for row in session.execute(sa.select(*columns).order_by(ImageRecord.url))]
        snapshots = list(session.scalars(sa.select(SnapshotRecord.id).order_by(SnapshotRecord.id)))
    objects = [
        (info.key, sha256_of(lawn.store.get(info.key)) if info.key.endswith(".parquet") else "")
        for info in lawn.store.list("snapshots/")
    ]
    return records, objects, snapshots


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any], list[str]]:
    """The state after one run that nothing disturbed, in the embedded mode."""
    lawn = Lawn(tmp_path_factory.mktemp("undisturbed"))
    fill(lawn)
    lawn.snapshot()
    return state(lawn)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, mariadb_server: Any, minio: Any) -> Lawn:
    lawn = Lawn(tmp_path_factory.mktemp("real"), database_url=mariadb_server.fresh(), **minio.settings())
    fill(lawn)
    return lawn


@pytest.fixture
def real(servers: Lawn) -> Lawn:
    """Pictures on MariaDB and MinIO that no snapshot has seen."""
    with servers.catalog.session() as session:
        session.execute(sa.update(ImageRecord).values(state="stored", reason=None, group_id=None, split=None))
        session.execute(sa.delete(SnapshotRecord))
    for info in list(servers.store.list("snapshots/")):
        servers.store.delete(info.key)
    return servers


def killed_at(settings: Settings, point: int) -> None:
    """Make a snapshot in this process, and kill it at its `point`th write: before and after each put and commit."""
    seen = 0

    def here() -> None:
        nonlocal seen
        if seen == point:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    def around(method: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **options: Any) -> Any:
            here()
            result = method(*given, **options)
            here()
            return result

        return called

    catalog = Catalog(settings)
    writing = False

    @sa.event.listens_for(catalog.engine, "before_cursor_execute")
    def look(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal writing
        if statement.startswith(("UPDATE images", "INSERT INTO snapshots")):
            writing = True

    @sa.event.listens_for(catalog.engine, "commit")
    def before_commit(_connection: Any) -> None:
        if writing:
            here()

    @sa.event.listens_for(catalog.engine, "checkin")
    def after_commit(_connection: Any, _record: Any) -> None:
        nonlocal writing
        if writing:
            writing = False
            here()

    for kind in (LocalStore, S3Store):
        kind.put = around(kind.put)  # type: ignore[method-assign]
    dataset.create_snapshot(settings, catalog, open_store(settings))


WRITES = 8  # before and after: the judgement's commit, the manifest, the summary, the snapshot's commit


@pytest.mark.parametrize("point", range(WRITES))
def test_32_killed_at_any_write_a_rerun_reaches_the_same(real: Lawn, undisturbed: Any, point: int) -> None:
    process = PROCESSES.Process(target=killed_at, args=(real.settings, point))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    if point < WRITES - 1:  # after the last one the snapshot is there
        with pytest.raises(NotFound):
            dataset.load_snapshot(real.catalog, real.store)
    snapshot = real.snapshot()
    assert snapshot.created == (point < WRITES - 1)
    assert state(real) == undisturbed


def test_32_there_is_no_further_write(real: Lawn) -> None:
    process = PROCESSES.Process(target=killed_at, args=(real.settings, WRITES))
    process.start()
    process.join(120)
    assert process.exitcode == 0, "WRITES counts them all"


def make(settings: Settings) -> tuple[str, bool]:
    snapshot = dataset.create_snapshot(settings, Catalog(settings), open_store(settings))
    return snapshot.id, snapshot.created


def test_33_two_at_once_make_one_snapshot(real: Lawn, undisturbed: Any) -> None:
    with PROCESSES.Pool(3) as pool:
        made = pool.map(make, [real.settings] * 3)
    assert len({name for name, _ in made}) == 1
    assert sorted(created for _, created in made) == [False, False, True]
    assert state(real) == undisturbed


def test_a_correction_taken_back_on_mariadb(real: Lawn) -> None:
    page = "https://photos.example/5.jpg"
    right = real.snapshot()
    real.catalog.relabel(page, "grass")
    try:
        mistaken = real.snapshot()
    finally:
        real.catalog.relabel(page, "dandelion")
    again = real.snapshot()
    assert (again.id, again.created, again.renewed) == (right.id, False, True) and mistaken.id != right.id
    assert dataset.load_snapshot(real.catalog, real.store).id == right.id
    assert not real.snapshot().renewed, "it is the latest now"


def test_29_a_store_that_goes_away_leaves_no_snapshot(
    tmp_path: Path, mariadb: str, start_minio: Callable[[], Any], undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    minio = start_minio()
    lawn = Lawn(tmp_path / "real", database_url=mariadb, **minio.settings())
    fill(lawn)
    put = S3Store.put

    def gone(self: S3Store, key: str, *given: Any, **options: Any) -> Any:
        minio.server.stop(signal.SIGKILL)
        return put(self, key, *given, **options)

    with monkeypatch.context() as patched, pytest.raises(Unavailable):
        patched.setattr(S3Store, "put", gone)
        lawn.snapshot()
    with lawn.catalog.session() as session:
        assert session.scalar(sa.select(sa.func.count(SnapshotRecord.id))) == 0
    minio.server.start()
    lawn.snapshot()
    assert state(lawn) == undisturbed


def test_relabelled_while_it_is_judged_on_mariadb(real: Lawn, monkeypatch: pytest.MonkeyPatch) -> None:
    """No lock is held while judging: a person's correction goes through at once, and it counts."""
    page = "https://photos.example/5.jpg"
    judge, looks = splits._judge, 0

    def meanwhile(*given: Any) -> dataset.Settled:
        nonlocal looks
        looks += 1
        if looks == 1:
            real.catalog.relabel(page, "grass")
        return judge(*given)

    monkeypatch.setattr(splits, "_judge", meanwhile)
    try:
        snapshot = real.snapshot()
    finally:
        real.catalog.relabel(page, "dandelion")
    assert looks == 2
    assert next(row.label for row in snapshot.rows if row.url == page) == "grass"


# --- the pipeline of training ---------------------------------------------------------------------------------------


@pytest.fixture
def lawn(tmp_path: Path) -> Lawn:
    return Lawn(tmp_path / "lawn")


def test_the_stream_gives_what_serving_sees_in_an_order_that_the_seed_decides(lawn: Lawn, tmp_path: Path) -> None:
    lawn.fill(6)
    snapshot, cache = lawn.snapshot(), dataset.ObjectCache(tmp_path / "cache", 10**9)

    def read(seed: int | None) -> tuple[list[bytes], list[int]]:
        found = dataset.Stream(
            snapshot.rows,
            lawn.store,
            cache,
            classes=snapshot.classes,
            batch=5,
            prepare=dataset.decoder(96, max_pixels=10**6),
            shape=(96, 96, 3),
            shuffle_seed=seed,
        )
        assert found.dataset.element_spec[0].shape.as_list() == [None, 96, 96, 3]
        batches = list(found)
        assert [len(labels) for _, labels in batches] == [5, 5, 2]
        assert {(str(p.dtype), str(n.dtype)) for p, n in batches} == {("uint8", "int32")}
        return [p.tobytes() for pictures, _ in batches for p in pictures], [int(n) for _, ns in batches for n in ns]

    expected = [
        images.decode(lawn.store.get(row.object_key), size=96, max_pixels=10**6).tobytes() for row in snapshot.rows
    ]
    pictures, labels = read(None)
    assert pictures == expected
    assert [snapshot.classes[number] for number in labels] == [row.label for row in snapshot.rows]
    shuffled, of_shuffled = read(7)
    assert (shuffled, of_shuffled) == read(7) and shuffled != read(8)[0] and shuffled != expected
    assert sorted(zip(shuffled, of_shuffled, strict=True)) == sorted(zip(pictures, labels, strict=True))


def test_a_picture_that_cannot_be_read_is_said_as_what_it_is(lawn: Lawn, tmp_path: Path) -> None:
    lawn.fill(6)
    snapshot, cache = lawn.snapshot(), dataset.ObjectCache(tmp_path / "cache", 10**9)
    lawn.store.delete(snapshot.rows[7].object_key)
    with pytest.raises(NotFound, match=snapshot.rows[7].object_key):
        list(
            dataset.Stream(
                snapshot.rows,
                lawn.store,
                cache,
                classes=snapshot.classes,
                batch=4,
                prepare=lambda row, data: np.frombuffer(data[:3], np.uint8),
                shape=(3,),
            )
        )
