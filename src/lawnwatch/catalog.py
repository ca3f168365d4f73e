"""The catalog: image records in MySQL (SQLite when embedded), and the database handle of everything that keeps facts.

An image record is one source URL with one label. It goes `pending` → `claimed` → `stored`, or ends as `quarantined`
(the bytes must not be trained on), `blocked` (the URL must not be fetched), `gone` (the source says so for good) or
`failed` (every try failed; `lawnwatch catalog retry` tries anew), always with the reason.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args
from urllib.parse import urlsplit

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from lawnwatch.config import Settings
from lawnwatch.errors import Conflict, DataError, InputError, NotFound, SettingsError, Unavailable

State = Literal["pending", "claimed", "stored", "quarantined", "blocked", "gone", "failed"]
SourceStatus = Literal["same", "changed", "gone", "unreachable"]
Split = Literal["train", "validation", "test"]
MAX_URL = 2048
IMPORT_BATCH = 1000
# MySQL: lock wait timeout, deadlock, connection refused, gone and lost (also at a server's shutdown).
PASSING = {1205, 1213, 2002, 2003, 2006, 2013, 1053, 1927}
T = TypeVar("T")


class UtcDateTime(sa.TypeDecorator[datetime]):
    """Microseconds, always UTC: stored without a zone, returned with one."""

    impl = sa.DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name in ("mysql", "mariadb"):
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(sa.DateTime())

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise InputError(f"A point in time needs a zone; received {value}.")
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value else None


def utc_now() -> datetime:
    """This moment, with its zone."""
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """All tables of lawnwatch; other modules declare theirs on it."""

    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Label(Base):
    """What a picture can show. A class is a row here, never code."""

    __tablename__ = "labels"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(190), unique=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)


class ImageRecord(Base):
    """One source URL, its label, and what became of it."""

    __tablename__ = "images"
    __table_args__ = (
        sa.Index("ix_images_state_id", "state", "id"),
        sa.Index("ix_images_state_label_id", "state", "label_id", "id"),  # claims of one label stay as quick
    )

    id: Mapped[int] = mapped_column(
        sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=True
    )
    url: Mapped[str] = mapped_column(sa.Text)
    # MySQL cannot make a long text unique; its hash is, and compares byte by byte whatever the collation.
    url_sha256: Mapped[bytes] = mapped_column(
        sa.LargeBinary(32).with_variant(mysql.BINARY(32), "mysql", "mariadb"), unique=True
    )
    label_id: Mapped[int] = mapped_column(sa.ForeignKey("labels.id"))
    label_source: Mapped[str] = mapped_column(sa.String(16))
    state: Mapped[str] = mapped_column(sa.String(16), default="pending")
    reason: Mapped[str | None] = mapped_column(sa.String(500))
    attempts: Mapped[int] = mapped_column(default=0)
    claimed_by: Mapped[str | None] = mapped_column(sa.String(120))
    claimed_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    # Claims whose worker died: a picture that kills its worker must not kill for ever.
    lost_claims: Mapped[int] = mapped_column(default=0, server_default=sa.text("0"))
    object_key: Mapped[str | None] = mapped_column(sa.String(255))
    sha256: Mapped[str | None] = mapped_column(sa.CHAR(64), index=True)
    phash: Mapped[str | None] = mapped_column(sa.CHAR(16))
    width: Mapped[int | None]
    height: Mapped[int | None]
    bytes: Mapped[int | None] = mapped_column(sa.BigInteger)
    format: Mapped[str | None] = mapped_column(sa.String(8))
    brightness: Mapped[float | None] = mapped_column(sa.Float(53))
    sharpness: Mapped[float | None] = mapped_column(sa.Float(53))
    etag: Mapped[str | None] = mapped_column(sa.String(255))
    last_modified: Mapped[str | None] = mapped_column(sa.String(64))
    group_id: Mapped[str | None] = mapped_column(sa.CHAR(64), index=True)
    split: Mapped[str | None] = mapped_column(sa.String(16))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now, onupdate=utc_now)
    fetched_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    # What the source said when it was last asked whether it still gives the same picture.
    source_status: Mapped[str | None] = mapped_column(sa.String(16))
    checked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    label: Mapped[Label] = relationship(lazy="joined")


class LabelChange(Base):
    """The labels that a record had, oldest first."""

    __tablename__ = "label_history"

    id: Mapped[int] = mapped_column(
        sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=True
    )
    image_id: Mapped[int] = mapped_column(sa.ForeignKey("images.id", ondelete="CASCADE"), index=True)
    label_id: Mapped[int] = mapped_column(sa.ForeignKey("labels.id"))
    source: Mapped[str] = mapped_column(sa.String(16))
    at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)

    label: Mapped[Label] = relationship(lazy="joined")


class SnapshotRecord(Base):
    """A snapshot that lies complete in the object store."""

    __tablename__ = "snapshots"

    id: Mapped[str] = mapped_column(sa.CHAR(64), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now, index=True)
    counts: Mapped[dict[str, Any]] = mapped_column(sa.JSON)
    samples: Mapped[bool]


class QualityReport(Base):
    """What the quality checks said of the stored images, and where the report lies."""

    __tablename__ = "quality_reports"

    id: Mapped[str] = mapped_column(sa.CHAR(32), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now, index=True)
    passed: Mapped[bool]
    forced: Mapped[str | None] = mapped_column(sa.String(500))  # why a failed check was overruled
    checks: Mapped[list[dict[str, Any]]] = mapped_column(sa.JSON)
    object_key: Mapped[str] = mapped_column(sa.String(255))


@dataclass
class ImportReport:
    """What an import did, in lines of the file."""

    added: int = 0
    unchanged: int = 0
    conflicts: int = 0
    rejected: int = 0
    reject_file: str | None = None
    message: str = ""


@dataclass
class _Added:
    """What one batch of an import did."""

    added: int = 0
    unchanged: int = 0
    conflicting: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class CatalogStatus:
    """Image records counted."""

    total: int
    by_state: dict[str, int] = field(default_factory=dict)
    by_label: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    message: str = ""


# --- the database ---------------------------------------------------------------------------------------------------


def make_engine(settings: Settings) -> sa.Engine:
    """An engine whose connections are tested before use and give up in seconds when the server is gone.

    Raises:
        SettingsError: the URL is not one that SQLAlchemy understands.
    """
    try:
        url = sa.make_url(settings.database_url.get_secret_value())
    except sa.exc.ArgumentError:
        raise SettingsError(
            "LAWNWATCH_DATABASE_URL is not a database URL.",
            hint="It looks like mysql+pymysql://user:password@host/name.",
        ) from None
    if url.get_backend_name() == "sqlite":
        if url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(url, connect_args={"timeout": 30})
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        return engine
    if url.get_backend_name() not in ("mysql", "mariadb"):
        raise SettingsError(
            f"The catalog lives in MySQL or SQLite; received {url.get_backend_name()}.",
            hint="Set LAWNWATCH_DATABASE_URL to mysql+pymysql://user:password@host/name.",
        )
    return sa.create_engine(
        url,
        pool_pre_ping=True,
        pool_recycle=1800,
        isolation_level="READ COMMITTED",
        connect_args={"connect_timeout": 5, "read_timeout": 60, "write_timeout": 60, "charset": "utf8mb4"},
    )


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy begins transactions itself: BEGIN IMMEDIATE, so none fails midway
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=30000"):
        connection.execute(f"PRAGMA {pragma}")


class Catalog:
    """The database: the image records, and a session for every module that keeps facts.

    Args:
        settings: where the database is.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engine = make_engine(settings)

    @property
    def is_mysql(self) -> bool:
        return self.engine.dialect.name in ("mysql", "mariadb")

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A transaction: committed at the end, rolled back on any exception.

        Raises:
            Unavailable: the server does not answer, or the transaction lost against another (try again).
        """
        with self._faults(), Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    def retried(self, work: Callable[[], T], *, patience: float = 20.0) -> T:
        """Do `work`, again while the database deadlocks or restarts, for at most about `patience` seconds.

        For work that may be done twice: a commit whose answer was lost is repeated.

        Raises:
            Unavailable: the database stayed away.
        """
        end = time.monotonic() + patience
        for attempt in range(1000):
            try:
                return work()
            except Unavailable as error:
                pause = random.uniform(0.05, min(0.1 * 2**attempt, 2.0))  # noqa: S311
                if not _passes(error) or time.monotonic() + pause > end:
                    raise
                time.sleep(pause)
        raise AssertionError("unreachable: the patience ends first")

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (OperationalError, InterfaceError) as error:
            # The driver's words name hosts and users, so only their number goes on.
            number = error.orig.args[0] if error.orig is not None and error.orig.args else ""
            raise Unavailable(
                f"The catalog database does not answer as it should ({type(error).__name__} {number}).",
                hint="Is the server running, the disk not full, and LAWNWATCH_DATABASE_URL right?",
            ) from error

    def migrate(self) -> None:
        """Bring the schema up to date; quick when it is, safe when several processes start at once.

        Raises:
            Unavailable: the server does not answer.
        """
        from alembic import command
        from alembic.config import Config
        from alembic.runtime.migration import MigrationContext
        from alembic.script import ScriptDirectory

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        head = ScriptDirectory.from_config(config).get_current_head()
        with self._faults():
            with self.engine.connect() as connection:
                if MigrationContext.configure(connection).get_current_revision() == head:
                    return
            with self.exclusive("migrate"), self.engine.connect() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
                connection.commit()

    @contextmanager
    def exclusive(self, name: str, *, timeout: float = 60.0) -> Iterator[None]:
        """Hold the lock of that name over all processes that share this database, until the block ends.

        Raises:
            Conflict: another process holds it for longer than `timeout` seconds.
        """
        if self.is_mysql:
            with self._faults(), self.engine.connect() as connection:
                lock = f"lawnwatch:{self.engine.url.database}:{name}"[:64]
                if not connection.scalar(
                    sa.text("SELECT GET_LOCK(:lock, :timeout)"), {"lock": lock, "timeout": timeout}
                ):
                    raise Conflict(f"Another process is busy with {name}.", hint="Try again when it has finished.")
                try:
                    yield
                finally:
                    with suppress(DBAPIError):  # the server frees the lock of a connection that it lost
                        connection.execute(sa.text("SELECT RELEASE_LOCK(:lock)"), {"lock": lock})
        else:
            folder = self.settings.home / "locks"
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("w") as file:
                _lock_file(file.fileno(), name, timeout)
                yield

    # --- adding -----------------------------------------------------------------------------------------------------

    def add(self, url: str, label: str, *, source: str = "catalog") -> Literal["added", "unchanged", "conflict"]:
        """Add one record; the same URL again changes nothing, another label is reported and not taken.

        Raises:
            InputError: the URL or the label cannot be one.
        """
        row = checked_row(url, label)
        report = self.retried(lambda: self._add_rows([row], source))
        return "added" if report.added else "conflict" if report.conflicting else "unchanged"

    def import_file(
        self, file: Path, *, source: str = "import", on_progress: Callable[[str], None] = lambda line: None
    ) -> ImportReport:
        """Add the rows of a CSV (header `url,label`), Parquet or JSON-lines file, streamed.

        A row that cannot be one goes with its line number and the reason to a reject file in home; the others are
        added. Importing twice changes nothing.

        Raises:
            InputError: no such file, an unknown ending, or a file without the columns `url` and `label`.
        """
        total = ImportReport()
        rejects: list[tuple[int, str, str, str]] = []
        conflicts: list[tuple[str, str]] = []

        def good() -> Iterator[tuple[str, str]]:
            for line, url, label in _rows_of(file):
                try:
                    yield checked_row(url, label)
                except InputError as error:
                    rejects.append((line, url, label, error.message))

        rows = good()
        for number, batch in enumerate(iter(lambda: list(islice(rows, IMPORT_BATCH)), []), start=1):
            report = self.retried(partial(self._add_rows, batch, source))
            conflicts += report.conflicting
            total.added += report.added
            total.unchanged += report.unchanged
            total.conflicts += len(report.conflicting)
            if number % 20 == 0:
                on_progress(f"imported {number * IMPORT_BATCH:,} rows, {total.added:,} of them new")
        total.rejected = len(rejects)
        rejects += [(0, url, label, "in the catalog under another label") for url, label in conflicts]
        if rejects:
            total.reject_file = str(self._write_rejects(file, rejects))
        total.message = (
            f"{total.added:,} added, {total.unchanged:,} already there, {total.conflicts:,} under another label, "
            f"{total.rejected:,} rejected" + (f"; see {total.reject_file}." if rejects else ".")
        )
        return total

    def _write_rejects(self, file: Path, rejects: list[tuple[int, str, str, str]]) -> Path:
        folder = self.settings.home / "rejects"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{file.stem}.rejects.csv"
        with target.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(("line", "url", "label", "reason"))
            writer.writerows(rejects)
        return target

    def _add_rows(self, rows: list[tuple[str, str]], source: str) -> _Added:
        report = _Added()
        with self.session() as session:
            labels = self._label_ids(session, {label for _, label in rows})
            names = {number: name for name, number in labels.items()}
            wanted: dict[bytes, tuple[str, str]] = {}
            for url, label in rows:
                first = wanted.setdefault(url_hash(url), (url, label))
                if first != (url, label):
                    report.conflicting.append((url, label))
            before = dict(
                session.execute(
                    sa.select(ImageRecord.url_sha256, ImageRecord.label_id).where(
                        ImageRecord.url_sha256.in_(list(wanted))
                    )
                ).all()
            )
            new = [
                {"url": url, "url_sha256": key, "label_id": labels[label], "label_source": source, "state": "pending"}
                for key, (url, label) in wanted.items()
                if key not in before
            ]
            if new:
                # Another import may add the same URL between our look and our insert; the unique hash decides.
                statement = sa.insert(ImageRecord).prefix_with("IGNORE" if self.is_mysql else "OR IGNORE")
                session.execute(statement, new)
            report.added = len(new)
            for key, (url, label) in wanted.items():
                if key in before and names.get(before[key]) != label:
                    report.conflicting.append((url, label))
            report.unchanged = len(rows) - report.added - len(report.conflicting)
        return report

    def _label_ids(self, session: Session, names: set[str]) -> dict[str, int]:
        def known() -> dict[str, int]:
            found = session.execute(sa.select(Label.name, Label.id).where(Label.name.in_(names)))
            return dict(found.all())

        missing = names - known().keys()
        if missing:
            statement = sa.insert(Label).prefix_with("IGNORE" if self.is_mysql else "OR IGNORE")
            session.execute(statement, [{"name": name} for name in sorted(missing)])
        return known()

    # --- looking ----------------------------------------------------------------------------------------------------

    def status(self) -> CatalogStatus:
        """Records counted by state, by label, and by the reason of those that cannot be used."""
        with self.session() as session:
            states = dict(session.execute(sa.select(ImageRecord.state, sa.func.count()).group_by("state")).all())
            labels = dict(
                session.execute(
                    sa.select(Label.name, sa.func.count(ImageRecord.id))
                    .outerjoin(ImageRecord, ImageRecord.label_id == Label.id)
                    .group_by(Label.name)
                    .order_by(Label.name)
                ).all()
            )
            code = sa.func.substr(ImageRecord.reason, 1, 60)
            reasons: dict[str, int] = dict(
                session.execute(
                    sa.select(code, sa.func.count())
                    .where(ImageRecord.reason.is_not(None), ImageRecord.state.not_in(("stored", "pending", "claimed")))
                    .group_by(code)
                    .order_by(sa.func.count().desc())
                    .limit(20)
                ).all()
            )
        total = sum(states.values())
        by_state = {state: states[state] for state in get_args(State) if state in states}
        summary = ", ".join(f"{count:,} {state}" for state, count in by_state.items()) or "none"
        return CatalogStatus(total, by_state, labels, reasons, f"{total:,} image record(s): {summary}.")

    def find(self, image: str) -> ImageRecord:
        """The record of that URL or id. Raises NotFound."""
        with self.session() as session:
            return self._find(session, image)

    def show(self, image: str) -> dict[str, Any]:
        """All that is known of one record, and the labels it had."""
        with self.session() as session:
            record = self._find(session, image)
            changes = session.scalars(
                sa.select(LabelChange).where(LabelChange.image_id == record.id).order_by(LabelChange.id)
            )
            known = {
                column.key: getattr(record, column.key)
                for column in sa.inspect(ImageRecord).column_attrs
                if column.key not in ("url_sha256", "label_id")
            }
            history = [{"label": c.label.name, "source": c.source, "until": c.at.isoformat()} for c in changes]
            return {**known, "label": record.label.name, "label_history": history}

    def _find(self, session: Session, image: str) -> ImageRecord:
        match = ImageRecord.id == int(image) if image.isdecimal() else ImageRecord.url_sha256 == url_hash(image)
        record = session.scalar(sa.select(ImageRecord).where(match))
        if record is None:
            raise NotFound(f"The catalog has no image record {image}.", hint="`lawnwatch catalog status` counts them.")
        return record

    # --- changing ---------------------------------------------------------------------------------------------------

    def retry(self, state: str = "failed") -> int:
        """Make all records of a finished state pending again; returns how many.

        Raises:
            InputError: a state that is not finished.
        """
        finished = ("failed", "gone", "blocked", "quarantined")
        if state not in finished:
            raise InputError(f"Only {', '.join(finished)} records can be retried; received {state!r}.")
        with self.session() as session:
            changed = session.execute(
                sa.update(ImageRecord)
                .where(ImageRecord.state == state)
                .values(state="pending", reason=None, attempts=0, updated_at=utc_now())
            )
            return affected(changed)

    def relabel(self, image: str, label: str, *, source: str = "catalog") -> None:
        """Give a record another label; the old one goes to its history. Raises NotFound, InputError."""
        checked_label(label)
        with self.session() as session:
            record = self._find(session, image)
            if record.label.name == label:
                return
            session.add(LabelChange(image_id=record.id, label_id=record.label_id, source=record.label_source))
            record.label_id = self._label_ids(session, {label})[label]
            record.label_source = source
            if record.state == "quarantined" and (record.reason or "").startswith("label_conflict"):
                record.state, record.reason = "stored", None

    # --- claiming ---------------------------------------------------------------------------------------------------

    def claim(
        self, limit: int, *, worker: str, lease_seconds: float = 120.0, labels: list[str] | None = None
    ) -> list[ImageRecord]:
        """Take up to `limit` pending records for this worker, for `lease_seconds`.

        A record whose lease ran out, or whose worker was a process of this machine that is gone, is taken too.

        Raises:
            DataError: a label that the catalog does not know.
        """
        now = utc_now()
        with self.session() as session:
            dead = [
                other
                for other in session.scalars(
                    sa.select(ImageRecord.claimed_by).where(ImageRecord.state == "claimed").distinct()
                )
                if other and other != worker and _is_dead(other)
            ]
            for condition in (ImageRecord.claimed_until < now, ImageRecord.claimed_by.in_(dead)):
                session.execute(
                    sa.update(ImageRecord)
                    .where(ImageRecord.state == "claimed", condition)
                    .values(state="pending", claimed_by=None, claimed_until=None)
                )
            label_ids: list[int] | None = None
            if labels:
                known = dict(session.execute(sa.select(Label.name, Label.id).where(Label.name.in_(labels))).all())
                if unknown := set(labels) - known.keys():
                    raise DataError(
                        f"The catalog has no label {', '.join(sorted(unknown))}.",
                        hint="`lawnwatch catalog status` lists the labels.",
                    )
                label_ids = list(known.values())
            taken = self.lock_pending(session, limit, label_ids)
            records = list(
                session.scalars(sa.select(ImageRecord).where(ImageRecord.id.in_(taken)).order_by(ImageRecord.id))
            )
            for record in records:
                record.state = "claimed"
                record.claimed_by = worker
                record.claimed_until = now + timedelta(seconds=lease_seconds)
            return records

    def lock_pending(self, session: Session, limit: int, label_ids: list[int] | None) -> list[int]:
        """Ids of pending records, locked for this transaction; those that another one holds are passed over.

        Only `images` is read: MariaDB has no FOR UPDATE OF, so a join would lock the label's row, and with it hide
        every record of that label from all other workers.
        """
        query = sa.select(ImageRecord.id).where(ImageRecord.state == "pending").order_by(ImageRecord.id).limit(limit)
        if label_ids is not None:
            query = query.where(ImageRecord.label_id.in_(label_ids))
        if self.is_mysql:
            query = query.with_for_update(skip_locked=True)
        return list(session.scalars(query))

    def renew(self, worker: str, ids: Iterable[int], *, lease_seconds: float = 120.0) -> int:
        """Hold claims for longer; returns how many were still this worker's."""
        with self.session() as session:
            done = session.execute(
                sa.update(ImageRecord)
                .where(ImageRecord.id.in_(list(ids)), ImageRecord.state == "claimed", ImageRecord.claimed_by == worker)
                .values(claimed_until=utc_now() + timedelta(seconds=lease_seconds))
            )
            return affected(done)

    def finish(self, worker: str, outcomes: Iterable[tuple[int, dict[str, Any]]]) -> int:
        """Record what became of claimed records: (id, columns) each; returns how many were still this worker's.

        A record whose lease went to another worker is left to that one: both would write the same.
        """
        written = 0
        with self.session() as session:
            for number, values in outcomes:
                done = session.execute(
                    sa.update(ImageRecord)
                    .where(ImageRecord.id == number, ImageRecord.state == "claimed", ImageRecord.claimed_by == worker)
                    .values(**values, claimed_by=None, claimed_until=None, updated_at=utc_now())
                )
                written += affected(done)
        return written


def _passes(error: Unavailable) -> bool:
    """Whether the fault behind it may be gone in a moment."""
    fault = getattr(error.__cause__, "orig", None)
    return fault is not None and bool(fault.args) and fault.args[0] in PASSING


def affected(result: sa.Result[Any]) -> int:
    """How many rows an UPDATE or DELETE changed."""
    return int(result.rowcount) if isinstance(result, sa.CursorResult) else 0


def worker_name() -> str:
    """This process's name as a worker: host:pid:start, so that a later process with the same pid is another."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def _started(pid: int) -> str:
    """When a process of this machine began, in clock ticks since boot; empty when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_dead(worker: str) -> bool:
    host, _, rest = worker.rpartition(":")[0].rpartition(":") if worker.count(":") >= 2 else ("", "", "")
    if host != socket.gethostname() or not rest.isdecimal():
        return False
    if not Path("/proc").is_dir():
        return False
    return _started(int(rest)) != worker.rpartition(":")[2]


def _lock_file(handle: int, name: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Conflict(
                    f"Another process is busy with {name}.", hint="Try again when it has finished."
                ) from None
            time.sleep(0.05)


# --- rows -----------------------------------------------------------------------------------------------------------


def url_hash(url: str) -> bytes:
    """The 32 bytes that make a source URL unique."""
    return hashlib.sha256(url.encode()).digest()


def checked_row(url: str, label: str) -> tuple[str, str]:
    """The row itself, stripped, when it can be one. Raises InputError."""
    url = (url or "").strip()
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.netloc or len(url) > MAX_URL or not _is_text(url):
        raise InputError(f"A source URL is http(s)://… of at most {MAX_URL} characters; received {url[:80]!r}.")
    return url, checked_label(label)


def checked_label(label: str) -> str:
    """The label itself, stripped, when it can be one. Raises InputError."""
    label = (label or "").strip()
    if not 1 <= len(label) <= 190 or not _is_text(label) or label == "unknown":
        raise InputError(f"A label has 1 to 190 printable characters and is not `unknown`; received {label[:80]!r}.")
    return label


def _is_text(value: str) -> bool:
    """Printable, and without the mark that stands for bytes that were not UTF-8."""
    return value.isprintable() and "\ufffd" not in value


def _rows_of(file: Path) -> Iterator[tuple[int, str, str]]:
    """(line, url, label) of each row of a file."""
    if not file.is_file():
        raise InputError(f"There is no file {file}.", hint="Name a .csv, .parquet or .jsonl file.")
    if file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
            reader = csv.DictReader(stream)
            _need_columns(file, reader.fieldnames or [])
            while True:
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error:  # such as a field of more than 128 kB: a row that is no row
                    row = {}
                yield reader.line_num, row.get("url") or "", row.get("label") or ""
    elif file.suffix == ".jsonl":
        with file.open(encoding="utf-8", errors="replace") as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    parsed = json.loads(line)
                    row = parsed if isinstance(parsed, dict) else {}
                except ValueError:
                    row = {"url": line.strip()}
                yield number, str(row.get("url") or ""), str(row.get("label") or "")
    elif file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{file.name} is not a Parquet file that can be read: {error}.") from None
        _need_columns(file, table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(batch_size=IMPORT_BATCH, columns=["url", "label"]):
            for row in batch.to_pylist():
                number += 1
                yield number, str(row["url"] or ""), str(row["label"] or "")
    else:
        raise InputError(f"{file.name} ends in {file.suffix or 'nothing'}; expected .csv, .parquet or .jsonl.")


def _need_columns(file: Path, names: Iterable[str]) -> None:
    if missing := {"url", "label"} - set(names):
        raise InputError(f"{file.name} has no column {' and no column '.join(sorted(missing))}; it has {list(names)}.")
