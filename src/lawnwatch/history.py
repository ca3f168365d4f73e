"""The table of predictions: written by the batch, read by the page, forgotten by age."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    CHAR,
    JSON,
    BigInteger,
    Float,
    Index,
    Integer,
    LargeBinary,
    String,
    delete,
    inspect,
    select,
)
from sqlalchemy import insert as insert_into
from sqlalchemy.exc import IntegrityError as DuplicateRow
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Mapped, defer, mapped_column

from lawnwatch.catalog import Base, Catalog, UtcDateTime
from lawnwatch.errors import Conflict, DataError, InputError, NotFound
from lawnwatch.predictions import PAGE, Prediction
from lawnwatch.store import ObjectStore

SLACK = timedelta(minutes=5)  # between the time in an id and the record's own: ids never go back, clocks do
PRUNED = 500  # records deleted in one transaction


class PredictionRow(Base):
    """One answer of the API."""

    __tablename__ = "predictions"
    __table_args__ = (
        Index("ix_predictions_label_id", "label", "id"),
        Index("ix_predictions_client_id", "client", "id"),
        Index("ix_predictions_model_version_id", "model_version", "id"),
    )

    id: Mapped[str] = mapped_column(CHAR(36), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    request_id: Mapped[str] = mapped_column(String(64))
    client: Mapped[str | None] = mapped_column(CHAR(16))
    label: Mapped[str] = mapped_column(String(190))
    confidence: Mapped[float] = mapped_column(Float(53))
    probabilities: Mapped[dict[str, float]] = mapped_column(JSON)
    unknown_score: Mapped[float | None] = mapped_column(Float(53))
    model_name: Mapped[str] = mapped_column(String(190))
    model_version: Mapped[int] = mapped_column(Integer)
    bundle_sha256: Mapped[str] = mapped_column(CHAR(64))
    image_format: Mapped[str] = mapped_column(String(8))
    image_width: Mapped[int] = mapped_column(Integer)
    image_height: Mapped[int] = mapped_column(Integer)
    image_bytes: Mapped[int] = mapped_column(BigInteger)
    image_key: Mapped[str | None] = mapped_column(String(255))
    brightness: Mapped[float | None] = mapped_column(Float(53))
    sharpness: Mapped[float | None] = mapped_column(Float(53))
    embedding: Mapped[bytes | None] = mapped_column(LargeBinary(8192))
    total_ms: Mapped[float] = mapped_column(Float(53))


@dataclass(frozen=True)
class PredictionPage:
    """Predictions, newest first; `next` is what `before` must be for the page after, None at the end."""

    items: list[Prediction]
    next: str | None


def insert(catalog: Catalog, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows (`Prediction.as_row`) in one transaction.

    Raises:
        Conflict: one of them is there already.
        DataError: the database refuses one of them.
        Unavailable: the database does not answer.
    """
    try:
        with catalog.session() as session:
            session.execute(insert_into(PredictionRow), list(rows))
    except DuplicateRow as error:
        raise Conflict("A prediction record with this id is there already.") from error
    except SQLAlchemyError as error:
        raise DataError(f"The database refuses prediction records: {getattr(error, 'orig', error)}.") from error


def list_predictions(
    catalog: Catalog,
    *,
    limit: int = 50,
    before: str | None = None,
    label: str | None = None,
    version: int | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    min_confidence: float | None = None,
    max_confidence: float | None = None,
    client: str | None = None,
) -> PredictionPage:
    """Predictions, newest first, without their embeddings.

    Args:
        limit: 1 … 200.
        before: only predictions older than this id.
        label, version, client: only those with this label, model version, API key.
        since, until: only those made at or after, and before, these moments; UTC unless they say otherwise.
        min_confidence, max_confidence: only those at least, and at most, so confident.

    Raises:
        InputError: `limit` is out of range or `before` is no prediction id.
        Unavailable: the database does not answer.
    """
    if not 1 <= limit <= PAGE:
        raise InputError(f"limit must be 1 to {PAGE}; received {limit}.")
    query = select(PredictionRow).options(defer(PredictionRow.embedding)).order_by(PredictionRow.id.desc())
    if before is not None:
        query = query.where(PredictionRow.id < _checked(before))
    if since is not None:
        since = _utc(since)
        query = query.where(PredictionRow.id >= _first_id(since, -SLACK), PredictionRow.created_at >= since)
    if until is not None:
        until = _utc(until)
        query = query.where(PredictionRow.id < _first_id(until, SLACK), PredictionRow.created_at < until)
    for column, wanted in (
        (PredictionRow.label, label),
        (PredictionRow.model_version, version),
        (PredictionRow.client, client),
    ):
        if wanted is not None:
            query = query.where(column == wanted)
    if min_confidence is not None:
        query = query.where(PredictionRow.confidence >= min_confidence)
    if max_confidence is not None:
        query = query.where(PredictionRow.confidence <= max_confidence)
    with catalog.session() as session:
        items = [_prediction(row) for row in session.scalars(query.limit(limit + 1))]
    more = len(items) > limit
    return PredictionPage(items[:limit], items[limit - 1].prediction_id if more else None)


def get_prediction(catalog: Catalog, prediction_id: str) -> Prediction:
    """One prediction.

    Raises:
        InputError: not a prediction id.
        NotFound: no prediction has this id (or it is still being written).
        Unavailable: the database does not answer.
    """
    with catalog.session() as session:
        row = session.get(PredictionRow, _checked(prediction_id))
        if row is None:
            raise NotFound(f"No prediction {prediction_id}.", hint="GET /predictions lists them.")
        return _prediction(row)


def _checked(prediction_id: str) -> str:
    try:
        return str(uuid.UUID(prediction_id))
    except ValueError:
        raise InputError(
            f"{prediction_id[:60]!r} is not a prediction id.",
            hint="An id looks like 0198f2a4-7c1e-7b3a-9c55-3f0d1f2e4a6b.",
        ) from None


def _utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except OverflowError:
        raise InputError(f"{moment.isoformat()} is before or after all that a calendar knows.") from None


def _first_id(moment: datetime, shift: timedelta) -> str:
    """The least id of a moment: ids begin with their time, so the primary key finds a span without an index more."""
    return str(uuid.UUID(int=max(0, int((moment.timestamp() + shift.total_seconds()) * 1000)) << 80))


def _prediction(row: PredictionRow) -> Prediction:
    unloaded = inspect(row).unloaded
    values: dict[str, Any] = {
        name: None if name in unloaded else getattr(row, name)
        for name in Prediction.__slots__
        if name != "prediction_id"
    }
    created = values["created_at"]
    values["created_at"] = created if created.tzinfo else created.replace(tzinfo=UTC)
    return Prediction(prediction_id=row.id, **values)


# --- forgetting ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pruned:
    """What was deleted."""

    records: int
    pictures: int
    before: datetime | None
    message: str


def prune(
    catalog: Catalog, store: ObjectStore, *, days: int, progress: Callable[[str], None] = lambda _: None
) -> Pruned:
    """Delete the predictions older than `days`, each picture before the record that names it: a picture that nothing
    names could never be found again. Killed midway, it goes on where it stopped.

    Args:
        days: 0 keeps everything.

    Raises:
        InputError: `days` is negative.
        Unavailable: the database or the store does not answer.
    """
    if days < 0:
        raise InputError(f"days must be 0 or more; received {days}.")
    if days == 0:
        return Pruned(0, 0, None, "Predictions are kept for ever (LAWNWATCH_SERVING__RETENTION_DAYS is 0).")
    before = datetime.now(UTC) - timedelta(days=days)
    old = (
        select(PredictionRow.id, PredictionRow.image_key)
        .where(PredictionRow.created_at < before)
        .order_by(PredictionRow.created_at)
        .limit(PRUNED)
    )
    records = pictures = 0
    while True:
        with catalog.session() as session:
            batch = session.execute(old).all()
        if not batch:
            break
        for _, key in batch:
            if key is not None:
                store.delete(key)
                pictures += 1
        with catalog.session() as session:
            session.execute(delete(PredictionRow).where(PredictionRow.id.in_([identity for identity, _ in batch])))
        records += len(batch)
        progress(f"{records} predictions deleted")
    return Pruned(
        records,
        pictures,
        before,
        f"Deleted {records} predictions older than {days} days, {pictures} pictures with them.",
    )
