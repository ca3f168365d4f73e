"""Snapshots: immutable lists of images with their splits, and the pictures behind them.

A snapshot is named by the SHA-256 of its rows; the same stored images always give the same snapshot. A split is for
life: a picture, its copies and its resizings (the duplicate group) share one, recorded when a snapshot first sees them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from lawnwatch import images as pictures
from lawnwatch.catalog import Catalog, ImageRecord, SnapshotRecord, utc_now
from lawnwatch.config import DataSettings, Settings
from lawnwatch.errors import DataError, IntegrityError, NotFound
from lawnwatch.store import ObjectStore

SPLITS = ("train", "validation", "test")
FORMAT = 1


@dataclass(frozen=True)
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


# --- creating -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settled:
    """What judging the stored records gave.

    Attributes:
        near_duplicates: pairs of SHA-256 that resemble each other directly, at most 1,000.
    """

    images: int
    groups: int
    label_conflicts: int
    split_bridges: int
    near_duplicates: list[tuple[str, str]]


def settle(settings: Settings, catalog: Catalog) -> Settled:
    """Judge all stored records anew: duplicate groups, splits, label conflicts and split bridges."""
    with catalog.exclusive("snapshot"), catalog.session() as session:
        records = list(
            session.scalars(
                sa.select(ImageRecord)
                .where(
                    sa.or_(
                        ImageRecord.state == "stored",
                        sa.and_(ImageRecord.state == "quarantined", ImageRecord.reason.startswith("label_conflict:")),
                    )
                )
                .order_by(ImageRecord.sha256, ImageRecord.id)
            )
        )
        for record in records:
            record.state, record.reason = "stored", None
        quarantined = _settle(records, settings.data)
        phashes = {str(record.sha256): int(record.phash or "0", 16) for record in records}
        shas = sorted(phashes)
        pairs = near_pairs(np.array([phashes[s] for s in shas], np.uint64), settings.data.near_duplicate_distance)
        reasons = Counter(str(record.reason).partition(":")[0] for record in quarantined)
        return Settled(
            images=len(shas),
            groups=len({record.group_id for record in records if record.group_id}),
            label_conflicts=reasons["label_conflict"],
            split_bridges=reasons["split_bridge"],
            near_duplicates=[(shas[one], shas[two]) for one, two in pairs[:1000]],
        )


def create_snapshot(settings: Settings, catalog: Catalog, store: ObjectStore) -> Snapshot:
    """Freeze what is stored now.

    New duplicate groups get their split, pictures that contradict each other are quarantined, the manifest is written
    to the store, and only then the snapshot is recorded. The same stored images give the same snapshot, unchanged.

    Raises:
        DataError: nothing stored, fewer than two classes, or a class with too few images; nothing is written.
        Unavailable: database or store do not answer; a re-run goes on where it stopped.
    """
    with catalog.exclusive("snapshot"):
        with catalog.session() as session:
            records = list(
                session.scalars(
                    sa.select(ImageRecord)
                    .where(
                        sa.or_(
                            ImageRecord.state == "stored",
                            # Judged anew each time: a correction frees all copies, another copy must not slip through.
                            sa.and_(
                                ImageRecord.state == "quarantined", ImageRecord.reason.startswith("label_conflict:")
                            ),
                        )
                    )
                    .order_by(ImageRecord.sha256, ImageRecord.id)
                )
            )
            for record in records:
                record.state, record.reason = "stored", None
            quarantined = _settle(records, settings.data)
            usable = [record for record in records if record.state == "stored"]
            _must_suffice(usable, settings.data)
            rows = _rows(usable)
            samples = any(record.label_source == "sample" for record in usable)
        snapshot = _describe(rows, samples, len(quarantined))
        with catalog.session() as session:
            known = session.get(SnapshotRecord, snapshot.id)
        if known is not None:
            return load_snapshot(catalog, store, snapshot.id)
        _write(store, snapshot)
        with catalog.session() as session:
            session.add(SnapshotRecord(id=snapshot.id, counts=snapshot.counts, samples=samples, created_at=utc_now()))
        return snapshot


def _settle(records: list[ImageRecord], settings: DataSettings) -> list[ImageRecord]:
    """Give every record its duplicate group and split, or quarantine it; returns the quarantined ones."""
    first_by_sha: dict[str, ImageRecord] = {}
    for record in records:
        first_by_sha.setdefault(str(record.sha256), record)
    shas = sorted(first_by_sha)
    hashes = np.array([int(first_by_sha[sha].phash or "0", 16) for sha in shas], dtype=np.uint64)
    # Pictures of one hash are joined in a star, not pair by pair: blank ones would give millions of pairs.
    distinct, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    same = [(number, int(first[kind])) for number, kind in enumerate(which)]
    near = [(int(first[one]), int(first[two])) for one, two in near_pairs(distinct, settings.near_duplicate_distance)]
    groups = _components(shas, same + near)

    quarantined: list[ImageRecord] = []

    def quarantine(members: Iterable[ImageRecord], reason: str) -> None:
        for record in members:
            record.state, record.reason = "quarantined", reason
            quarantined.append(record)

    members_of: dict[str, list[ImageRecord]] = defaultdict(list)
    for record in records:
        members_of[groups[str(record.sha256)]].append(record)

    fresh: dict[str, list[ImageRecord]] = {}
    for members in members_of.values():
        labels = sorted({record.label.name for record in members})
        if len(labels) > 1:
            quarantine(members, f"label_conflict: the same picture is labelled {' and '.join(labels)}")
            continue
        settled = [record for record in members if record.split is not None]
        newcomers = [record for record in members if record.split is None]
        splits = sorted({str(record.split) for record in settled})
        if not settled:
            fresh[min(str(record.sha256) for record in members)] = members
        elif len(splits) == 1:
            group = min(str(record.group_id) for record in settled)
            for record in newcomers:
                record.group_id, record.split = group, splits[0]
        else:
            quarantine(newcomers, f"split_bridge: resembles pictures of the splits {' and '.join(splits)}")
    _split_fresh(fresh, {record.label.name for record in records if record.split is not None}, settings)
    return quarantined


def _split_fresh(fresh: dict[str, list[ImageRecord]], seen: set[str], settings: DataSettings) -> None:
    """Split groups seen for the first time: a class's first groups into all three, later ones never into test."""
    by_label: dict[str, list[str]] = defaultdict(list)
    for group, members in fresh.items():
        by_label[members[0].label.name].append(group)
    for label, names in by_label.items():
        names.sort(key=lambda name: hashlib.sha256(f"split:{name}".encode()).digest())
        total = len({record.sha256 for name in names for record in fresh[name]})
        taken = 0
        for name in names:
            size = len({record.sha256 for record in fresh[name]})
            if label in seen:
                # A share of the hash space, so that the split does not depend on what else is new today.
                place = int.from_bytes(hashlib.sha256(f"later:{name}".encode()).digest()[:8]) / 2**64
                split = "validation" if place < settings.validation_share / (1 - settings.test_share) else "train"
            elif taken < settings.test_share * total:
                split = "test"
            elif taken < (settings.test_share + settings.validation_share) * total:
                split = "validation"
            else:
                split = "train"
            taken += size
            for record in fresh[name]:
                record.group_id, record.split = name, split


def near_pairs(hashes: NDArray[np.uint64], distance: int) -> list[tuple[int, int]]:
    """All pairs of positions whose 64-bit hashes differ in at most `distance` bits.

    The 64 bits are cut into distance + 1 bands; two hashes that near agree in at least one band, so only hashes that
    share a band are compared (Norouzi et al., "Fast search in Hamming space with multi-index hashing", CVPR 2012).
    """
    edges = np.linspace(0, 64, distance + 2).astype(int)
    pairs: set[tuple[int, int]] = set()
    for low, high in pairwise(edges):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        cuts = np.flatnonzero(np.diff(band[order])) + 1
        for bucket in np.split(order, cuts):
            for start, one in enumerate(bucket[:-1]):
                others = bucket[start + 1 :]
                near = others[np.bitwise_count(hashes[others] ^ hashes[one]) <= distance]
                pairs.update((int(min(one, other)), int(max(one, other))) for other in near)
    return sorted(pairs)


def _components(shas: list[str], pairs: list[tuple[int, int]]) -> dict[str, str]:
    """Each SHA-256 to the smallest one that it is joined with, directly or by others."""
    parent = list(range(len(shas)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return {sha: shas[root(number)] for number, sha in enumerate(shas)}


def _must_suffice(records: list[ImageRecord], settings: DataSettings) -> None:
    counts = Counter({record.label.name: 0 for record in records})
    for label, _ in {(record.label.name, record.sha256) for record in records}:
        counts[label] += 1
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


def _rows(records: list[ImageRecord]) -> list[Row]:
    rows: dict[str, Row] = {}
    for record in records:  # ordered by SHA-256, then id: of copies, the first record speaks
        rows.setdefault(
            str(record.sha256),
            Row(
                sha256=str(record.sha256),
                object_key=str(record.object_key),
                label=record.label.name,
                split=str(record.split),
                group=str(record.group_id),
                url=record.url,
                width=record.width or 0,
                height=record.height or 0,
                brightness=record.brightness or 0.0,
                sharpness=record.sharpness or 0.0,
            ),
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
