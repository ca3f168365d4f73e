"""The catalog on a real MariaDB: killed migrations, disturbed imports, a frozen server, deadlocks, claims at scale.

The migrations are walked on SQLite too, in the same way.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command

from lawnwatch import catalog as catalog_module
from lawnwatch import key_table
from lawnwatch.catalog import Catalog, ImageRecord
from lawnwatch.config import Settings
from lawnwatch.database import MIGRATION_TIMEOUT, alembic_config, known_revisions
from lawnwatch.errors import InputError, Unavailable

pytestmark = pytest.mark.integration
REVISIONS = known_revisions()


@pytest.fixture
def catalog(tmp_path: Path, mariadb: str) -> Catalog:
    catalog = Catalog(Settings(home=tmp_path / "home", database_url=mariadb))
    catalog.migrate()
    return catalog


def write(file: Path, rows: int, label: str = "grass") -> Path:
    file.write_text("url,label\n" + "".join(f"https://photos.example/{n}.jpg,{label}\n" for n in range(rows)))
    return file


def table(catalog: Catalog) -> list[tuple[str, str, str]]:
    with catalog.session() as session:
        records = session.scalars(sa.select(ImageRecord).order_by(ImageRecord.url))
        return [(record.url, record.label.name, record.state) for record in records]


# --- migrations -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "mariadb"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Catalog:
    """A database without any table."""
    if request.param == "sqlite":
        return Catalog(Settings(home=tmp_path / "home"))
    return Catalog(Settings(home=tmp_path / "home", database_url=request.getfixturevalue("mariadb")))


def move(catalog: Catalog, direction: Callable[..., None], revision: str) -> None:
    with catalog.engine.connect() as connection:
        direction(alembic_config(connection), revision)
        connection.commit()


def pretend(catalog: Catalog, revision: str) -> None:
    """The state that a kill leaves between the last DDL statement of a migration and the note that it was done."""
    move(catalog, lambda config, to: command.stamp(config, to, purge=True), revision)


def check(catalog: Catalog) -> None:
    """`alembic check`: what the migrations build is what the code declares."""
    with catalog.engine.connect() as connection:
        command.check(alembic_config(connection))


def test_a_migration_killed_before_its_note_runs_again_up_and_down(empty: Catalog) -> None:
    for before, revision in zip(["base", *REVISIONS], REVISIONS, strict=False):
        move(empty, command.upgrade, revision)
        pretend(empty, before)
        move(empty, command.upgrade, revision)
    check(empty)
    assert empty.add("https://photos.example/1.jpg", "grass") == "added"
    for before, revision in reversed(list(zip(["base", *REVISIONS], REVISIONS, strict=False))):
        move(empty, command.downgrade, before)
        pretend(empty, revision)
        move(empty, command.downgrade, before)
    assert set(sa.inspect(empty.engine).get_table_names()) <= {"alembic_version"}
    empty.migrate()
    check(empty)
    assert empty.add("https://photos.example/1.jpg", "grass") == "added"


def execute(catalog: Catalog, statement: str) -> list[Any]:
    with catalog.engine.begin() as connection:
        result = connection.exec_driver_sql(statement)
        return list(result) if result.returns_rows else []


@pytest.mark.parametrize("charset", ["utf8mb4", "latin1"])
@pytest.mark.parametrize("revision", REVISIONS)
def test_a_migration_killed_after_any_of_its_statements_goes_on(
    tmp_path: Path, mariadb: str, revision: str, charset: str
) -> None:
    """MySQL commits each DDL statement. It dies after the n-th, for every n, and goes on."""
    catalog = Catalog(Settings(home=tmp_path / "home", database_url=mariadb))
    execute(catalog, f"ALTER DATABASE CHARACTER SET {charset}")
    at = REVISIONS.index(revision)
    if at:
        move(catalog, command.upgrade, REVISIONS[at - 1])

    class Killed(Exception):
        pass

    def dying(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        nonlocal left
        if statement.lstrip().startswith(("CREATE", "ALTER")) and "alembic_version" not in statement:
            left -= 1
            if left < 0:
                raise Killed

    kills = 0
    while True:
        left = kills + 1
        sa.event.listen(catalog.engine, "before_cursor_execute", dying)
        try:
            move(catalog, command.upgrade, revision)
            break
        except Killed:
            kills += 1
        finally:
            sa.event.remove(catalog.engine, "before_cursor_execute", dying)
            catalog.engine.dispose()
    catalog.migrate()
    check(catalog)
    assert character_sets(catalog) == {"utf8mb4"}


def character_sets(catalog: Catalog) -> set[str]:
    """Those of all columns and of the columns to come, but for Alembic's own table."""
    mine = "table_schema = DATABASE() AND table_name <> 'alembic_version'"
    columns = f"SELECT character_set_name FROM information_schema.columns WHERE {mine}"  # noqa: S608
    tables = f"SELECT SUBSTRING_INDEX(table_collation, '_', 1) FROM information_schema.tables WHERE {mine}"  # noqa: S608
    return {name for (name,) in execute(catalog, f"{columns} AND character_set_name IS NOT NULL UNION {tables}")}


def test_a_database_of_western_letters_takes_any_letter_and_keeps_what_it_had(tmp_path: Path, mariadb: str) -> None:
    catalog = Catalog(Settings(home=tmp_path / "home", database_url=mariadb))
    execute(catalog, "ALTER DATABASE CHARACTER SET latin1")
    move(catalog, command.upgrade, "0006")
    assert character_sets(catalog) == {"latin1", "utf8mb4"}
    western = key_table.create(catalog, "Löwenzahn", ["predict"])
    with pytest.raises(sa.exc.DataError) as refused:
        key_table.create(catalog, "蒲公英", ["predict"])
    assert "INSERT INTO api_keys" in str(refused.value) and "predict" not in str(refused.value)
    kinds = "SELECT table_name, column_name, column_type, is_nullable, collation_name FROM information_schema.columns"
    kinds += " WHERE table_schema = DATABASE() ORDER BY 1, 2"
    before = execute(catalog, kinds)
    catalog.migrate()
    assert character_sets(catalog) == {"utf8mb4"}
    after = execute(catalog, kinds)
    assert [row[:4] for row in after] == [row[:4] for row in before]
    changed = {(was[4], now[4]) for was, now in zip(before, after, strict=True) if was != now}
    assert changed == {("latin1_swedish_ci", "utf8mb4_unicode_ci")}, "labels and JSON still compare byte by byte"
    key_table.create(catalog, "蒲公英", ["predict"])
    assert [key.name for key in key_table.list_keys(catalog)] == [western.name, "蒲公英"]
    check(catalog)
    move(catalog, command.downgrade, "0006")
    assert [key.name for key in key_table.list_keys(catalog)] == [western.name, "蒲公英"]
    catalog.migrate()


def test_an_interrupted_large_index_is_waited_for_longer_than_any_query(catalog: Catalog) -> None:
    """A read timeout in a migration would leave the server at its ALTER TABLE, and the next try in its way."""
    patient = catalog._engine(read_timeout=MIGRATION_TIMEOUT)
    with patient.connect() as connection, catalog.engine.connect() as usual:
        assert connection.connection.driver_connection._read_timeout == 3600  # type: ignore[union-attr]
        assert usual.connection.driver_connection._read_timeout == 60  # type: ignore[union-attr]
    patient.dispose()


# --- importing ------------------------------------------------------------------------------------------------------


def test_32_an_import_killed_at_any_time_is_finished_by_the_next_one(catalog: Catalog, tmp_path: Path) -> None:
    file = write(tmp_path / "many.csv", 8000)
    with file.open("a") as stream:
        stream.write("nonsense,grass\nhttps://photos.example/0.jpg,moss\n")
    env = os.environ | {
        "LAWNWATCH_HOME": str(catalog.settings.home),
        "LAWNWATCH_DATABASE_URL": catalog.settings.database_url.get_secret_value(),
    }
    child = subprocess.Popen([sys.executable, "-m", "lawnwatch", "catalog", "import", str(file)], env=env)
    while catalog.status().total < 2000 and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    there = catalog.status().total
    assert 2000 <= there < 8000 and there % catalog_module.IMPORT_BATCH == 0
    assert list((catalog.settings.home / "rejects").iterdir()) == [], "a killed import leaves nothing behind"
    report = catalog.import_file(file)
    assert (report.added, report.unchanged) == (8000 - there, there)
    assert (report.conflicts, report.rejected) == (1, 1)
    expected = sorted((f"https://photos.example/{n}.jpg", "grass", "pending") for n in range(8000))
    assert table(catalog) == expected
    assert catalog.status().by_label == {"grass": 8000}, "a conflict makes no label"
    again = catalog.import_file(file)
    assert (again.added, again.unchanged) == (0, 8000) and table(catalog) == expected


def test_two_imports_of_the_same_rows_at_once_add_each_once(catalog: Catalog, tmp_path: Path) -> None:
    files = [write(tmp_path / "one.csv", 5000), write(tmp_path / "two.csv", 5000)]
    added: list[int] = []
    threads = [threading.Thread(target=lambda f=file: added.append(catalog.import_file(f).added)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(added) == 5000 and catalog.status().by_state == {"pending": 5000}


class Breaking:
    """Rows in whose midst something happens to the server."""

    def __init__(self, rows: int, at: int, happen: Callable[[], None]) -> None:
        self.rows, self.at, self.happen = rows, at, happen

    def __iter__(self) -> Iterator[catalog_module.Row]:
        for number in range(self.rows):
            if number == self.at:
                self.happen()
            yield catalog_module.Row(number, f"https://photos.example/{number}.jpg", "grass")

    def share(self) -> float | None:
        return None


def test_28_an_import_outlives_a_restart_of_the_database_and_says_when_it_stays_away(
    tmp_path: Path, start_mariadb: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mariadb = start_mariadb()
    catalog = Catalog(Settings(home=tmp_path / "home", database_url=mariadb.fresh()))
    catalog.migrate()

    killed = threading.Event()

    def kill() -> None:
        mariadb.server.stop(signal.SIGKILL)
        killed.set()

    reports: list[catalog_module.ImportReport] = []

    def work() -> None:
        reports.append(catalog._import(Breaking(5000, 2500, kill), "rows", "import", lambda line: None))

    importing = threading.Thread(target=work)
    importing.start()
    assert killed.wait(60)
    time.sleep(0.5)
    mariadb.server.start()  # from this thread: a server ends with the thread that started it
    importing.join()
    assert [report.added for report in reports] == [5000]
    assert catalog.status().by_state == {"pending": 5000}

    monkeypatch.setattr(catalog_module, "IMPORT_PATIENCE", 1.0)
    gone = Breaking(8000, 6500, lambda: mariadb.server.stop(signal.SIGKILL))
    with pytest.raises(Unavailable, match="6,000 rows had been imported") as caught:
        catalog._import(gone, "rows", "import", lambda line: None)
    assert "goes on where it stopped" in caught.value.hint and mariadb.password not in str(caught.value)
    mariadb.server.start()
    catalog._import(Breaking(8000, -1, lambda: None), "rows", "import", lambda line: None)
    assert catalog.status().by_state == {"pending": 8000}


def test_28_a_frozen_server_is_given_up_and_a_thawed_one_is_used_again(
    tmp_path: Path, start_mariadb: Callable[[], Any]
) -> None:
    mariadb = start_mariadb()
    catalog = Catalog(Settings(home=tmp_path / "home", database_url=mariadb.fresh() + "?read_timeout=1"))
    catalog.migrate()
    assert catalog.add("https://photos.example/1.jpg", "grass") == "added"
    os.killpg(mariadb.server.process.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        with pytest.raises(Unavailable):
            catalog.status()
        assert time.monotonic() - started < 20
    finally:
        os.killpg(mariadb.server.process.pid, signal.SIGCONT)
    assert catalog.retried(catalog.status).total == 1


def test_28_a_deadlock_is_tried_again(catalog: Catalog) -> None:
    for number in (1, 2):
        catalog.add(f"https://photos.example/{number}.jpg", "grass")
    both, tries = threading.Barrier(2, timeout=10), []

    def work(first: int, second: int) -> None:
        with catalog.session() as session:
            tries.append(first)
            for number in (first, second):
                session.execute(
                    sa.update(ImageRecord).where(ImageRecord.id == number).values(attempts=ImageRecord.attempts + 1)
                )
                if number == first and tries.count(first) == 1:
                    both.wait()

    threads = [
        threading.Thread(target=catalog.retried, args=(lambda f=f, s=s: work(f, s),)) for f, s in ((1, 2), (2, 1))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tries) == 3, "the server chose one of the two, and that one came again"
    assert [catalog.find(str(number)).attempts for number in (1, 2)] == [2, 2]


def test_a_table_of_another_database_is_read_by_pages(
    catalog: Catalog, mariadb_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = mariadb_server.fresh("plants")
    engine = sa.create_engine(address)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE plants_data (id INT PRIMARY KEY AUTO_INCREMENT, url_source VARCHAR(500), url_s3 TEXT,"
            " label VARCHAR(50)) CHARACTER SET latin1"
        )
        connection.exec_driver_sql(
            "INSERT INTO plants_data (url_source, label) VALUES (%s, %s)",
            [(f"https://photos.example/{n}.jpg", "Löwenzahn" if n % 2 else "grass") for n in range(25)]
            + [(None, "grass"), ("https://photos.example/x.jpg", None), ("https://photos.example/0.jpg", "Löwenzahn")],
        )
        connection.exec_driver_sql("DELETE FROM plants_data WHERE id = 7")
    monkeypatch.setattr(catalog_module, "PAGE", 10)
    settings = catalog.settings.model_copy(
        update={"import_database_url": Settings(import_database_url=address).import_database_url}
    )
    reader = Catalog(settings)
    report = reader.import_table("plants_data")
    assert (report.added, report.unchanged, report.conflicts, report.rejected) == (24, 0, 1, 2)
    assert reader.import_table("plants_data").unchanged == 24
    assert reader.status().by_label == {"Löwenzahn": 12, "grass": 12}
    rejects = Path(report.reject_file or "").read_text().splitlines()
    assert [line.split(",")[0] for line in rejects] == ["line", "26", "27", "28"], "the key says which row it was"
    with pytest.raises(InputError, match="no column link; it has id, url_source, url_s3, label"):
        reader.import_table("plants_data", url_column="link")
    with pytest.raises(InputError, match="it has plants_data"):
        reader.import_table("plant`s; DROP TABLE plants_data")
    with pytest.raises(InputError, match="no unique column label"):
        reader.import_table("plants_data", key_column="label")
    with engine.begin() as connection:
        assert connection.exec_driver_sql("SELECT COUNT(*) FROM plants_data").scalar() == 27


# --- claims at scale ------------------------------------------------------------------------------------------------


def test_33_a_claim_reads_no_more_when_most_is_done(catalog: Catalog, tmp_path: Path) -> None:
    """Rows read by the server, which no noise of the machine changes; benchmarks/catalog_scale.py measures the time."""
    catalog.import_file(write(tmp_path / "a.csv", 6000))
    with catalog.session() as session:
        session.execute(sa.text("UPDATE images SET state = 'stored' WHERE id % 50 != 0"))

    def rows_read(work: Callable[[], object]) -> int:
        def counter() -> int:
            with catalog.session() as session:
                found = session.execute(sa.text("SHOW GLOBAL STATUS LIKE 'Handler_read%'")).all()
                return sum(int(value) for _, value in found)

        before = counter()
        work()
        return counter() - before

    claimed: list[ImageRecord] = []
    for labels in (None, ["grass"]):
        read = rows_read(lambda labels=labels: claimed.extend(catalog.claim(20, worker="w:1:1", labels=labels)))
        assert read < 500, f"a claim of 20 read {read} of 6000 rows"
    assert len({record.id for record in claimed}) == 40
    outcomes = [(record.id, {"state": "gone", "reason": f"http_404: {record.id}"}) for record in claimed]
    assert rows_read(lambda: catalog.finish("w:1:1", outcomes)) < 500
    assert catalog.status().by_state == {"pending": 80, "stored": 5880, "gone": 40}
    assert catalog.find(str(claimed[3].id)).reason == f"http_404: {claimed[3].id}"
