"""Ingest on SQLite and a folder, against a web on loopback where some sources fail: FAULTS 21-24, 29."""

from __future__ import annotations

import hashlib
import http.server
import io
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from lawnwatch import ingest, net
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings
from lawnwatch.errors import DataError, SettingsError, Unavailable
from lawnwatch.store import LocalStore, ObjectInfo

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
        self.location = "/"
        self.hang_until: Callable[[], bool] = lambda: True
        self.hung_in_vain = 0
        self.patience = 20.0
        super().__init__(("127.0.0.1", 0), Page)
        self.base = f"http://127.0.0.1:{self.server_address[1]}/"


class Page(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        if self.path.startswith("/hang"):
            self.hang()
            return
        page = self.server.pages.get(self.path.lstrip("/"), 404)
        body = page if isinstance(page, bytes) else b""
        self.send_response(200 if isinstance(page, bytes) else page)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("ETag", '"one"')
        self.send_header("Location", self.server.location)
        self.end_headers()
        self.wfile.write(body)

    def hang(self) -> None:
        """Answer 500 when the others are served, or in vain when patience ends."""
        end = time.monotonic() + self.server.patience
        while not self.server.hang_until() and time.monotonic() < end:
            time.sleep(0.01)
        self.server.hung_in_vain += not self.server.hang_until()
        self.send_response(500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(net, "BACKOFF", 0.01)
    server = Web()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
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


def test_23_one_hostile_redirect_does_not_end_the_run(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web
) -> None:
    publish(web, catalog, {"1.jpg": picture(1), "moved.jpg": 302, "2.jpg": picture(2)})
    web.location = "http://[/x"
    report = ingest.run(settings, catalog, store)
    assert (report.stored, report.blocked, report.reasons) == (2, 1, {"bad_url": 1})


def test_23_what_nobody_foresaw_of_one_picture_does_not_end_the_run(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library fails on one of the pictures, with an error that none of its others is."""
    left, transform = [3], cv2.dct

    def dct(*args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError("too much for the library")
        return transform(*args)

    monkeypatch.setattr(cv2, "dct", dct)
    publish(web, catalog, {f"{number}.jpg": picture(number) for number in range(9)})
    report = ingest.run(settings, catalog, store)
    assert (report.stored, report.failed, report.reasons) == (8, 1, {"internal": 1})
    (failed,) = catalog.select(state="failed")
    assert failed.reason == "internal: A fault of ours: MemoryError: too much for the library."


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


class Away(LocalStore):
    """A store that does not answer some of its puts: the first `sound` are done, then `failing` fail."""

    def __init__(self, root: Path, sound: int, failing: float) -> None:
        super().__init__(root)
        self.sound, self.failing, self.lock = sound, failing, threading.Lock()

    def put(self, key: str, data: bytes | Path, **options: Any) -> ObjectInfo:
        with self.lock:
            self.sound -= 1
            if self.sound < 0 < self.failing:
                self.failing -= 1
                raise Unavailable("The store does not answer.")
        return super().put(key, data, **options)


def test_29_a_store_that_comes_back_is_waited_for(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web
) -> None:
    publish(web, catalog, {f"{number}.jpg": picture(number) for number in range(10)})
    assert ingest.run(settings, catalog, Away(store.root, 5, 4)).stored == 10
    assert set(web.asked.values()) == {1}, "what was fetched is kept while the store is away"
    assert len(list(store.list())) == 10


def test_29_an_outage_of_the_store_blames_no_image_and_stops_the_fetching(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "PATIENCE", 0.5)
    publish(web, catalog, {f"{number}.jpg": picture(number) for number in range(40)})
    with pytest.raises(Unavailable):
        ingest.run(settings, catalog, Away(store.root, 20, float("inf")))
    assert catalog.status().by_state == {"pending": 20, "stored": 20}
    assert len(web.asked) <= 20 + settings.fetch.concurrency, "no more bodies than slots wait for the store"
    ingest.run(settings, catalog, store)
    assert catalog.status().by_state == {"stored": 40}
    assert len(list(store.list())) == 40


@pytest.mark.parametrize(
    "fault",
    [SettingsError("The store refused the keys."), RuntimeError("nobody foresaw this")],
    ids=["refused", "unforeseen"],
)
def test_what_the_store_refuses_ends_the_run_and_blames_no_image(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def refused(*_: Any, **__: Any) -> ObjectInfo:
        raise fault

    publish(web, catalog, {"1.jpg": picture(1)})
    monkeypatch.setattr(store, "put", refused)
    with pytest.raises(type(fault), match=str(fault)):
        ingest.run(settings, catalog, store)
    assert catalog.status().by_state == {"pending": 1}


def test_a_rotten_object_is_replaced_when_its_picture_is_fetched_again(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web
) -> None:
    publish(web, catalog, {"a.jpg": picture(1)})
    ingest.run(settings, catalog, store)
    key = str(catalog.find(SITE + "a.jpg").object_key)
    store.put(key, b"rotten")
    publish(web, catalog, {"b.jpg": picture(1)})
    ingest.run(settings, catalog, store)
    assert store.get(key) == picture(1)


def test_23_one_dead_host_of_many_holds_up_nobody(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dead host's images come first in the catalog and outnumber what is claimed ahead; it answers nothing until
    all others are served."""
    port = web.server_address[1]
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *args, **options: real("127.0.0.1" if str(host).endswith(".example") else host, *args, **options),
    )
    settings.fetch.origin_map = {}
    settings.fetch.concurrency, settings.fetch.per_host = 3, 2
    settings.fetch.read_timeout, settings.fetch.attempts = 30, 1
    settings.fetch.host_failures, settings.fetch.host_pause = 2, 0.2
    good = [f"{number}.jpg" for number in range(30)]
    web.pages |= {name: picture(number) for number, name in enumerate(good)}
    web.hang_until = lambda: sum(web.asked[f"/{name}"] for name in good) == len(good)
    rows = [f"http://dead.example:{port}/hang{number}" for number in range(40)]
    rows += [f"http://host{number}.example:{port}/{name}" for number, name in enumerate(good)]
    for url in rows:
        catalog.add(url, "grass")
    report = ingest.run(settings, catalog, store)
    assert (report.stored, report.failed) == (30, 40)
    assert web.hung_in_vain == 0, "a hanging request was answered only after all others were served"
    assert report.reasons["host_down"] >= 30 and report.reasons["http_500"] < 10


def test_room_is_given_in_the_order_of_coming_and_never_twice() -> None:
    room, order, at_once, most, lock = ingest.Room(10), [], 0, 0, threading.Lock()

    def take(name: str, size: int) -> threading.Thread:
        def taking() -> None:
            nonlocal at_once, most
            with room.taken(size):
                with lock:
                    order.append(name)
                    at_once += min(size, 10)
                    most = max(most, at_once)
                time.sleep(0.05)
                with lock:
                    at_once -= min(size, 10)

        thread = threading.Thread(target=taking)
        thread.start()
        time.sleep(0.01)  # so that the order of coming is known
        return thread

    threads = [take("first", 4), take("too large for what there is", 99), *(take(str(n), 3) for n in range(6))]
    for thread in threads:
        thread.join(10)
    assert order[:2] == ["first", "too large for what there is"], "the small ones that came later do not overtake it"
    assert len(order) == 8 and most == 10


def test_the_plan_shares_the_pending_images(settings: Settings, catalog: Catalog) -> None:
    for number in range(10):
        catalog.add(f"{SITE}g{number}.jpg", "grass")
    for number in range(3):
        catalog.add(f"{SITE}d{number}.jpg", "dandelion")
    settings.data.batch_images, settings.data.max_batches = 4, 8
    found = ingest.plan(settings, catalog)
    assert found.pending == 13
    assert found.batches == [["ingest", "--limit=4"]] + [["ingest", "--limit=3"]] * 3
    settings.data.max_batches = 2
    assert ingest.plan(settings, catalog).batches == [["ingest", "--limit=7"], ["ingest", "--limit=6"]]
    some = ingest.plan(settings, catalog, labels=["dandelion"], limit=2)
    assert (some.pending, some.batches) == (2, [["ingest", "--labels=dandelion", "--limit=2"]])
    with pytest.raises(DataError, match="daisy"):
        ingest.plan(settings, catalog, labels=["daisy"])
    catalog.claim(3, worker="elsewhere:1:1")
    found = ingest.plan(settings, catalog)
    assert found.pending == 13, "a run that was killed has claims too, and they come back"
    assert found.message == "13 image(s) to fetch in 2 batch(es). Other runs have claimed 3; they are waited for."
    catalog.claim(1, worker="elsewhere:2:1", labels=["dandelion"])
    assert ingest.plan(settings, catalog, labels=["dandelion"]).pending == 3
    done = [(number, {"state": "stored"}) for number in range(1, 14)]
    for worker in ("elsewhere:1:1", "elsewhere:2:1"):
        catalog.finish(worker, done)
    catalog.finish("w:1:1", [(each.id, {"state": "stored"}) for each in catalog.claim(13, worker="w:1:1")])
    assert ingest.plan(settings, catalog).message == "Nothing new: no image record is pending."


def test_33_the_claims_of_a_run_that_died_elsewhere_are_waited_for(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Airflow repeats a killed task under another host's name long before the lease of its claims runs out."""
    monkeypatch.setattr(ingest, "PROGRESS_SECONDS", 0.1)
    publish(web, catalog, {f"{number}.jpg": picture(number) for number in range(10)})
    assert len(catalog.claim(4, worker="pod-a:7:1", lease_seconds=2)) == 4
    lines: list[str] = []
    report = ingest.run(settings, catalog, store, progress=lines.append)
    assert (report.stored, catalog.status().by_state) == (10, {"stored": 10})
    assert any("6 stored, waiting for 4 that other runs have claimed" in line for line in lines)


def test_33_a_run_ends_when_the_others_have_finished(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "PROGRESS_SECONDS", 0.1)
    publish(web, catalog, {f"{number}.jpg": picture(number) for number in range(3)}, "grass")
    publish(web, catalog, {"moss.jpg": picture(9)}, "moss")
    claims = catalog.claim(3, worker="pod-a:7:1")

    def finish_one(line: str) -> None:
        if claims and "waiting" in line:
            assert catalog.finish("pod-a:7:1", [(claims.pop().id, {"state": "stored"})]) == 1

    assert ingest.run(settings, catalog, store, labels=["moss"]).stored == 1, "they have nothing of that label"
    report = ingest.run(settings, catalog, store, progress=finish_one)
    assert (report.claimed, report.message) == (0, "Nothing new: no image record is pending.")
    assert not claims and catalog.status().by_state == {"stored": 4}


def test_33_others_that_finish_nothing_are_not_waited_for_without_end(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "OTHERS_SECONDS", 0.3)
    publish(web, catalog, {f"{number}.jpg": picture(number) for number in range(3)})
    catalog.claim(1, worker="pod-a:7:1")
    with pytest.raises(Unavailable, match=r"claimed 1 image\(s\) and finished none"):
        ingest.run(settings, catalog, store)
    assert catalog.status().by_state == {"claimed": 1, "stored": 2}


def test_the_metrics_say_what_the_report_says(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, tmp_path: Path
) -> None:
    settings.metrics_dir = tmp_path / "metrics"
    publish(web, catalog, {"1.jpg": picture(1), "2.jpg": picture(2), "3.jpg": 404, "4.jpg": b"no picture"})
    report = ingest.run(settings, catalog, store)
    (file,) = settings.metrics_dir.glob("*.prom")
    assert file.name == "lawnwatch_ingest.prom"
    samples = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in file.read_text().splitlines()
        if not line.startswith("#")
    }
    for outcome in ("stored", "gone", "quarantined", "failed", "blocked"):
        assert samples[f'lawnwatch_ingest_images_total{{outcome="{outcome}",slot="0"}}'] == getattr(report, outcome)
    assert samples['lawnwatch_ingest_bytes_total{slot="0"}'] == report.bytes > 0
    assert samples['lawnwatch_ingest_fetch_seconds_count{slot="0"}'] == 3, "an image that is not there was not fetched"
    assert samples['lawnwatch_ingest_in_flight{slot="0"}'] == 0
    assert samples['lawnwatch_ingest_duration_seconds{slot="0"}'] == report.seconds > 0


def test_runs_side_by_side_keep_their_metrics_and_repeat_no_series(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, tmp_path: Path
) -> None:
    settings.metrics_dir = folder = tmp_path / "metrics"
    publish(web, catalog, {"1.jpg": picture(1)})
    other = ingest.IngestMetrics(folder)
    other.write(ingest.IngestReport(stored=7), in_flight=3)
    ingest.run(settings, catalog, store)
    files = sorted(folder.glob("*.prom"))
    assert [file.name for file in files] == ["lawnwatch_ingest.prom", "lawnwatch_ingest_1.prom"]
    samples = [
        sample
        for file in files
        for family in text_string_to_metric_families(file.read_text())
        for sample in family.samples
    ]
    series = [(sample.name, *sorted(sample.labels.items())) for sample in samples]
    assert len(series) == len(set(series)), "node exporter refuses a series that another file has"
    assert sum(sample.value for sample in samples if sample.labels.get("outcome") == "stored") == 8
    other.close()
    publish(web, catalog, {"2.jpg": picture(2)})
    ingest.run(settings, catalog, store)
    assert sorted(folder.glob("*.prom")) == files, "a run takes the place of one that has ended"
    assert 'outcome="stored",slot="0"} 1.0' in files[0].read_text()


def test_claims_are_renewed_while_images_wait(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "LEASE_SECONDS", 0.6)
    web.hang_until, web.patience = lambda: False, 0.4
    settings.fetch.per_host, settings.fetch.attempts, settings.fetch.host_failures = 1, 1, 100
    publish(web, catalog, {f"hang{number}.jpg": 500 for number in range(4)})
    stolen: list[int] = []

    def steal(_: str) -> None:
        stolen.extend(record.id for record in catalog.claim(9, worker="elsewhere:1:1"))

    monkeypatch.setattr(ingest, "PROGRESS_SECONDS", 0.05)
    assert ingest.run(settings, catalog, store, progress=steal).failed == 4
    assert not stolen, "a claim that is alive must not be given to another worker"


def test_progress_says_how_far(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "PROGRESS_SECONDS", 0.01)
    publish(web, catalog, {f"{number}.jpg": picture(number) for number in range(30)})
    lines: list[str] = []
    say: Callable[[str], None] = lines.append
    ingest.run(settings, catalog, store, progress=say)
    assert any("of 30 images" in line for line in lines)
