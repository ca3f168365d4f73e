"""How long a snapshot of 100,000 records takes, against the 20 s that it may, and what it costs in memory.

    snapshot_scale.py [--records N] [--servers]

Without `--servers`: SQLite and a local folder. With it: MariaDB and MinIO, started as the tests start them. Synthetic
records: objects of a few bytes with true keys and sizes, random perceptual hashes, a tenth of them within three bits of
another, and one in a thousand with a label that contradicts its copy. Three snapshots, each in a process of its own:
the first, one where nothing is new, and one after a tenth more records. Prints wall seconds, CPU seconds of the process
for 1,000 records, its peak memory, and the ratio of the wall time to the 20 s.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "infra")]

from lawnwatch import dataset  # noqa: E402
from lawnwatch.catalog import Catalog, ImageRecord, Label, url_hash  # noqa: E402
from lawnwatch.config import Settings  # noqa: E402
from lawnwatch.database import utc_now  # noqa: E402
from lawnwatch.store import LocalStore, ObjectStore, open_store  # noqa: E402

LIMIT_SECONDS = 20.0
BATCH = 5_000


@contextmanager
def servers(folder: Path) -> Iterator[dict[str, Any]]:
    """Settings of a MariaDB and a MinIO that live as long as the block."""
    import conftest

    for name in ("mariadb", "minio"):
        (folder / name).mkdir()
    mariadb = conftest._start_mariadb(folder / "mariadb")
    mariadb.server.stop()
    mariadb.server.argv.append("--innodb-buffer-pool-size=1G")  # the tests' 64 MB do not hold 100,000 rows' indexes
    mariadb.server.start()
    try:
        minio = conftest._start_minio(folder / "minio")
        try:
            yield {"database_url": mariadb.fresh(), **minio.settings()}
        finally:
            minio.server.stop()
    finally:
        mariadb.server.stop()


def put(store: ObjectStore, numbers: range) -> list[tuple[str, str, int]]:
    """Store an object of a few bytes for each number; key, SHA-256 and size of each."""

    def one(number: int) -> tuple[str, str, int]:
        data = f"picture {number}".encode()
        sha = hashlib.sha256(data).hexdigest()
        key = f"images/{sha[:2]}/{sha}.jpg"
        if isinstance(store, LocalStore):  # without the flush to disk, which is not what is measured here
            path = store.root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        else:
            store.put(key, data, sha256=sha)
        return key, sha, len(data)

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, numbers))


def fill(catalog: Catalog, store: ObjectStore, numbers: range) -> None:
    """Records of stored pictures; the same numbers always give the same ones."""
    rng = np.random.default_rng(numbers.start)
    hashes = rng.integers(0, 2**64, len(numbers), dtype=np.uint64)
    for number in range(10, len(numbers), 10):
        flips = rng.choice(64, 3, replace=False).astype(np.uint64)
        hashes[number] = hashes[number - 1] ^ np.bitwise_or.reduce(np.uint64(1) << flips)
    with catalog.session() as session:
        names = dict(session.execute(sa.select(Label.name, Label.id)).all())
        for name in {"dandelion", "grass"} - names.keys():
            session.add(label := Label(name=name))
            session.flush()
            names[name] = label.id
    for start in range(0, len(numbers), BATCH):
        chunk = numbers[start : start + BATCH]
        rows = []
        for offset, (key, sha, size) in enumerate(put(store, chunk), start=start):
            url = f"https://photos.example/{numbers[offset]:08}.jpg"
            contradicts = offset % 1000 == 10
            rows.append(
                {
                    "url": url, "url_sha256": url_hash(url), "label_source": "import", "state": "stored",
                    "label_id": names["grass" if ((offset + 5) // 20 % 2 == 0) != contradicts else "dandelion"],
                    "object_key": key, "sha256": sha, "phash": f"{hashes[offset]:016x}", "bytes": size,
                    "width": 275, "height": 183, "format": "JPEG", "brightness": 0.5, "sharpness": 900.0,
                    "fetched_at": utc_now(),
                }
            )  # fmt: skip
        with catalog.session() as session:
            session.execute(sa.insert(ImageRecord), rows)


def measured(given: dict[str, Any]) -> dict[str, Any]:
    """One snapshot, in this process."""
    settings = Settings(**given)
    catalog, store = Catalog(settings), open_store(settings)
    wall, cpu = time.perf_counter(), time.process_time()
    snapshot = dataset.create_snapshot(settings, catalog, store)
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "images": len(snapshot.rows),
        "quarantined": snapshot.quarantined,
        "created": snapshot.created,
    }


def report(name: str, given: dict[str, Any], records: int) -> None:
    argv = [sys.executable, __file__, "--measure", json.dumps(given)]
    result = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(
        f"{name:24} {result['wall']:6.1f} s wall, {result['wall'] / LIMIT_SECONDS:.2f} of {LIMIT_SECONDS:.0f} s; "
        f"{1000 * result['cpu'] / records * 1000:5.1f} ms CPU per 1,000 records; peak {result['peak_mb']:.0f} MB; "
        f"{result['images']:,} images, {result['quarantined']:,} quarantined"
        f"{'' if result['created'] else ', the same snapshot'}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--servers", action="store_true", help="MariaDB and MinIO instead of SQLite and a folder")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(json.loads(options.measure))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with servers(folder) if options.servers else nothing() as given:
            given |= {"home": str(folder / "home")}
            settings = Settings(**given)
            catalog = Catalog(settings)
            settings.home.mkdir(parents=True, exist_ok=True)
            catalog.migrate()
            store = open_store(settings)
            clock = time.perf_counter()
            fill(catalog, store, range(options.records))
            print(
                f"{options.records:,} records and objects in {time.perf_counter() - clock:.0f} s, on "
                f"{'MariaDB and MinIO' if options.servers else 'SQLite and a folder'}; {os.cpu_count()} cores"
            )
            report("first snapshot", given, options.records)
            report("nothing new", given, options.records)
            fill(catalog, store, range(options.records, options.records + options.records // 10))
            report("a tenth more", given, options.records * 11 // 10)


@contextmanager
def nothing() -> Iterator[dict[str, Any]]:
    """The embedded mode needs no servers."""
    yield {}


if __name__ == "__main__":
    main()
