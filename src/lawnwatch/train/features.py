"""What the frozen network says of pictures and of their augmented views, made once and cached by content."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lawnwatch import dataset, images, model
from lawnwatch.config import Settings
from lawnwatch.store import ObjectStore

# Changes whenever the code of this package would train something else from the same input.
RECIPE = "3"
VIEWS = 4  # augmented views of a training picture, beside the picture itself
VIEW_SIZE = 256  # side from which augmented views are cropped
PROBE_IMAGES = 10_000  # a head of 1280 numbers a class learns nothing from more; beyond this, the first by hash
VIEWED_IMAGES = 2000  # cut activations take 37 kB a view; beyond this, so many pictures are seen in views
PREPARED_AT_ONCE = 2  # pictures decoded and augmented beside the network, which takes every core it gets
COLOR_FEATURES = 8 * 8 + 8 + 6 + 2

Progress = Callable[[str], None]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Pictures:
    """The n pictures of a split, or the first of them.

    Attributes:
        rows: by hash: the first few are then a fair draw over classes and sources.
        labels: (n,) int64, index into the snapshot's classes.
        groups: (n,) int64; copies of one picture share a number.
    """

    rows: list[dataset.Row]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]

    @classmethod
    def of(cls, snapshot: dataset.Snapshot, split: str, limit: int | None = None) -> Pictures:
        """A split's pictures; the first `limit` of them when that is given."""
        rows = sorted(snapshot.split(split), key=lambda row: str(row.sha256))[:limit]
        labels = np.array([snapshot.classes.index(row.label) for row in rows], dtype=np.int64)
        groups = np.unique([row.group for row in rows], return_inverse=True)[1].astype(np.int64)
        return cls(rows, labels, groups)


@dataclass(frozen=True)
class Features(Pictures):
    """What the frozen network says of them.

    Attributes:
        pooled: (n, 1280) float32 of the pictures as serving sees them; on disk, so that memory does not grow with n.
        views: (m, VIEWS, 1280) float32 of the augmented views of the first m pictures.
        cut: (m, VIEWS + 1, 14, 14, 96) float16 of these pictures and their views; (0, ...) when nothing is fine-tuned.
    """

    pooled: Floats
    views: Floats
    cut: NDArray[np.float16]


class Extractor:
    """Runs the frozen network over pictures and their views, once; results are cached by content.

    Args:
        basis: what tells this network from others.
    """

    def __init__(self, settings: Settings, store: ObjectStore, network: model.Network, basis: str) -> None:
        tf = model.tensorflow()
        self._settings = settings
        self._store = store
        self._pictures = dataset.ObjectCache.of(settings)
        self._cache = settings.home / "cache" / "features"
        self._kind = f"{RECIPE}|{basis}|{settings.train.seed}|{json.dumps(images.PREPROCESSING, sort_keys=True)}"

        def forward(batch: Any) -> Any:
            cut = network.bottom(batch, training=False)
            return tf.cast(cut, tf.float16), tf.reduce_mean(network.top(cut, training=False), [1, 2])

        signature = [tf.TensorSpec([None, model.SIZE, model.SIZE, 3], tf.uint8)]
        self._forward = tf.function(forward, input_signature=signature)

    def features(
        self,
        pictures: Pictures,
        work: Path,
        *,
        classes: list[str],
        name: str,
        progress: Progress,
        views: int = VIEWS,
        cuts: bool = False,
    ) -> Features:
        """Features of pictures; those of every picture are kept in a file below `work` that goes with them.

        Of several processes at once one computes, and the others wait to find its results.

        Args:
            name: of the pictures, for people.
            views: how many augmented views are wanted too. cuts: whether the cut activations are.
        """
        rows = pictures.rows
        viewed = min(len(rows), VIEWED_IMAGES) if views else 0
        # Without a name on disk: two processes at once never share it, and none is left behind.
        with tempfile.TemporaryFile(dir=work) as file:
            pooled = np.memmap(file, mode="w+", dtype=np.float32, shape=(len(rows), model.EMBEDDING))
        seen = np.zeros((viewed, views, model.EMBEDDING), np.float32)
        cut = np.zeros((viewed if cuts else 0, views + 1, *model.CUT_SHAPE), np.float16)
        said = time.monotonic()

        def keep(i: int, arrays: dict[str, NDArray[Any]]) -> None:
            nonlocal said
            pooled[i] = arrays["pooled"][0]
            if i < viewed:
                seen[i] = arrays["pooled"][1:]
            if i < len(cut):
                cut[i] = arrays["cut"]
            if time.monotonic() - said > 10:
                said = time.monotonic()
                progress(f"Features of the {name}: {i + 1} of {len(rows)} images.")

        self._cache.mkdir(parents=True, exist_ok=True)
        with (self._cache / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._each(rows[:viewed], classes, views, cuts, keep)
            self._each(rows[viewed:], classes, 0, False, lambda i, arrays: keep(viewed + i, arrays))
        return Features(rows, pictures.labels, pictures.groups, pooled, seen, cut)

    def _each(
        self,
        rows: Sequence[dataset.Row],
        classes: list[str],
        views: int,
        cuts: bool,
        keep: Callable[[int, dict[str, NDArray[Any]]], None],
    ) -> None:
        """Call `keep` with the arrays of each picture, from the cache or from the network."""
        missing = []
        for i, row in enumerate(rows):
            known = self._known(self._file(row, cuts, views))
            if known is None and not cuts:  # what is kept with cuts serves as well
                known = self._known(self._file(row, True, views))
            if known is None:
                missing.append(i)
            else:
                keep(i, known)
        # Pictures are fetched, decoded and augmented in other threads while the network works on those before.
        prepared = dataset.Stream(
            [rows[i] for i in missing],
            self._store,
            self._pictures,
            classes=classes,
            batch=max(1, 32 // (views + 1)),
            prepare=partial(self._views, views=views),
            shape=(views + 1, model.SIZE, model.SIZE, 3),
            parallel=PREPARED_AT_ONCE,
        )
        waiting = iter(missing)
        for pictures, _ in prepared:
            outputs = (part.numpy() for part in self._forward(pictures.reshape(-1, *pictures.shape[2:])))
            cuts_of, pooled_of = (part.reshape(*pictures.shape[:2], *part.shape[1:]) for part in outputs)
            for cut_of, pool_of in zip(cuts_of, pooled_of, strict=True):
                i = next(waiting)
                arrays = {"pooled": pool_of}
                if cuts:
                    arrays["cut"] = cut_of
                buffer = io.BytesIO()
                np.savez(buffer, allow_pickle=False, **arrays)
                write_whole(self._file(rows[i], cuts, views), buffer.getvalue())
                keep(i, arrays)

    def _file(self, row: dataset.Row, cut: bool, views: int) -> Path:
        name = hashlib.sha256(f"{row.sha256}|{views}|{cut}|{self._kind}".encode()).hexdigest()
        return self._cache / name[:2] / f"{name}.npz"

    @staticmethod
    def _known(file: Path) -> dict[str, NDArray[Any]] | None:
        """Features kept before; None when they are not there or were cut off, and must be made anew."""
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return None

    def _views(self, row: dataset.Row, data: bytes, *, views: int) -> NDArray[np.uint8]:
        """(views + 1, 224, 224, 3) uint8: the picture as serving sees it, and its augmented views."""
        limit = self._settings.images.max_pixels
        pictures = [images.decode(data, size=model.SIZE, max_pixels=limit)]
        if views:
            large = images.decode(data, size=VIEW_SIZE, max_pixels=limit)
            rng = np.random.default_rng([self._settings.train.seed, int(row.sha256[:16], 16)])
            pictures += [augment(large, rng) for _ in range(views)]
        return np.stack(pictures)


def augment(rgb: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """One view of a picture as another phone might have taken it: crop, flip, tilt, light, blur, JPEG.

    Args:
        rgb: (side, side, 3) uint8.

    Returns:
        (224, 224, 3) uint8.
    """
    side, size = len(rgb), model.SIZE
    area, ratio = rng.uniform(0.7, 1.0), math.exp(rng.uniform(-0.12, 0.12))
    width, height = (min(side, int(side * math.sqrt(area * r))) for r in (ratio, 1 / ratio))
    x, y = int(rng.integers(0, side - width + 1)), int(rng.integers(0, side - height + 1))
    view: NDArray[Any] = rgb[y : y + height, x : x + width]
    if rng.random() < 0.5:
        view = view[:, ::-1]
    view = cv2.resize(np.ascontiguousarray(view), (size, size), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.25:
        turn = cv2.getRotationMatrix2D((size / 2, size / 2), rng.uniform(-20, 20), 1.0)
        view = cv2.warpAffine(view, turn, (size, size), borderMode=cv2.BORDER_REFLECT)
    light = view.astype(np.float32) * rng.uniform(0.7, 1.3)
    light = light.mean() + (light - light.mean()) * rng.uniform(0.75, 1.25)  # contrast
    grey = light.mean(axis=2, keepdims=True)
    light = (grey + (light - grey) * rng.uniform(0.7, 1.3)) * rng.uniform(0.93, 1.07, size=3)  # saturation, white
    view = light.clip(0, 255).astype(np.uint8)
    if rng.random() < 0.25:
        view = cv2.GaussianBlur(view, (0, 0), rng.uniform(0.4, 1.4))
    if rng.random() < 0.3:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 80))]
        # Channels go in and come out in the same order, whatever OpenCV calls them.
        return np.asarray(cv2.imdecode(cv2.imencode(".jpg", view, quality)[1], cv2.IMREAD_COLOR), dtype=np.uint8)
    return np.asarray(view, dtype=np.uint8)


def colors(settings: Settings, store: ObjectStore, snapshot: dataset.Snapshot, rows: Sequence[dataset.Row]) -> Floats:
    """(n, COLOR_FEATURES) float32 of pictures, for the baseline; no network runs."""
    found = dataset.Stream(
        rows,
        store,
        dataset.ObjectCache.of(settings),
        classes=snapshot.classes,
        batch=32,
        prepare=dataset.decoder(model.SIZE, max_pixels=settings.images.max_pixels),
        shape=(model.SIZE, model.SIZE, 3),
    )
    return np.stack([color_features(picture) for pictures, _ in found for picture in pictures])


def color_features(rgb: NDArray[np.uint8]) -> Floats:
    """(COLOR_FEATURES,) float32: hue-saturation and value histograms, channel means and spreads, two of texture."""
    hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
    hue_saturation = cv2.calcHist([hsv], [0, 1], None, [8, 8], [0, 180, 0, 256]).ravel() / hsv[..., 0].size
    value = cv2.calcHist([hsv], [2], None, [8], [0, 256]).ravel() / hsv[..., 0].size
    channels = rgb.reshape(-1, 3) / 255.0
    texture = [math.log1p(images.sharpness(rgb)) / 10, images.brightness(rgb)]
    return np.concatenate([hue_saturation, value, channels.mean(0), channels.std(0), texture]).astype(np.float32)


def first_pictures(settings: Settings, store: ObjectStore, snapshot: dataset.Snapshot) -> NDArray[np.uint8]:
    """Up to 64 training pictures, by hash, as (n, 224, 224, 3) uint8."""
    rows = sorted(snapshot.split("train"), key=lambda row: row.sha256)[:64]
    return decoded(settings, store, snapshot, rows)


def decoded(
    settings: Settings, store: ObjectStore, snapshot: dataset.Snapshot, rows: Sequence[dataset.Row]
) -> NDArray[np.uint8]:
    """A few pictures as serving sees them, (n, 224, 224, 3) uint8."""
    found = dataset.Stream(
        rows,
        store,
        dataset.ObjectCache.of(settings),
        classes=snapshot.classes,
        batch=len(rows),
        prepare=dataset.decoder(model.SIZE, max_pixels=settings.images.max_pixels),
        shape=(model.SIZE, model.SIZE, 3),
    )
    return np.concatenate([pictures for pictures, _ in found])


def write_whole(path: Path, data: bytes) -> None:
    """Whole or not at all: a killed run leaves no half file under a final name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(path)
