"""Contact sheets: the pictures that a person should look at, as thumbnails."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.orm import Session

from lawnwatch import dataset, images
from lawnwatch.catalog import Catalog, ImageRecord
from lawnwatch.config import Settings
from lawnwatch.errors import ImageError, NotFound
from lawnwatch.quality.facts import JUDGED_BY_SETTLE, REFUSED, Facts, Pictures
from lawnwatch.quality.noise import THREADS, Noise, Suspect
from lawnwatch.store import ObjectStore

# The page must open on a phone: about 300 thumbnails of 6 kB, whatever the number of classes.
CLASS_TILES, OTHER_TILES, FEWEST_TILES = 150, 48, 8
TILE = (150, 96)  # pixels


@dataclass(frozen=True)
class Tile:
    """One record on a sheet; `picture` is a data URI, empty when there is no object to show."""

    id: int
    url: str
    label: str
    state: str
    split: str
    reason: str
    picture: str = ""
    width: int = TILE[0]
    height: int = TILE[1]
    note: str = ""


@dataclass(frozen=True)
class Sheets:
    """The contact sheets.

    Attributes:
        classes: (class, [(row title, tiles)]).
        quarantine: quarantined pictures that exist. refused: records without a picture.
        pairs: (Hamming distance in bits, the two pictures).
        suspects: tiles in the order of `Noise.suspects`.
    """

    classes: list[tuple[str, list[tuple[str, list[Tile]]]]]
    quarantine: list[Tile]
    refused: list[Tile]
    pairs: list[tuple[int, Tile, Tile]]
    suspects: list[tuple[Suspect, Tile]]


def draw_sheets(
    settings: Settings,
    catalog: Catalog,
    store: ObjectStore,
    facts: Facts,
    settled: dataset.Settled,
    noise: Noise,
) -> Sheets:
    """Choose the pictures worth a look and read them. Raises Unavailable."""
    most = min(settings.quality.contact_sheet, OTHER_TILES)
    rows = {name: _spread(facts.pictures, facts.classes.index(name), count) for name, count in _shown(facts, settings)}
    suspects = noise.suspects[:most]
    with catalog.session() as session:
        distances = _distances(session, settled.near_duplicates)[: max(1, most // 2)]
        judged = _newest(session, most, JUDGED_BY_SETTLE)
        refused = _newest(session, most)
        ids = {i for spread in rows.values() for _, members in spread for i, _ in members}
        ids |= {suspect.id for suspect in suspects} | {i for _, *pair in distances for i in pair}
        chosen: dict[int, Any] = {row.id: row for row in judged}
        for start in range(0, len(ids), 500):
            part = sorted(ids)[start : start + 500]
            found = session.scalars(sa.select(ImageRecord).where(ImageRecord.id.in_(part)))
            chosen |= {record.id: record for record in found}

    def tile(record: ImageRecord) -> Tile:
        blank = Tile(
            id=record.id,
            url=record.url,
            label=record.label.name,
            state=record.state,
            split=record.split or "",
            reason=record.reason or "",
        )
        if not record.object_key:
            return blank
        try:
            data = store.get(record.object_key)
            rgb = images.thumbnail(data, width=TILE[0], height=TILE[1], max_pixels=settings.images.max_pixels)
        except (NotFound, ImageError):
            return blank
        uri = "data:image/jpeg;base64," + base64.b64encode(images.jpeg(rgb)).decode()
        return replace(blank, picture=uri, height=rgb.shape[0], width=rgb.shape[1])

    with ThreadPoolExecutor(THREADS) as pool:
        tiles = dict(zip(chosen, pool.map(tile, chosen.values()), strict=True))
    return Sheets(
        classes=[
            (
                name,
                [
                    (title, [replace(tiles[i], note=note) for i, note in members if i in tiles])
                    for title, members in spread
                ],
            )
            for name, spread in rows.items()
        ],
        quarantine=[tiles[record.id] for record in judged],
        refused=[tile(record) for record in refused],
        pairs=[(bits, tiles[one], tiles[two]) for bits, one, two in distances],
        suspects=[(suspect, tiles[suspect.id]) for suspect in suspects if suspect.id in tiles],
    )


def _shown(facts: Facts, settings: Settings) -> list[tuple[str, int]]:
    """(class, tiles) of the classes that have a sheet: all, or the smallest where there are too many for one page."""
    counts = {name: count for name, count in facts.per_class().items() if count}
    smallest = sorted(counts, key=lambda name: (counts[name], name))[: CLASS_TILES // FEWEST_TILES]
    return [(name, min(settings.quality.contact_sheet, CLASS_TILES // len(smallest))) for name in sorted(smallest)]


def _spread(p: Pictures, label: int, count: int) -> list[tuple[str, list[tuple[int, str]]]]:
    """Rows of (record id, note): the extremes of a class, then a random look at the rest."""
    mine = np.flatnonzero(p.label == label)
    each = max(1, count // 8)
    rows: list[tuple[str, list[tuple[int, str]]]] = []
    rest, left = mine, count
    for title, column, sign, form in (
        ("Darkest", p.brightness, 1, "{:.0%} bright"),
        ("Brightest", p.brightness, -1, "{:.0%} bright"),
        ("Least sharp", p.sharpness, 1, "sharpness {:,.0f}"),
        ("Smallest", p.side, 1, "{:.0f} px"),
    ):
        measured = mine[~np.isnan(column[mine])]
        if left > each and len(measured):
            extreme = measured[np.argsort(sign * column[measured], kind="stable")[:each]]
            rows.append((title, [(int(p.id[i]), form.format(column[i])) for i in extreme]))
            rest, left = np.setdiff1d(rest, extreme), left - len(extreme)
    # In order of SHA-256 the first ones are a random choice that is the same each time.
    return [("A random look", [(int(p.id[i]), "") for i in rest[:left]]), *rows]


def _distances(session: Session, pairs: list[tuple[str, str]]) -> list[tuple[int, int, int]]:
    """(bits, record, record) of each pair, the most doubtful first."""
    shas = sorted({sha for pair in pairs for sha in pair})
    first: dict[str, tuple[int, int]] = {}
    for start in range(0, len(shas), 500):
        part = shas[start : start + 500]
        found = session.execute(
            sa.select(ImageRecord.sha256, sa.func.min(ImageRecord.id), sa.func.min(ImageRecord.phash))
            .where(ImageRecord.sha256.in_(part))
            .group_by(ImageRecord.sha256)
        )
        first |= {str(sha): (number, int(phash or "0", 16)) for sha, number, phash in found}
    known = [(first[one], first[two]) for one, two in pairs if one in first and two in first]
    return sorted(((a[1] ^ b[1]).bit_count(), a[0], b[0]) for a, b in known)[::-1]


def _newest(session: Session, count: int, codes: tuple[str, ...] = ()) -> list[ImageRecord]:
    """The newest records with these reason codes; with none, of all other records that cannot be used."""
    judged = [ImageRecord.reason.startswith(f"{code}:", autoescape=True) for code in codes or JUDGED_BY_SETTLE]
    query = sa.select(ImageRecord).order_by(ImageRecord.id.desc()).limit(count)
    if codes:
        # Side by side, those that contradict each other.
        found = session.scalars(query.where(ImageRecord.state == "quarantined", sa.or_(*judged)))
        return sorted(found, key=lambda record: (record.phash or "", record.sha256 or "", record.id))
    other = sa.or_(ImageRecord.reason.is_(None), sa.not_(sa.or_(*judged)))
    return list(session.scalars(query.where(ImageRecord.state.in_(REFUSED), other)))
