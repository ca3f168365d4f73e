"""Labels that the champion disputes, by confident learning.

The champion disputes a label when another class is at least as probable as that class usually is for its own images
(Northcutt, Jiang, Chuang, "Confident learning: estimating uncertainty in dataset labels", JAIR 70, 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from lawnwatch import bundle, images
from lawnwatch.catalog import Catalog, ImageRecord, Label
from lawnwatch.config import Settings
from lawnwatch.errors import ImageError, NotFound
from lawnwatch.quality.facts import Floats
from lawnwatch.store import ObjectStore

THREADS = 4  # pictures read and decoded at once
BATCH = 64  # pictures held in memory
OUTSIDE = 10  # images that the champion never saw, from which a class's usual probability is taken


@dataclass(frozen=True)
class Suspect:
    """An image whose label the champion disputes.

    Attributes:
        probability: of the class that the champion sees.
        given_probability: of the label that the record carries.
        trained_on: the champion learned this very label from it, so its dispute weighs more and comes rarely.
    """

    id: int
    label: str
    predicted: str
    probability: float
    given_probability: float
    trained_on: bool


@dataclass(frozen=True)
class Noise:
    """What the champion says of the labels.

    Attributes:
        asked: images it was asked about. outside: those among them that it never trained on.
        usual: class to the mean probability it gives images of that class.
        why_not: why it was not asked, when it was not.
    """

    champion: int | None
    asked: int
    outside: int
    usual: dict[str, float]
    suspects: list[Suspect]
    why_not: str

    @staticmethod
    def left_out(why_not: str) -> Noise:
        return Noise(None, 0, 0, {}, [], why_not)


def dispute(
    settings: Settings,
    catalog: Catalog,
    store: ObjectStore,
    champion: bundle.Bundle,
    classes: list[str],
    progress: Callable[[str], None],
) -> Noise:
    """Ask the champion about the newest images, those it never trained on first. Raises Unavailable."""
    manifest = champion.manifest
    known = sorted(set(manifest.classes) & set(classes))
    if not known:
        return Noise.left_out(f"Labels were not questioned: champion v{manifest.model_version} knows none of them.")
    # Stored before that training and of its split: the champion has (or could have) learned the label from it.
    trained_on = sa.and_(ImageRecord.split == "train", ImageRecord.fetched_at < manifest.lineage.created_at)
    with catalog.session() as session:
        rows = session.execute(
            sa.select(ImageRecord.id, ImageRecord.object_key, Label.name, sa.case((trained_on, 1), else_=0))
            .join(Label, ImageRecord.label_id == Label.id)
            .where(ImageRecord.state == "stored", Label.name.in_(known))
            .order_by(sa.case((trained_on, 1), else_=0), ImageRecord.id.desc())
            .limit(settings.quality.label_images)
        ).all()
    rows = list({row.object_key: row for row in reversed(rows)}.values())[::-1]
    if not rows:
        return Noise.left_out("Labels were not questioned: LAWNWATCH_QUALITY__LABEL_IMAGES is 0.")
    graph = bundle.Graph(champion.bytes_of(bundle.MODEL), classes=len(manifest.classes), threads=2)
    progress(f"Asking champion v{manifest.model_version} about the labels of {len(rows):,} images.")

    def read(key: str) -> images.Rgb | None:
        try:
            return images.decode(store.get(key), size=graph.size, max_pixels=settings.images.max_pixels)
        except (NotFound, ImageError):  # `lawnwatch data recheck` is the one that reports lost objects
            return None

    asked, answers = [], []
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            for row, picture in zip(batch, pool.map(read, [row.object_key for row in batch]), strict=True):
                if picture is not None:
                    asked.append(row)
                    answers.append(graph(picture).logits)
    if not asked:
        return Noise.left_out("Labels were not questioned: none of the images could be read from the store.")
    p = bundle.probabilities(np.stack(answers), manifest.temperature)
    given = np.array([manifest.classes.index(row[2]) for row in asked])
    outside = np.array([not row[3] for row in asked])
    predicted, usual = disputed(p, given, outside)
    suspects = [
        Suspect(
            id=asked[i].id,
            label=asked[i][2],
            predicted=manifest.classes[int(predicted[i])],
            probability=round(float(p[i, predicted[i]]), 4),
            given_probability=round(float(p[i, given[i]]), 4),
            trained_on=not outside[i],
        )
        for i in np.flatnonzero(predicted != given)
    ]
    suspects.sort(key=lambda one: (one.trained_on, -one.probability, one.id))
    return Noise(
        champion=manifest.model_version,
        asked=len(asked),
        outside=int(outside.sum()),
        usual={manifest.classes[k]: round(float(u), 4) for k, u in enumerate(usual) if np.isfinite(u)},
        suspects=suspects,
        why_not="",
    )


def disputed(p: Floats, given: NDArray[np.int64], outside: NDArray[np.bool_]) -> tuple[NDArray[np.int64], Floats]:
    """The class that each image confidently belongs to, its given one where no other does (confident learning).

    A class's usual probability is its mean over the images given that class: over those outside the training where
    there are enough, because a model is surer of what it learned.

    Args:
        p: (n, k) probabilities that add up to 1. given: (n,) class numbers. outside: (n,) not trained on.

    Returns:
        (n,) class numbers, and (k,) usual probabilities, infinite for a class that no image was given.
    """
    usual = np.full(p.shape[1], np.inf)
    for k in range(p.shape[1]):
        mine = given == k
        if np.count_nonzero(mine & outside) >= OUTSIDE:
            mine &= outside
        if mine.any():
            usual[k] = p[mine, k].mean()
    confident = np.where(p >= usual, p, -1.0)
    best = confident.argmax(axis=1)
    return np.where(confident.max(axis=1) > 0, best, given), usual
