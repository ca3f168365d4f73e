"""Ingest and recheck in processes of their own that are killed, stopped and doubled: FAULTS 28, 29, 32, 33.

After each fault the run is repeated, and tables and objects must be exactly those of a run that nobody disturbed.
"""

from __future__ import annotations

import http.server
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import sqlalchemy as sa
from PIL import Image

from lawnwatch import ingest, recheck
from lawnwatch.catalog import Catalog, ImageRecord
from lawnwatch.config import Settings
from lawnwatch.errors import Unavailable
from lawnwatch.store import ObjectStore, open_store

pytestmark = pytest.mark.integration
SITE = "https://photos.example/"
IMAGES = 24
PASSING = {"attempts", "created_at", "updated_at", "fetched_at", "checked_at", "lost_claims", "url_sha256", "label"}


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((120, 90), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


# What the web holds: pictures, two of the same bytes, and some that are none.
PAGES: dict[str, bytes] = {f"/{number}.jpg": picture(number) for number in range(IMAGES - 4)}
PAGES |= {"/twin.jpg": picture(0), "/page.jpg": b"<html>", "/cut.jpg": picture(90)[:900]}


class Page(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        body = PAGES.get(self.path, b"")
        self.send_response(200 if self.path in PAGES else 404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"one"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()


@pytest.fixture(autouse=True)
def nobody_asked() -> None:
    Page.asked.clear()


def prepared(home: Path, web: str, **changes: Any) -> Settings:
    """Settings of an installation whose catalog holds the pages and one that is gone."""
    settings = Settings(
        home=home,
        fetch={"allow_cidrs": ["127.0.0.0/8"], "origin_map": {SITE: web}, "concurrency": 6},
        data={"max_bad_ratio": 1.0},
        **changes,
    )
    catalog = Catalog(settings)
    catalog.migrate()
    urls = home / "urls.csv"
    home.mkdir(exist_ok=True)
    urls.write_text("url,label\n" + "".join(f"{SITE}{path[1:]},grass\n" for path in [*PAGES, "/gone.jpg"]))
    catalog.import_file(urls)
    return settings


def state(settings: Settings) -> tuple[list[dict[str, Any]], list[tuple[str, bytes]]]:
    """All records without what passes, and all objects with their bytes."""
    store = open_store(settings)
    with Catalog(settings).session() as session:
        columns = [column for column in sa.inspect(ImageRecord).columns if column.key not in PASSING]
        rows = [dict(row._mapping) for row in session.execute(sa.select(*columns).order_by(ImageRecord.id))]
    return rows, [(info.key, store.get(info.key)) for info in store.list()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, web: str) -> Any:
    """The state that a run reaches which nobody disturbs."""
    settings = prepared(tmp_path_factory.mktemp("undisturbed") / "home", web)
    report = ingest.run(settings, Catalog(settings), open_store(settings))
    assert (report.stored, report.quarantined, report.gone) == (IMAGES - 3, 2, 1)
    rows, objects = state(settings)
    assert len(rows) == IMAGES and len(objects) == IMAGES - 4, "twins share one object"
    return rows, objects


PROGRAM = """
import os, signal, sys, threading, time
from lawnwatch import ingest, recheck
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings
from lawnwatch.store import open_store
import sqlalchemy as sa

settings = Settings.model_validate_json(sys.argv[1])
catalog, store = Catalog(settings), open_store(settings)

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def at(number, function, then=kill):
    left = [number]
    def counted(*args, **kwargs):
        left[0] -= 1
        return then() if left[0] == 0 else function(*args, **kwargs)
    return counted
"""
INGEST = "ingest.run(settings, catalog, store)\n"
KILLS = {
    "before the first claim": "catalog.claim = kill",
    "after the first claim": "store.put = kill",
    "before an object's rename": "os.fsync = at(8, os.fsync)",
    "after some objects": "store.put = at(12, store.put)",
    "after all objects, before a record": "catalog.finish = kill",
    "inside a recording transaction": (
        "sa.event.listen(catalog.engine, 'commit', lambda c: kill() if list(store.list('images/')) else None)"
    ),
    "after the first records": "ingest.RECORD_SECONDS = 0.05; ingest.RECORD_IMAGES = 4\n"
    "catalog.finish = at(2, catalog.finish)",
}


def start(settings: Settings, work: str) -> subprocess.Popen[bytes]:
    """Work on these settings in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM + work, given(settings)], stderr=subprocess.DEVNULL, env=os.environ
    )


def given(settings: Settings) -> str:
    return settings.model_dump_json(include={"home", "fetch", "data"})


@pytest.mark.parametrize("moment", KILLS)
def test_32_sigkill_at_each_write_and_the_same_end(tmp_path: Path, web: str, undisturbed: Any, moment: str) -> None:
    settings = prepared(tmp_path / "home", web)
    assert start(settings, f"{KILLS[moment]}\n{INGEST}").wait(60) == -signal.SIGKILL
    assert set(Catalog(settings).status().by_state) - {"stored", "quarantined", "gone"}, "something was left to do"
    ingest.run(settings, Catalog(settings), open_store(settings))
    assert state(settings) == undisturbed


def test_33_two_runs_at_once_fetch_each_image_once(tmp_path: Path, web: str, undisturbed: Any) -> None:
    settings = prepared(tmp_path / "home", web)
    assert [process.wait(60) for process in [start(settings, INGEST) for _ in range(2)]] == [0, 0]
    assert state(settings) == undisturbed
    assert set(Page.asked.values()) == {1}


def test_32_a_picture_that_kills_its_worker_condemns_no_neighbour(tmp_path: Path, web: str, undisturbed: Any) -> None:
    settings = prepared(tmp_path / "home", web)
    store, deadly = open_store(settings), f"{SITE}7.jpg"
    work = (
        f"deadly, decode = bytes.fromhex('{PAGES['/7.jpg'].hex()}'), ingest.images.inspect_and_decode\n"
        "ingest.images.inspect_and_decode = lambda data, **how: kill() if data == deadly else decode(data, **how)\n"
    )
    for _ in range(5):
        assert start(settings, work + INGEST).wait(60) == -signal.SIGKILL
    report = ingest.run(settings, Catalog(settings), store)
    assert report.message.endswith(" 1 failed as worker_died: one run after the other died with them.")
    assert ingest.run(settings, Catalog(settings), store).worker_died == 0
    rows, objects = state(settings)
    (died,) = [row for row in rows if row["url"] == deadly]
    assert (died["state"], str(died["reason"]).partition(":")[0]) == ("failed", "worker_died")
    assert [row for row in rows if row["url"] != deadly] == [row for row in undisturbed[0] if row["url"] != deadly]
    assert objects == [each for each in undisturbed[1] if each[1] != PAGES["/7.jpg"]]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_32_told_to_stop_records_what_is_done_and_gives_the_rest_back(
    tmp_path: Path, web: str, undisturbed: Any, number: int, code: int
) -> None:
    """By the command line: the put that the signal meets takes long, and is not waited for."""
    settings = prepared(tmp_path / "home", web)
    work = (
        f"first = at(8, store.put, lambda: (os.kill(os.getpid(), {int(number)}), time.sleep(30)))\n"
        # A shell starts what it puts into the background with SIGINT ignored, this test run included.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from lawnwatch import cli, log, store as stores\n"
        "stores.LocalStore.put = lambda self, *args, **kwargs: first(*args, **kwargs)\n"
        "os.environ['LAWNWATCH_HOME'] = str(settings.home)\n"
        "cli.get_settings = lambda: settings\n"
        "sys.argv = ['lawnwatch', 'ingest']\ncli.program()\n"
    )
    started = time.monotonic()
    assert start(settings, work).wait(60) == code
    assert time.monotonic() - started < 25, "not as long as the slow put"
    states = Catalog(settings).status().by_state
    assert states["stored"] >= 1 and states["pending"] >= 1 and "claimed" not in states
    ingest.run(settings, Catalog(settings), open_store(settings))
    assert state(settings) == undisturbed


def test_32_a_recheck_that_is_killed_goes_on(tmp_path: Path, web: str, undisturbed: Any) -> None:
    settings = prepared(tmp_path / "home", web)
    store = open_store(settings)
    ingest.run(settings, Catalog(settings), store)
    for info in list(store.list())[:6]:
        store.put(info.key, b"rotten")
    work = "store.put = at(3, store.put)\nrecheck.run(settings, catalog, store)\n"
    assert start(settings, work).wait(60) == -signal.SIGKILL
    report = recheck.run(settings, Catalog(settings), store)
    assert report.lost == 0 and report.repaired >= 4
    rows, objects = state(settings)
    assert objects == undisturbed[1]
    assert [{**row, "source_status": None} for row in rows] == undisturbed[0]


# --- real servers that go away --------------------------------------------------------------------------------------


class BreakAt:
    """A store around which something breaks at the n-th put."""

    def __init__(self, store: ObjectStore, puts: int, break_: Callable[[], None]) -> None:
        self.store, self.left, self.break_ = store, puts, break_
        self.lock, self.broken = threading.Lock(), threading.Event()

    def put(self, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            self.left -= 1
            if self.left == 0:
                self.break_()
                self.broken.set()
        return self.store.put(*args, **kwargs)


def run_beside(settings: Settings, store: Any) -> tuple[threading.Thread, list[Any]]:
    """An ingest in a thread, and the list that gets its report."""
    reports: list[Any] = []
    thread = threading.Thread(target=lambda: reports.append(ingest.run(settings, Catalog(settings), store)))
    thread.start()
    return thread, reports


def test_28_the_database_is_killed_in_mid_run_and_comes_back(
    tmp_path: Path, web: str, undisturbed: Any, start_mariadb: Callable[[], Any]
) -> None:
    mariadb = start_mariadb()
    settings = prepared(tmp_path / "home", web, database_url=mariadb.fresh())
    breaking = BreakAt(open_store(settings), 8, lambda: mariadb.server.stop(signal.SIGKILL))
    thread, reports = run_beside(settings, breaking)
    assert breaking.broken.wait(60)
    time.sleep(0.5)
    mariadb.server.start()
    thread.join(60)
    assert [report.stored for report in reports] == [IMAGES - 3]
    assert state(settings) == undisturbed


def test_29_the_store_is_killed_in_mid_upload_and_comes_back(
    tmp_path: Path, web: str, undisturbed: Any, start_minio: Callable[[], Any]
) -> None:
    minio = start_minio()
    settings = prepared(tmp_path / "home", web, **minio.settings("pictures"))
    breaking = BreakAt(open_store(settings), 8, lambda: minio.server.stop(signal.SIGKILL))
    thread, reports = run_beside(settings, breaking)
    assert breaking.broken.wait(60)
    minio.server.start()
    thread.join(90)
    assert [report.stored for report in reports] == [IMAGES - 3]
    assert state(settings) == undisturbed
    assert max(Page.asked.values()) == 1, "what was fetched is kept while the store is away"


def test_29_a_store_that_stays_away_blames_no_image_and_a_rerun_finishes(
    tmp_path: Path, web: str, undisturbed: Any, start_minio: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "PATIENCE", 1.0)
    minio = start_minio()
    settings = prepared(tmp_path / "home", web, **minio.settings("pictures"))
    store = open_store(settings)
    with pytest.raises(Unavailable):
        ingest.run(settings, Catalog(settings), BreakAt(store, 8, lambda: minio.server.stop(signal.SIGKILL)))  # type: ignore[arg-type]
    states = Catalog(settings).status().by_state
    assert set(states) <= {"pending", "stored", "quarantined", "gone"}, "an outage of ours is not a fault of the source"
    assert states["pending"] > 0
    minio.server.start()
    ingest.run(settings, Catalog(settings), store)
    assert state(settings) == undisturbed
