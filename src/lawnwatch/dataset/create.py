"""Making a snapshot of what is stored."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import sqlalchemy as sa

from lawnwatch import __version__
from lawnwatch.catalog import Catalog, SnapshotRecord
from lawnwatch.config import Settings
from lawnwatch.database import utc_now
from lawnwatch.dataset.snapshot import SPLITS, Row, Snapshot, id_of, load_snapshot, write_snapshot
from lawnwatch.dataset.splits import FreshTest, StoredImage, judge_stored, usable_of
from lawnwatch.errors import InputError, IntegrityError
from lawnwatch.store import ObjectStore

NAMED = 3  # in a sentence


def create_snapshot(settings: Settings, catalog: Catalog, store: ObjectStore, *, new_to_test: float = 0.0) -> Snapshot:
    """Freeze what is stored now.

    The pictures are settled (see `settle`), those that resemble none before get their split, the manifest is written
    to the store, and only then the snapshot is recorded. The same stored images give the same snapshot, unchanged; when
    others were made since, as after a correction that was taken back, it becomes the latest again, and when it is
    damaged in the store, it is written again.

    Args:
        new_to_test: share of the pictures like none before that join the test split of a class that has one already.
            The only way for that split to grow by other than copies.

    Raises:
        InputError: `new_to_test` is not a share.
        DataError: nothing stored, fewer than two classes, or a class with too few images; no split is recorded.
        IntegrityError: the store lacks objects, or they have another size than was recorded; no snapshot is made.
        Conflict: another process is busy with a snapshot, or the records kept changing meanwhile.
        Unavailable: database or store do not answer; a re-run goes on where it stopped.
    """
    if not 0 <= new_to_test < 1:
        raise InputError(f"The share of new images for the test split is from 0 to below 1; received {new_to_test}.")
    with catalog.exclusive("snapshot"):
        records, settled = judge_stored(settings, catalog, FreshTest(to_test=new_to_test))
        usable = usable_of(records)
        made_by = {
            "program": f"lawnwatch {__version__}",
            "git_commit": settings.git_commit,
            "run_id": settings.run_id,
            "new_to_test": new_to_test,
        }
        snapshot = _describe(usable, settled.label_conflicts + settled.split_bridges, made_by)
        with catalog.session() as session:
            known = session.get(SnapshotRecord, snapshot.id)
            newest = session.scalar(sa.select(sa.func.max(SnapshotRecord.created_at)))
        there = None
        if known is not None:
            with suppress(IntegrityError):  # what is damaged in the store is written again
                there = load_snapshot(catalog, store, snapshot.id)
        if there is not None and there.created_at == newest:
            return there
        _must_be_stored(store, usable)
        created_at = snapshot.created_at
        if newest is not None:  # `latest` is the last one made, even by a machine whose clock is behind
            created_at = max(created_at, newest + timedelta(microseconds=1))
        if there is not None:
            snapshot = replace(there, created_at=created_at, renewed=True)
        else:
            snapshot = replace(snapshot, created_at=created_at, created=known is None, renewed=known is not None)
            snapshot = write_snapshot(store, snapshot)
        catalog.retried(partial(_announce, catalog, snapshot))
        return snapshot


def _announce(catalog: Catalog, snapshot: Snapshot) -> None:
    """From here on the snapshot exists. Done twice it changes nothing: a commit's answer may be lost."""
    with catalog.session() as session:
        session.merge(
            SnapshotRecord(
                id=snapshot.id,
                counts=snapshot.counts,
                samples=snapshot.samples,
                created_at=snapshot.created_at,
            )
        )


def _rows(usable: list[StoredImage]) -> list[Row]:
    rows: dict[str, Row] = {}
    for record in usable:  # ordered by SHA-256, then id: of copies, the first record speaks
        if record.sha256 not in rows:
            rows[record.sha256] = Row(
                sha256=record.sha256,
                object_key=record.object_key,
                label=record.label,
                split=str(record.split),
                group=str(record.group),
                url=record.url,
                width=record.width,
                height=record.height,
                brightness=record.brightness,
                sharpness=record.sharpness,
            )
    return list(rows.values())


def _describe(usable: list[StoredImage], quarantined: int, made_by: dict[str, Any]) -> Snapshot:
    rows = _rows(usable)
    classes = sorted({row.label for row in rows})
    counts = {split: dict.fromkeys(classes, 0) for split in SPLITS}
    for row in rows:
        counts[row.split][row.label] += 1
    return Snapshot(
        id=id_of(rows),
        created_at=utc_now(),
        classes=classes,
        counts=counts,
        samples=any(record.sample for record in usable),
        rows=rows,
        quarantined=quarantined,
        made_by=made_by,
        created=True,
    )


def _must_be_stored(store: ObjectStore, usable: list[StoredImage]) -> None:
    """Every object is there and as long as it was: one listing, where a question each would take minutes.

    Whether its bytes still are what they were, `lawnwatch snapshot verify` and `lawnwatch data recheck` tell.
    """
    expected = {record.object_key: record for record in usable}
    wrong: list[str] = []
    for info in store.list("images/"):
        record = expected.pop(info.key, None)
        if record is not None and record.bytes is not None and record.bytes != info.size:
            wrong.append(f"{record.url} (object of {info.size:,} bytes, {record.bytes:,} were stored)")
    wrong += [f"{record.url} (object missing)" for record in expected.values()]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise IntegrityError(
            f"The store does not hold {len(wrong)} of {len(usable)} pictures as they were stored: "
            f"{', '.join(wrong[:NAMED])}{more}. No snapshot was made.",
            hint="`lawnwatch data recheck` fetches them anew where their sources still have them.",
        )
