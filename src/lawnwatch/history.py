"""The table of predictions: written by the batch, read by the page, forgotten by age."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError as DuplicateRow
from sqlalchemy.exc import SQLAlchemyError

from lawnwatch.database import Database, UtcDateTime, metadata
from lawnwatch.errors import Conflict, DataError, InputError, NotFound
from lawnwatch.predictions import PAGE, Prediction
from lawnwatch.store import ObjectStore

SLACK = timedelta(minutes=5)  # between the time in an id and the record's own: ids never go back, clocks do
PRUNED = 500  # records deleted in one transaction


PREDICTIONS = sa.Table(
    "predictions",
    metadata,
    sa.Column("id", sa.CHAR(36), primary_key=True),
    sa.Column("created_at", UtcDateTime, nullable=False, index=True),
    sa.Column("request_id", sa.String(64), nullable=False),
    sa.Column("client", sa.CHAR(16)),
    sa.Column("label", sa.String(190), nullable=False),
    sa.Column("confidence", sa.Float(53), nullable=False),
    sa.Column("probabilities", sa.JSON, nullable=False),
    sa.Column("unknown_score", sa.Float(53)),
    sa.Column("model_name", sa.String(190), nullable=False),
    sa.Column("model_version", sa.Integer, nullable=False),
    sa.Column("bundle_sha256", sa.CHAR(64), nullable=False),
    sa.Column("image_format", sa.String(8), nullable=False),
    sa.Column("image_width", sa.Integer, nullable=False),
    sa.Column("image_height", sa.Integer, nullable=False),
    sa.Column("image_bytes", sa.BigInteger, nullable=False),
    sa.Column("image_key", sa.String(255)),
    sa.Column("brightness", sa.Float(53)),
    sa.Column("sharpness", sa.Float(53)),
    sa.Column("embedding", sa.LargeBinary(8192)),
    sa.Column("total_ms", sa.Float(53), nullable=False),
    sa.Index("ix_predictions_label_id", "label", "id"),
    sa.Index("ix_predictions_client_id", "client", "id"),
    sa.Index("ix_predictions_model_version_id", "model_version", "id"),
)
_COLUMNS = PREDICTIONS.c
_LISTED = [column for column in _COLUMNS if column.name != "embedding"]


@dataclass(frozen=True)
class PredictionPage:
    """Predictions, newest first; `next` is what `before` must be for the page after, None at the end."""

    items: list[Prediction]
    next: str | None


def insert(database: Database, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows (`Prediction.as_row`) in one transaction.

    Raises:
        Conflict: one of them is there already.
        DataError: the database refuses one of them.
        Unavailable: the database does not answer.
    """
    try:
        with database.transaction() as connection:
            connection.execute(sa.insert(PREDICTIONS), list(rows))
    except DuplicateRow as error:
        raise Conflict("A prediction record with this id is there already.") from error
    except SQLAlchemyError as error:
        raise DataError(f"The database refuses prediction records: {getattr(error, 'orig', error)}.") from error


def list_predictions(
    database: Database,
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
    query = sa.select(*_LISTED).order_by(_COLUMNS.id.desc())
    if before is not None:
        query = query.where(_COLUMNS.id < _checked(before))
    if since is not None:
        since = _utc(since)
        query = query.where(_COLUMNS.id >= _first_id(since, -SLACK), _COLUMNS.created_at >= since)
    if until is not None:
        until = _utc(until)
        query = query.where(_COLUMNS.id < _first_id(until, SLACK), _COLUMNS.created_at < until)
    for column, wanted in (
        (_COLUMNS.label, label),
        (_COLUMNS.model_version, version),
        (_COLUMNS.client, client),
    ):
        if wanted is not None:
            query = query.where(column == wanted)
    if min_confidence is not None:
        query = query.where(_COLUMNS.confidence >= min_confidence)
    if max_confidence is not None:
        query = query.where(_COLUMNS.confidence <= max_confidence)
    with database.reading() as connection:
        items = [_prediction(row) for row in connection.execute(query.limit(limit + 1))]
    more = len(items) > limit
    return PredictionPage(items[:limit], items[limit - 1].prediction_id if more else None)


def get_prediction(database: Database, prediction_id: str) -> Prediction:
    """One prediction.

    Raises:
        InputError: not a prediction id.
        NotFound: no prediction has this id (or it is still being written).
        Unavailable: the database does not answer.
    """
    query = sa.select(PREDICTIONS).where(_COLUMNS.id == _checked(prediction_id))
    with database.reading() as connection:
        row = connection.execute(query).one_or_none()
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


def _prediction(row: sa.Row[Any]) -> Prediction:
    values = dict(row._mapping)  # SQLAlchemy's public name for it
    return Prediction(prediction_id=values.pop("id"), **values)


# --- forgetting ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pruned:
    """What was deleted."""

    records: int
    pictures: int
    before: datetime | None
    message: str


def prune(
    database: Database, store: ObjectStore, *, days: int, progress: Callable[[str], None] = lambda _: None
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
        sa.select(_COLUMNS.id, _COLUMNS.image_key)
        .where(_COLUMNS.created_at < before)
        .order_by(_COLUMNS.created_at)
        .limit(PRUNED)
    )
    records = pictures = 0
    while True:
        with database.reading() as connection:
            batch = connection.execute(old).all()
        if not batch:
            break
        for _, key in batch:
            if key is not None:
                store.delete(key)
                pictures += 1
        with database.transaction() as connection:
            connection.execute(sa.delete(PREDICTIONS).where(_COLUMNS.id.in_([identity for identity, _ in batch])))
        records += len(batch)
        progress(f"{records} predictions deleted")
    return Pruned(
        records,
        pictures,
        before,
        f"Deleted {records} predictions older than {days} days, {pictures} pictures with them.",
    )
