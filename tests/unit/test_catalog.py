"""The catalog on SQLite: adding, importing, claiming, correcting. MariaDB: tests/integration/test_data_plane.py."""

from __future__ import annotations

import csv
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from lawnwatch import catalog as catalog_module
from lawnwatch.catalog import Base, Catalog, ImageRecord, database_faults, utc_now, worker_name
from lawnwatch.config import Settings
from lawnwatch.errors import Conflict, DataError, InputError, NotFound, SettingsError, Unavailable

pytestmark = pytest.mark.unit
URL = "https://photos.example/{}.jpg"


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    catalog = Catalog(Settings(home=tmp_path / "home"))
    catalog.migrate()
    return catalog


def test_the_migrations_build_the_tables_that_the_code_declares(catalog: Catalog) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with catalog.engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Base.metadata)
    mine = {"images", "labels", "label_history", "snapshots"}
    assert [each for each in differences if any(table in str(each) for table in mine)] == []


def test_migrating_again_changes_nothing(catalog: Catalog) -> None:
    catalog.add(URL.format(1), "grass")
    catalog.migrate()
    assert catalog.status().total == 1


# --- adding ---------------------------------------------------------------------------------------------------------


def test_24_adding_is_idempotent_and_a_second_label_is_a_conflict(catalog: Catalog) -> None:
    assert catalog.add(URL.format(1), "grass") == "added"
    assert catalog.add(f"  {URL.format(1)} ", " grass ") == "unchanged"
    assert catalog.add(URL.format(1), "dandelion") == "conflict"
    assert catalog.find(URL.format(1)).label.name == "grass"
    assert catalog.status().by_state == {"pending": 1}


@pytest.mark.parametrize(
    "url",
    [
        "",
        "   ",
        "example.org/a.jpg",
        "file:///etc/passwd",
        "https://",
        "https://a/\n",
        "http://[",
        "https://a/" + "x" * 2048,
    ],
)
def test_27_what_is_no_url_is_refused(catalog: Catalog, url: str) -> None:
    with pytest.raises(InputError):
        catalog.add(url if url != "https://a/\n" else "https://a/\nb", "grass")
    assert catalog.status().total == 0


@pytest.mark.parametrize("label", ["", " ", "unknown", "a\nb", "x" * 191, "a\x00"])
def test_27_what_is_no_label_is_refused(catalog: Catalog, label: str) -> None:
    with pytest.raises(InputError):
        catalog.add(URL.format(1), label)
    assert catalog.status().by_label == {}


def test_27_text_like_sql_is_text(catalog: Catalog) -> None:
    label = "'); DROP TABLE images; --"
    assert catalog.add("https://photos.example/'); DROP TABLE images; --", label) == "added"
    assert catalog.status().by_label == {label: 1}


# --- importing ------------------------------------------------------------------------------------------------------

ROWS = [
    (URL.format(1), "grass"),
    (URL.format(2), "dandelion"),
    (URL.format(1), "grass"),  # the same again
    (URL.format(1), "dandelion"),  # the same under another label
    ("not a url", "grass"),
    (URL.format(3), ""),
]


def write(file: Path) -> Path:
    if file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.writer(stream)
            writer.writerow(("id", "label", "url"))
            writer.writerows((number, label, url) for number, (url, label) in enumerate(ROWS))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps({"url": url, "label": label}) + "\n" for url, label in ROWS))
    else:
        urls, labels = zip(*ROWS, strict=True)
        pq.write_table(pa.table({"url": list(urls), "label": [label or None for label in labels]}), file)
    return file


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_imports_report_every_row_and_can_be_repeated(catalog: Catalog, tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name)
    first = catalog.import_file(file)
    assert (first.added, first.unchanged, first.conflicts, first.rejected) == (2, 1, 1, 2)
    again = catalog.import_file(file)
    assert (again.added, again.unchanged, again.conflicts, again.rejected) == (0, 3, 1, 2)
    assert catalog.status().by_label == {"dandelion": 1, "grass": 1}
    with Path(first.reject_file or "").open(newline="") as stream:
        rejects = list(csv.DictReader(stream))
    assert {(row["url"], row["label"]) for row in rejects} == {ROWS[3], ROWS[4], ROWS[5]}
    assert all(row["reason"] for row in rejects)


def test_odd_lines_of_a_file_are_rejected_one_by_one(catalog: Catalog, tmp_path: Path) -> None:
    lines = tmp_path / "odd.jsonl"
    lines.write_bytes(
        b'{"url": "https://a.example/1.jpg", "label": "grass"}\nnot json\n[1]\n\xff\xfe\n'
        b'{"url": "https://a.example/\xff.jpg", "label": "grass"}\n{"url": 5, "label": {}}\n'
    )
    report = catalog.import_file(lines)
    assert (report.added, report.rejected) == (1, 5)
    table = tmp_path / "odd.csv"
    table.write_text(f"url,label\n{'x' * 200_000},grass\nhttps://a.example/2.jpg\nhttps://a.example/3.jpg,grass,more\n")
    report = catalog.import_file(table)
    assert (report.added, report.rejected) == (0, 3), "a comma too many must not shift the label"


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", b"link,label\nx,y\n"), ("a.csv", b""), ("a.parquet", b"no parquet"), ("a.txt", b"url,label\n")],
)
def test_files_that_cannot_be_imported(catalog: Catalog, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError):
        catalog.import_file(tmp_path / name)
    with pytest.raises(InputError):
        catalog.import_file(tmp_path / "missing.csv")


def test_a_large_import_streams_in_batches_and_says_how_far_it_is(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_module, "PROGRESS_SECONDS", 0.0)
    file = tmp_path / "many.csv"
    file.write_text("url,label\n" + "".join(f"https://photos.example/{n}.jpg,grass\n" for n in range(25_000)))
    lines: list[str] = []
    assert catalog.import_file(file, on_progress=lines.append).added == 25_000
    assert re.fullmatch(r"10,000 rows, 10,000 of them new, [\d,]+/s, (39|40)%, about \d+ s left", lines[9])


# --- claiming -------------------------------------------------------------------------------------------------------


def fill(catalog: Catalog, count: int) -> None:
    for number in range(count):
        catalog.add(URL.format(number), "grass" if number % 2 else "dandelion")


def test_33_two_workers_never_hold_the_same_record(catalog: Catalog) -> None:
    fill(catalog, 60)
    taken: list[int] = []
    lock = threading.Lock()

    def work(name: str) -> None:
        while claimed := catalog.claim(4, worker=name, lease_seconds=60):
            with lock:
                taken.extend(record.id for record in claimed)

    threads = [threading.Thread(target=work, args=(f"elsewhere:{number}:1",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(set(taken)) and len(taken) == 60


def test_a_lease_that_ran_out_goes_to_another_and_the_late_answer_is_dropped(catalog: Catalog) -> None:
    fill(catalog, 1)
    (record,) = catalog.claim(1, worker="elsewhere:1:1", lease_seconds=-1)
    (again,) = catalog.claim(1, worker="elsewhere:2:1", lease_seconds=60)
    assert again.id == record.id
    late = {"state": "failed", "reason": "timeout"}
    assert catalog.finish("elsewhere:1:1", [(record.id, late)]) == 0
    assert catalog.find(str(record.id)).state == "claimed"
    assert catalog.finish("elsewhere:2:1", [(record.id, {"state": "gone", "reason": "http_404"})]) == 1
    assert catalog.find(str(record.id)).claimed_until is None


def test_a_living_worker_keeps_its_lease_and_a_dead_one_loses_it_at_once(catalog: Catalog) -> None:
    fill(catalog, 2)
    program = "from lawnwatch.catalog import worker_name; print(worker_name(), flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    name = child.stdout.readline().strip()
    assert len(catalog.claim(2, worker=name, lease_seconds=600)) == 2
    assert catalog.claim(2, worker=worker_name(), lease_seconds=600) == []
    child.kill()
    child.wait()
    assert len(catalog.claim(2, worker=worker_name(), lease_seconds=600)) == 2


def test_a_worker_with_a_reused_pid_is_another_one(catalog: Catalog) -> None:
    fill(catalog, 1)
    host = worker_name().split(":")[0]
    catalog.claim(1, worker=f"{host}:{os.getpid()}:1", lease_seconds=600)
    assert len(catalog.claim(1, worker=worker_name(), lease_seconds=600)) == 1


def test_claims_by_label(catalog: Catalog) -> None:
    fill(catalog, 6)
    claimed = catalog.claim(9, worker="elsewhere:1:1", labels=["grass"])
    assert [record.label.name for record in claimed] == ["grass"] * 3
    with pytest.raises(DataError, match="daisy"):
        catalog.claim(9, worker="elsewhere:1:1", labels=["daisy"])


# --- correcting -----------------------------------------------------------------------------------------------------


def test_retry_makes_finished_records_pending(catalog: Catalog) -> None:
    fill(catalog, 3)
    claimed = catalog.claim(3, worker="w:1:1")
    states = ("failed", "gone", "stored")
    catalog.finish("w:1:1", [(r.id, {"state": s, "attempts": 3}) for r, s in zip(claimed, states, strict=True)])
    assert catalog.retry() == 1
    assert catalog.retry("gone") == 1
    with pytest.raises(InputError):
        catalog.retry("stored")
    assert catalog.status().by_state == {"pending": 2, "stored": 1}
    assert catalog.find(str(claimed[0].id)).attempts == 0


def test_relabelling_keeps_the_history(catalog: Catalog) -> None:
    catalog.add(URL.format(1), "gras")
    catalog.relabel(URL.format(1), "grass", source="feedback")
    catalog.relabel(URL.format(1), "grass", source="feedback")
    shown = catalog.show(URL.format(1))
    assert (shown["label"], shown["label_source"]) == ("grass", "feedback")
    assert [change["label"] for change in shown["label_history"]] == ["gras"]
    json.dumps(shown, default=str)
    with pytest.raises(NotFound):
        catalog.relabel(URL.format(2), "grass")


def test_points_in_time_keep_their_zone(catalog: Catalog) -> None:
    catalog.add(URL.format(1), "grass")
    age = utc_now() - catalog.find(URL.format(1)).created_at
    assert timedelta(0) <= age < timedelta(minutes=1)
    with pytest.raises(sa.exc.StatementError), catalog.session() as session:
        session.execute(sa.update(ImageRecord).values(fetched_at=utc_now().replace(tzinfo=None)))


# --- the database ---------------------------------------------------------------------------------------------------


def test_an_exception_rolls_back(catalog: Catalog) -> None:
    fill(catalog, 1)
    with pytest.raises(RuntimeError), catalog.session() as session:
        session.execute(sa.delete(ImageRecord))
        raise RuntimeError
    assert catalog.status().total == 1


def test_a_lock_is_held_over_connections(catalog: Catalog) -> None:
    with catalog.exclusive("snapshot"):
        with pytest.raises(Conflict), Catalog(catalog.settings).exclusive("snapshot", timeout=0.2):
            pytest.fail("held twice")
        with catalog.exclusive("other"):
            pass
    with catalog.exclusive("snapshot"):
        pass


def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "catalog.db").mkdir()
    with pytest.raises(Unavailable):
        Catalog(Settings(home=tmp_path)).migrate()


def test_passwords_are_in_no_message(tmp_path: Path) -> None:
    secret = "s3cret-canary"
    gone = Catalog(Settings(home=tmp_path, database_url=f"mysql+pymysql://me:{secret}@127.0.0.1:9/lawnwatch"))
    with pytest.raises(Unavailable) as caught:
        gone.status()
    assert secret not in str(caught.value)
    with pytest.raises(SettingsError) as refused:
        Catalog(Settings(home=tmp_path, database_url=f"postgresql://me:{secret}@127.0.0.1/lawnwatch"))
    assert secret not in str(refused.value)


def test_work_is_repeated_while_the_database_is_away_and_given_up_in_time(catalog: Catalog) -> None:
    calls = 0

    def deadlock_twice() -> str:
        nonlocal calls
        calls += 1
        if calls < 3:
            with database_faults():
                raise sa.exc.OperationalError("UPDATE", {}, sqlite3.OperationalError(1213, "Deadlock found"))
        return "done"

    assert catalog.retried(deadlock_twice) == "done"

    def broken() -> None:
        nonlocal calls
        calls += 1
        with database_faults():
            raise sa.exc.OperationalError("UPDATE", {}, sqlite3.OperationalError(1045, "Access denied"))

    calls = 0
    with pytest.raises(Unavailable):
        catalog.retried(broken)
    assert calls == 1, "a refused password is not asked again"
