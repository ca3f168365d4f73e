"""Recheck on SQLite and a folder, against a web on loopback that changes: what died, what rotted, what is repaired."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from PIL import Image

from lawnwatch import cli, config, ingest, net, recheck
from lawnwatch.catalog import Catalog, ImageRecord
from lawnwatch.config import Settings
from lawnwatch.database import utc_now
from lawnwatch.errors import InputError, Unavailable
from lawnwatch.store import LocalStore

pytestmark = pytest.mark.unit
SITE = "https://photos.example/"


def picture(seed: int) -> bytes:
    """A JPEG of its own."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((120, 90), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


class Web(http.server.ThreadingHTTPServer):
    """Pages from a table, each with the hash of its bytes as ETag; an integer is that status."""

    daemon_threads = True

    def __init__(self) -> None:
        self.pages: dict[str, bytes | int] = {}
        self.answered: Counter[int] = Counter()
        super().__init__(("127.0.0.1", 0), Page)
        self.base = f"http://127.0.0.1:{self.server_address[1]}/"


class Page(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path.lstrip("/"), 404)
        body = page if isinstance(page, bytes) else b""
        status, etag = (200 if isinstance(page, bytes) else page), f'"{hashlib.md5(body).hexdigest()}"'  # noqa: S324
        if status == 200 and self.headers["If-None-Match"] == etag:
            status, body = 304, b""
        self.server.answered[status] += 1
        self.send_response(status)
        self.send_header("ETag", etag)
        self.send_header("Location", "http://[/x")  # of a redirect
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

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
        fetch={"allow_cidrs": ["127.0.0.0/8"], "origin_map": {SITE: web.base}, "concurrency": 4, "host_failures": 99},
    )


@pytest.fixture
def stored(settings: Settings, catalog: Catalog, store: LocalStore, web: Web) -> dict[str, bytes]:
    """Six stored pictures; `twin.jpg` has the bytes of `0.jpg`."""
    pages = {f"{number}.jpg": picture(number) for number in range(5)} | {"twin.jpg": picture(0)}
    web.pages |= pages
    for name in pages:
        catalog.add(SITE + name, "grass")
    ingest.run(settings, catalog, store)
    web.answered.clear()
    return pages


def file_of(catalog: Catalog, store: LocalStore, name: str) -> Path:
    return store.root / str(catalog.find(SITE + name).object_key)


def test_all_is_sound(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, stored: dict[str, bytes]
) -> None:
    report = recheck.run(settings, catalog, store)
    assert (report.checked, report.same, report.sound, report.lost, report.repaired) == (6, 6, 6, 0, 0)
    assert web.answered == {304: 6}, "no picture was sent again"
    record = catalog.find(SITE + "0.jpg")
    assert record.source_status == "same" and record.checked_at is not None


def test_what_became_of_the_sources(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, stored: dict[str, bytes]
) -> None:
    with catalog.session() as session:  # a source that knows no ETag gives the same bytes again
        session.execute(sa.update(ImageRecord).where(ImageRecord.url == SITE + "4.jpg").values(etag=None))
    web.pages |= {"0.jpg": picture(77), "1.jpg": 404, "2.jpg": 410, "3.jpg": 503}
    settings.fetch.attempts = 1
    report = recheck.run(settings, catalog, store)
    assert (report.same, report.changed, report.gone, report.unreachable, report.sound) == (2, 1, 2, 1, 6)
    assert (report.changed_urls, sorted(report.gone_urls)) == ([SITE + "0.jpg"], [SITE + "1.jpg", SITE + "2.jpg"])
    found = {name: catalog.find(SITE + name) for name in stored}
    assert {name: record.source_status for name, record in found.items()} == {
        "0.jpg": "changed", "1.jpg": "gone", "2.jpg": "gone", "3.jpg": "unreachable", "4.jpg": "same",
        "twin.jpg": "same",
    }  # fmt: skip
    assert {record.state for record in found.values()} == {"stored"}, "what we have is sound, whatever they did"
    assert found["4.jpg"].etag, "what the source says of itself is kept for the next time"
    settings.fetch.allow_hosts = ["elsewhere.example"]
    assert recheck.run(settings, catalog, store).gone == 6, "a source that must not be asked is as good as gone"


def test_23_one_hostile_redirect_does_not_end_the_recheck(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, stored: dict[str, bytes]
) -> None:
    web.pages["1.jpg"] = 302
    report = recheck.run(settings, catalog, store)
    assert (report.checked, report.same, report.gone_urls) == (6, 5, [SITE + "1.jpg"])
    file_of(catalog, store, "1.jpg").unlink()
    assert recheck.run(settings, catalog, store).lost_urls == [SITE + "1.jpg"]


def test_rotten_and_missing_objects_are_put_back(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, stored: dict[str, bytes]
) -> None:
    file_of(catalog, store, "1.jpg").write_bytes(b"rotten")
    file_of(catalog, store, "2.jpg").unlink()
    truncated = file_of(catalog, store, "3.jpg")
    truncated.write_bytes(truncated.read_bytes()[:-1])
    before = states(catalog)
    report = recheck.run(settings, catalog, store)
    assert (report.sound, report.repaired, report.lost) == (3, 3, 0)
    assert sorted(report.repaired_urls) == [f"{SITE}{number}.jpg" for number in (1, 2, 3)]
    for name, data in stored.items():
        assert file_of(catalog, store, name).read_bytes() == data
    assert states(catalog) == before
    again = recheck.run(settings, catalog, store)
    assert (again.sound, again.repaired) == (6, 0)


def test_an_object_is_put_back_from_another_url_of_the_same_picture(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, stored: dict[str, bytes]
) -> None:
    file_of(catalog, store, "0.jpg").write_bytes(b"rotten")
    web.pages["0.jpg"] = 404
    report = recheck.run(settings, catalog, store)
    assert report.lost == 0 and report.repaired >= 1
    assert file_of(catalog, store, "0.jpg").read_bytes() == stored["0.jpg"]
    assert catalog.find(SITE + "0.jpg").source_status == "gone"


def test_what_no_source_gives_any_more_is_quarantined_with_its_copies(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, stored: dict[str, bytes]
) -> None:
    file_of(catalog, store, "0.jpg").unlink()
    file_of(catalog, store, "1.jpg").write_bytes(b"rotten")
    web.pages |= {"0.jpg": 404, "twin.jpg": picture(55), "1.jpg": 500}
    settings.fetch.attempts = 1
    first = recheck.run(settings, catalog, store, limit=1)
    assert first.lost_urls == [SITE + "0.jpg", SITE + "twin.jpg"], "a copy's record must not wait for its own turn"
    report = recheck.run(settings, catalog, store)
    assert (first.lost, report.lost, report.lost_urls) == (2, 1, [SITE + "1.jpg"])
    assert "could not be repaired" in report.message
    for name in ("0.jpg", "1.jpg", "twin.jpg"):
        record = catalog.find(SITE + name)
        assert record.state == "quarantined" and (record.reason or "").startswith("object_lost: ")
    again = recheck.run(settings, catalog, store)
    assert (again.checked, again.lost) == (3, 0), "what is lost is said once"
    # The way back: the source gives it again, and ingest replaces the rotten object.
    web.pages |= {"1.jpg": stored["1.jpg"]}
    catalog.retry("quarantined")
    settings.data.max_bad_ratio = 1.0
    ingest.run(settings, catalog, store)
    assert catalog.find(SITE + "1.jpg").state == "stored"
    assert file_of(catalog, store, "1.jpg").read_bytes() == stored["1.jpg"]


def test_objects_alone_ask_no_source_that_is_not_needed(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, stored: dict[str, bytes]
) -> None:
    file_of(catalog, store, "3.jpg").unlink()
    report = recheck.run(settings, catalog, store, sources=False)
    assert (report.sound, report.repaired, report.same) == (5, 1, 0)
    assert web.answered == {200: 1}
    assert catalog.find(SITE + "0.jpg").source_status is None
    web.answered.clear()
    file_of(catalog, store, "3.jpg").unlink()
    assert recheck.run(settings, catalog, store, objects=False).same == 6
    assert not file_of(catalog, store, "3.jpg").exists()
    with pytest.raises(InputError):
        recheck.run(settings, catalog, store, sources=False, objects=False)


def test_the_longest_unchecked_come_first(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, stored: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(recheck, "PAGE", 2)
    for number in range(1, 5):
        assert recheck.run(settings, catalog, store, limit=2).checked == 2
        checked = [catalog.find(SITE + name).checked_at for name in stored]
        assert sum(moment is not None for moment in checked) == min(2 * number, 6)
    now = utc_now()
    with catalog.session() as session:
        for days, name in enumerate(stored):
            moment = now - timedelta(days=days * 10)
            session.execute(sa.update(ImageRecord).where(ImageRecord.url == SITE + name).values(checked_at=moment))
    assert recheck.run(settings, catalog, store, older_than_days=25).checked == 3, "30, 40 and 50 days"
    assert recheck.run(settings, catalog, store, older_than_days=25).checked == 0
    assert recheck.run(settings, catalog, store).checked == 6, "all pages of those that were looked at before"
    with catalog.session() as session:
        session.execute(sa.update(ImageRecord).values(checked_at=now - timedelta(days=1)))
        oldest = SITE + list(stored)[4]
        session.execute(
            sa.update(ImageRecord).where(ImageRecord.url == oldest).values(checked_at=now - timedelta(days=9))
        )
    assert recheck.run(settings, catalog, store, limit=1).checked == 1
    assert catalog.find(oldest).checked_at > now, "the one that was looked at the longest ago"
    assert recheck.run(settings, catalog, store, limit=2).checked == 2, "of those of one moment, no more and no fewer"


def test_an_outage_of_the_store_condemns_nothing(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, stored: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def away(*_: Any) -> Any:
        raise Unavailable("The store does not answer.")

    monkeypatch.setattr(ingest, "PATIENCE", 0.2)
    with monkeypatch.context() as broken:
        broken.setattr(store, "open", away)
        with pytest.raises(Unavailable):
            recheck.run(settings, catalog, store)
    assert catalog.status().by_state == {"stored": 6}
    assert recheck.run(settings, catalog, store).sound == 6


def test_a_loss_is_exit_code_4_with_the_whole_report(
    settings: Settings, catalog: Catalog, store: LocalStore, web: Web, stored: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("LAWNWATCH_HOME", str(settings.home))
    monkeypatch.setenv("LAWNWATCH_FETCH__ALLOW_CIDRS", '["127.0.0.0/8"]')
    monkeypatch.setenv("LAWNWATCH_FETCH__ORIGIN_MAP", json.dumps({SITE: web.base}))
    config.get_settings.cache_clear()
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the test's process keeps its own handlers
    file_of(catalog, store, "2.jpg").unlink()
    web.pages["2.jpg"] = 404
    for code in (4, 0):
        monkeypatch.setattr(sys, "argv", ["lawnwatch", "data", "recheck", "--older-than", "0"])
        with pytest.raises(SystemExit) as left:
            cli.main()
        printed = json.loads(capsys.readouterr().out)
        assert int(left.value.code or 0) == code
        assert printed["lost_urls"] == ([SITE + "2.jpg"] if code else [])


def states(catalog: Catalog) -> list[tuple[Any, ...]]:
    with catalog.session() as session:
        columns = (ImageRecord.url, ImageRecord.state, ImageRecord.reason, ImageRecord.sha256, ImageRecord.object_key)
        return [tuple(row) for row in session.execute(sa.select(*columns).order_by(ImageRecord.id))]
