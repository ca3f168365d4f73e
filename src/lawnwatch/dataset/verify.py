"""Verifying a snapshot: its rows, the objects behind them and, when asked, what the pictures look like."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lawnwatch import images
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings
from lawnwatch.dataset.pictures import PARALLEL
from lawnwatch.dataset.snapshot import LISTED, SPLITS, Row, Snapshot, load_snapshot
from lawnwatch.errors import ImageError, IntegrityError, NotFound
from lawnwatch.store import ObjectStore

READ_AT_ONCE = 256
THUMBNAIL = 16  # side in pixels
FLAT = 2.0  # standard deviation of a thumbnail, grey levels of 255, below which it shows nothing
LOOK_ALIKE = 0.99
COMPARED_DIMENSIONS = 16  # of 768: lawns that are not alike are nearly all farther apart in so few


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
        return {"snapshot": snapshot, "ok": False, "faults": faults.found, "message": str(error)}
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
    said = time.monotonic()
    for done, (one, others) in enumerate(candidates(splits, thumbnails)):
        likeness = thumbnails[others] @ thumbnails[one]
        for i in np.flatnonzero(likeness >= LOOK_ALIKE):
            yield int(others[i]), one, float(likeness[i])
        if time.monotonic() - said > 10:
            said = time.monotonic()
            progress(f"Looked for the like of {done + 1:,} pictures in the splits before theirs.")


def candidates(splits: Sequence[str], thumbnails: NDArray[np.float32]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """For each picture the pictures of another split that may look alike; those left out cannot.

    Vectors of length one that correlate at r lie sqrt(2 - 2r) apart, and their shadows on a few dimensions are no
    farther. A tree finds the shadows that near without looking at every pair; the dimensions are those along which
    pictures differ most, so that few of them tell nearly all apart.

    Args:
        splits, thumbnails: as for `look_alikes`.

    Yields:
        A position, and the positions in one split that SPLITS names before the picture's own.
    """
    from scipy.spatial import KDTree  # type: ignore[import-untyped]

    shown = np.any(thumbnails, axis=1)  # of one colour: all zero, near each other and like nothing
    where = {split: np.flatnonzero((np.array(splits) == split) & shown) for split in SPLITS}
    _, directions = np.linalg.eigh(thumbnails.T @ thumbnails)  # the widest come last
    shadows = thumbnails @ directions[:, -COMPARED_DIMENSIONS:]
    radius = float(np.sqrt(2 - 2 * LOOK_ALIKE)) + 1e-3  # more than float32 rounds
    for one, other in combinations(SPLITS, 2):
        tree = KDTree(shadows[where[one]])
        for position in where[other]:
            near = tree.query_ball_point(shadows[position], radius, return_sorted=True)
            if near:
                yield int(position), where[one][near]
