"""Ingest on SQLite and a folder, against a web on loopback where some sources fail: FAULTS 21-24, 32, 33."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from PIL import Image

from lawnwatch import ingest, net
from lawnwatch.catalog import Catalog, ImageRecord
from lawnwatch.config import Settings
from lawnwatch.errors import DataError, Unavailable
from lawnwatch.store import LocalStore, ObjectInfo, open_store

pytestmark = pytest.mark.unit
SITE = "https://photos.example/"


def picture(seed: int) -> bytes:
    """A JPEG of its own."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((120, 90), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


class Web(http.server.ThreadingHTTPServer):
    """Pages from a table; what is not there is 404; an integer is that status. Counts what it is asked."""

    daemon_threads = True

    def __init__(self) -> None:
        self.pages: dict[str, bytes | int] = {}
        self.asked: Counter[str] = Counter()
        super().__init__(("127.0.0.1", 0), Page)
        self.base = f"http://127.0.0.1:{self.server_address[1]}/"


class Page(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        page = self.server.pages.get(self.path.lstrip("/"), 404)
        body = page if isinstance(page, bytes) else b""
        self.send_response(200 if isinstance(page, bytes) else page)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("ETag", '"one"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(net, "BACKOFF", 0.01)
    server = Web()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def settings(tmp_path: Path, web: Web) -> Settings:
    return Settings(
        home=tmp_path / "home",
        fetch={"allow_cidrs": ["127.0.0.0/8"], "origin_map": {SITE: web.base}, "max_bytes": 50_000, "concurrency": 8},
        data={"max_bad_ratio": 1.0},
    )


@pytest.fixture
def catalog(settings: Settings) -> Catalog:
    catalog = Catalog(settings)
    catalog.migrate()
    return catalog


@pytest.fixture
def store(settings: Settings) -> LocalStore:
    opened = open_store(settings)
    assert isinstance(opened, LocalStore)
    return opened


def publish(web: Web, catalog: Catalog, pages: dict[str, bytes | int], label: str = "grass") -> None:
    web.pages |= pages
    for name in pages:
        catalog.add(SITE + name, label)


def test_a_stored_image_is_recorded_whole(settings: Settings, catalog: Catalog, store: LocalStore, web: Web) -> None:
    data = picture(1)
    publish(web, catalog, {"a.jpg": data})
    report = ingest.run(settings, catalog, store)
    assert (report.claimed, report.stored, report.bytes) == (1, 1, len(data))
    record = catalog.find(SITE + "a.jpg")
    sha = hashlib.sha256(data).hexdigest()
    assert (record.state, record.sha256, record.object_key) == ("stored", sha, f"images/{sha[:2]}/{sha}.jpg")
    assert (record.width, record.height, record.bytes, record.format) == (120, 90, len(data), "JPEG")
    assert record.etag == '"one"' and record.fetched_at and record.attempts == 1 and record.claimed_by is None
    assert 0 < (record.brightness or 0) < 1 and len(record.phash or "") == 16
    assert store.get(str(record.object_key)) == data


def test_22_23_every_failure_is_a_recorded_reason_and_the_others_finish(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web
) -> None:
    good = {f"good{number}.jpg": picture(number) for number in range(20)}
    bad: dict[str, tuple[bytes | int, str, str]] = {
        "gone.jpg": (404, "gone", "http_404"),
        "dead.jpg": (410, "gone", "http_410"),
        "down.jpg": (503, "failed", "http_503"),
        "page.jpg": (b"<!doctype html>not found, but 200", "quarantined", "unsupported_media"),
        "empty.jpg": (b"", "quarantined", "unsupported_media"),
        "cut.jpg": (picture(99)[:900], "quarantined", "corrupt"),
        "huge.jpg": (b"\xff\xd8\xff" * 20_000, "quarantined", "too_large"),
    }
    publish(web, catalog, {**good, **{name: page for name, (page, _, _) in bad.items()}})
    catalog.add("http://169.254.169.254/latest/meta-data", "grass")
    catalog.add("http://user:password@photos.example/a.jpg", "grass")
    report = ingest.run(settings, catalog, store)
    assert (report.claimed, report.stored, report.gone, report.failed, report.quarantined, report.blocked) == (
        len(good) + len(bad) + 2, len(good), 2, 1, 4, 2,
    )  # fmt: skip
    for name, (_, state, reason) in bad.items():
        record = catalog.find(SITE + name)
        assert record.state == state, name
        assert (record.reason or "").startswith(f"{reason}: "), (name, record.reason)
        assert record.object_key is None
    assert (catalog.find("http://169.254.169.254/latest/meta-data").reason or "").startswith("private_address: ")
    assert (catalog.find("http://user:password@photos.example/a.jpg").reason or "").startswith("user_info: ")
    assert report.reasons["http_404"] == 1 and sum(report.reasons.values()) == len(bad) + 2
    assert len(list(store.list())) == len(good)
    assert web.asked["/gone.jpg"] == 1 and web.asked["/down.jpg"] == settings.fetch.attempts


def test_23_too_many_bad_ones_fail_the_run_after_all_is_recorded(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web
) -> None:
    settings.data.max_bad_ratio = 0.25
    publish(web, catalog, {"1.jpg": picture(1), "2.jpg": picture(2), "3.jpg": 404, "4.jpg": 404})
    with pytest.raises(DataError, match=r"2 of 4.*2 http_404"):
        ingest.run(settings, catalog, store)
    assert catalog.status().by_state == {"stored": 2, "gone": 2}
    assert ingest.run(settings, catalog, store).claimed == 0, "a second run has nothing to complain of"


def test_24_same_bytes_under_two_urls_are_one_object(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web
) -> None:
    publish(web, catalog, {"a.jpg": picture(1), "b.jpg": picture(1)})
    assert ingest.run(settings, catalog, store).stored == 2
    assert len(list(store.list())) == 1


def test_again_fetches_nothing(settings: Settings, catalog: Catalog, store: LocalStore, web: Web) -> None:
    publish(web, catalog, {f"{number}.jpg": picture(number) for number in range(5)})
    ingest.run(settings, catalog, store)
    web.asked.clear()
    report = ingest.run(settings, catalog, store)
    assert (report.claimed, report.message) == (0, "Nothing new: no image record is pending.")
    assert not web.asked


def test_limit_and_labels(settings: Settings, catalog: Catalog, store: LocalStore, web: Web) -> None:
    publish(web, catalog, {f"g{number}.jpg": picture(number) for number in range(9)}, "grass")
    publish(web, catalog, {f"d{number}.jpg": picture(100 + number) for number in range(9)}, "dandelion")
    assert ingest.run(settings, catalog, store, limit=4, labels=["dandelion"]).stored == 4
    assert all(path.startswith("/d") for path in web.asked)
    with pytest.raises(DataError, match="daisy"):
        ingest.run(settings, catalog, store, labels=["daisy"])
    assert ingest.run(settings, catalog, store).stored == 14


def test_an_empty_catalog_says_what_to_do(settings: Settings, catalog: Catalog, store: LocalStore) -> None:
    with pytest.raises(DataError, match="catalog import"):
        ingest.run(settings, catalog, store)


class Failing(LocalStore):
    """A store that goes away after some puts."""

    def __init__(self, root: Path, puts: int) -> None:
        super().__init__(root)
        self.left = puts

    def put(self, key: str, data: bytes | Path, **options: Any) -> ObjectInfo:
        self.left -= 1
        if self.left < 0:
            raise Unavailable("The store does not answer.")
        return super().put(key, data, **options)


def test_29_an_outage_of_the_store_blames_no_image(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web
) -> None:
    publish(web, catalog, {f"{number}.jpg": picture(number) for number in range(30)})
    with pytest.raises(Unavailable):
        ingest.run(settings, catalog, Failing(store.root, 20))
    assert set(catalog.status().by_state) <= {"pending", "stored"}
    ingest.run(settings, catalog, store)
    assert catalog.status().by_state == {"stored": 30}
    assert len(list(store.list())) == 30


RUN = (
    "import os, pathlib, signal, sys\nfrom lawnwatch import ingest\nfrom lawnwatch.catalog import Catalog\n"
    "from lawnwatch.config import Settings\nfrom lawnwatch.store import open_store\n"
    "settings = Settings.model_validate_json(sys.argv[1])\ncatalog, store = Catalog(settings), open_store(settings)\n"
    "def kill(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)\n"
)
KILLS = {
    "after the claim": "store.put = kill\n",
    "before the rename": "os.fsync = kill\n",
    "after the object, before the record": "catalog.finish = kill\n",
    "inside the recording transaction": (
        "import sqlalchemy as sa\n"
        "sa.event.listen(catalog.engine, 'commit', lambda c: kill() if list(store.list('images/')) else None)\n"
    ),
}


@pytest.mark.parametrize("moment", KILLS)
def test_32_sigkill_at_each_write_and_the_same_end(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, moment: str
) -> None:
    publish(web, catalog, {f"{number}.jpg": picture(number) for number in range(20)})
    died = start(settings, KILLS[moment]).wait(60)
    assert died == -signal.SIGKILL
    assert catalog.status().by_state.get("claimed"), "the killed run left claims behind"
    ingest.run(settings, catalog, store)
    with catalog.session() as session:
        records = list(session.scalars(sa.select(ImageRecord)))
    assert {record.state for record in records} == {"stored"}
    assert {info.key for info in store.list()} == {record.object_key for record in records}
    for record in records:
        assert hashlib.sha256(store.get(str(record.object_key))).hexdigest() == record.sha256


def test_33_two_runs_at_once_fetch_each_image_once(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web
) -> None:
    publish(web, catalog, {f"{number}.jpg": picture(number) for number in range(80)})
    both = [start(settings, "") for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert catalog.status().by_state == {"stored": 80}
    assert set(web.asked.values()) == {1}


def test_ctrl_c_gives_the_claims_back(settings: Settings, catalog: Catalog, store: LocalStore, web: Web) -> None:
    publish(web, catalog, {f"{number}.jpg": picture(number) for number in range(20)})
    once = (
        "import threading, time\nfirst = threading.Lock()\n"
        "def interrupt(*args, **kwargs):\n"
        "    if first.acquire(blocking=False): os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0.5)\n"
        "store.put = interrupt\n"
    )
    interrupted = start(settings, once)
    assert interrupted.wait(60) != 0
    assert catalog.status().by_state == {"pending": 20}


def start(settings: Settings, failpoint: str) -> subprocess.Popen[bytes]:
    """`ingest.run` in a process of its own, with a failpoint."""
    return subprocess.Popen(
        [sys.executable, "-c", RUN + failpoint + "ingest.run(settings, catalog, store)", as_json(settings)],
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONFAULTHANDLER": ""},
    )


def as_json(settings: Settings) -> str:
    return settings.model_dump_json(include={"home", "fetch", "data"})


def test_progress_says_how_far(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "PROGRESS_SECONDS", 0.01)
    publish(web, catalog, {f"{number}.jpg": picture(number) for number in range(30)})
    lines: list[str] = []
    say: Callable[[str], None] = lines.append
    ingest.run(settings, catalog, store, progress=say)
    assert any("of 30 images" in line for line in lines)
