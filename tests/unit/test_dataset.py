"""Snapshots (FAULTS 24-27, 29): one input, one id; a split is for life; contradictions are quarantined."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from PIL import Image

from lawnwatch import dataset, images
from lawnwatch.catalog import Catalog, ImageRecord, SnapshotRecord
from lawnwatch.config import Settings
from lawnwatch.errors import DataError, IntegrityError, NotFound, Unavailable
from lawnwatch.store import LocalStore, ObjectInfo

pytestmark = pytest.mark.unit


def scene(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((160, 120), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


class Lawn:
    """A catalog whose pictures are stored without a web."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(home=home, data={"min_per_class": 5})
        self.catalog = Catalog(self.settings)
        self.catalog.migrate()
        self.store = LocalStore(home / "store")

    def put(self, name: str, label: str, data: bytes, source: str = "catalog") -> str:
        """Store a picture under a URL; its SHA-256."""
        self.catalog.add(f"https://photos.example/{name}", label, source=source)
        (claimed,) = self.catalog.claim(1, worker="w:1:1")
        sha = hashlib.sha256(data).hexdigest()
        rgb = images.decode(data, max_pixels=10**6)
        key = f"images/{sha[:2]}/{sha}.jpg"
        self.store.put(key, data)
        values = {"state": "stored", "sha256": sha, "object_key": key, "phash": f"{images.phash(rgb):016x}"}
        assert self.catalog.finish("w:1:1", [(claimed.id, values)]) == 1
        return sha

    def fill(self, count: int, first: int = 0) -> None:
        for number in range(first, first + count):
            self.put(f"g{number}.jpg", "grass", jpeg(scene(number)))
            self.put(f"d{number}.jpg", "dandelion", jpeg(scene(10_000 + number)))

    def snapshot(self) -> dataset.Snapshot:
        return dataset.create_snapshot(self.settings, self.catalog, self.store)

    def record(self, name: str) -> ImageRecord:
        return self.catalog.find(f"https://photos.example/{name}")


@pytest.fixture
def lawn(tmp_path: Path) -> Lawn:
    return Lawn(tmp_path)


def splits(snapshot: dataset.Snapshot) -> dict[str, str]:
    return {row.sha256: row.split for row in snapshot.rows}


def test_same_input_same_snapshot(lawn: Lawn) -> None:
    lawn.fill(20)
    first, again = lawn.snapshot(), lawn.snapshot()
    assert first.created and not again.created
    assert (again.id, again.rows, again.counts, again.classes) == (first.id, first.rows, first.counts, first.classes)
    assert first.classes == ["dandelion", "grass"]
    assert dataset.load_snapshot(lawn.catalog, lawn.store, first.id[:9]).rows == first.rows
    assert [each["snapshot"] for each in dataset.list_snapshots(lawn.catalog)] == [first.id]


def test_the_order_of_arrival_does_not_matter(tmp_path: Path) -> None:
    one, two = Lawn(tmp_path / "one"), Lawn(tmp_path / "two")
    one.fill(20)
    for number in reversed(range(20)):
        two.fill(1, first=number)
    assert one.snapshot().id == two.snapshot().id


def test_the_shares_of_the_first_snapshot(lawn: Lawn) -> None:
    lawn.fill(40)
    assert lawn.snapshot().counts == {
        "train": {"dandelion": 26, "grass": 26},
        "validation": {"dandelion": 6, "grass": 6},
        "test": {"dandelion": 8, "grass": 8},
    }


def test_26_a_split_is_for_life_and_the_test_split_does_not_grow(lawn: Lawn) -> None:
    lawn.fill(30)
    before = splits(lawn.snapshot())
    lawn.fill(30, first=100)
    after = lawn.snapshot()
    assert after.created
    assert {sha: split for sha, split in splits(after).items() if sha in before} == before
    newcomers = Counter(split for sha, split in splits(after).items() if sha not in before)
    assert newcomers["test"] == 0 and newcomers["train"] > newcomers["validation"] > 0


def test_26_copies_and_resizings_share_a_split_at_once_and_later(lawn: Lawn) -> None:
    lawn.fill(20)
    for number in range(20):
        lawn.put(f"small{number}.jpg", "grass", jpeg(scene(number).resize((90, 70)), 80))
    first = lawn.snapshot()
    groups = defaultdict(set)
    for row in first.rows:
        groups[row.group].add(row.split)
    assert len(first.rows) == 60 and len(groups) == 40
    assert all(len(split) == 1 for split in groups.values())
    for number in range(20):
        lawn.put(f"later{number}.jpg", "dandelion", jpeg(scene(10_000 + number), 55))
    later = lawn.snapshot()
    for number in range(20):
        copy, origin = lawn.record(f"later{number}.jpg"), lawn.record(f"d{number}.jpg")
        assert (copy.split, copy.group_id) == (origin.split, origin.group_id)
    assert later.counts["test"]["dandelion"] == 2 * first.counts["test"]["dandelion"]


def test_26_a_newcomer_that_bridges_two_splits_is_quarantined(lawn: Lawn) -> None:
    lawn.fill(20)
    first = lawn.snapshot()
    train, test = (next(row for row in first.rows if (row.split, row.label) == (s, "grass")) for s in ("train", "test"))
    sha = lawn.put("bridge.jpg", "grass", jpeg(scene(777)))
    # Hashes four bits from each: within the distance of both, while the two are eight apart.
    with lawn.catalog.session() as session:
        for row_sha, value in ((train.sha256, 0b0), (test.sha256, 0b11111111), (sha, 0b1111)):
            session.execute(
                sa.update(ImageRecord).where(ImageRecord.sha256 == row_sha).values(phash=f"{value << 32:016x}")
            )
    after = lawn.snapshot()
    record = lawn.record("bridge.jpg")
    assert record.state == "quarantined" and (record.reason or "").startswith("split_bridge: ")
    assert (after.id, splits(after)) == (first.id, splits(first))


def test_25_one_picture_with_two_labels_is_trained_under_neither(lawn: Lawn) -> None:
    lawn.fill(20)
    lawn.put("same.jpg", "dandelion", jpeg(scene(3)))
    snapshot = lawn.snapshot()
    assert snapshot.quarantined == 2
    assert hashlib.sha256(jpeg(scene(3))).hexdigest() not in splits(snapshot)
    for name in ("g3.jpg", "same.jpg"):
        assert (lawn.record(name).reason or "").startswith("label_conflict: ")
    lawn.put("third.jpg", "grass", jpeg(scene(3), 70))
    assert lawn.snapshot().id == snapshot.id, "a further copy does not slip through"


def test_25_a_correction_frees_all_copies(lawn: Lawn) -> None:
    lawn.fill(20)
    lawn.put("same.jpg", "dandelion", jpeg(scene(3)))
    lawn.snapshot()
    lawn.catalog.relabel("https://photos.example/same.jpg", "grass")
    healed = lawn.snapshot()
    assert healed.quarantined == 0 and hashlib.sha256(jpeg(scene(3))).hexdigest() in splits(healed)
    assert {lawn.record(name).state for name in ("g3.jpg", "same.jpg")} == {"stored"}


@pytest.mark.parametrize(("grass", "dandelion"), [(0, 0), (9, 0), (9, 4)])
def test_27_too_few_images_write_nothing(lawn: Lawn, grass: int, dandelion: int) -> None:
    for number in range(grass):
        lawn.put(f"g{number}.jpg", "grass", jpeg(scene(number)))
    for number in range(dandelion):
        lawn.put(f"d{number}.jpg", "dandelion", jpeg(scene(100 + number)))
    with pytest.raises(DataError) as caught:
        lawn.snapshot()
    assert caught.value.hint
    assert list(lawn.store.list("snapshots/")) == []
    with lawn.catalog.session() as session:
        assert session.scalar(sa.select(sa.func.count(ImageRecord.split))) == 0
    with pytest.raises(NotFound):
        dataset.load_snapshot(lawn.catalog, lawn.store)


def test_27_copies_do_not_make_a_class_large_enough(lawn: Lawn) -> None:
    lawn.fill(5)
    for number in range(9):
        lawn.put(f"copy{number}.jpg", "daisy", jpeg(scene(500)))
    with pytest.raises(DataError, match="daisy has 1"):
        lawn.snapshot()


def test_samples_are_marked(lawn: Lawn) -> None:
    lawn.fill(6)
    assert not lawn.snapshot().samples
    lawn.put("drawn.jpg", "grass", jpeg(scene(300)), source="sample")
    snapshot = lawn.snapshot()
    assert snapshot.samples and "drawn samples" in snapshot.summary()["message"]
    assert dataset.load_snapshot(lawn.catalog, lawn.store).samples


class Dying(LocalStore):
    """A store that goes away before a put."""

    def __init__(self, root: Path, at: str) -> None:
        super().__init__(root)
        self.at = at

    def put(self, key: str, data: bytes | Path, **options: object) -> ObjectInfo:
        if key.endswith(self.at):
            raise Unavailable("The store does not answer.")
        return super().put(key, data, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("at", ["manifest.parquet", "snapshot.json"])
def test_29_32_a_snapshot_cut_off_is_none_and_a_rerun_reaches_the_same(lawn: Lawn, at: str) -> None:
    lawn.fill(20)
    with pytest.raises(Unavailable):
        dataset.create_snapshot(lawn.settings, lawn.catalog, Dying(lawn.store.root, at))
    with pytest.raises(NotFound):
        dataset.load_snapshot(lawn.catalog, lawn.store)
    rerun = lawn.snapshot()
    untouched = Lawn(lawn.settings.home / "untouched")
    untouched.fill(20)
    assert rerun.id == untouched.snapshot().id


def test_29_a_missing_object_makes_no_snapshot(lawn: Lawn) -> None:
    lawn.fill(20)
    lawn.store.delete(str(lawn.record("g3.jpg").object_key))
    with pytest.raises(IntegrityError, match=r"g3\.jpg"):
        lawn.snapshot()
    assert list(lawn.store.list("snapshots/")) == []


def test_an_altered_manifest_is_refused(lawn: Lawn) -> None:
    lawn.fill(20)
    snapshot = lawn.snapshot()
    key = f"snapshots/{snapshot.id}/manifest.parquet"
    data = bytearray(lawn.store.get(key))
    data[len(data) // 2] ^= 1
    lawn.store.put(key, bytes(data))
    with pytest.raises(IntegrityError):
        dataset.load_snapshot(lawn.catalog, lawn.store)
    # An altered manifest whose recorded hash was altered with it still does not give the id.
    buffer = io.BytesIO()
    rows = [{**asdict(row), "split": "train"} for row in snapshot.rows]
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    summary = json.loads(lawn.store.get(f"snapshots/{snapshot.id}/snapshot.json"))
    summary["manifest_sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    lawn.store.put(key, buffer.getvalue())
    lawn.store.put(f"snapshots/{snapshot.id}/snapshot.json", json.dumps(summary).encode())
    with pytest.raises(IntegrityError, match="does not give its id"):
        dataset.load_snapshot(lawn.catalog, lawn.store)


def test_snapshots_by_their_beginning(lawn: Lawn) -> None:
    lawn.fill(20)
    lawn.snapshot()
    with lawn.catalog.session() as session:
        session.add(SnapshotRecord(id="f" * 64, counts={}, samples=False))
    for wrong in ("", "zz", "%", "_"):
        with pytest.raises(NotFound):
            dataset.load_snapshot(lawn.catalog, lawn.store, wrong)


# --- pictures -------------------------------------------------------------------------------------------------------


def keep(store: LocalStore, *contents: bytes) -> list[tuple[str, str]]:
    """Store objects; (key, SHA-256) of each."""
    found = [(f"images/{hashlib.sha256(data).hexdigest()}", hashlib.sha256(data).hexdigest()) for data in contents]
    for (key, _), data in zip(found, contents, strict=True):
        store.put(key, data)
    return found


def test_a_cached_copy_is_verified_at_every_reading(tmp_path: Path) -> None:
    store, cache = LocalStore(tmp_path / "store"), dataset.ObjectCache(tmp_path / "cache", 10**6)
    ((key, sha),) = keep(store, b"picture")
    assert cache.read(store, key, sha) == b"picture"
    (copy,) = (tmp_path / "cache").glob("*/*")
    copy.write_bytes(b"altered")
    assert cache.read(store, key, sha) == b"picture" == copy.read_bytes(), "a rotten copy is fetched anew"
    store.put(key, b"altered")
    assert cache.read(store, key, sha) == b"picture", "the cache serves while the store is wrong"
    with pytest.raises(IntegrityError, match=key):
        dataset.ObjectCache(tmp_path / "other", 10**6).read(store, key, sha)
    assert not list((tmp_path / "other").glob("*/*"))


def test_the_least_recently_used_copies_go_first(tmp_path: Path) -> None:
    store, cache = LocalStore(tmp_path / "store"), dataset.ObjectCache(tmp_path / "cache", 100_000)
    objects = keep(store, *(bytes([number]) * 5_000 for number in range(20)))
    for number, (key, sha) in enumerate(objects):
        cache.read(store, key, sha)
        os.utime(tmp_path / "cache" / sha[:2] / sha, (1_000_000 + number,) * 2)
    cache.read(store, *objects[0])  # used just now
    (tmp_path / "cache" / "00").mkdir(exist_ok=True)
    left = tmp_path / "cache" / "00" / ".part-left by a killed process"
    left.write_bytes(b"half")
    os.utime(left, (1_000_000,) * 2)
    for key, sha in keep(store, b"a" * 5_000, b"b" * 5_000):
        cache.read(store, key, sha)
    there = {path.name for path in (tmp_path / "cache").glob("*/*")}
    assert objects[0][1] in there and objects[1][1] not in there and objects[19][1] in there
    assert left.name not in there
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*")) <= 100_000


def test_no_cache_and_no_room_for_one_are_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = LocalStore(tmp_path / "store")
    ((key, sha), (large, large_sha)) = keep(store, b"picture", b"p" * 2_000)
    none = dataset.ObjectCache(tmp_path / "none", 0)
    assert none.read(store, key, sha) == b"picture" and not (tmp_path / "none").exists()
    small = dataset.ObjectCache(tmp_path / "small", 1_000)
    assert small.read(store, large, large_sha) and not (tmp_path / "small").exists()
    (tmp_path / "file").write_text("a file where the folder should be")
    for _ in range(2):
        broken = dataset.ObjectCache(tmp_path / "file", 10**6)
        assert broken.read(store, key, sha) == b"picture" and broken.read(store, key, sha) == b"picture"


def test_the_stream_gives_what_serving_sees_in_an_order_that_the_seed_decides(lawn: Lawn, tmp_path: Path) -> None:
    lawn.fill(6)
    snapshot, cache = lawn.snapshot(), dataset.ObjectCache(tmp_path / "cache", 10**9)

    def read(seed: int | None) -> tuple[list[bytes], list[int]]:
        found = dataset.stream(
            snapshot.rows, lawn.store, cache, classes=snapshot.classes, size=96, max_pixels=10**6, batch=5,
            shuffle_seed=seed,
        )  # fmt: skip
        assert found.element_spec[0].shape.as_list() == [None, 96, 96, 3]
        batches = list(found.as_numpy_iterator())
        assert [len(labels) for _, labels in batches] == [5, 5, 2]
        assert {(str(p.dtype), str(n.dtype)) for p, n in batches} == {("uint8", "int32")}
        return [p.tobytes() for pictures, _ in batches for p in pictures], [int(n) for _, ns in batches for n in ns]

    expected = [
        images.decode(lawn.store.get(row.object_key), size=96, max_pixels=10**6).tobytes() for row in snapshot.rows
    ]
    pictures, labels = read(None)
    assert pictures == expected
    assert [snapshot.classes[number] for number in labels] == [row.label for row in snapshot.rows]
    shuffled, of_shuffled = read(7)
    assert (shuffled, of_shuffled) == read(7) and shuffled != read(8)[0] and shuffled != expected
    assert sorted(zip(shuffled, of_shuffled, strict=True)) == sorted(zip(pictures, labels, strict=True))


def test_a_picture_that_cannot_be_read_is_said_as_what_it_is(lawn: Lawn, tmp_path: Path) -> None:
    lawn.fill(6)
    snapshot, cache = lawn.snapshot(), dataset.ObjectCache(tmp_path / "cache", 10**9)
    lawn.store.delete(snapshot.rows[7].object_key)
    with pytest.raises(NotFound, match=snapshot.rows[7].object_key):
        list(
            dataset.batches(
                snapshot.rows, lawn.store, cache, classes=snapshot.classes, batch=4,
                prepare=lambda row, data: np.frombuffer(data[:3], np.uint8),
            )
        )  # fmt: skip


# --- duplicates -----------------------------------------------------------------------------------------------------


def test_near_pairs_are_those_of_the_slow_way() -> None:
    rng = np.random.default_rng(5)
    hashes = rng.integers(0, 2**64, 300, dtype=np.uint64)
    for number in range(0, 300, 3):  # neighbours at every distance from 0 to 9
        flips = rng.choice(64, number % 10, replace=False)
        hashes[number + 1] = hashes[number] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64), initial=0)
    for distance in (0, 1, 6, 16):
        slow = [
            (one, two)
            for one in range(300)
            for two in range(one + 1, 300)
            if int(hashes[one] ^ hashes[two]).bit_count() <= distance
        ]
        found = {(int(one), int(two)) for pairs in dataset.near_pairs(hashes, distance) for one, two in pairs}
        assert sorted(found) == slow


def test_thousands_of_blank_pictures_are_one_group_in_no_time() -> None:
    roots, pairs = dataset.duplicate_groups(np.zeros(20_000, np.uint64), 6)
    assert not roots.any() and len(pairs) == 1_000
