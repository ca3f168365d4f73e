"""A snapshot: what it holds, how it lies in the store, how it is read and compared."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from lawnwatch.catalog import Catalog, ImageRecord, SnapshotRecord
from lawnwatch.errors import IntegrityError, NotFound, Unavailable
from lawnwatch.store import ObjectStore, sha256_of

SPLITS = ("train", "validation", "test")
FORMAT = 1
MANIFEST_BATCH = 10_000
LISTED = 20  # in a report
DAMAGED = (
    "Restore the store from a backup, or run `lawnwatch snapshot create`: it writes the snapshot again while the "
    "stored images are still those of the snapshot, and else makes a new one."
)


@dataclass(frozen=True, slots=True)
class Row:
    """One picture of a snapshot."""

    sha256: str
    object_key: str
    label: str
    split: str
    group: str
    url: str
    width: int
    height: int
    brightness: float
    sharpness: float


@dataclass(frozen=True)
class Snapshot:
    """An immutable list of pictures with their splits.

    Attributes:
        id: SHA-256 of the rows, 64 hexadecimal digits.
        classes: class names, sorted; a label's index here is its class number.
        counts: pictures by split and class.
        samples: True when any picture is a drawn sample, not a photograph.
        quarantined: records that were set aside when it was made: label conflicts and split bridges.
        manifest_sha256: of the manifest in the store.
        made_by: program, commit and Airflow run that made it, and the share of new pictures it sent to the test split.
        created: False when it was there already.
        renewed: True when it was there already and became the latest again, or was damaged and written again.
    """

    id: str
    created_at: datetime
    classes: list[str]
    counts: dict[str, dict[str, int]]
    samples: bool
    rows: list[Row] = field(repr=False)
    quarantined: int = 0
    manifest_sha256: str = ""
    made_by: dict[str, Any] = field(default_factory=dict)
    created: bool = False
    renewed: bool = False

    def split(self, name: str) -> list[Row]:
        """The rows of one split, in the snapshot's order."""
        return [row for row in self.rows if row.split == name]

    def summary(self) -> dict[str, Any]:
        """The snapshot without its rows, with one sentence for people."""
        sizes = ", ".join(f"{sum(self.counts[split].values())} {split}" for split in SPLITS)
        new = "New snapshot" if self.created else "Renewed snapshot" if self.renewed else "Snapshot"
        return {
            "snapshot": self.id,
            "created": self.created,
            "renewed": self.renewed,
            "created_at": self.created_at.isoformat(),
            "images": len(self.rows),
            "classes": self.classes,
            "counts": self.counts,
            "quarantined": self.quarantined,
            "samples": self.samples,
            "manifest_sha256": self.manifest_sha256,
            "made_by": self.made_by,
            "message": f"{new} {self.id[:12]}: {len(self.rows)} images of {', '.join(self.classes)} ({sizes})"
            + (f"; {self.quarantined} quarantined" if self.quarantined else "")
            + ("; drawn samples, not photographs" if self.samples else "")
            + ".",
        }


def write_snapshot(store: ObjectStore, snapshot: Snapshot) -> Snapshot:
    """The manifest first, the summary last: a summary in the store means a whole snapshot."""
    prefix = f"snapshots/{snapshot.id}"
    with tempfile.TemporaryDirectory(prefix="lawnwatch-") as folder:
        file = Path(folder) / "manifest.parquet"
        try:
            _write_manifest(file, snapshot.rows)
        except OSError as error:
            raise Unavailable(
                f"The manifest cannot be written on this machine: {error.strerror or error}.",
                hint="Free space in the folder for temporary files (TMPDIR) and run the same command again.",
            ) from error
        digest = sha256_of(file)
        store.put(f"{prefix}/manifest.parquet", file, sha256=digest)
    snapshot = replace(snapshot, manifest_sha256=digest)
    summary = {**snapshot.summary(), "format": FORMAT}
    store.put(
        f"{prefix}/snapshot.json",
        json.dumps(summary, indent=1, ensure_ascii=False).encode(),
        content_type="application/json",
    )
    return snapshot


def _write_manifest(file: Path, rows: Sequence[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"int": pa.int64(), "float": pa.float64(), "str": pa.string()}
    schema = pa.schema([(column.name, kinds[str(column.type)]) for column in fields(Row)])
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, len(rows), MANIFEST_BATCH):
            batch = rows[start : start + MANIFEST_BATCH]
            columns = [[getattr(row, name) for row in batch] for name in schema.names]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def id_of(rows: list[Row]) -> str:
    """What training reads of the rows, hashed: pictures, labels and splits, in order of SHA-256."""
    digest = hashlib.sha256(f"snapshot {FORMAT}\n".encode())
    encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make one for every row
    for row in rows:
        digest.update(encode([row.sha256, row.label, row.split, row.group]).encode() + b"\n")
    return digest.hexdigest()


def list_snapshots(catalog: Catalog) -> list[dict[str, Any]]:
    """All snapshots, newest first: id, time, counts."""
    with catalog.session() as session:
        records = session.scalars(sa.select(SnapshotRecord).order_by(SnapshotRecord.created_at.desc()))
        return [
            {"snapshot": r.id, "created_at": r.created_at.isoformat(), "counts": r.counts, "samples": r.samples}
            for r in records
        ]


def load_snapshot(catalog: Catalog, store: ObjectStore, snapshot: str = "latest") -> Snapshot:
    """Read a snapshot back and check it against its id.

    Args:
        snapshot: an id, the beginning of one, or `latest`.

    Raises:
        NotFound: no such snapshot, or more than one that begins so.
        IntegrityError: it is recorded, but missing or damaged in the store, or not what its id says.
    """
    with catalog.session() as session:
        query = sa.select(SnapshotRecord).order_by(SnapshotRecord.created_at.desc()).limit(2)
        if snapshot == "latest":
            found = list(session.scalars(query.limit(1)))
        else:
            found = list(session.scalars(query.where(SnapshotRecord.id.startswith(snapshot, autoescape=True))))
    if len(found) != 1 or not snapshot:
        raise NotFound(
            "There is no snapshot yet." if snapshot == "latest" else f"{len(found)} snapshots begin with {snapshot!r}.",
            hint="`lawnwatch snapshot create` makes one, `lawnwatch snapshot list` lists them.",
        )
    record = found[0]
    try:
        return _read_snapshot(store, record)
    except NotFound as error:
        raise IntegrityError(f"Snapshot {record.id[:12]} is not whole: {error.message}", hint=DAMAGED) from error
    except (ValueError, KeyError, TypeError) as error:  # cut off, or something else
        message = f"What the store holds as snapshot {record.id[:12]} cannot be read ({type(error).__name__})."
        raise IntegrityError(message, hint=DAMAGED) from error


def _read_snapshot(store: ObjectStore, record: SnapshotRecord) -> Snapshot:
    prefix = f"snapshots/{record.id}"
    summary = json.loads(store.get(f"{prefix}/snapshot.json"))
    manifest = store.get(f"{prefix}/manifest.parquet")
    if hashlib.sha256(manifest).hexdigest() != summary["manifest_sha256"]:
        raise IntegrityError(f"The manifest of snapshot {record.id[:12]} has been altered.", hint=DAMAGED)
    rows = _read_manifest(manifest)
    if id_of(rows) != record.id:
        raise IntegrityError(f"The manifest of snapshot {record.id[:12]} does not give its id.", hint=DAMAGED)
    return Snapshot(
        id=record.id,
        created_at=record.created_at,
        classes=summary["classes"],
        counts=summary["counts"],
        samples=record.samples,
        rows=rows,
        quarantined=summary["quarantined"],
        manifest_sha256=summary["manifest_sha256"],
        made_by=summary.get("made_by", {}),
    )


def _read_manifest(manifest: bytes) -> list[Row]:
    import pyarrow.parquet as pq

    rows: list[Row] = []
    names = [column.name for column in fields(Row)]
    for batch in pq.ParquetFile(io.BytesIO(manifest)).iter_batches(batch_size=MANIFEST_BATCH, columns=names):
        columns = {name: batch.column(name).to_pylist() for name in names}
        for name in ("label", "split"):  # a few words, said a million times
            columns[name] = [sys.intern(word) for word in columns[name]]
        rows += map(Row, *(columns[name] for name in names))
    return rows


def show_snapshot(catalog: Catalog, store: ObjectStore, snapshot: str = "latest") -> dict[str, Any]:
    """A snapshot without its rows, and what is quarantined now, with the reasons and the first few of each.

    Raises:
        NotFound, IntegrityError: as `load_snapshot`.
    """
    found = load_snapshot(catalog, store, snapshot)
    quarantined: dict[str, dict[str, Any]] = {}
    with catalog.session() as session:
        query = sa.select(ImageRecord.url, ImageRecord.reason).where(ImageRecord.state == "quarantined")
        for url, reason in session.execute(query.order_by(ImageRecord.id)):
            cause = (reason or "unknown").partition(":")[0]
            entry = quarantined.setdefault(cause, {"count": 0, "first": []})
            entry["count"] += 1
            if entry["count"] <= LISTED:
                entry["first"].append({"url": url, "reason": reason})
    return {**found.summary(), "quarantined_now": quarantined}


def diff_snapshots(catalog: Catalog, store: ObjectStore, one: str, other: str) -> dict[str, Any]:
    """What became of the pictures between two snapshots: counts, and the first few of each kind.

    Raises:
        NotFound, IntegrityError: as `load_snapshot`.
    """
    old, new = load_snapshot(catalog, store, one), load_snapshot(catalog, store, other)
    before, after = ({row.sha256: row for row in snapshot.rows} for snapshot in (old, new))
    both = [(before[sha], row) for sha, row in after.items() if sha in before]

    def listed(rows: list[Row]) -> dict[str, Any]:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for row in rows:
            counts[row.split][row.label] += 1
        first = [{"sha256": r.sha256, "url": r.url, "label": r.label, "split": r.split} for r in rows[:LISTED]]
        return {"count": len(rows), "counts": {split: dict(counts[split]) for split in SPLITS}, "first": first}

    def changed(column: str) -> dict[str, Any]:
        pairs = [(was, now) for was, now in both if getattr(was, column) != getattr(now, column)]
        ways = Counter(f"{getattr(was, column)} → {getattr(now, column)}" for was, now in pairs)
        first = [
            {"sha256": now.sha256, "url": now.url, "from": getattr(was, column), "to": getattr(now, column)}
            for was, now in pairs[:LISTED]
        ]
        return {"count": len(pairs), "counts": dict(ways), "first": first}

    added = listed([row for sha, row in after.items() if sha not in before])
    removed = listed([row for sha, row in before.items() if sha not in after])
    relabelled, moved = changed("label"), changed("split")
    return {
        "from": old.id,
        "to": new.id,
        "counts": {"from": old.counts, "to": new.counts},
        "added": added,
        "removed": removed,
        "relabelled": relabelled,
        "moved": moved,
        "message": f"From {old.id[:12]} to {new.id[:12]}: {added['count']} images added, {removed['count']} removed, "
        f"{relabelled['count']} relabelled, {moved['count']} moved to another split.",
    }
