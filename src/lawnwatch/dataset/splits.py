"""Judging what is stored: duplicate groups, label conflicts and the split of each group, for life."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from lawnwatch.catalog import Catalog, ImageRecord, Label
from lawnwatch.config import DataSettings, Settings
from lawnwatch.database import affected, utc_now
from lawnwatch.dataset.duplicates import duplicate_groups
from lawnwatch.dataset.snapshot import SPLITS
from lawnwatch.errors import Conflict, DataError

JUDGED = ("label_conflict:", "split_bridge:")  # the quarantines that are judged here, anew each time
ATTEMPTS = 5
READ_BATCH = 5_000
WRITE_BATCH = 5_000


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
class StoredImage:
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


@dataclass(frozen=True)
class FreshTest:
    """How pictures that resemble none before are split.

    Attributes:
        to_test: share of those that go to the test split although their class has one already; a deliberate act.
    """

    to_test: float = 0.0


def settle(settings: Settings, catalog: Catalog) -> Settled:
    """Judge all stored pictures anew: who is a copy of whom, whose labels contradict each other, who bridges splits.

    Recorded are the duplicate groups, the split of newcomers to a group that has one, and the quarantines; a quarantine
    ends when its cause does. Pictures like none before get their split with the first snapshot that holds them.

    Raises:
        Conflict: another process is busy with a snapshot, or the records kept changing meanwhile.
        Unavailable: the database does not answer; nothing is recorded.
    """
    with catalog.exclusive("snapshot"):
        return judge_stored(settings, catalog)[1]


def judge_stored(
    settings: Settings, catalog: Catalog, fresh: FreshTest | None = None
) -> tuple[list[StoredImage], Settled]:
    """Read, judge without holding a lock, and record it in one transaction if it still is what was read."""
    for _ in range(ATTEMPTS):
        records = catalog.retried(lambda: _read(catalog))
        settled = _judge(records, settings.data)
        lacking: DataError | None = None
        if fresh is not None:
            try:
                must_suffice(usable_of(records), settings.data)
                _split_fresh(records, settings.data, fresh)
            except DataError as error:
                lacking = error  # said after the quarantines are recorded: they may be what is lacking
        if catalog.retried(partial(_record, catalog, records)):
            if lacking is not None:
                raise lacking
            return records, settled
    raise Conflict("The image records kept changing while they were judged.", hint="Run the same command again.")


def _read(catalog: Catalog) -> list[StoredImage]:
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
                StoredImage(
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


def usable_of(records: Iterable[StoredImage]) -> list[StoredImage]:
    return [record for record in records if record.state == "stored"]


def _judge(records: list[StoredImage], settings: DataSettings) -> Settled:
    """Give every record its duplicate group, newcomers their group's split, and quarantine what contradicts."""
    shas = sorted({record.sha256 for record in records})
    position = {sha: number for number, sha in enumerate(shas)}
    hashes = np.zeros(len(shas), np.uint64)
    for record in records:
        hashes[position[record.sha256]] = record.phash
    roots, near = duplicate_groups(hashes, settings.near_duplicate_distance)
    members_of: dict[int, list[StoredImage]] = defaultdict(list)
    for record in records:
        members_of[int(roots[position[record.sha256]])].append(record)

    for members in members_of.values():
        stored = usable_of(members)
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

    usable = usable_of(records)
    reasons = Counter((record.reason or "").partition(":")[0] for record in records if record.state == "quarantined")
    return Settled(
        images=len(usable),
        groups=len({record.group for record in usable}),
        label_conflicts=reasons["label_conflict"],
        split_bridges=reasons["split_bridge"],
        near_duplicates=[(shas[one], shas[other]) for one, other in near],
    )


def must_suffice(usable: list[StoredImage], settings: DataSettings) -> None:
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


def _quarantine(members: Iterable[StoredImage], reason: str) -> None:
    for record in members:
        record.state, record.reason = "quarantined", reason[:500]


def _touching(settled: list[StoredImage], distance: int) -> list[StoredImage]:
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


def _split_fresh(records: list[StoredImage], settings: DataSettings, rule: FreshTest) -> None:
    """Split groups seen for the first time: a class's first groups into all three, later ones never into test."""
    seen = {record.label for record in records if record.split == "test"}
    fresh: dict[str, list[StoredImage]] = defaultdict(list)
    for record in usable_of(records):
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


def _record(catalog: Catalog, records: list[StoredImage]) -> bool:
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


def _change(record: StoredImage) -> dict[str, Any]:
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
