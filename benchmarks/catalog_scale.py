"""A catalog of a million records on a real MariaDB: import, status, and claims while the table drains.

python benchmarks/catalog_scale.py [--rows 1000000]. Each step is a process of its own, so that its memory is its own.
Prints each figure beside what is allowed. MariaDB runs on this machine and takes its share of the cores: its CPU
is stated too, because wall time on a machine that does other things says little. Its buffer pool is 1 GB. The last
claims of a drained catalog are timed in turns with the first ones of an untouched copy, so that noise meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import sqlalchemy as sa

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "infra")]
import conftest  # noqa: E402

LABELS = ("dandelion", "grass", "clover", "moss")
BATCH = 64  # what an ingest of the default concurrency claims at once
ROUNDS = 100  # claims of which the median is taken


def write_rows(file: Path, rows: int) -> None:
    with file.open("w") as stream:
        stream.write("url,label\n")
        stream.writelines(
            f"https://photos-{n % 97}.example/albums/{n // 1000:05d}/picture-{n:09d}.jpg,{LABELS[n % 4]}\n"
            for n in range(rows)
        )


def step(*argv: str) -> tuple[dict[str, object], float, float, int]:
    """Run one process; returns what it printed, its wall and CPU seconds, and its largest resident set in MB."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([sys.executable, *argv], stdout=out, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        out.seek(0)
        said = out.read()
    if status:
        sys.exit(f"{argv} failed: {said[-2000:]!r}")
    return json.loads(said), wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss // 1024


class Worker:
    """Claims and finishes records of one catalog as an ingest does, but for the pictures."""

    def __init__(self, address: str) -> None:
        from lawnwatch.catalog import Catalog, worker_name
        from lawnwatch.config import Settings

        self.catalog, self.name = Catalog(Settings(database_url=address)), worker_name()
        self.left = self.catalog.status().by_state["pending"]

    def batch(self, size: int) -> tuple[float, float]:
        """Seconds of one claim, and of recording that its images are stored."""
        from lawnwatch.database import utc_now

        started = time.perf_counter()
        records = self.catalog.claim(size, worker=self.name, lease_seconds=600)
        claimed = time.perf_counter()
        stored = {
            "state": "stored", "reason": None, "attempts": 1, "fetched_at": utc_now(), "phash": "0" * 16,
            "width": 275, "height": 183, "bytes": 12_000, "format": "JPEG", "brightness": 0.5, "sharpness": 99.0,
            "etag": None, "last_modified": None,
        }  # fmt: skip
        own = [{"object_key": f"images/{record.id}.jpg", "sha256": f"{record.id:064x}"} for record in records]
        outcomes = [(record.id, stored | each) for record, each in zip(records, own, strict=True)]
        assert self.catalog.finish(self.name, outcomes) == len(records) == size
        self.left -= size
        return claimed - started, time.perf_counter() - claimed


def drain() -> None:
    """Claim and finish all of one catalog, its last batches in turns with the first ones of its untouched twin."""
    drained, whole = (Worker(os.environ[name]) for name in ("LAWNWATCH_DATABASE_URL", "CATALOG_SCALE_TWIN"))
    rounds = min(ROUNDS, drained.left // BATCH // 4)
    drained.batch(BATCH)  # connections, statements compiled
    early, started, rows = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, time.perf_counter(), drained.left
    while drained.left > rounds * BATCH:
        drained.batch(min(1000, drained.left - rounds * BATCH))
    rate = (rows - drained.left) / (time.perf_counter() - started)
    whole.batch(BATCH)
    first, last = zip(*[(whole.batch(BATCH), drained.batch(BATCH)) for _ in range(rounds)], strict=True)
    medians = {
        f"{what}_{when}": statistics.median(each[at] for each in timed)
        for when, timed in (("first", first), ("last", last))
        for at, what in enumerate(("claim", "finish"))
    }
    print(json.dumps({**medians, "early_mb": early, "rate": rate}))


def twin(mariadb: conftest.MariaDb, address: str) -> str:
    """The URL of a copy of that catalog on the same server."""
    from lawnwatch.catalog import Catalog
    from lawnwatch.config import Settings

    copy = mariadb.fresh()
    catalog = Catalog(Settings(database_url=f"{copy}?read_timeout=600"))
    catalog.migrate()
    with catalog.session() as session:
        for table in ("labels", "images"):
            there = f"{sa.make_url(address).database}.{table}"
            session.execute(sa.text(f"INSERT INTO {table} SELECT * FROM {there}"))  # noqa: S608
    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--drain", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drain:
        return drain()
    rows = arguments.rows
    print(f"{rows:,} rows")

    def figure(what: str, value: str, ratio: float | None = None, bound: str = "") -> None:
        print(f"{what:<44} {value:>16}" + (f"   {ratio:5.2f} {bound}" if ratio is not None else ""), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        mariadb = conftest._start_mariadb(Path(folder))
        mariadb.server.stop()
        mariadb.server.argv.append("--innodb-buffer-pool-size=1G")
        mariadb.server.start()
        daemon = psutil.Process(mariadb.server.process.pid)

        def served() -> float:
            return sum(daemon.cpu_times()[:2])

        try:
            os.environ |= {"LAWNWATCH_DATABASE_URL": mariadb.fresh(), "LAWNWATCH_HOME": folder}
            file = Path(folder) / "urls.csv"
            write_rows(file, rows)
            cli = ("-m", "lawnwatch", "catalog")
            step(*cli, "status")  # the schema
            for name in ("import", "second import"):
                before = served()
                said, _, cpu, memory = step(*cli, "import", str(file))
                rate = rows / float(str(said["seconds"]))
                figure(name, f"{rate:,.0f} rows/s", rate / 20_000, "of 20,000 (≥ 1)" if name == "import" else "")
                figure(
                    "  CPU per row, ours and the server's",
                    f"{cpu / rows * 1e6:.1f} + {(served() - before) / rows * 1e6:.1f} µs",
                )
                figure("  its memory", f"{memory} MB", memory / 300, "of 300 (≤ 1)")
            for name in ("start of a command (help)", "status"):
                argv = ("-m", "lawnwatch", "--help") if name != "status" else (*cli, "status")
                started = time.perf_counter()
                subprocess.run([sys.executable, *argv], check=True, capture_output=True)
                figure(name, f"{time.perf_counter() - started:.2f} s")
            os.environ["CATALOG_SCALE_TWIN"] = twin(mariadb, os.environ["LAWNWATCH_DATABASE_URL"])
            said, _, _, memory = step(__file__, "--drain")
            for what in ("claim", "finish"):
                first, last = (float(str(said[f"{what}_{when}"])) for when in ("first", "last"))
                figure(f"{what} of {BATCH}, first", f"{first * 1e3:.2f} ms")
                figure(f"{what} of {BATCH}, last", f"{last * 1e3:.2f} ms", last / first, "of first (≤ 1.3)")
            figure("claimed and finished", f"{said['rate']:,.0f} rows/s")
            figure("  its memory, early", f"{said['early_mb']} MB")
            figure("  its memory, at the end", f"{memory} MB", memory / 300, "of 300 (≤ 1)")
            _, wall, _, _ = step(*cli, "status")
            figure("status, all stored", f"{wall:.2f} s")
            _, wall, _, memory = step(*cli, "export", str(Path(folder) / "all.csv"))
            figure("export", f"{rows / wall:,.0f} rows/s")
            figure("  its memory", f"{memory} MB", memory / 300, "of 300 (≤ 1)")
        finally:
            mariadb.server.stop()


if __name__ == "__main__":
    sys.exit(main())
