"""Image records whose pictures are stored without a web: what a snapshot is made of."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from PIL import Image

from lawnwatch import dataset, images
from lawnwatch.catalog import Catalog, ImageRecord, Label, url_hash
from lawnwatch.config import Settings
from lawnwatch.store import open_store

SITE = "https://photos.example/"


def scene(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((160, 120), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@dataclass(frozen=True)
class Picture:
    """A picture under a name, with its own perceptual hash or a given one; without bytes, bytes like no other's."""

    name: str
    label: str
    data: bytes = b""
    source: str = "catalog"
    phash: int | None = None


class Lawn:
    """A catalog and a store, embedded unless servers are named."""

    def __init__(self, home: Path, **servers: str) -> None:
        self.settings = Settings(home=home, data={"min_per_class": 5}, **servers)  # type: ignore[arg-type]
        self.catalog = Catalog(self.settings)
        self.catalog.migrate()
        self.store = open_store(self.settings)

    def put_all(self, pictures: list[Picture]) -> list[str]:
        """Store pictures as an ingest would have; their SHA-256."""
        rows: list[dict[str, Any]] = []
        for picture in pictures:
            data = picture.data or picture.name.encode()
            sha = hashlib.sha256(data).hexdigest()
            phash = images.phash(images.decode(data, max_pixels=10**6)) if picture.phash is None else picture.phash
            key = f"images/{sha[:2]}/{sha}.jpg"
            self.store.put(key, data, if_absent=True)
            rows.append(
                {
                    "url": SITE + picture.name, "url_sha256": url_hash(SITE + picture.name), "state": "stored",
                    "label_source": picture.source, "sha256": sha, "object_key": key, "phash": f"{phash:016x}",
                    "bytes": len(data),
                }
            )  # fmt: skip
        with self.catalog.session() as session:
            known = dict(session.execute(sa.select(Label.name, Label.id)).all())
            for name in {picture.label for picture in pictures} - known.keys():
                session.add(label := Label(name=name))
                session.flush()
                known[name] = label.id
            for picture, row in zip(pictures, rows, strict=True):
                row["label_id"] = known[picture.label]
            session.execute(sa.insert(ImageRecord), rows)
        return [row["sha256"] for row in rows]

    def put(
        self, name: str, label: str, data: bytes = b"", *, source: str = "catalog", phash: int | None = None
    ) -> str:
        (sha,) = self.put_all([Picture(name, label, data, source, phash)])
        return sha

    def fill(self, count: int, first: int = 0) -> None:
        """So many pictures of grass and of dandelions, each a scene of its own."""
        numbers = range(first, first + count)
        grass = [Picture(f"g{number}.jpg", "grass", jpeg(scene(number))) for number in numbers]
        self.put_all(grass + [Picture(f"d{n}.jpg", "dandelion", jpeg(scene(10_000 + n))) for n in numbers])

    def snapshot(self, **options: float) -> dataset.Snapshot:
        return dataset.create_snapshot(self.settings, self.catalog, self.store, **options)

    def record(self, name: str) -> ImageRecord:
        return self.catalog.find(SITE + name)

    def change(self, name: str, **values: object) -> None:
        """Tamper with a record."""
        with self.catalog.session() as session:
            session.execute(sa.update(ImageRecord).where(ImageRecord.url == SITE + name).values(**values))

    def splits(self) -> dict[str, str | None]:
        """The split of each name."""
        with self.catalog.session() as session:
            found = session.execute(sa.select(ImageRecord.url, ImageRecord.split))
            return {url.removeprefix(SITE): split for url, split in found}
