"""The catalog: image records in MySQL (SQLite when embedded), and the database handle of everything that keeps facts.

An image record is one source URL with one label. It goes `pending` → `claimed` → `stored`, or ends as `quarantined`
(the bytes must not be trained on), `blocked` (the URL must not be fetched), `gone` (the source says so for good) or
`failed` (every try failed; `lawnwatch catalog retry` tries anew), always with the reason.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args
from urllib.parse import urlsplit

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, lazyload, mapped_column, relationship

from lawnwatch.database import Database, UtcDateTime, affected, database_faults, make_engine, metadata, utc_now
from lawnwatch.errors import DataError, InputError, NotFound, Unavailable
from lawnwatch.tabular import Row, Rows, open_rows, replaced, row_of, write_rows

State = Literal["pending", "claimed", "stored", "quarantined", "blocked", "gone", "failed"]
SourceStatus = Literal["same", "changed", "gone", "unreachable"]
Split = Literal["train", "validation", "test"]
FINISHED = ("failed", "gone", "blocked", "quarantined")  # what `retry` may make pending again
MAX_URL = 2048
IMPORT_BATCH = 1000  # rows in one statement: at most 8 MB of URLs, half of MariaDB's default max_allowed_packet
IMPORT_PATIENCE = 60.0  # seconds that an import waits for a database that restarts
PAGE = 5000  # records read or changed in one transaction, where a million may be meant
PROGRESS_SECONDS = 2.0
# Records that one, two, three or four workers died with: at most so many are claimed at once, and nothing beside them.
# A picture that kills its worker loses its neighbours on the way, and is alone when it does so for the last time.
SUSPECTS = (64, 16, 4, 1)
MAX_LOST_CLAIMS = len(SUSPECTS) + 1
# What an export tells of a record, in this order; who claims it just now and the fetch headers are of no use elsewhere.
EXPORTED = (
    "id", "url", "label", "label_source", "state", "reason", "attempts", "object_key", "sha256", "phash", "width",
    "height", "bytes", "format", "brightness", "sharpness", "group_id", "split", "source_status", "created_at",
    "updated_at", "fetched_at", "checked_at",
)  # fmt: skip
T = TypeVar("T")


def _plain_time(value: Any) -> Any:
    """A value for a statement that is not SQLAlchemy's: times as both dialects store them, all else as it is."""
    if not isinstance(value, datetime):
        return value
    return value.astimezone(UTC).replace(tzinfo=None).isoformat(sep=" ", timespec="microseconds")


class Base(DeclarativeBase):
    """The tables that are objects; other modules declare theirs on it."""

    metadata = metadata


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


IMAGES = cast(sa.Table, ImageRecord.__table__)  # for statements over many rows, where the ORM would cost more


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
    """What an import did, in rows."""

    added: int = 0
    unchanged: int = 0
    conflicts: int = 0
    rejected: int = 0
    reject_file: str | None = None
    seconds: float = 0.0
    message: str = ""

    @property
    def rows(self) -> int:
        """How many rows have been read."""
        return self.added + self.unchanged + self.conflicts + self.rejected


@dataclass
class CatalogStatus:
    """Image records counted."""

    total: int
    by_state: dict[str, int] = field(default_factory=dict)
    by_label: dict[str, int] = field(default_factory=dict)
    by_label_and_state: dict[str, dict[str, int]] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    message: str = ""


class Catalog(Database):
    """The database with the image records, and a session for every module that keeps facts."""

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A transaction: committed at the end, rolled back on any exception.

        Raises:
            Unavailable: the server does not answer, or the transaction lost against another (try again).
        """
        with database_faults(), Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    # --- adding -----------------------------------------------------------------------------------------------------

    def add(self, url: str, label: str, *, source: str = "catalog") -> Literal["added", "unchanged", "conflict"]:
        """Add one record; the same URL again changes nothing, another label is reported and not taken.

        Raises:
            InputError: the URL or the label cannot be one.
        """
        row = Row(0, *checked_row(url, label))
        added, conflicts = self.retried(partial(self._add_rows, [row], checked_source(source), {}))
        return "added" if added else "conflict" if conflicts else "unchanged"

    def import_file(
        self, file: Path, *, source: str = "import", on_progress: Callable[[str], None] = lambda line: None
    ) -> ImportReport:
        """Add the rows of a CSV (header with `url` and `label`), Parquet or JSON-lines file, streamed.

        A row that cannot be one, or that the catalog has under another label, goes with its line number and the reason
        to a reject file in home; the others are added. Importing twice changes nothing.

        Raises:
            InputError: no such file, an unknown ending, or a file without the columns `url` and `label`.
            Unavailable: the database stayed away; the same import again goes on.
        """
        return self._import(open_rows(file), file.stem, source, on_progress)

    def import_table(
        self,
        table: str,
        *,
        url_column: str = "url_source",
        label_column: str = "label",
        key_column: str | None = None,
        source: str = "import",
        on_progress: Callable[[str], None] = lambda line: None,
    ) -> ImportReport:
        """Add the rows of a table of the database LAWNWATCH_IMPORT_DATABASE_URL (empty: of the catalog's own).

        As `import_file`; the table is read by pages in the order of its key, never locked, and never written.

        Args:
            key_column: a column that is unique and never NULL; None: the primary key.

        Raises:
            InputError: no such table or column, or no such key.
            Unavailable: one of the two databases stayed away; the same import again goes on.
        """
        address, setting = self.settings.import_database_url, "LAWNWATCH_IMPORT_DATABASE_URL"
        if not address.get_secret_value():
            address, setting = self.settings.database_url, "LAWNWATCH_DATABASE_URL"
        engine = make_engine(address, setting=setting)
        if engine.dialect.name == "sqlite" and not Path(engine.url.database or "").is_file():
            raise InputError(f"{setting} names a SQLite file that does not exist.")
        try:
            with database_faults(setting):
                columns = _table_columns(engine, table, (key_column, url_column, label_column))

            def pages() -> Iterator[Row]:
                page, last = sa.select(*columns).order_by(columns[0]).limit(PAGE), None
                while True:
                    query = page if last is None else page.where(columns[0] > last)
                    found = self.retried(partial(_fetch, engine, query, setting))
                    for row in found:
                        yield row_of(str(row[0]), row[1], row[2])
                    if len(found) < PAGE:
                        return
                    last = found[-1][0]

            return self._import(pages(), table, source, on_progress)
        finally:
            engine.dispose()

    def _import(
        self, rows: Rows | Iterator[Row], name: str, source: str, on_progress: Callable[[str], None]
    ) -> ImportReport:
        source = checked_source(source)
        report, started = ImportReport(), time.monotonic()
        labels: dict[str, int] = {}
        file_name = re.sub(r"[^\w.-]", "_", name)  # a table may be called anything
        target = self.settings.home / "rejects" / f"{file_name}.rejects.csv"
        said, added = started, 1
        with _reject_file(target) as reject:
            read = iter(rows)
            while batch := list(islice(read, IMPORT_BATCH)):
                good: list[Row] = []
                for row in batch:
                    try:
                        good.append(_checked(row))
                    except InputError as error:
                        reject(row, error.message)
                        report.rejected += 1
                try:
                    work = partial(self._add_rows, good, source, labels, look=not added)
                    added, conflicts = self.retried(work, patience=IMPORT_PATIENCE)
                except Unavailable as error:
                    raise Unavailable(
                        f"{error.message} {report.rows:,} rows had been imported by then.",
                        hint=f"{error.hint} Run the same import again: it goes on where it stopped.",
                    ) from error
                for row, label in conflicts:
                    reject(row, f"in the catalog as {label}; `lawnwatch catalog relabel` changes it on purpose")
                report.added += added
                report.conflicts += len(conflicts)
                report.unchanged += len(good) - added - len(conflicts)
                if time.monotonic() - said >= PROGRESS_SECONDS:
                    said = time.monotonic()
                    share = None if isinstance(rows, Iterator) else rows.share()
                    on_progress(_progress_line(report, said - started, share))
        report.seconds = round(time.monotonic() - started, 3)
        report.reject_file = str(target) if report.rejected or report.conflicts else None
        report.message = (
            f"{report.added:,} added, {report.unchanged:,} already there, {report.conflicts:,} under another label, "
            f"{report.rejected:,} rejected in {report.seconds:.1f} s"
            + (f"; see {report.reject_file}." if report.reject_file else ".")
        )
        return report

    def _add_rows(
        self, rows: list[Row], source: str, known: dict[str, int], *, look: bool = False
    ) -> tuple[int, list[tuple[Row, str]]]:
        """Insert what is new; returns how many were, and the rows whose URL has another label, with that label.

        Args:
            known: label names to ids; labels made here are added to it once they are committed.
            look: look first which rows are there, because most are: to insert in vain costs more.
        """
        keys = [url_hash(row.url) for row in rows]
        first: dict[bytes, Row] = {}
        for key, row in zip(keys, rows, strict=True):
            first.setdefault(key, row)
        with self.session() as session:
            there = self._label_ids_of(session, first) if look else {}
            missing = {row.label for row in rows} - known.keys()
            labels = self._label_ids(session, missing)
            if missing := missing - labels.keys():
                # A label comes into being with a record of its own, not with a row that is a conflict.
                there |= self._label_ids_of(session, [key for key, row in first.items() if row.label in missing])
                made = {row.label for key, row in first.items() if row.label in missing and key not in there}
                labels |= self._made_labels(session, made)
            ids = known | labels
            new = [(row.url, key, ids[row.label], source) for key, row in first.items() if key not in there]
            added = self._insert(session, new) if new else 0
            if added < len(new):
                there = self._label_ids_of(session, first)
            held = [there.get(key) or ids[first[key].label] for key in keys]
            others = [(row, number) for row, number in zip(rows, held, strict=True) if ids.get(row.label) != number]
            names = self._label_names(session, {number for _, number in others})
        if len(known) > 10_000:  # a column of anything but labels must not fill the memory
            known.clear()
        known |= labels
        return added, [(row, names[number]) for row, number in others]

    def _insert(self, session: Session, new: list[tuple[str, bytes, int, str]]) -> int:
        """Insert (url, hash, label id, label source); returns how many were new.

        The unique hash decides, also against another import at the same time. One plain statement: through the ORM, or
        as many parameter sets, a row costs five times as much. All that may be mangled by IGNORE was checked before.
        """
        mark, ignore = ("%s", "IGNORE") if self.is_mysql else ("?", "OR IGNORE")
        now = _plain_time(utc_now())
        row = f"({mark}, {mark}, {mark}, {mark}, 'pending', 0, '{now}', '{now}')"
        statement = (
            f"INSERT {ignore} INTO images"  # noqa: S608 - nothing from outside is in it: values go as parameters
            " (url, url_sha256, label_id, label_source, state, attempts, created_at, updated_at)"
            f" VALUES {', '.join([row] * len(new))}"
        )
        return affected(session.connection().exec_driver_sql(statement, tuple(cell for each in new for cell in each)))

    def _label_ids_of(self, session: Session, keys: Iterable[bytes]) -> dict[bytes, int]:
        """The label ids of those of the URLs (as hashes) that the catalog has.

        Without a join: with one, the server would rather read all images of the few labels there are.
        """
        query = sa.select(ImageRecord.url_sha256, ImageRecord.label_id)
        return dict(session.execute(query.where(ImageRecord.url_sha256.in_(list(keys)))).all())

    def _label_names(self, session: Session, ids: set[int]) -> dict[int, str]:
        return dict(session.execute(sa.select(Label.id, Label.name).where(Label.id.in_(ids))).all()) if ids else {}

    def _label_ids(self, session: Session, names: Iterable[str]) -> dict[str, int]:
        """The ids of those of the labels that the catalog has."""
        query = sa.select(Label.name, Label.id).where(Label.name.in_(list(names)))
        return dict(session.execute(query).all())

    def _made_labels(self, session: Session, names: set[str]) -> dict[str, int]:
        if names:
            statement = sa.insert(Label).prefix_with("IGNORE" if self.is_mysql else "OR IGNORE")
            session.execute(statement, [{"name": name} for name in sorted(names)])
        return self._label_ids(session, names)

    # --- looking ----------------------------------------------------------------------------------------------------

    def status(self) -> CatalogStatus:
        """Records counted by state, by label, by both, and by the reason of those that cannot be used."""
        with self.session() as session:
            counted = session.execute(
                sa.select(ImageRecord.state, ImageRecord.label_id, sa.func.count()).group_by("state", "label_id")
            ).all()
            # After the counts: an import that runs may have made a label in between, and never the other way round.
            names = dict(session.execute(sa.select(Label.id, Label.name).order_by(Label.name)).all())
            code = sa.func.substr(ImageRecord.reason, 1, 60)
            reasons: dict[str, int] = dict(
                session.execute(
                    sa.select(code, sa.func.count())
                    .where(ImageRecord.reason.is_not(None), ImageRecord.state.in_(FINISHED))
                    .group_by(code)
                    .order_by(sa.func.count().desc())
                    .limit(20)
                ).all()
            )
        cells = {(state, names[label]): number for state, label, number in counted}
        order = get_args(State)
        table = {
            label: {state: cells[state, label] for state in order if (state, label) in cells}
            for label in names.values()
        }
        by_label = {label: sum(states.values()) for label, states in table.items()}
        by_state = {
            state: total for state in order if (total := sum(states.get(state, 0) for states in table.values()))
        }
        total = sum(by_state.values())
        summary = ", ".join(f"{number:,} {state}" for state, number in by_state.items()) or "none"
        return CatalogStatus(total, by_state, by_label, table, reasons, f"{total:,} image record(s): {summary}.")

    def quality_report(self, report: str) -> str | None:
        """The store's key of a quality report by its id, of the newest for `latest`; None when there is none."""
        query = sa.select(QualityReport.object_key).order_by(QualityReport.created_at.desc()).limit(1)
        if report != "latest":
            query = query.where(QualityReport.id == report)
        with self.session() as session:
            return session.scalar(query)

    def find(self, image: str) -> ImageRecord:
        """The record of that URL or id. Raises NotFound."""
        with self.session() as session:
            return self._find(session, image)

    def show(self, image: str) -> dict[str, Any]:
        """All that is known of one record, and the labels it had. Raises NotFound."""
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

    def select(
        self,
        *,
        state: str | None = None,
        label: str | None = None,
        reason: str | None = None,
        limit: int = 50,
        after: int = 0,
    ) -> list[ImageRecord]:
        """Up to `limit` records in the order of their ids, from the one after `after` on.

        Args:
            reason: how the reason begins, such as `label_conflict` or `http_404`.

        Raises:
            InputError: no such state.
            DataError: no such label.
        """
        with self.session() as session:
            query = sa.select(ImageRecord).where(*self._filters(session, state, label, reason), ImageRecord.id > after)
            return list(session.scalars(query.order_by(ImageRecord.id).limit(limit)))

    def export(self, file: Path, *, state: str | None = None, label: str | None = None) -> int:
        """Write the records to a CSV, Parquet or JSON-lines file that exists whole or not at all; returns how many.

        `import_file` reads it. Cells are written as they are: a label that begins with `=` is a formula to a
        spreadsheet program, and changing it here would change the data.

        Raises:
            InputError: no such state, an unknown ending, or a file that cannot be written.
            DataError: no such label.
        """
        columns = [IMAGES.c["label_id" if name == "label" else name] for name in EXPORTED]
        types = {name: column.type.python_type for name, column in zip(EXPORTED, columns, strict=True)} | {"label": str}
        with self.session() as session:
            query = sa.select(*columns).where(*self._filters(session, state, label, None)).order_by(IMAGES.c.id)
        label_at = EXPORTED.index("label")

        def page(after: int) -> list[list[Any]]:
            # The labels' names apart: with a join, the server would rather sort all images than walk them by id.
            with self.session() as session:
                rows = [list(row) for row in session.execute(query.where(IMAGES.c.id > after).limit(PAGE))]
                names = self._label_names(session, {row[label_at] for row in rows})
            for row in rows:
                row[label_at] = names[row[label_at]]
            return rows

        def pages() -> Iterator[list[list[Any]]]:
            after = 0
            while found := self.retried(partial(page, after)):
                yield found
                after = found[-1][0]

        return write_rows(file, types, pages())

    def _filters(
        self, session: Session, state: str | None, label: str | None, reason: str | None
    ) -> list[sa.ColumnElement[bool]]:
        conditions: list[sa.ColumnElement[bool]] = []
        if state is not None:
            if state not in get_args(State):
                raise InputError(f"A state is one of {', '.join(get_args(State))}; received {state!r}.")
            conditions.append(ImageRecord.state == state)
        if label is not None:
            conditions.append(ImageRecord.label_id.in_(self._known_labels(session, [label])))
        if reason:
            conditions.append(ImageRecord.reason.startswith(reason, autoescape=True))
        return conditions

    def _known_labels(self, session: Session, names: list[str]) -> list[int]:
        known = self._label_ids(session, names)
        if unknown := set(names) - known.keys():
            raise DataError(
                f"The catalog has no label {', '.join(sorted(unknown))}.",
                hint="`lawnwatch catalog status` lists the labels.",
            )
        return sorted(known.values())

    def _find(self, session: Session, image: str, *, lock: bool = False) -> ImageRecord:
        match = (
            ImageRecord.id == int(image)
            if image.isdecimal() and len(image) < 19
            else ImageRecord.url_sha256 == url_hash(image)
        )
        query = sa.select(ImageRecord).where(match)
        if lock:  # without the join, which would lock the label's row too
            query = query.options(lazyload(ImageRecord.label)).with_for_update()
        record = session.scalar(query)
        if record is None:
            raise NotFound(f"The catalog has no image record {image}.", hint="`lawnwatch catalog status` counts them.")
        return record

    # --- changing ---------------------------------------------------------------------------------------------------

    def retry(
        self,
        state: str = "failed",
        *,
        label: str | None = None,
        reason: str | None = None,
        image: str | None = None,
    ) -> int:
        """Make finished records pending again; returns how many.

        Many are changed page by page, so that no million of records is locked; an interrupted retry goes on when it
        is run again.

        Args:
            state: failed, gone, blocked or quarantined; of an `image`, whichever of them it is in.
            reason: only records whose reason begins so, such as `http_503`.
            image: only the record of that URL or id.

        Raises:
            InputError: a state that is not finished.
            NotFound: no such image.
        """
        if image is not None:
            record = self.find(image)
            state, pages = record.state, iter([[record.id]])
        elif state in FINISHED:
            pages = self._ids(state, label, reason)
        if state not in FINISHED:
            raise InputError(f"Only {', '.join(FINISHED)} records can be retried; received {state!r}.")

        def change(ids: list[int]) -> int:
            with self.session() as session:
                return affected(
                    session.execute(
                        sa.update(ImageRecord)
                        .where(ImageRecord.id.in_(ids), ImageRecord.state == state)
                        .values(state="pending", reason=None, attempts=0, lost_claims=0, updated_at=utc_now())
                        .execution_options(synchronize_session=False)
                    )
                )

        return sum(self.retried(partial(change, ids)) for ids in pages)

    def _ids(self, state: str, label: str | None, reason: str | None) -> Iterator[list[int]]:
        """The ids of the records that match, a page at a time."""
        after = 0
        while True:
            with self.session() as session:
                query = sa.select(ImageRecord.id).where(
                    *self._filters(session, state, label, reason), ImageRecord.id > after
                )
                ids = list(session.scalars(query.order_by(ImageRecord.id).limit(PAGE)))
            if not ids:
                return
            yield ids
            after = ids[-1]

    def relabel(self, image: str, label: str, *, source: str = "catalog") -> None:
        """Give a record another label; the old one goes to its history.

        A picture that was quarantined because its copies disagreed is free again; the next snapshot judges it anew.

        Raises:
            NotFound: no such image.
            InputError: what cannot be a label.
        """
        label, source = checked_label(label), checked_source(source)
        with self.session() as session:
            record = self._find(session, image, lock=True)
            if record.label.name == label:
                return
            session.add(LabelChange(image_id=record.id, label_id=record.label_id, source=record.label_source))
            record.label_id = self._made_labels(session, {label})[label]
            record.label_source = source
            if record.state == "quarantined" and (record.reason or "").startswith("label_conflict"):
                record.state, record.reason = "stored", None

    # --- claiming ---------------------------------------------------------------------------------------------------

    def claim(
        self,
        limit: int,
        *,
        worker: str,
        lease_seconds: float = 120.0,
        labels: list[str] | None = None,
        suspects: bool = True,
    ) -> list[ImageRecord]:
        """Take up to `limit` pending records for this worker, for `lease_seconds`.

        A record whose lease ran out, or whose worker was a process of this machine that is gone, is pending again.
        Such records come last, and in small groups. One that five workers died with is a danger to the sixth: it
        becomes `failed`, with the reason `worker_died`.

        Args:
            suspects: when nothing else is pending, take records whose worker died (`lost_claims` tells). For a worker
                that holds nothing else, and claims no more until these are finished: what it holds when it dies is
                suspected.

        Raises:
            DataError: a label that the catalog does not know.
            Unavailable: the database stayed away.
        """
        until = utc_now() + timedelta(seconds=lease_seconds)
        tries = count()

        def attempt() -> list[ImageRecord]:
            with self.session() as session:
                # A claim whose answer was lost is found by its lease, to the microsecond: it must not lie about.
                ids = self._held(session, worker, until) if next(tries) else []
                if not ids:
                    self._free_lost_claims(session, worker)
                    wanted = self._known_labels(session, labels) if labels else None
                    ids = self.lock_pending(session, limit, wanted)
                    if not ids and suspects:
                        ids = self._lock_suspects(session, limit, wanted)
                    session.execute(
                        sa.update(ImageRecord)
                        .where(ImageRecord.id.in_(ids))
                        .values(state="claimed", claimed_by=worker, claimed_until=until, updated_at=utc_now())
                        .execution_options(synchronize_session=False)
                    )
                query = sa.select(ImageRecord).where(ImageRecord.id.in_(ids)).order_by(ImageRecord.id)
                return list(session.scalars(query))

        return self.retried(attempt)

    def _held(self, session: Session, worker: str, until: datetime) -> list[int]:
        mine = (ImageRecord.state == "claimed", ImageRecord.claimed_by == worker, ImageRecord.claimed_until == until)
        return list(session.scalars(sa.select(ImageRecord.id).where(*mine)))

    def _free_lost_claims(self, session: Session, worker: str) -> None:
        """Give back the claims of dead workers and those whose lease ran out.

        The look before costs no lock, so that the usual claim, which finds nothing to free, hinders nobody.
        """
        now = utc_now()
        leases = session.execute(
            sa.select(ImageRecord.claimed_by, sa.func.min(ImageRecord.claimed_until))
            .where(ImageRecord.state == "claimed")
            .group_by(ImageRecord.claimed_by)
        ).all()
        dead = [name for name, _ in leases if name and name != worker and _is_dead(name)]
        if not dead and all(until is not None and until >= now for _, until in leases):
            return
        lost = ImageRecord.lost_claims + 1
        deadly = lost >= MAX_LOST_CLAIMS
        reason = f"worker_died: {MAX_LOST_CLAIMS} workers died, or lost their lease, while they had this image"
        session.execute(
            sa.update(ImageRecord)
            .where(
                ImageRecord.state == "claimed",
                sa.or_(ImageRecord.claimed_until < now, ImageRecord.claimed_by.in_(dead)),
            )
            # In this order: MySQL lets an assignment see those before it, and two of them read lost_claims.
            .ordered_values(
                (ImageRecord.state, sa.case((deadly, "failed"), else_="pending")),
                (ImageRecord.reason, sa.case((deadly, reason), else_=None)),
                (ImageRecord.claimed_by, None),
                (ImageRecord.claimed_until, None),
                (ImageRecord.updated_at, now),
                (ImageRecord.lost_claims, lost),
            )
            .execution_options(synchronize_session=False)
        )

    def _lock_suspects(self, session: Session, limit: int, label_ids: list[int] | None) -> list[int]:
        """As `lock_pending`, of the records that the fewest workers died with: no more than may be claimed at once."""
        query = sa.select(sa.func.min(ImageRecord.lost_claims))
        query = query.where(ImageRecord.state == "pending", ImageRecord.lost_claims > 0)
        if label_ids is not None:
            query = query.where(ImageRecord.label_id.in_(label_ids))
        if not (lost := session.scalar(query)):
            return []
        return self.lock_pending(session, min(limit, SUSPECTS[lost - 1]), label_ids, lost=lost)

    def lock_pending(self, session: Session, limit: int, label_ids: list[int] | None, *, lost: int = 0) -> list[int]:
        """Ids of pending records, locked for this transaction; those that another one holds are passed over.

        Only records that `lost` workers died with.

        Of several labels each gets its share and then what others leave, and is asked for alone: together they could
        not be read in the order of an index, and each claim would sort all that is pending. Only `images` is read:
        MariaDB has no FOR UPDATE OF, so a join would lock the label's row, and with it hide every record of that label
        from all other workers.
        """
        turns: list[tuple[int | None, int]] = [(None, limit)]
        if label_ids is not None:
            turns = [(label, -(-limit // len(label_ids))) for label in label_ids]
            turns += [(label, limit) for label in label_ids] if len(label_ids) > 1 else []
        ids: list[int] = []
        for label, share in turns:
            if len(ids) == limit:
                break
            query = sa.select(ImageRecord.id).where(ImageRecord.state == "pending", ImageRecord.lost_claims == lost)
            if ids:  # this transaction's own locks do not make SKIP LOCKED pass over them
                query = query.where(ImageRecord.id.not_in(ids))
            if label is not None:
                query = query.where(ImageRecord.label_id == label)
            query = query.order_by(ImageRecord.id).limit(min(share, limit - len(ids)))
            if self.is_mysql:
                # Left alone, the optimizer may walk the primary key through all that is finished already.
                index = "ix_images_state_id" if label is None else "ix_images_state_label_id"
                query = query.with_hint(ImageRecord, f"FORCE INDEX ({index})").with_for_update(skip_locked=True)
            ids += session.scalars(query)
        return ids

    def renew(self, worker: str, ids: Iterable[int], *, lease_seconds: float = 120.0) -> int:
        """Let this worker keep claimed records for `lease_seconds` from now; returns how many are still its own."""
        wanted = list(ids)
        until = utc_now() + timedelta(seconds=lease_seconds)

        def attempt() -> int:
            with self.session() as session:
                done = session.execute(
                    sa.update(ImageRecord)
                    .where(ImageRecord.id.in_(wanted), ImageRecord.state == "claimed", ImageRecord.claimed_by == worker)
                    .values(claimed_until=until)
                    .execution_options(synchronize_session=False)
                )
                return affected(done)

        return self.retried(attempt)

    def finish(self, worker: str, outcomes: Iterable[tuple[int, dict[str, Any]]]) -> int:
        """Record what became of claimed records: (id, columns) each; returns how many were still this worker's.

        A record whose lease went to another worker is left to that one: both would write the same.

        Raises:
            Unavailable: the database stayed away.
        """
        moment = utc_now()
        alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for number, values in outcomes:
            written = {**values, "claimed_by": None, "claimed_until": None, "updated_at": moment}
            if values.get("state", "pending") != "pending":
                written["lost_claims"] = 0
            alike.setdefault(tuple(written), []).append({**written, "id": number})
        groups = [(names, rows[at : at + 100]) for names, rows in alike.items() for at in range(0, len(rows), 100)]
        tries = count()

        def attempt() -> int:
            with self.session() as session:
                done = sum(self._write_outcomes(session, worker, names, rows) for names, rows in groups)
                if next(tries):  # the first answer may have been lost, but not the work: its moment tells
                    ids = [row["id"] for _, rows in groups for row in rows]
                    written = (ImageRecord.id.in_(ids), ImageRecord.state != "claimed")
                    query = sa.select(sa.func.count()).where(*written, ImageRecord.updated_at == moment)
                    done = session.scalar(query) or 0
                return done

        return self.retried(attempt)

    def _write_outcomes(self, session: Session, worker: str, names: tuple[str, ...], rows: list[dict[str, Any]]) -> int:
        """Write the named columns of records that this worker holds; returns how many it held.

        One statement for all of them, because a statement each is a round trip each.
        """
        mark, quote = "%s" if self.is_mysql else "?", self.engine.dialect.identifier_preparer.quote
        ids = [row["id"] for row in rows]
        assignments: list[str] = []
        parameters: list[Any] = []
        for name in names:
            values = [_plain_time(row[name]) for row in rows]
            if all(value == values[0] for value in values):
                assignments.append(f"{quote(IMAGES.c[name].name)} = {mark}")
                parameters.append(values[0])
            else:
                cases = " ".join([f"WHEN {mark} THEN {mark}"] * len(rows))
                assignments.append(f"{quote(IMAGES.c[name].name)} = CASE id {cases} END")
                parameters += chain.from_iterable(zip(ids, values, strict=True))
        statement = (
            f"UPDATE images SET {', '.join(assignments)}"  # noqa: S608 - names of columns; values go as parameters
            f" WHERE id IN ({', '.join([mark] * len(ids))}) AND state = 'claimed' AND claimed_by = {mark}"
        )
        return affected(session.connection().exec_driver_sql(statement, (*parameters, *ids, worker)))


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


def checked_source(source: str) -> str:
    """The label source itself, when it can be one. Raises InputError."""
    if not 1 <= len(source) <= 16 or not _is_text(source):
        raise InputError(f"A label source has 1 to 16 printable characters; received {source[:80]!r}.")
    return source


def _checked(row: Row) -> Row:
    """The row, stripped, when it can be one. Raises InputError."""
    if row.fault:
        raise InputError(row.fault)
    return Row(row.line, *checked_row(row.url, row.label))


@contextmanager
def _reject_file(target: Path) -> Iterator[Callable[[Row, str], None]]:
    """Where rows that are not taken go, with the reason; the file exists when there are some, and then whole.

    They are kept in a nameless file until the end, so that a killed import leaves nothing behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    rejected = 0
    # Text that UTF-8 cannot hold is a reason for a rejection, and must not stop it.
    nameless = partial(tempfile.TemporaryFile, "w+", newline="", encoding="utf-8", errors="backslashreplace")
    with nameless(dir=target.parent) as kept:
        writer = csv.writer(kept)
        writer.writerow(("line", "url", "label", "reason"))

        def reject(row: Row, reason: str) -> None:
            nonlocal rejected
            rejected += 1
            writer.writerow((row.line, row.url, row.label, reason))

        yield reject
        if not rejected:
            target.unlink(missing_ok=True)  # of an earlier import of that file
            return
        kept.seek(0)
        with replaced(target) as part, part.open("w", newline="", encoding="utf-8") as stream:
            shutil.copyfileobj(kept, stream)


def _progress_line(report: ImportReport, seconds: float, share: float | None) -> str:
    line = f"{report.rows:,} rows, {report.added:,} of them new, {report.rows / max(seconds, 1e-9):,.0f}/s"
    if share:
        line += f", {share:.0%}, about {seconds * (1 - share) / share:.0f} s left"
    return line


# --- the tables of others -------------------------------------------------------------------------------------------


def _table_columns(engine: sa.Engine, table: str, names: tuple[str | None, str, str]) -> list[sa.ColumnElement[Any]]:
    """The key, URL and label columns of a table, all of which exist. Raises InputError."""
    inspector = sa.inspect(engine)
    if not inspector.has_table(table):
        there = ", ".join(sorted(inspector.get_table_names())[:20]) or "none"
        raise InputError(f"The database has no table {table}; it has {there}.")
    columns = {column["name"]: column for column in inspector.get_columns(table)}
    if missing := [name for name in names if name is not None and name not in columns]:
        raise InputError(
            f"The table {table} has no column {' and no column '.join(missing)}; it has {', '.join(columns)}.",
            hint="Name them with --url-column, --label-column and --key-column.",
        )
    primary = inspector.get_pk_constraint(table)["constrained_columns"]
    unique = [primary, *(index["column_names"] for index in inspector.get_indexes(table) if index["unique"])]
    unique += [constraint["column_names"] for constraint in inspector.get_unique_constraints(table)]
    key = names[0] or (primary[0] if len(primary) == 1 else None)
    if key is None or [key] not in unique or (key not in primary and columns[key]["nullable"]):
        raise InputError(
            f"The table {table} has no {'unique column ' + key if key else 'primary key of one column'}; "
            "without a key that is unique and never NULL its rows cannot be read in a safe order.",
            hint="Name such a column with --key-column, or export the table to a CSV file and import that.",
        )
    source = sa.table(sa.sql.quoted_name(table, quote=True))
    return [sa.column(sa.sql.quoted_name(name, quote=True), _selectable=source) for name in (key, *names[1:])]


def _fetch(engine: sa.Engine, query: sa.Select[Any], setting: str) -> Sequence[Any]:
    with database_faults(setting), engine.connect() as connection:
        return connection.execute(query).all()
