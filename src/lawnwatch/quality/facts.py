"""Figures of the stored images, read from the catalog in columns."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from lawnwatch import dataset
from lawnwatch.catalog import Catalog, ImageRecord, Label

CHUNK = 10_000  # records read at once
REFUSED = ("quarantined", "blocked", "gone", "failed")  # states of records that gave nothing to train on
JUDGED_BY_SETTLE = ("label_conflict", "split_bridge")  # quarantined, though the fetch was good

HOST = re.compile(r"https?://(?:[^/?#]*@)?(\[[^\]]*\]|[^/?#:]*)", re.IGNORECASE)

Floats = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True)
class Pictures:
    """The distinct stored pictures, one place each in every column, in order of SHA-256.

    Attributes:
        id: (n,) int64, the first record of the picture.
        label: (n,) int32, class number.
        split: (n,) int8, place in `dataset.SPLITS`; -1 when it has none.
        side: (n,) float32, shorter side, pixels.
        brightness, sharpness: (n,) float32, as `images` measures them. All three are NaN where not measured.
        digest: SHA-256 of all of it with the pictures' own.
    """

    id: NDArray[np.int64]
    label: NDArray[np.int32]
    split: NDArray[np.int8]
    side: Floats
    brightness: Floats
    sharpness: Floats
    digest: str

    def __len__(self) -> int:
        return len(self.id)


@dataclass(frozen=True)
class Facts:
    """What the catalog says of its images.

    Attributes:
        classes: names of the labels of every record that was tried, sorted.
        pictures: the distinct stored ones.
        records: stored records; more than pictures when several URLs gave the same bytes.
        groups: duplicate groups among them.
        hosts: stored records by host, most first.
        sources: stored records by what their source said at the last recheck.
        outcomes: (state, reason code, label) to records, of all records.
    """

    classes: list[str]
    pictures: Pictures
    records: int
    groups: int
    hosts: dict[str, int]
    sources: dict[str, int]
    outcomes: dict[tuple[str, str, str], int]

    def states(self) -> dict[str, int]:
        """Records by state."""
        counts: Counter[str] = Counter()
        for (state, _, _), count in self.outcomes.items():
            counts[state] += count
        return dict(counts)

    def refused(self, *codes: str) -> int:
        """Records that ended unusable with one of these reason codes; with no code, for any reason of the fetch."""
        return sum(
            count
            for (state, code, _), count in self.outcomes.items()
            if state in REFUSED and (code in codes if codes else code not in JUDGED_BY_SETTLE)
        )

    def per_class(self) -> dict[str, int]:
        """Usable pictures by class, zero included."""
        counts = np.bincount(self.pictures.label, minlength=len(self.classes))
        return {name: int(count) for name, count in zip(self.classes, counts, strict=True)}

    def balance(self) -> dict[str, dict[str, int]]:
        """Usable pictures by class and split."""
        p = self.pictures
        return {
            name: {
                split: int(np.count_nonzero((p.label == number) & (p.split == place)))
                for place, split in enumerate(dataset.SPLITS)
            }
            for number, name in enumerate(self.classes)
        }

    def summary(self) -> dict[str, Any]:
        """The figures as JSON values."""
        p = self.pictures
        return {
            "images": len(p),
            "records": self.records,
            "groups": self.groups,
            "balance": self.balance(),
            "states": self.states(),
            "reasons": [
                {"state": state, "reason": code, "label": label, "records": count}
                for (state, code, label), count in sorted(self.outcomes.items())
                if code
            ],
            "hosts": dict(islice(self.hosts.items(), 100)),
            "sources": self.sources,
            "quantiles": {
                name: _quantiles(column)
                for name, column in (("side", p.side), ("brightness", p.brightness), ("sharpness", p.sharpness))
            },
        }


def read_facts(catalog: Catalog) -> Facts:
    """Read the catalog in columns, in short transactions; 100 bytes of memory an image. Raises Unavailable."""
    outcomes = _outcomes(catalog)
    classes = sorted({label for state, _, label in outcomes if state not in ("pending", "claimed")})
    with catalog.session() as session:
        numbers = {
            n: classes.index(name) for n, name in session.execute(sa.select(Label.id, Label.name)) if name in classes
        }
    hosts: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    chunks = []
    for rows in _stored(catalog):
        hosts.update(host_of(row.url) for row in rows)
        sources.update(row.source_status or "not asked again" for row in rows)
        chunks.append(_columns(rows, numbers))
    table = np.concatenate(chunks) if chunks else _columns([], numbers)
    _, first = np.unique(table["sha"], return_index=True)  # of copies, the first record speaks
    distinct = table[first]
    groups, records = len(np.unique(table["group"])), len(table)
    del table, chunks  # half of the memory
    pictures = Pictures(
        id=distinct["id"],
        label=distinct["label"],
        split=distinct["split"],
        side=distinct["side"],
        brightness=distinct["brightness"],
        sharpness=distinct["sharpness"],
        digest=hashlib.sha256(distinct.view(np.uint8).data).hexdigest(),
    )
    return Facts(
        classes=classes,
        pictures=pictures,
        records=records,
        groups=groups,
        hosts=dict(sorted(hosts.items(), key=lambda item: (-item[1], item[0]))),
        sources=dict(sources.most_common()),
        outcomes=outcomes,
    )


def _outcomes(catalog: Catalog) -> dict[tuple[str, str, str], int]:
    reason = sa.func.coalesce(ImageRecord.reason, "")
    code = sa.func.substr(reason, 1, sa.func.instr(reason, ":")).label("code")
    with catalog.session() as session:
        rows = session.execute(
            sa.select(ImageRecord.state, code, Label.name, sa.func.count())
            .join(Label, ImageRecord.label_id == Label.id)
            .group_by(ImageRecord.state, "code", Label.name)
        ).all()
    return {(state, found.rstrip(":"), label): int(count) for state, found, label, count in rows}


def _stored(catalog: Catalog) -> Iterator[Sequence[Any]]:
    """All stored records, `CHUNK` at a time in order of id; no transaction outlives its chunk."""
    last = 0
    while True:
        with catalog.session() as session:
            rows = session.execute(
                sa.select(
                    ImageRecord.id,
                    ImageRecord.label_id,
                    ImageRecord.sha256,
                    ImageRecord.group_id,
                    ImageRecord.split,
                    ImageRecord.width,
                    ImageRecord.height,
                    ImageRecord.brightness,
                    ImageRecord.sharpness,
                    ImageRecord.url,
                    ImageRecord.source_status,
                )
                .where(ImageRecord.state == "stored", ImageRecord.id > last)
                .order_by(ImageRecord.id)
                .limit(CHUNK)
            ).all()
        if not rows:
            return
        last = rows[-1].id
        yield rows


def _columns(rows: Sequence[Any], numbers: dict[int, int]) -> NDArray[Any]:
    """Records as a structured array; half a SHA-256 tells pictures apart well enough."""
    place = {name: number for number, name in enumerate(dataset.SPLITS)}
    nan = float("nan")
    return np.array(
        [
            (
                number,
                bytes.fromhex(sha256[:32]),
                bytes.fromhex((group or sha256)[:32]),
                numbers[label],
                place.get(split, -1),
                min(width, height) if width and height else nan,
                nan if brightness is None else brightness,
                nan if sharpness is None else sharpness,
            )
            for number, label, sha256, group, split, width, height, brightness, sharpness, *_ in rows
            if label in numbers
        ],
        dtype=[
            ("id", np.int64), ("sha", "S16"), ("group", "S16"), ("label", np.int32), ("split", np.int8),
            ("side", np.float32), ("brightness", np.float32), ("sharpness", np.float32),
        ],
    )  # fmt: skip


def host_of(url: str) -> str:
    """The host of a source URL; a million of them take a second, which urlsplit does not."""
    found = HOST.match(url)
    return found[1].lower() if found else url


def _quantiles(column: Floats) -> dict[str, float]:
    measured = column[~np.isnan(column)]
    if not len(measured):
        return {}
    return {
        name: round(float(value), 4)
        for name, value in zip(
            ("min", "p05", "median", "p95", "max"), np.quantile(measured, (0, 0.05, 0.5, 0.95, 1)), strict=True
        )
    }
