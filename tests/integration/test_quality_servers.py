"""The quality report on a real MariaDB and a real MinIO says what it says on SQLite and a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from lawnwatch import bundle, images, quality
from lawnwatch.catalog import Catalog, ImageRecord, Label, QualityReport, url_hash
from lawnwatch.config import Settings
from lawnwatch.errors import NotFound
from lawnwatch.store import open_store

pytestmark = pytest.mark.integration


def no_champion() -> bundle.Bundle:
    raise NotFound("there is no champion yet.")


def fill(settings: Settings, photos: Path) -> quality.QualityResult:
    """Ten photos of each class, one of them under both labels, and one dead URL; reported on twice."""
    catalog, store = Catalog(settings), open_store(settings)
    catalog.migrate()
    files = [(label, file) for label in ("dandelion", "grass") for file in sorted((photos / label).glob("*.jpg"))[:10]]
    with catalog.session() as session:
        labels = {name: Label(name=name) for name in ("dandelion", "grass")}
        for label, file in [*files, ("grass", files[0][1])]:
            data = file.read_bytes()
            info, rgb = images.inspect_and_decode(data, max_pixels=10**7)
            sha256, url = (
                hashlib.sha256(data).hexdigest(),
                f"https://photos.example/{label}/{file.parent.name}{file.name}",
            )
            key = f"images/{sha256[:2]}/{sha256}.jpg"
            store.put(key, data)
            record = ImageRecord(
                url=url,
                url_sha256=url_hash(url),
                label=labels[label],
                label_source="import",
                state="stored",
                sha256=sha256,
                object_key=key,
                phash=f"{images.phash(rgb):016x}",
                width=info.width,
                height=info.height,
                brightness=images.brightness(rgb),
                sharpness=images.sharpness(rgb),
            )
            session.add(record)
        url = "https://photos.example/gone.jpg"
        session.add(
            ImageRecord(
                url=url,
                url_sha256=url_hash(url),
                label=labels["grass"],
                label_source="import",
                state="gone",
                reason="http_404: The source answered 404.",
            )
        )
    results = [
        quality.report(settings, catalog, store, find_champion=no_champion, progress=lambda line: None)
        for _ in range(2)
    ]
    assert results[0].report == results[1].report and not results[1].created
    page = store.get(results[0].object_key).decode()
    assert page.count("the same picture is labelled dandelion and grass") == 2 and "The source answered 404." in page
    with catalog.session() as session:
        (row,) = session.scalars(sa.select(QualityReport))
    assert row.passed and len(row.checks) == len(results[0].checks)
    return results[0]


def test_real_servers_give_the_same_checks(tmp_path: Path, photos: Path, mariadb: str, minio: Any) -> None:
    rules = {"data": {"min_per_class": 5}, "quality": {"max_label_conflicts": 0.2}}
    embedded = fill(Settings(home=tmp_path / "embedded", **rules), photos)
    real = fill(Settings(home=tmp_path / "real", database_url=SecretStr(mariadb), **minio.settings(), **rules), photos)
    assert real.checks == embedded.checks
