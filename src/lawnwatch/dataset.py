"""Snapshots: immutable lists of images with their splits, and the pictures behind them.

A snapshot is named by the SHA-256 of its rows; the same stored images always give the same snapshot. A split is for
life: a picture, its copies and its resizings (the duplicate group) share one, recorded when a snapshot first sees them.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.dialects import mysql

from lawnwatch import __version__, images, log
from lawnwatch.catalog import Catalog, ImageRecord, Label, SnapshotRecord, affected, utc_now
from lawnwatch.config import DataSettings, Settings
from lawnwatch.errors import Conflict, DataError, ImageError, InputError, IntegrityError, NotFound, Unavailable
from lawnwatch.store import ObjectStore, sha256_of

SPLITS = ("train", "validation", "test")
FORMAT = 1
JUDGED = ("label_conflict:", "split_bridge:")  # the quarantines that are judged here, anew each time
ATTEMPTS = 5
READ_BATCH = 5_000
WRITE_BATCH = 5_000
NEAR_KEPT = 1_000
PAIRS_AT_ONCE = 1_000_000
MANIFEST_BATCH = 10_000
NAMED = 3  # in a sentence
LISTED = 20  # in a report
PARALLEL = 8  # objects read at once: a store answers in milliseconds, decoding takes two cores
READ_AT_ONCE = 256
THUMBNAIL = 16  # side in pixels
FLAT = 2.0  # standard deviation of a thumbnail, grey levels of 255, below which it shows nothing
LOOK_ALIKE = 0.99
COMPARED_AT_ONCE = 4_000
PART = ".part-"
PART_SECONDS = 3600
RESCAN_SHARE = 0.05
FREED_SHARE = 0.1
ALTERED = "Restore the store from a backup, or make a new snapshot with `lawnwatch snapshot create`."

logger = log.get(__name__)


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
    seen = {record.label for record in records if record.split == "test"}
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
    changed = [record for record in records if record.judgement != record.read]
    new, image = _changes, ImageRecord
    with catalog.session() as session:
        # By way of a table of this connection alone, where MySQL would want a round trip for every record.
        session.execute(sa.schema.CreateTable(new, if_not_exists=True))
        session.execute(sa.delete(new))
        update = (
            sa.update(image)
            .where(
                image.id == new.c.id,
                image.state == new.c.was_state,
                image.label_id == new.c.was_label_id,
                image.sha256 == new.c.was_sha256,
            )
            .values({name: new.c[name] for name in ("state", "reason", "group_id", "split")})
            .values(updated_at=utc_now())
            .execution_options(synchronize_session=False)
        )
        whole = True
        for start in range(0, len(changed), WRITE_BATCH):
            batch = changed[start : start + WRITE_BATCH]
            session.execute(sa.insert(new), [_change(record) for record in batch])
            whole = affected(session.execute(update)) == len(batch)
            session.execute(sa.delete(new))
            if not whole:
                break
        (session.commit if whole else session.rollback)()
    return whole


def _change(record: _Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "was_state": record.read[0],
        "was_label_id": record.label_id,
        "was_sha256": record.sha256,
        "state": record.state,
        "reason": record.reason,
        "group_id": record.group,
        "split": record.split,
    }


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
        if known is not None:
            return load_snapshot(catalog, store, snapshot.id)
        if newest is not None:  # `latest` is the last one made, even by a machine whose clock is behind
            snapshot = replace(snapshot, created_at=max(snapshot.created_at, newest + timedelta(microseconds=1)))
        _must_be_stored(store, usable)
        snapshot = _write(store, snapshot)
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


def _describe(usable: list[_Record], quarantined: int, made_by: dict[str, Any]) -> Snapshot:
    rows = _rows(usable)
    classes = sorted({row.label for row in rows})
    counts = {split: dict.fromkeys(classes, 0) for split in SPLITS}
    for row in rows:
        counts[row.split][row.label] += 1
    return Snapshot(
        id=_id_of(rows),
        created_at=utc_now(),
        classes=classes,
        counts=counts,
        samples=any(record.sample for record in usable),
        rows=rows,
        quarantined=quarantined,
        made_by=made_by,
        created=True,
    )


def _id_of(rows: list[Row]) -> str:
    """What training reads of the rows, hashed: pictures, labels and splits, in order of SHA-256."""
    digest = hashlib.sha256(f"snapshot {FORMAT}\n".encode())
    encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make one for every row
    for row in rows:
        digest.update(encode([row.sha256, row.label, row.split, row.group]).encode() + b"\n")
    return digest.hexdigest()


def _must_be_stored(store: ObjectStore, usable: list[_Record]) -> None:
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


def _write(store: ObjectStore, snapshot: Snapshot) -> Snapshot:
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
        raise IntegrityError(f"The manifest of snapshot {record.id[:12]} has been altered.", hint=ALTERED)
    rows = _read_manifest(manifest)
    if _id_of(rows) != record.id:
        raise IntegrityError(f"The manifest of snapshot {record.id[:12]} does not give its id.", hint=ALTERED)
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


# --- verifying ------------------------------------------------------------------------------------------------------


class _Faults:
    """What a verification found: how many of each kind, and the first few."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def add(self, kind: str, what: str) -> None:
        entry = self.found.setdefault(kind, {"count": 0, "first": []})
        entry["count"] += 1
        if entry["count"] <= LISTED:
            entry["first"].append(what)

    def sentence(self) -> str:
        return ", ".join(f"{entry['count']} {kind.replace('_', ' ')}" for kind, entry in self.found.items())


def verify_snapshot(
    settings: Settings,
    catalog: Catalog,
    store: ObjectStore,
    snapshot: str = "latest",
    *,
    pixels: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Prove a snapshot against what lies in the store, object by object; the cache is not asked.

    Checked are the manifest against its hash and the snapshot's id, every object against its SHA-256, that no group
    spans two splits or two labels, and with `pixels` that no two splits hold nearly the same picture, by a measure
    that does not know of perceptual hashes (see `look_alikes`).

    Returns:
        `ok`, `faults` by kind (`count` and the `first` few), and how much was checked.

    Raises:
        NotFound: no such snapshot. Unavailable: database or store do not answer.
    """
    faults = _Faults()
    try:
        found = load_snapshot(catalog, store, snapshot)
    except IntegrityError as error:
        faults.add("manifest", error.message)
        return {"snapshot": snapshot, "ok": False, "faults": faults.found, "message": error.message}
    progress(f"Verifying {len(found.rows):,} images of snapshot {found.id[:12]}.")
    _verify_rows(found, faults)
    thumbnails = _verify_objects(settings, store, found.rows, faults, pixels=pixels, progress=progress)
    flat = 0
    if pixels:
        flat = int((~np.any(thumbnails, axis=1)).sum())
        for one, other, likeness in look_alikes([row.split for row in found.rows], thumbnails, progress=progress):
            a, b = found.rows[one], found.rows[other]
            faults.add("look_alikes", f"{a.url} ({a.split}) and {b.url} ({b.split}), correlation {likeness:.3f}")
    ok = not faults.found
    return {
        "snapshot": found.id,
        "ok": ok,
        "images": len(found.rows),
        "pixels": pixels,
        "not_comparable": flat,  # of one colour, or not readable: pixels cannot tell them apart
        "faults": faults.found,
        "message": f"Snapshot {found.id[:12]}: "
        + (f"all {len(found.rows):,} images are what they were." if ok else f"faults found: {faults.sentence()}."),
    }


def _verify_rows(snapshot: Snapshot, faults: _Faults) -> None:
    counts = {split: dict.fromkeys(snapshot.classes, 0) for split in SPLITS}
    splits: dict[str, set[str]] = defaultdict(set)
    labels: dict[str, set[str]] = defaultdict(set)
    seen: set[str] = set()
    for row in snapshot.rows:
        if row.sha256 in seen:
            faults.add("repeated_picture", f"{row.sha256} is listed twice")
        seen.add(row.sha256)
        splits[row.group].add(row.split)
        labels[row.group].add(row.label)
        counts[row.split][row.label] += 1
    for group, names in splits.items():
        if len(names) > 1:
            faults.add("group_in_two_splits", f"group {group} is in {' and '.join(sorted(names))}")
    for group, names in labels.items():
        if len(names) > 1:
            faults.add("group_with_two_labels", f"group {group} is labelled {' and '.join(sorted(names))}")
    if counts != snapshot.counts:
        faults.add("summary", "the counts in the summary are not those of the manifest")


def _verify_objects(
    settings: Settings,
    store: ObjectStore,
    rows: Sequence[Row],
    faults: _Faults,
    *,
    pixels: bool,
    progress: Callable[[str], None],
) -> NDArray[np.float32]:
    """Each object against its hash; the pictures' thumbnails when asked for, (n, d), zero where there is none."""

    def check(row: Row) -> tuple[tuple[str, str] | None, NDArray[np.float32] | None]:
        try:
            data = store.get(row.object_key)
        except NotFound:
            return ("missing_object", f"{row.object_key} of {row.url}"), None
        if hashlib.sha256(data).hexdigest() != row.sha256:
            return ("altered_object", f"{row.object_key} of {row.url}"), None
        try:
            return None, thumbnail(data, max_pixels=settings.images.max_pixels) if pixels else None
        except ImageError as error:
            return ("unreadable_picture", f"{row.object_key} of {row.url}: {error.message}"), None

    thumbnails = np.zeros((len(rows) if pixels else 0, THUMBNAIL**2 * 3), np.float32)
    said = time.monotonic()
    with ThreadPoolExecutor(PARALLEL) as pool:
        for start in range(0, len(rows), READ_AT_ONCE):
            chunk = rows[start : start + READ_AT_ONCE]
            for number, (fault, small) in enumerate(pool.map(check, chunk), start=start):
                if fault is not None:
                    faults.add(*fault)
                if small is not None:
                    thumbnails[number] = small
            if time.monotonic() - said > 10:
                said = time.monotonic()
                progress(f"Verified {start + len(chunk):,} of {len(rows):,} images.")
    return thumbnails


def thumbnail(data: bytes, *, max_pixels: int) -> NDArray[np.float32]:
    """A picture as (768,) float32: 16 × 16 RGB, of mean zero and length one, so that a product is a correlation.

    All zero for a picture of one colour, which resembles every other such picture.

    Raises:
        ImageError: the bytes are not a picture.
    """
    rgb = images.decode(data, size=128, max_pixels=max_pixels)
    small = cv2.resize(rgb, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()
    small -= small.mean()
    if small.std() < FLAT:
        return np.zeros_like(small)
    return np.asarray(small / np.linalg.norm(small), dtype=np.float32)


def look_alikes(
    splits: Sequence[str], thumbnails: NDArray[np.float32], *, progress: Callable[[str], None] = lambda line: None
) -> Iterator[tuple[int, int, float]]:
    """Pairs of pictures in different splits that are nearly the same, by the correlation of their pixels.

    The threshold lies between what was seen on 400 photographs of lawns: 0.993 and more for copies resized to 0.4 to
    1.6 of their size and saved anew at JPEG quality 30 to 95, at most 0.986 for pictures of different scenes.

    Args:
        splits: the split of each picture.
        thumbnails: (n, d) float32 of `thumbnail`.

    Yields:
        Two positions, and the correlation of the pictures there.
    """
    where = {split: np.flatnonzero(np.array(splits) == split) for split in SPLITS}
    said, done = time.monotonic(), 0
    for one, other in combinations(SPLITS, 2):
        left, right = where[one], where[other]
        for a in range(0, len(left), COMPARED_AT_ONCE):
            rows = left[a : a + COMPARED_AT_ONCE]
            for b in range(0, len(right), COMPARED_AT_ONCE):
                columns = right[b : b + COMPARED_AT_ONCE]
                likeness = thumbnails[rows] @ thumbnails[columns].T
                for i, j in np.argwhere(likeness >= LOOK_ALIKE):
                    yield int(rows[i]), int(columns[j]), float(likeness[i, j])
                done += likeness.size
            if time.monotonic() - said > 10:
                said = time.monotonic()
                progress(f"Compared {done:,} pairs of pictures.")


# --- pictures -------------------------------------------------------------------------------------------------------


class ObjectCache:
    """Local copies of objects, for several processes at once; each is verified by its hash at every reading.

    The least recently used go when the folder outgrows `max_bytes`. Another process' copies are seen when the folder is
    looked through, after each twentieth of `max_bytes` written: the folder stays within 1.05 × `max_bytes` a process.
    A disk that is full or read-only ends the caching and nothing else.

    Args:
        folder: where; made when the first copy is.
        max_bytes: largest size of all copies together; 0: keep none.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._keeps = max_bytes > 0
        self._unseen: int | None = None  # bytes written since the folder was looked through; None: never was
        self._lock = threading.Lock()

    @classmethod
    def of(cls, settings: Settings) -> ObjectCache:
        """The cache of this machine, as the settings say."""
        return cls(settings.home / "cache" / "images", settings.data.cache_bytes)

    def read(self, store: ObjectStore, key: str, sha256: str) -> bytes:
        """An object's bytes, from the cache when a true copy lies there.

        Raises:
            NotFound: the store has no such object.
            IntegrityError: the object is not what its SHA-256 says.
            Unavailable: the store does not answer.
        """
        file = self.folder / sha256[:2] / sha256
        try:
            data = file.read_bytes()
        except OSError:
            pass
        else:
            if hashlib.sha256(data).hexdigest() == sha256:
                with suppress(OSError):  # evicted meanwhile, or a read-only disk
                    os.utime(file)
                return data
        data = store.get(key)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise IntegrityError(
                f"The object {key} is not the picture that was stored.",
                hint="`lawnwatch data recheck` fetches it anew where its source still has it.",
            )
        self._keep(file, data)
        return data

    def _keep(self, file: Path, data: bytes) -> None:
        if not self._keeps or len(data) > self.max_bytes:
            return
        part = file.with_name(f"{PART}{file.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                part.write_bytes(data)
                part.replace(file)
            finally:
                part.unlink(missing_ok=True)
            with self._lock:
                if self._unseen is None or self._unseen + len(data) > self.max_bytes * RESCAN_SHARE:
                    self._evict()
                    self._unseen = 0
                else:
                    self._unseen += len(data)
        except OSError as error:
            self._keeps = False
            logger.warning(
                "pictures are read without a cache from here on: it cannot be written",
                error=error.strerror or type(error).__name__,
            )

    def _evict(self) -> None:
        """Delete the least recently used copies until a tenth of the room is free; not while another process does."""
        with (self.folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            found: list[tuple[float, int, str]] = []
            for entry in self._entries():
                with suppress(FileNotFoundError):
                    stat = entry.stat()
                    # Half a copy that a killed process left is the first to go.
                    left = entry.name.startswith(PART) and time.time() - stat.st_mtime > PART_SECONDS
                    found.append((0.0 if left else stat.st_mtime, stat.st_size, entry.path))
            size = sum(each for _, each, _ in found)
            if size <= self.max_bytes and (not found or min(found)[0] > 0):
                return
            for used, each, path in sorted(found):
                if size <= self.max_bytes * (1 - FREED_SHARE) and used > 0:
                    break
                Path(path).unlink(missing_ok=True)
                size -= each

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self.folder) as folders:
            for folder in folders:
                if folder.is_dir():
                    with os.scandir(folder) as entries:
                        yield from entries


Prepare = Callable[[Row, bytes], NDArray[np.uint8]]


def decoder(size: int, *, max_pixels: int) -> Prepare:
    """A picture's bytes to (size, size, 3) uint8 RGB, as serving decodes them."""

    def decode(_row: Row, data: bytes) -> NDArray[np.uint8]:
        return images.decode(data, size=size, max_pixels=max_pixels)

    return decode


class Stream:
    """Pictures in batches, fetched and prepared by tf.data in other threads while earlier batches are used.

    `dataset` is the tf.data.Dataset of ((b, *shape) uint8, (b,) int32 class numbers). Iterating over the stream gives
    the same as NumPy arrays, and raises what really happened (NotFound, IntegrityError, Unavailable, ImageError) where
    TensorFlow would only quote it. In memory are the pictures under way and two batches.

    Args:
        rows: the pictures, in their order.
        classes: a label's index here is its class number.
        batch: pictures in a batch; the last one may have fewer.
        prepare: a row and its bytes to a uint8 array; called in several threads.
        shape: of what `prepare` returns.
        shuffle_seed: another order, which depends on this number alone.
        parallel: pictures under way at once.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        store: ObjectStore,
        cache: ObjectCache,
        *,
        classes: Sequence[str],
        batch: int,
        prepare: Prepare,
        shape: tuple[int, ...],
        shuffle_seed: int | None = None,
        parallel: int = PARALLEL,
    ) -> None:
        import tensorflow as tf

        self._rows = rows
        self._store = store
        self._cache = cache
        self._prepare = prepare
        self._fault: Exception | None = None
        labels = np.array([classes.index(row.label) for row in rows], np.int32)
        order = np.arange(len(rows))
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(order)

        def load(number: Any, label: Any) -> Any:
            picture = tf.numpy_function(self._read, [number], tf.uint8, stateful=False)
            picture.set_shape(shape)
            return picture, label

        options = tf.data.Options()
        options.threading.private_threadpool_size = parallel  # the shared pool has a thread a core: few for waiting
        self.dataset = (
            tf.data.Dataset.from_tensor_slices((order, labels[order]))
            .map(load, num_parallel_calls=parallel, deterministic=True)
            .batch(batch)
            .prefetch(2)
            .with_options(options)
        )

    def __iter__(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int32]]]:
        import tensorflow as tf

        try:
            yield from self.dataset.as_numpy_iterator()
        except tf.errors.OpError:
            if self._fault is None:
                raise
            raise self._fault from None

    def _read(self, number: int) -> NDArray[np.uint8]:
        row = self._rows[number]
        try:
            return self._prepare(row, self._cache.read(self._store, row.object_key, row.sha256))
        except Exception as error:
            self._fault = self._fault or error
            raise
