"""Snapshots: immutable lists of images with their splits, and the pictures behind them.

A snapshot is named by the SHA-256 of its rows; the same stored images always give the same snapshot. A split is for
life: a picture, its copies and its resizings (the duplicate group) share one, recorded when a snapshot first sees them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.dialects import mysql

from lawnwatch import images as pictures
from lawnwatch.catalog import Catalog, ImageRecord, Label, SnapshotRecord, affected, utc_now
from lawnwatch.config import DataSettings, Settings
from lawnwatch.errors import Conflict, DataError, InputError, IntegrityError, NotFound
from lawnwatch.store import ObjectStore

SPLITS = ("train", "validation", "test")
FORMAT = 1
JUDGED = ("label_conflict:", "split_bridge:")  # the quarantines that are judged here, anew each time
ATTEMPTS = 5
READ_BATCH = 5_000
WRITE_BATCH = 5_000
NEAR_KEPT = 1_000
PAIRS_AT_ONCE = 1_000_000


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
        created: False when it was there already.
    """

    id: str
    created_at: str
    classes: list[str]
    counts: dict[str, dict[str, int]]
    samples: bool
    rows: list[Row] = field(repr=False)
    quarantined: int = 0
    created: bool = False

    def split(self, name: str) -> list[Row]:
        """The rows of one split, in the snapshot's order."""
        return [row for row in self.rows if row.split == name]

    def summary(self) -> dict[str, Any]:
        """The snapshot without its rows, with one sentence for people."""
        sizes = ", ".join(f"{sum(self.counts[split].values())} {split}" for split in SPLITS)
        new = "New snapshot" if self.created else "Snapshot"
        return {
            "snapshot": self.id,
            "created": self.created,
            "created_at": self.created_at,
            "images": len(self.rows),
            "classes": self.classes,
            "counts": self.counts,
            "quarantined": self.quarantined,
            "samples": self.samples,
            "message": f"{new} {self.id[:12]}: {len(self.rows)} images of {', '.join(self.classes)} ({sizes})"
            + (f"; {self.quarantined} quarantined" if self.quarantined else "")
            + ("; drawn samples, not photographs" if self.samples else "")
            + ".",
        }


# --- judging what is stored -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settled:
    """What the stored pictures are to each other.

    Attributes:
        images: records whose picture may be used.
        groups: duplicate groups of these.
        label_conflicts: records quarantined because copies of their picture carry different labels.
        split_bridges: records quarantined because they resemble pictures of different splits.
        near_duplicates: SHA-256 of two pictures that resemble each other and are not the same bytes; at most 1,000.
    """

    images: int
    groups: int
    label_conflicts: int
    split_bridges: int
    near_duplicates: list[tuple[str, str]] = field(repr=False)


@dataclass(slots=True)
class _Record:
    """An image record as it was read (`read`), and what it is judged to be."""

    id: int
    sha256: str
    phash: int
    label_id: int
    label: str
    sample: bool
    state: str
    reason: str | None
    group: str | None
    split: str | None
    object_key: str
    url: str
    width: int
    height: int
    bytes: int | None
    brightness: float
    sharpness: float
    read: tuple[str, str | None, str | None, str | None] = ("", None, None, None)

    @property
    def judgement(self) -> tuple[str, str | None, str | None, str | None]:
        return self.state, self.reason, self.group, self.split


def settle(settings: Settings, catalog: Catalog) -> Settled:
    """Judge all stored pictures anew: who is a copy of whom, whose labels contradict each other, who bridges splits.

    Recorded are the duplicate groups, the split of newcomers to a group that has one, and the quarantines; a quarantine
    ends when its cause does. Pictures like none before get their split with the first snapshot that holds them.

    Raises:
        Conflict: another process is busy with a snapshot, or the records kept changing meanwhile.
        Unavailable: the database does not answer; nothing is recorded.
    """
    with catalog.exclusive("snapshot"):
        return _settle(settings, catalog)[1]


def _settle(settings: Settings, catalog: Catalog, fresh: _Fresh | None = None) -> tuple[list[_Record], Settled]:
    """Read, judge without holding a lock, and record it in one transaction if it still is what was read."""
    for _ in range(ATTEMPTS):
        records = catalog.retried(lambda: _read(catalog))
        settled = _judge(records, settings.data)
        lacking: DataError | None = None
        if fresh is not None:
            try:
                _must_suffice(_usable(records), settings.data)
                _split_fresh(records, settings.data, fresh)
            except DataError as error:
                lacking = error  # said after the quarantines are recorded: they may be what is lacking
        if catalog.retried(partial(_record, catalog, records)):
            if lacking is not None:
                raise lacking
            return records, settled
    raise Conflict("The image records kept changing while they were judged.", hint="Run the same command again.")


def _read(catalog: Catalog) -> list[_Record]:
    """Every record whose picture is stored, or that once got a split: it speaks for its group for ever."""
    image = ImageRecord
    judged = sa.and_(image.state == "quarantined", sa.or_(*(image.reason.startswith(reason) for reason in JUDGED)))
    query = (
        sa.select(
            image.id, image.sha256, image.phash, image.label_id, image.label_source, image.state, image.reason,
            image.group_id, image.split, image.object_key, image.url, image.width, image.height, image.bytes,
            image.brightness, image.sharpness,
        )
        .where(sa.or_(image.state == "stored", judged, image.split.is_not(None)), image.sha256.is_not(None))
        .order_by(image.sha256, image.id)
    )  # fmt: skip
    records = []
    with catalog.session() as session:
        names = dict(session.execute(sa.select(Label.id, Label.name)).all())
        for row in session.execute(query.execution_options(yield_per=READ_BATCH)):
            state, reason = str(row.state), row.reason
            if state == "quarantined" and (reason or "").startswith(JUDGED):
                # Judged anew each time: a correction frees all copies, and another copy must not slip through.
                state, reason = "stored", None
            records.append(
                _Record(
                    id=row.id,
                    sha256=row.sha256,
                    phash=int(row.phash or "0", 16),
                    label_id=row.label_id,
                    label=names[row.label_id],
                    sample=row.label_source == "sample",
                    state=state,
                    reason=reason,
                    group=row.group_id,
                    split=row.split and sys.intern(row.split),
                    object_key=row.object_key or "",
                    url=row.url,
                    width=row.width or 0,
                    height=row.height or 0,
                    bytes=row.bytes,
                    brightness=row.brightness or 0.0,
                    sharpness=row.sharpness or 0.0,
                    read=(sys.intern(str(row.state)), row.reason, row.group_id, row.split and sys.intern(row.split)),
                )
            )
    return records


def _usable(records: Iterable[_Record]) -> list[_Record]:
    return [record for record in records if record.state == "stored"]


def _judge(records: list[_Record], settings: DataSettings) -> Settled:
    """Give every record its duplicate group, newcomers their group's split, and quarantine what contradicts."""
    shas = sorted({record.sha256 for record in records})
    position = {sha: number for number, sha in enumerate(shas)}
    hashes = np.zeros(len(shas), np.uint64)
    for record in records:
        hashes[position[record.sha256]] = record.phash
    roots, near = duplicate_groups(hashes, settings.near_duplicate_distance)
    members_of: dict[int, list[_Record]] = defaultdict(list)
    for record in records:
        members_of[int(roots[position[record.sha256]])].append(record)

    for members in members_of.values():
        stored = _usable(members)
        labels = sorted({record.label for record in stored})
        settled = [record for record in members if record.split is not None]
        splits = sorted({str(record.split) for record in settled})
        newcomers = [record for record in stored if record.split is None]
        if len(splits) <= 1:
            # The smallest name that the group ever had; of two groups that a newcomer joins, too.
            group = min((str(r.group) for r in settled if r.group), default=members[0].sha256)
            for record in settled + newcomers:
                record.group = group
        if len(labels) > 1:
            _quarantine(stored, f"label_conflict: the same picture is labelled {' and '.join(labels)}")
        elif len(splits) == 1:
            for record in newcomers:
                record.split = splits[0]
        elif splits:
            reason = f"split_bridge: resembles pictures of the splits {' and '.join(splits)}"
            _quarantine(newcomers, reason)
            _quarantine(_touching(settled, settings.near_duplicate_distance), reason)

    usable = _usable(records)
    reasons = Counter((record.reason or "").partition(":")[0] for record in records if record.state == "quarantined")
    return Settled(
        images=len(usable),
        groups=len({record.group for record in usable}),
        label_conflicts=reasons["label_conflict"],
        split_bridges=reasons["split_bridge"],
        near_duplicates=[(shas[one], shas[other]) for one, other in near],
    )


def _quarantine(members: Iterable[_Record], reason: str) -> None:
    for record in members:
        record.state, record.reason = "quarantined", reason[:500]


def _touching(settled: list[_Record], distance: int) -> list[_Record]:
    """Of records that have their splits, the stored ones that must go because they resemble one of another split.

    Only a picture that changed at its source, or a larger distance in the settings, brings this about. The test split
    is kept whole before validation, validation before train.
    """
    hashes = np.array([record.phash for record in settled], np.uint64)
    roots, _ = duplicate_groups(hashes, distance)
    keeps: dict[int, int] = {}
    for root, record in zip(roots.tolist(), settled, strict=True):
        keeps[root] = max(keeps.get(root, 0), SPLITS.index(str(record.split)))
    return [
        record
        for root, record in zip(roots.tolist(), settled, strict=True)
        if record.state == "stored" and SPLITS.index(str(record.split)) != keeps[root]
    ]


@dataclass(frozen=True)
class _Fresh:
    """How pictures that resemble none before are split.

    Attributes:
        to_test: share of those that go to the test split although their class has one already; a deliberate act.
    """

    to_test: float = 0.0


def _split_fresh(records: list[_Record], settings: DataSettings, rule: _Fresh) -> None:
    """Split groups seen for the first time: a class's first groups into all three, later ones never into test."""
    seen = {record.label for record in records if record.split is not None}
    fresh: dict[str, list[_Record]] = defaultdict(list)
    for record in _usable(records):
        if record.split is None:
            fresh[str(record.group)].append(record)
    by_label: dict[str, list[str]] = defaultdict(list)
    for group, members in fresh.items():
        by_label[members[0].label].append(group)
    for label, names in by_label.items():
        names.sort(key=lambda name: hashlib.sha256(f"split:{name}".encode()).digest())
        sizes = {name: len({record.sha256 for record in fresh[name]}) for name in names}
        total, taken = sum(sizes.values()), 0
        for name in names:
            if label in seen:
                # A share of the hash space, so that the split does not depend on what else is new today.
                place = int.from_bytes(hashlib.sha256(f"later:{name}".encode()).digest()[:8]) / 2**64
                validation = (1 - rule.to_test) * settings.validation_share / (1 - settings.test_share)
                split = "test" if place >= 1 - rule.to_test else "validation" if place < validation else "train"
            elif taken < settings.test_share * total:
                split = "test"
            elif taken < (settings.test_share + settings.validation_share) * total:
                split = "validation"
            else:
                split = "train"
            taken += sizes[name]
            for record in fresh[name]:
                record.split = split


def _record(catalog: Catalog, records: list[_Record]) -> bool:
    """Write what was judged otherwise than before, in one transaction; False, and nothing written, when a record that
    it touches was relabelled, fetched anew or set aside since it was read."""
    changes = [
        {
            "id": r.id, "was_state": r.read[0], "was_label_id": r.label_id, "was_sha256": r.sha256,
            "state": r.state, "reason": r.reason, "group_id": r.group, "split": r.split,
        }
        for r in records
        if r.judgement != r.read
    ]  # fmt: skip
    if not changes:
        return True
    with catalog.session() as session:
        # By way of a table of this connection alone: one statement each way, where MySQL wants a round trip per UPDATE.
        connection, new, image = session.connection(), _changes, ImageRecord
        connection.execute(sa.schema.CreateTable(_changes, if_not_exists=True))
        session.execute(sa.delete(new))
        for start in range(0, len(changes), WRITE_BATCH):
            session.execute(sa.insert(new), changes[start : start + WRITE_BATCH])
        written = session.execute(
            sa.update(image)
            .where(
                image.id == new.c.id,
                image.state == new.c.was_state,
                image.label_id == new.c.was_label_id,
                image.sha256 == new.c.was_sha256,
            )
            .values(
                state=new.c.state,
                reason=new.c.reason,
                group_id=new.c.group_id,
                split=new.c.split,
                updated_at=utc_now(),
            )
            .execution_options(synchronize_session=False)
        )
        session.execute(sa.delete(new))
        whole = affected(written) == len(changes)
        (session.commit if whole else session.rollback)()
        return whole


def _text(length: int) -> sa.types.TypeEngine[str]:
    """Compared byte by byte on MySQL, whatever collation the database has."""
    return sa.String(length).with_variant(
        mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb"
    )


_changes = sa.Table(
    "settled_changes",
    sa.MetaData(),
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=False),
    sa.Column("was_state", _text(16)),
    sa.Column("was_label_id", sa.Integer),
    sa.Column("was_sha256", _text(64)),
    sa.Column("state", _text(16)),
    sa.Column("reason", _text(500)),
    sa.Column("group_id", _text(64)),
    sa.Column("split", _text(16)),
    prefixes=["TEMPORARY"],
)


# --- duplicates -----------------------------------------------------------------------------------------------------


def duplicate_groups(
    hashes: NDArray[np.uint64], distance: int, *, keep: int = NEAR_KEPT
) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
    """Which 64-bit perceptual hashes belong together, directly or by others in between.

    Args:
        hashes: (n,) uint64.
        distance: largest number of differing bits between two direct neighbours.

    Returns:
        (n,) int64, the smallest position of each one's group, and up to `keep` direct pairs of positions.
    """
    distinct, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    parent = np.arange(len(distinct))
    # Pictures of one hash are joined in a star, not pair by pair: blank ones would give millions of pairs.
    copies = np.flatnonzero(first[which] != np.arange(len(hashes)))[:keep]
    kept = np.stack([first[which[copies]], copies], axis=1)
    for pairs in near_pairs(distinct, distance):
        _join(parent, pairs[:, 0], pairs[:, 1])
        ends = np.sort(first[pairs], axis=1)
        kept = np.unique(np.concatenate([kept, ends]), axis=0)[:keep]
    smallest = np.full(len(distinct), len(hashes))
    np.minimum.at(smallest, parent[which], np.arange(len(hashes)))
    return smallest[parent[which]], [(int(one), int(other)) for one, other in kept]


def near_pairs(hashes: NDArray[np.uint64], distance: int) -> Iterator[NDArray[np.int64]]:
    """All pairs of positions whose 64-bit hashes differ in at most `distance` bits, as (k, 2) arrays with one < other.

    The 64 bits are cut into distance + 2 bands; two hashes that near agree in two bands at least, so only hashes that
    share two bands are compared (after Norouzi et al., "Fast search in Hamming space with multi-index hashing", CVPR
    2012). A pair that shares more comes more than once.
    """
    edges = np.linspace(0, 64, distance + 3).astype(int)
    bands = [((1 << int(high)) - 1) ^ ((1 << int(low)) - 1) for low, high in pairwise(edges)]
    for one, other in combinations(bands, 2):
        part = hashes & np.uint64(one | other)
        order = np.argsort(part, kind="stable")
        same, ordered = part[order], hashes[order]
        left = np.arange(len(hashes))
        found: list[NDArray[np.int64]] = []
        size = 0
        for step in range(1, len(hashes)):
            left = left[left + step < len(hashes)]
            left = left[same[left] == same[left + step]]
            if not len(left):
                break
            near = left[np.bitwise_count(ordered[left] ^ ordered[left + step]) <= distance]
            found.append(np.sort(np.stack([order[near], order[near + step]], axis=1), axis=1))
            size += len(near)
            if size > PAIRS_AT_ONCE:
                yield np.concatenate(found)
                found, size = [], 0
        if size:
            yield np.concatenate(found)


def _join(parent: NDArray[np.int64], one: NDArray[np.int64], other: NDArray[np.int64]) -> None:
    """Unite the sets of each pair, in place; afterwards every parent is the smallest member of its set."""
    while True:
        low, high = np.minimum(parent[one], parent[other]), np.maximum(parent[one], parent[other])
        apart = low != high
        if not apart.any():
            return
        one, other = one[apart], other[apart]
        np.minimum.at(parent, high[apart], low[apart])
        while not np.array_equal(parent, grand := parent[parent]):
            parent[:] = grand


# --- creating -------------------------------------------------------------------------------------------------------


def create_snapshot(settings: Settings, catalog: Catalog, store: ObjectStore, *, new_to_test: float = 0.0) -> Snapshot:
    """Freeze what is stored now.

    The pictures are settled (see `settle`), those that resemble none before get their split, the manifest is written
    to the store, and only then the snapshot is recorded. The same stored images give the same snapshot, unchanged.

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
        records, settled = _settle(settings, catalog, _Fresh(to_test=new_to_test))
        usable = _usable(records)
        rows = _rows(usable)
        samples = any(record.sample for record in usable)
        snapshot = _describe(rows, samples, settled.label_conflicts + settled.split_bridges)
        with catalog.session() as session:
            known = session.get(SnapshotRecord, snapshot.id)
        if known is not None:
            return load_snapshot(catalog, store, snapshot.id)
        _write(store, snapshot)
        with catalog.session() as session:
            session.add(SnapshotRecord(id=snapshot.id, counts=snapshot.counts, samples=samples, created_at=utc_now()))
        return snapshot


def _must_suffice(usable: list[_Record], settings: DataSettings) -> None:
    counts = Counter(label for label, _ in {(record.label, record.sha256) for record in usable})
    if len(counts) < 2:
        raise DataError(
            f"A snapshot needs images of at least two classes; stored are {', '.join(counts) or 'none'}.",
            hint="Add image records of another label and run `lawnwatch ingest`.",
        )
    few = {label: count for label, count in counts.items() if count < settings.min_per_class}
    if few:
        said = ", ".join(f"{label} has {count}" for label, count in sorted(few.items()))
        raise DataError(
            f"Each class needs at least {settings.min_per_class} usable images; {said}.",
            hint="Add more image records and run `lawnwatch ingest`, or lower LAWNWATCH_DATA__MIN_PER_CLASS.",
        )


def _rows(usable: list[_Record]) -> list[Row]:
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


def _describe(rows: list[Row], samples: bool, quarantined: int) -> Snapshot:
    classes = sorted({row.label for row in rows})
    counts = {split: dict.fromkeys(classes, 0) for split in SPLITS}
    for row in rows:
        counts[row.split][row.label] += 1
    return Snapshot(
        id=_id_of(rows),
        created_at=utc_now().isoformat(timespec="seconds"),
        classes=classes,
        counts=counts,
        samples=samples,
        rows=rows,
        quarantined=quarantined,
        created=True,
    )


def _id_of(rows: list[Row]) -> str:
    """What training reads of the rows, hashed: pictures, labels and splits, in order of SHA-256."""
    digest = hashlib.sha256(f"snapshot {FORMAT}\n".encode())
    for row in rows:
        digest.update(json.dumps([row.sha256, row.label, row.split, row.group], ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _write(store: ObjectStore, snapshot: Snapshot) -> None:
    """The manifest first, the summary last: a summary in the store means a whole snapshot."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for row in snapshot.rows:
        if store.stat(row.object_key) is None:
            raise IntegrityError(
                f"The object {row.object_key} of {row.url} is missing from the store.",
                hint=f"`lawnwatch catalog show {row.url}`; fetch it anew, or restore the store.",
            )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in snapshot.rows]), buffer)
    manifest = buffer.getvalue()
    store.put(f"snapshots/{snapshot.id}/manifest.parquet", manifest)
    summary = {
        **snapshot.summary(),
        "format": FORMAT,
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
    }
    store.put(
        f"snapshots/{snapshot.id}/snapshot.json",
        json.dumps(summary, indent=1, ensure_ascii=False).encode(),
        content_type="application/json",
    )


# --- reading --------------------------------------------------------------------------------------------------------


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
        IntegrityError: the manifest is not what the id says.
    """
    import pyarrow.parquet as pq

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
    prefix = f"snapshots/{record.id}"
    summary = json.loads(store.get(f"{prefix}/snapshot.json"))
    manifest = store.get(f"{prefix}/manifest.parquet")
    if hashlib.sha256(manifest).hexdigest() != summary["manifest_sha256"]:
        raise IntegrityError(f"The manifest of snapshot {record.id[:12]} has been altered.")
    rows = [Row(**row) for row in pq.read_table(io.BytesIO(manifest)).to_pylist()]
    if _id_of(rows) != record.id:
        raise IntegrityError(f"The manifest of snapshot {record.id[:12]} does not give its id.")
    return Snapshot(
        id=record.id,
        created_at=summary["created_at"],
        classes=summary["classes"],
        counts=summary["counts"],
        samples=record.samples,
        rows=rows,
        quarantined=summary["quarantined"],
    )


def read_image(store: ObjectStore, row: Row, cache_dir: Path) -> bytes:
    """A picture's bytes, from the local cache when a true copy lies there.

    Raises:
        NotFound: the store has no such object.
        IntegrityError: the object is not what its SHA-256 says.
    """
    cached = cache_dir / row.sha256[:2] / row.sha256
    if cached.is_file() and hashlib.sha256(data := cached.read_bytes()).hexdigest() == row.sha256:
        return data
    data = store.get(row.object_key)
    if hashlib.sha256(data).hexdigest() != row.sha256:
        raise IntegrityError(
            f"The object {row.object_key} is not the picture that was stored.", hint=f"Its source is {row.url}."
        )
    cached.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=cached.parent)
    with os.fdopen(handle, "wb") as stream:
        stream.write(data)
    Path(name).replace(cached)
    return data


def images(
    rows: Sequence[Row], store: ObjectStore, cache_dir: Path, *, classes: list[str], size: int, max_pixels: int
) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """(size, size, 3) uint8 RGB and class number of each row, decoded as serving decodes."""
    for row in rows:
        data = read_image(store, row, cache_dir)
        yield pictures.decode(data, size=size, max_pixels=max_pixels), classes.index(row.label)
