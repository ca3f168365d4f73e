"""The data plane on real servers: the catalog on MariaDB, the objects in MinIO, the pictures over HTTP."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from lawnwatch import dataset, ingest
from lawnwatch.catalog import Catalog, ImageRecord
from lawnwatch.config import Settings
from lawnwatch.store import open_store

pytestmark = pytest.mark.integration
WEB = "https://photos.example/"
PER_CLASS = 30


@pytest.fixture
def real(tmp_path: Path, mariadb: str, minio: Any, photo_web: str) -> Settings:
    """Settings of real servers, a database and a bucket of their own; photos.example is played on loopback."""
    return Settings(
        home=tmp_path / "home",
        database_url=mariadb,
        fetch={"allow_cidrs": ["127.0.0.0/8"], "origin_map": {WEB: f"{photo_web}/"}},
        **minio.settings(),
    )


@pytest.fixture
def catalog(real: Settings) -> Catalog:
    catalog = Catalog(real)
    catalog.migrate()
    return catalog


def fill(catalog: Catalog, photos: Path, folder: Path) -> int:
    """Add PER_CLASS photos of each label under their photos.example URLs."""
    urls = folder / "urls.csv"
    chosen = [file for label in sorted(photos.iterdir()) for file in sorted(label.glob("*.jpg"))[:PER_CLASS]]
    urls.write_text(
        "url,label\n" + "".join(f"{WEB}{file.parent.name}/{file.name},{file.parent.name}\n" for file in chosen)
    )
    assert catalog.import_file(urls).added == len(chosen)
    return len(chosen)


def test_catalog_to_snapshot_and_again(real: Settings, catalog: Catalog, photos: Path, tmp_path: Path) -> None:
    total = fill(catalog, photos, tmp_path)
    store = open_store(real)
    report = ingest.run(real, catalog, store)
    assert (report.claimed, report.stored) == (total, total)
    shas = {record["sha256"] for record in records(catalog)}
    assert {info.key.split("/")[-1].split(".")[0] for info in store.list("images/")} == shas

    snapshot = dataset.create_snapshot(real, catalog, store)
    assert snapshot.created and len(snapshot.rows) == len(shas)
    again = dataset.create_snapshot(real, catalog, store)
    assert (again.id, again.created, again.rows) == (snapshot.id, False, snapshot.rows)
    assert ingest.run(real, catalog, store).claimed == 0
    row = snapshot.rows[0]
    cache = dataset.ObjectCache(tmp_path / "cache", 10**9)
    assert cache.read(store, row.object_key, row.sha256) == store.get(row.object_key)


def test_migrations_from_two_processes_at_once(real: Settings) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.map(migrate, [real] * 3)
    assert {"images", "labels", "label_history", "snapshots"} <= set(sa.inspect(Catalog(real).engine).get_table_names())


def migrate(settings: Settings) -> None:
    Catalog(settings).migrate()


def test_a_second_worker_claims_while_the_first_one_is_claiming(catalog: Catalog) -> None:
    """Not even the label row may be locked, or SKIP LOCKED hides every record of that label."""
    for number in range(10):
        catalog.add(f"{WEB}{number}.jpg", "grass")
    with catalog.session() as session:
        first = catalog.lock_pending(session, 5, None)
        second = catalog.claim(5, worker="other:1:1", lease_seconds=60)
    assert len(first) == len(second) == 5
    assert not set(first) & {record.id for record in second}


def test_many_workers_take_each_record_once(catalog: Catalog) -> None:
    for number in range(200):
        catalog.add(f"{WEB}{number}.jpg", "grass" if number % 2 else "dandelion")
    taken: list[int] = []
    lock = threading.Lock()

    def work(name: str) -> None:
        while claimed := catalog.claim(7, worker=f"host:{name}:1", lease_seconds=60):
            done = [(record.id, {"state": "gone", "reason": "http_404"}) for record in claimed]
            assert catalog.finish(f"host:{name}:1", done) == len(done)
            with lock:
                taken.extend(record.id for record in claimed)

    workers = [threading.Thread(target=work, args=(str(number),)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(taken) == sorted(set(taken)) and len(taken) == 200


def test_labels_that_differ_in_bytes_are_different(catalog: Catalog) -> None:
    for number, label in enumerate(("Löwenzahn", "Lowenzahn", "löwenzahn", "草")):
        assert catalog.add(f"{WEB}{number}.jpg", label) == "added"
    assert set(catalog.status().by_label) == {"Löwenzahn", "Lowenzahn", "löwenzahn", "草"}
    assert catalog.add(f"{WEB}A.jpg'; DROP TABLE images; --", "'; DROP TABLE labels; --") == "added"
    assert catalog.add(f"{WEB}a.jpg'; DROP TABLE images; --", "Löwenzahn") == "added"
    assert catalog.status().total == 6


def test_32_sigkill_and_run_again(real: Settings, catalog: Catalog, photos: Path, tmp_path: Path) -> None:
    """A killed ingest leaves claims; the next run on this machine takes them at once and reaches the same end."""
    total = fill(catalog, photos, tmp_path)
    script = (
        "import os, sys, signal, pickle\n"
        "from lawnwatch import ingest\nfrom lawnwatch.catalog import Catalog\nfrom lawnwatch.store import open_store\n"
        "settings = pickle.load(sys.stdin.buffer)\nstore = open_store(settings)\nput, count = store.put, 0\n"
        "def dying(*args, **kwargs):\n    global count\n    count += 1\n"
        "    done = put(*args, **kwargs)\n    if count >= 10: os.kill(os.getpid(), signal.SIGKILL)\n    return done\n"
        "store.put = dying\ningest.run(settings, Catalog(settings), store)\n"
    )
    import pickle

    killed = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(real), timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert catalog.status().by_state.get("claimed", 0) > 0
    started = time.monotonic()
    store = open_store(real)
    ingest.run(real, catalog, store)
    assert time.monotonic() - started < 60, "the leases of a dead worker of this machine are not waited for"
    assert catalog.status().by_state == {"stored": total}


def records(catalog: Catalog) -> list[dict[str, Any]]:
    with catalog.session() as session:
        found = session.scalars(sa.select(ImageRecord).order_by(ImageRecord.id))
        return [{"sha256": record.sha256, "object_key": record.object_key} for record in found]
