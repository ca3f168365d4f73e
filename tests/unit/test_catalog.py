"""The catalog on SQLite: adding, importing, claiming, correcting. MariaDB: tests/integration/test_catalog_mysql.py."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from lawnwatch import catalog as catalog_module
from lawnwatch.catalog import Catalog, ImageRecord, worker_name
from lawnwatch.config import Settings
from lawnwatch.database import alembic_config, database_faults, known_revisions, metadata, utc_now
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
        differences = compare_metadata(MigrationContext.configure(connection), metadata)
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


def test_a_server_that_wants_tls_is_an_error_that_says_how() -> None:
    with pytest.raises(Unavailable, match="encrypted connections only") as refused, database_faults():
        raise sa.exc.OperationalError("SELECT", {}, sqlite3.OperationalError(3159, "insecure transport"))
    assert "?ssl_ca=FILE" in refused.value.hint


# --- importing: what is odd -----------------------------------------------------------------------------------------


def test_24_within_a_file_the_first_label_wins_unless_the_catalog_has_one(catalog: Catalog, tmp_path: Path) -> None:
    catalog.add(URL.format(1), "grass")
    file = tmp_path / "a.csv"
    rows = [(1, "moss"), (1, "grass"), (2, "clover"), (2, "grass"), (2, "clover")]
    file.write_text("url,label\n" + "".join(f"{URL.format(number)},{label}\n" for number, label in rows))
    report = catalog.import_file(file)
    assert (report.added, report.unchanged, report.conflicts) == (1, 2, 2)
    assert catalog.status().by_label == {"clover": 1, "grass": 1}, "moss is nobody's label"
    with Path(report.reject_file or "").open(newline="") as stream:
        rejects = [(row["line"], row["label"], row["reason"]) for row in csv.DictReader(stream)]
    assert [(line, label) for line, label, _ in rejects] == [("2", "moss"), ("5", "grass")]
    assert "in the catalog as grass" in rejects[0][2] and "in the catalog as clover" in rejects[1][2]


def test_a_reject_file_is_there_only_while_something_is_rejected(catalog: Catalog, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"url": "https://a.example/\\ud800.jpg", "label": "grass"}\n')
    rejects = Path(catalog.import_file(file).reject_file or "")
    assert "\\ud800" in rejects.read_text(), "text that UTF-8 cannot hold is rejected, and is no fault of ours"
    assert list(rejects.parent.iterdir()) == [rejects]
    file.write_text('{"url": "https://a.example/1.jpg", "label": "grass"}\n\n')
    assert catalog.import_file(file).reject_file is None
    assert list(rejects.parent.iterdir()) == []


def test_cells_that_are_not_text(catalog: Catalog, tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    labels = [0, True, 1.5, ["grass"], None, "7"]
    lines.write_text("".join(json.dumps({"url": URL.format(n), "label": x}) + "\n" for n, x in enumerate(labels)))
    report = catalog.import_file(lines)
    assert (report.added, report.rejected) == (2, 4) and catalog.status().by_label == {"0": 1, "7": 1}
    table = tmp_path / "a.parquet"
    urls = pa.array([URL.format(10).encode(), b"https://a.example/\xff", None], pa.binary())
    pq.write_table(pa.table({"url": urls, "label": pa.array([1, 2, 3])}), table)
    report = catalog.import_file(table)
    assert (report.added, report.rejected) == (1, 2)


@pytest.mark.parametrize("column", ["string", "dictionary"])
def test_a_cell_of_a_table_that_is_not_utf_8_costs_its_own_row_only(
    catalog: Catalog, tmp_path: Path, column: str
) -> None:
    labels = [b"grass", b"gr\xffs", b"grass"]
    text = pa.array(labels, pa.binary()).view(pa.string())  # as a program that does not look would write it
    table = tmp_path / "a.parquet"
    urls = [URL.format(n) for n in range(3)]
    pq.write_table(
        pa.table({"url": urls, "label": text.dictionary_encode() if column == "dictionary" else text}), table
    )
    report = catalog.import_file(table)
    assert (report.added, report.rejected, catalog.status().by_label) == (2, 1, {"grass": 2})
    ((line, url, reason),) = rejects(report)
    assert (line, url) == (2, urls[1]) and "utf-8" in reason


@pytest.mark.parametrize("name", ["bom.csv", "bom.jsonl"])
def test_the_mark_that_some_programs_begin_a_file_with_is_passed_over(
    catalog: Catalog, tmp_path: Path, name: str
) -> None:
    rows = "url,label\nhttps://a.example/1.jpg,grass\n"
    if name.endswith(".jsonl"):
        rows = json.dumps({"url": URL.format(1), "label": "grass"}) + "\n"
    (tmp_path / name).write_text(rows, encoding="utf-8-sig")
    report = catalog.import_file(tmp_path / name)
    assert (report.added, report.rejected) == (1, 0)


def test_a_quote_that_is_never_closed_and_a_line_that_never_ends(catalog: Catalog, tmp_path: Path) -> None:
    open_quote = tmp_path / "quote.csv"
    open_quote.write_text(f'url,label\n{URL.format(1)},grass\n"{URL.format(2)},grass\n' + "x" * 200_000)
    report = catalog.import_file(open_quote)
    assert report.added == 1 and report.rejected >= 1
    assert Path(report.reject_file or "").read_text().splitlines()[1].startswith("3,")
    endless = tmp_path / "endless.jsonl"
    endless.write_text("x" * 3_500_000 + "\n" + json.dumps({"url": URL.format(3), "label": "grass"}) + "\n")
    report = catalog.import_file(endless)
    assert (report.added, report.rejected) == (1, 1)
    assert "2," not in Path(report.reject_file or "").read_text().splitlines()[1][:2]


def rejects(report: catalog_module.ImportReport) -> list[tuple[int, str, str]]:
    """Line, URL and reason of each rejected row."""
    with Path(report.reject_file or "").open(newline="") as stream:
        return [(int(row["line"]), row["url"], row["reason"]) for row in csv.DictReader(stream)]


@pytest.mark.parametrize("odd", [(10,), (10, 310), (10, 11), (2999,)])
def test_a_stray_quote_costs_its_own_row_only(catalog: Catalog, tmp_path: Path, odd: tuple[int, ...]) -> None:
    file = tmp_path / "quotes.csv"
    rows = [(URL.format(n), '"grass' if n in odd else '"grass, mown"' if n % 7 else "grass") for n in range(3000)]
    file.write_text("url,label\n" + "\n".join(f"{url},{label}" for url, label in rows))
    report = catalog.import_file(file)
    assert (report.added, report.rejected) == (3000 - len(odd), len(odd))
    assert rejects(report) == [(n + 2, URL.format(n), "a quote is not closed") for n in odd]


def test_a_column_that_nobody_reads_may_hold_line_ends(catalog: Catalog, tmp_path: Path) -> None:
    file = tmp_path / "notes.csv"
    rows = [
        [URL.format(1), "grass", 'mown\nand, as they say, "short"\n\ngreen'],
        [URL.format(2) + "?a,b", "dandelion", ""],
        [URL.format(3), "grass\nand moss", "no label has two lines"],
        [URL.format(4), "grass", "one\r\ntwo"],
    ]
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([["url", "label", "note"], *rows])
    report = catalog.import_file(file)
    assert (report.added, catalog.status().by_label) == (3, {"dandelion": 1, "grass": 2})
    assert [line for line, _, _ in rejects(report)] == [7, 8], "each line of the row that cannot be one"
    with file.open("a") as stream:  # a quote that is open beside such a column
        stream.write(f'{URL.format(5)},grass,"mown\n{URL.format(6)},grass,"short, green"\n{URL.format(7)},grass,\n')
    report = catalog.import_file(file)
    assert report.added == 2 and rejects(report)[-1] == (11, URL.format(5), "a quote is not closed")


def test_lines_after_an_open_quote_are_not_kept_without_end(catalog: Catalog, tmp_path: Path) -> None:
    file = tmp_path / "open.csv"
    file.write_text(f'url,label\n{URL.format(1)},"grass\n' + '","\n' * 1000 + f"{URL.format(2)},grass\n")
    report = catalog.import_file(file)
    assert (report.added, report.rejected) == (1, 1001)


@pytest.mark.parametrize("source", ["", "x" * 17, "a\nb"])
def test_what_is_no_label_source_is_refused(catalog: Catalog, tmp_path: Path, source: str) -> None:
    """The server would cut it off in silence."""
    with pytest.raises(InputError, match="label source"):
        catalog.import_file(write(tmp_path / "rows.csv"), source=source)


def test_a_table_without_a_setting_is_read_from_the_catalogs_own_database(catalog: Catalog) -> None:
    with catalog.engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE plants_data (id INTEGER PRIMARY KEY, url_source TEXT, label TEXT)")
        rows = [(number, URL.format(number), "grass") for number in range(7)]
        connection.exec_driver_sql("INSERT INTO plants_data VALUES (?, ?, ?)", rows)
    assert catalog.import_table("plants_data").added == 7
    assert catalog.import_table("plants_data").unchanged == 7
    nowhere = Settings(home=catalog.settings.home, import_database_url="sqlite:////nowhere/plants.db")
    with pytest.raises(InputError, match="LAWNWATCH_IMPORT_DATABASE_URL names a SQLite file that does not exist"):
        Catalog(nowhere).import_table("plants_data")
    away = Settings(home=catalog.settings.home, import_database_url="mysql+pymysql://me:canary@127.0.0.1:9/plants")
    with pytest.raises(Unavailable, match="LAWNWATCH_IMPORT_DATABASE_URL") as caught:
        Catalog(away).import_table("plants_data")
    assert "canary" not in str(caught.value)


# --- exporting and looking ------------------------------------------------------------------------------------------


def finish_all(catalog: Catalog, *outcomes: dict[str, object]) -> list[int]:
    """Claim as many records as there are outcomes and record those."""
    claimed = catalog.claim(len(outcomes), worker="w:1:1")
    assert catalog.finish("w:1:1", list(zip([r.id for r in claimed], outcomes, strict=True))) == len(outcomes)
    return [record.id for record in claimed]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_an_export_imported_again_changes_nothing(
    catalog: Catalog, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_module, "PAGE", 2)
    for number, label in enumerate(("grass", "=1+1", 'a "quoted", one', "Löwenzahn", "grass")):
        catalog.add(URL.format(number), label)
    stored = {"state": "stored", "width": 4, "brightness": 0.5, "fetched_at": utc_now(), "sha256": "0" * 64}
    finish_all(catalog, stored, {"state": "gone", "reason": "http_404: gone, for good\nand ever"})
    file = tmp_path / f"all.{ending}"
    assert catalog.export(file) == 5
    assert list(tmp_path.glob(".*")) == []
    report = catalog.import_file(file)
    assert (report.added, report.unchanged, report.conflicts, report.rejected) == (0, 5, 0, 0)
    fresh = Catalog(Settings(home=tmp_path / "fresh"))
    fresh.migrate()
    assert fresh.import_file(file).added == 5
    assert fresh.status().by_label == catalog.status().by_label
    rows = pq.read_table(file).to_pylist() if ending == "parquet" else None
    if ending == "csv":
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    elif ending == "jsonl":
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows is not None and rows[1]["label"] == "=1+1", "cells are written as they are"
    assert (int(rows[0]["width"]), float(rows[0]["brightness"]), rows[1]["state"]) == (4, 0.5, "gone")
    assert str(rows[0]["fetched_at"])[:10] == f"{utc_now():%Y-%m-%d}"


def test_exports_are_filtered_and_whole_or_not_there(catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog, 4)
    finish_all(catalog, {"state": "gone", "reason": "http_404"})
    file = tmp_path / "some.csv"
    assert catalog.export(file, state="gone") == 1
    assert catalog.export(file, label="grass") == 2
    before = file.read_text()
    with pytest.raises(InputError, match="lost"):
        catalog.export(file, state="lost")
    with pytest.raises(DataError, match="daisy"):
        catalog.export(file, label="daisy")
    with pytest.raises(InputError, match=r"\.xlsx"):
        catalog.export(tmp_path / "some.xlsx")
    with pytest.raises(InputError, match="cannot be written"):
        catalog.export(tmp_path / "nowhere" / "some.csv")
    assert file.read_text() == before and [each.name for each in tmp_path.iterdir() if each.is_file()] == ["some.csv"]


def test_status_counts_states_labels_and_both(catalog: Catalog) -> None:
    fill(catalog, 5)
    finish_all(catalog, {"state": "gone", "reason": "http_404: no"}, {"state": "stored"})
    status = catalog.status()
    assert status.by_state == {"pending": 3, "stored": 1, "gone": 1}
    assert status.by_label == {"dandelion": 3, "grass": 2}
    assert status.by_label_and_state == {"dandelion": {"pending": 2, "gone": 1}, "grass": {"pending": 1, "stored": 1}}
    assert status.reasons == {"http_404: no": 1}


def test_records_are_listed_by_state_label_and_the_beginning_of_their_reason(catalog: Catalog) -> None:
    fill(catalog, 6)
    reasons = ("label_conflict: a", "label_conflict: b", "label%: c")
    ids = finish_all(catalog, *({"state": "quarantined", "reason": reason} for reason in reasons))
    found = catalog.select(state="quarantined", reason="label_conflict")
    assert [(record.id, record.reason) for record in found] == list(zip(ids[:2], reasons[:2], strict=True))
    assert [record.id for record in catalog.select(reason="label%")] == [ids[2]], "% stands for itself"
    assert [record.id for record in catalog.select(label="grass", limit=2)] == [2, 4]
    assert [record.id for record in catalog.select(label="grass", after=4)] == [6]


# --- claims that were lost ------------------------------------------------------------------------------------------


def test_a_picture_that_kills_its_workers_is_given_up_after_five(catalog: Catalog) -> None:
    fill(catalog, 1)
    for number in range(5):
        (taken,) = catalog.claim(1, worker="elsewhere:8:1")
        assert taken.lost_claims == number
        assert catalog.finish("elsewhere:8:1", [(1, {"state": "pending"})]) == 1  # given back, not lost
        assert len(catalog.claim(1, worker=f"elsewhere:{number}:1", lease_seconds=-1)) == 1
    assert catalog.claim(1, worker="elsewhere:9:1") == []
    killer = catalog.find("1")
    assert (killer.state, killer.lost_claims, killer.claimed_by) == ("failed", 5, None)
    assert (killer.reason or "").startswith("worker_died: ")
    assert catalog.retry(reason="worker_died") == 1
    assert catalog.find("1").lost_claims == 0
    catalog.claim(1, worker="elsewhere:1:1", lease_seconds=-1)
    assert catalog.claim(1, worker="elsewhere:2:1")[0].lost_claims == 1
    assert catalog.finish("elsewhere:2:1", [(1, {"state": "gone", "reason": "http_404"})]) == 1
    assert catalog.find("1").lost_claims == 0


def test_a_picture_that_kills_its_workers_condemns_no_neighbour(catalog: Catalog) -> None:
    """What workers died with comes last, in ever smaller groups, those first that the fewest died with."""
    fill(catalog, 100)
    deadly, died_with = 50, []
    for number in itertools.count():
        worker = f"elsewhere:{number}:1"
        ids = [record.id for record in catalog.claim(200, worker=worker)]
        if deadly in ids:
            died_with.append(len(ids))
            catalog.renew(worker, ids, lease_seconds=-1)
        elif ids:
            assert catalog.finish(worker, [(each, {"state": "stored"}) for each in ids]) == len(ids)
        else:
            break
        if number == 0:
            fill(catalog, 103)
            assert len(catalog.claim(200, worker="w:1:1", suspects=False, lease_seconds=-1)) == 3
            assert catalog.claim(200, worker="w:1:1", suspects=False) == []
    assert died_with == [100, 64, 16, 4, 1]
    assert catalog.status().by_state == {"stored": 102, "failed": 1}
    assert catalog.find(str(deadly)).state == "failed"


def test_a_renewed_lease_lasts_and_a_lost_one_cannot_be_renewed(catalog: Catalog) -> None:
    fill(catalog, 2)
    catalog.claim(2, worker="elsewhere:1:1", lease_seconds=-1)
    assert catalog.renew("elsewhere:1:1", [1], lease_seconds=600) == 1
    assert [record.id for record in catalog.claim(2, worker="elsewhere:2:1")] == [2]
    assert catalog.renew("elsewhere:1:1", [1, 2], lease_seconds=600) == 1


def test_several_labels_share_a_claim(catalog: Catalog) -> None:
    for number in range(20):
        catalog.add(URL.format(number), "grass" if number < 16 else "moss")
    labels = [record.label.name for record in catalog.claim(8, worker="w:1:1", labels=["grass", "moss"])]
    assert sorted(labels) == ["grass"] * 4 + ["moss"] * 4
    assert len(catalog.claim(8, worker="w:1:1", labels=["moss", "grass"])) == 8


class LostAnswer:
    """The server commits, and its answer does not arrive: what a driver says then, once."""

    def __init__(self, catalog: Catalog) -> None:
        self.lost = False
        self.catalog = catalog
        self.commit = catalog.engine.dialect.do_commit

    def __enter__(self) -> None:
        def commit(connection: Any) -> None:
            self.commit(connection)
            if not self.lost:
                self.lost = True
                raise sqlite3.OperationalError(2013, "Lost connection to server during query")

        self.catalog.engine.dialect.do_commit = commit  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        self.catalog.engine.dialect.do_commit = self.commit  # type: ignore[method-assign]
        assert self.lost


def test_28_a_claim_whose_answer_was_lost_is_found_again(catalog: Catalog) -> None:
    fill(catalog, 6)
    with LostAnswer(catalog):
        claimed = catalog.claim(3, worker="w:1:1")
    assert [record.id for record in claimed] == [1, 2, 3]
    assert catalog.status().by_state == {"pending": 3, "claimed": 3}


def test_28_outcomes_whose_answer_was_lost_count_once(catalog: Catalog) -> None:
    fill(catalog, 3)
    claimed = catalog.claim(3, worker="w:1:1")
    with LostAnswer(catalog):
        assert catalog.finish("w:1:1", [(record.id, {"state": "stored"}) for record in claimed]) == 3
    assert catalog.finish("w:1:1", [(record.id, {"state": "gone"}) for record in claimed]) == 0
    assert catalog.status().by_state == {"stored": 3}


# --- correcting: what is chosen -------------------------------------------------------------------------------------


def test_retry_takes_one_image_a_label_or_a_reason(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_module, "PAGE", 2)
    fill(catalog, 8)
    failed = [{"state": "failed", "reason": f"http_50{number % 2}: no"} for number in range(7)]
    finish_all(catalog, *failed, {"state": "gone", "reason": "http_404"})
    assert catalog.retry(image="8") == 1 and catalog.retry(image=URL.format(0)) == 1
    assert catalog.retry(reason="http_501", label="grass") == 3
    assert catalog.retry(reason="http_50_") == 0
    assert catalog.retry() == 3
    assert catalog.status().by_state == {"pending": 8}
    with pytest.raises(InputError, match="pending"):
        catalog.retry(image="8")
    with pytest.raises(NotFound):
        catalog.retry(image="99")


def test_25_relabelling_frees_a_picture_that_its_labels_had_quarantined(catalog: Catalog) -> None:
    fill(catalog, 2)
    finish_all(
        catalog, {"state": "quarantined", "reason": "label_conflict: x"}, {"state": "quarantined", "reason": "corrupt"}
    )
    for image in ("1", "2"):
        catalog.relabel(image, "clover", source="feedback")
    assert (catalog.find("1").state, catalog.find("1").reason) == ("stored", None)
    assert catalog.find("2").state == "quarantined", "another label does not make the bytes good"
    assert [each["label"] for each in catalog.show("1")["label_history"]] == ["dandelion"]


# --- the database: what it says -------------------------------------------------------------------------------------


def test_an_up_to_date_schema_costs_no_alembic(catalog: Catalog) -> None:
    program = (
        "import sys; from lawnwatch.catalog import Catalog; from lawnwatch.config import Settings\n"
        f"catalog = Catalog(Settings(home={str(catalog.settings.home)!r})); catalog.migrate()\n"
        "sys.exit('alembic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_revisions_are_those_that_alembic_sees(catalog: Catalog) -> None:
    from alembic.script import ScriptDirectory

    with catalog.engine.connect() as connection:
        script = ScriptDirectory.from_config(alembic_config(connection))
        assert [each.revision for each in script.walk_revisions()][::-1] == known_revisions()


def test_a_schema_of_a_newer_lawnwatch_is_refused(catalog: Catalog) -> None:
    with catalog.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SettingsError, match=r"schema is 9999; this lawnwatch knows only up to"):
        catalog.migrate()


def test_35_a_full_disk_is_said_and_a_rerun_finishes(catalog: Catalog, tmp_path: Path) -> None:
    def small(connection: Any, _record: Any) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 100}")

    file = tmp_path / "many.csv"
    file.write_text("url,label\n" + "".join(f"{URL.format(number)},grass\n" for number in range(5000)))
    catalog.engine.dispose()
    sa.event.listen(catalog.engine, "connect", small)
    with pytest.raises(Unavailable, match="no space left on its disk") as caught:
        catalog.import_file(file)
    assert "rows had been imported" in str(caught.value)
    sa.event.remove(catalog.engine, "connect", small)
    catalog.engine.dispose()
    report = catalog.import_file(file)
    assert report.added + report.unchanged == 5000 and report.unchanged > 0


def test_a_locked_database_passes(catalog: Catalog) -> None:
    with catalog.engine.connect() as holder:
        holder.exec_driver_sql("SELECT 1")  # BEGIN IMMEDIATE: the only writer
        other = Catalog(catalog.settings)
        sa.event.listen(other.engine, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout=10"))
        with pytest.raises(Unavailable, match="SQLITE_BUSY"):
            other.retried(other.status, patience=0.1)
        threading.Timer(0.3, holder.rollback).start()
        assert other.retried(other.status).total == 0
