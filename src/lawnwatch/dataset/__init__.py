"""Snapshots: immutable lists of images with their splits, and the pictures behind them.

A snapshot is named by the SHA-256 of its rows; the same stored images always give the same snapshot. A split is for
life: a picture, its copies and its resizings (the duplicate group) share one, recorded when a snapshot first sees them.

Read in this order: `snapshot` (what it is), `splits` (which split a picture has, for life), `duplicates`, `create`,
`verify`, `pictures` (their bytes, for training).
"""

from lawnwatch.dataset.create import create_snapshot
from lawnwatch.dataset.duplicates import duplicate_groups, near_pairs
from lawnwatch.dataset.pictures import ObjectCache, Stream, decoder
from lawnwatch.dataset.snapshot import (
    SPLITS,
    Row,
    Snapshot,
    diff_snapshots,
    list_snapshots,
    load_snapshot,
    show_snapshot,
)
from lawnwatch.dataset.splits import Settled, settle
from lawnwatch.dataset.verify import verify_snapshot

__all__ = [
    "SPLITS",
    "ObjectCache",
    "Row",
    "Settled",
    "Snapshot",
    "Stream",
    "create_snapshot",
    "decoder",
    "diff_snapshots",
    "duplicate_groups",
    "list_snapshots",
    "load_snapshot",
    "near_pairs",
    "settle",
    "show_snapshot",
    "verify_snapshot",
]
